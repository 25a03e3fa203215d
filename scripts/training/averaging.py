"""An exponential moving average of a model's weights, and the weights that are trained beside it in a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """The average `a ← decay · a + (1 − decay) · w` of the weights `w` after each step; it begins with those after the first.

    Args:
        model: its parameters are those that are trained.
        decay: more than 0 and less than 1.
        resumes: whether the model has the average of earlier steps now, to go on from.
    """

    def __init__(self, model: nn.Module, decay: float, resumes: bool = False):
        # Parameters alone: a copy of the model would have the hooks of whatever it is wrapped in.
        self.trained = nn.ParameterList(model.parameters())
        self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        if resumes:
            # Otherwise the first update would be a copy.
            self.average.n_averaged.fill_(1)

    def update(self) -> None:
        """Takes the weights after a step into the average."""
        self.average.update_parameters(self.trained)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Values change places, not tensors, which a compiled model or a wrapper may hold.
        for weight, average in zip(self.trained, self.average.module, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def save_weights(model: nn.Module, path: Path) -> None:
    """Saves the parameters of a model by name, in their own precision."""
    save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)


@torch.no_grad()
def restore_weights(model: nn.Module, path: Path) -> None:
    """Gives a model the parameters of `save_weights`.

    Raises:
        ValueError: if a parameter is missing.
    """
    saved = load_file(path)
    for name, parameter in model.named_parameters():
        if name not in saved:
            raise ValueError(f"The weights in {path} must be all, {name} is missing.")
        parameter.copy_(saved[name])

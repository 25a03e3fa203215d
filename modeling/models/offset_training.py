"""Training of what depends on the offset, apart from the rest of a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..mixers.mixer import Mixer


class OffsetTraining:
    """What `TranslutionPreTrainedModel` has for training: frozen parameters, and a decay of the difference between offsets."""

    def freeze_all_but_offsets(self) -> None:
        """Freezes every parameter that does not belong to what depends on the offset: `requires_grad` becomes False.

        What stays trainable are the matrices of offsets, `{q,k,v}_bank` or `{q,k,v}_coefficients` and `{q,k,v}_factors`, their
        biases, the down and up projections of LoR-Translution, and of other mixers relative scalars and vectors.
        `requires_grad` is not saved: call this again after loading, and before an optimizer is made.

        Raises:
            ValueError: for a model in which nothing depends on the offset.
        """
        trained = [parameter for mixer in _mixers(self) for parameter in mixer.relative_parameters()]
        if not trained:
            raise ValueError(
                "`freeze_all_but_offsets` needs a layer with parameters of offsets, got `mixer_types` "
                f"{self.config.mixer_types}."
            )
        self.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    def decay_offsets(self, optimizer: Optimizer, rate: float) -> RemovableHandle:
        """Lets every step of an optimizer pull the matrices of a bank towards their mean, as AdamW pulls weights towards zero.

        Before a step `W[o] ← W[o] − lr · rate · (W[o] − W̄)`, where `W̄` is the mean over all offsets of a bank, of its
        biases, or of its coefficients, which the decay itself leaves where it is. `W[o] − W̄` is the gradient of
        `½ Σ_o ‖W[o] − W̄‖²`, which is `½ min_S Σ_o ‖W[o] − S‖²`: what weight decay does to the differences where a bank is
        written as a shared matrix `S` and one difference for each offset, with neither a parameter nor a sum more.

        Args:
            optimizer: with parameters of this model. It may be wrapped afterwards, by Accelerate or a scheduler.
            rate: at least 0; as `weight_decay` of AdamW, which is not changed, and pulls banks towards zero besides.

        Returns:
            A handle, whose `remove()` ends the decay. It is not saved with the optimizer.

        Raises:
            ValueError: for a rate out of range, or an optimizer that trains nothing that the decay is for.
        """
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise ValueError(f"`rate` must be a finite number of at least 0, got {rate!r}.")
        if not any(id(p) in _offset_tables(self) for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("`optimizer` must train parameters with one row per offset of this model, and has none.")

        @torch.no_grad()
        def pull_to_mean(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Looked up in each step: FSDP puts other tensors in the place of parameters once the optimizer is made.
            tables = _offset_tables(self)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in tables or parameter.grad is None:
                        continue
                    if parameter.ndim < 2 or len(parameter) != tables[id(parameter)]:
                        raise ValueError(
                            f"The decay needs whole tables of {tables[id(parameter)]} rows, got one of shape "
                            f"{list(parameter.shape)}: FSDP's first version flattens them, its second does not."
                        )
                    parameter.lerp_(parameter.mean(dim=0, keepdim=True), group["lr"] * rate)

        return optimizer.register_step_pre_hook(pull_to_mean)


def _mixers(model: nn.Module) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


def _offset_tables(model: nn.Module) -> dict[int, int]:
    """The number of rows of each parameter with one row per offset, by its id."""
    return {
        id(getattr(mixer, name)): mixer.bank_layout.num_offsets
        for mixer in _mixers(model)
        for name in mixer.offset_parameters()
    }


__all__ = ["OffsetTraining"]

"""Tensor parallelism: every process of a group has some of a mixer's heads, and computes with their share of its parameters.

Transformers reads the plan of a config, `base_model_tp_plan`, which names the style below for the mixers; a mixer says by
itself how each of its parameters is divided, see `Mixer.head_axis`.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `R` features of the relative part of LoR.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.utils import logging

from .masks import ALL_VISIBLE, AttentionMask
from .mixer import Mixer


# Builds of PyTorch may lack it.
if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


logger = logging.get_logger(__name__)

# Named in the plan of `TranslutionConfig`.
STYLE = "translution_heads"


def check_heads(model: nn.Module, size: int) -> None:
    """Refuses a model whose mixers cannot be divided among `size` processes.

    Raises:
        ValueError: if the trunk is that of another model, or a mixer has a number of heads that `size` does not divide.
    """
    if getattr(model.config, "trunk_config", None) is not None:
        raise ValueError(
            f"`tp_size` must be 1 for a model with the trunk of another one (`trunk_config`), got {size}: its plan does not know "
            "the mixers. FSDP shards such a model."
        )
    for mixer in model.modules():
        if isinstance(mixer, Mixer) and mixer.divides_by_heads and mixer.num_heads % size:
            raise ValueError(
                f"`tp_size` must divide `num_attention_heads` {mixer.num_heads}, got {size}: every process computes whole heads."
            )


def _enter(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """What all processes have, for a computation of which each does a part: gradients are summed over the processes."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _gather(tensor: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The parts that the processes have of a tensor, side by side along `dim`."""
    return DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])


def _mask_of_heads(mask: AttentionMask, heads: slice, mesh: DeviceMesh) -> AttentionMask:
    """A mask with a row for each head, for some of the heads."""

    def cut(pairs: Tensor | None) -> Tensor | None:
        return pairs if pairs is None or pairs.shape[1] == 1 else pairs[:, heads]

    additive = mask.additive
    if additive is not None and additive.requires_grad:
        additive = _enter(additive, mesh)
    return mask._replace(additive=cut(additive), visible=cut(mask.visible))


class HeadsParallel(TensorParallelLayer):
    """A mixer of which each process has `A / processes` heads; its input and its output are whole in every process.

    Parameters of heads are `Shard`, so that a process reads, stores and trains those of its own heads alone. What all
    heads share is `Replicate`, and its gradients are summed. A mixer that does not divide by heads is left whole: every
    process computes all of it.
    """

    def install_forward(self, module: Mixer, mesh: DeviceMesh) -> Mixer:
        if not module.divides_by_heads:
            logger.warning_once(
                f"Tensor parallelism leaves {type(module).__name__} whole in every process: it mixes features of different heads."
            )
            return module
        rowwise, first = ALL_PARALLEL_STYLES["rowwise"], mesh.get_local_rank()
        for name, _ in list(module.named_parameters()):
            owner, _, parameter = name.rpartition(".")
            if owner == "o_proj":
                rowwise.shard_param(module.o_proj, parameter, mesh)
            else:
                _divide(module.get_submodule(owner), parameter, module.head_axis(name), mesh)
        rowwise.install_forward(module.o_proj, mesh)
        module.num_heads //= mesh.size()
        module.inner_size //= mesh.size()
        module.own_heads = slice(first * module.num_heads, (first + 1) * module.num_heads)
        for name in module.gathered_inputs:
            part = getattr(module, name, None)
            if part is not None:
                _gather_input(part, mesh)
        return super().install_forward(module, mesh)

    def transform_inputs_pre_forward(
        self, module: Mixer, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = _mask_of_heads(kwargs.get("mask", ALL_VISIBLE), module.own_heads, mesh)
        return (_enter(args[0], mesh), *args[1:]), {**kwargs, "mask": mask}

    @contextmanager
    def context_around_forward(self, module: Mixer, mesh: DeviceMesh) -> Iterator[None]:
        """Operators over pairs know no `DTensor`: for the time of the forward pass parameters are the local ones."""
        whole = []
        for name, part in module.named_modules():
            if name == "o_proj":
                continue
            for key, parameter in part.named_parameters(recurse=False):
                # Of what all heads share, each process has the gradients of its own.
                gradients = [Partial() if parameter.placements == (Replicate(),) else parameter.placements[0]]
                whole.append((part, key, parameter, parameter.to_local(grad_placements=gradients)))
        for part, key, _, local in whole:
            part._parameters[key] = local
        try:
            yield
        finally:
            for part, key, parameter, _ in whole:
                part._parameters[key] = parameter

    def transform_output_post_forward(
        self, module: Mixer, output: tuple[Tensor, Tensor | None], mesh: DeviceMesh
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = output
        return mixed, None if weights is None else _gather(weights, 1, mesh).to_local()


def _divide(module: nn.Module, name: str, axis: int | None, mesh: DeviceMesh) -> None:
    """Makes a parameter one of which each process has a part along `axis`; without one, all of it."""
    whole = module._parameters[name]
    placement = Replicate() if axis is None else Shard(axis % whole.ndim)
    # Every process reads its own part of a checkpoint: nothing is sent.
    divided = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    module._parameters[name] = nn.Parameter(divided, requires_grad=whole.requires_grad)


def _gather_input(module: nn.Module, mesh: DeviceMesh) -> None:
    """For a projection from the features of all heads, whose input has those of the process' own heads."""
    project = module.forward

    def forward(features: Tensor) -> Tensor:
        return project(_gather(features, -1, mesh).to_local(grad_placements=[Partial()]))

    module.forward = forward


if torch.distributed.is_available():
    ALL_PARALLEL_STYLES.register(STYLE, HeadsParallel())


__all__ = ["check_heads"]

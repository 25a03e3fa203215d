"""Moves loaded weights to addresses that are no multiple of 64 bytes.

PyTorch begins every tensor that it allocates at such a multiple; where a file of weights is mapped into memory, they lie
where they lie in the file. Matrix products may take other kernels there. With `TRANSLUTION_TEST_UNALIGNED=1` all tests
run on such weights, whatever the version of Transformers or safetensors does by itself: `conftest.py` follows the
switch, and so do the programs that tests start and that load weights.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


SWITCH = "TRANSLUTION_TEST_UNALIGNED"
ALIGNMENT = 64


def switched_on() -> bool:
    """Raises `ValueError` where the variable is neither 0 nor 1."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"`{SWITCH}` must be 0 or 1, got {value!r}")
    return value == "1"


def unaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins 8 bytes after a multiple of 64, or one element where that is more.

    No tensor of a safetensors file need be aligned any better. A tensor without elements, or not on the CPU, is returned
    as it is.
    """
    size = tensor.element_size()
    if tensor.numel() == 0 or tensor.device.type != "cpu":
        return tensor
    room = torch.empty(tensor.numel() * size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + max(8, size)
    return room[start : start + tensor.numel() * size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def move_weights(module: nn.Module) -> None:
    """Moves all parameters and buffers; tied ones stay tied."""
    for tensor in (*module.parameters(), *module.buffers()):
        _move(tensor)


def _move(tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        # A quantised tensor is made of others.
        for name in tensor.__tensor_flatten__()[0]:
            _move(getattr(tensor, name))
    else:
        tensor.data = unaligned(tensor)


def _install() -> None:
    """Wraps what loads weights: `from_pretrained` of every model, and `load_file` of safetensors."""
    import safetensors.torch
    from transformers import PreTrainedModel

    load_model, load_file = PreTrainedModel.from_pretrained.__func__, safetensors.torch.load_file

    @functools.wraps(load_model)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load_model(cls, *args, **kwargs)
        move_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @functools.wraps(load_file)
    def load_unaligned(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: unaligned(tensor) for name, tensor in load_file(*args, **kwargs).items()}

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    safetensors.torch.load_file = load_unaligned


def follow_switch() -> None:
    """To be called before anything imports `load_file` by its name."""
    if switched_on():
        _install()

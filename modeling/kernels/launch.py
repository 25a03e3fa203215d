"""Launching Triton kernels with the largest tiles that a device can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


try:
    from triton.runtime.errors import OutOfResources
except ImportError as error:
    raise ImportError("Triton kernels need Triton: `pip install triton`.") from error


logger = logging.get_logger(__name__)

# The first option that fitted, by kernel, options and device, so that what does not fit is compiled once.
_fitting: dict[tuple, int] = {}


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    options: list[dict[str, int]],
    derived: Callable[[dict[str, int]], dict[str, Any]],
    **arguments: Any,
) -> None:
    """Runs a kernel with the first of `options` that the device has the shared memory and registers for.

    Args:
        kernel: the jitted function.
        grid: how many programs an option takes on each axis; no program at all is no launch.
        options: tile sizes, warps and stages, largest first.
        derived: arguments that depend on the option.
        arguments: all others.

    Raises:
        RuntimeError: if none fits.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    known = (kernel.__name__, tensor.device, tensor.dtype, *(tuple(option.items()) for option in options))
    for index in range(_fitting.get(known, 0), len(options)):
        option = options[index]
        programs = grid(option)
        if 0 in programs:
            return
        try:
            with torch.cuda.device_of(tensor):
                kernel[programs](**arguments, **derived(option), **option)
        except OutOfResources as error:
            logger.info(f"{kernel.__name__} does not fit with {option}: {error}")
            continue
        _fitting[known] = index
        return
    raise RuntimeError(
        f"{kernel.__name__} does not fit on {tensor.device} with any of its tile sizes, the smallest of which is {options[-1]}; "
        "set `TRANSLUTION_TRITON=0` to run without it."
    )


def dot_precision(tensor: Tensor) -> str:
    """How matrix products of float32 are computed: as PyTorch has been told to compute its own."""
    allowed = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


__all__ = ["dot_precision", "launch", "next_power_of_2"]

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

# What did not fit, as `_compiled_for` names it, so that it is compiled once.
_too_large: set[tuple] = set()
# Programs that CUDA starts at most on each axis of a grid.
MAX_PROGRAMS = (2**31 - 1, 65535, 65535)
COMPILER_OPTIONS = ("num_warps", "num_stages")


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
        RuntimeError: if none fits, or one takes more programs than a grid may have.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    for option in options:
        programs = grid(option)
        if 0 in programs:
            return
        if any(number > most for number, most in zip(programs, MAX_PROGRAMS, strict=False)):
            raise RuntimeError(
                f"{kernel.__name__} needs {programs} programs with {option}, and a grid has at most {MAX_PROGRAMS}; take a smaller "
                "batch, or set `TRANSLUTION_TRITON=0` to run without it."
            )
        passed = {**arguments, **derived(option), **option}
        if _too_large and _compiled_for(kernel, tensor.device, passed) in _too_large:
            continue
        try:
            with torch.cuda.device_of(tensor):
                kernel[programs](**passed)
        except OutOfResources as error:
            logger.info(f"{kernel.__name__} does not fit with {option}: {error}")
            _too_large.add(_compiled_for(kernel, tensor.device, passed))
            continue
        return
    raise RuntimeError(
        f"{kernel.__name__} does not fit on {tensor.device} with any of its tile sizes, the smallest of which is {options[-1]}; "
        "set `TRANSLUTION_TRITON=0` to run without it."
    )


def _compiled_for(kernel: Any, device: torch.device, arguments: dict[str, Any]) -> tuple:
    """All that Triton compiles a kernel for: types, constants, and what it tells apart about addresses and other numbers.

    A constant has a name in capitals, here as in the kernels, or is an option of the compiler, such as `num_warps`.
    """
    key: list[Any] = [kernel, device]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            key.append(_compiled_for_tensor(value))
        elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
            key.append(tuple(map(_compiled_for_tensor, value)))
        elif name.isupper() or name in COMPILER_OPTIONS:
            key.append(value)
        elif isinstance(value, int):
            key.append((value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        else:
            key.append(type(value))
    return tuple(key)


def _compiled_for_tensor(tensor: Tensor) -> tuple[torch.dtype, bool]:
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def dot_precision(tensor: Tensor) -> str:
    """How matrix products of float32 are computed: as PyTorch has been told to compute its own.

    ROCm computes them as float32 whatever it has been told, and most of its GPUs cannot do otherwise.
    """
    if tensor.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # `fp32_precision` came with PyTorch 2.9. Where it is set, `allow_tf32` may not even be read.
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)
    allowed = settings.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


__all__ = ["dot_precision", "launch", "next_power_of_2"]

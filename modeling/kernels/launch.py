"""Launching Triton kernels with the tiles that suit a device: those that a measurement found best, else the largest that it can hold.

`scripts/gpu_check.py --part sweep` measures tiles and writes the best to `tuned.json` beside this file. Without that file, as in a
checkpoint that carries its code, the order of each kernel's list decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


try:
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction
except ImportError as error:
    raise ImportError("Triton kernels need Triton: `pip install triton`.") from error


logger = logging.get_logger(__name__)

# The option for each problem, as `_problem` names it.
_chosen: dict[tuple, dict[str, int]] = {}
# Programs that CUDA starts at most on each axis of a grid.
MAX_PROGRAMS = (2**31 - 1, 65535, 65535)
COMPILER_OPTIONS = ("num_warps", "num_stages")
# Local memory that a thread may take, in words of 4 bytes as Triton's `n_spills` counts it: 512 bytes. The first tiles of the kernels with
# a basis take up to 272 bytes (`triton_basis.py`), which the L1 cache holds; the next tiles hold fewer factors or fewer pairs, so that
# products are computed again or columns of products are half as many. Tiles that are too large take thousands of bytes.
MAX_SPILLS = 128
TUNED = Path(__file__).with_name("tuned.json")


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    options: list[dict[str, int]],
    derived: Callable[[dict[str, int]], dict[str, Any]],
    **arguments: Any,
) -> None:
    """Runs a kernel with the first of `options` that the device has the shared memory and registers for.

    The one that `tuned.json` names comes before them. One whose threads spill more than `MAX_SPILLS` registers to memory comes after all
    that spill fewer.

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
    problem = _problem(kernel, tensor.device, options, arguments | derived(options[0]))
    with torch.cuda.device_of(tensor):
        option = _chosen.get(problem)
        if option is not None:
            programs = _programs(kernel, grid, option)
            if 0 not in programs:
                kernel[programs](**arguments, **derived(option), **option)
            return
        spilling: list[tuple[int, dict[str, int]]] = []
        for option in _in_order(kernel, tensor, options, arguments):
            programs = _programs(kernel, grid, option)
            if 0 in programs:
                return
            passed = {**arguments, **derived(option), **option}
            try:
                spills = _spills(kernel, programs, passed)
                if spills > MAX_SPILLS:
                    logger.info(f"{kernel.__name__} spills {spills} registers with {option}.")
                    spilling.append((spills, option))
                    continue
                kernel[programs](**passed)
            except OutOfResources as error:
                logger.info(f"{kernel.__name__} does not fit with {option}: {error}")
                continue
            _chosen[problem] = option
            return
        if not spilling:
            raise RuntimeError(
                f"{kernel.__name__} does not fit on {tensor.device} with any of its tile sizes, the smallest of which is {options[-1]}; "
                "set `TRANSLUTION_TRITON=0` to run without it."
            )
        _, option = min(spilling, key=lambda pair: pair[0])
        kernel[_programs(kernel, grid, option)](**arguments, **derived(option), **option)
        _chosen[problem] = option


def _programs(
    kernel: Any, grid: Callable[[dict[str, int]], tuple[int, ...]], option: dict[str, int]
) -> tuple[int, ...]:
    """The programs of an option on each axis, which a grid must have room for."""
    programs = grid(option)
    if any(number > most for number, most in zip(programs, MAX_PROGRAMS, strict=False)):
        raise RuntimeError(
            f"{kernel.__name__} needs {programs} programs with {option}, and a grid has at most {MAX_PROGRAMS}; take a smaller "
            "batch, or set `TRANSLUTION_TRITON=0` to run without it."
        )
    return programs


def _spills(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> int:
    """Registers that each thread spills, known after the kernel is compiled and before it runs; 0 where nothing is compiled.

    Raises:
        OutOfResources: if the device cannot hold the kernel.
    """
    if not isinstance(kernel, JITFunction):
        return 0
    compiled = kernel.warmup(grid=programs, **arguments)
    # Loads it, as the first launch would.
    compiled._init_handles()
    return compiled.n_spills


def _in_order(
    kernel: Any, tensor: Tensor, options: list[dict[str, int]], arguments: dict[str, Any]
) -> list[dict[str, int]]:
    """The options to try: first the one that was measured to be best on this device."""
    tuned = tuned_options(str(TUNED))
    if not tuned or tensor.device.type != "cuda":
        return options
    best = tuned.get(torch.cuda.get_device_name(tensor.device), {}).get(tuning_key(kernel, arguments))
    # One that was measured before the kernel's parameters changed is of no use.
    if best is None or best.keys() != options[0].keys():
        return options
    return [best, *(option for option in options if option != best)]


@lru_cache(maxsize=1)
def tuned_options(path: str) -> dict[str, dict[str, dict[str, int]]]:
    """The best options that were measured: for each name of a GPU, by `tuning_key`; none where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}


def tuning_key(kernel: Any, arguments: dict[str, Any]) -> str:
    """What a measurement of tiles holds for: the kernel, the tokens' type, its constants, and which of its numbers are 1.

    Those tell a text, a grid of one row, from an image. Batch and length are not part of it.

    Args:
        kernel: the jitted function.
        arguments: those that do not depend on the option.
    """
    tensors = (part for value in arguments.values() for part in (value if isinstance(value, tuple) else (value,)))
    # Tokens and banks are of the narrowest type; scores, and sums, of a wider one.
    narrowest = min((part.dtype for part in tensors if isinstance(part, Tensor)), key=lambda dtype: dtype.itemsize)
    constants = sorted((name, value) for name, value in arguments.items() if name.isupper())
    ones = sorted(
        name for name, value in arguments.items() if not name.isupper() and type(value) is int and value == 1
    )
    parts = [kernel.__name__, str(narrowest).removeprefix("torch."), *(f"{name}={value}" for name, value in constants)]
    return " ".join([*parts, *(f"{name}=1" for name in ones)])


def _problem(kernel: Any, device: torch.device, options: list[dict[str, int]], arguments: dict[str, Any]) -> tuple:
    """All that a choice of an option depends on: what Triton compiles a kernel for with the first, and the options."""
    return (*_compiled_for(kernel, device, arguments), *(tuple(option.values()) for option in options))


def _compiled_for(kernel: Any, device: torch.device, arguments: dict[str, Any]) -> tuple:
    """All that Triton compiles a kernel for: types, constants, and what it tells apart about addresses and other numbers.

    A constant has a name in capitals, here as in the kernels, or is an option of the compiler, such as `num_warps`. Of lengths, which
    kernels name in `do_not_specialize`, the type alone counts: what chunks of offsets differ in is no other problem.
    """
    key: list[Any] = [kernel, device]
    lengths = _lengths(kernel)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            key.append(_compiled_for_tensor(value))
        elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
            key.append(tuple(map(_compiled_for_tensor, value)))
        elif name.isupper() or name in COMPILER_OPTIONS:
            key.append(value)
        elif isinstance(value, int):
            fits = -(2**31) <= value < 2**31
            key.append(fits if name in lengths else (value == 1, value % 16 == 0, fits))
        else:
            key.append(type(value))
    return tuple(key)


def _lengths(kernel: Any) -> Collection[str]:
    """Numbers that Triton compiles nothing in for, by name."""
    # An interpreted kernel keeps what it was declared with apart.
    declared = getattr(kernel, "kwargs", {}).get("do_not_specialize")
    return getattr(kernel, "do_not_specialize", declared) or ()


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


__all__ = ["MAX_SPILLS", "TUNED", "dot_precision", "launch", "next_power_of_2", "tuned_options", "tuning_key"]

"""Whether the Triton kernels can serve a call, and whether they should.

`attn_implementation="grouped"`, the default, takes the kernels for CUDA tensors wherever they can serve, and says once why where
they cannot. `attn_implementation="triton"` insists: what the kernels cannot serve is an error. The environment variable
`TRANSLUTION_TRITON` stands above the default: `0` forbids the kernels, `1` insists on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..mixers.attention import TRITON


logger = logging.get_logger(__name__)

VARIABLE = "TRANSLUTION_TRITON"
FORBID, INSIST = ("0", "false", "off", "no"), ("1", "true", "on", "yes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A head is never split between programs.
MAX_HEAD_SIZE = 256


class Verdict(NamedTuple):
    """Whether the kernels can serve, and the reason where they cannot."""

    ok: bool
    reason: str = ""


class Kernels(NamedTuple):
    """Operators over pairs, with the signatures of `reference.py`, and the whole attention with a basis."""

    pair_scores: Callable[..., Tensor]
    pair_values: Callable[..., Tensor]
    basis_attention: Callable[..., tuple[Tensor, Tensor | None]]


_loaded: list[Kernels] = []


def can_serve(device: torch.device, dtype: torch.dtype, head_size: int) -> Verdict:
    """Whether the kernels can compute pairs of tokens.

    Args:
        device, dtype: of the tokens.
        head_size: features per head that a bank puts out.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return Verdict(False, f"the tensors are on {device.type!r}, and the kernels need a GPU")
    if find_spec("triton") is None:
        return Verdict(False, "Triton is not installed (`pip install triton`)")
    if head_size > MAX_HEAD_SIZE:
        return Verdict(False, f"heads of {head_size} features are larger than {MAX_HEAD_SIZE}")
    if interpreted:
        return Verdict(True)
    if dtype not in DTYPES:
        return Verdict(False, f"the kernels compute in float32, bfloat16 and float16, not {dtype}")
    if torch.version.hip is None:
        (major, minor), least = torch.cuda.get_device_capability(device), 8 if dtype == torch.bfloat16 else 7
        if major < least:
            return Verdict(False, f"{dtype} needs compute capability {least}.0, and {device} has {major}.{minor}")
    return Verdict(True)


def choose(implementation: str, device: torch.device, verdict: Verdict) -> bool:
    """Whether to run the kernels, for `"grouped"` or `"triton"`. On a CPU, interpreted, they run only where insisted on.

    Raises:
        ValueError: if they are insisted on and cannot serve, or for a value of the variable that is not known.
    """
    wish = os.environ.get(VARIABLE, "auto").strip().lower()
    if wish not in (*FORBID, *INSIST, "auto", ""):
        raise ValueError(f"`{VARIABLE}` must be 0, 1 or auto, got {wish!r}.")
    insists = implementation == TRITON or wish in INSIST
    if insists and not verdict.ok:
        source = f"`attn_implementation={TRITON!r}`" if implementation == TRITON else f"`{VARIABLE}={wish}`"
        raise ValueError(f"{source} cannot be met: {verdict.reason}. Without it plain PyTorch runs.")
    return insists or (verdict.ok and device.type == "cuda" and wish not in FORBID)


@torch.compiler.assume_constant_result
def use_kernels(
    implementation: str, device: torch.device, dtype: torch.dtype, head_size: int, obstacle: str = ""
) -> bool:
    """Whether the kernels shall serve a call; a GPU that has to do without them is told why, once.

    Args:
        implementation: `"grouped"` or `"triton"`.
        device, dtype, head_size: see `can_serve`.
        obstacle: what the caller knows to stand in the way.

    Raises:
        ValueError: see `choose`.
    """
    verdict = can_serve(device, dtype, head_size)
    if verdict.ok and obstacle:
        verdict = Verdict(False, obstacle)
    chosen = choose(implementation, device, verdict)
    if device.type == "cuda" and not verdict.ok:
        logger.warning_once(f"Translution runs without its CUDA kernels: {verdict.reason}.")
    if chosen:
        _load()
    return chosen


def kernels() -> Kernels:
    """The kernels, where `use_kernels` said to use them."""
    return _loaded[0]


def _load() -> None:
    # Triton is imported here, when it is needed, and not before.
    if not _loaded:
        from .triton_basis import basis_attention
        from .triton_pairs import pair_scores, pair_values

        _loaded.append(Kernels(pair_scores, pair_values, basis_attention))


__all__ = ["Verdict", "can_serve", "choose", "kernels", "use_kernels"]

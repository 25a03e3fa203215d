"""Which implementation serves a layer, and why: decided here and nowhere else.

`choose_path` takes the first row of its table whose condition holds. `explain_dispatch` shows what it chose, layer by layer.

| layer | path | where | condition |
| --- | --- | --- | --- |
| Translution | `local_step` | `mixers/local.py` | as `decode`, with a distance, not 0 and not more than the cache has slots; full, keys and values relative; a basis only where it is rotated; no attention dropout |
| | `decode` | `decode.py` | one new token with a cache; neither `"eager"` nor attention weights, which a compiled step with a static cache leaves out |
| | `gathered`, with a basis `basis` | `gathered.py` | the model is exported, or a compiled step adds several tokens to a static cache |
| | `reference` | `reference.py` | `attn_implementation="eager"`, or attention weights are asked for |
| | `local_kernel` | `triton_local.py` | a distance, not 0 in text; if not rotated at most 64 matrices, and some pairs as far apart as the distance (text) or further (images); where images clamp offsets a class token, and queries not relative; no attention dropout; the CUDA kernels can serve |
| | `local` | `operators/local.py` | the same where the CUDA kernels cannot serve |
| | `basis_kernel` | `triton_basis.py` | a basis; the CUDA kernels can serve; no attention dropout; no distance together with a cache; neither rotated nor shared far offsets |
| | `basis` | `basis.py` | a basis |
| | `pair_kernels` | `triton_pairs.py` | the CUDA kernels can serve; neither rotated nor shared far offsets |
| | `reference` | `reference.py` | images whose projections by a bank are rotated |
| | `grouped_gemm` | `grouped_gemm.py` | everything else on a GPU |
| | `streamed` | `streamed.py` | full Translution, not rotated, nothing masked, no attention dropout, no cached tokens, in text no pairs as far as the distance |
| | `grouped` | `grouped.py` | everything else |
| attention, relative bias | `reference` | the mixer | `attn_implementation="eager"`, or attention weights are asked for; relative bias in an exported model |
| | `sdpa` | PyTorch | everything else |
| relative vectors | `products` | the mixer | always |
| convolution | `window` | the mixer | text with a cache, or whose mask hides pairs |
| | `grouped`, on a GPU `grouped_gemm`, exported `gathered` | `grouped.py`, `grouped_gemm.py` | an image whose mask hides pairs |
| | `conv` | PyTorch | everything else |

The CUDA kernels can serve tensors on a GPU in float32, bfloat16 or float16 where Triton is installed. `attn_implementation="auto"`,
the default, takes them wherever they can, and logs the reason once where they cannot; `"triton"` insists on them, and what they
cannot serve in a full pass over Translution layers raises an error. The environment variable `TRANSLUTION_TRITON` takes precedence over the default: `0` forbids the
kernels, `1` insists on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from . import basis, decode, gathered, grouped, grouped_gemm, reference
from .exporting import is_exporting, say_what_serves
from .local import local_attention
from .pair_layout import PairLayout, StepLayout


logger = logging.get_logger(__name__)

# Values of `attn_implementation`.
AUTO, TRITON, EAGER = "auto", "triton", "eager"

VARIABLE = "TRANSLUTION_TRITON"
FORBID, INSIST = ("0", "false", "off", "no"), ("1", "true", "on", "yes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A head is never split between programs.
MAX_HEAD_SIZE = 256
# Where starting an operation takes about as long as one offset's part of it: many offsets are taken at a time.
GEMM_DEVICES = ("cuda",)
# Off, `grouped` takes the place of `streamed`: a switch for tests.
STREAM = True
# Off, the paths that treat all pairs alike take the place of `local`.
LOCAL = True
# What tokens project for each offset is kept for the backward pass: for more offsets, paths that compute it again take less memory.
MAX_OFFSETS = 64


class Call(NamedTuple):
    """What is known of a layer's call when its path is chosen.

    Fields:
        kind: `"full"`, `"low_rank"` or `"basis"` for Translution; `"attention"`, `"relative_bias"`, `"relative_vector"`,
            `"convolution"`.
        layer: index of the layer.
        layout: the pairs.
        head_size: features per head that a bank puts out.
        device, dtype: of the tokens.
        wish: `attn_implementation`.
        wants_weights: whether attention weights are to be returned.
        masked: whether a mask hides anything that the layout shows.
        hides_pairs: whether what is hidden depends on the query.
        drops: whether attention dropout is on, or the mask is learned: both need the square of weights.
        cached: whether there is a cache.
        rotated: whether what banks project is rotated by position.
        relative: which projections have a bank.
    """

    kind: str
    layer: int
    layout: PairLayout | StepLayout
    head_size: int
    device: torch.device
    dtype: torch.dtype
    wish: str = AUTO
    wants_weights: bool = False
    masked: bool = False
    hides_pairs: bool = False
    drops: bool = False
    cached: bool = False
    rotated: bool = False
    relative: str = ""


class Choice(NamedTuple):
    """A path, and why it was taken."""

    path: str
    reason: str


def choose_path(call: Call) -> Choice:
    """The path that serves a call; the table stands at the top of this file.

    Raises:
        ValueError: if the CUDA kernels are insisted on and cannot serve, or for an unknown value of the variable.
    """
    choice = _choose_path(call)
    if _explained is not None:
        _explained.append((call.layer, call.kind, choice))
    return choice


def _choose_path(call: Call) -> Choice:
    if call.wants_weights and call.wish == TRITON:
        raise ValueError(
            f"`output_attentions` must be False with `attn_implementation={TRITON!r}`, got True: the kernels hold no weights. "
            f"{AUTO!r} and {EAGER!r} return them."
        )
    if call.kind == "convolution":
        return _convolution(call)
    if call.kind == "relative_vector":
        return Choice("products", "vectors are added for each pair, so that the square of scores is computed")
    wants_reference = call.wish == EAGER or call.wants_weights
    if call.kind not in ("attention", "relative_bias", "full", "low_rank", "basis"):
        raise ValueError(f"no implementation is known for a mixer of kind {call.kind!r}.")
    if call.kind in ("attention", "relative_bias"):
        if wants_reference:
            return _reference(call)
        if call.kind == "relative_bias" and is_exporting():
            # PyTorch's fused attention orders its output in memory one way when a graph is traced, and another way when ONNX
            # takes the graph apart, which then fails.
            return Choice("reference", "fused attention with a learned bias cannot be exported to ONNX")
        return Choice("sdpa", "PyTorch's fused attention")
    adds_tokens = isinstance(call.layout, StepLayout)
    if adds_tokens and call.layout.num_queries == 1:
        layout = call.layout
        near_and_far = layout.clamp and 0 < layout.max_row_distance <= layout.num_tokens
        near_and_far = near_and_far and {"k", "v"} <= set(call.relative)
        if call.kind == "full" and near_and_far and not call.drops:
            return Choice("local_step", "one new token with a cache and a distance")
        return Choice("decode", "one new token with a cache")
    if adds_tokens or (is_exporting() and say_what_serves()):
        reason = "a compiled step adds several tokens to a static cache" if adds_tokens else "the model is exported"
        return Choice("basis" if call.kind == "basis" else "gathered", reason)
    if wants_reference:
        return _reference(call)
    if _local_serves(call):
        obstacle = _tuple_obstacle(call.device, call.dtype, call.head_size)
        # Where the kernels are insisted on and this one cannot serve, others may.
        if not (obstacle and _insists(call.wish)):
            obstacle = kernel_obstacle(call.wish, call.device, call.dtype, call.head_size, obstacle)
            if obstacle:
                return Choice("local", f"near pairs by offset, far ones by one attention; no CUDA kernel: {obstacle}")
            return Choice("local_kernel", "near pairs by a CUDA kernel, far ones by one attention")
    obstacle = ""
    if call.layout.share_far:
        obstacle = "far offsets share one matrix, which the kernels of all pairs do not know"
        if not call.layout.has_far_pairs:
            obstacle += ", and the one of near pairs serves only where others are far"
    elif call.rotated:
        obstacle = "what banks project is rotated, which the kernels do not know"
    if call.kind == "basis":
        if call.drops:
            obstacle = "attention dropout is on, and a fused kernel never holds what it would drop"
        elif call.cached and call.layout.clamp:
            obstacle = "a cache with `max_relative_distance` keeps far keys and values apart from near ones"
    obstacle = kernel_obstacle(call.wish, call.device, call.dtype, call.head_size, obstacle)
    if call.kind == "basis":
        if obstacle:
            return Choice("basis", f"no CUDA kernel: {obstacle}")
        return Choice("basis_kernel", "one CUDA kernel does the whole attention")
    if not obstacle:
        return Choice("pair_kernels", "the CUDA kernels serve")
    if call.rotated and not call.layout.causal:
        return Choice("reference", "no other path rotates what banks project")
    if call.device.type in GEMM_DEVICES:
        return Choice("grouped_gemm", f"products of many offsets at a time; no CUDA kernel: {obstacle}")
    obstacle = _streaming_obstacle(call)
    return Choice("grouped", obstacle) if obstacle else Choice("streamed", "one pass, and no square of scores")


def _reference(call: Call) -> Choice:
    if call.wish == EAGER:
        return Choice("reference", f"`attn_implementation={EAGER!r}`")
    reason = "attention weights are asked for, which the readable reference returns"
    if call.kind in ("full", "low_rank", "basis"):
        # Raises an error where the kernels are insisted on.
        kernel_obstacle(call.wish, call.device, call.dtype, call.head_size, reason)
    return Choice("reference", reason)


def _convolution(call: Call) -> Choice:
    if call.layout.causal and (call.cached or call.hides_pairs):
        return Choice("window", "a cache or a mask of pairs decides which tokens are in the window")
    if call.hides_pairs:
        reason = "a mask hides pairs, which a convolution of PyTorch cannot tell apart"
        if is_exporting():
            return Choice("gathered", reason)
        return Choice("grouped_gemm" if call.device.type in GEMM_DEVICES else "grouped", reason)
    return Choice("conv", "PyTorch's convolution")


def _local_serves(call: Call) -> bool:
    """Whether near and far pairs are computed apart: there is a distance, and near offsets are few."""
    layout = call.layout
    if not LOCAL or not layout.clamp or call.drops:
        return False
    # In a text without near pairs all are far. Clamped images take one attention for all kinds of keys, whose queries are the same,
    # and only the class token's pairs are near ones.
    if layout.causal:
        splits = layout.max_row_distance > 0
    else:
        splits = layout.share_far or (layout.class_token and "q" not in call.relative)
    return splits and (call.rotated or (layout.has_far_pairs and layout.num_offsets <= MAX_OFFSETS))


def _streaming_obstacle(call: Call) -> str:
    """Why one pass over the pairs does not serve; empty where it does."""
    layout = call.layout
    if not STREAM:
        return "streaming is switched off"
    if call.kind == "low_rank":
        return "low-rank scores are mostly dense, and one product makes their square"
    if call.drops:
        return "attention dropout needs the square of weights"
    if call.rotated:
        return "what banks project is rotated"
    if layout.past > 0:
        return "a cache has tokens before the new ones"
    if call.masked:
        return "a mask hides pairs"
    if layout.causal and layout.has_far_pairs:
        return "far pairs are one product of their own"
    return ""


def pair_operators(path: str) -> Any:
    """What has `pair_scores` and `pair_values`, see `reference.py`, of a path that holds the square of scores."""
    if path == "pair_kernels":
        return kernels()
    return {
        "reference": reference,
        "decode": decode,
        "gathered": gathered,
        "basis": basis,
        "grouped": grouped,
        "grouped_gemm": grouped_gemm,
    }[path]


def local_operator(path: str) -> Callable[..., Tensor]:
    """`local_attention` of a path that computes near and far pairs apart."""
    return kernels().local_attention if path == "local_kernel" else local_attention


# The CUDA kernels


class Kernels(NamedTuple):
    """Operators over pairs, the whole attention with a basis, and that with near pairs apart."""

    pair_scores: Callable[..., Tensor]
    pair_values: Callable[..., Tensor]
    basis_attention: Callable[..., tuple[Tensor, Tensor | None]]
    local_attention: Callable[..., Tensor]


_loaded: list[Kernels] = []


def device_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why the kernels cannot compute pairs of tokens; empty where they can.

    Args:
        device, dtype: of the tokens.
        head_size: features per head that a bank puts out.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"the tensors are on {device.type!r}, and the kernels need a GPU"
    if find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if head_size > MAX_HEAD_SIZE:
        return f"heads of {head_size} features are larger than {MAX_HEAD_SIZE}"
    if not interpreted and dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not {dtype}"
    if not interpreted and torch.version.hip is None:
        (major, minor), least = torch.cuda.get_device_capability(device), 8 if dtype == torch.bfloat16 else 7
        if major < least:
            return f"{dtype} needs compute capability {least}.0, and {device} has {major}.{minor}"
    return ""


@torch.compiler.assume_constant_result
def kernel_obstacle(
    implementation: str, device: torch.device, dtype: torch.dtype, head_size: int, obstacle: str = ""
) -> str:
    """Why the kernels do not serve a call; empty where they shall. Where a GPU has to do without them, this is logged once.

    On a CPU, interpreted, they run only where they are insisted on.

    Args:
        implementation: `"auto"` or `"triton"`.
        device, dtype, head_size: see `device_obstacle`.
        obstacle: what the call itself has that the kernels cannot serve.

    Raises:
        ValueError: if the kernels are insisted on and cannot serve, or for an unknown value of the variable.
    """
    obstacle = device_obstacle(device, dtype, head_size) or obstacle
    wish, insists = _variable(), _insists(implementation)
    if insists and obstacle:
        source = f"`attn_implementation={TRITON!r}`" if implementation == TRITON else f"`{VARIABLE}={wish}`"
        raise ValueError(f"{source} cannot be met: {obstacle}. Without it plain PyTorch runs.")
    if device.type == "cuda" and obstacle:
        logger.warning_once(f"Translution runs without its CUDA kernels: {obstacle}.")
    if not obstacle and not insists and (device.type != "cuda" or wish in FORBID):
        obstacle = "they are not asked for"
    if not obstacle:
        _load()
    return obstacle


def _variable() -> str:
    wish = os.environ.get(VARIABLE, "auto").strip().lower()
    if wish not in (*FORBID, *INSIST, "auto", ""):
        raise ValueError(f"`{VARIABLE}` must be 0, 1 or auto, got {wish!r}.")
    return wish


@torch.compiler.assume_constant_result
def _insists(implementation: str) -> bool:
    """Whether the kernels, and nothing else, are asked for."""
    return implementation == TRITON or _variable() in INSIST


@torch.compiler.assume_constant_result
def _tuple_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What keeps a kernel from taking tuples, where kernels can serve at all; empty where nothing does."""
    if device_obstacle(device, dtype, head_size):
        return ""
    import triton

    has_tuples = hasattr(triton.language.constexpr, "__getitem__")
    return "" if has_tuples else f"it needs Triton 3.4, and {triton.__version__} is installed"


def kernels() -> Kernels:
    """The kernels, where `choose_path` chose them."""
    return _loaded[0]


def _load() -> None:
    # Triton is imported here, when it is needed, and not before.
    if not _loaded:
        from .triton_basis import basis_attention
        from .triton_local import local_attention
        from .triton_pairs import pair_scores, pair_values

        _loaded.append(Kernels(pair_scores, pair_values, basis_attention, local_attention))


# For users

_explained: list[tuple[int, str, Choice]] | None = None


@contextmanager
def _recorded() -> Iterator[list[tuple[int, str, Choice]]]:
    global _explained
    before, _explained = _explained, []
    try:
        yield _explained
    finally:
        _explained = before


def explain_dispatch(model: torch.nn.Module, *args: Any, **inputs: Any) -> str:
    """Runs a forward pass without gradients and says which path served each layer, and why.

    Args:
        model: a Translution model, trunk or head. In training mode its choices are those of a training step.
        args, inputs: of the forward pass.

    Returns:
        A line per decision; a layer of ACmix takes two.

    Example:

    ```python
    >>> print(explain_dispatch(model, pixel_values=images))
    layer 0  full  streamed: one pass, and no square of scores
    ```
    """
    with _recorded() as choices, torch.no_grad():
        model(*args, **inputs)
    return "\n".join(f"layer {layer}  {kind}  {choice.path}: {choice.reason}" for layer, kind, choice in choices)


__all__ = [
    "AUTO",
    "EAGER",
    "TRITON",
    "Call",
    "Choice",
    "choose_path",
    "device_obstacle",
    "explain_dispatch",
    "kernel_obstacle",
    "kernels",
    "local_operator",
    "pair_operators",
]

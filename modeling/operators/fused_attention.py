"""Ordinary attention that also returns the log-sum-exp of its scores, so that it may be merged with the attention to other keys.

PyTorch's fused attention serves where there is one that gives the log-sum-exp, and plain products elsewhere:

| | device | types | |
| --- | --- | --- | --- |
| `_CPU` | CPU | all | |
| `_FLASH` | CUDA, capability 8 | float16, bfloat16 | heads of at most 256 features, no bias |
| `_EFFICIENT` | CUDA, capability 7, of bfloat16 8 | float16, bfloat16, float32 | |

The backward pass takes the output and the log-sum-exp of *all* keys a query attends to: with them it gives the share of these keys
in the gradients.

Keys and values may have fewer heads than queries, `A / groups`: each serves `groups` heads of queries, one after the other. They are
never repeated. `_EFFICIENT`, and `_CPU` before PyTorch 2.9, are called once for each head of a group.

Legend: `B` batch, `A` heads, `Q` queries, `L` keys, `e` features per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pair_autograd import accumulation_dtype


CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Scores that the plain way holds at a time.
SCORES_ELEMENTS = 1 << 24

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

# Before that it reads past the end of keys with fewer heads than queries, and raises no error.
CPU_TAKES_GROUPS = torch.__version__ >= (2, 9)

# Features that flash attention's heads have at most.
MAX_FLASH_SIZE = 256
# What CUDA's operators want the features of a head, and efficient attention the rows of a bias, to be a multiple of.
CUDA_MULTIPLE = 8
# Efficient attention gives a log-sum-exp for a multiple of this many queries; it is infinite for those that there are not.
LOGSUMEXP_MULTIPLE = 32


class Fused(NamedTuple):
    """One of PyTorch's fused attentions, with the signatures of `attention` and `attention_backward`, but a bias for every one.

    The features of queries, keys and values are as many, and a multiple of `multiple`. Unless it `takes_groups`, so are their heads.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    multiple: int = 1
    takes_groups: bool = False


def _cpu(query, key, value, scale, causal, bias):
    return FLASH(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def _cpu_backward(gradient, query, key, value, output, logsumexp, scale, causal, bias):
    return FLASH_BACKWARD(
        gradient, query, key, value, output, logsumexp.contiguous(), 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash(query, key, value, scale, causal, bias):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]


def _flash_backward(gradient, query, key, value, output, logsumexp, scale, causal, bias):
    # All sequences are as long, and nothing is dropped: the state of the random numbers is not read.
    state, unused = (query.new_zeros(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, logsumexp.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
        state, unused, scale=scale,
    )  # fmt: skip


def _efficient(query, key, value, scale, causal, bias):
    bias = _aligned(bias, query)
    output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return output, logsumexp.narrow(2, 0, query.shape[2])


def _efficient_backward(gradient, query, key, value, output, logsumexp, scale, causal, bias):
    logsumexp = pad(logsumexp, (0, -query.shape[2] % LOGSUMEXP_MULTIPLE), value=torch.inf).contiguous()
    state = query.new_zeros((), dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, _aligned(bias, query), output, logsumexp, state, state, 0.0, [True, True, True, False], causal,
        scale=scale,
    )[:3]  # fmt: skip


def _aligned(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """A bias as efficient attention takes it: of all entries and heads, its rows aligned.

    It raises 2 to the power of scores times log2(e). The lowest number of all would become minus infinity by that, and a row of nothing
    else no number.
    """
    if bias is None:
        return None
    keys = bias.shape[-1]
    bias = bias.clamp(min=torch.finfo(bias.dtype).min / 4)
    bias = pad(bias, (0, -keys % CUDA_MULTIPLE)).narrow(-1, 0, keys)
    return bias.expand(*query.shape[:2], -1, -1)


_CPU = Fused(_cpu, _cpu_backward, takes_groups=CPU_TAKES_GROUPS)
_FLASH = Fused(_flash, _flash_backward, CUDA_MULTIPLE, takes_groups=True)
_EFFICIENT = Fused(_efficient, _efficient_backward, CUDA_MULTIPLE)


def fused(device: torch.device, dtype: torch.dtype, size: int, biased: bool = False) -> Fused | None:
    """PyTorch's fused attention that gives the log-sum-exp; `None` where there is none.

    Args:
        device, dtype: of queries, keys and values.
        size: features per head.
        biased: whether something is added to the scores.
    """
    if device.type == "cpu":
        return None if FLASH is None else _CPU
    # ROCm's operators have conventions of their own.
    if device.type != "cuda" or torch.version.hip is not None or dtype not in CUDA_DTYPES:
        return None
    capability, _ = torch.cuda.get_device_capability(device)
    half = dtype != torch.float32
    if (
        half
        and capability >= 8
        and size <= MAX_FLASH_SIZE
        and not biased
        and torch.backends.cuda.is_flash_attention_available()
    ):
        return _FLASH
    return _EFFICIENT if capability >= (8 if dtype == torch.bfloat16 else 7) else None


def _fused_for(query: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Fused | None, int]:
    """What serves, and how many features it is to be given."""
    size = max(query.shape[-1], value.shape[-1])
    found = fused(query.device, query.dtype, size, bias is not None)
    return found, size if found is None else size + -size % found.multiple


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each row's sum of exponentials.

    Args:
        query, key: `[B, A, Q, e]` and `[B, A / groups, L, e]`.
        value: `[B, A / groups, L, v]`.
        scale: what scores are multiplied by before softmax.
        causal: whether query `i` sees keys `j ≤ i` only.
        bias: `[B or 1, A or 1, Q, L]`, added to the scores; finite, the lowest number of its type where a pair is hidden. A row
            of nothing else has a log-sum-exp so low that merging gives it no weight. Not together with `causal`.

    Returns:
        `[B, A, Q, v]` of the values' dtype, and `[B, A, Q]`, float64 for float64 and float32 otherwise.
    """
    operator, widest = _fused_for(query, value, bias)
    groups = query.shape[1] // key.shape[1]
    if operator is not None:
        inputs = _widened(widest, query, key, value)
        if groups == 1 or operator.takes_groups:
            output, logsumexp = operator.forward(*inputs, scale, causal, bias)
        else:
            output, logsumexp = _forward_by_member(operator, groups, *inputs, scale, causal, bias)
        return output.narrow(-1, 0, value.shape[-1]), logsumexp
    outputs, sums = [], []
    for rows in _parts(query, key):
        scores = _scores(query, key, scale, causal, bias, rows)
        sums.append(scores.logsumexp(-1))
        weights = (scores - sums[-1][..., None]).exp().to(value.dtype)
        outputs.append(_as_heads(_as_queries(weights, groups) @ value, groups))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of keys and values summed over the heads of queries that share them.

    Args:
        gradient, output: `[B, A, Q, v]`, of the attention to all keys, these and others.
        logsumexp: `[B, A, Q]`, of the scores of all keys.
        query, key, value, scale, causal, bias: see `attention`.
    """
    operator, widest = _fused_for(query, value, bias)
    groups = query.shape[1] // key.shape[1]
    if operator is not None:
        inputs = _widened(widest, gradient, query, key, value, output)
        if groups == 1 or operator.takes_groups:
            gradients = operator.backward(*inputs, logsumexp, scale, causal, bias)
        else:
            gradients = _backward_by_member(operator, groups, *inputs, logsumexp, scale, causal, bias)
        return tuple(
            part.narrow(-1, 0, like.shape[-1]) for part, like in zip(gradients, (query, key, value), strict=True)
        )
    wide = logsumexp.dtype
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = (torch.zeros_like(part, dtype=wide) for part in (key, value))
    delta = (gradient.to(wide) * output).sum(-1, keepdim=True)
    for rows in _parts(query, key):
        given = _as_queries(gradient[:, :, rows], groups)
        weights = (_scores(query, key, scale, causal, bias, rows) - logsumexp[:, :, rows, None]).exp()
        products = _as_heads(given @ value.transpose(-1, -2), groups)
        score_gradient = (products - delta[:, :, rows]) * weights * scale
        score_gradient, weights = (
            _as_queries(part, groups) for part in (score_gradient.to(query.dtype), weights.to(gradient.dtype))
        )
        query_gradient[:, :, rows] = _as_heads(score_gradient @ key, groups)
        key_gradient += score_gradient.transpose(-1, -2) @ _as_queries(query[:, :, rows], groups)
        value_gradient += weights.transpose(-1, -2) @ given
    return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


def _forward_by_member(
    operator: Fused,
    groups: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention` by an operator that wants as many keys as queries: of every group one head at a time."""
    found = [
        operator.forward(_member(query, member, groups), key, value, scale, causal, _member(bias, member, groups))
        for member in range(groups)
    ]
    output, logsumexp = (torch.stack(parts, dim=2).flatten(1, 2) for parts in zip(*found, strict=True))
    return output, logsumexp


def _backward_by_member(
    operator: Fused,
    groups: int,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward`, likewise."""
    query_gradients = []
    key_gradient, value_gradient = (torch.zeros_like(part, dtype=logsumexp.dtype) for part in (key, value))
    for member in range(groups):
        given, own, found, sums = (_member(part, member, groups) for part in (gradient, query, output, logsumexp))
        parts = operator.backward(given, own, key, value, found, sums, scale, causal, _member(bias, member, groups))
        query_gradients.append(parts[0])
        key_gradient += parts[1]
        value_gradient += parts[2]
    query_gradient = torch.stack(query_gradients, dim=2).flatten(1, 2)
    return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


def _member(heads: Tensor | None, member: int, groups: int) -> Tensor | None:
    """One head of every group, `[B, A, …]` to `[B, A / groups, …]`; one for all, `[B, 1, …]`, stays one."""
    return heads if heads is None or heads.shape[1] == 1 else heads[:, member::groups]


def _as_queries(heads: Tensor, groups: int) -> Tensor:
    """`[B, A, Q, e]` to `[B, A / groups, groups · Q, e]`: heads that share keys are as many queries of one head."""
    return heads if groups == 1 else heads.unflatten(1, (-1, groups)).flatten(2, 3)


def _as_heads(queries: Tensor, groups: int) -> Tensor:
    """The way back."""
    return queries if groups == 1 else queries.unflatten(2, (groups, -1)).flatten(1, 2)


def _widened(features: int, *tensors: Tensor) -> list[Tensor]:
    # The fused operator wants one size of heads; features of zero change nothing.
    return [
        tensor if tensor.shape[-1] == features else pad(tensor, (0, features - tensor.shape[-1])) for tensor in tensors
    ]


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Queries at a time, so that their scores stay few."""
    per_query = max(query.shape[0] * query.shape[1] * key.shape[2], 1)
    size, queries = max(SCORES_ELEMENTS // per_query, 1), query.shape[2]
    yield from (slice(start, min(start + size, queries)) for start in range(0, max(queries, 1), size))


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool, bias: Tensor | None, rows: slice) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    products = _as_heads(_as_queries(query[:, :, rows], groups) @ key.transpose(-1, -2), groups)
    scores = products.to(accumulation_dtype(query.dtype)) * scale
    if causal:
        i = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        hidden = torch.arange(key.shape[2], device=scores.device) > i
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores if bias is None else scores + bias[:, :, rows]


__all__ = ["attention", "attention_backward"]

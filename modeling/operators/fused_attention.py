"""Ordinary attention that also returns the log-sum-exp of its scores, so that it may be merged with the attention to other keys.

PyTorch's fused attention for a CPU serves where there is one, and plain products elsewhere. The backward pass takes the output and
the log-sum-exp of *all* keys a query attends to: with them it gives the share of these keys in the gradients.

Legend: `B` batch, `A` heads, `Q` queries, `L` keys, `e` features per head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pair_autograd import accumulation_dtype


# Scores that the plain way holds at a time.
SCORES_ELEMENTS = 1 << 24

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch has fused attention that returns the log-sum-exp, for a device."""
    return device.type == "cpu" and FLASH is not None


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each row's sum of exponentials.

    Args:
        query, key: `[B, A, Q, e]` and `[B, A, L, e]`.
        value: `[B, A, L, v]`.
        scale: what scores are multiplied by before softmax.
        causal: whether query `i` sees keys `j ≤ i` only.
        bias: `[B or 1, A or 1, Q, L]`, added to the scores; finite, the lowest number of its type where a pair is hidden. A row
            of nothing else has a log-sum-exp so low that merging gives it no weight. Not together with `causal`.

    Returns:
        `[B, A, Q, v]` of the values' dtype, and `[B, A, Q]`, float64 for float64 and float32 otherwise.
    """
    if has_flash(query.device):
        widest = max(query.shape[-1], value.shape[-1])
        output, logsumexp = FLASH(*_widened(widest, query, key, value), 0.0, causal, attn_mask=bias, scale=scale)
        return output[..., : value.shape[-1]], logsumexp
    outputs, sums = [], []
    for rows in _parts(query, key):
        scores = _scores(query, key, scale, causal, bias, rows)
        sums.append(scores.logsumexp(-1))
        outputs.append((scores - sums[-1][..., None]).exp().to(value.dtype) @ value)
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
    """Gradients of query, key and value.

    Args:
        gradient, output: `[B, A, Q, v]`, of the attention to all keys, these and others.
        logsumexp: `[B, A, Q]`, of the scores of all keys.
        query, key, value, scale, causal, bias: see `attention`.
    """
    if has_flash(query.device):
        widest = max(query.shape[-1], value.shape[-1])
        gradient, query_, key_, value_, output = _widened(widest, gradient, query, key, value, output)
        gradients = FLASH_BACKWARD(
            gradient, query_, key_, value_, output, logsumexp.contiguous(), 0.0, causal, attn_mask=bias, scale=scale
        )
        return tuple(part[..., : like.shape[-1]] for part, like in zip(gradients, (query, key, value), strict=True))
    wide = logsumexp.dtype
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = (torch.zeros_like(part, dtype=wide) for part in (key, value))
    delta = (gradient.to(wide) * output).sum(-1, keepdim=True)
    for rows in _parts(query, key):
        given = gradient[:, :, rows]
        weights = (_scores(query, key, scale, causal, bias, rows) - logsumexp[:, :, rows, None]).exp()
        score_gradient = (given @ value.transpose(-1, -2) - delta[:, :, rows]) * weights * scale
        score_gradient, weights = score_gradient.to(query.dtype), weights.to(gradient.dtype)
        query_gradient[:, :, rows] = score_gradient @ key
        key_gradient += score_gradient.transpose(-1, -2) @ query[:, :, rows]
        value_gradient += weights.transpose(-1, -2) @ given
    return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


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
    scores = (query[:, :, rows] @ key.transpose(-1, -2)).to(accumulation_dtype(query.dtype)) * scale
    if causal:
        i = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        hidden = torch.arange(key.shape[2], device=scores.device) > i
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores if bias is None else scores + bias[:, :, rows]


__all__ = ["attention", "attention_backward", "has_flash"]

"""Ordinary attention that also returns the log-sum-exp of its scores, so that it may be merged with the attention to other keys.

PyTorch's fused attention for a CPU serves where there is one, and plain products elsewhere. The backward pass takes the output and
the log-sum-exp of *all* keys a query attends to: with them it gives the share of these keys in the gradients.

Legend: `B` batch, `A` heads, `Q` queries, `L` keys, `e` features per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pair_autograd import accumulation_dtype


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
    scores = _scores(query, key, scale, causal, bias)
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp().to(value.dtype) @ value, logsumexp


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
    weights = (_scores(query, key, scale, causal, bias) - logsumexp[..., None]).exp()
    delta = (gradient.to(wide) * output).sum(-1, keepdim=True)
    score_gradient = ((gradient @ value.transpose(-1, -2) - delta) * weights * scale).to(query.dtype)
    weights = weights.to(gradient.dtype)
    return (
        score_gradient @ key,
        score_gradient.transpose(-1, -2) @ query,
        weights.transpose(-1, -2) @ gradient,
    )


def _widened(features: int, *tensors: Tensor) -> list[Tensor]:
    # The fused operator wants one size of heads; features of zero change nothing.
    return [
        tensor if tensor.shape[-1] == features else pad(tensor, (0, features - tensor.shape[-1])) for tensor in tensors
    ]


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).to(accumulation_dtype(query.dtype)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores if bias is None else scores + bias


__all__ = ["attention", "attention_backward", "has_flash"]

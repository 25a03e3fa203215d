"""Translution in a few plain operations, for exported models, and for compiled steps that add several tokens to a static cache.

The signatures are those of `reference.py`. Every token is projected by every matrix, and each pair gathers the
projection it needs: no loop depends on the number of tokens, and every operation is one that ONNX has. That takes `O·L`
projections, and memory for one per pair; in eager mode `grouped.py` needs neither.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `O` offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype
from .pair_layout import PairLayout, StepLayout
from .rotary import rotate


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    num_heads: int,
    layout: PairLayout | StepLayout,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Inner products `<q_ij, k_ij>` of every pair and head, `[B, A, queries, L]`; see `reference.pair_scores`."""
    rows, reverse_rows = layout.offsets(query.device)
    query = _of_pairs(query, query_bank, reverse_rows, layout, True).unflatten(-1, (num_heads, -1))
    key = _of_pairs(key, key_bank, rows, layout, False).unflatten(-1, (-1, query.shape[-1]))
    key = key.repeat_interleave(num_heads // key.shape[-2], dim=-2)
    if rotation is not None:
        # Of tokens, `[…, L, e]`, for pairs `[B, queries, L, A, e]`.
        first = rows.shape[1] - rows.shape[0]
        own = tuple(part[..., first:, :] for part in rotation)
        query = rotate(query, tuple(_of_tokens(part).unsqueeze(-3) for part in own)).to(query.dtype)
        key = rotate(key, tuple(_of_tokens(part).unsqueeze(-4) for part in rotation)).to(key.dtype)
    scores = (query * key).sum(-1, dtype=accumulation_dtype(query.dtype))
    return scores.permute(0, 3, 1, 2).masked_fill(rows < 0, 0)


def pair_values(
    probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout | StepLayout, groups: int = 1
) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, queries, A·e]`; see `reference.pair_values`."""
    rows, _ = layout.offsets(value.device)
    probabilities = probabilities.to(value.dtype).masked_fill(rows < 0, 0)
    projected = _of_pairs(value, value_bank, rows, layout, False)
    projected = projected.unflatten(-1, (probabilities.shape[1] // groups, -1)).repeat_interleave(groups, dim=-2)
    return torch.einsum("baij,bijae->biae", probabilities, projected).flatten(2)


def _of_tokens(part: Tensor) -> Tensor:
    """Cosines or sines `[L, e]` or `[B, 1, L, e]`, without the axis of heads and with one for them at its place: `[…, L, 1, e]`."""
    return (part.squeeze(1) if part.ndim == 4 else part).unsqueeze(-2)


def _of_pairs(
    tokens: Tensor, bank: Tensor | None, rows: Tensor, layout: PairLayout | StepLayout, is_query: bool
) -> Tensor:
    """The projection that each pair has of one of its tokens, `[B, queries, L, A·e]`, or what broadcasts to it."""
    if bank is None:
        return tokens.unsqueeze(2 if is_query else 1)
    if layout.causal and not layout.clamp:
        bank = bank[: layout.num_tokens]
    num_rows, _, features = bank.shape
    projected = tokens @ bank.transpose(0, 1).flatten(1)
    projected = projected.unflatten(-1, (num_rows, features)).flatten(1, 2)  # [B, L·O, A·e]
    token = torch.arange(tokens.shape[1], device=rows.device)
    place = (token[:, None] if is_query else token) * num_rows + rows.clamp(min=0)
    return projected.index_select(1, place.flatten()).unflatten(1, place.shape)


__all__ = ["pair_scores", "pair_values"]

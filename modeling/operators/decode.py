"""Translution of one new token with a cache: a bank is read as one slice, and no matrix is copied.

The signatures are those of `reference.py`, with one query and a `StepLayout`, and with biases and grouped heads. Tokens are put in the order of
their distance, so that the token `n` steps back lines up with row `n` of the bank: the small tensor is reordered, not the large one. A basis
needs no projection of the cached tokens: with `z = q_i U[m]ᵀ`, `<q_i, x_j U[m]> = <z, x_j>`, and values are first summed,
then projected.

Legend: `B` batch, `L` slots, `A` heads, `e` bank output size per head, `n` factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import OffsetBasis
from .pair_autograd import accumulation_dtype
from .pair_layout import StepLayout
from .rotary import rotate


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | OffsetBasis | None,
    key_bank: Tensor | OffsetBasis | None,
    num_heads: int,
    layout: StepLayout,
    rotation: tuple[Tensor, Tensor] | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    groups: int = 1,
) -> Tensor:
    """Inner products `<q_ij, k_ij>`, `[B, A, 1, L]`; without meaning for slots that are not filled.

    Args:
        query, key: `[B, 1, in]` and `[B, L, in]`.
        rotation: see `reference.pair_scores`; the query's is the last. Not of a basis.
        biases: of what the banks of queries and keys project, `[num_offsets, A·e]`. Not of a basis.
        groups: heads of queries that share one of keys, whose bank or plain projections have `A / groups` heads.
    """
    if isinstance(key_bank, OffsetBasis):
        return _basis_scores(query, key, query_bank, key_bank, num_heads, layout, groups)
    order = layout.by_distance(query.device)
    query = _project_one(query, query_bank, biases[0], order.numel()).unflatten(-1, (num_heads, -1))
    key = _project_each(key, key_bank, biases[1], order).unflatten(-1, (num_heads // groups, -1))
    if rotation is not None:
        # `[B, 1, L, e]` as `[L, B, 1, e]`.
        turns = [part.permute(2, 0, 1, 3) for part in rotation]
        query = rotate(query, tuple(part[-1:] for part in turns)).to(query.dtype)
        key = rotate(key, tuple(part.index_select(0, order) for part in turns)).to(key.dtype)
    if groups > 1:
        query, key = query.unflatten(2, (-1, groups)), key.unsqueeze(3)
    scores = (query * key).sum(-1, dtype=accumulation_dtype(query.dtype)).flatten(2)  # [distances, B, A]
    return scores.index_select(0, layout.slot_distances(query.device)).permute(1, 2, 0).unsqueeze(2)


def pair_values(
    probabilities: Tensor,
    value: Tensor,
    value_bank: Tensor | OffsetBasis,
    layout: StepLayout,
    bias: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, 1, A·e]`.

    Args:
        probabilities: `[B, A, 1, L]`, 0 for empty slots.
        value: `[B, L, in]`.
        bias, groups: see `pair_scores`.
    """
    num_heads = probabilities.shape[1]
    probabilities = probabilities.squeeze(2).to(value.dtype)
    if isinstance(value_bank, OffsetBasis):
        return _basis_values(probabilities, value, value_bank, num_heads, layout, groups)
    order = layout.by_distance(value.device)
    projected = _project_each(value, value_bank, bias, order).unflatten(-1, (num_heads // groups, -1))
    weights = probabilities.index_select(-1, order)
    if not isinstance(layout.position, int) or layout.position + 1 < order.numel():
        # Distances that no token has yet point to slot 0, whose probability is not theirs.
        weights = weights * (layout.position >= torch.arange(order.numel(), device=value.device))
    if groups > 1:
        weights = weights.unflatten(1, (-1, groups))  # [B, A / groups, groups, distances]
        return (weights @ projected.permute(1, 2, 0, 3)).flatten(1)[:, None]
    return (weights.permute(2, 0, 1).unsqueeze(-1) * projected).sum(0).flatten(1)[:, None]


def _product(tokens: Tensor, bank: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(tokens, bank) if bias is None else torch.baddbmm(bias.unsqueeze(1), tokens, bank)


def _project_each(tokens: Tensor, bank: Tensor | None, bias: Tensor | None, order: Tensor) -> Tensor:
    """The token at each distance times that distance's matrix, `[distances, B, A·e]`."""
    tokens = tokens.transpose(0, 1).index_select(0, order)
    if bank is None:
        return tokens
    return _product(tokens, bank[: order.numel()], None if bias is None else bias[: order.numel()])


def _project_one(query: Tensor, bank: Tensor | OffsetBasis | None, bias: Tensor | None, num_distances: int) -> Tensor:
    """The query for each distance, `[distances or 1, B, A·e]`."""
    query = query.transpose(0, 1)
    if bank is None:
        return query
    if isinstance(bank, OffsetBasis):
        each = query @ bank.factors  # [n, B, A·e]
        return (bank.coefficients[:num_distances] @ each.flatten(1)).unflatten(-1, each.shape[1:])
    bias = None if bias is None else bias[:num_distances]
    return _product(query.expand(num_distances, -1, -1), bank[:num_distances], bias)


def _basis_scores(
    query: Tensor,
    key: Tensor,
    query_bank: OffsetBasis | None,
    key_bank: OffsetBasis,
    num_heads: int,
    layout: StepLayout,
    groups: int,
) -> Tensor:
    batch, rows = len(query), layout.rows(key.device)[0]
    each = query if query_bank is None else torch.einsum("bc,mcd->bmd", query[:, 0], query_bank.factors)
    each = each.unflatten(-1, (num_heads, -1))  # [B, queries, A, e]
    # z = q U[m]ᵀ, head by head: a head's columns of all factors are one matrix that no product has to copy.
    absorbed = [
        each[:, :, head].flatten(0, 1) @ _columns(key_bank, head // groups, num_heads // groups).T
        for head in range(num_heads)
    ]
    num_products = each.shape[1] * num_heads * len(key_bank.factors)
    absorbed = torch.cat(absorbed, dim=-1).view(batch, num_products, key.shape[-1])  # [B, queries·A·n, in]
    products = absorbed @ key.transpose(-1, -2)
    products = products.unflatten(1, (-1, len(key_bank.factors)))  # [B, queries·A, n, L]
    scores = (products * key_bank.coefficients.index_select(0, rows).T).sum(2)
    if query_bank is not None:
        scores = (scores.unflatten(1, (-1, num_heads)) * query_bank.coefficients.index_select(0, rows).T[:, None]).sum(
            1
        )
    return scores.unsqueeze(2)


def _basis_values(
    probabilities: Tensor, value: Tensor, bank: OffsetBasis, num_heads: int, layout: StepLayout, groups: int
) -> Tensor:
    weights = bank.coefficients.index_select(0, layout.rows(value.device)[0])
    weighted = probabilities.unsqueeze(2) * weights.T  # [B, A, n, L]
    sums = (weighted.flatten(1, 2) @ value).unflatten(1, (num_heads, -1)).flatten(2)  # [B, A, n·in]
    heads = [sums[:, head] @ _columns(bank, head // groups, num_heads // groups) for head in range(num_heads)]
    return torch.cat(heads, dim=-1)[:, None]


def _columns(bank: OffsetBasis, head: int, num_heads: int) -> Tensor:
    """A head's columns of all factors, `[n·in, e]`, a view."""
    size = bank.factors.shape[-1] // num_heads
    return bank.factors.flatten(0, 1)[:, head * size : (head + 1) * size]


__all__ = ["pair_scores", "pair_values"]

"""Translution of one new token with a cache: a bank is read as one slice, and no matrix is copied.

The signatures are those of `translution_reference.py`, with one query and a `StepLayout`. Tokens are put in the order of
their distance, so that token `n` back meets row `n` of the bank: the small thing is gathered, not the large one. A basis
needs no projection of the remembered tokens: with `z = q_i U[m]ᵀ`, `<q_i, x_j U[m]> = <z, x_j>`, and values are summed first
and projected then.

Legend: `B` batch, `L` slots, `A` heads, `e` bank output size per head, `n` factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_layout import StepLayout, distances
from .translution_basis import OffsetBasis


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | OffsetBasis | None,
    key_bank: Tensor | OffsetBasis | None,
    num_heads: int,
    layout: StepLayout,
) -> Tensor:
    """Inner products `<q_ij, k_ij>`, `[B, A, 1, L]`; without meaning for slots that are not filled.

    Args:
        query, key: `[B, 1, in]` and `[B, L, in]`.
    """
    if isinstance(key_bank, OffsetBasis):
        return _basis_scores(query, key, query_bank, key_bank, num_heads, layout)
    order = _by_distance(layout, query.device)
    query = _project_one(query, query_bank, order, num_heads)
    if key_bank is None:
        key = key.unflatten(-1, (num_heads, -1))[:, order]
    else:
        key = _project_each(key, key_bank, order).unflatten(-1, (num_heads, -1))
    scores = torch.einsum("blad,blad->bal", query.expand(-1, order.numel(), -1, -1), key)
    return _by_slot(scores, layout).unsqueeze(2)


def pair_values(probabilities: Tensor, value: Tensor, value_bank: Tensor | OffsetBasis, layout: StepLayout) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, 1, A·e]`; `probabilities` `[B, A, 1, L]` are 0 for empty slots."""
    num_heads = probabilities.shape[1]
    probabilities = probabilities.squeeze(2).to(value.dtype)
    if isinstance(value_bank, OffsetBasis):
        weights = value_bank.coefficients[layout.rows(value.device)[0]]
        sums = torch.einsum("bal,lm,blc->bmac", probabilities, weights, value)
        factors = value_bank.factors.unflatten(-1, (num_heads, -1))
        return torch.einsum("bmac,mcad->bad", sums, factors).flatten(1)[:, None]
    order = _by_distance(layout, value.device)
    projected = _project_each(value, value_bank, order).unflatten(-1, (num_heads, -1))
    filled = (layout.position >= torch.arange(order.numel(), device=value.device)).to(value.dtype)
    return torch.einsum("bal,blad->bad", probabilities[..., order] * filled, projected).flatten(1)[:, None]


def _by_distance(layout: StepLayout, device: torch.device) -> Tensor:
    """Slot of the token at each distance that a bank tells apart, `[distances]`; slot 0 where no token is that far."""
    reach = min(layout.num_tokens, layout.bank_height)
    return (layout.position - torch.arange(reach, device=device)).clamp(min=0)


def _by_slot(pairs: Tensor, layout: StepLayout) -> Tensor:
    """`[…, distances]` to `[…, L]`."""
    return pairs[..., distances(layout, pairs.device)[0].clamp(0, pairs.shape[-1] - 1)]


def _project_each(tokens: Tensor, bank: Tensor, order: Tensor) -> Tensor:
    """The token at each distance times that distance's matrix, `[B, distances, A·e]`."""
    return torch.bmm(tokens[:, order].transpose(0, 1), bank[: order.numel()]).transpose(0, 1)


def _project_one(query: Tensor, bank: Tensor | OffsetBasis | None, order: Tensor, num_heads: int) -> Tensor:
    """The query for each distance, `[B, distances or 1, A, e]`."""
    if bank is None:
        projected = query
    elif isinstance(bank, OffsetBasis):
        each = torch.einsum("bc,mcd->bmd", query[:, 0], bank.factors)
        projected = torch.einsum("lm,bmd->bld", bank.coefficients[: order.numel()], each)
    else:
        one = query.transpose(0, 1).expand(order.numel(), -1, -1)
        projected = torch.bmm(one, bank[: order.numel()]).transpose(0, 1)
    return projected.unflatten(-1, (num_heads, -1))


def _basis_scores(
    query: Tensor,
    key: Tensor,
    query_bank: OffsetBasis | None,
    key_bank: OffsetBasis,
    num_heads: int,
    layout: StepLayout,
) -> Tensor:
    rows = layout.rows(key.device)[0]
    key_weights = key_bank.coefficients[rows]
    factors = key_bank.factors.unflatten(-1, (num_heads, -1))
    if query_bank is None:
        heads = query[:, 0].unflatten(-1, (num_heads, -1))
        absorbed = torch.einsum("bad,mcad->bamc", heads, factors)
        return torch.einsum("bamc,blc,lm->bal", absorbed, key, key_weights).unsqueeze(2)
    each = torch.einsum("bc,ncd->bnd", query[:, 0], query_bank.factors).unflatten(-1, (num_heads, -1))
    absorbed = torch.einsum("bnad,mcad->banmc", each, factors)
    query_weights = query_bank.coefficients[rows]
    return torch.einsum("banmc,blc,lm,ln->bal", absorbed, key, key_weights, query_weights).unsqueeze(2)


__all__ = ["pair_scores", "pair_values"]

"""Basis Translution: pairs whose matrices are mixed from a few shared ones, computed without building the bank.

A bank of `n` factors is `W[o] = Σ_m b[o, m] U[m]`. The projections `x_j U[m]` belong to tokens, not to pairs, and

    <q_i, x_j W[o]> = Σ_m b[o, m] <q_i, x_j U[m]>,      Σ_j p_ij x_j W[o] = Σ_m Σ_j (p_ij b[o, m]) x_j U[m]

are `n` ordinary attention products mixed by the offset: `n·2·B·L²·C'` operations instead of `2·B·L²·C·C'`. Where queries and
keys both have a basis there are `n²` products. The signatures are those of `translution_reference.py`, with an `OffsetBasis`
for each bank.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `n` factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pair_layout import PairLayout


class OffsetBasis(NamedTuple):
    """A bank in factors: `coefficients` `[num_offsets, n]` and `factors` `[n, in, A·e]`."""

    coefficients: Tensor
    factors: Tensor

    def bank(self) -> Tensor:
        """The bank itself, `[num_offsets, in, A·e]`."""
        return torch.einsum("om,mcd->ocd", self.coefficients, self.factors)

    def to(self, dtype: torch.dtype) -> OffsetBasis:
        return OffsetBasis(self.coefficients.to(dtype), self.factors.to(dtype))


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: OffsetBasis | None,
    key_bank: OffsetBasis | None,
    num_heads: int,
    layout: PairLayout,
) -> Tensor:
    """Inner products `<q_ij, k_ij>` of every pair and head, `[B, A, receivers, L]`; see `translution_reference.pair_scores`."""
    rows, reverse_rows = layout.offsets()
    query_heads, query_weight = _project(query, query_bank, reverse_rows, num_heads)
    key_heads, key_weight = _project(key, key_bank, rows, num_heads)
    scores = 0
    for one_query, one_query_weight in zip(query_heads, query_weight, strict=True):
        mixed = 0
        for one_key, one_key_weight in zip(key_heads, key_weight, strict=True):
            mixed = mixed + _weighted(one_query @ one_key.transpose(-1, -2), one_key_weight)
        scores = scores + _weighted(mixed, one_query_weight)
    return scores.masked_fill((rows < 0).to(scores.device), 0) if layout.causal else scores


def pair_values(probabilities: Tensor, value: Tensor, value_bank: OffsetBasis, layout: PairLayout) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, receivers, A·e]`; see `translution_reference.pair_values`."""
    rows, _ = layout.offsets()
    heads, weights = _project(value, value_bank, rows, probabilities.shape[1])
    probabilities = probabilities.to(value.dtype)
    if layout.causal:
        probabilities = probabilities.masked_fill((rows < 0).to(probabilities.device), 0)
    output = 0
    for one, weight in zip(heads, weights, strict=True):
        output = output + _weighted(probabilities, weight) @ one
    return output.transpose(1, 2).flatten(2)


def project_factors(tokens: Tensor, basis: OffsetBasis | None, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """The tokens' projections by every factor, `[B, A, n, L, e]`, and their coefficients `[num_offsets, n]`.

    Without a basis the tokens are projections already: one factor, and no coefficients.
    """
    if basis is None:
        return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)[:, :, None], None
    projected = torch.einsum("blc,mcd->bmld", tokens, basis.factors)
    return projected.unflatten(-1, (num_heads, -1)).permute(0, 3, 1, 2, 4), basis.coefficients


def _project(
    tokens: Tensor, basis: OffsetBasis | None, rows: Tensor, num_heads: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Per factor, the tokens' projections `[B, A, L, e]` and the factor's weight in each pair `[receivers, L]`."""
    heads, coefficients = project_factors(tokens, basis, num_heads)
    if coefficients is None:
        return heads.unbind(2), (None,)
    # Pairs that do not exist have no row; whatever weight they get is multiplied by zero.
    weights = coefficients[rows.clamp(min=0).to(tokens.device)]
    return heads.unbind(2), weights.unbind(-1)


def _weighted(pairs: Tensor, weight: Tensor | None) -> Tensor:
    return pairs if weight is None else pairs * weight


__all__ = ["OffsetBasis", "pair_scores", "pair_values", "project_factors"]

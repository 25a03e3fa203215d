"""Basis Translution: pairs whose matrices are mixed from a few shared ones, computed without building the bank.

A bank of `n` factors is `W[o] = Σ_m b[o, m] U[m]`. The projections `x_j U[m]` belong to tokens, not to pairs, and

    <q_i, x_j W[o]> = Σ_m b[o, m] <q_i, x_j U[m]>,      Σ_j p_ij x_j W[o] = Σ_m Σ_j (p_ij b[o, m]) x_j U[m]

are `n` ordinary attention products mixed by the offset: `n·2·B·L²·C'` operations instead of `2·B·L²·C·C'`. Where queries and
keys both have a basis there are `n²` products. They are made a part at a time, see `basis_products.py`. The signatures are those
of `translution_reference.py`, with an `OffsetBasis` for each bank.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `n` factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .basis_products import mixed_scores, mixed_values
from .pair_autograd import accumulation_dtype
from .pair_layout import PairLayout, StepLayout


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
    layout: PairLayout | StepLayout,
) -> Tensor:
    """Inner products `<q_ij, k_ij>` of every pair and head, `[B, A, receivers, L]`; see `translution_reference.pair_scores`."""
    rows, reverse_rows = layout.offsets(query.device)
    query_heads, query_coefficients = project_factors(query, query_bank, num_heads)
    key_heads, key_coefficients = project_factors(key, key_bank, num_heads)
    key_weights = _weights(key_coefficients, rows, key)
    if query_coefficients is None:
        scores = mixed_scores(query_heads[:, :, 0], key_heads, key_weights)
    elif key_coefficients is None:
        # Pairs seen from the other side.
        weights = _weights(query_coefficients, reverse_rows, query).transpose(1, 2)
        scores = mixed_scores(key_heads[:, :, 0], query_heads, weights.contiguous()).transpose(-1, -2)
    else:
        query_weights = _weights(query_coefficients, reverse_rows, query)
        scores = 0
        for one_query, weight in zip(query_heads.unbind(2), query_weights.unbind(0), strict=True):
            scores = scores + mixed_scores(one_query, key_heads, key_weights * weight)
    return scores.masked_fill(rows < 0, 0) if layout.causal else scores


def pair_values(
    probabilities: Tensor, value: Tensor, value_bank: OffsetBasis, layout: PairLayout | StepLayout
) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, receivers, A·e]`; see `translution_reference.pair_values`."""
    rows, _ = layout.offsets(value.device)
    heads, coefficients = project_factors(value, value_bank, probabilities.shape[1])
    probabilities = probabilities.to(value.dtype)
    if layout.causal:
        probabilities = probabilities.masked_fill(rows < 0, 0)
    return mixed_values(probabilities, heads, _weights(coefficients, rows, value)).transpose(1, 2).flatten(2)


def project_factors(tokens: Tensor, basis: OffsetBasis | None, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """The tokens' projections by every factor, `[B, A, n, L, e]`, and their coefficients `[num_offsets, n]`.

    Without a basis the tokens are projections already: one factor, and no coefficients.
    """
    if basis is None:
        return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)[:, :, None], None
    projected = torch.einsum("blc,mcd->bmld", tokens, basis.factors)
    return projected.unflatten(-1, (num_heads, -1)).permute(0, 3, 1, 2, 4), basis.coefficients


def _weights(coefficients: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    """Each factor's weight in each pair, `[n, receivers, L]`; one without coefficients."""
    if coefficients is None:
        return like.new_ones(1, *rows.shape)
    # Pairs that do not exist have no row; whatever weight they get is multiplied by zero. A coefficient's gradient sums over
    # many pairs: in a type that can hold the sum.
    wide = coefficients.to(accumulation_dtype(coefficients.dtype))
    weights = torch.nn.functional.embedding(rows.clamp(min=0), wide).to(coefficients.dtype)
    return weights.permute(2, 0, 1).contiguous()


__all__ = ["OffsetBasis", "pair_scores", "pair_values", "project_factors"]

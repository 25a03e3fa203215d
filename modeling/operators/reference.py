"""Translution as the formulas say it: slow, readable, and the definition that every faster path is tested against.

The signatures are those of `grouped.py`. One query at a time, the matrices of all its pairs are
gathered from the bank, `[L, in, A·e]`, and applied.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head. Position `i` is the query's, `j` the key's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import groups_of, repeat_features, split_heads
from .pair_layout import PairLayout
from .rotary import rotate


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    num_heads: int,
    layout: PairLayout,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Inner products `<q_ij, k_ij>` of every pair and head (Fan et al. 2025, equations of section 3).

    `q_ij = q_i Wq[o(j, i)]` and `k_ij = k_j Wk[o(i, j)]`, or the plain inputs where a bank is `None`.

    Args:
        query, key: `[B, queries, in]` and `[B, L, in]`, token inputs of a bank, or plain projections `[…, A·e]` where it is
            `None`.
        query_bank, key_bank: `[num_offsets, in, A·e]` or `None`. Keys may have fewer heads than queries: each serves
            as many queries' heads, one after the other, as the widths say.
        num_heads: `A`, of queries.
        layout: the pairs.
        rotation: cosines and sines of every token, `[L, e]` or `[B, 1, L, e]`: then both projections of a pair are rotated by
            the positions of their tokens, `<R_i q_ij, R_j k_ij>` (Su et al. 2021).

    Returns:
        `[B, A, queries, L]` of the tokens' dtype; 0 for pairs that a causal layout does not have.
    """
    rows, reverse_rows = layout.offsets(query.device)
    scores = []
    for i in range(layout.num_queries):
        q_i = query[:, i]
        if query_bank is None:
            q_ij = q_i[:, None].expand(-1, layout.num_tokens, -1)
        else:
            q_ij = torch.einsum("bc,jcd->bjd", q_i, query_bank[reverse_rows[i]])
        k_ij = key if key_bank is None else torch.einsum("bjc,jcd->bjd", key, key_bank[rows[i]])
        k_ij = repeat_features(k_ij, num_heads, groups_of(q_ij, k_ij))
        q_ij, k_ij = split_heads(q_ij, num_heads), split_heads(k_ij, num_heads)
        if rotation is not None:
            own = layout.past + i
            q_ij = rotate(q_ij, tuple(part[..., own : own + 1, :] for part in rotation)).to(query.dtype)
            k_ij = rotate(k_ij, rotation).to(query.dtype)
        scores.append(torch.einsum("bajd,bajd->baj", q_ij, k_ij))
    return torch.stack(scores, dim=2).masked_fill(rows < 0, 0)


def pair_values(
    probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout, groups: int = 1
) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]` of every token and head (Fan et al. 2025, equations of section 3).

    Args:
        probabilities: `[B, A, queries, L]`; entries of pairs that a causal layout does not have are not read.
        value: `[B, L, in]`, the token inputs.
        value_bank: `[num_offsets, in, A / groups·e]`.
        layout: the pairs.
        groups: heads that share one of the bank, one after the other.

    Returns:
        `[B, queries, A·e]` of the tokens' dtype.
    """
    rows, _ = layout.offsets(value.device)
    probabilities = probabilities.to(value.dtype).masked_fill(rows < 0, 0)
    num_heads = probabilities.shape[1]
    outputs = []
    for i in range(layout.num_queries):
        v_ij = torch.einsum("bjc,jcd->bjd", value, value_bank[rows[i]])
        v_ij = repeat_features(v_ij, num_heads, groups).unflatten(-1, (num_heads, -1))
        outputs.append(torch.einsum("baj,bjad->bad", probabilities[:, :, i], v_ij).flatten(-2))
    return torch.stack(outputs, dim=1)


__all__ = ["pair_scores", "pair_values"]

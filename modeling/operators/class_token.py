"""The pairs of a class token: one row and one column of the `L × L` pairs, three matrices, ordinary matrix products.

Each block of pairs has one query or one key, so that a projection per pair is one per token. Banks may be `None`, as in
`reference.py`. Keys and values have as many heads as their widths say, see `heads.py`.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head.
"""

from __future__ import annotations

from torch import Tensor

from .heads import merge_heads, projected_size, repeat_features, split_heads, sum_groups
from .pair_layout import CLASS_FROM_PATCH, CLASS_TO_CLASS, PATCH_FROM_CLASS, PairLayout


def class_blocks(layout: PairLayout) -> tuple[tuple[slice, slice, int, int], ...]:
    """Queries, keys, row and reverse row of each block of pairs, in grouped order; none without a class token."""
    if not layout.class_token:
        return ()
    cls, patches, first = slice(0, 1), slice(1, None), layout.num_grid_offsets
    return (
        (cls, cls, first + CLASS_TO_CLASS, first + CLASS_TO_CLASS),
        (cls, patches, first + CLASS_FROM_PATCH, first + PATCH_FROM_CLASS),
        (patches, cls, first + PATCH_FROM_CLASS, first + CLASS_FROM_PATCH),
    )


def write_class_scores(
    scores: Tensor, query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, layout: PairLayout
) -> None:
    """Writes `<q_ij, k_ij>` of a class token's pairs into `scores`, `[B, A, L, L]`."""
    num_heads, width = scores.shape[1], projected_size(query, query_bank)
    for queries, keys, row, reverse in class_blocks(layout):
        # Scores are kept in a type that can hold the sum over a head, so they are summed in it.
        q = _project(query[:, queries], query_bank, reverse, num_heads, width).to(scores.dtype)
        k = _project(key[:, keys], key_bank, row, num_heads, width).to(scores.dtype)
        scores[:, :, queries, keys] = q @ k.transpose(-1, -2)


def add_class_values(
    output: Tensor, probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout
) -> None:
    """Adds `Σ_j p_ij v_ij` over a class token's pairs to `output`, `[B, L, A·e]`."""
    for queries, keys, row, _ in class_blocks(layout):
        v = _project(value[:, keys], value_bank, row, probabilities.shape[1], output.shape[-1])
        output[:, queries] += merge_heads(probabilities[:, :, queries, keys].to(v.dtype) @ v)


def add_class_gradients(
    gradients: list[Tensor | None],
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    layout: PairLayout,
) -> None:
    """Adds what the scores of a class token's pairs contribute to the gradients of query, query bank, key and key bank.

    `gradients` holds those four, or `None` where one is not wanted; that of plain keys may have `A` heads. Token gradients are added
    to, the three rows of a bank's gradient written.
    """
    num_heads, width = gradient.shape[1], projected_size(query, query_bank)
    query_gradient, query_bank_gradient, key_gradient, key_bank_gradient = gradients
    for queries, keys, row, reverse in class_blocks(layout):
        weight = gradient[:, :, queries, keys].to(query.dtype)
        if query_gradient is not None:
            k = _project(key[:, keys], key_bank, row, num_heads, width)
            _add(query_gradient, query_bank_gradient, query, query_bank, queries, reverse, merge_heads(weight @ k))
        if key_gradient is not None:
            q = _project(query[:, queries], query_bank, reverse, num_heads, width)
            projected = merge_heads(weight.transpose(-1, -2) @ q)
            projected = sum_groups(projected, num_heads, width // projected_size(key_gradient, key_bank))
            _add(key_gradient, key_bank_gradient, key, key_bank, keys, row, projected)


def _add(
    token_gradient: Tensor,
    bank_gradient: Tensor | None,
    tokens: Tensor,
    bank: Tensor | None,
    place: slice,
    row: int,
    gradient: Tensor,
) -> None:
    if bank is None:
        token_gradient[:, place] += gradient
        return
    token_gradient[:, place] += gradient @ bank[row].t()
    if bank_gradient is not None:
        bank_gradient[row] = tokens[:, place].flatten(0, 1).t() @ gradient.flatten(0, 1)


def _project(tokens: Tensor, bank: Tensor | None, row: int, num_heads: int, width: int) -> Tensor:
    """`[B, A, tokens, e]`, with `A·e` the width that queries have."""
    projected = tokens if bank is None else tokens @ bank[row]
    return split_heads(repeat_features(projected, num_heads, width // projected.shape[-1]), num_heads)


__all__ = ["add_class_gradients", "add_class_values", "class_blocks", "write_class_scores"]

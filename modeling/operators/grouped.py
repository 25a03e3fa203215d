"""Translution over pairs grouped by offset: what serves on a CPU where `streamed.py` cannot.

All pairs of one offset share a matrix, so their projections are one matrix product over a rectangle of the grid. Two
operators are enough for every variant:

- `pair_scores(q, k)[i, j] = <q_ij, k_ij>` per head, with `q_ij = q_i Wq[o(j, i)]` and `k_ij = k_j Wk[o(i, j)]`;
- `pair_values(p, v)[i] = Σ_j p_ij v_j Wv[o(i, j)]` per head.

Each of the three projections is the plain input where its bank is `None`. Keys and values may have fewer heads than queries, see
`heads.py`.

Memory: projections live in a workspace of bounded size and are computed again in the backward pass. Nothing of size
`[B, L, L, C']` and no matrix per pair exists. Scores and probabilities, `[B, A, L, L]`, do.

Inside this file tokens come first, `[L, B, C]`, see `offset_blocks.py`. The readable definition is in `reference.py`.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `w` columns of a shift, `P` pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .class_token import add_class_gradients, add_class_values, write_class_scores
from .offset_blocks import (
    Heads,
    Side,
    add_weighted_each,
    at,
    blocks,
    columns_of,
    make_sides,
    put_columns,
    tokens_first,
    workspace,
)
from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import PairLayout


def _to_grouped(pairs: Tensor, layout: PairLayout) -> Tensor:
    """`[B, A, queries, L]` to grouped order, `[P, B, A]`."""
    # Within one batch entry and head all pairs are near in memory: chosen there, and transposed as a block.
    order, _ = layout.pair_order()
    chosen = pairs.flatten(2).flatten(0, 1).index_select(1, order.to(pairs.device))
    return chosen.t().contiguous().unflatten(1, pairs.shape[:2])


def _from_grouped(pairs: Tensor, layout: PairLayout) -> Tensor:
    """`[P + 1, B, A]` in grouped order, the last for pairs that do not exist, to `[B, A, queries, L]`."""
    _, position = layout.pair_order()
    chosen = pairs.flatten(1).t().contiguous().index_select(1, position.to(pairs.device))
    return chosen.view(*pairs.shape[1:], layout.num_queries, layout.num_tokens)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    query_side, key_side = make_sides((query, key), (query_bank, key_bank), num_heads, layout)
    batch, features = query_side.batch, query_side.features
    wide = accumulation_dtype(query.dtype)
    num_pairs = layout.pair_order()[0].numel()
    grouped = query.new_empty(num_pairs + 1, batch, num_heads, dtype=wide)
    grouped[num_pairs] = 0
    flat = grouped.view(-1, num_heads)
    heads = Heads(num_heads, features, query)
    query_space = workspace(layout, batch, features, query)
    key_space = query_space if query_bank is None else torch.empty_like(query_space)
    place = 0
    for shift in layout.column_shifts():
        query_side.start_shift(shift)
        key_side.start_shift(shift)
        for block in blocks(shift, batch, features):
            end = place + block.num_rows
            product = query_space[: end - place]
            left = query_side.project(block, product.split(block.sizes))
            right = key_side.project(block, key_space[: end - place].split(block.sizes))
            heads.inner_products(*((right, left) if query_bank is None else (left, right)), product, flat[place:end])
            place = end
    scores = _from_grouped(grouped, layout)
    write_class_scores(scores, query, key, query_bank, key_bank, layout)
    return scores


def _scores_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    layout: PairLayout,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_heads = gradient.shape[1]
    query_side, key_side = make_sides((query, key), (query_bank, key_bank), num_heads, layout)
    batch, features = query_side.batch, query_side.features
    grouped = _to_grouped(gradient.to(query.dtype), layout)
    flat = grouped.view(-1, num_heads)
    heads = Heads(num_heads, features, query)
    weight_space, space = (workspace(layout, batch, features, query) for _ in range(2))
    # The gradient of one side needs the projections of the other.
    sides = [(query_side, key_side)] if need_query else []
    sides += [(key_side, query_side)] if need_key else []
    sides.sort(key=lambda pair: pair[0].bank is not None)
    for side, _ in sides:
        side.start_gradients()
    place = 0
    for shift in layout.column_shifts():
        query_side.start_shift(shift, need_query)
        key_side.start_shift(shift, need_key)
        for block in blocks(shift, batch, features):
            end = place + block.num_rows
            weights = heads.spread(flat[place:end], weight_space[: end - place]).split(block.sizes)
            pieces = space[: end - place].split(block.sizes)
            for side, other in sides:
                projected = other.project(block, pieces)
                if side.bank is None:
                    add_weighted_each(side.gradient_rows(block), projected, weights)
                    continue
                if other.bank is None:
                    # Plain inputs are not to be changed; the weights are, after their last use.
                    torch._foreach_mul_(weights, projected)
                    side.accumulate(block, weights)
                else:
                    torch._foreach_mul_(pieces, weights)
                    side.accumulate(block, pieces)
            place = end
        for side, _ in sides:
            side.end_shift()
    gradients = [None, None, None, None]
    if need_query:
        gradients[:2] = query_side.token_gradient.transpose(0, 1), query_side.bank_gradient
    if need_key:
        gradients[2:] = key_side.token_gradient.transpose(0, 1), key_side.bank_gradient
    add_class_gradients(gradients, gradient, query, key, query_bank, key_bank, layout)
    # Outputs of an operator must not share memory: a gradient nobody asked for is an empty tensor of its own.
    query_gradients = query_side.gradients() if need_query else (query.new_empty(0), query.new_empty(0))
    key_gradients = key_side.gradients() if need_key else (query.new_empty(0), query.new_empty(0))
    return *query_gradients, *key_gradients


def _values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout, groups: int = 1) -> Tensor:
    num_heads = probabilities.shape[1]
    key_side = Side(tokens_first(value), value_bank, layout, False, num_heads, groups)
    batch, features = key_side.batch, key_side.features
    wide = accumulation_dtype(value.dtype)
    grouped = _to_grouped(probabilities.to(value.dtype), layout)
    flat = grouped.view(-1, num_heads)
    heads = Heads(num_heads, features, value)
    space = workspace(layout, batch, features, value)
    weight_space = torch.empty_like(space) if heads.narrow else None
    output = value.new_zeros(layout.num_queries, batch, features, dtype=wide)
    place = 0
    for shift in layout.column_shifts():
        key_side.start_shift(shift)
        received = columns_of(output, layout, shift.queries)
        targets = received if heads.narrow else heads.apart(received)
        for block in blocks(shift, batch, features):
            end = place + block.num_rows
            weights, projected = flat[place:end], space[: end - place]
            pieces = key_side.project(block, projected.split(block.sizes))
            if heads.narrow:
                weights = heads.spread(weights, weight_space[: end - place])
            else:
                weights, pieces = heads.apart(weights), heads.apart(projected).split(block.sizes)
            add_weighted_each(at(targets, block.queries), pieces, weights.split(block.sizes))
            place = end
        put_columns(output, received, layout, shift.queries)
    output = output.transpose(0, 1)
    add_class_values(output, probabilities, value, value_bank, layout)
    return output.to(value.dtype).contiguous()


pair_scores, pair_values = register_pair_operators("", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

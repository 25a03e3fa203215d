"""The whole attention of full Translution in one pass over the pairs, with online softmax: the default path on a CPU.

    out_i = Σ_j softmax_j(scale <q_ij, k_ij>) v_ij        per head, each of q, k, v projected by a bank, or as it is

Pairs come in blocks of offsets, see `offset_blocks.py`. For each query the running maximum of the scores, the sum of
exponentials and the weighted sum of values are kept, and rescaled where a greater score comes (Milakov and Gimelshein 2018; Dao
et al. 2022). The backward pass computes scores again from the logarithm of that sum. So nothing of size `[B, A, L, L]` exists
at any time, and nothing that belongs to pairs outlives its block. A class token's pairs are where the pass over a grid starts
from.

Legend: `B` batch, `L` tokens, `A` heads, `e` output size per head, `w` columns of a shift.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .class_token import class_blocks
from .offset_blocks import (
    Block,
    Heads,
    Side,
    add_each,
    add_weighted_each,
    at,
    blocks,
    columns_of,
    make_sides,
    maximum_each,
    put_columns,
    tokens_first,
    workspace,
)
from .pair_autograd import accumulation_dtype, pack, unpack
from .pair_layout import PairLayout
from .registration import define, register_once


# Scores between two updates of the softmax: many, since each update touches the output once.
GROUP_ELEMENTS = 1 << 17


class OnlineSoftmax:
    """Softmax that is finished before all scores are known: of each query the running maximum, the running sum of exponentials
    and the weighted sum of values, tokens first.
    """

    def __init__(self, query: Tensor, num_heads: int, features: int):
        wide = accumulation_dtype(query.dtype)
        shape = (query.shape[1], query.shape[0], num_heads)
        self.running_max = query.new_full(shape, torch.finfo(wide).min, dtype=wide)
        self.running_sum = query.new_zeros(shape, dtype=wide)
        self.output = query.new_zeros(*shape[:2], features, dtype=wide)

    def add(self, queries: slice, scores: Tensor, values: Tensor) -> None:
        """Adds pairs of one query and many keys, or of many queries with one key each.

        Args:
            scores: `[pairs, B, A]`.
            values: `[pairs or 1, B, A·e]`.
        """
        old, running_sum, output = (part[queries] for part in (self.running_max, self.running_sum, self.output))
        together = old.shape[0] < scores.shape[0]
        running_max = torch.maximum(old, scores.amax(0, keepdim=True) if together else scores)
        decay, weight = (old - running_max).exp(), (scores - running_max).exp()
        given = by_head(values, weight) * weight.unsqueeze(-1)
        if together:
            weight, given = weight.sum(0, keepdim=True), given.sum(0, keepdim=True)
        running_sum.mul_(decay).add_(weight)
        by_head(output, decay).mul_(decay.unsqueeze(-1)).add_(given)
        old.copy_(running_max)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The output, `[L, B, A·e]`, and the logarithm of the sum of exponentials, `[L, B, A]`."""
        by_head(self.output, self.running_sum).div_(self.running_sum.unsqueeze(-1))
        return self.output, self.running_sum.log_().add_(self.running_max)


def by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """`[…, A·e]` to `[…, A, e]`, with the heads of `[…, A]`."""
    return tokens.unflatten(-1, (like.shape[-1], -1))


def _groups(made: tuple[Block, ...], num_heads: int) -> Iterator[list[Block]]:
    group, elements = [], 0
    for block in made:
        if group and elements + block.num_rows * num_heads > GROUP_ELEMENTS:
            yield group
            group, elements = [], 0
        group.append(block)
        elements += block.num_rows * num_heads
    if group:
        yield group


def _forward(
    tensors: tuple[Tensor, Tensor, Tensor],
    banks: tuple[Tensor | None, Tensor | None, Tensor | None],
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> tuple[Tensor, Tensor]:
    query, key, value = make_sides(tensors, banks, num_heads, layout)
    features = query.features
    softmax = OnlineSoftmax(tensors[0], num_heads, features)
    heads = Heads(num_heads, features, tensors[0])
    for queries, keys, row, reverse in class_blocks(layout):
        product = query.project_tokens(queries, reverse) * key.project_tokens(keys, row)
        scores = product.unflatten(-1, (num_heads, -1)).sum(-1, dtype=softmax.running_sum.dtype) * scale
        softmax.add(queries, scores, value.project_tokens(keys, row).to(scores.dtype))
    space, spare = (workspace(layout, query.batch, features, tensors[0]) for _ in range(2))
    for shift in layout.column_shifts():
        query.start_shift(shift)
        key.start_shift(shift)
        value.start_shift(shift, like=key)
        place = (layout, shift.queries)
        running_max, running_sum, output = (
            columns_of(part, *place) for part in (softmax.running_max, softmax.running_sum, softmax.output)
        )
        targets = output if heads.narrow else heads.apart(output)
        for group in _groups(blocks(shift, query.batch, features), num_heads):
            places = tuple(queries for block in group for queries in block.queries)
            sizes = [size for block in group for size in block.sizes]
            scores = running_max.new_empty(sum(sizes), num_heads)
            for block, out in zip(group, scores.split([block.num_rows for block in group]), strict=True):
                product = space[: block.num_rows]
                q = query.project(block, product.split(block.sizes))
                k_space = product if query.bank is None else spare[: block.num_rows]
                k = key.project(block, k_space.split(block.sizes))
                heads.inner_products(*((k, q) if query.bank is None else (q, k)), product, out)
            scores *= scale
            old, running_max_rows = running_max.clone(), at(running_max, places)
            maximum_each(running_max_rows, scores.split(sizes))
            decay = old.sub_(running_max).exp_()
            scores.sub_(torch.cat(running_max_rows)).exp_()
            add_each(at(running_sum.mul_(decay), places), scores.split(sizes))
            by_head(output, decay).mul_(decay.unsqueeze(-1))
            for block, weights in zip(group, scores.split([block.num_rows for block in group]), strict=True):
                projected = space[: block.num_rows]
                pieces = value.project(block, projected.split(block.sizes))
                weights = weights.to(projected.dtype)
                if heads.narrow:
                    weights = heads.spread(weights, spare[: block.num_rows])
                else:
                    pieces = [heads.apart(piece) for piece in pieces]
                    weights = heads.apart(weights)
                add_weighted_each(at(targets, block.queries), pieces, weights.split(block.sizes))
        for part, columns in (
            (softmax.running_max, running_max),
            (softmax.running_sum, running_sum),
            (softmax.output, output),
        ):
            put_columns(part, columns, *place)
    output, logsumexp = softmax.finish()
    return output.transpose(0, 1).to(tensors[2].dtype).contiguous(), logsumexp


def _backward(
    gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    banks: tuple[Tensor | None, Tensor | None, Tensor | None],
    num_heads: int,
    scale: float,
    layout: PairLayout,
    needed: tuple[bool, bool, bool],
) -> list[Tensor]:
    """Gradients of query, key, value and their banks; empty for what is not needed."""
    query, key, value = sides = make_sides(tensors, banks, num_heads, layout)
    features = query.features
    received = Side(tokens_first(gradient), None, layout, is_query=True)
    wide = logsumexp.dtype
    # What softmax subtracts: Σ_j p_ij <dout_i, v_ij>, which is <dout_i, out_i>.
    delta = (by_head(gradient, logsumexp).to(wide) * by_head(output, logsumexp)).sum(-1).transpose(0, 1).contiguous()
    heads = Heads(num_heads, features, tensors[0])
    wanted = [side for side, need in zip(sides, needed, strict=True) if need]
    for side in wanted:
        side.start_gradients()
    need_scores = needed[0] or needed[1]
    spaces = [workspace(layout, query.batch, features, tensors[0]) for _ in range(3)]
    for shift in layout.column_shifts():
        for side in (*sides, received):
            side.start_shift(shift, side in wanted, like=key if side is value else None)
        place = (layout, shift.queries)
        logsumexp_columns, delta_columns = (columns_of(part, *place) for part in (logsumexp, delta))
        for block in blocks(shift, query.batch, features):
            scores, weight_gradient = (logsumexp.new_empty(block.num_rows, num_heads) for _ in range(2))
            product, query_space, key_space = (space[: block.num_rows] for space in spaces)
            q = query.project(block, query_space.split(block.sizes))
            k = key.project(block, key_space.split(block.sizes))
            heads.inner_products(q, k, product, scores)
            weights = scores.mul_(scale).sub_(torch.cat(at(logsumexp_columns, block.queries))).exp_()
            pieces = product.split(block.sizes)
            if need_scores:
                projected = value.project(block, pieces)
                heads.inner_products(projected, received.rows(block), product, weight_gradient)
                weight_gradient.sub_(torch.cat(at(delta_columns, block.queries))).mul_(weights).mul_(scale)
            if needed[2]:
                heads.spread(weights.to(gradient.dtype), product)
                torch._foreach_mul_(pieces, received.rows(block))
                value.accumulate(block, pieces)
            if not need_scores:
                continue
            heads.spread(weight_gradient.to(tensors[0].dtype), product)
            weights = pieces
            if needed[0] and query.bank is None:
                add_weighted_each(query.gradient_rows(block), k, weights)
            if needed[1] and key.bank is None:
                add_weighted_each(key.gradient_rows(block), q, weights)
            # A projection is changed where it lies, plain inputs are not: the weights are, after their last use.
            banked = [(query, k, key), (key, q, query)]
            banked = [pair for pair, need in zip(banked, needed[:2], strict=True) if need and pair[0].bank is not None]
            for side, other, other_side in sorted(banked, key=lambda pair: pair[2].bank is None):
                changed, by = (weights, other) if other_side.bank is None else (other, weights)
                torch._foreach_mul_(changed, by)
                side.accumulate(block, changed)
        for side in wanted:
            side.end_shift()
    _add_class_gradients(sides, received, needed, logsumexp, delta, scale)
    token_gradients, bank_gradients = [], []
    for side, need in zip(sides, needed, strict=True):
        both = side.gradients() if need else (gradient.new_empty(0), gradient.new_empty(0))
        token_gradients.append(both[0])
        bank_gradients.append(both[1])
    return [*token_gradients, *bank_gradients]


def _add_class_gradients(
    sides: tuple[Side, Side, Side],
    received: Side,
    needed: tuple[bool, bool, bool],
    logsumexp: Tensor,
    delta: Tensor,
    scale: float,
) -> None:
    """Adds what the pairs of a class token contribute."""
    wide = logsumexp.dtype
    for queries, keys, row, reverse in class_blocks(received.layout):
        places = ((queries, reverse), (keys, row), (keys, row))
        projected = (side.project_tokens(*place) for side, place in zip(sides, places, strict=True))
        q, k, v, gradient = (by_head(part, logsumexp) for part in (*projected, received.tokens[queries]))
        weights = ((q * k).sum(-1, dtype=wide) * scale - logsumexp[queries]).exp()
        score_gradient = ((gradient * v).sum(-1, dtype=wide) - delta[queries]) * weights * scale
        score_gradient, weights = (part.unsqueeze(-1).to(q.dtype) for part in (score_gradient, weights))
        pieces = (score_gradient * k, score_gradient * q, weights * gradient)
        for side, (tokens, side_row), piece, need in zip(sides, places, pieces, needed, strict=True):
            if need:
                one = side.tokens[tokens].shape[0] < piece.shape[0]
                piece = piece.sum(0, keepdim=True) if one else piece
                side.accumulate_tokens(tokens, side_row, piece.flatten(-2))


NAMES = ("streamed_attention", "streamed_attention_backward")


def _register() -> None:
    @define(NAMES[0])
    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bank: Tensor | None,
        key_bank: Tensor | None,
        value_bank: Tensor | None,
        num_heads: int,
        scale: float,
        layout: list[int],
    ) -> tuple[Tensor, Tensor]:
        banks = (query_bank, key_bank, value_bank)
        return _forward((query, key, value), banks, num_heads, scale, unpack(layout))

    @operator.register_fake
    def _(query, key, value, query_bank, key_bank, value_bank, num_heads, scale, layout):
        features = query.shape[-1] if query_bank is None else query_bank.shape[-1]
        logsumexp = query.new_empty(query.shape[1], query.shape[0], num_heads, dtype=accumulation_dtype(query.dtype))
        return value.new_empty(*query.shape[:2], features), logsumexp

    @define(NAMES[1])
    def backward_operator(
        gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bank: Tensor | None,
        key_bank: Tensor | None,
        value_bank: Tensor | None,
        num_heads: int,
        scale: float,
        layout: list[int],
        need_query: bool,
        need_key: bool,
        need_value: bool,
    ) -> list[Tensor]:
        banks, needed = (query_bank, key_bank, value_bank), (need_query, need_key, need_value)
        tensors = (query, key, value)
        return _backward(gradient, output, logsumexp, tensors, banks, num_heads, scale, unpack(layout), needed)

    @backward_operator.register_fake
    def _(
        gradient, output, logsumexp, query, key, value, query_bank, key_bank, value_bank, num_heads, scale, layout,
        need_query, need_key, need_value,
    ):  # fmt: skip
        needed = (need_query, need_key, need_value) * 2
        tensors = (query, key, value, query_bank, key_bank, value_bank)
        return [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if need and tensor is not None
            else gradient.new_empty(0)
            for tensor, need in zip(tensors, needed, strict=True)
        ]

    def save(ctx, inputs, output):
        ctx.save_for_backward(*output, *inputs[:6])
        ctx.settings = inputs[6:]

    def differentiate(ctx, gradient, _):
        output, logsumexp, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needed = [wanted[side] or wanted[side + 3] for side in range(3)]
        gradients = backward_operator(gradient, output, logsumexp, *tensors, *ctx.settings, *needed)
        gradients = [part if want else None for part, want in zip(gradients, wanted, strict=False)]
        return *gradients, None, None, None

    operator.register_autograd(differentiate, setup_context=save)


_operator, _ = register_once(NAMES, _register)


def streamed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    value_bank: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> Tensor:
    """Attention over all pairs of a layout, without a mask: `[B, L, A·e]` of the values' dtype.

    Args:
        query, key, value: `[B, L, in]` token inputs of a bank, or plain projections `[B, L, A·e]` where it is `None`.
        query_bank, key_bank, value_bank: `[num_offsets, in, A·e]` or `None`. Keys and values may have fewer heads than
            queries: each serves as many queries' heads, one after the other, as the widths say.
        num_heads: `A`, of queries.
        scale: what scores are multiplied by before softmax.
        layout: the pairs; all tokens are queries.
    """
    return _operator(query, key, value, query_bank, key_bank, value_bank, num_heads, scale, pack(layout))[0]


__all__ = ["streamed_attention"]

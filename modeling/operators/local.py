"""Attention whose near pairs have projections of their own and whose far pairs share one per token: local Translution.

    out_i = (Σ_near exp(s_ij) v_ij + Σ_far exp(s_ij) v_j) / (Σ_near exp(s_ij) + Σ_far exp(s_ij))

Far pairs are one ordinary attention, see `fused_attention.py`. A near offset shifts the queries against the keys: its scores are
products of two slices, one number per token and head. The two are merged by their log-sum-exp. Nothing of size `[B, A, L, L]`
exists; what a pair needs is projected once per token and offset, since the tokens are the same for all queries.

Keys and values may have fewer heads, `A / groups`, as many as their features say: each serves `groups` heads of queries, one after the
other, and is not repeated for them.

Legend: `B` batch, `N` tokens of a grid (text: `L × 1`), `A` heads, `e` features per head, `T` near terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .far_blocks import FarBlock, far_blocks
from .fused_attention import attention, attention_backward
from .heads import groups_of, split_heads
from .pair_autograd import accumulation_dtype, pack, unpack
from .pair_layout import OffsetPairs, PairLayout
from .registration import define, register_once


def _by_head(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.unflatten(-1, (num_heads, -1))


def _inputs(far: Sequence[Tensor], block: FarBlock) -> tuple[tuple[Tensor, slice], ...]:
    """Queries, keys and values of a block, and where it has them."""
    key, value = far[1 + 2 * block.source : 3 + 2 * block.source]
    return (far[0], block.queries), (key, block.keys), (value, block.keys)


def _apart(heads: Tensor, rows: int) -> Tensor:
    """`[B, A, rows·n, e]` to `[B·rows, A, n, e]`."""
    return heads if rows == 1 else heads.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)


def _together(heads: Tensor, rows: int) -> Tensor:
    """The way back."""
    return heads if rows == 1 else heads.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2, 3)


def _merge(output: Tensor, logsumexp: Tensor, found: Tensor, other: Tensor, first: bool) -> None:
    """Merges attention to more keys, `[B, A, Q, e]` and `[B, A, Q]`, into `[B, Q, A·e]` and `[B, Q, A]`."""
    heads, other = _by_head(output, logsumexp.shape[-1]), other.transpose(1, 2)
    if first:
        heads.copy_(found.transpose(1, 2))
        logsumexp.copy_(other)
        return
    both = torch.logaddexp(logsumexp, other)
    heads.mul_((logsumexp - both).exp_().unsqueeze(-1))
    heads.addcmul_(found.transpose(1, 2).to(heads.dtype), (other - both).exp_().unsqueeze(-1))
    logsumexp.copy_(both)


def attend_far(far: Sequence[Tensor], block: FarBlock, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the queries of a block, `[B, A, queries, e]` and `[B, A, queries]`."""
    inputs = (_apart(part[:, :, place], block.rows) for part, place in _inputs(far, block))
    found, logsumexp = attention(*inputs, scale, block.causal, block.bias)
    return _together(found, block.rows), _together(logsumexp.unsqueeze(-1), block.rows).squeeze(-1)


def merge_far(
    output: Tensor, logsumexp: Tensor, far: Sequence[Tensor], far_bias: Tensor | None, scale: float, layout: PairLayout
) -> None:
    """Attention to all far pairs, merged into `[B, Q, A·e]` and `[B, Q, A]`, which begin as zeros and as the lowest number."""
    for block in far_blocks(far, far_bias, layout):
        _merge(
            output[:, block.queries], logsumexp[:, block.queries], *attend_far(far, block, scale), first=len(far) == 3
        )


def far_gradients(
    gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    far: Sequence[Tensor],
    far_bias: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> list[Tensor]:
    """Gradients of the far tensors, from the output and the log-sum-exp of all pairs."""
    gradients = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in far]
    received, whole = (split_heads(part, num_heads) for part in (gradient, output))
    for block in far_blocks(far, far_bias, layout) if far else ():
        given, found, sums = (
            _apart(part[:, :, block.queries], block.rows)
            for part in (received, whole, logsumexp.transpose(1, 2).unsqueeze(-1))
        )
        inputs = (_apart(part[:, :, place], block.rows) for part, place in _inputs(far, block))
        pieces = attention_backward(given, *inputs, found, sums.squeeze(-1), scale, block.causal, block.bias)
        for (target, place), piece in zip(_inputs(gradients, block), pieces, strict=True):
            target[:, :, place] += _together(piece, block.rows)
    return gradients


def near_terms(layout: PairLayout, count: int) -> tuple[OffsetPairs, ...]:
    """The near offsets, and once more all queries, where there is a term for a key of no place in the grid."""
    offsets = layout.near_offsets()
    everything = (slice(0, layout.height - layout.past), slice(0, layout.width))
    return (*offsets, *[OffsetPairs(0, 0, 0, 0, everything, everything)] * (count - len(offsets)))


class _Grid:
    """Slices of a term's tokens: those of all queries or keys that have a partner at its offset."""

    def __init__(self, layout: PairLayout):
        self.width = layout.width

    def of(self, tokens: Tensor, place: tuple[slice, slice]) -> Tensor:
        """`[B, N, …]` to `[B, rows, columns, …]`; one token for all, `[B, 1, …]`, stays one."""
        if tokens.shape[1] == 1:
            return tokens.unsqueeze(1)
        return tokens.unflatten(1, (-1, self.width))[:, place[0], place[1]]


class _Heads:
    """Features as heads that broadcast against each other.

    Queries and keys are both `[…, A, e]`, or where `groups` heads of queries share one of keys `[…, A / groups, groups, e]` and
    `[…, A / groups, 1, e]`.
    """

    def __init__(self, num_heads: int, groups: int):
        self.num_heads, self.groups = num_heads, groups
        self.query_axes = (num_heads,) if groups == 1 else (num_heads // groups, groups)
        self.key_axes = (num_heads,) if groups == 1 else (num_heads // groups, 1)

    def queries(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (*self.query_axes, -1))

    def keys(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (*self.key_axes, -1))

    def numbers(self, numbers: Tensor) -> Tensor:
        """One number for each head of queries, `[…, A]`."""
        numbers = numbers if self.groups == 1 else numbers.unflatten(-1, self.query_axes)
        return numbers.unsqueeze(-1)

    def inner(self, space: _Space, queries: Tensor, keys: Tensor) -> Tensor:
        """Inner products of each head of queries, `[…, A]`, from features side by side."""
        if self.groups == 1:
            return _by_head(space.product(queries, keys), self.num_heads).sum(-1, dtype=space.dtype)
        return space.product(self.queries(queries), self.keys(keys)).sum(-1, dtype=space.dtype).flatten(-2)


class _Space:
    """Memory for the products of one term, taken once; in a type that sums over a head can be made of."""

    def __init__(self, like: Tensor, queries: int, features: int):
        self.dtype = accumulation_dtype(like.dtype)
        self.memory = like.new_empty(like.shape[0] * queries * features, dtype=self.dtype)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(left.shape, right.shape)
        out = self.memory[: shape.numel()].view(shape)
        if left.dtype == out.dtype:
            return torch.mul(left, right, out=out)
        return out.copy_(left).mul_(right)


def of_term(parts: Sequence[Tensor], index: int, terms: int) -> Tensor:
    """The part of a term: fewer parts than terms begin with one that serves all near offsets."""
    return parts[max(index - (terms - len(parts)), 0)]


def _forward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    far: Sequence[Tensor],
    near_bias: Tensor | None,
    far_bias: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    like, terms = queries[0], max(len(keys), len(values), len(queries))
    grid, wide = _Grid(layout), accumulation_dtype(queries[0].dtype)
    heads = _Heads(num_heads, groups_of(like, keys[0]))
    batch, count, features = like.shape[0], layout.num_queries, heads.groups * values[0].shape[-1]
    space = _Space(like, count, max(like.shape[-1], features))
    offsets = near_terms(layout, terms)
    lowest = torch.finfo(wide).min
    # One row more for the far pairs, as if they were one key.
    scores = like.new_full((terms + 1, batch, count, num_heads), lowest, dtype=wide)
    for index, offset in enumerate(offsets):
        q, k = (
            grid.of(of_term(queries, index, terms), offset.queries),
            grid.of(of_term(keys, index, terms), offset.keys),
        )
        grid.of(scores[index], offset.queries).copy_(heads.inner(space, q, k))
    near_scores = scores[:-1].mul_(scale)
    if near_bias is not None:
        near_scores += near_bias
    output = like.new_zeros(batch, count, features, dtype=wide)
    if far:
        merge_far(output, scores[-1], far, far_bias, scale, layout)
    logsumexp = scores.logsumexp(0)
    weights = scores.sub_(logsumexp).exp_()
    _by_head(output, num_heads).mul_(weights[-1].unsqueeze(-1))
    for index, offset in enumerate(offsets):
        target = heads.queries(grid.of(output, offset.queries))
        given = heads.keys(grid.of(of_term(values, index, terms), offset.keys))
        target.addcmul_(heads.numbers(grid.of(weights[index], offset.queries)), given.to(wide))
    return output.to(values[0].dtype), logsumexp, weights[:-1]


def _backward(
    gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    weights: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    far: Sequence[Tensor],
    far_bias: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> list[list[Tensor]]:
    """Gradients of queries, keys, values and the far three."""
    grid, wide, terms = _Grid(layout), logsumexp.dtype, len(weights)
    gradient = gradient.contiguous()
    heads = _Heads(num_heads, groups_of(queries[0], keys[0]))
    space = _Space(queries[0], layout.num_queries, max(queries[0].shape[-1], gradient.shape[-1]))
    # What softmax subtracts: Σ_j p_ij <dout_i, v_ij>, which is <dout_i, out_i>.
    delta = _by_head(space.product(gradient, output), num_heads).sum(-1, dtype=wide)
    # A gradient that several terms share is added up in a wider type.
    gradients = [
        [torch.zeros_like(part, dtype=part.dtype if len(parts) > 1 else wide) for part in parts]
        for parts in (queries, keys, values)
    ]

    def give(
        parts: list[Tensor],
        index: int,
        place: tuple[slice, slice],
        factor: Tensor,
        other: Tensor,
        to_keys: bool = True,
    ) -> None:
        target = of_term(parts, index, terms)
        adds_up = to_keys and heads.groups > 1
        if target.shape[1] == 1 and layout.num_queries > 1:
            target += (factor * other).sum((1, 2, 4) if adds_up else (1, 2), dtype=wide).flatten(1).unsqueeze(1)
        elif adds_up:
            heads.keys(grid.of(target, place)).add_(space.product(factor, other).sum(-2, keepdim=True))
        else:
            heads.queries(grid.of(target, place)).addcmul_(factor, other)

    for index, offset in enumerate(near_terms(layout, terms)):
        q, k, v = (
            grid.of(of_term(parts, index, terms), place)
            for parts, place in ((queries, offset.queries), (keys, offset.keys), (values, offset.keys))
        )
        received = grid.of(gradient, offset.queries)
        weight = grid.of(weights[index], offset.queries)
        score_gradient = heads.inner(space, received, v)
        score_gradient.sub_(grid.of(delta, offset.queries)).mul_(weight).mul_(scale)
        weight, score_gradient = (heads.numbers(part).to(gradient.dtype) for part in (weight, score_gradient))
        q, k, received = heads.queries(q), heads.keys(k), heads.queries(received)
        give(gradients[0], index, offset.queries, score_gradient, k, to_keys=False)
        give(gradients[1], index, offset.keys, score_gradient, q)
        give(gradients[2], index, offset.keys, weight, received)
    gradients = [
        [part.to(like.dtype) for part, like in zip(parts, given, strict=True)]
        for parts, given in zip(gradients, (queries, keys, values), strict=True)
    ]
    return [*gradients, far_gradients(gradient, output, logsumexp, far, far_bias, num_heads, scale, layout)]


def register_local_operators(
    prefix: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., list[list[Tensor]]],
) -> Callable[..., Tensor]:
    """Registers `{prefix}local_attention` and `…_backward` with PyTorch, see `registration.py`.

    Args:
        prefix: of the operators' names.
        forward: `(queries, keys, values, far, near_bias, far_bias, num_heads, scale, layout)` to the output, `[B, Q, A·v]`, the
            log-sum-exp of all scores, `[B, Q, A]`, and what `backward` wants to know of near pairs, `[T, B, Q, A]`, both float64
            for float64 inputs and float32 otherwise.
        backward: `(gradient, output, logsumexp, near, queries, keys, values, far, far_bias, num_heads, scale, layout)` to the
            gradients of queries, keys, values and the far tensors.

    Returns:
        `local_attention`, with these operators.
    """
    names = (f"{prefix}local_attention", f"{prefix}local_attention_backward")
    operator, _ = register_once(names, lambda: _register(names, forward, backward))

    def local_attention(
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        far: Sequence[Tensor] | None,
        num_heads: int,
        scale: float,
        layout: PairLayout,
        near_bias: Tensor | None = None,
        far_bias: Tensor | None = None,
    ) -> Tensor:
        """Attention over near and far pairs, `[B, Q, A·v]` of the values' dtype.

        Args:
            queries, keys, values: `[B, Q, A·e]`, `[B, N, A / groups · e]` and `[B, N, A / groups · v]` each: what they bring to the
                pairs of each near offset, in the order of `layout.near_offsets()`, or one tensor for all. A last one may follow that is
                of one more key, which all queries see: a class token, `[B, 1, …]`, or `[B, Q, A·e]` where each query sees it
                differently.
            far: queries, keys and values of the far pairs, `[B, A, Q, e]`, `[B, A / groups, L, e]`, `[B, A / groups, L, v]`; `None`
                where there are none. Of images with clamped offsets, queries and then keys and values for each of the `2D + 1` clamped
                row offsets from −D to D, `[B, A / groups, N·(2D + 1), e]`, those of the clamped column offsets of a token one after
                the other.
            num_heads: `A`, of queries.
            scale: what scores are multiplied by before softmax.
            layout: the near pairs, without a class token.
            near_bias: `[T, B or 1, Q, A or 1]`, added to the scores of near pairs; finite.
            far_bias: `[B or 1, A or 1, Q, L]`, the same of far pairs.
        """
        queries, keys, values = list(queries), list(keys), list(values)
        return operator(queries, keys, values, list(far or ()), near_bias, far_bias, num_heads, scale, pack(layout))[0]

    return local_attention


def _register(
    names: tuple[str, str],
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., list[list[Tensor]]],
) -> None:
    @define(names[0])
    def attend(
        queries: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        far: list[Tensor],
        near_bias: Tensor | None,
        far_bias: Tensor | None,
        num_heads: int,
        scale: float,
        layout: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(queries, keys, values, far, near_bias, far_bias, num_heads, scale, unpack(layout))

    @attend.register_fake
    def _(queries, keys, values, far, near_bias, far_bias, num_heads, scale, layout):
        batch, count = queries[0].shape[0], unpack(layout).num_queries
        wide = accumulation_dtype(queries[0].dtype)
        terms = max(len(queries), len(keys), len(values))
        return (
            queries[0].new_empty(batch, count, groups_of(queries[0], keys[0]) * values[0].shape[-1]),
            queries[0].new_empty(batch, count, num_heads, dtype=wide),
            queries[0].new_empty(terms, batch, count, num_heads, dtype=wide),
        )

    @define(names[1])
    def attend_backward(
        gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        near: Tensor,
        queries: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        far: list[Tensor],
        far_bias: Tensor | None,
        num_heads: int,
        scale: float,
        layout: list[int],
    ) -> list[Tensor]:
        gradients = backward(
            gradient, output, logsumexp, near, queries, keys, values, far, far_bias, num_heads, scale,
            unpack(layout),
        )  # fmt: skip
        return [part for parts in gradients for part in parts]

    @attend_backward.register_fake
    def _(gradient, output, logsumexp, near, queries, keys, values, far, far_bias, num_heads, scale, layout):
        parts = (*queries, *keys, *values, *far)
        return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]

    def save(ctx, inputs, output):
        queries, keys, values, far, _near_bias, far_bias, *ctx.settings = inputs
        ctx.counts = [len(parts) for parts in (queries, keys, values, far)]
        ctx.save_for_backward(*output, *queries, *keys, *values, *far, far_bias)

    def differentiate(ctx, gradient, _, __):
        output, logsumexp, near, *parts, far_bias = ctx.saved_tensors
        lists = _split(parts, ctx.counts)
        gradients = attend_backward(gradient, output, logsumexp, near, *lists, far_bias, *ctx.settings)
        return *_split(gradients, ctx.counts), None, None, None, None, None

    attend.register_autograd(differentiate, setup_context=save)


def _split(parts: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    lists, start = [], 0
    for count in counts:
        lists.append(list(parts[start : start + count]))
        start += count
    return lists


# Looked up at each call, as a test may watch them.
local_attention = register_local_operators("", lambda *inputs: _forward(*inputs), lambda *inputs: _backward(*inputs))


__all__ = [
    "attend_far",
    "far_gradients",
    "local_attention",
    "merge_far",
    "near_terms",
    "of_term",
    "register_local_operators",
]

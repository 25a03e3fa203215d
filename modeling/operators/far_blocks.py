"""The far pairs of `local.py`, in blocks that one ordinary attention serves each.

Text without a mask is a causal square of shifted tokens. Otherwise a bias hides what is near, for some queries at a time.

Images with clamped offsets have far pairs of several kinds: by which side of the query's row, and of its column, a key lies on.
Several rows of queries are one attention to rows that lie on one side of all of them, whose tokens are keys once for each kind of
column, all but one hidden: such squares of rows, each half as large as the one before, are all pairs.

Legend: `B` batch, `A` heads, `Q` queries, `L` keys, `N` patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pair_layout import PairLayout


# Elements of a bias that hides near pairs from the attention to far ones, made for some queries at a time.
BIAS_ELEMENTS = 1 << 22


class FarBlock(NamedTuple):
    """Far pairs that one attention serves: of which source, queries, keys, whether causal, and the bias of what is hidden.

    Of several `rows`, queries and keys are so many parts of one size, and each part of the queries attends to its own keys.
    """

    source: int
    queries: slice
    keys: slice
    causal: bool = False
    bias: Tensor | None = None
    rows: int = 1


def far_blocks(far: Sequence[Tensor], bias: Tensor | None, layout: PairLayout) -> Iterator[FarBlock]:
    query, key = far[:2]
    if not layout.causal and not layout.share_far:
        yield from _clamped_blocks(query, bias, layout)
        return
    queries, keys, distance = query.shape[2], key.shape[2], layout.max_row_distance
    if layout.causal and bias is None and queries == keys:
        # A causal square: queries from the distance on, and the keys that many tokens before.
        yield FarBlock(0, slice(distance, None), slice(0, keys - distance), True)
        return
    per_query = keys if bias is None else keys * bias.shape[0] * bias.shape[1]
    size = max(BIAS_ELEMENTS // max(per_query, 1), 1)
    j = torch.arange(keys, device=query.device)
    for start in range(0, queries, size):
        part = slice(start, min(start + size, queries))
        i = torch.arange(part.start, part.stop, device=query.device)[:, None]
        if layout.causal:
            near = i + (keys - queries) - j < distance
        else:
            near = (i // layout.width - j // layout.width).abs() <= distance
            near = near & ((i % layout.width - j % layout.width).abs() <= distance)
        yield FarBlock(0, part, slice(0, keys), False, _hide(near, bias if bias is None else bias[:, :, part], query))


def _clamped_blocks(query: Tensor, bias: Tensor | None, layout: PairLayout) -> Iterator[FarBlock]:
    """One source for each clamped row offset; a token of it is a key for each clamped column offset, one after the other."""
    height, width, distance = layout.height, layout.width, layout.max_row_distance
    kinds = 2 * distance + 1
    if distance == 0:
        # All pairs of patches share one matrix.
        everything = slice(0, height * width)
        yield FarBlock(0, everything, everything, False, bias if bias is None else bias.to(query.dtype))
        return
    column = torch.arange(width, device=query.device)
    between = (column[:, None] - column).clamp(-distance, distance) + distance
    other = between[:, None, :, None] != torch.arange(kinds, device=query.device)

    def block(source: int, row: int, key_row: int, rows: int, key_rows: int, apart: bool = False) -> FarBlock:
        queries = slice(row * width, (row + rows) * width)
        keys = slice(key_row * width, (key_row + key_rows) * width)
        added = None if bias is None else bias[:, :, queries, keys].repeat_interleave(kinds, dim=-1)
        size = (1, 1) if apart else (rows, key_rows)
        hidden = other.expand(-1, size[1], -1, -1).flatten(1).repeat(size[0], 1)
        keys = slice(keys.start * kinds, keys.stop * kinds)
        return FarBlock(source, queries, keys, False, _hide(hidden, added, query), rows if apart else 1)

    for source in range(kinds):
        step = source - distance
        first, key_first, count = max(step, 0), max(-step, 0), height - abs(step)
        if count > 0 and bias is None:
            yield block(source, first, key_first, count, count, apart=True)
        elif count > 0:
            yield from (block(source, first + row, key_first + row, 1, 1) for row in range(count))
        if abs(step) == distance:
            for (row, rows), (key_row, key_rows) in _beyond(0, count, step):
                yield block(source, first + row, key_first + key_row, rows, key_rows)


def _beyond(start: int, count: int, step: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows of queries and of keys, start and number, that together are all pairs whose keys come earlier, or later if `step` is
    negative: squares of half the rows, then of a quarter, and so on.
    """
    if count < 2:
        return
    half = count // 2
    lower, upper = (start, half), (start + half, count - half)
    yield (upper, lower) if step > 0 else (lower, upper)
    yield from _beyond(*lower, step)
    yield from _beyond(*upper, step)


def _hide(hidden: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """`[B or 1, A or 1, Q, L]`, the lowest number where a pair is hidden."""
    bias = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device) if bias is None else bias.to(like.dtype)
    return bias.expand(-1, -1, *hidden.shape).masked_fill(hidden, torch.finfo(like.dtype).min)


__all__ = ["FarBlock", "far_blocks"]

"""Pairs of an image whose column distance is clamped: PyTorch's own attention for all of a row offset at once.

With a distance `D`, a query at column `y` and a key at `y' ≤ y - D` use the same matrix, whatever `y - y'`. So each
token needs one projection per row offset, and these pairs are causal attention from columns `y ≥ D` to columns `≤ y − D`; for keys
on the other side the columns are reversed. The results are merged into the running softmax of `streamed.py`.

Legend: `B` batch, `L` tokens, `A` heads, `e` size per head, `w` columns of the grid less `D`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from .fused_attention import attention, attention_backward, has_fused
from .online_softmax import OnlineSoftmax, merge
from .pair_layout import ColumnShift, OffsetRun, PairLayout
from .runs import SharedMatrix, Side, grid, shared_matrices


def has_far_columns(layout: PairLayout, like: Tensor) -> bool:
    """Whether several column offsets to one side share matrices, and PyTorch's attention can serve them for tensors `like` these."""
    several = 0 < layout.max_column_distance < layout.width - 1
    return (
        layout.clamp and not layout.causal and not layout.share_far and several and has_fused(like.device, like.dtype)
    )


def near_shifts(layout: PairLayout, like: Tensor) -> tuple[ColumnShift, ...]:
    """The column offsets that are left to the pass over runs."""
    if not has_far_columns(layout, like):
        return layout.column_shifts()
    return tuple(shift for shift in layout.column_shifts() if abs(shift.offset) < layout.max_column_distance)


def _far(layout: PairLayout) -> Iterator[tuple[SharedMatrix, list[OffsetRun], bool]]:
    """Each matrix of far columns, the row offsets it serves, and whether columns are to be taken in reverse."""
    shared = shared_matrices(layout)
    for shift in layout.column_shifts():
        if abs(shift.offset) == layout.max_column_distance:
            for row, runs in groupby(shift.runs, lambda run: run.row):
                yield shared[row], list(runs), shift.offset < 0


def _arranged(rectangle: Tensor, num_heads: int, reverse: bool) -> Tensor:
    """`[rows, w, B, A·e]` to `[rows, B, A, w, e]`."""
    arranged = rectangle.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1, 4)
    return arranged.flip(3) if reverse else arranged.contiguous()


def _back(arranged: Tensor, reverse: bool) -> Tensor:
    """`[rows, B, A, w, e]` to `[rows, w, B, A·e]`."""
    return (arranged.flip(3) if reverse else arranged).permute(0, 3, 1, 2, 4).flatten(3)


def _rows(run: OffsetRun, shared: SharedMatrix) -> tuple[slice, slice]:
    """Where the queries and the keys of a run lie among those of its matrix."""
    query = run.query_start - shared.queries[0].start
    key = run.key_start - shared.keys[0].start
    return slice(query, query + run.num_rows), slice(key, key + run.num_rows)


def add_far_columns(sides: tuple[Side, Side, Side], softmax: OnlineSoftmax, scale: float, layout: PairLayout) -> None:
    """Adds the far pairs, which there must be, to the softmax of each query."""
    num_heads = softmax.running_sum.shape[-1]
    for shared, runs, reverse in _far(layout):
        query, key, value = (_arranged(side.project_shared(shared), num_heads, reverse) for side in sides)
        for run in runs:
            queries, keys = _rows(run, shared)
            inputs = (query[queries], key[keys], value[keys])
            found, logsumexp = attention(*(part.flatten(0, 1) for part in inputs), scale, causal=True)
            found = _back(found.unflatten(0, (run.num_rows, -1)), reverse)
            logsumexp = _back(logsumexp.unflatten(0, (run.num_rows, -1)).unsqueeze(-1), reverse)
            rows = slice(run.query_start, run.query_start + run.num_rows)
            parts = (softmax.running_max, softmax.running_sum, softmax.output)
            merge(tuple(grid(part, layout)[rows, shared.queries[1]] for part in parts), logsumexp, found)


def accumulate_far_columns(
    sides: tuple[Side, Side, Side],
    needed: tuple[bool, bool, bool],
    received: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    layout: PairLayout,
) -> None:
    """Adds the gradients of the far pairs, which there must be, to those of each side.

    Args:
        received: gradient of the output, `[L, B, A·e]`.
        output: of all pairs, `[L, B, A·e]`.
        logsumexp: of all pairs, `[L, B, A]`.
    """
    num_heads = logsumexp.shape[-1]
    for shared, runs, reverse in _far(layout):
        tensors = [_arranged(side.project_shared(shared), num_heads, reverse) for side in sides]
        given, whole = (
            _arranged(grid(part, layout)[shared.queries], num_heads, reverse) for part in (received, output)
        )
        own_logsumexp = _arranged(grid(logsumexp, layout)[shared.queries], num_heads, reverse).squeeze(-1)
        gradients = [torch.zeros_like(part, dtype=logsumexp.dtype) for part in tensors]
        for run in runs:
            places = _rows(run, shared)
            places = (places[0], places[1], places[1])
            inputs = [part[place].flatten(0, 1) for part, place in zip(tensors, places, strict=True)]
            # With the output and the log-sum-exp of all pairs, this is the share of these.
            pieces = attention_backward(
                given[places[0]].flatten(0, 1),
                *inputs,
                whole[places[0]].flatten(0, 1),
                own_logsumexp[places[0]].flatten(0, 1),
                scale,
                causal=True,
            )
            for gradient, place, piece in zip(gradients, places, pieces, strict=True):
                part = gradient[place]
                part += piece.view(part.shape)
        for side, need, gradient in zip(sides, needed, gradients, strict=True):
            if need:
                side.accumulate_shared(shared, _back(gradient, reverse))


__all__ = [
    "accumulate_far_columns",
    "add_far_columns",
    "has_far_columns",
    "near_shifts",
]

"""Pairs of an image whose matrices are small, such as LoR's: one product for all row offsets of a column offset.

A product of few pairs with a matrix of 24 × 24 is done sooner than it is started, and a second thread cannot help. So here every
token of a column is projected by the matrices of all row offsets at once, twice as many as it has pairs, and the pairs are a
strided view of the result: the projection for receiving row `x` and giving row `x'` lies at `x - x'`. Batch comes first here.
The functions have the signatures of `translution_grouped.py`, where the choice is made.

Legend: `B` batch, `H` rows of the grid, `w` columns of a shift, `K = 2H - 1` row offsets, `A` heads, `F = A·e` features, `L` tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .class_pairs import add_class_gradients, add_class_values, write_class_scores
from .pair_autograd import accumulation_dtype
from .pair_layout import ColumnShift, PairLayout
from .pair_runs import Heads


# Wider matrices, or larger batches, keep the threads busy with the products of the pairs alone, half as many. One thread does
# those sooner in any case.
WIDEST, MOST_ELEMENTS, LEAST_THREADS = 32, 1 << 21, 2


def is_narrow(layout: PairLayout, batch: int, *banks: Tensor | None) -> bool:
    """Whether all row offsets at once pay; `batch` is `B`."""
    if layout.causal or torch.get_num_threads() < LEAST_THREADS:
        return False
    widest = max((max(bank.shape[1:]) for bank in banks if bank is not None), default=0)
    elements = batch * layout.height * layout.width * (2 * layout.height - 1) * widest
    return widest <= WIDEST and 0 < elements <= MOST_ELEMENTS


# See `pair_layout.py`: arrays are kept, and no tensors.
@lru_cache(maxsize=64)
def _order(layout: PairLayout) -> tuple[np.ndarray, np.ndarray]:
    """Places of pairs in the order of this file, as `PairLayout.pair_order`; a class token's are at some place or other."""
    first, width, tokens = int(layout.class_token), layout.width, layout.num_tokens
    row = np.arange(layout.height)
    pieces = []
    for shift in layout.column_shifts():
        column = np.arange(shift.num_columns)
        receiver = first + row * width + column[:, None] + shift.receiver_start  # [w, x]
        giver = first + row[:, None, None] * width + column[:, None] + shift.giver_start  # [x', w, 1]
        pieces.append((receiver * tokens + giver).ravel())
    order = np.concatenate(pieces).astype(np.int64)
    position = np.zeros(tokens * tokens, dtype=np.int64)
    position[order] = np.arange(order.size)
    return order, position


@lru_cache(maxsize=1024)
def _bank_rows(layout: PairLayout, column_offset: int, receives: bool) -> np.ndarray:
    """Rows of a bank in the order in which `_Side` keeps projections: as the other row grows."""
    offsets = range(1 - layout.height, layout.height)
    if receives:
        rows = [layout.row(offset, -column_offset) for offset in offsets]
    else:
        rows = [layout.row(offset, column_offset) for offset in offsets]
    return np.array(rows, dtype=np.int64)


class _Side:
    """One side of the pairs of a shift at a time."""

    def __init__(self, tokens: Tensor, bank: Tensor | None, layout: PairLayout, receives: bool):
        self.tokens = tokens[:, int(layout.class_token) :].unflatten(1, (layout.height, layout.width))  # [B, H, W, in]
        self.bank, self.layout, self.receives = bank, layout, receives

    def start(self, shift: ColumnShift) -> None:
        start = shift.receiver_start if self.receives else shift.giver_start
        self.place = slice(start, start + shift.num_columns)
        self.columns = self.tokens[:, :, self.place].contiguous()
        if self.bank is not None:
            rows = _bank_rows(self.layout, shift.offset, self.receives)
            self.rows = torch.from_numpy(rows).to(self.bank.device)
            matrices = self.bank.index_select(0, self.rows)  # [K, in, F]
            self.matrix = matrices.transpose(0, 1).flatten(1)  # [in, K·F]

    def pairs(self, space: Tensor | None) -> Tensor:
        """Projections for each pair, `[B, x', w, x, F]`, as a view: of the plain tokens, or of `space`."""
        if self.bank is None:
            return self.columns.transpose(1, 2).unsqueeze(1) if self.receives else self.columns.unsqueeze(3)
        return self._view(torch.mm(self.columns.flatten(0, 2), self.matrix, out=self._room(space)))

    def _room(self, space: Tensor) -> Tensor:
        rows = math.prod(self.columns.shape[:3])
        return space[: rows * self.matrix.shape[1]].view(rows, -1)

    def _view(self, projected: Tensor) -> Tensor:
        batch, height, columns, _ = self.columns.shape
        every = projected.shape[1]  # K·F
        features = every // len(self.rows)
        row, step = columns * every - features, features
        by_giver, by_receiver = (step, row) if self.receives else (row, step)
        size = (batch, height, columns, height, features)
        strides = (height * columns * every, by_giver, every, by_receiver, 1)
        return projected.as_strided(size, strides, projected.storage_offset() + (height - 1) * features)

    def start_gradients(self, tokens: Tensor) -> None:
        wide = accumulation_dtype(tokens.dtype)
        self.token_gradient = torch.zeros_like(tokens, dtype=wide, memory_format=torch.contiguous_format)
        first = int(self.layout.class_token)
        self.grid_gradient = self.token_gradient[:, first:].unflatten(1, self.tokens.shape[1:3])
        self.bank_gradient = None
        if self.bank is not None:
            self.bank_gradient = torch.zeros_like(self.bank, dtype=wide, memory_format=torch.contiguous_format)

    def accumulate(self, gradient: Tensor, space: Tensor) -> None:
        """Adds the gradient of the projections of each pair, `[B, x', w, x, F]`."""
        target = self.grid_gradient[:, :, self.place]
        if self.bank is None:
            wide = target.dtype
            target += gradient.sum(1, dtype=wide).transpose(1, 2) if self.receives else gradient.sum(3, dtype=wide)
            return
        # Projections that no pair has get none.
        every = self._room(space).zero_()
        self._view(every).copy_(gradient)
        target += (every @ self.matrix.t()).view(target.shape)
        matrices = (self.columns.flatten(0, 2).t() @ every).unflatten(1, (len(self.rows), -1)).transpose(0, 1)
        self.bank_gradient.index_add_(0, self.rows, matrices.to(self.bank_gradient.dtype))


def _space(layout: PairLayout, batch: int, features: int, copies: int, like: Tensor) -> Tensor:
    """Room for `copies` features of each pair of the widest shift's tokens and row offsets."""
    return like.new_empty(batch * layout.height * layout.width * copies * features)


def _chosen(pairs: Tensor, layout: PairLayout) -> Tensor:
    """`[B, A, L, L]` to `[B, pairs, A]` in the order of this file."""
    order, _ = _order(layout)
    chosen = pairs.flatten(2).flatten(0, 1).index_select(1, torch.from_numpy(order).to(pairs.device))
    return chosen.unflatten(0, pairs.shape[:2]).transpose(1, 2).contiguous()


def _parts(layout: PairLayout) -> list[tuple[ColumnShift, slice]]:
    """Each shift, and where its pairs are."""
    parts, place = [], 0
    for shift in layout.column_shifts():
        end = place + layout.height**2 * shift.num_columns
        parts.append((shift, slice(place, end)))
        place = end
    return parts


def scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    """`[B, A, L, L]`, see `translution_reference.pair_scores`."""
    batch, tokens = query.shape[0], layout.num_tokens
    features = query.shape[-1] if query_bank is None else query_bank.shape[-1]
    heads = Heads(num_heads, features, query)
    receiver, giver = _Side(query, query_bank, layout, True), _Side(key, key_bank, layout, False)
    parts, wide = _parts(layout), accumulation_dtype(query.dtype)
    space = _space(layout, batch, features, layout.height, query)
    spaces = [_space(layout, batch, features, 2 * layout.height - 1, query) for _ in range(2)]
    found = query.new_empty(batch, parts[-1][1].stop, num_heads, dtype=wide)
    for shift, place in parts:
        receiver.start(shift)
        giver.start(shift)
        product = space[: batch * (place.stop - place.start) * features].view(
            batch, layout.height, shift.num_columns, layout.height, features
        )
        torch.mul(receiver.pairs(spaces[0]), giver.pairs(spaces[1]), out=product)
        sums = query.new_empty(batch * (place.stop - place.start), num_heads, dtype=wide)
        heads.sum(product.view(-1, features), sums)
        found[:, place] = sums.view(batch, -1, num_heads)
    _, position = _order(layout)
    square = found.transpose(1, 2).flatten(0, 1).index_select(1, torch.from_numpy(position).to(found.device))
    square = square.view(batch, num_heads, tokens, tokens)
    if layout.class_token:
        write_class_scores(square, query, key, query_bank, key_bank, layout)
    return square


def values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout) -> Tensor:
    """`[B, L, F]`, see `translution_reference.pair_values`."""
    batch, num_heads = probabilities.shape[:2]
    features = value_bank.shape[-1]
    heads = Heads(num_heads, features, value)
    giver = _Side(value, value_bank, layout, False)
    wide = accumulation_dtype(value.dtype)
    weights = _chosen(probabilities.to(value.dtype), layout)
    space = _space(layout, batch, features, layout.height, value)
    projections = _space(layout, batch, features, 2 * layout.height - 1, value)
    output = value.new_zeros(batch, layout.num_tokens, features, dtype=wide)
    grid = output[:, int(layout.class_token) :].unflatten(1, (layout.height, layout.width))
    for shift, place in _parts(layout):
        giver.start(shift)
        spread = _spread(heads, weights[:, place], space, layout.height)
        given = spread.mul_(giver.pairs(projections)).sum(1, dtype=wide)
        columns = slice(shift.receiver_start, shift.receiver_start + shift.num_columns)
        grid[:, :, columns] += given.transpose(1, 2)
    if layout.class_token:
        add_class_values(output, probabilities, value, value_bank, layout)
    return output.to(value.dtype)


def _spread(heads: Heads, weights: Tensor, space: Tensor, height: int) -> Tensor:
    """Weights `[B, pairs, A]` of a shift for every feature, `[B, x', w, x, F]`, in `space`."""
    rows = weights.shape[0] * weights.shape[1]
    features = heads.num_heads * heads.size
    spread = heads.spread(weights.reshape(rows, -1), space[: rows * features].view(rows, features))
    return spread.view(weights.shape[0], height, -1, height, features)


def scores_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    layout: PairLayout,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pair_autograd.register_pair_operators`."""
    batch, num_heads = gradient.shape[:2]
    features = query.shape[-1] if query_bank is None else query_bank.shape[-1]
    heads = Heads(num_heads, features, query)
    receiver, giver = _Side(query, query_bank, layout, True), _Side(key, key_bank, layout, False)
    sides = [(receiver, giver, query)] if need_query else []
    sides += [(giver, receiver, key)] if need_key else []
    for side, _, tokens in sides:
        side.start_gradients(tokens)
    weights = _chosen(gradient.to(query.dtype), layout)
    spaces = [_space(layout, batch, features, layout.height, query) for _ in range(2)]
    projections = [_space(layout, batch, features, 2 * layout.height - 1, query) for _ in range(2)]
    for shift, place in _parts(layout):
        receiver.start(shift)
        giver.start(shift)
        spread = _spread(heads, weights[:, place], spaces[0], layout.height)
        for side, other, _ in sides:
            product = spaces[1][: spread.numel()].view(spread.shape)
            torch.mul(other.pairs(projections[0]), spread, out=product)
            side.accumulate(product, projections[1])
    found: list[Tensor | None] = []
    for side, need in ((receiver, need_query), (giver, need_key)):
        found += [side.token_gradient, side.bank_gradient] if need else [None, None]
    if layout.class_token:
        add_class_gradients(found, gradient, query, key, query_bank, key_bank, layout)
    # Outputs of an operator must not share memory: a gradient nobody asked for is an empty tensor of its own.
    return tuple(query.new_empty(0) if part is None else part.to(query.dtype) for part in found)


__all__ = ["is_narrow", "scores", "scores_backward", "values"]

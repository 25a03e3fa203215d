"""Runs of pairs that share an offset, as blocks of memory: how the two sides of such pairs are read and accumulated.

Tokens come first here, `[L, B, C]`, so that the rows of a grid are one block of memory and a rectangle of full columns needs no
copy. All pairs of a run share a matrix, so that their projections are one matrix product over a rectangle of the grid. Runs are
taken a block at a time: as many as stay in a processor's cache, and enough that starting an operation does not count.

Where distances are clamped, offsets share a matrix. A token is projected by it once, and its projection kept for all of them:
the number of projections grows with tokens times matrices, not with pairs.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `w` columns of a shift, `n` pairs of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype
from .pair_layout import ColumnShift, OffsetRun, PairLayout


# Elements of one projection kept at a time. What is done to it next finds it in a processor's cache.
WORKSPACE_ELEMENTS = 1 << 18
# Heads narrower than this are summed, or given their weight, by a matrix product with ones: PyTorch's own loops over so few
# elements spend their time on starting.
NARROW = 33


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive runs of a shift.

    `sizes` and `num_rows` count `B` pairs as `B` rows, for each run and together. `queries` and `keys` are where the
    tokens of each run begin in the columns of the shift, and how many rows they are.
    """

    runs: tuple[OffsetRun, ...]
    num_rows: int
    sizes: list[int]
    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]


def blocks(shift: ColumnShift, batch: int, features: int) -> tuple[Block, ...]:
    """The runs of a shift in blocks whose projections, `features` wide, fit the workspace."""
    return _blocks(shift, batch, max(WORKSPACE_ELEMENTS // max(features, 1), 1))


@lru_cache(maxsize=1024)
def _blocks(shift: ColumnShift, batch: int, most_rows: int) -> tuple[Block, ...]:
    made, runs, num_rows = [], [], 0
    step = shift.num_columns * batch
    for run in shift.runs:
        size = run.num_rows * step
        if runs and num_rows + size > most_rows:
            made.append(_block(runs, step))
            runs, num_rows = [], 0
        runs.append(run)
        num_rows += size
    return (*made, _block(runs, step)) if runs else ()


def _block(runs: list[OffsetRun], step: int) -> Block:
    sizes = [run.num_rows * step for run in runs]
    return Block(
        tuple(runs),
        sum(sizes),
        sizes,
        tuple((run.query_start * step, size) for run, size in zip(runs, sizes, strict=True)),
        tuple((run.key_start * step, size) for run, size in zip(runs, sizes, strict=True)),
    )


@dataclass(frozen=True)
class SharedMatrix:
    """A matrix of several offsets: the smallest rectangles, rows and columns of the grid, that hold all its pairs.

    `last_offset` is the last column offset that uses it.
    """

    row: int
    reverse_row: int
    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    last_offset: int


@lru_cache(maxsize=64)
def shared_matrices(layout: PairLayout) -> dict[int, SharedMatrix]:
    """Every matrix that clamped offsets share, by its row of the banks of keys and values."""
    members: dict[int, list[tuple[ColumnShift, OffsetRun]]] = {}
    for shift in layout.column_shifts() if layout.clamp else ():
        for run in shift.runs:
            members.setdefault(run.row, []).append((shift, run))
    return {
        row: SharedMatrix(
            row,
            pairs[0][1].reverse_row,
            (
                _union((run.query_start, run.num_rows) for _, run in pairs),
                _union((shift.query_start, shift.num_columns) for shift, _ in pairs),
            ),
            (
                _union((run.key_start, run.num_rows) for _, run in pairs),
                _union((shift.key_start, shift.num_columns) for shift, _ in pairs),
            ),
            pairs[-1][0].offset,
        )
        for row, pairs in members.items()
        if len(pairs) > 1
    }


def _union(places: Iterable[tuple[int, int]]) -> slice:
    starts, ends = zip(*((start, start + size) for start, size in places), strict=True)
    return slice(min(starts), max(ends))


def workspace(layout: PairLayout, batch: int, features: int, like: Tensor) -> Tensor:
    """Room for the projections of any block, `[rows, features]`."""
    shifts = layout.column_shifts()
    rows = max((block.num_rows for shift in shifts for block in blocks(shift, batch, features)), default=0)
    return like.new_empty(rows, features)


def tokens_first(tensor: Tensor) -> Tensor:
    """`[B, L, C]` to `[L, B, C]`."""
    return tensor.transpose(0, 1).contiguous()


def grid(tokens: Tensor, layout: PairLayout) -> Tensor:
    """The tokens of the grid, `[rows, W, B, C]`."""
    return tokens[int(layout.class_token) :].unflatten(0, (-1, layout.width))


def columns_of(tokens: Tensor, layout: PairLayout, start: int, num_columns: int) -> Tensor:
    """Columns `start …` of the grid's tokens, `[rows·w·B, C]`, contiguous: a copy only where they are not all columns."""
    return grid(tokens, layout)[:, start : start + num_columns].flatten(0, 2).contiguous()


def put_columns(tokens: Tensor, columns: Tensor, layout: PairLayout, start: int, num_columns: int) -> None:
    """Writes changed columns back, where `columns_of` had to copy them."""
    part = grid(tokens, layout)[:, start : start + num_columns]
    if part.data_ptr() != columns.data_ptr():
        part.copy_(columns.view(part.shape))


def at(columns: Tensor, places: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """The rows of each run."""
    return [columns.narrow(0, start, size) for start, size in places]


# One call for a list of tensors; they may overlap in the first argument, and are taken in turn.
def add_each(targets: list[Tensor], parts: list[Tensor]) -> None:
    """Adds each part to its target."""
    if targets[0].dtype == parts[0].dtype:
        torch._foreach_add_(targets, parts)
    else:
        for target, part in zip(targets, parts, strict=True):
            target += part


def maximum_each(targets: list[Tensor], parts: list[Tensor]) -> None:
    """Raises each target to its part, where that is greater."""
    torch._foreach_maximum_(targets, parts)


def add_weighted_each(targets: list[Tensor], parts: list[Tensor], weights: list[Tensor]) -> None:
    """Adds each part times its weight to its target."""
    if targets[0].dtype == parts[0].dtype:
        torch._foreach_addcmul_(targets, parts, weights)
    else:
        for target, part, weight in zip(targets, parts, weights, strict=True):
            target += part * weight


class Heads:
    """Sums over the features of each head, and weights for them: what stands between projections and scores."""

    def __init__(self, num_heads: int, features: int, like: Tensor):
        self.num_heads, self.size = num_heads, features // num_heads
        self.wide = accumulation_dtype(like.dtype)
        self.narrow = self.size < NARROW
        self.ones = torch.eye(num_heads, dtype=like.dtype, device=like.device).repeat_interleave(self.size, 0)
        self.ones_across = self.ones.t().contiguous()

    def sum(self, product: Tensor, out: Tensor) -> None:
        """Sums `[rows, A·e]` to `[rows, A]`, in the wider type."""
        if self.narrow and product.dtype == self.wide:
            torch.mm(product, self.ones, out=out)
        else:
            torch.sum(product.unflatten(-1, (self.num_heads, -1)), -1, dtype=self.wide, out=out)

    def inner_products(self, left: list[Tensor], right: list[Tensor], space: Tensor, out: Tensor) -> None:
        """`<q_ij, k_ij>` per head of the runs of a block, from `[n·B, A·e]` each, to `out`, `[rows, A]`.

        `space`, `[rows, A·e]`, is written to; `left` may lie in it.
        """
        products = space.split([len(part) for part in left])
        if left[0].data_ptr() != space.data_ptr():
            torch._foreach_copy_(products, left)
        torch._foreach_mul_(products, right)
        self.sum(space, out)

    def spread(self, weights: Tensor, out: Tensor) -> Tensor:
        """Weights `[rows, A]` for every feature, `[rows, A·e]`, in `out`."""
        return torch.mm(weights, self.ones_across, out=out)

    def apart(self, rows: Tensor) -> Tensor:
        """`[rows, A·e]` to `[rows, A, e]`, and `[rows, A]` to `[rows, A, 1]`."""
        return rows.unflatten(-1, (self.num_heads, -1))


class Side:
    """One side of the pairs, queries or keys: its tokens, its bank, and how both are read and accumulated.

    Args:
        tokens: `[L, B, in]`, contiguous.
        bank: `[num_offsets, in, A·e]`; `None` where the tokens are projections already.
        is_query: whether this is the side of the queries.
        reverse: whether a pair uses the bank's row of the reverse offset, as queries do.
    """

    def __init__(self, tokens: Tensor, bank: Tensor | None, layout: PairLayout, is_query: bool, reverse: bool):
        self.tokens, self.bank, self.layout = tokens, bank, layout
        self.is_query, self.reverse = is_query, reverse
        self.matrices = None if bank is None else bank.unbind(0)
        self.features = tokens.shape[-1] if bank is None else bank.shape[-1]
        self.batch = tokens.shape[1]
        self.shared = {} if bank is None else shared_matrices(layout)
        self.kept: dict[int, Tensor] = {}
        self.kept_gradients: dict[int, Tensor] = {}

    def start_gradients(self) -> None:
        # The gradient of a token sums over all its offsets: accumulated in a wider type than it is stored in. A matrix
        # sums over offsets only where clamped ones share it. Where every matrix belongs to one offset, its gradient is
        # written once and needs no zeros before: a bank is the largest tensor here, and touching it twice shows.
        wide = accumulation_dtype(self.tokens.dtype)
        self.token_gradient = torch.zeros_like(self.tokens, dtype=wide)
        self.bank_gradient = None
        if self.bank is not None:
            layout = self.layout
            bank_size = (layout.bank_height, layout.bank_width)
            self.writes_once = not layout.clamp and (layout.num_distances, layout.width) == bank_size
            allocate = torch.empty_like if self.writes_once else torch.zeros_like
            self.bank_gradient = allocate(
                self.bank, dtype=wide if layout.clamp else self.bank.dtype, memory_format=torch.contiguous_format
            )
            self.matrix_gradients = self.bank_gradient.unbind(0)
            self.matrices_across = self.bank.transpose(1, 2).unbind(0)

    def start_shift(self, shift: ColumnShift, gradients: bool = False, like: Side | None = None) -> None:
        """Takes the columns of a shift, those of `like` where its tokens are the same."""
        self.shift = shift
        self.column_start = shift.query_start if self.is_query else shift.key_start
        place = (self.layout, self.column_start, shift.num_columns)
        shared = like is not None and like.tokens is self.tokens
        self.columns = like.columns if shared else columns_of(self.tokens, *place)
        if gradients:
            self.column_gradient = columns_of(self.token_gradient, *place)

    def end_shift(self, gradients: bool = False) -> None:
        """Writes gradients back, and parts with what no later shift shares."""
        if gradients:
            place = (self.layout, self.column_start, self.shift.num_columns)
            put_columns(self.token_gradient, self.column_gradient, *place)
        done = [
            row for row in {**self.kept, **self.kept_gradients} if self.shared[row].last_offset == self.shift.offset
        ]
        for row in done:
            self.kept.pop(row, None)
            if row in self.kept_gradients:
                self.accumulate_shared(self.shared[row], self.kept_gradients.pop(row))

    def places(self, block: Block) -> tuple[tuple[int, int], ...]:
        return block.queries if self.is_query else block.keys

    def rows(self, block: Block) -> list[Tensor]:
        """The tokens of each run, `[n·B, in]`."""
        return at(self.columns, self.places(block))

    def gradient_rows(self, block: Block) -> list[Tensor]:
        """Where the gradient of each run's tokens is added up."""
        return at(self.column_gradient, self.places(block))

    def _bank_row(self, pairs: OffsetRun | SharedMatrix) -> int:
        return pairs.reverse_row if self.reverse else pairs.row

    def project(self, block: Block, outs: tuple[Tensor, ...]) -> list[Tensor]:
        """The projections of each run, `[n·B, A·e]`, in `outs`, or as they are where there is no bank."""
        rows = self.rows(block)
        if self.bank is None:
            return rows
        for run, tokens, out in zip(block.runs, rows, outs, strict=True):
            if run.row in self.shared:
                part = self._part(run, self._kept(self.shared[run.row]))
                out.view(part.shape).copy_(part)
            else:
                torch.mm(tokens, self.matrices[self._bank_row(run)], out=out)
        return list(outs)

    def accumulate(self, block: Block, gradients: tuple[Tensor, ...]) -> None:
        """Adds the gradients of each run's projections, which may be changed, to those of the tokens and the bank."""
        targets = self.gradient_rows(block)
        if self.bank is None:
            add_each(targets, gradients)
            return
        for run, tokens, target, gradient in zip(block.runs, self.rows(block), targets, gradients, strict=True):
            if run.row in self.shared:
                part = self._part(run, self._kept_gradient(self.shared[run.row]))
                part += gradient.view(part.shape)
            else:
                row = self._bank_row(run)
                self._add_to_matrix(row, tokens, gradient)
                _add_product(target, gradient, self.matrices_across[row])

    def _rectangle(self, shared: SharedMatrix) -> tuple[slice, slice]:
        return shared.queries if self.is_query else shared.keys

    def _part(self, run: OffsetRun, rectangle: Tensor) -> Tensor:
        """A run's part, `[n / w, w, B, A·e]`, of what is kept for all tokens of its matrix."""
        rows, columns = self._rectangle(self.shared[run.row])
        row = (run.query_start if self.is_query else run.key_start) - rows.start
        column = self.column_start - columns.start
        return rectangle[row : row + run.num_rows, column : column + self.shift.num_columns]

    def _kept(self, shared: SharedMatrix) -> Tensor:
        """The projections of all tokens by a shared matrix, `[rows, columns, B, A·e]`."""
        if shared.row not in self.kept:
            self.kept[shared.row] = self.project_shared(shared)
        return self.kept[shared.row]

    def _kept_gradient(self, shared: SharedMatrix) -> Tensor:
        """Where the gradient of those projections is added up, in the wider type."""
        if shared.row not in self.kept_gradients:
            size = (*self._tokens_of(self.tokens, shared).shape[:3], self.features)
            self.kept_gradients[shared.row] = self.token_gradient.new_zeros(size)
        return self.kept_gradients[shared.row]

    def project_shared(self, shared: SharedMatrix) -> Tensor:
        """The projections of all tokens of a shared matrix, `[rows, columns, B, A·e]`; plain tokens where there is no bank."""
        tokens = self._tokens_of(self.tokens, shared)
        if self.bank is None:
            return tokens
        projected = torch.mm(tokens.flatten(0, 2), self.matrices[self._bank_row(shared)])
        return projected.unflatten(0, tokens.shape[:3])

    def accumulate_shared(self, shared: SharedMatrix, gradient: Tensor) -> None:
        """Adds the gradients of those projections to those of the tokens and the bank."""
        target = self._tokens_of(self.token_gradient, shared)
        if self.bank is None:
            target += gradient
            return
        row, flat = self._bank_row(shared), gradient.to(self.tokens.dtype).flatten(0, 2)
        self._add_to_matrix(row, self._tokens_of(self.tokens, shared).flatten(0, 2), flat)
        target += (flat @ self.matrices_across[row]).view(target.shape)

    def _tokens_of(self, tokens: Tensor, shared: SharedMatrix) -> Tensor:
        return grid(tokens, self.layout)[self._rectangle(shared)]

    def _add_to_matrix(self, row: int, tokens: Tensor, gradient: Tensor) -> None:
        if self.writes_once:
            torch.mm(tokens.t(), gradient, out=self.matrix_gradients[row])
        else:
            _add_product(self.matrix_gradients[row], tokens.t(), gradient)

    def project_tokens(self, tokens: slice, row: int) -> Tensor:
        """Projection of a few tokens by one matrix, `[tokens, B, A·e]`: the pairs of a class token."""
        chosen = self.tokens[tokens]
        return chosen if self.bank is None else chosen @ self.matrices[row]

    def accumulate_tokens(self, tokens: slice, row: int, gradient: Tensor) -> None:
        flat = gradient.flatten(0, 1)
        if self.bank is None:
            self.token_gradient[tokens] += gradient
        else:
            self._add_to_matrix(row, self.tokens[tokens].flatten(0, 1), flat)
            _add_product(self.token_gradient[tokens].flatten(0, 1), flat, self.matrices_across[row])

    def gradients(self) -> tuple[Tensor, Tensor]:
        token_gradient = self.token_gradient.transpose(0, 1).to(self.tokens.dtype).contiguous()
        if self.bank_gradient is None:
            return token_gradient, self.tokens.new_empty(0)
        return token_gradient, self.bank_gradient.to(self.bank.dtype)


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    else:
        target += left @ right


__all__ = [
    "Block",
    "Heads",
    "SharedMatrix",
    "Side",
    "add_each",
    "add_weighted_each",
    "at",
    "blocks",
    "columns_of",
    "grid",
    "maximum_each",
    "put_columns",
    "shared_matrices",
    "tokens_first",
    "workspace",
]

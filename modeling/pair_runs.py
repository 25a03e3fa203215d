"""Runs of pairs that share an offset, as blocks of memory: how the two sides of such pairs are read and accumulated.

Tokens come first here, `[L, B, C]`, so that the rows of a grid are one block of memory and a rectangle of full columns needs no
copy. All pairs of a run share a matrix, so that their projections are one matrix product over a rectangle of the grid.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `w` columns of a shift.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype
from .pair_layout import ColumnShift, OffsetRun, PairLayout


# Elements of one projection kept at a time. What is done to it next finds it in a processor's cache.
WORKSPACE_ELEMENTS = 1 << 18
# Heads narrower than this are summed, or given their weight, by a matrix product with ones: PyTorch's own loops over so few
# elements spend their time on starting.
NARROW_SUM, NARROW_WEIGHT = 33, 16


def tokens_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous()


def _grid(tokens: Tensor, layout: PairLayout) -> Tensor:
    """The tokens of the grid, `[rows, W, B, C]`."""
    return tokens[int(layout.class_token) :].unflatten(0, (-1, layout.width))


def columns_of(tokens: Tensor, layout: PairLayout, start: int, num_columns: int) -> Tensor:
    """Columns `start …` of the grid's tokens, `[rows·w·B, C]`, contiguous."""
    return _grid(tokens, layout)[:, start : start + num_columns].flatten(0, 2).contiguous()


def add_columns(tokens: Tensor, columns: Tensor, layout: PairLayout, start: int, num_columns: int) -> None:
    part = _grid(tokens, layout)[:, start : start + num_columns]
    part += columns.view(part.shape)


def put_columns(tokens: Tensor, columns: Tensor, layout: PairLayout, start: int, num_columns: int) -> None:
    """Writes columns back, where `columns_of` had to copy them."""
    part = _grid(tokens, layout)[:, start : start + num_columns]
    if part.data_ptr() != columns.data_ptr():
        part.copy_(columns.view(part.shape))


def blocks(shift: ColumnShift, batch: int, features: int) -> Iterator[tuple[tuple[OffsetRun, ...], list[int]]]:
    """Consecutive runs whose projections fit the workspace, with the number of projected rows of each."""
    block, sizes = [], []
    for run in shift.runs:
        size = run.num_rows * shift.num_columns * batch
        if block and (sum(sizes) + size) * features > WORKSPACE_ELEMENTS:
            yield tuple(block), sizes
            block, sizes = [], []
        block.append(run)
        sizes.append(size)
    yield tuple(block), sizes


def workspace(layout: PairLayout, batch: int, features: int, like: Tensor) -> Tensor:
    rows = max(sum(sizes) for shift in layout.column_shifts() for _, sizes in blocks(shift, batch, features))
    return like.new_empty(rows, features)


class Heads:
    """Sums over the features of each head, and weights for them: what stands between projections and scores."""

    def __init__(self, num_heads: int, features: int, like: Tensor):
        self.num_heads, self.size = num_heads, features // num_heads
        self.wide = accumulation_dtype(like.dtype)
        self.ones = torch.eye(num_heads, dtype=like.dtype, device=like.device).repeat_interleave(self.size, 0)
        self.ones_across = self.ones.t().contiguous()

    def sum(self, product: Tensor, out: Tensor) -> None:
        """Sums `[rows, A·e]` to `[rows, A]`, in the wider type."""
        if self.size < NARROW_SUM and product.dtype == self.wide:
            torch.mm(product, self.ones, out=out)
        else:
            torch.sum(product.unflatten(-1, (self.num_heads, -1)), -1, dtype=self.wide, out=out)

    def spread(self, weight: Tensor, out: Tensor) -> Tensor:
        """Weights `[rows, A]` for every feature, `[rows, A·e]`, in `out`."""
        return torch.mm(weight, self.ones_across, out=out)

    def add_weighted(self, target: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Adds `rows`, `[rows, A·e]`, to `target`, each head with its weight, `[rows, A]`, or feature, `[rows, A·e]`."""
        if weight.shape != rows.shape:
            heads = (-1, self.num_heads, self.size)
            target, rows, weight = target.view(heads), rows.view(heads), weight.unsqueeze(-1)
        if target.dtype == rows.dtype:
            target.addcmul_(rows, weight)
        else:
            target += rows * weight


class Side:
    """One side of the pairs, receiving or giving: its tokens, its bank, and how both are read and accumulated."""

    def __init__(self, tokens: Tensor, bank: Tensor | None, layout: PairLayout, receives: bool, reverse: bool):
        self.tokens, self.bank, self.layout = tokens, bank, layout
        self.receives, self.reverse = receives, reverse
        self.matrices = None if bank is None else bank.unbind(0)
        self.features = tokens.shape[-1] if bank is None else bank.shape[-1]
        self.batch = tokens.shape[1]

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

    def start_shift(self, shift: ColumnShift, gradients: bool = False) -> None:
        self.column_start = shift.receiver_start if self.receives else shift.giver_start
        self.row_size = shift.num_columns * self.batch
        self.columns = columns_of(self.tokens, self.layout, self.column_start, shift.num_columns)
        if gradients:
            self.column_gradient = torch.zeros_like(self.columns, dtype=self.token_gradient.dtype)

    def end_shift(self, shift: ColumnShift) -> None:
        add_columns(self.token_gradient, self.column_gradient, self.layout, self.column_start, shift.num_columns)

    def rows(self, columns: Tensor, run: OffsetRun) -> Tensor:
        """The tokens of a run, `[rows, in]`."""
        start = run.receiver_start if self.receives else run.giver_start
        return columns.narrow(0, start * self.row_size, run.num_rows * self.row_size)

    def _row(self, run: OffsetRun) -> int:
        return run.reverse_row if self.reverse else run.row

    def project(self, run: OffsetRun, out: Tensor) -> Tensor:
        """The projections of a run, `[rows, A·e]`, in `out`, or as they are where there is no bank."""
        rows = self.rows(self.columns, run)
        return rows if self.bank is None else torch.mm(rows, self.matrices[self._row(run)], out=out)

    def accumulate(self, run: OffsetRun, gradient: Tensor) -> None:
        """Adds the gradient of a run's projections to those of the tokens and the bank."""
        if self.bank is None:
            self.rows(self.column_gradient, run).add_(gradient)
            return
        row = self._row(run)
        self._add_to_matrix(row, self.rows(self.columns, run), gradient)
        _add_product(self.rows(self.column_gradient, run), gradient, self.matrices_across[row])

    def accumulate_weighted(self, run: OffsetRun, gradient: Tensor, weight: Tensor) -> None:
        """Adds the gradient of a run's plain inputs, `[rows, A·e]`, times a weight of the same shape."""
        target = self.rows(self.column_gradient, run)
        if target.dtype == gradient.dtype:
            target.addcmul_(gradient, weight)
        else:
            target += gradient * weight

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
    "NARROW_WEIGHT",
    "Heads",
    "Side",
    "add_columns",
    "blocks",
    "columns_of",
    "put_columns",
    "tokens_first",
    "workspace",
]

"""Which pairs of tokens a mixer sees, and which row of an offset bank each pair uses.

Legend: `H`, `W` grid height and width in patches, `L` tokens, `K` grid offsets, `D` largest distance told apart.
Token `i` receives, token `j` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


# Rows that follow the grid offsets in an image bank, in the order of the offset index (class token first).
CLASS_TO_CLASS, CLASS_FROM_PATCH, PATCH_FROM_CLASS = 0, 1, 2
NUM_CLASS_ROWS = 3


@dataclass(frozen=True)
class OffsetRun:
    """The pairs of one grid offset `(dx, dy)`: receiver `(x, y)` takes from giver `(x - dx, y - dy)`.

    Receivers are rows `receiver_start` to `receiver_start + num_rows` of the columns that `dy` leaves, givers likewise;
    both sets are rectangles of the same shape. `row` and `reverse_row` index the banks of keys and values, and of queries.
    """

    receiver_start: int
    giver_start: int
    num_rows: int
    row: int
    reverse_row: int


@dataclass(frozen=True)
class ColumnShift:
    """All offsets that share the column offset `dy`: `num_columns` columns take part, and one run per row offset."""

    receiver_start: int
    giver_start: int
    num_columns: int
    runs: tuple[OffsetRun, ...]

    @property
    def num_pairs(self) -> int:
        return self.num_columns * sum(run.num_rows for run in self.runs)


@dataclass(frozen=True)
class PairLayout:
    """Geometry of the pairs of one sequence of tokens.

    Images are a `height × width` grid in row-major order, after a class token where `class_token` is set. Text is a grid of
    `length × 1` tokens that is `causal`: token `i` receives from `j ≤ i` only.

    Args:
        height, width: the grid of the input, in tokens.
        class_token: whether token 0 stands outside the grid, with three bank rows of its own.
        causal: whether only offsets `i - j ≥ 0` exist. Text only (`width == 1`, no class token).
        bank_height, bank_width: largest row and column distance a bank tells apart, plus one. Distances beyond are clamped
            to it where `clamp` is set, and an error otherwise. A bank made for a larger grid serves a smaller one.
        clamp: whether distances beyond the bank share its outermost row.
    """

    height: int
    width: int
    class_token: bool
    causal: bool
    bank_height: int
    bank_width: int
    clamp: bool = False

    def __post_init__(self):
        if self.causal and (self.width != 1 or self.class_token):
            raise ValueError(f"A causal layout is one column without a class token, got {self}.")
        if not self.clamp and (self.height > self.bank_height or self.width > self.bank_width):
            raise ValueError(
                f"Offsets of {self.height} × {self.width} tokens do not fit a bank made for {self.bank_height} × "
                f"{self.bank_width}; without `max_relative_distance` at most that many are allowed."
            )

    @classmethod
    def for_image(
        cls, height: int, width: int, bank_height: int, bank_width: int, max_relative_distance: int | None = None
    ) -> PairLayout:
        """Layout of `1 + height · width` tokens, with banks made for a `bank_height × bank_width` grid."""
        if max_relative_distance is not None:
            bank_height = bank_width = max_relative_distance + 1
        return cls(height, width, True, False, bank_height, bank_width, max_relative_distance is not None)

    @classmethod
    def for_text(cls, length: int, bank_length: int, max_relative_distance: int | None = None) -> PairLayout:
        """Layout of `length` tokens, causal, with banks of `bank_length` distances."""
        if max_relative_distance is not None:
            bank_length = max_relative_distance + 1
        return cls(length, 1, False, True, bank_length, 1, max_relative_distance is not None)

    @property
    def num_tokens(self) -> int:
        return self.height * self.width + int(self.class_token)

    @property
    def num_grid_offsets(self) -> int:
        """`K`, the bank rows that belong to grid offsets."""
        if self.causal:
            return self.bank_height
        return (2 * self.bank_height - 1) * (2 * self.bank_width - 1)

    @property
    def num_offsets(self) -> int:
        """Rows of a bank."""
        return self.num_grid_offsets + (NUM_CLASS_ROWS if self.class_token else 0)

    def row(self, dx: int, dy: int) -> int:
        """Bank row of the grid offset `(dx, dy)`, clamped to the bank's distances."""
        reach_x, reach_y = self.bank_height - 1, self.bank_width - 1
        dx, dy = max(-reach_x, min(dx, reach_x)), max(-reach_y, min(dy, reach_y))
        return dx if self.causal else (dx + reach_x) * (2 * self.bank_width - 1) + dy + reach_y

    def offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bank row of every pair.

        Returns:
            Two `[L, L]` integer tensors on the CPU: the row that pair `(i, j)` uses in the banks of keys and values, `o(i, j)`,
            and in the bank of queries: `o(j, i)` for images, the distance itself for text. Pairs that a causal layout does
            not have are −1.
        """
        return _offsets(self)

    def column_shifts(self) -> tuple[ColumnShift, ...]:
        """The grid's pairs grouped by offset: by column offset, then by row offset."""
        return _column_shifts(self)

    def pair_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the grouped order keeps each pair.

        Pairs are ordered by column shift, run, receiver row, receiver column; those of a class token follow: with itself,
        class from patches, patches from class.

        Returns:
            `order`, `[pairs]`: the flat index `i · L + j` of each pair in grouped order, and `position`, `[L · L]`: the place
            of pair `(i, j)` in it. Pairs that do not exist have position `pairs`, one past the end.
        """
        return _pair_order(self)


def bank_layout(config) -> PairLayout:
    """Layout of the largest input that the banks of `config` are made for."""
    if config.modality == "text":
        length = config.max_position_embeddings
        return PairLayout.for_text(length, length, config.max_relative_distance)
    height, width = config.grid_height_width
    return PairLayout.for_image(height, width, height, width, config.max_relative_distance)


# Index tensors are made once a geometry. They must not belong to the mode of the call that happened to come first: tensors
# made under `inference_mode` cannot be saved for a backward pass, and the default device may be `meta`.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _offsets(layout: PairLayout) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(layout.height, device="cpu").repeat_interleave(layout.width)
    y = torch.arange(layout.width, device="cpu").repeat(layout.height)
    reach_x, reach_y = layout.bank_height - 1, layout.bank_width - 1
    dx = (x[:, None] - x[None, :]).clamp(-reach_x, reach_x)
    dy = (y[:, None] - y[None, :]).clamp(-reach_y, reach_y)
    if layout.causal:
        distance = dx.masked_fill(x[:, None] < x[None, :], -1)
        return distance, distance
    grid = (dx + reach_x) * (2 * layout.bank_width - 1) + dy + reach_y
    if not layout.class_token:
        return grid, grid.T.contiguous()
    offsets = grid.new_empty(layout.num_tokens, layout.num_tokens)
    offsets[1:, 1:] = grid
    offsets[0, 0] = layout.num_grid_offsets + CLASS_TO_CLASS
    offsets[0, 1:] = layout.num_grid_offsets + CLASS_FROM_PATCH
    offsets[1:, 0] = layout.num_grid_offsets + PATCH_FROM_CLASS
    return offsets, offsets.T.contiguous()


@lru_cache(maxsize=64)
def _column_shifts(layout: PairLayout) -> tuple[ColumnShift, ...]:
    shifts = []
    for dy in range(1 - layout.width, layout.width):
        runs = []
        for dx in range(0 if layout.causal else 1 - layout.height, layout.height):
            reverse = layout.row(dx, dy) if layout.causal else layout.row(-dx, -dy)
            runs.append(OffsetRun(max(dx, 0), max(-dx, 0), layout.height - abs(dx), layout.row(dx, dy), reverse))
        shifts.append(ColumnShift(max(dy, 0), max(-dy, 0), layout.width - abs(dy), tuple(runs)))
    return tuple(shifts)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _pair_order(layout: PairLayout) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, first = layout.num_tokens, int(layout.class_token)
    pieces = []
    for shift in layout.column_shifts():
        column = torch.arange(shift.num_columns, device="cpu")
        for run in shift.runs:
            row = torch.arange(run.num_rows, device="cpu")[:, None]
            receiver = first + (row + run.receiver_start) * layout.width + column + shift.receiver_start
            giver = first + (row + run.giver_start) * layout.width + column + shift.giver_start
            pieces.append((receiver * tokens + giver).flatten())
    if layout.class_token:
        patches = torch.arange(1, tokens, device="cpu")
        pieces += [torch.zeros(1, dtype=torch.long, device="cpu"), patches, patches * tokens]
    order = torch.cat(pieces)
    position = torch.full((tokens * tokens,), order.numel(), device="cpu")
    position[order] = torch.arange(order.numel(), device="cpu")
    return order, position


__all__ = ["CLASS_FROM_PATCH", "CLASS_TO_CLASS", "NUM_CLASS_ROWS", "PATCH_FROM_CLASS", "PairLayout", "bank_layout"]

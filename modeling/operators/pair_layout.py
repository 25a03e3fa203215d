"""Which pairs of tokens a mixer sees, and which row of an offset bank each pair uses.

Legend: `H`, `W` grid height and width in patches, `L` tokens, `K` grid offsets, `D` largest distance told apart.
Position `i` is the query's, position `j` the key's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch


# Rows that follow the grid offsets in an image bank, in the order of the offset index (class token first).
CLASS_TO_CLASS, CLASS_FROM_PATCH, PATCH_FROM_CLASS = 0, 1, 2
NUM_CLASS_ROWS = 3


@dataclass(frozen=True, eq=False)
class OffsetPairs:
    """The pairs of one grid offset: query `(x, y)` and key `(x - row_offset, y - column_offset)`.

    `queries` and `keys` are rows and columns in the grids of both, rectangles of the same shape. `row` and `reverse_row` index the
    banks of keys and values, and of queries.
    """

    row_offset: int
    column_offset: int
    row: int
    reverse_row: int
    queries: tuple[slice, slice]
    keys: tuple[slice, slice]

    @property
    def num_rows(self) -> int:
        return self.queries[0].stop - self.queries[0].start


@dataclass(frozen=True, eq=False)
class ColumnShift:
    """All offsets that share a column offset: the columns of their queries and keys, and one offset per row offset."""

    queries: slice
    keys: slice
    offsets: tuple[OffsetPairs, ...]

    @property
    def num_columns(self) -> int:
        return self.queries.stop - self.queries.start


class _MaxDistances:
    """The largest distances that a bank of `bank_height × bank_width` tells apart."""

    @property
    def max_row_distance(self) -> int:
        return self.bank_height - 1

    @property
    def max_column_distance(self) -> int:
        return self.bank_width - 1


@dataclass(frozen=True)
class PairLayout(_MaxDistances):
    """Geometry of the pairs of one sequence of tokens.

    Images are a `height × width` grid in row-major order, after a class token where `class_token` is set. Text is a grid of
    `length × 1` tokens that is `causal`: query `i` sees keys `j ≤ i` only. There, the first `past` tokens are keys alone: they
    come from a cache, and only the others are queries.

    Args:
        height, width: the grid of the input, in tokens.
        class_token: whether token 0 stands outside the grid, with three bank rows of its own.
        causal: whether only offsets `i - j ≥ 0` exist. Text only (`width == 1`, no class token).
        bank_height, bank_width: largest row and column distance a bank tells apart, plus one. Distances beyond are clamped
            to it where `clamp` is set, and an error otherwise. A bank made for a larger grid serves a smaller one.
        clamp: whether the bank serves distances beyond it. They share its outermost row, each axis for itself, unless
            `share_far`.
        share_far: whether all offsets beyond the bank, on either axis, share one row after the grid's. Images only.
        past: number of tokens that are keys alone. Text only.
        band: where set, pairs at this distance or further do not exist. Text only.
    """

    height: int
    width: int
    class_token: bool
    causal: bool
    bank_height: int
    bank_width: int
    clamp: bool = False
    past: int = 0
    band: int | None = None
    share_far: bool = False

    def __post_init__(self):
        if self.causal and (self.width != 1 or self.class_token):
            raise ValueError(f"A causal layout is one column without a class token, got {self}.")
        if not self.clamp and (self.num_distances > self.bank_height or self.width > self.bank_width):
            raise ValueError(
                f"Offsets of {self.height} × {self.width} tokens do not fit a bank made for {self.bank_height} × "
                f"{self.bank_width}; without `max_relative_distance` at most that many are allowed."
            )

    @classmethod
    def for_image(
        cls,
        height: int,
        width: int,
        bank_height: int,
        bank_width: int,
        max_relative_distance: int | None = None,
        share_far: bool = False,
        class_token: bool = True,
    ) -> PairLayout:
        """Layout of `1 + height · width` tokens, with banks made for a `bank_height × bank_width` grid.

        Without a `class_token` there are `height · width` tokens.
        """
        clamp = max_relative_distance is not None
        if clamp:
            bank_height = bank_width = max_relative_distance + 1
        return cls(height, width, class_token, False, bank_height, bank_width, clamp, share_far=share_far)

    @classmethod
    def for_text(
        cls,
        length: int,
        bank_length: int,
        max_relative_distance: int | None = None,
        past: int = 0,
        band: int | None = None,
    ) -> PairLayout:
        """Layout of `length` tokens, causal, with banks of `bank_length` distances; the first `past` tokens are keys alone."""
        if max_relative_distance is not None:
            bank_length = max_relative_distance + 1
        return cls(length, 1, False, True, bank_length, 1, max_relative_distance is not None, past, band)

    @property
    def has_far_pairs(self) -> bool:
        """Whether some pairs of a layout with a distance are too far apart for a matrix of their own."""
        if self.causal:
            return self.clamp and self.num_tokens > self.max_row_distance
        return self.clamp and (self.height > self.bank_height or self.width > self.bank_width)

    def near(self, past: int) -> PairLayout:
        """The pairs of a clamped text that have a matrix of their own: the queries, and `past` tokens before them."""
        return replace(self, height=self.num_queries + past, past=past, band=self.bank_height - 1)

    @property
    def num_tokens(self) -> int:
        """Keys, `L`: all tokens."""
        return self.height * self.width + int(self.class_token)

    @property
    def num_queries(self) -> int:
        """Queries: all tokens but the `past` ones."""
        return self.num_tokens - self.past

    @property
    def num_distances(self) -> int:
        """Row distances that occur, 0 included."""
        return self.height if self.band is None else min(self.height, self.band)

    def rows(self, device: torch.device) -> torch.Tensor:
        """Bank row of keys and values of every pair, `[queries, L]`, on a device; 0 where there is no pair."""
        return self.offsets(device)[0].clamp(min=0)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Slot of each query of a text, `[queries]`."""
        return torch.arange(self.past, self.num_tokens, device=device)

    @property
    def num_grid_offsets(self) -> int:
        """`K`, the bank rows that belong to grid offsets."""
        if self.causal:
            return self.bank_height
        return (2 * self.bank_height - 1) * (2 * self.bank_width - 1) + int(self.share_far)

    @property
    def far_row(self) -> int:
        """Bank row of all offsets beyond the bank, where they share one."""
        return self.num_grid_offsets - 1

    @property
    def num_offsets(self) -> int:
        """Rows of a bank."""
        return self.num_grid_offsets + (NUM_CLASS_ROWS if self.class_token else 0)

    def row(self, row_offset: int, column_offset: int) -> int:
        """Bank row of the grid offset `(row_offset, column_offset)`, or of what it shares one with."""
        max_row_distance, max_column_distance = self.max_row_distance, self.max_column_distance
        if self.share_far and (abs(row_offset) > max_row_distance or abs(column_offset) > max_column_distance):
            return self.far_row
        row_offset, column_offset = (
            max(-max_row_distance, min(row_offset, max_row_distance)),
            max(-max_column_distance, min(column_offset, max_column_distance)),
        )
        return (
            row_offset
            if self.causal
            else (row_offset + max_row_distance) * (2 * self.bank_width - 1) + column_offset + max_column_distance
        )

    def offsets(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Bank row of every pair.

        Made anew for every call: what a graph is traced through must not outlive the trace, and its sizes may be symbolic.

        Returns:
            Two `[queries, L]` integer tensors on a device: the row that pair `(i, j)` uses in the banks of keys and values,
            `o(i, j)`, and in the bank of queries: `o(j, i)` for images, the distance itself for text. Pairs that a causal layout
            does not have are −1.
        """
        if self.causal:
            rows = _distance_rows(self, self.band, device)
            return rows, rows
        x = torch.arange(self.height, device=device).repeat_interleave(self.width)
        y = torch.arange(self.width, device=device).repeat(self.height)
        max_row_distance, max_column_distance = self.max_row_distance, self.max_column_distance
        row_offset, column_offset = x[:, None] - x, y[:, None] - y
        beyond = (row_offset.abs() > max_row_distance) | (column_offset.abs() > max_column_distance)
        row_offset = row_offset.clamp(-max_row_distance, max_row_distance)
        column_offset = column_offset.clamp(-max_column_distance, max_column_distance)
        rows = (row_offset + max_row_distance) * (2 * self.bank_width - 1) + column_offset + max_column_distance
        if self.share_far:
            rows = rows.masked_fill(beyond, self.far_row)
        if self.class_token:
            first, patches = self.num_grid_offsets, self.height * self.width
            above = rows.new_full((1, patches), first + CLASS_FROM_PATCH)
            beside = rows.new_full((patches, 1), first + PATCH_FROM_CLASS)
            corner = rows.new_full((1, 1), first + CLASS_TO_CLASS)
            rows = torch.cat((torch.cat((corner, above), dim=1), torch.cat((beside, rows), dim=1)))
        return rows, rows.T

    def column_shifts(self) -> tuple[ColumnShift, ...]:
        """The grid's pairs grouped by offset: by column offset, then by row offset."""
        return _column_shifts(self)

    def near_offsets(self) -> tuple[OffsetPairs, ...]:
        """The offsets with a matrix of their own: of a text those of `near`, of an image those no further than the bank.

        Clamped offsets of an image share matrices with far ones in their direction: there are none then.
        """
        return _near_offsets(self) if self.causal or self.share_far else ()

    def near_steps(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column offset of each of an image's `near_offsets`, `[T]` each.

        Made on the device: of a list, a copy would be sent to it, which a CUDA graph cannot capture.
        """
        if not self.share_far:
            return torch.arange(0, device=device), torch.arange(0, device=device)
        row, column = min(self.max_row_distance, self.height - 1), min(self.max_column_distance, self.width - 1)
        rows, columns = (torch.arange(-reach, reach + 1, device=device) for reach in (row, column))
        return rows.repeat(2 * column + 1), columns.repeat_interleave(2 * row + 1)

    def pair_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the grouped order keeps each pair of the grid: by column shift, offset, query row, query column.

        Returns:
            `order`, `[pairs]`: the flat index `i · L + j` of each pair in grouped order, `i` counting queries, and `position`,
            `[queries · L]`: the place of pair `(i, j)` in it. Pairs that do not exist, and those of a class token, have position
            `pairs`, one past the end.
        """
        return tuple(torch.from_numpy(places) for places in _pair_order(self))


@dataclass(frozen=True)
class StepLayout(_MaxDistances):
    """The pairs of new tokens with the slots of a cache, some of which may not be filled yet.

    One new token is what `decode.py` serves. There are several where a graph has to serve every position.

    Args:
        position: the first new token's slot, an integer or a tensor of no dimensions, so that a compiled step serves every slot.
        num_tokens: slots, of which the first `position + num_queries` are filled.
        bank_height: distances a bank tells apart.
        num_queries: new tokens.
    """

    position: int | torch.Tensor
    num_tokens: int
    bank_height: int
    clamp: bool
    causal: bool = True
    class_token: bool = False
    bank_width: int = 1
    num_queries: int = 1
    # Lives as long as a forward pass.
    known: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)

    def near(self, past: int) -> StepLayout | PairLayout:
        """See `PairLayout.near`."""
        if self.num_queries == 1:
            return replace(self, position=past, num_tokens=past + 1, known={})
        whole = PairLayout.for_text(self.num_queries + past, self.bank_height, self.bank_height - 1, past)
        return whole.near(past)

    def offsets(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PairLayout.offsets`; slots that are not filled are −1."""
        rows = _distance_rows(self, None, device)
        return rows, rows

    def rows(self, device: torch.device) -> torch.Tensor:
        """Bank row of every slot, `[queries, slots]`; 0 where it is not filled."""
        return self.once("rows", lambda: self.offsets(device)[0].clamp(min=0))

    def slot_distances(self, device: torch.device) -> torch.Tensor:
        """Distance of every slot, `[slots]`, clamped to those of `by_distance`; 0 where it is not filled."""
        reach = min(self.num_tokens, self.bank_height)
        return self.once("slot_distances", lambda: distances(self, device)[0].clamp(0, reach - 1))

    def by_distance(self, device: torch.device) -> torch.Tensor:
        """Slot of the token at each distance that a bank tells apart, `[distances]`; 0 where no token is that far."""
        reach = min(self.num_tokens, self.bank_height)
        return self.once("by_distance", lambda: (self.position - torch.arange(reach, device=device)).clamp(min=0))

    def once(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What every layer of a step asks for, made by the first."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Slot of each query, `[queries]`."""
        first = torch.as_tensor(self.position, device=device).view(1)
        return first if self.num_queries == 1 else first + torch.arange(self.num_queries, device=device)


def distances(layout: PairLayout | StepLayout, device: torch.device) -> torch.Tensor:
    """Distance of every pair of a text, `[queries, L]`; negative where the key comes later or is not there yet."""
    if isinstance(layout, StepLayout):
        return layout.once("distances", lambda: _distances(layout, device))
    return _distances(layout, device)


def _distances(layout: PairLayout | StepLayout, device: torch.device) -> torch.Tensor:
    return layout.positions(device)[:, None] - torch.arange(layout.num_tokens, device=device)


def _distance_rows(layout: PairLayout | StepLayout, band: int | None, device: torch.device | str) -> torch.Tensor:
    """Bank row of every pair of a text, `[queries, L]`; −1 where there is none, at the distance `band` or further too."""
    between = distances(layout, device)
    missing = between < 0 if band is None else (between < 0) | (between >= band)
    return between.clamp(max=layout.bank_height - 1).masked_fill(missing, -1)


def bank_layout(config, class_token: bool = True) -> PairLayout:
    """Layout of the largest input that the banks of `config` are made for; images of a model have a class token."""
    if config.modality == "text":
        length = config.max_position_embeddings
        return PairLayout.for_text(length, length, config.max_relative_distance)
    height, width = config.grid_height_width
    return PairLayout.for_image(
        height, width, height, width, config.max_relative_distance, config.far_offsets == "shared", class_token
    )


# Only integers and arrays are kept for later calls. A tensor would belong to the mode of the call that came first, and one
# made while a graph was traced would be no tensor at all.
@lru_cache(maxsize=64)
def _column_shifts(layout: PairLayout) -> tuple[ColumnShift, ...]:
    shifts = []
    for column_offset in range(1 - layout.width, layout.width):
        columns = _overlap(column_offset, layout.width)
        offsets = []
        for row_offset in range(0 if layout.causal else 1 - layout.height, layout.num_distances):
            queries, keys = _overlap(row_offset, layout.height, layout.past)
            row = layout.row(row_offset, column_offset)
            reverse_row = row if layout.causal else layout.row(-row_offset, -column_offset)
            places = ((queries, columns[0]), (keys, columns[1]))
            offsets.append(OffsetPairs(row_offset, column_offset, row, reverse_row, *places))
        shifts.append(ColumnShift(*columns, tuple(offsets)))
    return tuple(shifts)


def _overlap(offset: int, size: int, past: int = 0) -> tuple[slice, slice]:
    """The queries and keys of an axis that are `offset` apart; `past` keys come before the first query."""
    first, last = max(offset, past), size + min(offset, 0)
    return slice(first - past, last - past), slice(first - offset, last - offset)


@lru_cache(maxsize=64)
def _near_offsets(layout: PairLayout) -> tuple[OffsetPairs, ...]:
    return tuple(
        offset
        for shift in layout.column_shifts()
        for offset in shift.offsets
        if layout.causal or max(abs(offset.row_offset), abs(offset.column_offset)) < layout.bank_height
    )


@lru_cache(maxsize=16)
def _pair_order(layout: PairLayout) -> tuple[np.ndarray, np.ndarray]:
    tokens, first = layout.num_tokens, int(layout.class_token)
    pieces = []
    grid = first + np.arange(layout.height * layout.width).reshape(layout.height, layout.width)
    for shift in layout.column_shifts():
        for offset in shift.offsets:
            pieces.append((grid[offset.queries] * tokens + grid[offset.keys]).ravel())
    order = np.concatenate(pieces).astype(np.int64)
    position = np.full(layout.num_queries * tokens, order.size, dtype=np.int64)
    position[order] = np.arange(order.size)
    return order, position


__all__ = [
    "CLASS_FROM_PATCH",
    "CLASS_TO_CLASS",
    "NUM_CLASS_ROWS",
    "PATCH_FROM_CLASS",
    "PairLayout",
    "StepLayout",
    "bank_layout",
]

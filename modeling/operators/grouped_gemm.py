"""Translution over pairs in few large operations of PyTorch: for GPUs that the CUDA kernels do not serve, and to time those against.

`grouped.py` starts some operations for every offset, which on a GPU takes longer than what they compute. Here an operation
serves a chunk of offsets: one grouped matrix product, one elementwise product, one sum. The signatures are those of
`reference.py`; the derivatives are those of `pair_autograd.py`.

Offsets with one column offset `y` are taken by row shift. A shift `s` of a grid of `H` rows brings together query row `u` and key
row `(u - s) mod H`: two offsets, `(s, y)` and `(s - H, y)`, and together every query row once. A chunk of consecutive shifts is
therefore dense, `[shifts, rows, columns, B]`: sums over the keys of a query are sums over its first axis, without atomics, and every
pair is there once. What it multiplies are groups of rows, one for each offset. In a text the second of those offsets looks
ahead and does not exist: groups are of one size, the rows of a chunk's first distance, and a few pairs more are computed, with weight 0.

The shifts of a chunk descend, so that the key rows of a shift begin one after those of the shift before: they are one strided view of
key rows that stand in memory twice, of a text after zeros. Sums over the queries of a key lay the rows out in the same way.

Memory: `CHUNK_BYTES` for what a chunk projects and for its matrices, a few times that in all, and a few times the tokens; nothing of size
`[B, L, L, C']`. Scores and probabilities exist twice, with pairs first and with heads first.

Legend: `B` batch, `L` tokens, `A` heads of queries, `e` bank output size per head, `H` rows of the grid, `w` columns of a column shift,
`K` shifts of a chunk, `N` query rows times `w·B`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from .class_token import add_class_gradients, add_class_values, write_class_scores
from .heads import groups_of
from .offset_blocks import columns_of, tokens_first
from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import ColumnShift, PairLayout


# What one tensor of a chunk takes, be it rows or matrices. A single shift may take more: as much as the tokens, or two matrices.
CHUNK_BYTES = 1 << 25
# A grouped product of PyTorch takes fewer than 1,024 groups, and a shift has two.
MAX_SHIFTS = 256
# Text: a chunk has at most its number of query rows divided by this many shifts, so that few of its pairs do not exist.
ROWS_PER_SHIFT = 8


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive row shifts of a column shift, `last` to `first`, with the query rows `start` to `start + num_rows` of the grid.

    `rows` and `reverse_rows` are what each group of pairs uses of the banks of keys and values, and of queries; `sizes` counts the
    query rows of each.
    """

    first: int
    last: int
    start: int
    num_rows: int
    rows: tuple[int, ...]
    reverse_rows: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_shifts(self) -> int:
        return self.last - self.first + 1


@lru_cache(maxsize=64)
def chunks(
    layout: PairLayout, row_bytes: int, matrix_bytes: int, chunk_bytes: int
) -> tuple[tuple[ColumnShift, tuple[Chunk, ...]], ...]:
    """The chunks of each column shift.

    Args:
        layout: the pairs.
        row_bytes: what a token of all batch entries takes.
        matrix_bytes: what the matrix of an offset takes.
        chunk_bytes: the most that the rows of a chunk may take, and that its matrices may; a single shift may take more.
    """
    made = []
    for shift in layout.column_shifts():
        offsets = {offset.row_offset: offset for offset in shift.offsets}
        of_shift, first, num_shifts = [], 0, layout.num_distances
        while first < num_shifts:
            start = max(first, layout.past) if layout.causal else 0
            num_rows = layout.height - start
            matrices = matrix_bytes if layout.causal else 2 * matrix_bytes
            fitting = chunk_bytes // max(num_rows * shift.num_columns * row_bytes, matrices, 1)
            if layout.causal:
                fitting = min(fitting, num_rows // ROWS_PER_SHIFT)
            last = min(first + min(max(fitting, 1), MAX_SHIFTS), num_shifts) - 1
            groups = []
            for step in range(last, first - 1, -1):
                if layout.causal:
                    groups.append((offsets[step], num_rows))
                    continue
                if step > 0:
                    groups.append((offsets[step - layout.height], step))
                groups.append((offsets[step], layout.height - step))
            rows = tuple(offset.row for offset, _ in groups)
            reverse_rows = tuple(offset.reverse_row for offset, _ in groups)
            of_shift.append(Chunk(first, last, start, num_rows, rows, reverse_rows, tuple(size for _, size in groups)))
            first = last + 1
        made.append((shift, tuple(of_shift)))
    return tuple(made)


class _Groups:
    """The rows of a chunk as groups, and products of each with a matrix of its own."""

    def __init__(self, layout: PairLayout, device: torch.device):
        self.layout, self.device = layout, device
        self.all_ends: Tensor | None = None

    def start_shift(self, shift: ColumnShift, batch: int) -> None:
        self.rows_of_one = shift.num_columns * batch
        self.ends_of_shift: Tensor | None = None

    def start_chunk(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.sizes = [size * self.rows_of_one for size in chunk.sizes]
        self.are_even = len(set(self.sizes)) == 1 and len(self.sizes) == chunk.num_shifts
        self.ends: Tensor | None = None

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """`[K, N, in]` times a matrix of each group, `[groups, in, out]`: `[K, N, out]`."""
        if self.are_even:
            return torch.bmm(rows, matrices)
        flat = rows.reshape(-1, rows.shape[-1])
        if has_grouped_product(flat, matrices):
            projected = torch.nn.functional.grouped_mm(flat, matrices, offs=self._ends())
        else:
            projected = flat.new_empty(len(flat), matrices.shape[-1])
            outs = projected.split(self.sizes)
            for part, matrix, out in zip(flat.split(self.sizes), matrices.unbind(), outs, strict=True):
                torch.mm(part, matrix, out=out)
        return projected.view(*rows.shape[:2], matrices.shape[-1])

    def outer_product(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """`[K, N, in]` transposed times `[K, N, out]`, of each group: `[groups, in, out]`."""
        if self.are_even:
            return torch.bmm(rows.transpose(1, 2), gradients)
        flat, gradients = rows.reshape(-1, rows.shape[-1]), gradients.flatten(0, 1)
        if has_grouped_product(flat, gradients):
            return torch.nn.functional.grouped_mm(flat.t(), gradients, offs=self._ends())
        product = flat.new_empty(len(self.sizes), flat.shape[-1], gradients.shape[-1])
        parts = (flat.split(self.sizes), gradients.split(self.sizes), product.unbind())
        for part, gradient, out in zip(*parts, strict=True):
            torch.mm(part.t(), gradient, out=out)
        return product

    def _ends(self) -> Tensor:
        """Where each group ends, made on the device: to copy `sizes` there would wait for what it is doing."""
        if self.all_ends is None:
            # In query rows, of all shifts in one. The shift 0 turns nothing around and has one group.
            height, options = self.layout.height, {"dtype": torch.int32, "device": self.device}
            starts = torch.arange(height, **options) * height
            steps = torch.arange(height - 1, -1, -1, **options)
            ends = torch.stack((starts + steps, starts + height), dim=1).flatten()
            self.all_ends = torch.cat((ends[:-2], ends[-1:]))
        if self.ends_of_shift is None:
            self.ends_of_shift = self.all_ends * self.rows_of_one
        if self.ends is None:
            before = self.layout.height - 1 - self.chunk.last
            ends = self.ends_of_shift[2 * before : 2 * before + len(self.sizes)]
            self.ends = ends - before * self.layout.height * self.rows_of_one
        return self.ends


def has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` computes these on the GPU at once, and not by one product after the other."""
    return (
        left.is_cuda
        and left.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(left.device)[0] in (9, 10)
        # Rows of 16 bytes.
        and left.shape[-1] % 8 == right.shape[-1] % 8 == 0
    )


class _Side:
    """One side of the pairs: tokens `[L, B, in]`, bank, and the gradients of both.

    Args:
        shape: of the features that a projection has, `[heads, heads of queries for each or 1, e]`.
    """

    def __init__(
        self,
        tokens: Tensor,
        bank: Tensor | None,
        layout: PairLayout,
        is_query: bool,
        shape: tuple[int, int, int],
        groups: _Groups,
    ):
        self.groups = groups
        self.tokens, self.bank, self.layout, self.is_query, self.shape = tokens, bank, layout, is_query, shape
        self.batch, self.size = tokens.shape[1:]
        self.wide = accumulation_dtype(tokens.dtype)
        # Key rows before the first one: what a shift turns around, or zeros.
        self.num_before = 0 if is_query else layout.height // ROWS_PER_SHIFT if layout.causal else layout.height
        self.all_matrices = None if bank is None else bank.unbind(0)

    def start_gradients(self) -> None:
        self.token_gradient = torch.zeros_like(self.tokens, dtype=self.wide)
        self.bank_gradient = None
        if self.bank is not None:
            dtype = self.wide if self.layout.clamp else self.bank.dtype
            self.bank_gradient = torch.zeros_like(self.bank, dtype=dtype, memory_format=torch.contiguous_format)
            self.matrix_gradients = self.bank_gradient.unbind(0)

    def start_shift(self, shift: ColumnShift, gradients: bool = False) -> None:
        self.columns = shift.queries if self.is_query else shift.keys
        self.rows_of_one = shift.num_columns * self.batch
        self.rows = columns_of(self.tokens, self.layout, self.columns)
        if self.num_before:
            num_before = self.num_before * self.rows_of_one
            before = self.rows.new_zeros(num_before, self.size) if self.layout.causal else self.rows
            self.rows = torch.cat((before, self.rows))
        if gradients:
            self.row_gradient = torch.zeros_like(self.rows, dtype=self.wide)

    def end_shift(self) -> None:
        gradient = self.row_gradient
        if self.num_before:
            before, gradient = gradient.tensor_split([self.num_before * self.rows_of_one])
            if not self.layout.causal:
                gradient += before
        own = self.token_gradient[int(self.layout.class_token) :].unflatten(0, (-1, self.layout.width))
        own = own[:, self.columns]
        own += gradient.view(own.shape)

    def start_chunk(self, chunk: Chunk) -> None:
        """Takes the rows of each shift, `[K, N, in]`, a view, and the matrices of its groups."""
        self.chunk = chunk
        num_rows = chunk.num_rows * self.rows_of_one
        if self.is_query:
            begin = (chunk.start - self.layout.past) * self.rows_of_one
            self.place = slice(begin, begin + num_rows)
            self.chosen = self.rows[self.place].expand(chunk.num_shifts, -1, -1)
        else:
            begin = (self.num_before + chunk.start - chunk.last) * self.rows_of_one
            self.place = slice(begin, begin + (chunk.num_rows + chunk.num_shifts - 1) * self.rows_of_one)
            strides = (self.rows_of_one * self.size, self.size, 1)
            shape = (chunk.num_shifts, num_rows, self.size)
            self.chosen = self.rows.as_strided(shape, strides, begin * self.size)
        if self.bank is not None:
            self.bank_rows = chunk.reverse_rows if self.is_query else chunk.rows
            self.matrices = torch.stack([self.all_matrices[row] for row in self.bank_rows])

    def project(self) -> Tensor:
        """What the rows bring to their pairs, `[K, N, heads, groups or 1, e]`; not to be changed."""
        projected = self.chosen if self.bank is None else self.groups.product(self.chosen, self.matrices)
        return projected.unflatten(-1, self.shape)

    def project_times(self, factors: Tensor) -> Tensor:
        """`project` times numbers, where it lies if it is not the tokens themselves and is not to be repeated."""
        projected = self.project()
        grows = torch.broadcast_shapes(projected.shape, factors.shape) != projected.shape
        return projected * factors if self.bank is None or grows else projected.mul_(factors)

    def accumulate(self, gradient: Tensor) -> None:
        """Adds the gradient of `project` to those of the tokens and the bank."""
        gradient = gradient.flatten(2)
        if self.bank is not None:
            self._add_to_bank(self.groups.outer_product(self.chosen, gradient))
            gradient = self.groups.product(gradient, self.matrices.transpose(1, 2))
        self.add_to_tokens(gradient)

    def _add_to_bank(self, parts: Tensor) -> None:
        targets = [self.matrix_gradients[row] for row in self.bank_rows]
        if not self.layout.clamp:
            # Each is the only offset of its matrix.
            torch._foreach_copy_(targets, list(parts.unbind()))
            return
        for target, part in zip(targets, parts.unbind(), strict=True):
            target += part

    def add_to_tokens(self, parts: Tensor) -> None:
        """Sums `[K, N, in]` over the shifts of each row."""
        if not self.is_query:
            num_shifts, step = len(parts), self.rows_of_one * self.size
            num_rows = self.chunk.num_rows
            apart = parts.new_zeros(num_shifts, num_rows + num_shifts - 1, step)
            # A shift further, a row further.
            strides = (apart.stride(0) + step, step, 1)
            apart.as_strided((num_shifts, num_rows, step), strides).copy_(parts.view(num_shifts, num_rows, step))
            parts = apart.view(num_shifts, (num_rows + num_shifts - 1) * self.rows_of_one, self.size)
        target = self.row_gradient[self.place]
        target += parts.sum(0, dtype=self.wide)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the tokens, `[B, L, in]`, and of the bank."""
        token_gradient = self.token_gradient.transpose(0, 1).to(self.tokens.dtype).contiguous()
        if self.bank_gradient is None:
            return token_gradient, self.tokens.new_empty(0)
        return token_gradient, self.bank_gradient.to(self.bank.dtype)


class _Square:
    """A number for each pair, batch entry and head with pairs first, `[queries, L, B·A]`, read and written a chunk at a time."""

    def __init__(self, numbers: Tensor, layout: PairLayout, num_heads: int):
        self.numbers, self.layout, self.num_heads = numbers, layout, num_heads
        device, height = numbers.device, layout.height
        self.rows = torch.arange(height, device=device)
        # What lies before the first key row: it is turned around, and in a text does not exist.
        before = torch.arange(-height, height, device=device)
        self.keys, self.is_missing = before.remainder(height), before < 0

    def start_shift(self, shift: ColumnShift) -> None:
        """Takes the pairs with a column offset, `[query rows, key rows, w, B·A]`, a view."""
        first, width = int(self.layout.class_token), self.layout.width
        grid = self.numbers[first:, first:].unflatten(1, (-1, width)).unflatten(0, (-1, width))
        # Of text, key columns and query columns are one, and their rows are as many as keys and queries.
        self.pairs = grid.diagonal(shift.keys.start - shift.queries.start, 1, 3).movedim(-1, 2)

    def start_chunk(self, chunk: Chunk) -> None:
        # A shift less, a key row more.
        window = ((chunk.num_shifts, chunk.num_rows), (1, 1), self.layout.height + chunk.start - chunk.last)
        keys = self.keys.as_strided(*window)
        begin = chunk.start - self.layout.past
        self.place = self.rows[begin : begin + chunk.num_rows].expand_as(keys), keys
        self.missing = self.is_missing.as_strided(*window)[:, :, None, None] if self.layout.causal else None

    def read(self) -> Tensor:
        """`[K, N, A]`, 0 where there is no pair."""
        numbers = self.pairs[self.place]
        if self.missing is not None:
            numbers.masked_fill_(self.missing, 0)
        return numbers.unflatten(-1, (numbers.shape[-1] // self.num_heads, self.num_heads)).flatten(1, 3)

    def write(self, numbers: Tensor) -> None:
        """Writes `[K, N, A]`, 0 where there is no pair."""
        numbers = numbers.view(*self.place[0].shape, *self.pairs.shape[2:])
        if self.missing is not None:
            numbers = numbers.masked_fill_(self.missing, 0)
        self.pairs[self.place] = numbers


def _pairs_first(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, A, queries, L]` to `[queries, L, B·A]`."""
    return pairs.flatten(0, 1).permute(1, 2, 0).to(dtype).contiguous()


def _sides(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    num_heads: int,
    groups: int,
    layout: PairLayout,
) -> tuple[_Side, _Side]:
    """Queries and keys, with the groups that their rows are in."""
    of_rows = _Groups(layout, query.device)
    shared = num_heads // groups
    width = (key if key_bank is None else key_bank).shape[-1] // shared
    first = tokens_first(query)
    return (
        _Side(first, query_bank, layout, True, (shared, groups, width), of_rows),
        _Side(first if key is query else tokens_first(key), key_bank, layout, False, (shared, 1, width), of_rows),
    )


def _chunks(sides: Sequence[_Side], layout: PairLayout) -> tuple[tuple[ColumnShift, tuple[Chunk, ...]], ...]:
    """The chunks for the widest rows of these sides, and for the larger of their matrices."""
    widest = max(max(side.size, prod(side.shape)) for side in sides)
    largest = max(0 if side.bank is None else prod(side.bank.shape[1:]) for side in sides)
    element = sides[0].tokens.element_size()
    return chunks(layout, sides[0].batch * widest * element, largest * element, CHUNK_BYTES)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = sides = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    batch, wide = len(query), accumulation_dtype(query.dtype)
    # A causal layout lacks pairs, and their scores are 0. All others are written.
    allocate = query.new_zeros if layout.causal else query.new_empty
    square = _Square(allocate(layout.num_queries, layout.num_tokens, batch * num_heads, dtype=wide), layout, num_heads)
    for shift, parts in _chunks(sides, layout):
        query_side.groups.start_shift(shift, batch)
        for one in (*sides, square):
            one.start_shift(shift)
        for chunk in parts:
            for one in (query_side.groups, query_side, key_side, square):
                one.start_chunk(chunk)
            one, other = (key_side, query_side) if query_bank is None else (query_side, key_side)
            product = one.project_times(other.project())
            square.write(product.sum(-1, dtype=wide).flatten(2))
    scores = square.numbers.permute(2, 0, 1).contiguous().unflatten(0, (batch, num_heads))
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
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = sides = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    square = _Square(_pairs_first(gradient, query.dtype), layout, num_heads)
    # The gradient of one side needs the projections of the other.
    needed = [(side, need) for side, need in zip(sides, (need_query, need_key), strict=True)]
    for side, need in needed:
        if need:
            side.start_gradients()
    for shift, parts in _chunks(sides, layout):
        square.start_shift(shift)
        query_side.groups.start_shift(shift, query_side.batch)
        for side, need in needed:
            side.start_shift(shift, need)
        for chunk in parts:
            for one in (query_side.groups, query_side, key_side, square):
                one.start_chunk(chunk)
            weights = square.read().unflatten(-1, (key_side.shape[0], groups, 1))
            if need_query:
                query_side.accumulate(key_side.project_times(weights))
            if need_key:
                received = query_side.project_times(weights)
                key_side.accumulate(received.sum(3, keepdim=True) if groups > 1 else received)
        for side, need in needed:
            if need:
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
    batch, num_heads = probabilities.shape[:2]
    features, own_heads = value_bank.shape[-1] * groups, num_heads // groups
    size, of_rows = features // num_heads, _Groups(layout, value.device)
    key_side = _Side(tokens_first(value), value_bank, layout, False, (own_heads, 1, size), of_rows)
    # Where the sums of a query are added up.
    output = value.new_empty(layout.num_queries, batch, features)
    query_side = _Side(output, None, layout, True, (own_heads, groups, size), of_rows)
    query_side.start_gradients()
    square = _Square(_pairs_first(probabilities, value.dtype), layout, num_heads)
    for shift, parts in _chunks((key_side, query_side), layout):
        square.start_shift(shift)
        query_side.groups.start_shift(shift, query_side.batch)
        key_side.start_shift(shift)
        query_side.start_shift(shift, True)
        for chunk in parts:
            for one in (query_side.groups, query_side, key_side, square):
                one.start_chunk(chunk)
            weights = square.read().unflatten(-1, (own_heads, groups, 1))
            query_side.accumulate(key_side.project_times(weights))
        query_side.end_shift()
    output = query_side.token_gradient.transpose(0, 1)
    add_class_values(output, probabilities, value, value_bank, layout)
    return output.to(value.dtype).contiguous()


pair_scores, pair_values = register_pair_operators("gemm_", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

"""The pairs of a grid, a block of offsets at a time: how the two sides of such pairs are read and accumulated.

Tokens come first here, `[L, B, C]`, so that the rows of a grid are one block of memory and a rectangle of full columns needs no
copy. All pairs of an offset share a matrix, so that their projections are one matrix product over a rectangle of the grid. A block
is as many offsets as stay in a processor's cache, and enough that starting an operation does not count.

Where heads of queries share one of keys, a matrix is as wide as the keys' heads are. What it projects is repeated for the heads that
share it an offset at a time, and their gradients are summed before they meet the matrix.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `w` columns of a shift, `n` pairs of an offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .heads import groups_of, repeat_features, sum_groups
from .pair_autograd import accumulation_dtype
from .pair_layout import ColumnShift, OffsetPairs, PairLayout


# Elements of one projection kept at a time. What is done to it next finds it in a processor's cache.
WORKSPACE_ELEMENTS = 1 << 18
# Heads narrower than this are summed, or given their weight, by a matrix product with ones: PyTorch's own loops over so few
# elements spend their time on starting.
NARROW = 33


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive offsets of a shift.

    `sizes` and `num_rows` count `B` pairs as `B` rows, for each offset and together. `queries` and `keys` are where the
    tokens of each offset begin in the columns of the shift, and how many rows they are.
    """

    offsets: tuple[OffsetPairs, ...]
    num_rows: int
    sizes: list[int]
    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]


def blocks(shift: ColumnShift, batch: int, features: int) -> tuple[Block, ...]:
    """The offsets of a shift in blocks whose projections, `features` wide, fit the workspace."""
    return _blocks(shift, batch, max(WORKSPACE_ELEMENTS // max(features, 1), 1))


@lru_cache(maxsize=1024)
def _blocks(shift: ColumnShift, batch: int, most_rows: int) -> tuple[Block, ...]:
    made, offsets, num_rows = [], [], 0
    step = shift.num_columns * batch
    for offset in shift.offsets:
        size = offset.num_rows * step
        if offsets and num_rows + size > most_rows:
            made.append(_block(offsets, step))
            offsets, num_rows = [], 0
        offsets.append(offset)
        num_rows += size
    return (*made, _block(offsets, step)) if offsets else ()


def _block(offsets: list[OffsetPairs], step: int) -> Block:
    sizes = [offset.num_rows * step for offset in offsets]
    return Block(
        tuple(offsets),
        sum(sizes),
        sizes,
        tuple((offset.queries[0].start * step, size) for offset, size in zip(offsets, sizes, strict=True)),
        tuple((offset.keys[0].start * step, size) for offset, size in zip(offsets, sizes, strict=True)),
    )


def workspace(layout: PairLayout, batch: int, features: int, like: Tensor) -> Tensor:
    """Room for the projections of any block, `[rows, features]`."""
    shifts = layout.column_shifts()
    rows = max((block.num_rows for shift in shifts for block in blocks(shift, batch, features)), default=0)
    return like.new_empty(rows, features)


def tokens_first(tensor: Tensor) -> Tensor:
    """`[B, L, C]` to `[L, B, C]`."""
    return tensor.transpose(0, 1).contiguous()


def _grid(tokens: Tensor, layout: PairLayout) -> Tensor:
    """The tokens of the grid, `[rows, W, B, C]`."""
    return tokens[int(layout.class_token) :].unflatten(0, (-1, layout.width))


def columns_of(tokens: Tensor, layout: PairLayout, columns: slice) -> Tensor:
    """Some columns of the grid's tokens, `[rows·w·B, C]`, contiguous: a copy only where they are not all columns."""
    return _grid(tokens, layout)[:, columns].flatten(0, 2).contiguous()


def put_columns(tokens: Tensor, changed: Tensor, layout: PairLayout, columns: slice) -> None:
    """Writes changed columns back, where `columns_of` had to copy them."""
    part = _grid(tokens, layout)[:, columns]
    if part.data_ptr() != changed.data_ptr():
        part.copy_(changed.view(part.shape))


def at(columns: Tensor, places: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """The rows of each offset."""
    return [columns.narrow(0, start, size) for start, size in places]


# The targets are rows that may overlap.
def add_each(targets: list[Tensor], parts: list[Tensor]) -> None:
    """Adds each part to its target, one after the other."""
    if _in_turn(targets, parts):
        torch._foreach_add_(targets, parts)
    else:
        for target, part in zip(targets, parts, strict=True):
            target += part


def add_weighted_each(targets: list[Tensor], parts: list[Tensor], weights: list[Tensor]) -> None:
    """Adds each part times its weight to its target, one after the other."""
    if _in_turn(targets, parts):
        torch._foreach_addcmul_(targets, parts, weights)
    else:
        for target, part, weight in zip(targets, parts, weights, strict=True):
            target += part * weight


def maximum_each(targets: list[Tensor], parts: list[Tensor]) -> None:
    """Sets each target to the larger of it and its part, one after the other."""
    if _in_turn(targets, parts):
        torch._foreach_maximum_(targets, parts)
    else:
        for target, part in zip(targets, parts, strict=True):
            torch.maximum(target, part, out=target)


def _in_turn(targets: Sequence[Tensor], parts: Sequence[Tensor]) -> bool:
    """Whether one call for these lists takes them one after the other. A GPU computes them at once, and what overlaps gets lost."""
    return targets[0].device.type == "cpu" and targets[0].dtype == parts[0].dtype


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
        """`<q_ij, k_ij>` per head of the offsets of a block, from `[n·B, A·e]` each, to `out`, `[rows, A]`.

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

    Its projections have `A` heads, and so have the gradients that it takes, whatever the bank has.

    Args:
        tokens: `[L, B, in]`, contiguous.
        bank: `[num_offsets, in, A / groups · e]`; `None` where the tokens are projections already.
        is_query: whether this is the side of the queries, which use the bank's rows of the reverse offsets.
        num_heads: `A`, where `groups` is not 1.
        groups: heads that share one of the bank or of the plain projections, one after the other.
    """

    def __init__(
        self,
        tokens: Tensor,
        bank: Tensor | None,
        layout: PairLayout,
        is_query: bool,
        num_heads: int = 1,
        groups: int = 1,
    ):
        if bank is None:
            # Projections are as many as tokens: repeated once, they are read as if there were no groups.
            tokens = repeat_features(tokens, num_heads, groups)
        self.tokens, self.bank, self.layout, self.is_query = tokens, bank, layout, is_query
        self.num_heads, self.groups = num_heads, groups
        self.matrices = None if bank is None else bank.unbind(0)
        self.features = tokens.shape[-1] if bank is None else bank.shape[-1] * groups
        self.batch = tokens.shape[1]
        self.shares_matrices = bank is not None and groups > 1
        if self.shares_matrices:
            # For the projections of one offset, or their gradients, by the bank's own heads.
            self.room = tokens.new_empty(tokens.shape[0] * self.batch, bank.shape[-1])

    def _in_groups(self, rows: Tensor) -> Tensor:
        """`[n, A·e]` or `[n, A / groups · e]` as `[n, A / groups, groups or 1, e]`."""
        return rows.unflatten(-1, (self.num_heads // self.groups, -1, self.features // self.num_heads))

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
        self.place = (self.layout, shift.queries if self.is_query else shift.keys)
        shared = like is not None and like.tokens is self.tokens
        self.columns = like.columns if shared else columns_of(self.tokens, *self.place)
        if gradients:
            self.column_gradient = columns_of(self.token_gradient, *self.place)

    def end_shift(self) -> None:
        """Writes gradients back."""
        put_columns(self.token_gradient, self.column_gradient, *self.place)

    def places(self, block: Block) -> tuple[tuple[int, int], ...]:
        return block.queries if self.is_query else block.keys

    def rows(self, block: Block) -> list[Tensor]:
        """The tokens of each offset, `[n·B, in]`."""
        return at(self.columns, self.places(block))

    def gradient_rows(self, block: Block) -> list[Tensor]:
        """Where the gradient of each offset's tokens is added up."""
        return at(self.column_gradient, self.places(block))

    def bank_rows(self, block: Block) -> list[int]:
        """The row of the bank that each offset uses."""
        return [offset.reverse_row if self.is_query else offset.row for offset in block.offsets]

    def project(self, block: Block, outs: tuple[Tensor, ...]) -> list[Tensor]:
        """The projections of each offset, `[n·B, A·e]`, in `outs`, or as they are where there is no bank."""
        rows = self.rows(block)
        if self.bank is None:
            return rows
        for row, tokens, out in zip(self.bank_rows(block), rows, outs, strict=True):
            if self.shares_matrices:
                projected = torch.mm(tokens, self.matrices[row], out=self.room[: len(tokens)])
                self._in_groups(out).copy_(self._in_groups(projected))
            else:
                torch.mm(tokens, self.matrices[row], out=out)
        return list(outs)

    def accumulate(self, block: Block, gradients: tuple[Tensor, ...]) -> None:
        """Adds the gradients of each offset's projections to those of the tokens and the bank."""
        targets = self.gradient_rows(block)
        if self.bank is None:
            add_each(targets, gradients)
            return
        for row, tokens, target, gradient in zip(
            self.bank_rows(block), self.rows(block), targets, gradients, strict=True
        ):
            if self.shares_matrices:
                summed = self.room[: len(gradient)]
                torch.sum(self._in_groups(gradient), 2, keepdim=True, out=self._in_groups(summed))
                gradient = summed
            self._add_to_matrix(row, tokens, gradient)
            _add_product(target, gradient, self.matrices_across[row])

    def _add_to_matrix(self, row: int, tokens: Tensor, gradient: Tensor) -> None:
        if self.writes_once:
            torch.mm(tokens.t(), gradient, out=self.matrix_gradients[row])
        else:
            _add_product(self.matrix_gradients[row], tokens.t(), gradient)

    def project_tokens(self, tokens: slice, row: int) -> Tensor:
        """Projection of a few tokens by one matrix, `[tokens, B, A·e]`: the pairs of a class token."""
        chosen = self.tokens[tokens]
        if self.bank is None:
            return chosen
        return repeat_features(chosen @ self.matrices[row], self.num_heads, self.groups)

    def accumulate_tokens(self, tokens: slice, row: int, gradient: Tensor) -> None:
        if self.bank is None:
            self.token_gradient[tokens] += gradient
        else:
            flat = sum_groups(gradient, self.num_heads, self.groups).flatten(0, 1)
            self._add_to_matrix(row, self.tokens[tokens].flatten(0, 1), flat)
            _add_product(self.token_gradient[tokens].flatten(0, 1), flat, self.matrices_across[row])

    def gradients(self) -> tuple[Tensor, Tensor]:
        token_gradient = self.token_gradient
        if self.bank is None:
            token_gradient = sum_groups(token_gradient, self.num_heads, self.groups)
        token_gradient = token_gradient.transpose(0, 1).to(self.tokens.dtype).contiguous()
        if self.bank_gradient is None:
            return token_gradient, self.tokens.new_empty(0)
        return token_gradient, self.bank_gradient.to(self.bank.dtype)


def make_sides(
    tensors: tuple[Tensor, ...], banks: tuple[Tensor | None, ...], num_heads: int, layout: PairLayout
) -> list[Side]:
    """The sides of queries, keys and, where they are given, values, from `[B, L, in]`.

    Keys and values have as many heads as their widths say; all heads are of one size.
    """
    arranged: list[Tensor] = []
    for place, tensor in enumerate(tensors):
        # One input of several banks is arranged once.
        is_last = place > 0 and tensor is tensors[place - 1]
        arranged.append(arranged[-1] if is_last else tokens_first(tensor))
    return [
        Side(tokens, bank, layout, place == 0, num_heads, groups_of(arranged[0], tokens, banks[0], bank))
        for place, (tokens, bank) in enumerate(zip(arranged, banks, strict=True))
    ]


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    else:
        target += left @ right


__all__ = [
    "Block",
    "Heads",
    "Side",
    "add_each",
    "add_weighted_each",
    "at",
    "blocks",
    "columns_of",
    "make_sides",
    "maximum_each",
    "put_columns",
    "tokens_first",
    "workspace",
]

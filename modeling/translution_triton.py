"""Translution over pairs as Triton kernels: the path for GPUs.

The signatures are those of `translution_reference.py`; the derivatives are those of `pair_autograd.py`. Four kernels serve every
variant. Each program writes what no other writes, so there are no atomics, and results do not change between runs:

- `_scores_kernel` owns some pairs of one offset: one or two matrix products, multiplied and summed by head;
- `_sum_kernel` owns some tokens: the weighted sum over all their pairs of the other token's projection;
- `_token_gradient_kernel` owns some tokens: what comes back through their own bank;
- `_bank_gradient_kernel` owns a tile of one offset's matrix: the sum over that offset's pairs.

Projections live in registers. No tensor holds an element per pair and feature, and there is no matrix per pair. A class token has
`2L - 1` of the `L²` pairs, in three matrices: those are ordinary products (`class_pairs.py`).

Inside this file text is a grid of one row: the distance is a column offset. `d = receiver - giver` is the offset of a pair.

Legend: `B` batch, `L` tokens, `A` heads, `C` bank input size, `e` bank output size per head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .class_pairs import add_class_gradients, add_class_values, write_class_scores
from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import PairLayout
from .triton_launch import dot_precision, launch, next_power_of_2


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


class _Geometry(NamedTuple):
    """A layout in the numbers that the kernels take; see `_bank_row` and `_pairs_of_offset`."""

    height: int
    width: int
    first: int  # index of the grid's first token
    past: int  # tokens that do not receive
    least: int  # smallest column offset
    most: int  # largest column offset
    reach_x: int
    reach_y: int
    stride_x: int  # bank rows from one row offset to the next
    base_y: int  # bank row of the column offset 0
    query_sign: int  # a query's matrix is the one of the reverse offset, in text that of the distance


def _geometry(layout: PairLayout) -> _Geometry:
    if layout.causal:
        last = layout.num_distances - 1
        return _Geometry(1, layout.height, 0, layout.past, 0, last, 0, layout.bank_height - 1, 0, 0, 1)
    reach_x, reach_y = layout.bank_height - 1, layout.bank_width - 1
    first, edge = int(layout.class_token), layout.width - 1
    return _Geometry(
        layout.height, layout.width, first, 0, -edge, edge, reach_x, reach_y, 2 * reach_y + 1, reach_y, -1
    )


# Lengths must not be compiled in: each new one would compile again.
_GEOMETRY = list(_Geometry._fields)
_jit = triton.jit(do_not_specialize=[*_GEOMETRY, "batch"])


@triton.jit
def _bank_row(dx, dy, sign, reach_x, reach_y, stride_x, base_y):
    """Bank row of an offset, clamped; of the reverse offset where `sign` is -1. In 64 bits: banks can be large."""
    x = tl.minimum(tl.maximum(sign * dx, -reach_x), reach_x)
    y = tl.minimum(tl.maximum(sign * dy, -reach_y), reach_y)
    return ((x + reach_x) * stride_x + y + base_y).to(tl.int64)


@triton.jit
def _pairs_of_offset(rows, dx, dy, batch, height, width, first, past):
    """Batch entry, receiver and giver of the pairs of an offset, numbered by grid row, column and batch, and which exist."""
    first_x, first_y = tl.maximum(dx, 0), tl.maximum(dy, past)
    columns = tl.maximum(width + tl.minimum(dy, 0) - first_y, 0)
    count = (height - tl.abs(dx)) * columns * batch
    columns = tl.maximum(columns, 1)
    entry, pair = rows % batch, rows // batch
    x, y = first_x + pair // columns, first_y + pair % columns
    receiver = first + x * width + y - past
    giver = first + (x - dx) * width + y - dy
    return entry.to(tl.int64), receiver, giver, rows < count


@triton.jit
def _columns(block, num_heads, E: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """Columns of a block of heads, each padded to `WIDTH`, and which exist."""
    place = tl.arange(0, HEADS * WIDTH)
    head, inside = block * HEADS + place // WIDTH, place % WIDTH
    return head * E + inside, (inside < E) & (head < num_heads)


@triton.jit
def _load_heads(pointers, exists, block, num_heads, stride, HEADS: tl.constexpr):
    """One number a row and head, `[rows, HEADS]`."""
    head = block * HEADS + tl.arange(0, HEADS)
    return tl.load(
        pointers[:, None] + head[None, :] * stride, mask=exists[:, None] & (head < num_heads)[None, :], other=0.0
    )


@triton.jit
def _times_heads(tile, weight, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, HEADS·WIDTH]` times `[rows, HEADS]`."""
    rows: tl.constexpr = tile.shape[0]
    if HEADS == 1:
        return tile * weight
    return tl.reshape(tl.reshape(tile, (rows, HEADS, WIDTH)) * weight[:, :, None], (rows, HEADS * WIDTH))


@triton.jit
def _side_tile(
    tokens,
    exists,
    matrix,
    columns,
    column_exists,
    out_size,
    C: tl.constexpr,
    BANK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one side brings to its pairs, `[rows, columns]` in the wide type: its projection, or itself without a bank."""
    if BANK:
        tile = tl.zeros((tokens.shape[0], columns.shape[0]), WIDE)
        for start in range(0, C, BLOCK_C):
            inner = start + tl.arange(0, BLOCK_C)
            x = tl.load(tokens[:, None] + inner[None, :], mask=exists[:, None] & (inner < C)[None, :], other=0.0)
            w = tl.load(
                matrix + inner[:, None] * out_size + columns[None, :],
                mask=(inner < C)[:, None] & column_exists[None, :],
                other=0.0,
            )
            tile = tl.dot(x, w, tile, input_precision=PRECISION, out_dtype=WIDE)
    else:
        mask = exists[:, None] & column_exists[None, :]
        tile = tl.load(tokens[:, None] + columns[None, :], mask=mask, other=0.0).to(WIDE)
    return tile


@_jit
def _scores_kernel(
    scores,
    query,
    key,
    query_bank,
    key_bank,
    tiles,
    score_strides_b,
    score_strides_a,
    score_strides_i,
    query_strides_b,
    query_strides_l,
    key_strides_b,
    key_strides_l,
    num_heads,
    batch,
    height,
    width,
    first,
    past,
    least,
    most,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    query_sign,
    QUERY_C: tl.constexpr,
    KEY_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_BANK: tl.constexpr,
    KEY_BANK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    dx, dy, start = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows = start + tl.arange(0, ROWS)
    entry, receiver, giver, exists = _pairs_of_offset(rows, dx, dy, batch, height, width, first, past)
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    out_size = num_heads * E

    row = _bank_row(dx, dy, 1, reach_x, reach_y, stride_x, base_y)
    product = _side_tile(
        key + entry * key_strides_b + giver * key_strides_l,
        exists,
        key_bank + row * KEY_C * out_size,
        columns,
        column_exists,
        out_size,
        KEY_C,
        KEY_BANK,
        WIDE,
        BLOCK_C,
        PRECISION,
    )
    row = _bank_row(dx, dy, query_sign, reach_x, reach_y, stride_x, base_y)
    product *= _side_tile(
        query + entry * query_strides_b + receiver * query_strides_l,
        exists,
        query_bank + row * QUERY_C * out_size,
        columns,
        column_exists,
        out_size,
        QUERY_C,
        QUERY_BANK,
        WIDE,
        BLOCK_C,
        PRECISION,
    )
    by_head = tl.sum(tl.reshape(product, (ROWS, HEADS, WIDTH)), axis=2)
    head = block * HEADS + tl.arange(0, HEADS)
    place = entry * score_strides_b + receiver.to(tl.int64) * score_strides_i + giver
    tl.store(
        scores + place[:, None] + head[None, :] * score_strides_a,
        by_head,
        mask=exists[:, None] & (head < num_heads)[None, :],
    )


@triton.jit
def _own_tokens(tile, batch, width, BATCH: tl.constexpr, ROWS: tl.constexpr):
    """Grid row, first column, columns and batch entries of a program that owns tokens: `BATCH` entries of a few columns."""
    COLUMNS: tl.constexpr = ROWS // BATCH
    batches, blocks = tl.cdiv(batch, BATCH), tl.cdiv(width, COLUMNS)
    place = tl.arange(0, ROWS)
    entry = tile % batches * BATCH + place % BATCH
    tile = tile // batches
    first_y = tile % blocks * COLUMNS
    return tile // blocks, first_y, first_y + place // BATCH, entry


@triton.jit
def _column_offsets(
    first_y, width, past, least, most, RECEIVES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr
):
    """The first column offset that any of a program's own tokens has, and how many follow."""
    last_y = tl.minimum(first_y + ROWS // BATCH, width) - 1
    if RECEIVES:
        low, high = tl.maximum(least, first_y - width + 1), tl.minimum(most, last_y)
    else:
        low, high = tl.maximum(least, past - last_y), tl.minimum(most, width - 1 - first_y)
    return low, tl.maximum(high - low + 1, 0)


@triton.jit
def _others(x, y, own_exists, dx, dy, height, width, first, past, RECEIVES: tl.constexpr):
    """Of own tokens at `(x, y)`: receivers, givers, index of the other one, and which pairs exist."""
    if RECEIVES:
        other_x, other_y = x - dx, y - dy
        exists = own_exists & (other_y >= 0) & (other_y < width)
        giver = first + other_x * width + other_y
        receiver = first + x * width + y - past
        other = giver
    else:
        other_x, other_y = x + dx, y + dy
        exists = own_exists & (other_y >= past) & (other_y < width)
        giver = first + x * width + y
        receiver = first + other_x * width + other_y - past
        other = receiver
    return receiver, giver, other, exists


@_jit
def _sum_kernel(
    output,
    weights,
    tokens,
    bank,
    weight_strides_b,
    weight_strides_a,
    weight_strides_i,
    weight_strides_j,
    token_strides_b,
    token_strides_l,
    output_strides_b,
    output_strides_l,
    num_heads,
    sign,
    batch,
    height,
    width,
    first,
    past,
    least,
    most,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    query_sign,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    RECEIVES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`Σ w_ij · projection of the other token`, for own tokens that have no bank themselves."""
    block = tl.program_id(1)
    x, first_y, y, entry = _own_tokens(tl.program_id(0), batch, width, BATCH, ROWS)
    own_exists = (entry < batch) & (y < width)
    if RECEIVES:
        own_exists = own_exists & (y >= past)
    entry = entry.to(tl.int64)
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    out_size = num_heads * E
    low, count = _column_offsets(first_y, width, past, least, most, RECEIVES, BATCH, ROWS)
    low_x = x - height + 1 if RECEIVES else -x

    # One loop over offsets and slices of C, so that loads of the next offset overlap with the products of this one.
    SLICES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    total = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    product = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    for step in range(height * count * SLICES):
        offset, part = step // SLICES, step % SLICES
        dx, dy = low_x + offset // count, low + offset % count
        receiver, giver, other, exists = _others(x, y, own_exists, dx, dy, height, width, first, past, RECEIVES)
        row = _bank_row(dx, dy, sign, reach_x, reach_y, stride_x, base_y)
        inner = part * BLOCK_C + tl.arange(0, BLOCK_C)
        other_tokens = tl.load(
            tokens + (entry * token_strides_b + other * token_strides_l)[:, None] + inner[None, :],
            mask=exists[:, None] & (inner < C)[None, :],
            other=0.0,
        )
        matrix = tl.load(
            bank + row * C * out_size + inner[:, None] * out_size + columns[None, :],
            mask=(inner < C)[:, None] & column_exists[None, :],
            other=0.0,
        )
        product = tl.dot(other_tokens, matrix, product, input_precision=PRECISION, out_dtype=WIDE)
        if part == SLICES - 1:
            place = entry * weight_strides_b + receiver.to(tl.int64) * weight_strides_i + giver * weight_strides_j
            weight = _load_heads(weights + place, exists, block, num_heads, weight_strides_a, HEADS).to(WIDE)
            total += _times_heads(product, weight, HEADS, WIDTH)
            product = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    own = first + x * width + y
    if RECEIVES:
        own = own - past
    tl.store(
        output + (entry * output_strides_b + own * output_strides_l)[:, None] + columns[None, :],
        total,
        mask=own_exists[:, None] & column_exists[None, :],
    )


@_jit
def _token_gradient_kernel(
    output,
    weights,
    bank,
    others,
    other_bank,
    weight_strides_b,
    weight_strides_a,
    weight_strides_i,
    weight_strides_j,
    other_strides_b,
    other_strides_l,
    output_strides_b,
    output_strides_l,
    num_heads,
    sign,
    other_sign,
    batch,
    height,
    width,
    first,
    past,
    least,
    most,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    query_sign,
    C: tl.constexpr,
    OTHER_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    OTHER_BANK: tl.constexpr,
    RECEIVES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OTHER_BLOCK_C: tl.constexpr,
):
    """`Σ (w_ij · projection of the other token) W[o]ᵀ`, for own tokens and their bank."""
    x, first_y, y, entry = _own_tokens(tl.program_id(0), batch, width, BATCH, ROWS)
    own_exists = (entry < batch) & (y < width)
    if RECEIVES:
        own_exists = own_exists & (y >= past)
    entry = entry.to(tl.int64)
    out_size = num_heads * E
    inner = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    low, count = _column_offsets(first_y, width, past, least, most, RECEIVES, BATCH, ROWS)
    low_x = x - height + 1 if RECEIVES else -x

    blocks = tl.cdiv(num_heads, HEADS)
    total = tl.zeros((ROWS, BLOCK_C), WIDE)
    for step in range(height * count * blocks):
        offset, block = step // blocks, step % blocks
        dx, dy = low_x + offset // count, low + offset % count
        receiver, giver, other, exists = _others(x, y, own_exists, dx, dy, height, width, first, past, RECEIVES)
        columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
        row = _bank_row(dx, dy, other_sign, reach_x, reach_y, stride_x, base_y)
        tile = _side_tile(
            others + entry * other_strides_b + other * other_strides_l,
            exists,
            other_bank + row * OTHER_C * out_size,
            columns,
            column_exists,
            out_size,
            OTHER_C,
            OTHER_BANK,
            WIDE,
            OTHER_BLOCK_C,
            PRECISION,
        )
        place = entry * weight_strides_b + receiver.to(tl.int64) * weight_strides_i + giver * weight_strides_j
        weight = _load_heads(weights + place, exists, block, num_heads, weight_strides_a, HEADS).to(WIDE)
        row = _bank_row(dx, dy, sign, reach_x, reach_y, stride_x, base_y)
        matrix = tl.load(
            bank + row * C * out_size + inner[None, :] * out_size + columns[:, None],
            mask=(inner < C)[None, :] & column_exists[:, None],
            other=0.0,
        )
        scaled = _times_heads(tile, weight, HEADS, WIDTH).to(bank.dtype.element_ty)
        total = tl.dot(scaled, matrix, total, input_precision=PRECISION, out_dtype=WIDE)
    own = first + x * width + y
    if RECEIVES:
        own = own - past
    tl.store(
        output + (entry * output_strides_b + own * output_strides_l)[:, None] + inner[None, :],
        total,
        mask=own_exists[:, None] & (inner < C)[None, :],
    )


@_jit
def _bank_gradient_kernel(
    output,
    weights,
    tokens,
    others,
    other_bank,
    weight_strides_b,
    weight_strides_a,
    weight_strides_i,
    weight_strides_j,
    token_strides_b,
    token_strides_l,
    other_strides_b,
    other_strides_l,
    num_heads,
    sign,
    other_sign,
    batch,
    height,
    width,
    first,
    past,
    least,
    most,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    query_sign,
    C: tl.constexpr,
    OTHER_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    OTHER_BANK: tl.constexpr,
    RECEIVES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OTHER_BLOCK_C: tl.constexpr,
):
    """`Σ xᵀ (w_ij · projection of the other token)` over the pairs of one bank row."""
    row, block = tl.program_id(0), tl.program_id(2)
    inner = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    out_size = num_heads * E
    if CAUSAL:
        low_x, high_x = 0, 0
        low_y = row
        high_y = most if row == reach_y else row
    else:
        # In the bank of queries a row holds the reverse offset.
        x, y = row // stride_x - reach_x, row % stride_x - reach_y
        x, y = sign * x, sign * y
        low_x = 1 - height if x == -reach_x else x
        high_x = height - 1 if x == reach_x else x
        low_y = least if y == -reach_y else y
        high_y = most if y == reach_y else y
    low_x, high_x = tl.maximum(low_x, 1 - height), tl.minimum(high_x, height - 1)
    low_y, high_y = tl.maximum(low_y, least), tl.minimum(high_y, most)

    total = tl.zeros((BLOCK_C, HEADS * WIDTH), WIDE)
    for dx in range(low_x, high_x + 1):
        for dy in range(low_y, high_y + 1):
            first_y = tl.maximum(dy, past)
            count = (height - tl.abs(dx)) * tl.maximum(width + tl.minimum(dy, 0) - first_y, 0) * batch
            other_row = _bank_row(dx, dy, other_sign, reach_x, reach_y, stride_x, base_y)
            for start in range(0, count, ROWS):
                rows = start + tl.arange(0, ROWS)
                entry, receiver, giver, exists = _pairs_of_offset(rows, dx, dy, batch, height, width, first, past)
                own, other = giver, receiver
                if RECEIVES:
                    own, other = receiver, giver
                tile = _side_tile(
                    others + entry * other_strides_b + other * other_strides_l,
                    exists,
                    other_bank + other_row * OTHER_C * out_size,
                    columns,
                    column_exists,
                    out_size,
                    OTHER_C,
                    OTHER_BANK,
                    WIDE,
                    OTHER_BLOCK_C,
                    PRECISION,
                )
                place = entry * weight_strides_b + receiver.to(tl.int64) * weight_strides_i + giver * weight_strides_j
                weight = _load_heads(weights + place, exists, block, num_heads, weight_strides_a, HEADS).to(WIDE)
                own_tokens = tl.load(
                    tokens + (entry * token_strides_b + own * token_strides_l)[None, :] + inner[:, None],
                    mask=exists[None, :] & (inner < C)[:, None],
                    other=0.0,
                )
                scaled = _times_heads(tile, weight, HEADS, WIDTH).to(tokens.dtype.element_ty)
                total = tl.dot(own_tokens, scaled, total, input_precision=PRECISION, out_dtype=WIDE)
    tl.store(
        output + row.to(tl.int64) * C * out_size + inner[:, None] * out_size + columns[None, :],
        total,
        mask=(inner < C)[:, None] & column_exists[None, :],
    )


class _Side(NamedTuple):
    """One side of the pairs: its tokens `[B, tokens, in]`, its bank, how offsets sign its bank rows, whether it receives."""

    tokens: Tensor
    bank: Tensor | None
    sign: int
    receives: bool

    @property
    def in_size(self) -> int:
        return self.tokens.shape[-1]

    @property
    def bank_or_tokens(self) -> Tensor:
        """A pointer that a kernel may take, even where it does not read it."""
        return self.tokens if self.bank is None else self.bank


def _sides(query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, geometry: _Geometry):
    query, key = _rows(query), _rows(key)
    query_bank, key_bank = (None if bank is None else bank.contiguous() for bank in (query_bank, key_bank))
    return _Side(query, query_bank, geometry.query_sign, True), _Side(key, key_bank, 1, False)


def _rows(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_strides_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def _shape_of_heads(side: _Side, num_heads: int) -> dict[str, int]:
    size = (side.in_size if side.bank is None else side.bank.shape[-1]) // num_heads
    return {"E": size, "WIDTH": next_power_of_2(size)}


def _types(tokens: Tensor) -> dict[str, Any]:
    wide = tl.float64 if accumulation_dtype(tokens.dtype) == torch.float64 else tl.float32
    return {"WIDE": wide, "PRECISION": dot_precision(tokens)}


# Rows of a tile, columns, slice of the inner size, warps, stages: from a data centre's GPU to one with little shared memory.
_TILES = {
    2: ((128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 32, 4, 2), (32, 32, 32, 4, 2), (16, 16, 16, 2, 1)),
    4: ((64, 64, 32, 4, 3), (64, 32, 32, 4, 2), (32, 32, 16, 4, 2), (16, 16, 16, 2, 1)),
    8: ((32, 32, 16, 4, 1), (16, 16, 16, 2, 1)),
}


def _tiles(tokens: Tensor, in_size: int, num_heads: int, width: int) -> list[dict[str, int]]:
    """Tile sizes to try, largest first; a head is never split, and small problems get small tiles."""
    options = []
    for rows, columns, inner, warps, stages in _TILES[tokens.element_size()]:
        heads = min(max(columns // width, 1), next_power_of_2(num_heads))
        option = {
            "ROWS": rows,
            "HEADS": max(heads, 16 // width),
            "BLOCK_C": max(16, min(inner, next_power_of_2(in_size))),
            "num_warps": warps,
            "num_stages": stages,
        }
        if option not in options:
            options.append(option)
    return options


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _tile_table(geometry: _Geometry, batch: int, rows: int, device: torch.device) -> Tensor:
    """Row offset, column offset and first pair of every tile of `_scores_kernel`, `[tiles, 3]`."""
    dx = torch.arange(1 - geometry.height, geometry.height, device="cpu")
    dy = torch.arange(geometry.least, geometry.most + 1, device="cpu")
    dx, dy = (grid.flatten() for grid in torch.meshgrid(dx, dy, indexing="ij"))
    columns = geometry.width + dy.clamp(max=0) - dy.clamp(min=geometry.past)
    counts = (geometry.height - dx.abs()) * columns.clamp(min=0) * batch
    tiles = (counts + rows - 1) // rows
    offset = torch.arange(len(tiles), device="cpu").repeat_interleave(tiles)
    start = (torch.arange(len(offset), device="cpu") - (tiles.cumsum(0) - tiles)[offset]) * rows
    return torch.stack((dx[offset], dy[offset], start), dim=1).to(torch.int32).to(device)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    geometry = _geometry(layout)
    receiver, giver = _sides(query, key, query_bank, key_bank, geometry)
    batch = len(query)
    # A causal layout lacks pairs, and their scores are 0. All others are written.
    allocate = query.new_zeros if layout.causal else query.new_empty
    scores = allocate(batch, num_heads, layout.num_receivers, layout.num_tokens, dtype=accumulation_dtype(query.dtype))
    heads = _shape_of_heads(giver, num_heads)

    def grid(option: dict[str, int]) -> tuple[int, ...]:
        return len(_tile_table(geometry, batch, option["ROWS"], query.device)), -(-num_heads // option["HEADS"])

    if scores.numel():
        launch(
            _scores_kernel,
            grid,
            _tiles(query, max(receiver.in_size, giver.in_size), num_heads, heads["WIDTH"]),
            lambda option: {"tiles": _tile_table(geometry, batch, option["ROWS"], query.device)},
            scores=scores,
            query=receiver.tokens,
            key=giver.tokens,
            query_bank=receiver.bank_or_tokens,
            key_bank=giver.bank_or_tokens,
            **_strides("score", scores, "bai"),
            **_strides("query", receiver.tokens, "bl"),
            **_strides("key", giver.tokens, "bl"),
            num_heads=num_heads,
            batch=batch,
            **geometry._asdict(),
            QUERY_C=receiver.in_size,
            KEY_C=giver.in_size,
            QUERY_BANK=receiver.bank is not None,
            KEY_BANK=giver.bank is not None,
            **heads,
            **_types(query),
        )
    if layout.class_token:
        write_class_scores(scores, query, key, query_bank, key_bank, layout)
    return scores


def _own_tiles(geometry: _Geometry, batch: int, option: dict[str, int]) -> dict[str, int]:
    """How many batch entries a program takes: all that fit, beside as few neighbouring tokens as possible."""
    return {"BATCH": min(next_power_of_2(batch), option["ROWS"])}


def _num_own_tiles(geometry: _Geometry, batch: int, option: dict[str, int]) -> int:
    entries = _own_tiles(geometry, batch, option)["BATCH"]
    return geometry.height * -(-geometry.width * entries // option["ROWS"]) * -(-batch // entries)


def _sum(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Writes `Σ w_ij · projection of the other token` of the grid's own tokens to `output`, `[B, tokens, A·e]`."""
    batch, num_heads = weights.shape[:2]
    heads = _shape_of_heads(other, num_heads)
    launch(
        _sum_kernel,
        lambda option: (_num_own_tiles(geometry, batch, option), -(-num_heads // option["HEADS"])),
        _tiles(other.tokens, other.in_size, num_heads, heads["WIDTH"]),
        lambda option: _own_tiles(geometry, batch, option),
        output=output,
        weights=weights,
        tokens=other.tokens,
        bank=other.bank,
        **_strides("weight", weights, "baij"),
        **_strides("token", other.tokens, "bl"),
        **_strides("output", output, "bl"),
        num_heads=num_heads,
        sign=other.sign,
        batch=batch,
        **geometry._asdict(),
        C=other.in_size,
        RECEIVES=own.receives,
        **heads,
        **_types(other.tokens),
    )


def _token_gradient(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Writes `Σ (w_ij · projection of the other token) W[o]ᵀ` of the grid's own tokens to `output`, `[B, tokens, C]`."""
    batch, num_heads = weights.shape[:2]
    heads = _shape_of_heads(own, num_heads)
    launch(
        _token_gradient_kernel,
        lambda option: (_num_own_tiles(geometry, batch, option), -(-own.in_size // option["BLOCK_C"])),
        _gradient_tiles(own, other, num_heads, heads["WIDTH"]),
        lambda option: _own_tiles(geometry, batch, option),
        output=output,
        weights=weights,
        bank=own.bank,
        others=other.tokens,
        other_bank=other.bank_or_tokens,
        **_strides("weight", weights, "baij"),
        **_strides("other", other.tokens, "bl"),
        **_strides("output", output, "bl"),
        num_heads=num_heads,
        sign=own.sign,
        other_sign=other.sign,
        batch=batch,
        **geometry._asdict(),
        C=own.in_size,
        OTHER_C=other.in_size,
        OTHER_BANK=other.bank is not None,
        RECEIVES=own.receives,
        **heads,
        **_types(own.tokens),
    )


def _bank_gradient(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, layout: PairLayout) -> Tensor:
    """`Σ xᵀ (w_ij · projection of the other token)` for every bank row of the grid, in the bank's shape; class rows unwritten."""
    batch, num_heads = weights.shape[:2]
    heads = _shape_of_heads(own, num_heads)
    output = torch.empty_like(own.bank)
    launch(
        _bank_gradient_kernel,
        lambda option: (
            layout.num_grid_offsets,
            -(-own.in_size // option["BLOCK_C"]),
            -(-num_heads // option["HEADS"]),
        ),
        _gradient_tiles(own, other, num_heads, heads["WIDTH"]),
        lambda option: {},
        output=output,
        weights=weights,
        tokens=own.tokens,
        others=other.tokens,
        other_bank=other.bank_or_tokens,
        **_strides("weight", weights, "baij"),
        **_strides("token", own.tokens, "bl"),
        **_strides("other", other.tokens, "bl"),
        num_heads=num_heads,
        sign=own.sign,
        other_sign=other.sign,
        batch=batch,
        **geometry._asdict(),
        C=own.in_size,
        OTHER_C=other.in_size,
        OTHER_BANK=other.bank is not None,
        RECEIVES=own.receives,
        CAUSAL=layout.causal,
        **heads,
        **_types(own.tokens),
    )
    return output


def _gradient_tiles(own: _Side, other: _Side, num_heads: int, width: int) -> list[dict[str, int]]:
    """As `_tiles`; the own inner size is a side of the tile here, that of the other token's projection is looped over."""
    options = []
    for option in _tiles(own.tokens, other.in_size, num_heads, width):
        inner = max(16, min(option["HEADS"] * width, 128, next_power_of_2(own.in_size)))
        options.append(option | {"BLOCK_C": inner, "OTHER_BLOCK_C": option["BLOCK_C"]})
    return options


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
    geometry = _geometry(layout)
    receiver, giver = _sides(query, key, query_bank, key_bank, geometry)
    gradients = []
    for own, other, needed in ((receiver, giver, need_query), (giver, receiver, need_key)):
        if not needed:
            # Outputs of an operator must not share memory: a gradient nobody asked for is an empty tensor of its own.
            gradients += [None, None]
            continue
        token_gradient = torch.zeros_like(own.tokens, dtype=accumulation_dtype(own.tokens.dtype))
        bank_gradient = None
        if own.bank is None:
            _sum(gradient, own, other, geometry, token_gradient)
        else:
            _token_gradient(gradient, own, other, geometry, token_gradient)
            bank_gradient = _bank_gradient(gradient, own, other, geometry, layout)
        gradients += [token_gradient, bank_gradient]
    if layout.class_token:
        add_class_gradients(gradients, gradient, query, key, query_bank, key_bank, layout)
    inputs = (query, query_bank, key, key_bank)
    return tuple(
        query.new_empty(0) if value is None else value.to(like.dtype).contiguous()
        for value, like in zip(gradients, inputs, strict=True)
    )


def _values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout) -> Tensor:
    geometry = _geometry(layout)
    giver = _Side(_rows(value), value_bank.contiguous(), 1, False)
    receiver = _Side(giver.tokens, None, geometry.query_sign, True)
    shape = (len(value), layout.num_receivers, value_bank.shape[-1])
    output = value.new_zeros(shape, dtype=accumulation_dtype(value.dtype))
    _sum(probabilities, receiver, giver, geometry, output)
    if layout.class_token:
        add_class_values(output, probabilities, value, value_bank, layout)
    return output.to(value.dtype)


pair_scores, pair_values = register_pair_operators("triton_", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

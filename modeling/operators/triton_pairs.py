"""Translution over pairs as Triton kernels: the path for GPUs.

The signatures are those of `reference.py`; the derivatives are those of `pair_autograd.py`. Five kernels serve every
variant. Each program writes what no other writes, so there are no atomics, and results do not change between runs:

- `scores_kernel` owns some pairs of one offset: one or two matrix products, multiplied and summed by head;
- `sum_kernel` owns some tokens: the weighted sum over all their pairs, or some, of the other token's projection;
- `projection_kernel` owns some pairs of one offset: the weighted projection of the other token, for the next two;
- `token_gradient_kernel` owns some tokens: what comes back through their own bank;
- `bank_gradient_kernel` owns a tile of one offset's matrix: the sum over that offset's pairs.

The first two keep projections in registers. Gradients through a bank use each projection in as many products as it has features,
for tokens and for matrices, so it is computed once and stored: of a chunk of offsets at a time, in the inputs' type, in memory that
the next chunk uses again. Where few programs own tokens, each goes through a part of their offsets, and the sums are added up after;
so are those of a matrix that few programs own. In units of one matrix product per pair, a backward pass with two banks takes six: for
each side a projection, the tokens' gradients and the matrices'. With one bank it takes three: nothing but weights is multiplied for
the projections, and plain tokens receive a sum. No tensor holds an element per pair and feature of all pairs, and there is no matrix
per pair. A class token has `2L - 1` of the `L²` pairs, in three matrices: to the kernels, those are three more offsets.

Where a distance makes offsets share a matrix, what the pairs of a token and a matrix contribute to gradients is summed first, by
`sum_kernel`. PyTorch multiplies those sums by the matrix and the tokens: a product for each token and matrix, not for each pair,
which leaves one of the three a side.

Keys and values may have fewer heads than queries (`heads.py`). No bank is repeated for that: a program that owns heads of
keys goes through the queries' heads of each, and its sums need no second pass.

The kernels are in `pair_kernels.py`.

Legend: `B` batch, `L` tokens, `A` heads of queries, `C` bank input size, `e` bank output size per head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import dot_precision, launch, next_power_of_2
from ..kernels.pair_kernels import (
    bank_gradient_kernel,
    projection_kernel,
    scores_kernel,
    sum_kernel,
    token_gradient_kernel,
)
from .heads import groups_of, projected_size
from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import NUM_CLASS_ROWS, PairLayout


try:
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


class _Geometry(NamedTuple):
    """A layout in the numbers that the kernels take, or some of its offsets; text is a grid of one row."""

    height: int
    width: int
    first: int  # index of the grid's first token
    past: int  # tokens that are keys alone
    least_row: int  # smallest row offset
    most_row: int  # largest row offset
    least: int  # smallest column offset
    most: int  # largest column offset
    max_row_distance: int
    max_column_distance: int
    stride_x: int  # bank rows from one row offset to the next
    base_y: int  # bank row of the column offset 0
    class_row: int  # first bank row of a class token; −1 where it has none of the pairs

    @property
    def num_grid_offsets(self) -> int:
        return (self.most_row - self.least_row + 1) * (self.most - self.least + 1)

    @property
    def num_offsets(self) -> int:
        """Those of the grid, and the kinds of a class token's pairs."""
        return self.num_grid_offsets + (NUM_CLASS_ROWS if self.class_row >= 0 else 0)

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    def num_columns(self, column_offset: int) -> int:
        """Columns of the queries that have a key at an offset."""
        return max(self.width + min(column_offset, 0) - max(column_offset, self.past), 0)


# Kernels number the tokens of a batch, and with them the pairs of an offset, in 32 bits; the last tile may go beyond the last pair.
MAX_TOKENS = 2**31 - 2**10


def _geometry(layout: PairLayout, batch: int) -> _Geometry:
    if batch * layout.num_tokens > MAX_TOKENS:
        raise ValueError(
            f"A batch of {batch} × {layout.num_tokens} tokens is larger than the {MAX_TOKENS} tokens that the kernels can number."
        )
    if layout.causal:
        last = layout.num_distances - 1
        return _Geometry(1, layout.height, 0, layout.past, 0, 0, 0, last, 0, layout.max_row_distance, 0, 0, -1)
    max_row_distance, max_column_distance = layout.max_row_distance, layout.max_column_distance
    first, edge = int(layout.class_token), layout.width - 1
    return _Geometry(
        layout.height,
        layout.width,
        first,
        0,
        1 - layout.height,
        layout.height - 1,
        -edge,
        edge,
        max_row_distance,
        max_column_distance,
        2 * max_column_distance + 1,
        max_column_distance,
        layout.num_grid_offsets if layout.class_token else -1,
    )


class _Side(NamedTuple):
    """One side of the pairs: tokens `[B, tokens, in]`, bank, heads, how offsets sign bank rows, whether it is the queries'."""

    tokens: Tensor
    bank: Tensor | None
    num_heads: int
    sign: int
    is_query: bool

    @property
    def in_size(self) -> int:
        return self.tokens.shape[-1]

    @property
    def bank_or_tokens(self) -> Tensor:
        """A pointer that a kernel may take, even where it does not read it."""
        return self.tokens if self.bank is None else self.bank

    @property
    def head_size(self) -> int:
        """Features per head of what it brings to its pairs."""
        return projected_size(self.tokens, self.bank) // self.num_heads


def _sides(
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    num_heads: int,
    groups: int,
    layout: PairLayout,
) -> tuple[_Side, _Side]:
    """Queries and keys, or those that give values. `num_heads` is the queries', of which `groups` share one of keys."""
    if num_heads % groups:
        raise ValueError(f"`groups` must divide the {num_heads} heads of queries, got {groups}.")
    query, key = _rows(query), _rows(key)
    query_bank, key_bank = (None if bank is None else bank.contiguous() for bank in (query_bank, key_bank))
    # A query's matrix is the one of the reverse offset, in text that of the distance.
    query_side = _Side(query, query_bank, num_heads, 1 if layout.causal else -1, True)
    return query_side, _Side(key, key_bank, num_heads // groups, 1, False)


def _rows(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_strides_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def _shape_of_heads(size: int, one: _Side, other: _Side) -> dict[str, int]:
    """Sizes of a head, and how many heads of queries share one of keys."""
    fewer, more = sorted((one.num_heads, other.num_heads))
    return {"E": size, "WIDTH": next_power_of_2(size), "GROUPS": more // fewer}


def _types(tokens: Tensor) -> dict[str, Any]:
    wide = tl.float64 if accumulation_dtype(tokens.dtype) == torch.float64 else tl.float32
    return {"WIDE": wide, "PRECISION": dot_precision(tokens)}


# Rows of a tile, columns, depth of one product, warps, stages, by the size of an element in bytes: for GPUs with little shared memory,
# and for types that no kernel is tuned for.
_SMALLER_TILES = {
    2: ((128, 64, 64, 4, 2), (64, 64, 32, 4, 2), (32, 32, 32, 4, 2), (16, 16, 16, 2, 1)),
    4: ((64, 64, 32, 4, 3), (64, 32, 32, 4, 2), (32, 32, 16, 4, 2), (16, 16, 16, 2, 1)),
    8: ((32, 32, 16, 4, 1), (16, 16, 16, 2, 1)),
}
# For a data centre's GPU, of each kernel: compiled for Hopper none spills registers. With four warps two programs fit on a
# multiprocessor. A second tile of sums in registers takes eight.
_LARGEST_TILES = {
    "scores": (128, 128, 64, 4, 3),
    "scores of two banks": (128, 128, 64, 8, 3),
    "sum": (128, 128, 64, 8, 3),
    "projection": (128, 128, 64, 4, 3),
    "token gradient": (128, 128, 64, 8, 3),
    "bank gradient": (128, 128, 64, 4, 2),
}
_TILES = {kernel: {**_SMALLER_TILES, 2: (largest, *_SMALLER_TILES[2])} for kernel, largest in _LARGEST_TILES.items()}
# Weighted projections of a chunk of offsets, in bytes; those of one offset may be more. Each is written once and read once by either
# gradient, two products a feature each, so it need not stay in the L2 cache; with chunks that do, launches would be as long as kernels.
SCRATCH_BYTES = 128 << 20
# Programs that fill a data centre's GPU, two on each of 132 multiprocessors. Of fewer, each leaves some steps to others, which have sums
# of their own: at most so many, of at least so many steps, which are offsets, or tiles of an offset's pairs. They are to fill it several
# times, as they end at different times: those of 96 programs over a text keep 18% of it busy, 288 keep 56%, and 768 keep 75%.
PROGRAMS, WAVES, MAX_PARTS, PART_STEPS = 264, 4, 8, 16
# Tokens, in bytes, that stay in the L2 cache beside the matrices of several offsets.
CACHED_BYTES = 24 << 20


def _block(size: int, most: int) -> int:
    """A power of two to divide `size` by: at most `most`, and at least 16; half of that where less is computed in vain, down to 64."""
    block = max(16, min(most, next_power_of_2(size)))
    if block > 64 and -(-size // (block // 2)) * (block // 2) < -(-size // block) * block:
        block //= 2
    return block


def _options(kernel: str, tokens: Tensor, sizes: Callable[[int, int, int], dict[str, int]]) -> list[dict[str, int]]:
    """Tile sizes to try, largest first. `sizes` gives those that suit a problem, of at most so many rows and columns and this depth."""
    options = []
    for rows, columns, depth, warps, stages in _TILES[kernel][tokens.element_size()]:
        option = sizes(rows, columns, depth)
        elements = prod(option.pop("tile"))
        # As many sums in each thread's registers in a tile of half the size.
        while warps > 4 and 2 * elements <= rows * columns:
            warps, elements = warps // 2, 2 * elements
        option |= {"num_warps": warps, "num_stages": stages}
        if option not in options:
            options.append(option)
    return options


def _head_tiles(kernel: str, tokens: Tensor, in_size: int, num_heads: int, width: int) -> list[dict[str, int]]:
    """Tiles of rows and heads, and slices of the inner size; a head is never split, and small problems get small tiles."""

    def sizes(rows: int, columns: int, depth: int) -> dict[str, int]:
        heads = max(_block(num_heads * width, columns) // width, 1)
        return {"tile": (rows, heads * width), "ROWS": rows, "HEADS": heads, "BLOCK_C": _block(in_size, depth)}

    return _options(kernel, tokens, sizes)


@lru_cache(maxsize=256)
def _pairs_of(geometry: _Geometry) -> int:
    """Pairs of one batch entry."""
    rows = sum(geometry.height - abs(offset) for offset in range(geometry.least_row, geometry.most_row + 1))
    pairs = rows * sum(map(geometry.num_columns, range(geometry.least, geometry.most + 1)))
    return pairs + (1 + 2 * geometry.num_patches if geometry.class_row >= 0 else 0)


def _num_pair_tiles(geometry: _Geometry, batch: int, option: dict[str, int]) -> int:
    """How many tiles of pairs there are at most, as `_offset_of_tile` numbers them."""
    return _pairs_of(geometry) * batch // option["ROWS"] + geometry.num_offsets


@lru_cache(maxsize=256)
def _chunks(geometry: _Geometry, most_pairs: int) -> tuple[_Geometry, ...]:
    """All offsets, split by what has at most so many pairs of a batch entry, or a single offset.

    A chunk has all column offsets of some row offsets, or some of one. A class token's pairs are in the last one, or one of their own.
    """
    class_row, geometry = geometry.class_row, geometry._replace(class_row=-1)
    line = sum(map(geometry.num_columns, range(geometry.least, geometry.most + 1)))
    chunks, pairs = [], most_pairs + 1
    for row_offset in range(geometry.least_row, geometry.most_row + 1):
        rows = geometry.height - abs(row_offset)
        if rows * line > most_pairs:
            pairs = most_pairs + 1
            for column_offset in range(geometry.least, geometry.most + 1):
                more = rows * geometry.num_columns(column_offset)
                if pairs + more > most_pairs:
                    place = {"least_row": row_offset, "most_row": row_offset, "least": column_offset}
                    chunks.append(geometry._replace(**place))
                    pairs = 0
                pairs += more
                chunks[-1] = chunks[-1]._replace(most=column_offset)
            pairs = most_pairs + 1
            continue
        if pairs + rows * line > most_pairs:
            chunks.append(geometry._replace(least_row=row_offset))
            pairs = 0
        pairs += rows * line
        chunks[-1] = chunks[-1]._replace(most_row=row_offset)
    if class_row >= 0:
        alone = geometry._replace(least_row=1, most_row=0, class_row=class_row)
        if chunks and _pairs_of(chunks[-1]) + _pairs_of(alone) <= most_pairs:
            chunks[-1] = chunks[-1]._replace(class_row=class_row)
        else:
            chunks.append(alone)
    return tuple(chunks)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    batch = len(query)
    geometry = _geometry(layout, batch)
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    # A causal layout lacks pairs, and their scores are 0. All others are written, as are all tokens of a sum.
    allocate = query.new_zeros if layout.causal else query.new_empty
    scores = allocate(batch, num_heads, layout.num_queries, layout.num_tokens, dtype=accumulation_dtype(query.dtype))
    heads = _shape_of_heads(key_side.head_size, query_side, key_side)
    table = "scores" if query_bank is None or key_bank is None else "scores of two banks"

    if scores.numel():
        launch(
            scores_kernel,
            lambda option: (_num_pair_tiles(geometry, batch, option), -(-num_heads // option["HEADS"])),
            _head_tiles(table, query, max(query_side.in_size, key_side.in_size), num_heads, heads["WIDTH"]),
            lambda option: {},
            scores=scores,
            query=query_side.tokens,
            key=key_side.tokens,
            query_bank=query_side.bank_or_tokens,
            key_bank=key_side.bank_or_tokens,
            **_strides("score", scores, "bai"),
            **_strides("query", query_side.tokens, "bl"),
            **_strides("key", key_side.tokens, "bl"),
            num_heads=num_heads,
            batch=batch,
            **geometry._asdict(),
            query_sign=query_side.sign,
            QUERY_C=query_side.in_size,
            KEY_C=key_side.in_size,
            QUERY_BANK=query_side.bank is not None,
            KEY_BANK=key_side.bank is not None,
            CLASS=geometry.first > 0,
            **heads,
            **_types(query),
        )
    return scores


def _own_tiles(batch: int, option: dict[str, int]) -> dict[str, int]:
    """How many batch entries a program takes: all that fit, beside as few neighbouring tokens as possible."""
    return {"BATCH": min(next_power_of_2(batch), option["ROWS"])}


def _num_own_tiles(geometry: _Geometry, batch: int, option: dict[str, int]) -> int:
    entries = _own_tiles(batch, option)["BATCH"]
    tiles = geometry.height * -(-geometry.width * entries // option["ROWS"]) + (geometry.class_row >= 0)
    return tiles * -(-batch // entries)


def _num_parts(programs: int, steps: int, most: int = MAX_PARTS, waves: int = WAVES) -> int:
    """Programs that share the steps of a sum, where there are so few sums that a GPU would be idle; `most` at most."""
    if programs >= PROGRAMS:
        return 1
    return max(min(-(-waves * PROGRAMS // max(programs, 1)), steps // PART_STEPS, MAX_PARTS, most), 1)


def _added_up(sums: Tensor) -> Tensor:
    """`[parts, …]` to `[…]`."""
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _sum(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, num_tokens: int) -> Tensor:
    """`Σ w_ij · projection of the other token` of all own tokens, `[B, tokens, features]`, in the wide type."""
    return _added_up(_sums(weights, own, other, geometry, num_tokens))


def _sums(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, num_tokens: int, apart: str = "") -> Tensor:
    """The same in parts that are still to be added up; or of each `"row"` or `"column"` offset one that is kept `apart`."""
    batch, num_heads = len(weights), own.num_heads
    heads = _shape_of_heads(other.head_size, own, other)
    options = _head_tiles("sum", other.tokens, other.in_size, num_heads, heads["WIDTH"])

    def programs(option: dict[str, int]) -> tuple[int, int]:
        return _num_own_tiles(geometry, batch, option), -(-num_heads // option["HEADS"])

    if apart:
        # Those of the other axis are together.
        parts = {"row": geometry.most_row - geometry.least_row, "column": geometry.most - geometry.least}[apart] + 1
    else:
        parts = _num_parts(prod(programs(options[0])), geometry.num_grid_offsets)
    output = other.tokens.new_empty(
        parts, batch, num_tokens, num_heads * other.head_size, dtype=accumulation_dtype(other.tokens.dtype)
    )
    launch(
        sum_kernel,
        lambda option: (parts * programs(option)[0], programs(option)[1]),
        options,
        lambda option: _own_tiles(batch, option),
        output=output,
        weights=weights,
        tokens=other.tokens,
        bank=other.bank_or_tokens,
        **_strides("weight", weights, "baij"),
        **_strides("token", other.tokens, "bl"),
        **_strides("output", output, "pbl"),
        num_heads=num_heads,
        sign=other.sign,
        parts=parts,
        batch=batch,
        **geometry._asdict(),
        C=other.in_size,
        BANK=other.bank is not None,
        IS_QUERY=own.is_query,
        CLASS=geometry.first > 0,
        ROTATE=other.tokens.numel() * other.tokens.element_size() <= CACHED_BYTES,
        APART=apart,
        **heads,
        **_types(other.tokens),
    )
    return output


def _gradients(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of the own tokens and of their bank.

    Returns:
        `Σ (w_ij · projection of the other token) W[o]ᵀ` of the own tokens, `[B, tokens, C]`, in the wide type, and
        `Σ xᵀ (w_ij · projection of the other token)` for every bank row, in the bank's shape and type.
    """
    batch, out_size = len(weights), own.bank.shape[-1]
    alone, shared = _split_by_rows(geometry)
    chunks = _chunks(alone, SCRATCH_BYTES // (max(batch * out_size, 1) * own.tokens.element_size()))
    programs = prod(_token_gradient_programs(own, alone, _token_gradient_tiles(own)[0]))
    wide = accumulation_dtype(own.tokens.dtype)
    # Every chunk reads and writes the sums of all parts: a quarter of what it reads of projections at most.
    most = SCRATCH_BYTES // 4 // max(2 * own.tokens.numel() * wide.itemsize, 1)
    parts = _num_parts(programs, max((chunk.num_grid_offsets for chunk in chunks), default=0), most)
    token_gradient = own.tokens.new_zeros(parts, *own.tokens.shape, dtype=wide)
    bank_gradient = torch.zeros_like(own.bank)
    if not weights.numel():
        return token_gradient[0], bank_gradient
    # Behind them, those of class tokens with all patches together.
    projections = own.tokens.new_empty((max(map(_pairs_of, chunks), default=0) + 1) * batch, out_size)
    for chunk in chunks:
        _project(projections, weights, own, other, chunk)
        if chunk.class_row >= 0:
            _sum_over_patches(projections, own, chunk, batch)
        _add_token_gradient(projections, own, chunk, token_gradient)
        _add_bank_gradient(projections, own, chunk, bank_gradient)
    token_gradient = _added_up(token_gradient)
    for offsets, apart in shared:
        _add_shared(weights, own, other, offsets, apart, token_gradient, bank_gradient)
    return token_gradient, bank_gradient


def _split_by_rows(geometry: _Geometry) -> tuple[_Geometry, list[tuple[_Geometry, str]]]:
    """The offsets that have a bank row for themselves, and those of a class token; then the others.

    These are groups of row and column offsets that share a bank row, but for those of one axis: its name follows, `"row"`, `"column"`
    or, where there is none, `""`.
    """
    shared_rows, rows = _split_axis(geometry.least_row, geometry.most_row, geometry.max_row_distance)
    shared_columns, columns = _split_axis(geometry.least, geometry.most, geometry.max_column_distance)

    def part(rows: range, columns: range) -> _Geometry:
        ends = {"least_row": rows[0], "most_row": rows[-1], "least": columns[0], "most": columns[-1]}
        return geometry._replace(**ends, class_row=-1)

    groups = [(part(row, column), "") for row in shared_rows for column in shared_columns]
    groups += [(part(row, columns), "column") for row in shared_rows if columns]
    groups += [(part(rows, column), "row") for column in shared_columns if rows]
    if rows and columns:
        return part(rows, columns)._replace(class_row=geometry.class_row), groups
    return geometry._replace(least_row=1, most_row=0), groups


def _split_axis(least: int, most: int, max_distance: int) -> tuple[list[range], range]:
    """The offsets of an axis that share a bank row with others, by row, and those between, that do not."""
    low, high = max(least, -max_distance), min(most, max_distance)
    if low >= high and least < most:
        return [range(least, most + 1)], range(0)
    ends = [range(least, low + 1), range(high, most + 1)]
    shared = [end for end in ends if len(end) > 1]
    return shared, range(low + int(low > least), high + int(high == most))


def _bank_rows(geometry: _Geometry, sign: int, device: torch.device) -> Tensor:
    """The bank rows of a geometry's offsets, each once, and of a class token; made on the device."""

    def axis(least: int, most: int, furthest: int) -> Tensor:
        if least <= most:
            least, most = (max(-furthest, min(offset, furthest)) for offset in (least, most))
        return sign * torch.arange(least, most + 1, device=device)

    x = axis(geometry.least_row, geometry.most_row, geometry.max_row_distance) + geometry.max_row_distance
    y = axis(geometry.least, geometry.most, geometry.max_column_distance) + geometry.base_y
    rows = (x[:, None] * geometry.stride_x + y).flatten()
    if geometry.class_row < 0:
        return rows
    return torch.cat((rows, torch.arange(geometry.class_row, geometry.class_row + NUM_CLASS_ROWS, device=device)))


def _own_places(geometry: _Geometry, is_query: bool) -> tuple[slice, slice]:
    """Rows and columns of the own tokens that have any of a geometry's offsets."""
    row, column = (geometry.least_row, geometry.most_row), (geometry.least, geometry.most)
    height, width, past = geometry.height, geometry.width, geometry.past
    if is_query:
        rows = slice(max(row[0], 0), height + min(row[1], 0))
        return rows, slice(max(column[0] - past, 0), width + min(column[1], 0) - past)
    rows = slice(max(-row[1], 0), height - max(row[0], 0))
    return rows, slice(max(past - column[1], 0), width - max(column[0], 0))


def _add_shared(
    weights: Tensor,
    own: _Side,
    other: _Side,
    geometry: _Geometry,
    apart: str,
    token_gradient: Tensor,
    bank_gradient: Tensor,
) -> None:
    """Adds the gradients of a group of offsets that share bank rows, see `_split_by_rows`.

    What a token's pairs of one bank row contribute is summed first, so that there is a product for each token instead of each pair.
    """
    places = _own_places(geometry, own.is_query)

    def in_grid(tokens: Tensor) -> Tensor:
        """`[…, tokens, features]` to `[…, rows, columns, features]` of those that have such pairs."""
        return tokens[..., geometry.first :, :].unflatten(-2, (geometry.height, -1))[..., places[0], places[1], :]

    tokens, target = in_grid(own.tokens), in_grid(token_gradient)
    least, most = ("least_row", "most_row") if apart == "row" else ("least", "most")
    first, last = getattr(geometry, least), getattr(geometry, most)
    step = last + 1 - first
    if apart:
        of_one = own.tokens[..., 0].numel() * own.bank.shape[-1] * token_gradient.element_size()
        step = max(SCRATCH_BYTES // of_one, 1)
    for offset in range(first, last + 1, step):
        part = geometry._replace(**{least: offset, most: min(offset + step - 1, last)})
        sums = _sums(weights, own, other, part, own.tokens.shape[1], apart)
        sums = in_grid(sums if apart else _added_up(sums)[None]).to(own.tokens.dtype)
        rows = _bank_rows(part, own.sign, sums.device)
        target += torch.einsum("nbxyf,ncf->bxyc", sums, own.bank.index_select(0, rows))
        bank_gradient.index_copy_(0, rows, torch.einsum("bxyc,nbxyf->ncf", tokens, sums))


def _project(projections: Tensor, weights: Tensor, own: _Side, other: _Side, geometry: _Geometry) -> None:
    """Writes `w_ij · projection of the other token` of each pair to `projections`, `[pairs, own features]`."""
    batch, num_heads = len(weights), own.num_heads
    heads = _shape_of_heads(own.head_size, own, other)
    launch(
        projection_kernel,
        lambda option: (_num_pair_tiles(geometry, batch, option), -(-num_heads // option["HEADS"])),
        _head_tiles("projection", own.tokens, other.in_size, num_heads, heads["WIDTH"]),
        lambda option: {},
        projections=projections,
        weights=weights,
        tokens=other.tokens,
        bank=other.bank_or_tokens,
        **_strides("weight", weights, "baij"),
        **_strides("token", other.tokens, "bl"),
        num_heads=num_heads,
        sign=other.sign,
        batch=batch,
        **geometry._asdict(),
        C=other.in_size,
        BANK=other.bank is not None,
        IS_QUERY=own.is_query,
        CLASS=geometry.first > 0,
        **heads,
        **_types(own.tokens),
    )


def _sum_over_patches(projections: Tensor, own: _Side, geometry: _Geometry, batch: int) -> None:
    """Writes the sums of the own class token's projections with all patches behind those of all pairs."""
    end, patches = _pairs_of(geometry) * batch, geometry.num_patches * batch
    first = end - (2 if own.is_query else 1) * patches
    of_patches = projections[first : first + patches].unflatten(0, (geometry.num_patches, batch))
    torch.sum(of_patches, 0, out=projections[end : end + batch])


def _token_gradient_tiles(own: _Side) -> list[dict[str, int]]:
    def sizes(rows: int, columns: int, depth: int) -> dict[str, int]:
        columns = _block(own.in_size, columns)
        return {
            "tile": (rows, columns),
            "ROWS": rows,
            "BLOCK_C": columns,
            "BLOCK_OUT": _block(own.bank.shape[-1], depth),
        }

    return _options("token gradient", own.tokens, sizes)


def _token_gradient_programs(own: _Side, geometry: _Geometry, option: dict[str, int]) -> tuple[int, int]:
    return _num_own_tiles(geometry, len(own.tokens), option), -(-own.in_size // option["BLOCK_C"])


def _add_token_gradient(projections: Tensor, own: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Adds `Σ projection W[o]ᵀ` over the pairs of each own token to `output`, `[parts, B, tokens, C]`."""
    parts, batch = output.shape[:2]

    def grid(option: dict[str, int]) -> tuple[int, int]:
        tiles, columns = _token_gradient_programs(own, geometry, option)
        return parts * tiles, columns

    launch(
        token_gradient_kernel,
        grid,
        _token_gradient_tiles(own),
        lambda option: _own_tiles(batch, option),
        output=output,
        projections=projections,
        bank=own.bank,
        **_strides("output", output, "pbl"),
        sign=own.sign,
        parts=parts,
        batch=batch,
        **geometry._asdict(),
        C=own.in_size,
        OUT=own.bank.shape[-1],
        IS_QUERY=own.is_query,
        CLASS=geometry.first > 0,
        **_types(own.tokens),
    )


def _add_bank_gradient(projections: Tensor, own: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Writes `Σ xᵀ projection` over the pairs of each offset, which share no bank row, to that row of `output`."""
    out_size, batch = own.bank.shape[-1], len(own.tokens)

    def sizes(rows: int, columns: int, depth: int) -> dict[str, int]:
        rows, columns = _block(own.in_size, rows), _block(out_size, columns)
        return {"tile": (rows, columns), "ROWS": depth, "BLOCK_C": rows, "BLOCK_OUT": columns}

    def tiles(option: dict[str, int]) -> tuple[int, int]:
        return -(-own.in_size // option["BLOCK_C"]), -(-out_size // option["BLOCK_OUT"])

    options = _options("bank gradient", own.tokens, sizes)
    # Offsets have about as many pairs each, so that programs end together: two on each multiprocessor fill a GPU well enough.
    steps = -(-_pairs_of(geometry) * batch // (geometry.num_offsets * options[0]["ROWS"]))
    parts = _num_parts(geometry.num_offsets * prod(tiles(options[0])), steps, MAX_PARTS, 2)
    sums = output
    if parts > 1:
        wide = accumulation_dtype(own.tokens.dtype)
        sums = output.new_empty(parts, geometry.num_offsets, own.in_size, out_size, dtype=wide)
    launch(
        bank_gradient_kernel,
        lambda option: (geometry.num_offsets * parts, *tiles(option)),
        options,
        lambda option: {},
        output=sums,
        projections=projections,
        tokens=own.tokens,
        **_strides("token", own.tokens, "bl"),
        sign=own.sign,
        parts=parts,
        batch=batch,
        **geometry._asdict(),
        C=own.in_size,
        OUT=out_size,
        IS_QUERY=own.is_query,
        CLASS=geometry.first > 0,
        SPLIT=parts > 1,
        **_types(own.tokens),
    )
    if parts > 1:
        output.index_copy_(0, _bank_rows(geometry, own.sign, output.device), sums.sum(0).to(output.dtype))


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
    geometry, num_heads = _geometry(layout, len(query)), gradient.shape[1]
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    gradients = []
    for own, other, needed in ((query_side, key_side, need_query), (key_side, query_side, need_key)):
        if not needed:
            # Outputs of an operator must not share memory: a gradient nobody asked for is an empty tensor of its own.
            gradients += [None, None]
            continue
        if own.bank is None:
            gradients += [_sum(gradient, own, other, geometry, own.tokens.shape[1]), None]
        else:
            gradients += _gradients(gradient, own, other, geometry)
    inputs = (query, query_bank, key, key_bank)
    return tuple(
        query.new_empty(0) if value is None else value.to(like.dtype).contiguous()
        for value, like in zip(gradients, inputs, strict=True)
    )


def _values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout, groups: int = 1) -> Tensor:
    geometry, num_heads = _geometry(layout, len(value)), probabilities.shape[1]
    value = _rows(value)
    query_side, key_side = _sides(value, value, None, value_bank, num_heads, groups, layout)
    return _sum(probabilities, query_side, key_side, geometry, layout.num_queries).to(value.dtype)


pair_scores, pair_values = register_pair_operators("triton_", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

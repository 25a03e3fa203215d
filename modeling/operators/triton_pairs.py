"""Translution over pairs as Triton kernels: the path for GPUs.

The signatures are those of `reference.py`; the derivatives are those of `pair_autograd.py`. Four kernels serve every
variant. Each program writes what no other writes, so there are no atomics, and results do not change between runs:

- `scores_kernel` owns some pairs of one offset: one or two matrix products, multiplied and summed by head;
- `sum_kernel` owns some tokens: the weighted sum over all their pairs of the other token's projection;
- `token_gradient_kernel` owns some tokens: what comes back through their own bank;
- `bank_gradient_kernel` owns a tile of one offset's matrix: the sum over that offset's pairs.

Projections live in registers. No tensor holds an element per pair and feature, and there is no matrix per pair. A class token has
`2L - 1` of the `L²` pairs, in three matrices: those are ordinary products (`class_token.py`).

Keys and values may have fewer heads than queries (`heads.py`). No bank is repeated for that: a program that owns heads of
keys goes through the queries' heads of each, and its sums need no second pass.

The kernels are in `pair_kernels.py`.

Legend: `B` batch, `L` tokens, `A` heads of queries, `C` bank input size, `e` bank output size per head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import dot_precision, launch, next_power_of_2
from ..kernels.pair_kernels import bank_gradient_kernel, scores_kernel, sum_kernel, token_gradient_kernel
from .class_token import add_class_gradients, add_class_values, write_class_scores
from .heads import groups_of, projected_size
from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import PairLayout


try:
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


class _Geometry(NamedTuple):
    """A layout in the numbers that the kernels take; text is a grid of one row."""

    height: int
    width: int
    first: int  # index of the grid's first token
    past: int  # tokens that are keys alone
    least: int  # smallest column offset
    most: int  # largest column offset
    max_row_distance: int
    max_column_distance: int
    stride_x: int  # bank rows from one row offset to the next
    base_y: int  # bank row of the column offset 0


# Kernels number the tokens of a batch, and with them the pairs of an offset, in 32 bits.
MAX_TOKENS = 2**31 - 1


def _geometry(layout: PairLayout, batch: int) -> _Geometry:
    if batch * layout.num_tokens > MAX_TOKENS:
        raise ValueError(
            f"A batch of {batch} × {layout.num_tokens} tokens is larger than the {MAX_TOKENS} tokens that the kernels can number."
        )
    if layout.causal:
        last = layout.num_distances - 1
        return _Geometry(1, layout.height, 0, layout.past, 0, last, 0, layout.max_row_distance, 0, 0)
    max_row_distance, max_column_distance = layout.max_row_distance, layout.max_column_distance
    first, edge = int(layout.class_token), layout.width - 1
    return _Geometry(
        layout.height,
        layout.width,
        first,
        0,
        -edge,
        edge,
        max_row_distance,
        max_column_distance,
        2 * max_column_distance + 1,
        max_column_distance,
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
    """Row offset, column offset and first pair of every tile of `scores_kernel`, `[tiles, 3]`."""
    row_offset = torch.arange(1 - geometry.height, geometry.height, device="cpu")
    column_offset = torch.arange(geometry.least, geometry.most + 1, device="cpu")
    row_offset, column_offset = (grid.flatten() for grid in torch.meshgrid(row_offset, column_offset, indexing="ij"))
    columns = geometry.width + column_offset.clamp(max=0) - column_offset.clamp(min=geometry.past)
    counts = (geometry.height - row_offset.abs()) * columns.clamp(min=0) * batch
    tiles = (counts + rows - 1) // rows
    offset = torch.arange(len(tiles), device="cpu").repeat_interleave(tiles)
    start = (torch.arange(len(offset), device="cpu") - (tiles.cumsum(0) - tiles)[offset]) * rows
    return torch.stack((row_offset[offset], column_offset[offset], start), dim=1).to(torch.int32).to(device)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    batch = len(query)
    geometry = _geometry(layout, batch)
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    # A causal layout lacks pairs, and their scores are 0. All others are written.
    allocate = query.new_zeros if layout.causal else query.new_empty
    scores = allocate(batch, num_heads, layout.num_queries, layout.num_tokens, dtype=accumulation_dtype(query.dtype))
    heads = _shape_of_heads(key_side.head_size, query_side, key_side)

    def grid(option: dict[str, int]) -> tuple[int, ...]:
        return len(_tile_table(geometry, batch, option["ROWS"], query.device)), -(-num_heads // option["HEADS"])

    if scores.numel():
        launch(
            scores_kernel,
            grid,
            _tiles(query, max(query_side.in_size, key_side.in_size), num_heads, heads["WIDTH"]),
            lambda option: {"tiles": _tile_table(geometry, batch, option["ROWS"], query.device)},
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
            **heads,
            **_types(query),
        )
    if layout.class_token:
        write_class_scores(scores, query, key, query_bank, key_bank, layout)
    return scores


def _own_tiles(batch: int, option: dict[str, int]) -> dict[str, int]:
    """How many batch entries a program takes: all that fit, beside as few neighbouring tokens as possible."""
    return {"BATCH": min(next_power_of_2(batch), option["ROWS"])}


def _num_own_tiles(geometry: _Geometry, batch: int, option: dict[str, int]) -> int:
    entries = _own_tiles(batch, option)["BATCH"]
    return geometry.height * -(-geometry.width * entries // option["ROWS"]) * -(-batch // entries)


def _sum(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Writes `Σ w_ij · projection of the other token` of the grid's own tokens and heads to `output`."""
    batch, num_heads = len(weights), own.num_heads
    heads = _shape_of_heads(other.head_size, own, other)
    launch(
        sum_kernel,
        lambda option: (_num_own_tiles(geometry, batch, option), -(-num_heads // option["HEADS"])),
        _tiles(other.tokens, other.in_size, num_heads, heads["WIDTH"]),
        lambda option: _own_tiles(batch, option),
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
        IS_QUERY=own.is_query,
        **heads,
        **_types(other.tokens),
    )


def _token_gradient(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, output: Tensor) -> None:
    """Writes `Σ (w_ij · projection of the other token) W[o]ᵀ` of the grid's own tokens to `output`, `[B, tokens, C]`."""
    batch, num_heads = len(weights), own.num_heads
    heads = _shape_of_heads(own.head_size, own, other)
    launch(
        token_gradient_kernel,
        lambda option: (_num_own_tiles(geometry, batch, option), -(-own.in_size // option["BLOCK_C"])),
        _gradient_tiles(own, other, num_heads, heads["WIDTH"]),
        lambda option: _own_tiles(batch, option),
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
        IS_QUERY=own.is_query,
        **heads,
        **_types(own.tokens),
    )


def _bank_gradient(weights: Tensor, own: _Side, other: _Side, geometry: _Geometry, layout: PairLayout) -> Tensor:
    """`Σ xᵀ (w_ij · projection of the other token)` for every bank row of the grid, in the bank's shape; class rows unwritten."""
    batch, num_heads = len(weights), own.num_heads
    heads = _shape_of_heads(own.head_size, own, other)
    output = torch.empty_like(own.bank)
    launch(
        bank_gradient_kernel,
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
        IS_QUERY=own.is_query,
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
    geometry, num_heads = _geometry(layout, len(query)), gradient.shape[1]
    groups = groups_of(query, key, query_bank, key_bank)
    query_side, key_side = _sides(query, key, query_bank, key_bank, num_heads, groups, layout)
    gradients = []
    for own, other, needed in ((query_side, key_side, need_query), (key_side, query_side, need_key)):
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


def _values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout, groups: int = 1) -> Tensor:
    geometry, num_heads = _geometry(layout, len(value)), probabilities.shape[1]
    value = _rows(value)
    query_side, key_side = _sides(value, value, None, value_bank, num_heads, groups, layout)
    shape = (len(value), layout.num_queries, value_bank.shape[-1] * groups)
    output = value.new_zeros(shape, dtype=accumulation_dtype(value.dtype))
    _sum(probabilities, query_side, key_side, geometry, output)
    if layout.class_token:
        add_class_values(output, probabilities, value, value_bank, layout)
    return output.to(value.dtype)


pair_scores, pair_values = register_pair_operators("triton_", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

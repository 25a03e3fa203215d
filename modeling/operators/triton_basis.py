"""Basis Translution as Triton kernels in the manner of flash attention (Dao et al. 2022): memory is linear in the tokens.

With projections `q_m`, `k_m`, `v_m` of every token by every factor, computed before, and coefficients `b` of every
offset,

    s_ij = scale · (Σ_mn bq[o(j, i), m] bk[o(i, j), n] <q_mi, k_nj>  +  <dense q_i, dense k_j>)
    out_i = Σ_j p_ij Σ_m bv[o(i, j), m] v_mj          dense out_i = Σ_j p_ij (dense v_j)

with `p` the softmax of `s`. The dense parts are LoR's, and may be missing. Neither scores nor probabilities are
stored: the backward pass computes them again from the logarithm of the softmax's denominator. Keys and values may have
fewer heads than queries (`heads.py`): a program that owns some of a head's keys goes through the queries of all heads
that share them.

Gradients of coefficients sum over all pairs of an offset. A program owns some neighbouring offsets and goes through
tiles of pairs in which they are in the same places, on diagonals, that it sums once, at the end; it writes two sums
per offset, batch entry and head: neighbouring programs share some. No atomics.

Products of two vectors of each pair and head, with `N = n_q n_k` (one factor where there is no basis), if a tile has
all factors:

| | | kv, `n = 8` | qkv, `n = 8` | q, `n = 8` |
|---|---|---|---|---|
| forward: scores, outputs | `N + n_v` | 16 | 72 | 9 |
| gradients of queries: scores, gradients of probabilities and of queries | `2N + n_v` | 24 | 136 | 17 |
| gradients of keys and values: the same, and of values | `2N + 2n_v` | 32 | 144 | 18 |
| gradients of coefficients: scores, gradients of probabilities | `N + n_v` | 16 | 72 | 9 |

The last are as many in compiled code alone, which keeps the products for the sums; and without pairs that a tile has
and the grid has not, which are most where a row is short. The three passes of the backward one cannot share more
without atomics or memory per pair: each sums over other pairs.

The kernels are in `basis_kernels.py`. Compiled by Triton 3.6.0 for sm_90, without a GPU, from float16 or bfloat16, for
12 heads of 64, 8 factors and the first tiles, with as many heads of keys: registers a thread, and bytes of its stack, which spilled registers
take, of an image's 197 tokens and of a text's 4,096. Each takes a few seconds to compile. Triton 3.9.0 takes up to 424
bytes (kv, image, forward).

| | kv, image | kv, text | qkv, image | qkv, text | q, image | q, text |
|---|---|---|---|---|---|---|
| forward | 230, 0 | 215, 0 | 158, 0 | 156, 0 | 170, 0 | 138, 0 |
| gradients of queries | 255, 0 | 255, 0 | 228, 0 | 226, 0 | 236, 0 | 169, 0 |
| gradients of keys and values | 255, 240 | 255, 144 | 255, 80 | 255, 72 | 255, 264 | 254, 0 |
| gradients of coefficients | 232, 0 | 234, 0 | 255, 80 | 255, 80 | 97, 0 | 95, 0 |
| the same of class tokens | 250, 0 | | 255, 256 | | 177, 0 | |

Legend: `B` batch, `A` heads of queries, `G` of them to each of keys and values, `R` queries, `L` tokens, `n` factors,
`e` their size per head, `d` dense size per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.basis_kernels import (
    coefficient_gradient_kernel,
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from ..kernels.launch import dot_precision, launch, next_power_of_2
from .pair_autograd import accumulation_dtype, pack, unpack
from .pair_layout import NUM_CLASS_ROWS, PairLayout
from .registration import define, register_once


try:
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


# By the bytes of a token's number: rows and columns of the products that a tile has, factors that it has of a token at
# most, warps, stages. Rows are queries times their factors, and columns are keys times theirs. In 16 bits the first ones
# spill next to nothing.
_GRADIENT_TILES = {
    2: ((64, 64, 8, 8, 2), (64, 64, 8, 8, 1), (64, 64, 4, 4, 1), (32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
    4: ((64, 64, 4, 8, 1), (32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
    8: ((32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
}
_TILES = {
    "forward_kernel": {
        2: ((128, 64, 8, 8, 2), (64, 64, 8, 8, 1), (64, 64, 4, 4, 1), (32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
        4: ((64, 64, 4, 8, 1), (32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
        8: ((32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
    },
    "query_gradient_kernel": _GRADIENT_TILES,
    "key_value_gradient_kernel": _GRADIENT_TILES,
    "coefficient_gradient_kernel": {
        2: (
            (64, 64, 8, 8, 2),
            (64, 64, 8, 8, 1),
            (64, 64, 4, 4, 2),
            (64, 64, 4, 4, 1),
            (32, 32, 2, 4, 1),
            (16, 16, 1, 4, 1),
        ),
        4: ((16, 64, 4, 8, 1), (16, 16, 1, 4, 1)),
        8: ((32, 32, 2, 4, 1), (16, 16, 1, 4, 1)),
    },
}
# Factors of a tile at most where queries, keys and a dense part all take registers of `coefficient_gradient_kernel`: with 8 a thread spills
# 544 to 968 bytes, with 4 none.
MAX_FACTORS_WITH_DENSE = 4

_NAMES = ("query", "key", "value", "query_coefficients", "key_coefficients", "value_coefficients", "dense_query", "dense_key", "dense_value")  # fmt: skip


def basis_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_coefficients: Tensor | None,
    key_coefficients: Tensor | None,
    value_coefficients: Tensor | None,
    dense_query: Tensor | None,
    dense_key: Tensor | None,
    dense_value: Tensor | None,
    mask: Tensor | None,
    scale: float,
    layout: PairLayout,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose keys, queries and values are mixed by the offset of each pair.

    Args:
        query: `[B, A, n, R, e]`; one factor where it has no coefficients.
        key, value: `[B, A / G, n, L, e]` likewise; the values' size may differ. Each head serves `G` of the queries',
            one after the other.
        query_coefficients, key_coefficients, value_coefficients: `[num_offsets, n]`, or `None` for an ordinary projection.
        dense_query, dense_key: `[B, A, R, d]` and `[B, A / G, L, d]`, whose product is added to the scores, or `None`.
        dense_value: `[B, A / G, L, d]`, averaged as well, or `None`.
        mask: additive, broadcastable to `[B, A, R, L]`; a causal layout needs none to be causal.
        scale: of the scores.
        layout: the pairs.

    Returns:
        `[B, A, R, e]` and `[B, A, R, d]` or `None`, of the tokens' dtype.

    Raises:
        ValueError: if keys and values differ in the number of their heads, or it does not divide the queries'.
    """
    _check_heads(query, key, value, dense_query, dense_key, dense_value)
    wide = accumulation_dtype(query.dtype)
    coefficients = [
        None if c is None else c.to(wide) for c in (query_coefficients, key_coefficients, value_coefficients)
    ]
    output, dense_output, _ = _operator(
        query, key, value, *coefficients, dense_query, dense_key, dense_value, mask, scale, pack(layout)
    )
    return output, None if dense_value is None else dense_output


def _check_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dense_query: Tensor | None,
    dense_key: Tensor | None,
    dense_value: Tensor | None,
) -> None:
    """A kernel that expects other heads than there are would read past the end of a tensor."""
    num_heads, key_heads = query.shape[1], key.shape[1]
    if num_heads % key_heads:
        raise ValueError(f"Heads of `key` must divide the {num_heads} of `query`, got {key_heads}.")
    wanted = {"value": (value, key_heads), "dense_query": (dense_query, num_heads)}
    wanted |= {"dense_key": (dense_key, key_heads), "dense_value": (dense_value, key_heads)}
    for name, (tensor, heads) in wanted.items():
        if tensor is not None and tensor.shape[1] != heads:
            raise ValueError(f"`{name}` must have {heads} heads, got {tensor.shape[1]}.")


def _arguments(tensors: dict[str, Tensor | None], mask: Tensor | None, scale: float, layout: PairLayout) -> dict:
    """What every kernel takes."""
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    dense = tensors["dense_query"] if tensors["dense_query"] is not None else tensors["dense_value"]
    dense_size = 1 if dense is None else dense.shape[-1]
    shape = (query.shape[0], query.shape[1], layout.num_queries, layout.num_tokens)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
    image = not layout.causal
    given = [tensor for name, tensor in tensors.items() if name.endswith("coefficients") and tensor is not None]
    return {
        # A pointer that is not read may point anywhere.
        **{name: query if tensor is None else tensor for name, tensor in tensors.items()},
        "mask": query if mask is None else mask,
        **dict(zip((f"mask_stride_{axis}" for axis in "baij"), strides, strict=True)),
        "scale": scale,
        "num_heads": query.shape[1],
        "GROUPS": query.shape[1] // key.shape[1],
        "queries": layout.num_queries,
        "tokens": layout.num_tokens,
        "width": layout.width if image else layout.height,
        "past": layout.past,
        "num_offsets": given[0].shape[-1] if given else 1,
        "max_row_distance": layout.max_row_distance if image else 0,
        "max_column_distance": (layout.bank_width if image else layout.bank_height) - 1,
        "stride_x": 2 * layout.max_column_distance + 1 if image else 0,
        "base_y": layout.max_column_distance if image else 0,
        "class_row": layout.num_grid_offsets,
        "first": int(layout.class_token),
        "NQ": query.shape[2],
        "NK": key.shape[2],
        "NV": value.shape[2],
        "Q_BASIS": tensors["query_coefficients"] is not None,
        "K_BASIS": tensors["key_coefficients"] is not None,
        "V_BASIS": tensors["value_coefficients"] is not None,
        "DENSE_SCORES": tensors["dense_query"] is not None,
        "DENSE_VALUES": tensors["dense_value"] is not None,
        "MASKED": mask is not None,
        "CAUSAL": layout.causal,
        "E": query.shape[-1],
        "E_WIDTH": max(16, next_power_of_2(query.shape[-1])),
        "V": value.shape[-1],
        "V_WIDTH": max(16, next_power_of_2(value.shape[-1])),
        "D": dense_size,
        "D_WIDTH": max(16, next_power_of_2(dense_size)),
        "WIDE": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "PRECISION": dot_precision(query),
    }


def _tiles(kernel: Any, arguments: dict[str, Any]) -> list[dict[str, int]]:
    """Tiles of a kernel, largest first: queries, keys, factors of each, and how many programs share all factors."""
    options = []
    crowded = kernel is coefficient_gradient_kernel and arguments["DENSE_SCORES"]
    crowded = crowded and arguments["Q_BASIS"] and arguments["K_BASIS"]
    for rows, columns, most, warps, stages in _TILES[kernel.__name__][arguments["query"].element_size()]:
        if crowded and most > MAX_FACTORS_WITH_DENSE:
            continue
        numbers = [arguments[name] for name in ("NQ", "NK", "NV")]
        factors = [min(next_power_of_2(number), most) for number in numbers]
        option = dict(zip(("QUERY_FACTORS", "KEY_FACTORS", "VALUE_FACTORS"), factors, strict=True))
        # A matrix product has at least 16 rows, columns and terms.
        option |= {"QUERIES": max(16, rows // factors[0]), "KEYS": max(16, columns // max(factors[1:]))}
        option |= {"num_warps": warps, "num_stages": stages}
        if kernel in (key_value_gradient_kernel, coefficient_gradient_kernel):
            shared = zip(numbers, factors, strict=True)
            option["PARTS"] = max(
                -(-number // held)
                for number, held in (list(shared)[1:] if kernel is key_value_gradient_kernel else shared)
            )
        options.append(option)
    return options


def _for_kernels(given: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """The tensors by name, contiguous, and coefficients as `[n, num_offsets]`: neighbouring pairs have neighbouring offsets."""
    tensors = dict(zip(_NAMES, given, strict=True))
    return {
        name: tensor if tensor is None else (tensor.t() if name.endswith("coefficients") else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def _basis_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_coefficients: Tensor | None,
    key_coefficients: Tensor | None,
    value_coefficients: Tensor | None,
    dense_query: Tensor | None,
    dense_key: Tensor | None,
    dense_value: Tensor | None,
    mask: Tensor | None,
    scale: float,
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    given = (query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key, dense_value)  # fmt: skip
    arguments = _arguments(_for_kernels(given), mask, scale, unpack(layout))
    batch, heads, _, queries, _ = query.shape
    output = query.new_empty(batch, heads, queries, value.shape[-1])
    dense_output = query.new_empty((batch, heads, queries, dense_value.shape[-1]) if dense_value is not None else 0)
    logsumexp = query.new_empty(batch, heads, queries, dtype=accumulation_dtype(query.dtype))
    launch(
        forward_kernel,
        lambda option: (-(-queries // option["QUERIES"]) * batch * heads,),
        _tiles(forward_kernel, arguments),
        lambda option: {},
        output=output,
        dense_output=dense_output,
        logsumexp=logsumexp,
        **arguments,
    )
    return output, dense_output, logsumexp


def _fake_basis_attention(query, key, value, qc, kc, vc, dense_query, dense_key, dense_value, mask, scale, layout):
    shape = (*query.shape[:2], query.shape[3])
    return (
        query.new_empty(*shape, value.shape[-1]),
        query.new_empty(0 if dense_value is None else (*shape, dense_value.shape[-1])),
        query.new_empty(shape, dtype=accumulation_dtype(query.dtype)),
    )


def _basis_attention_backward(
    output_gradient: Tensor,
    dense_output_gradient: Tensor,
    output: Tensor,
    dense_output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_coefficients: Tensor | None,
    key_coefficients: Tensor | None,
    value_coefficients: Tensor | None,
    dense_query: Tensor | None,
    dense_key: Tensor | None,
    dense_value: Tensor | None,
    mask: Tensor | None,
    scale: float,
    layout: list[int],
) -> list[Tensor]:
    given = (query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key, dense_value)  # fmt: skip
    tensors, geometry = _for_kernels(given), unpack(layout)
    wide, heads, key_heads = logsumexp.dtype, query.shape[0] * query.shape[1], key.shape[0] * key.shape[1]
    delta = (output_gradient.to(wide) * output.to(wide)).sum(-1)
    if dense_value is not None:
        delta += (dense_output_gradient.to(wide) * dense_output.to(wide)).sum(-1)
    gradients = {
        name: query.new_empty(0) if tensor is None else torch.empty_like(tensor) for name, tensor in tensors.items()
    }
    arguments = {
        "output_gradient": output_gradient.contiguous(),
        "dense_output_gradient": dense_output_gradient.contiguous(),
        "logsumexp": logsumexp,
        "delta": delta,
        **_arguments(tensors, mask, scale, geometry),
    }
    launch(
        query_gradient_kernel,
        lambda option: (
            -(-geometry.num_queries // option["QUERIES"]) * -(-query.shape[2] // option["QUERY_FACTORS"]) * heads,
        ),
        _tiles(query_gradient_kernel, arguments),
        lambda option: {},
        query_gradient=gradients["query"],
        dense_query_gradient=gradients["dense_query"],
        **arguments,
    )
    launch(
        key_value_gradient_kernel,
        lambda option: (-(-geometry.num_tokens // option["KEYS"]) * option["PARTS"] * key_heads,),
        _tiles(key_value_gradient_kernel, arguments),
        lambda option: {},
        key_gradient=gradients["key"],
        value_gradient=gradients["value"],
        dense_key_gradient=gradients["dense_key"],
        dense_value_gradient=gradients["dense_value"],
        **arguments,
    )
    gradients |= _coefficient_gradients(tensors, arguments, geometry, heads)
    return list(gradients.values())


def _fake_basis_attention_backward(*arguments):
    query = arguments[5]
    return [query.new_empty(0) if t is None else torch.empty_like(t).contiguous() for t in arguments[5:14]]


def _column_blocks(width: int, causal: bool, option: dict[str, int]) -> dict[str, int]:
    """By how many times `COLUMNS` columns of queries may begin after columns of keys, which begin at every `KEYS`-th."""
    last_key = (width - 1) // option["KEYS"] * option["KEYS"]
    first = 0 if causal else -last_key // option["COLUMNS"]
    return {"first_column_block": first, "column_blocks": (width - 1) // option["COLUMNS"] + 1 - first}


def _coefficient_gradients(
    tensors: dict[str, Tensor | None], arguments: dict[str, Any], layout: PairLayout, heads: int
) -> dict[str, Tensor]:
    """Gradients of the coefficients that there are, `[num_offsets, n]`, by name."""
    coefficients = {name: tensor for name, tensor in tensors.items() if name.endswith("coefficients")}
    wanted = {name: tensor.shape[0] for name, tensor in coefficients.items() if tensor is not None}
    if not wanted:
        return {}
    logsumexp, width = arguments["logsumexp"], arguments["width"]
    height, num_dy = (1, width) if layout.causal else (layout.height, 2 * width - 1)
    options = _tiles(coefficient_gradient_kernel, arguments)
    for option in options:
        # Rows of queries as wide as the grid, and no narrower than the keys, which are one row.
        widest = max(16, next_power_of_2(width))
        option["KEYS"] = min(option["KEYS"], option["QUERIES"], widest)
        option["COLUMNS"] = min(option["QUERIES"], widest)

    def blocks(option: dict[str, int]) -> dict[str, int]:
        return _column_blocks(width, layout.causal, option)

    def num_kinds(option: dict[str, int]) -> int:
        rows = option["QUERIES"] // option["COLUMNS"]
        return blocks(option)["column_blocks"] * -(-(2 * height - 1) // rows)

    def sums(class_pairs: bool, *shape: int) -> dict[str, Tensor]:
        # Zeros: of the halves of a tile's offsets not all are met.
        made = {name: logsumexp.new_zeros(heads, shape[0], factors, *shape[1:]) for name, factors in wanted.items()}
        launch(
            coefficient_gradient_kernel,
            lambda option: ((NUM_CLASS_ROWS if class_pairs else num_kinds(option)) * option["PARTS"] * heads,),
            options,
            blocks,
            **{name.replace("coefficients", "sums"): made.get(name, logsumexp) for name in coefficients},
            **arguments,
            height=height,
            CLASS_PAIRS=class_pairs,
        )
        return {name: total.sum((0, 1)) for name, total in made.items()}

    grid = sums(False, 2, 2 * height - 1, num_dy)
    classes = sums(True, 1, NUM_CLASS_ROWS) if layout.class_token else None
    gradients = {}
    for name, total in grid.items():
        if layout.causal:
            rows = _clamped(total, 2, 0, arguments["max_column_distance"], 0)
        else:
            if name == "query_coefficients":
                total = total.flip(1, 2)
            rows = _clamped(total, 1, -arguments["max_row_distance"], arguments["max_row_distance"], height - 1)
            rows = _clamped(rows, 2, -arguments["max_column_distance"], arguments["max_column_distance"], width - 1)
        rows = rows.flatten(1)
        if classes is not None:
            three = classes[name]
            if name == "query_coefficients":
                three = torch.cat((three[:, :1], three[:, 1:].flip(1)), 1)
            rows = torch.cat((rows, three), 1)
        gradients[name] = rows.t().contiguous()
    return gradients


def _clamped(sums: Tensor, axis: int, low: int, reach: int, centre: int) -> Tensor:
    """Sums per offset on an axis, of which `centre` are negative, to sums per offset clamped to `low … reach`."""
    size = reach - low + 1
    result = sums.new_zeros(*sums.shape[:axis], size, *sums.shape[axis + 1 :])
    first, last = -centre, sums.shape[axis] - 1 - centre
    inner_first, inner_last = max(first, low), min(last, reach)
    count = inner_last - inner_first + 1
    result.narrow(axis, inner_first - low, count).copy_(sums.narrow(axis, inner_first - first, count))
    if first < low:
        result.select(axis, 0).add_(sums.narrow(axis, 0, low - first).sum(axis))
    if last > reach:
        result.select(axis, size - 1).add_(sums.narrow(axis, reach + 1 - first, last - reach).sum(axis))
    return result


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.layout = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, output_gradient, dense_output_gradient, logsumexp_gradient):
    *tensors, mask, output, dense_output, logsumexp = ctx.saved_tensors
    gradients = _backward_operator(
        output_gradient, dense_output_gradient, output, dense_output, logsumexp, *tensors, mask, ctx.scale, ctx.layout
    )
    gradients = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    return *gradients, None, None, None


NAMES = ("basis_attention", "basis_attention_backward")


def _register() -> None:
    operator = define(NAMES[0])(_basis_attention)
    operator.register_fake(_fake_basis_attention)
    operator.register_autograd(_differentiate, setup_context=_save)
    backward = define(NAMES[1])(_basis_attention_backward)
    backward.register_fake(_fake_basis_attention_backward)


_operator, _backward_operator = register_once(NAMES, _register)


__all__ = ["basis_attention"]

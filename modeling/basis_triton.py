"""Basis Translution as Triton kernels in the manner of flash attention (Dao et al. 2022): memory is linear in the tokens.

With projections `q_m`, `k_m`, `v_m` of every token by every factor, computed before, and coefficients `b` of every offset,

    s_ij = scale · (Σ_mn bq[o(j, i), m] bk[o(i, j), n] <q_mi, k_nj>  +  <dense q_i, dense k_j>)
    out_i = Σ_j p_ij Σ_m bv[o(i, j), m] v_mj          dense out_i = Σ_j p_ij (dense v_j)

with `p` the softmax of `s`. The dense parts are LoR's, and may be missing. Neither scores nor probabilities are stored: the backward
pass computes them again from the logarithm of the softmax's denominator.

Gradients of coefficients sum over all pairs of an offset. A program owns a few neighbouring offsets and goes through the pairs of
two rows of the grid at a time, whose offsets lie on diagonals; it writes one sum per batch entry and head. No atomics.

Inside this file text is a grid of one row, as in `translution_triton.py`.

Legend: `B` batch, `A` heads, `R` receivers, `L` tokens, `n` factors, `e` their size per head, `d` dense size per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype, pack, unpack
from .pair_layout import CLASS_FROM_PATCH, CLASS_TO_CLASS, NUM_CLASS_ROWS, PATCH_FROM_CLASS, PairLayout
from .triton_launch import dot_precision, launch, next_power_of_2


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


_GEOMETRY = ["receivers", "tokens", "height", "width", "past", "reach_x", "reach_y", "stride_x", "base_y", "class_row"]
_jit = triton.jit(do_not_specialize=_GEOMETRY)

# The order that all kernels expect.
_CLASS_ROWS: tuple[int, int, int] = (CLASS_TO_CLASS, CLASS_FROM_PATCH, PATCH_FROM_CLASS)
assert _CLASS_ROWS == (0, 1, 2)


@triton.jit
def _bank_rows(
    i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL: tl.constexpr, REVERSE: tl.constexpr
):
    """Rows of the coefficients of pairs of receivers `i` and givers `j`; of the reverse offset for queries."""
    if CAUSAL:
        return tl.minimum(tl.maximum(i[:, None] + past - j[None, :], 0), reach_y)
    # Token 0 is the class token: its rows follow those of the grid.
    i_patch, j_patch = tl.maximum(i - 1, 0), tl.maximum(j - 1, 0)
    dx = (i_patch // width)[:, None] - (j_patch // width)[None, :]
    dy = (i_patch % width)[:, None] - (j_patch % width)[None, :]
    from_patch, from_class = 1, 2
    if REVERSE:
        dx, dy = -dx, -dy
        from_patch, from_class = 2, 1
    dx = tl.minimum(tl.maximum(dx, -reach_x), reach_x)
    dy = tl.minimum(tl.maximum(dy, -reach_y), reach_y)
    rows = (dx + reach_x) * stride_x + dy + base_y
    i_class, j_class = (i == 0)[:, None], (j == 0)[None, :]
    rows = tl.where(j_class, class_row + from_class, rows)
    rows = tl.where(i_class, class_row + from_patch, rows)
    return tl.where(i_class & j_class, class_row, rows)


@triton.jit
def _tokens(pointer, group, index, exists, length, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Some tokens of one group, `[index, WIDTH]`, of a tensor `[groups, length, SIZE]`."""
    column = tl.arange(0, WIDTH)
    place = (group * length + index)[:, None] * SIZE + column[None, :]
    return tl.load(pointer + place, mask=exists[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _store_tokens(pointer, group, index, exists, length, value, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    place = (group * length + index)[:, None] * SIZE + column[None, :]
    tl.store(pointer + place, value, mask=exists[:, None] & (column < SIZE)[None, :])


@triton.jit
def _coefficient(pointer, rows, m, N: tl.constexpr):
    return tl.load(pointer + rows * N + m)


@triton.jit
def _products(
    left,
    right,
    right_coefficients,
    rows,
    group,
    m,
    i,
    i_exists,
    j,
    j_exists,
    receivers,
    tokens,
    LEFT_N: tl.constexpr,
    RIGHT_N: tl.constexpr,
    RIGHT_BASIS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Σ_n b[row, n] <left_mi, right_nj>`, `[i, j]`."""
    one = _tokens(left, group * LEFT_N + m, i, i_exists, receivers, SIZE, WIDTH)
    total = tl.zeros((i.shape[0], j.shape[0]), WIDE)
    for n in tl.static_range(RIGHT_N):
        other = _tokens(right, group * RIGHT_N + n, j, j_exists, tokens, SIZE, WIDTH)
        product = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
        if RIGHT_BASIS:
            product *= _coefficient(right_coefficients, rows, n, RIGHT_N)
        total += product
    return total


@triton.jit
def _scores(
    query,
    key,
    query_coefficients,
    key_coefficients,
    dense_query,
    dense_key,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    scale,
    group,
    num_heads,
    i,
    i_exists,
    j,
    j_exists,
    rows,
    reverse,
    receivers,
    tokens,
    past,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scaled and masked scores of a tile of pairs; minus infinity where there is no pair."""
    total = tl.zeros((i.shape[0], j.shape[0]), WIDE)
    for m in tl.static_range(NQ):
        product = _products(
            query, key, key_coefficients, rows, group, m, i, i_exists, j, j_exists, receivers, tokens,
            NQ, NK, K_BASIS, E, E_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        if Q_BASIS:
            product *= _coefficient(query_coefficients, reverse, m, NQ)
        total += product
    if DENSE_SCORES:
        one = _tokens(dense_query, group, i, i_exists, receivers, D, D_WIDTH)
        other = _tokens(dense_key, group, j, j_exists, tokens, D, D_WIDTH)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION, out_dtype=WIDE)
    total *= scale
    exists = i_exists[:, None] & j_exists[None, :]
    if CAUSAL:
        exists = exists & (i[:, None] + past >= j[None, :])
    if MASKED:
        place = group // num_heads * mask_stride_b + group % num_heads * mask_stride_a
        place = place + (i * mask_stride_i)[:, None] + (j * mask_stride_j)[None, :]
        total += tl.load(mask + place, mask=exists, other=0.0)
    return tl.where(exists, total, float("-inf"))


@_jit
def _forward_kernel(
    output,
    dense_output,
    normaliser,
    query,
    key,
    value,
    query_coefficients,
    key_coefficients,
    value_coefficients,
    dense_query,
    dense_key,
    dense_value,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    scale,
    num_heads,
    receivers,
    tokens,
    height,
    width,
    past,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    class_row,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    V_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    DENSE_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RECEIVERS: tl.constexpr,
    GIVERS: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * RECEIVERS + tl.arange(0, RECEIVERS)
    i_exists = i < receivers
    greatest = tl.full((RECEIVERS,), float("-inf"), WIDE)
    total = tl.zeros((RECEIVERS,), WIDE)
    mixed = tl.zeros((RECEIVERS, V_WIDTH), WIDE)
    dense = tl.zeros((RECEIVERS, D_WIDTH), WIDE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (tl.program_id(0) + 1) * RECEIVERS + past)
    for start in range(0, end, GIVERS):
        j = start + tl.arange(0, GIVERS)
        j_exists = j < tokens
        rows = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, False)
        reverse = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, True)
        scores = _scores(
            query, key, query_coefficients, key_coefficients, dense_query, dense_key, mask, mask_stride_b, mask_stride_a,
            mask_stride_i, mask_stride_j, scale, group, num_heads, i, i_exists, j, j_exists, rows, reverse, receivers, tokens,
            past, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL, E, E_WIDTH, D, D_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        # Rows past the end have no pair at all: any finite number will do.
        higher = tl.maximum(greatest, tl.max(scores, axis=1))
        higher = tl.where(i_exists, higher, 0.0)
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(greatest - higher)
        greatest = higher
        total = total * shrink + tl.sum(weights, axis=1)
        mixed *= shrink[:, None]
        for m in tl.static_range(NV):
            one = _tokens(value, group * NV + m, j, j_exists, tokens, V, V_WIDTH)
            weighted = weights
            if V_BASIS:
                weighted = weights * _coefficient(value_coefficients, rows, m, NV)
            mixed = tl.dot(weighted.to(one.dtype), one, mixed, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_VALUES:
            one = _tokens(dense_value, group, j, j_exists, tokens, D, D_WIDTH)
            dense = tl.dot(
                weights.to(one.dtype), one, dense * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE
            )
    total = tl.where(i_exists, total, 1.0)
    _store_tokens(output, group, i, i_exists, receivers, mixed / total[:, None], V, V_WIDTH)
    if DENSE_VALUES:
        _store_tokens(dense_output, group, i, i_exists, receivers, dense / total[:, None], D, D_WIDTH)
    tl.store(normaliser + group * receivers + i, greatest + tl.log(total), mask=i_exists)


@triton.jit
def _weights(
    query,
    key,
    value,
    query_coefficients,
    key_coefficients,
    value_coefficients,
    dense_query,
    dense_key,
    dense_value,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    output_gradient,
    dense_output_gradient,
    normaliser,
    product_sum,
    scale,
    group,
    num_heads,
    i,
    i_exists,
    j,
    j_exists,
    rows,
    reverse,
    receivers,
    tokens,
    past,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    V_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    DENSE_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Probabilities of a tile of pairs, and the gradients of their unscaled scores."""
    scores = _scores(
        query, key, query_coefficients, key_coefficients, dense_query, dense_key, mask, mask_stride_b, mask_stride_a,
        mask_stride_i, mask_stride_j, scale, group, num_heads, i, i_exists, j, j_exists, rows, reverse, receivers, tokens,
        past, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL, E, E_WIDTH, D, D_WIDTH, WIDE, PRECISION,
    )  # fmt: skip
    shift = tl.load(normaliser + group * receivers + i, mask=i_exists, other=0.0)
    probabilities = tl.exp(scores - shift[:, None])
    gradient = _products(
        output_gradient, value, value_coefficients, rows, group, 0, i, i_exists, j, j_exists, receivers, tokens,
        1, NV, V_BASIS, V, V_WIDTH, WIDE, PRECISION,
    )  # fmt: skip
    if DENSE_VALUES:
        one = _tokens(dense_output_gradient, group, i, i_exists, receivers, D, D_WIDTH)
        other = _tokens(dense_value, group, j, j_exists, tokens, D, D_WIDTH)
        gradient = tl.dot(one, tl.trans(other), gradient, input_precision=PRECISION, out_dtype=WIDE)
    mean = tl.load(product_sum + group * receivers + i, mask=i_exists, other=0.0)
    return probabilities, probabilities * (gradient - mean[:, None]) * scale


@_jit
def _query_gradient_kernel(
    query_gradient,
    dense_query_gradient,
    query,
    key,
    value,
    query_coefficients,
    key_coefficients,
    value_coefficients,
    dense_query,
    dense_key,
    dense_value,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    output_gradient,
    dense_output_gradient,
    normaliser,
    product_sum,
    scale,
    num_heads,
    receivers,
    tokens,
    height,
    width,
    past,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    class_row,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    V_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    DENSE_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RECEIVERS: tl.constexpr,
    GIVERS: tl.constexpr,
):
    """Gradients of some receivers' queries by one factor, and of their dense queries."""
    m = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * RECEIVERS + tl.arange(0, RECEIVERS)
    i_exists = i < receivers
    total = tl.zeros((RECEIVERS, E_WIDTH), WIDE)
    dense = tl.zeros((RECEIVERS, D_WIDTH), WIDE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (tl.program_id(0) + 1) * RECEIVERS + past)
    for start in range(0, end, GIVERS):
        j = start + tl.arange(0, GIVERS)
        j_exists = j < tokens
        rows = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, False)
        reverse = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, True)
        _, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key, dense_value,
            mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient, dense_output_gradient, normaliser,
            product_sum, scale, group, num_heads, i, i_exists, j, j_exists, rows, reverse, receivers, tokens, past, NQ, NK, NV,
            Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED, CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE,
            PRECISION,
        )  # fmt: skip
        own = gradient
        if Q_BASIS:
            own = gradient * _coefficient(query_coefficients, reverse, m, NQ)
        for n in tl.static_range(NK):
            other = _tokens(key, group * NK + n, j, j_exists, tokens, E, E_WIDTH)
            weighted = own
            if K_BASIS:
                weighted = own * _coefficient(key_coefficients, rows, n, NK)
            total = tl.dot(weighted.to(other.dtype), other, total, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_SCORES:
            other = _tokens(dense_key, group, j, j_exists, tokens, D, D_WIDTH)
            dense = tl.dot(gradient.to(other.dtype), other, dense, input_precision=PRECISION, out_dtype=WIDE)
    _store_tokens(query_gradient, group * NQ + m, i, i_exists, receivers, total, E, E_WIDTH)
    if DENSE_SCORES and m == 0:
        _store_tokens(dense_query_gradient, group, i, i_exists, receivers, dense, D, D_WIDTH)


@_jit
def _key_value_gradient_kernel(
    key_gradient,
    value_gradient,
    dense_key_gradient,
    dense_value_gradient,
    query,
    key,
    value,
    query_coefficients,
    key_coefficients,
    value_coefficients,
    dense_query,
    dense_key,
    dense_value,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    output_gradient,
    dense_output_gradient,
    normaliser,
    product_sum,
    scale,
    num_heads,
    receivers,
    tokens,
    height,
    width,
    past,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    class_row,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    V_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    DENSE_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RECEIVERS: tl.constexpr,
    GIVERS: tl.constexpr,
):
    """Gradients of some givers' keys and values by one factor, and of their dense keys and values."""
    n = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * GIVERS + tl.arange(0, GIVERS)
    j_exists = j < tokens
    keys = tl.zeros((GIVERS, E_WIDTH), WIDE)
    values = tl.zeros((GIVERS, V_WIDTH), WIDE)
    dense_keys = tl.zeros((GIVERS, D_WIDTH), WIDE)
    dense_values = tl.zeros((GIVERS, D_WIDTH), WIDE)
    first = 0
    if CAUSAL:
        first = tl.maximum(tl.program_id(0) * GIVERS - past, 0)
    for start in range(first, receivers, RECEIVERS):
        i = start + tl.arange(0, RECEIVERS)
        i_exists = i < receivers
        rows = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, False)
        reverse = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, True)
        probabilities, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key, dense_value,
            mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient, dense_output_gradient, normaliser,
            product_sum, scale, group, num_heads, i, i_exists, j, j_exists, rows, reverse, receivers, tokens, past, NQ, NK, NV,
            Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED, CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE,
            PRECISION,
        )  # fmt: skip
        if n < NK:
            own = gradient
            if K_BASIS:
                own = gradient * _coefficient(key_coefficients, rows, n, NK)
            for m in tl.static_range(NQ):
                other = _tokens(query, group * NQ + m, i, i_exists, receivers, E, E_WIDTH)
                weighted = own
                if Q_BASIS:
                    weighted = own * _coefficient(query_coefficients, reverse, m, NQ)
                keys = tl.dot(
                    tl.trans(weighted.to(other.dtype)), other, keys, input_precision=PRECISION, out_dtype=WIDE
                )
        if n < NV:
            other = _tokens(output_gradient, group, i, i_exists, receivers, V, V_WIDTH)
            weighted = probabilities
            if V_BASIS:
                weighted = probabilities * _coefficient(value_coefficients, rows, n, NV)
            values = tl.dot(
                tl.trans(weighted.to(other.dtype)), other, values, input_precision=PRECISION, out_dtype=WIDE
            )
        if DENSE_SCORES:
            other = _tokens(dense_query, group, i, i_exists, receivers, D, D_WIDTH)
            dense_keys = tl.dot(
                tl.trans(gradient.to(other.dtype)), other, dense_keys, input_precision=PRECISION, out_dtype=WIDE
            )
        if DENSE_VALUES:
            other = _tokens(dense_output_gradient, group, i, i_exists, receivers, D, D_WIDTH)
            dense_values = tl.dot(
                tl.trans(probabilities.to(other.dtype)), other, dense_values, input_precision=PRECISION, out_dtype=WIDE
            )
    if n < NK:
        _store_tokens(key_gradient, group * NK + n, j, j_exists, tokens, keys, E, E_WIDTH)
    if n < NV:
        _store_tokens(value_gradient, group * NV + n, j, j_exists, tokens, values, V, V_WIDTH)
    if n == 0:
        if DENSE_SCORES:
            _store_tokens(dense_key_gradient, group, j, j_exists, tokens, dense_keys, D, D_WIDTH)
        if DENSE_VALUES:
            _store_tokens(dense_value_gradient, group, j, j_exists, tokens, dense_values, D, D_WIDTH)


@triton.jit
def _summed(pairs, diagonal, CLASS_PAIRS: tl.constexpr):
    """Sums of a tile of pairs by offset: over its diagonals, or in one where a class token's pairs share an offset."""
    if CLASS_PAIRS:
        by_column = tl.sum(pairs, axis=0)
        place = tl.arange(0, diagonal.shape[1])
        return tl.where(place == 0, tl.sum(by_column, axis=0), 0.0)
    return tl.sum(tl.gather(pairs, diagonal, axis=1), axis=0)


@_jit
def _coefficient_gradient_kernel(
    query_sums,
    key_sums,
    value_sums,
    query,
    key,
    value,
    query_coefficients,
    key_coefficients,
    value_coefficients,
    dense_query,
    dense_key,
    dense_value,
    mask,
    mask_stride_b,
    mask_stride_a,
    mask_stride_i,
    mask_stride_j,
    output_gradient,
    dense_output_gradient,
    normaliser,
    product_sum,
    scale,
    num_heads,
    receivers,
    tokens,
    height,
    width,
    past,
    reach_x,
    reach_y,
    stride_x,
    base_y,
    class_row,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    Q_BASIS: tl.constexpr,
    K_BASIS: tl.constexpr,
    V_BASIS: tl.constexpr,
    DENSE_SCORES: tl.constexpr,
    DENSE_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CLASS_PAIRS: tl.constexpr,
    FACTORS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Sums over the pairs of some offsets, `[groups, offsets, n]`: of grid offsets, or of a class token's three.

    A tile has `OFFSETS` receivers of one grid row and `2 · OFFSETS` givers of another, so that every receiver meets `OFFSETS`
    neighbouring offsets. For a class token the program's number is the kind of pair.
    """
    SPAN: tl.constexpr = 2 * OFFSETS
    place, span, factor = tl.arange(0, OFFSETS), tl.arange(0, SPAN), tl.arange(0, FACTORS)
    group = tl.program_id(1).to(tl.int64)
    diagonal = place[:, None] - place[None, :] + OFFSETS - 1
    kind = tl.program_id(0)
    dx, least, num_dy, first = 0, 0, width, 0
    if not CAUSAL:
        least, num_dy, first = 1 - width, 2 * width - 1, 1
    blocks = tl.cdiv(num_dy, OFFSETS)
    lowest = least
    # A class token's pairs: receivers and givers are one token or all patches.
    rows_of_grid, low, high, other_steps = 1, 0, 1, 1
    if CLASS_PAIRS:
        if kind == 2:
            high = tokens - 1
        if kind == 1:
            other_steps = tl.cdiv(tokens - 1, SPAN)
    else:
        if not CAUSAL:
            dx = kind // blocks - height + 1
        lowest = least + kind % blocks * OFFSETS
        rows_of_grid = height - tl.abs(dx)
        low = tl.maximum(lowest, past)
        high = tl.minimum(width, width + lowest + OFFSETS - 1)
    query_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    key_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    value_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    for grid_row in range(0, rows_of_grid):
        x = grid_row + tl.maximum(dx, 0)
        for start in range(low, high, OFFSETS):
            for step in range(0, other_steps):
                if CLASS_PAIRS:
                    i = start + place
                    j = step * SPAN + span
                    if kind == 2:
                        i, i_exists = i + 1, i < tokens - 1
                    else:
                        i_exists = i < 1
                    if kind == 1:
                        j, j_exists = j + 1, j < tokens - 1
                    else:
                        j_exists = j < 1
                else:
                    y = start + place
                    v = start - lowest - OFFSETS + 1 + span
                    i, i_exists = first + x * width + y - past, y < width
                    j, j_exists = first + (x - dx) * width + v, (v >= 0) & (v < width)
                rows = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, False)
                reverse = _bank_rows(i, j, width, past, reach_x, reach_y, stride_x, base_y, class_row, CAUSAL, True)
                rows = tl.maximum(rows, 0)
                reverse = tl.maximum(reverse, 0)
                probabilities, gradient = _weights(
                    query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
                    dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
                    dense_output_gradient, normaliser, product_sum, scale, group, num_heads, i, i_exists, j, j_exists, rows,
                    reverse, receivers, tokens, past, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED,
                    CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
                )  # fmt: skip
                if Q_BASIS:
                    for m in tl.static_range(NQ):
                        product = gradient * _products(
                            query, key, key_coefficients, rows, group, m, i, i_exists, j, j_exists, receivers, tokens,
                            NQ, NK, K_BASIS, E, E_WIDTH, WIDE, PRECISION,
                        )  # fmt: skip
                        sums = _summed(product, diagonal, CLASS_PAIRS)
                        query_total += tl.where((factor == m)[:, None], sums[None, :], 0.0)
                if K_BASIS:
                    for n in tl.static_range(NK):
                        product = tl.zeros((OFFSETS, SPAN), WIDE)
                        other = _tokens(key, group * NK + n, j, j_exists, tokens, E, E_WIDTH)
                        for m in tl.static_range(NQ):
                            one = _tokens(query, group * NQ + m, i, i_exists, receivers, E, E_WIDTH)
                            part = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
                            if Q_BASIS:
                                part *= _coefficient(query_coefficients, reverse, m, NQ)
                            product += part
                        sums = _summed(gradient * product, diagonal, CLASS_PAIRS)
                        key_total += tl.where((factor == n)[:, None], sums[None, :], 0.0)
                if V_BASIS:
                    one = _tokens(output_gradient, group, i, i_exists, receivers, V, V_WIDTH)
                    for n in tl.static_range(NV):
                        other = _tokens(value, group * NV + n, j, j_exists, tokens, V, V_WIDTH)
                        product = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
                        sums = _summed(probabilities * product, diagonal, CLASS_PAIRS)
                        value_total += tl.where((factor == n)[:, None], sums[None, :], 0.0)
    if CLASS_PAIRS:
        offset, count, exists = kind + place, 3, place == 0
    else:
        column = lowest - least + place
        row_of_offsets = 0
        if not CAUSAL:
            row_of_offsets = dx + height - 1
        offset, exists = row_of_offsets * num_dy + column, column < num_dy
        count = num_dy
        if not CAUSAL:
            count = num_dy * (2 * height - 1)
    sums_place = (group * count + offset)[None, :]
    if Q_BASIS:
        kept = exists[None, :] & (factor < NQ)[:, None]
        tl.store(query_sums + sums_place * NQ + factor[:, None], query_total, mask=kept)
    if K_BASIS:
        kept = exists[None, :] & (factor < NK)[:, None]
        tl.store(key_sums + sums_place * NK + factor[:, None], key_total, mask=kept)
    if V_BASIS:
        kept = exists[None, :] & (factor < NV)[:, None]
        tl.store(value_sums + sums_place * NV + factor[:, None], value_total, mask=kept)


# Receivers, givers, warps, stages. A loop over factors is unrolled: prefetching all of them would not fit.
_TILES = {
    2: ((128, 64, 8, 1), (64, 64, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    4: ((64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    8: ((16, 16, 4, 1),),
}
# Offsets, warps, stages.
_OFFSET_TILES = {2: ((32, 4, 1), (16, 4, 1)), 4: ((32, 4, 1), (16, 4, 1)), 8: ((16, 4, 1),)}

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
        key, value: `[B, A, n, L, e]` likewise; the values' size may differ.
        query_coefficients, key_coefficients, value_coefficients: `[num_offsets, n]`, or `None` for an ordinary projection.
        dense_query, dense_key: `[B, A, R, d]` and `[B, A, L, d]`, whose product is added to the scores, or `None`.
        dense_value: `[B, A, L, d]`, averaged as well, or `None`.
        mask: additive, broadcastable to `[B, A, R, L]`; a causal layout needs none to be causal.
        scale: of the scores.
        layout: the pairs.

    Returns:
        `[B, A, R, e]` and `[B, A, R, d]` or `None`, of the tokens' dtype.
    """
    wide = accumulation_dtype(query.dtype)
    coefficients = [
        None if c is None else c.to(wide) for c in (query_coefficients, key_coefficients, value_coefficients)
    ]
    output, dense_output, _ = torch.ops.translution.basis_attention(
        query, key, value, *coefficients, dense_query, dense_key, dense_value, mask, scale, pack(layout)
    )
    return output, None if dense_value is None else dense_output


def _arguments(tensors: dict[str, Tensor | None], mask: Tensor | None, scale: float, layout: PairLayout) -> dict:
    """What every kernel takes."""
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    dense = tensors["dense_query"] if tensors["dense_query"] is not None else tensors["dense_value"]
    dense_size = 1 if dense is None else dense.shape[-1]
    shape = (query.shape[0], query.shape[1], layout.num_receivers, layout.num_tokens)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
    image = not layout.causal
    return {
        # A pointer that is not read may point anywhere.
        **{name: query if tensor is None else tensor for name, tensor in tensors.items()},
        "mask": query if mask is None else mask,
        **dict(zip((f"mask_stride_{axis}" for axis in "baij"), strides, strict=True)),
        "scale": scale,
        "num_heads": query.shape[1],
        "receivers": layout.num_receivers,
        "tokens": layout.num_tokens,
        "height": layout.height if image else 1,
        "width": layout.width if image else layout.height,
        "past": layout.past,
        "reach_x": layout.bank_height - 1 if image else 0,
        "reach_y": (layout.bank_width if image else layout.bank_height) - 1,
        "stride_x": 2 * layout.bank_width - 1 if image else 0,
        "base_y": layout.bank_width - 1 if image else 0,
        "class_row": layout.num_grid_offsets,
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


def _tile_options(tokens: Tensor) -> list[dict[str, int]]:
    names = ("RECEIVERS", "GIVERS", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in _TILES[tokens.element_size()]]


def _contiguous(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


@torch.library.custom_op("translution::basis_attention", mutates_args=())
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
    tensors = _contiguous(dict(zip(_NAMES, given, strict=True)))
    batch, heads, _, receivers, _ = query.shape
    output = query.new_empty(batch, heads, receivers, value.shape[-1])
    dense_output = query.new_empty((batch, heads, receivers, dense_value.shape[-1]) if dense_value is not None else 0)
    normaliser = query.new_empty(batch, heads, receivers, dtype=accumulation_dtype(query.dtype))
    launch(
        _forward_kernel,
        lambda option: (-(-receivers // option["RECEIVERS"]), batch * heads),
        _tile_options(query),
        lambda option: {},
        output=output,
        dense_output=dense_output,
        normaliser=normaliser,
        **_arguments(tensors, mask, scale, unpack(layout)),
    )
    return output, dense_output, normaliser


@_basis_attention.register_fake
def _(query, key, value, qc, kc, vc, dense_query, dense_key, dense_value, mask, scale, layout):
    shape = (*query.shape[:2], query.shape[3])
    return (
        query.new_empty(*shape, value.shape[-1]),
        query.new_empty(0 if dense_value is None else (*shape, dense_value.shape[-1])),
        query.new_empty(shape, dtype=accumulation_dtype(query.dtype)),
    )


@torch.library.custom_op("translution::basis_attention_backward", mutates_args=())
def _basis_attention_backward(
    output_gradient: Tensor,
    dense_output_gradient: Tensor,
    output: Tensor,
    dense_output: Tensor,
    normaliser: Tensor,
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
    tensors, geometry = _contiguous(dict(zip(_NAMES, given, strict=True))), unpack(layout)
    wide, groups = normaliser.dtype, query.shape[0] * query.shape[1]
    product_sum = (output_gradient.to(wide) * output.to(wide)).sum(-1)
    if dense_value is not None:
        product_sum += (dense_output_gradient.to(wide) * dense_output.to(wide)).sum(-1)
    gradients = {
        name: query.new_empty(0) if tensor is None else torch.empty_like(tensor) for name, tensor in tensors.items()
    }
    arguments = {
        "output_gradient": output_gradient.contiguous(),
        "dense_output_gradient": dense_output_gradient.contiguous(),
        "normaliser": normaliser,
        "product_sum": product_sum,
        **_arguments(tensors, mask, scale, geometry),
    }
    launch(
        _query_gradient_kernel,
        lambda option: (-(-geometry.num_receivers // option["RECEIVERS"]), query.shape[2], groups),
        _tile_options(query),
        lambda option: {},
        query_gradient=gradients["query"],
        dense_query_gradient=gradients["dense_query"],
        **arguments,
    )
    factors = max(key.shape[2], value.shape[2])
    launch(
        _key_value_gradient_kernel,
        lambda option: (-(-geometry.num_tokens // option["GIVERS"]), factors, groups),
        _tile_options(query),
        lambda option: {},
        key_gradient=gradients["key"],
        value_gradient=gradients["value"],
        dense_key_gradient=gradients["dense_key"],
        dense_value_gradient=gradients["dense_value"],
        **arguments,
    )
    for name in ("query", "key", "value"):
        coefficients = tensors[f"{name}_coefficients"]
        if coefficients is not None:
            # In the kernel's order of offsets first; there may be more of them than rows, or fewer.
            gradients[f"{name}_coefficients"] = None
    _coefficient_gradients(gradients, arguments, geometry, groups, query)
    return list(gradients.values())


@_basis_attention_backward.register_fake
def _(*arguments):
    query = arguments[5]
    return [query.new_empty(0) if t is None else torch.empty_like(t).contiguous() for t in arguments[5:14]]


def _coefficient_gradients(
    gradients: dict[str, Tensor | None], arguments: dict[str, Any], layout: PairLayout, groups: int, query: Tensor
) -> None:
    """Puts the gradients of coefficients, `[num_offsets, n]`, in the place of the `None`s."""
    wanted = [name for name, gradient in gradients.items() if gradient is None]
    if not wanted:
        return
    sizes = {"query_coefficients": "NQ", "key_coefficients": "NK", "value_coefficients": "NV"}
    wide = arguments["normaliser"].dtype
    height, width = arguments["height"], arguments["width"]
    num_dy = width if layout.causal else 2 * width - 1
    num_offsets = num_dy * (1 if layout.causal else 2 * height - 1)
    options = [
        dict(zip(("OFFSETS", "num_warps", "num_stages"), tile, strict=True))
        for tile in _OFFSET_TILES[query.element_size()]
    ]

    def sums(count: int, class_pairs: bool) -> dict[str, Tensor]:
        made = {name: query.new_empty(groups, count, arguments[sizes[name]], dtype=wide) for name in wanted}
        outputs = {name.replace("coefficients", "sums"): made.get(name, arguments["normaliser"]) for name in sizes}
        rows = 1 if layout.causal else 2 * height - 1
        launch(
            _coefficient_gradient_kernel,
            lambda option: (3 if class_pairs else rows * -(-num_dy // option["OFFSETS"]), groups),
            options,
            lambda option: {},
            **outputs,
            **arguments,
            CLASS_PAIRS=class_pairs,
            FACTORS=next_power_of_2(max(arguments["NQ"], arguments["NK"], arguments["NV"])),
        )
        return {name: sum_.sum(0) for name, sum_ in made.items()}

    grid = sums(num_offsets, False)
    classes = sums(NUM_CLASS_ROWS, True) if layout.class_token else None
    for name in wanted:
        by_offset = grid[name].unflatten(0, (-1, num_dy))
        if layout.causal:
            rows = _clamped(by_offset, 1, 0, arguments["reach_y"], 0).flatten(0, 1)
        else:
            if name == "query_coefficients":
                by_offset = by_offset.flip(0, 1)
            rows = _clamped(by_offset, 0, -arguments["reach_x"], arguments["reach_x"], height - 1)
            rows = _clamped(rows, 1, -arguments["reach_y"], arguments["reach_y"], width - 1).flatten(0, 1)
        if classes is not None:
            three = classes[name]
            rows = torch.cat((rows, three[[0, 2, 1]] if name == "query_coefficients" else three))
        gradients[name] = rows


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


def _differentiate(ctx, output_gradient, dense_output_gradient, normaliser_gradient):
    *tensors, mask, output, dense_output, normaliser = ctx.saved_tensors
    gradients = torch.ops.translution.basis_attention_backward(
        output_gradient, dense_output_gradient, output, dense_output, normaliser, *tensors, mask, ctx.scale, ctx.layout
    )
    gradients = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    return *gradients, None, None, None


_basis_attention.register_autograd(_differentiate, setup_context=_save)


__all__ = ["basis_attention"]

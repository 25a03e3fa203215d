"""The Triton kernels of Basis Translution; `triton_basis.py` launches them and has the formulas.

Every program computes the scores of its pairs again. Text is a grid of one row here: the distance is a column offset.

`GROUPS` heads of queries share one of keys and values, one after the other: `key_head` is `head // GROUPS`.

Legend: `i` queries, `j` keys, `m` and `n` factors; `head` and `key_head` number the heads of all batch entries.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


# Lengths must not be compiled in: each new one would compile again.
_LENGTHS = [
    "queries",
    "tokens",
    "height",
    "width",
    "past",
    "max_row_distance",
    "max_column_distance",
    "stride_x",
    "base_y",
    "class_row",
    "first",
]
_jit = triton.jit(do_not_specialize=_LENGTHS)


@triton.jit
def _program(blocks, FACTORS: tl.constexpr):
    """Block, factor and head of a program. All lie on the grid's first axis: the others hold 65,535 programs at most."""
    program = tl.program_id(0)
    rest = program // blocks
    return program % blocks, rest % FACTORS, (rest // FACTORS).to(tl.int64)


@triton.jit
def _bank_rows(
    i,
    j,
    width,
    past,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    first,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Rows of the coefficients of pairs of queries `i` and keys `j`; of the reverse offset for queries."""
    if CAUSAL:
        return tl.minimum(tl.maximum(i[:, None] + past - j[None, :], 0), max_column_distance)
    # Before the first patch there may be a class token: its rows follow those of the grid.
    i_patch, j_patch = tl.maximum(i - first, 0), tl.maximum(j - first, 0)
    row_offset = (i_patch // width)[:, None] - (j_patch // width)[None, :]
    column_offset = (i_patch % width)[:, None] - (j_patch % width)[None, :]
    from_patch, from_class = 1, 2
    if REVERSE:
        row_offset, column_offset = -row_offset, -column_offset
        from_patch, from_class = 2, 1
    row_offset = tl.minimum(tl.maximum(row_offset, -max_row_distance), max_row_distance)
    column_offset = tl.minimum(tl.maximum(column_offset, -max_column_distance), max_column_distance)
    rows = (row_offset + max_row_distance) * stride_x + column_offset + base_y
    i_class, j_class = (i < first)[:, None], (j < first)[None, :]
    rows = tl.where(j_class, class_row + from_class, rows)
    rows = tl.where(i_class, class_row + from_patch, rows)
    return tl.where(i_class & j_class, class_row, rows)


@triton.jit
def _tokens(pointer, head, index, exists, length, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Some tokens of one head, `[index, WIDTH]`, of a tensor `[heads, length, SIZE]`."""
    column = tl.arange(0, WIDTH)
    place = (head * length + index)[:, None] * SIZE + column[None, :]
    return tl.load(pointer + place, mask=exists[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _store_tokens(pointer, head, index, exists, length, value, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    place = (head * length + index)[:, None] * SIZE + column[None, :]
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
    head,
    key_head,
    m,
    i,
    i_exists,
    j,
    j_exists,
    queries,
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
    one = _tokens(left, head * LEFT_N + m, i, i_exists, queries, SIZE, WIDTH)
    total = tl.zeros((i.shape[0], j.shape[0]), WIDE)
    for n in tl.static_range(RIGHT_N):
        other = _tokens(right, key_head * RIGHT_N + n, j, j_exists, tokens, SIZE, WIDTH)
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
    head,
    key_head,
    num_heads,
    i,
    i_exists,
    j,
    j_exists,
    rows,
    reverse,
    queries,
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
    """Scaled and masked scores of a tile of pairs, minus infinity where there is no pair."""
    total = tl.zeros((i.shape[0], j.shape[0]), WIDE)
    for m in tl.static_range(NQ):
        product = _products(
            query, key, key_coefficients, rows, head, key_head, m, i, i_exists, j, j_exists, queries, tokens,
            NQ, NK, K_BASIS, E, E_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        if Q_BASIS:
            product *= _coefficient(query_coefficients, reverse, m, NQ)
        total += product
    if DENSE_SCORES:
        one = _tokens(dense_query, head, i, i_exists, queries, D, D_WIDTH)
        other = _tokens(dense_key, key_head, j, j_exists, tokens, D, D_WIDTH)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION, out_dtype=WIDE)
    total *= scale
    exists = i_exists[:, None] & j_exists[None, :]
    if CAUSAL:
        exists = exists & (i[:, None] + past >= j[None, :])
    if MASKED:
        place = head // num_heads * mask_stride_b + head % num_heads * mask_stride_a
        # In 64 bits: a mask may have more than 2³¹ elements.
        place = place + (i.to(tl.int64) * mask_stride_i)[:, None] + (j.to(tl.int64) * mask_stride_j)[None, :]
        total += tl.load(mask + place, mask=exists, other=0.0)
    return tl.where(exists, total, float("-inf"))


@_jit
def forward_kernel(
    output,
    dense_output,
    logsumexp,
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
    queries,
    tokens,
    width,
    past,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    first,
    GROUPS: tl.constexpr,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, _, head = _program(tl.cdiv(queries, QUERIES), 1)
    key_head = head // GROUPS
    i = block * QUERIES + tl.arange(0, QUERIES)
    i_exists = i < queries
    running_max = tl.full((QUERIES,), float("-inf"), WIDE)
    total = tl.zeros((QUERIES,), WIDE)
    mixed = tl.zeros((QUERIES, V_WIDTH), WIDE)
    dense = tl.zeros((QUERIES, D_WIDTH), WIDE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (block + 1) * QUERIES + past)
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        j_exists = j < tokens
        rows = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL, False
        )
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL, True
        )
        scores = _scores(
            query, key, query_coefficients, key_coefficients, dense_query, dense_key, mask, mask_stride_b, mask_stride_a,
            mask_stride_i, mask_stride_j, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows, reverse, queries,
            tokens, past, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL, E, E_WIDTH, D, D_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        running_max_before = running_max
        running_max = tl.maximum(running_max, tl.max(scores, axis=1))
        # Before a query's first visible pair its weights are 0, whatever finite number is taken off.
        shift = tl.where(running_max == float("-inf"), 0.0, running_max)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(running_max_before - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed *= shrink[:, None]
        for m in tl.static_range(NV):
            one = _tokens(value, key_head * NV + m, j, j_exists, tokens, V, V_WIDTH)
            weighted = weights
            if V_BASIS:
                weighted = weights * _coefficient(value_coefficients, rows, m, NV)
            mixed = tl.dot(weighted.to(one.dtype), one, mixed, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_VALUES:
            one = _tokens(dense_value, key_head, j, j_exists, tokens, D, D_WIDTH)
            dense = tl.dot(
                weights.to(one.dtype), one, dense * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE
            )
    # A query that sees nothing has no weights: 0 / 0, as in any softmax. What is past the end is not stored.
    total = tl.where(i_exists, total, 1.0)
    _store_tokens(output, head, i, i_exists, queries, mixed / total[:, None], V, V_WIDTH)
    if DENSE_VALUES:
        _store_tokens(dense_output, head, i, i_exists, queries, dense / total[:, None], D, D_WIDTH)
    tl.store(logsumexp + head * queries + i, running_max + tl.log(total), mask=i_exists)


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
    logsumexp,
    delta,
    scale,
    head,
    key_head,
    num_heads,
    i,
    i_exists,
    j,
    j_exists,
    rows,
    reverse,
    queries,
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
        mask_stride_i, mask_stride_j, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows, reverse, queries,
        tokens, past, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL, E, E_WIDTH, D, D_WIDTH, WIDE, PRECISION,
    )  # fmt: skip
    shift = tl.load(logsumexp + head * queries + i, mask=i_exists, other=0.0)
    probabilities = tl.exp(scores - shift[:, None])
    gradient = _products(
        output_gradient, value, value_coefficients, rows, head, key_head, 0, i, i_exists, j, j_exists, queries, tokens,
        1, NV, V_BASIS, V, V_WIDTH, WIDE, PRECISION,
    )  # fmt: skip
    if DENSE_VALUES:
        one = _tokens(dense_output_gradient, head, i, i_exists, queries, D, D_WIDTH)
        other = _tokens(dense_value, key_head, j, j_exists, tokens, D, D_WIDTH)
        gradient = tl.dot(one, tl.trans(other), gradient, input_precision=PRECISION, out_dtype=WIDE)
    mean = tl.load(delta + head * queries + i, mask=i_exists, other=0.0)
    return probabilities, probabilities * (gradient - mean[:, None]) * scale


@_jit
def query_gradient_kernel(
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
    logsumexp,
    delta,
    scale,
    num_heads,
    queries,
    tokens,
    width,
    past,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    first,
    GROUPS: tl.constexpr,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some queries' queries by one factor, and of their dense queries."""
    block, m, head = _program(tl.cdiv(queries, QUERIES), NQ)
    key_head = head // GROUPS
    i = block * QUERIES + tl.arange(0, QUERIES)
    i_exists = i < queries
    total = tl.zeros((QUERIES, E_WIDTH), WIDE)
    dense = tl.zeros((QUERIES, D_WIDTH), WIDE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (block + 1) * QUERIES + past)
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        j_exists = j < tokens
        rows = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL, False
        )
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL, True
        )
        _, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
            dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
            dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows,
            reverse, queries, tokens, past, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED,
            CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        own = gradient
        if Q_BASIS:
            own = gradient * _coefficient(query_coefficients, reverse, m, NQ)
        for n in tl.static_range(NK):
            other = _tokens(key, key_head * NK + n, j, j_exists, tokens, E, E_WIDTH)
            weighted = own
            if K_BASIS:
                weighted = own * _coefficient(key_coefficients, rows, n, NK)
            total = tl.dot(weighted.to(other.dtype), other, total, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_SCORES:
            other = _tokens(dense_key, key_head, j, j_exists, tokens, D, D_WIDTH)
            dense = tl.dot(gradient.to(other.dtype), other, dense, input_precision=PRECISION, out_dtype=WIDE)
    _store_tokens(query_gradient, head * NQ + m, i, i_exists, queries, total, E, E_WIDTH)
    if DENSE_SCORES and m == 0:
        _store_tokens(dense_query_gradient, head, i, i_exists, queries, dense, D, D_WIDTH)


@_jit
def key_value_gradient_kernel(
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
    logsumexp,
    delta,
    scale,
    num_heads,
    queries,
    tokens,
    width,
    past,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    first,
    GROUPS: tl.constexpr,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some keys' keys and values by one factor, and of their dense keys and values."""
    block, n, key_head = _program(tl.cdiv(tokens, KEYS), max(NK, NV))
    j = block * KEYS + tl.arange(0, KEYS)
    j_exists = j < tokens
    keys = tl.zeros((KEYS, E_WIDTH), WIDE)
    values = tl.zeros((KEYS, V_WIDTH), WIDE)
    dense_keys = tl.zeros((KEYS, D_WIDTH), WIDE)
    dense_values = tl.zeros((KEYS, D_WIDTH), WIDE)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(block * KEYS - past, 0)
    for member in range(GROUPS):
        head = key_head * GROUPS + member
        for start in range(begin, queries, QUERIES):
            i = start + tl.arange(0, QUERIES)
            i_exists = i < queries
            rows = _bank_rows(
                i,
                j,
                width,
                past,
                max_row_distance,
                max_column_distance,
                stride_x,
                base_y,
                class_row,
                first,
                CAUSAL,
                False,
            )
            reverse = _bank_rows(
                i,
                j,
                width,
                past,
                max_row_distance,
                max_column_distance,
                stride_x,
                base_y,
                class_row,
                first,
                CAUSAL,
                True,
            )
            probabilities, gradient = _weights(
                query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
                dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
                dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows,
                reverse, queries, tokens, past, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED,
                CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
            )  # fmt: skip
            if n < NK:
                own = gradient
                if K_BASIS:
                    own = gradient * _coefficient(key_coefficients, rows, n, NK)
                for m in tl.static_range(NQ):
                    other = _tokens(query, head * NQ + m, i, i_exists, queries, E, E_WIDTH)
                    weighted = own
                    if Q_BASIS:
                        weighted = own * _coefficient(query_coefficients, reverse, m, NQ)
                    keys = tl.dot(
                        tl.trans(weighted.to(other.dtype)), other, keys, input_precision=PRECISION, out_dtype=WIDE
                    )
            if n < NV:
                other = _tokens(output_gradient, head, i, i_exists, queries, V, V_WIDTH)
                weighted = probabilities
                if V_BASIS:
                    weighted = probabilities * _coefficient(value_coefficients, rows, n, NV)
                values = tl.dot(
                    tl.trans(weighted.to(other.dtype)), other, values, input_precision=PRECISION, out_dtype=WIDE
                )
            if DENSE_SCORES:
                other = _tokens(dense_query, head, i, i_exists, queries, D, D_WIDTH)
                dense_keys = tl.dot(
                    tl.trans(gradient.to(other.dtype)), other, dense_keys, input_precision=PRECISION, out_dtype=WIDE
                )
            if DENSE_VALUES:
                other = _tokens(dense_output_gradient, head, i, i_exists, queries, D, D_WIDTH)
                dense_values = tl.dot(
                    tl.trans(probabilities.to(other.dtype)),
                    other,
                    dense_values,
                    input_precision=PRECISION,
                    out_dtype=WIDE,
                )
    if n < NK:
        _store_tokens(key_gradient, key_head * NK + n, j, j_exists, tokens, keys, E, E_WIDTH)
    if n < NV:
        _store_tokens(value_gradient, key_head * NV + n, j, j_exists, tokens, values, V, V_WIDTH)
    if n == 0:
        if DENSE_SCORES:
            _store_tokens(dense_key_gradient, key_head, j, j_exists, tokens, dense_keys, D, D_WIDTH)
        if DENSE_VALUES:
            _store_tokens(dense_value_gradient, key_head, j, j_exists, tokens, dense_values, D, D_WIDTH)


@triton.jit
def _summed(pairs, diagonal, CLASS_PAIRS: tl.constexpr):
    """Sums of a tile of pairs by offset: over its diagonals, or in one where a class token's pairs share an offset."""
    if CLASS_PAIRS:
        by_column = tl.sum(pairs, axis=0)
        place = tl.arange(0, diagonal.shape[1])
        return tl.where(place == 0, tl.sum(by_column, axis=0), 0.0)
    return tl.sum(tl.gather(pairs, diagonal, axis=1), axis=0)


@_jit
def coefficient_gradient_kernel(
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
    logsumexp,
    delta,
    scale,
    num_heads,
    queries,
    tokens,
    height,
    width,
    past,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    first,
    GROUPS: tl.constexpr,
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
    """Sums over the pairs of some offsets, `[heads, offsets, n]`: of grid offsets, or of a class token's three.

    A tile has `OFFSETS` queries of one grid row and `2 · OFFSETS` keys of another, so that every query meets `OFFSETS`
    neighbouring offsets. For a class token the program's number is the kind of pair.
    """
    SPAN: tl.constexpr = 2 * OFFSETS
    place, span, factor = tl.arange(0, OFFSETS), tl.arange(0, SPAN), tl.arange(0, FACTORS)
    diagonal = place[:, None] - place[None, :] + OFFSETS - 1
    row_offset, least, num_dy = 0, 0, width
    if not CAUSAL:
        least, num_dy = 1 - width, 2 * width - 1
    blocks = tl.cdiv(num_dy, OFFSETS)
    kinds = blocks
    if not CAUSAL:
        kinds = blocks * (2 * height - 1)
    if CLASS_PAIRS:
        kinds = 3
    kind, _, head = _program(kinds, 1)
    key_head = head // GROUPS
    lowest = least
    # A class token's pairs: queries and keys are one token or all patches.
    rows_of_grid, low, high, other_steps = 1, 0, 1, 1
    if CLASS_PAIRS:
        if kind == 2:
            high = tokens - 1
        if kind == 1:
            other_steps = tl.cdiv(tokens - 1, SPAN)
    else:
        if not CAUSAL:
            row_offset = kind // blocks - height + 1
        lowest = least + kind % blocks * OFFSETS
        rows_of_grid = height - tl.abs(row_offset)
        low = tl.maximum(lowest, past)
        high = tl.minimum(width, width + lowest + OFFSETS - 1)
    query_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    key_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    value_total = tl.zeros((FACTORS, OFFSETS), WIDE)
    for grid_row in range(0, rows_of_grid):
        x = grid_row + tl.maximum(row_offset, 0)
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
                    j, j_exists = first + (x - row_offset) * width + v, (v >= 0) & (v < width)
                rows = _bank_rows(
                    i,
                    j,
                    width,
                    past,
                    max_row_distance,
                    max_column_distance,
                    stride_x,
                    base_y,
                    class_row,
                    first,
                    CAUSAL,
                    False,
                )
                reverse = _bank_rows(
                    i,
                    j,
                    width,
                    past,
                    max_row_distance,
                    max_column_distance,
                    stride_x,
                    base_y,
                    class_row,
                    first,
                    CAUSAL,
                    True,
                )
                rows = tl.maximum(rows, 0)
                reverse = tl.maximum(reverse, 0)
                probabilities, gradient = _weights(
                    query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
                    dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
                    dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows,
                    reverse, queries, tokens, past, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES, DENSE_VALUES, MASKED,
                    CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
                )  # fmt: skip
                if Q_BASIS:
                    for m in tl.static_range(NQ):
                        product = gradient * _products(
                            query, key, key_coefficients, rows, head, key_head, m, i, i_exists, j, j_exists, queries, tokens,
                            NQ, NK, K_BASIS, E, E_WIDTH, WIDE, PRECISION,
                        )  # fmt: skip
                        sums = _summed(product, diagonal, CLASS_PAIRS)
                        query_total += tl.where((factor == m)[:, None], sums[None, :], 0.0)
                if K_BASIS:
                    for n in tl.static_range(NK):
                        product = tl.zeros((OFFSETS, SPAN), WIDE)
                        other = _tokens(key, key_head * NK + n, j, j_exists, tokens, E, E_WIDTH)
                        for m in tl.static_range(NQ):
                            one = _tokens(query, head * NQ + m, i, i_exists, queries, E, E_WIDTH)
                            part = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
                            if Q_BASIS:
                                part *= _coefficient(query_coefficients, reverse, m, NQ)
                            product += part
                        sums = _summed(gradient * product, diagonal, CLASS_PAIRS)
                        key_total += tl.where((factor == n)[:, None], sums[None, :], 0.0)
                if V_BASIS:
                    one = _tokens(output_gradient, head, i, i_exists, queries, V, V_WIDTH)
                    for n in tl.static_range(NV):
                        other = _tokens(value, key_head * NV + n, j, j_exists, tokens, V, V_WIDTH)
                        product = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
                        sums = _summed(probabilities * product, diagonal, CLASS_PAIRS)
                        value_total += tl.where((factor == n)[:, None], sums[None, :], 0.0)
    if CLASS_PAIRS:
        offset, count, exists = kind + place, 3, place == 0
    else:
        column = lowest - least + place
        row_of_offsets = 0
        if not CAUSAL:
            row_of_offsets = row_offset + height - 1
        offset, exists = row_of_offsets * num_dy + column, column < num_dy
        count = num_dy
        if not CAUSAL:
            count = num_dy * (2 * height - 1)
    sums_place = (head * count + offset)[None, :]
    if Q_BASIS:
        kept = exists[None, :] & (factor < NQ)[:, None]
        tl.store(query_sums + sums_place * NQ + factor[:, None], query_total, mask=kept)
    if K_BASIS:
        kept = exists[None, :] & (factor < NK)[:, None]
        tl.store(key_sums + sums_place * NK + factor[:, None], key_total, mask=kept)
    if V_BASIS:
        kept = exists[None, :] & (factor < NV)[:, None]
        tl.store(value_sums + sums_place * NV + factor[:, None], value_total, mask=kept)


__all__ = ["coefficient_gradient_kernel", "forward_kernel", "key_value_gradient_kernel", "query_gradient_kernel"]

"""The Triton kernels of Basis Translution; `triton_basis.py` launches them and has the formulas.

Every program computes the scores of its pairs again. Text is a grid of one row here: the distance is a column offset.

Several factors of a tile's tokens lie one after the other, so that the products of all of them are one matrix product,
`[m·i, n·j]`, and so are sums over pairs and factors; it is the coefficients that are read pair by pair. Where a tile
does not hold all factors it goes through them in a loop that is not unrolled: unrolled, the factors' products would
all need registers at once.

`GROUPS` heads of queries share one of keys and values, one after the other: `key_head` is `head // GROUPS`.

Legend: `i` queries, `j` keys, `m` and `n` factors; `head` and `key_head` number the heads of all batch entries. Tiles
are `[m, i, n, j]` or a part of that.
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
    "num_offsets",
    "max_row_distance",
    "max_column_distance",
    "stride_x",
    "base_y",
    "class_row",
    "first",
    "first_column_block",
    "column_blocks",
]
_jit = triton.jit(do_not_specialize=_LENGTHS)


@triton.jit
def _program(blocks, PARTS: tl.constexpr):
    """Block, part of the factors and head of a program.

    All lie on the grid's first axis: the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    rest = program // blocks
    return program % blocks, rest % PARTS, (rest // PARTS).to(tl.int64)


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
def _places(
    head, m, index, exists, length, N: tl.constexpr, FACTORS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Places of `FACTORS` factors, from `m` on, of some tokens of one head in `[heads, N, length, SIZE]`; `[m·index, WIDTH]`."""
    factor, column = m + tl.arange(0, FACTORS), tl.arange(0, WIDTH)
    row = tl.reshape((head * N + factor)[:, None] * length + index[None, :], [FACTORS * index.shape[0]])
    exists = tl.reshape((factor < N)[:, None] & exists[None, :], [FACTORS * index.shape[0]])
    return row[:, None] * SIZE + column[None, :], exists[:, None] & (column < SIZE)[None, :]


@triton.jit
def _load(
    pointer,
    head,
    m,
    index,
    exists,
    length,
    N: tl.constexpr,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place, exists = _places(head, m, index, exists, length, N, FACTORS, SIZE, WIDTH)
    return tl.load(pointer + place, mask=exists, other=0.0)


@triton.jit
def _store(
    pointer,
    head,
    m,
    index,
    exists,
    length,
    value,
    N: tl.constexpr,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place, exists = _places(head, m, index, exists, length, N, FACTORS, SIZE, WIDTH)
    tl.store(pointer + place, value, mask=exists)


@triton.jit
def _query_weights(
    coefficients, rows, m, num_offsets, N: tl.constexpr, FACTORS: tl.constexpr, BASIS: tl.constexpr, WIDE: tl.constexpr
):
    """Coefficients `[N, num_offsets]` of pairs by `FACTORS` factors from `m` on, `[m, i, j]`; ones without a basis."""
    if BASIS:
        factor = (m + tl.arange(0, FACTORS))[:, None, None]
        weights = tl.load(coefficients + factor * num_offsets + rows[None, :, :], mask=factor < N, other=0.0)
    else:
        weights = tl.full([1, rows.shape[0], rows.shape[1]], 1.0, WIDE)
    return weights


@triton.jit
def _key_weights(
    coefficients, rows, n, num_offsets, N: tl.constexpr, FACTORS: tl.constexpr, BASIS: tl.constexpr, WIDE: tl.constexpr
):
    """As `_query_weights`, `[i, n, j]`: in the order of the products."""
    if BASIS:
        factor = (n + tl.arange(0, FACTORS))[None, :, None]
        weights = tl.load(coefficients + factor * num_offsets + rows[:, None, :], mask=factor < N, other=0.0)
    else:
        weights = tl.full([rows.shape[0], 1, rows.shape[1]], 1.0, WIDE)
    return weights


@triton.jit
def _products(
    left,
    right,
    head,
    key_head,
    m,
    n,
    i,
    i_exists,
    j,
    j_exists,
    queries,
    tokens,
    LEFT_N: tl.constexpr,
    LEFT_FACTORS: tl.constexpr,
    RIGHT_N: tl.constexpr,
    RIGHT_FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`<left_mi, right_nj>`, `[m, i, n, j]`."""
    one = _load(left, head, m, i, i_exists, queries, LEFT_N, LEFT_FACTORS, SIZE, WIDTH)
    other = _load(right, key_head, n, j, j_exists, tokens, RIGHT_N, RIGHT_FACTORS, SIZE, WIDTH)
    products = tl.dot(one, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
    return tl.reshape(products, [LEFT_FACTORS, i.shape[0], RIGHT_FACTORS, j.shape[0]])


@triton.jit
def _over_queries_factors(products, weights):
    """`Σ_m weights[m, i, j] · products[m, i, n, j]`, `[i, n, j]`."""
    weighted = products * weights[:, :, None, :]
    if products.shape[0] == 1:
        total = tl.reshape(weighted, [products.shape[1], products.shape[2], products.shape[3]])
    else:
        total = tl.sum(weighted, axis=0)
    return total


@triton.jit
def _over_keys_factors(products, weights):
    """`Σ_n weights[i, n, j] · products[m, i, n, j]`, `[m, i, j]`."""
    weighted = products * weights[None, :, :, :]
    if products.shape[2] == 1:
        total = tl.reshape(weighted, [products.shape[0], products.shape[1], products.shape[3]])
    else:
        total = tl.sum(weighted, axis=2)
    return total


@triton.jit
def _weighted(pairs, query_weights, key_weights):
    """`pairs[i, j] · query_weights[m, i, j] · key_weights[i, n, j]`, `[m·i, n·j]`."""
    weighted = (pairs[None, :, :] * query_weights)[:, :, None, :] * key_weights[None, :, :, :]
    return tl.reshape(weighted, [weighted.shape[0] * weighted.shape[1], weighted.shape[2] * weighted.shape[3]])


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
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
):
    """Scaled and masked scores of a tile of pairs, minus infinity where there is no pair."""
    total = tl.zeros([i.shape[0], 1, j.shape[0]], WIDE)
    for m in range(0, NQ, QUERY_FACTORS):
        mixed = tl.zeros([QUERY_FACTORS, i.shape[0], j.shape[0]], WIDE)
        for n in range(0, NK, KEY_FACTORS):
            products = _products(
                query, key, head, key_head, m, n, i, i_exists, j, j_exists, queries, tokens, NQ, QUERY_FACTORS, NK,
                KEY_FACTORS, E, E_WIDTH, WIDE, PRECISION,
            )  # fmt: skip
            key_weights = _key_weights(key_coefficients, rows, n, num_offsets, NK, KEY_FACTORS, K_BASIS, WIDE)
            mixed += _over_keys_factors(products, key_weights)
        query_weights = _query_weights(query_coefficients, reverse, m, num_offsets, NQ, QUERY_FACTORS, Q_BASIS, WIDE)
        total += _over_queries_factors(mixed[:, :, None, :], query_weights)
    total = tl.reshape(total, [i.shape[0], j.shape[0]])
    if DENSE_SCORES:
        one = _load(dense_query, head, 0, i, i_exists, queries, 1, 1, D, D_WIDTH)
        other = _load(dense_key, key_head, 0, j, j_exists, tokens, 1, 1, D, D_WIDTH)
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
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
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
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            False,
        )  # fmt: skip
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            True,
        )  # fmt: skip
        scores = _scores(
            query, key, query_coefficients, key_coefficients, dense_query, dense_key, mask, mask_stride_b,
            mask_stride_a, mask_stride_i, mask_stride_j, scale, head, key_head, num_heads, i, i_exists, j, j_exists,
            rows, reverse, queries, tokens, past, num_offsets, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL,
            E, E_WIDTH, D, D_WIDTH, WIDE, PRECISION, QUERY_FACTORS, KEY_FACTORS,
        )  # fmt: skip
        running_max_before = running_max
        running_max = tl.maximum(running_max, tl.max(scores, axis=1))
        # Before a query's first visible pair its weights are 0, whatever finite number is taken off.
        shift = tl.where(running_max == float("-inf"), 0.0, running_max)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(running_max_before - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed *= shrink[:, None]
        for n in range(0, NV, VALUE_FACTORS):
            one = _load(value, key_head, n, j, j_exists, tokens, NV, VALUE_FACTORS, V, V_WIDTH)
            by_factor = _key_weights(value_coefficients, rows, n, num_offsets, NV, VALUE_FACTORS, V_BASIS, WIDE)
            weighted = tl.reshape(weights[:, None, :] * by_factor, [QUERIES, VALUE_FACTORS * KEYS]).to(one.dtype)
            mixed = tl.dot(weighted, one, mixed, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_VALUES:
            one = _load(dense_value, key_head, 0, j, j_exists, tokens, 1, 1, D, D_WIDTH)
            dense = tl.dot(
                weights.to(one.dtype), one, dense * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE
            )
    # A query that sees nothing has no weights: 0 / 0, as in any softmax. What is past the end is not stored.
    total = tl.where(i_exists, total, 1.0)
    _store(output, head, 0, i, i_exists, queries, mixed / total[:, None], 1, 1, V, V_WIDTH)
    if DENSE_VALUES:
        _store(dense_output, head, 0, i, i_exists, queries, dense / total[:, None], 1, 1, D, D_WIDTH)
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
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
):
    """Probabilities of a tile of pairs, and the gradients of their unscaled scores."""
    scores = _scores(
        query, key, query_coefficients, key_coefficients, dense_query, dense_key, mask, mask_stride_b, mask_stride_a,
        mask_stride_i, mask_stride_j, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows, reverse,
        queries, tokens, past, num_offsets, NQ, NK, Q_BASIS, K_BASIS, DENSE_SCORES, MASKED, CAUSAL, E, E_WIDTH, D,
        D_WIDTH, WIDE, PRECISION, QUERY_FACTORS, KEY_FACTORS,
    )  # fmt: skip
    shift = tl.load(logsumexp + head * queries + i, mask=i_exists, other=0.0)
    probabilities = tl.exp(scores - shift[:, None])
    gradient = tl.zeros([1, i.shape[0], j.shape[0]], WIDE)
    for n in range(0, NV, VALUE_FACTORS):
        products = _products(
            output_gradient, value, head, key_head, 0, n, i, i_exists, j, j_exists, queries, tokens, 1, 1, NV,
            VALUE_FACTORS, V, V_WIDTH, WIDE, PRECISION,
        )  # fmt: skip
        value_weights = _key_weights(value_coefficients, rows, n, num_offsets, NV, VALUE_FACTORS, V_BASIS, WIDE)
        gradient += _over_keys_factors(products, value_weights)
    gradient = tl.reshape(gradient, [i.shape[0], j.shape[0]])
    if DENSE_VALUES:
        one = _load(dense_output_gradient, head, 0, i, i_exists, queries, 1, 1, D, D_WIDTH)
        other = _load(dense_value, key_head, 0, j, j_exists, tokens, 1, 1, D, D_WIDTH)
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
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some queries' queries by some factors, and of their dense queries."""
    block, part, head = _program(tl.cdiv(queries, QUERIES), (NQ + QUERY_FACTORS - 1) // QUERY_FACTORS)
    m = part * QUERY_FACTORS
    key_head = head // GROUPS
    i = block * QUERIES + tl.arange(0, QUERIES)
    i_exists = i < queries
    total = tl.zeros((QUERY_FACTORS * QUERIES, E_WIDTH), WIDE)
    dense = tl.zeros((QUERIES, D_WIDTH), WIDE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (block + 1) * QUERIES + past)
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        j_exists = j < tokens
        rows = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            False,
        )  # fmt: skip
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            True,
        )  # fmt: skip
        _, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
            dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
            dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists, rows,
            reverse, queries, tokens, past, num_offsets, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS, DENSE_SCORES,
            DENSE_VALUES, MASKED, CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION, QUERY_FACTORS,
            KEY_FACTORS, VALUE_FACTORS,
        )  # fmt: skip
        query_weights = _query_weights(query_coefficients, reverse, m, num_offsets, NQ, QUERY_FACTORS, Q_BASIS, WIDE)
        for n in range(0, NK, KEY_FACTORS):
            other = _load(key, key_head, n, j, j_exists, tokens, NK, KEY_FACTORS, E, E_WIDTH)
            key_weights = _key_weights(key_coefficients, rows, n, num_offsets, NK, KEY_FACTORS, K_BASIS, WIDE)
            weighted = _weighted(gradient, query_weights, key_weights).to(other.dtype)
            total = tl.dot(weighted, other, total, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_SCORES:
            other = _load(dense_key, key_head, 0, j, j_exists, tokens, 1, 1, D, D_WIDTH)
            dense = tl.dot(gradient.to(other.dtype), other, dense, input_precision=PRECISION, out_dtype=WIDE)
    _store(query_gradient, head, m, i, i_exists, queries, total, NQ, QUERY_FACTORS, E, E_WIDTH)
    if DENSE_SCORES and part == 0:
        _store(dense_query_gradient, head, 0, i, i_exists, queries, dense, 1, 1, D, D_WIDTH)


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
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some keys' keys and values by some factors, and of their dense keys and values."""
    block, part, key_head = _program(tl.cdiv(tokens, KEYS), PARTS)
    key_factor, value_factor = part * KEY_FACTORS, part * VALUE_FACTORS
    j = block * KEYS + tl.arange(0, KEYS)
    j_exists = j < tokens
    keys = tl.zeros((KEY_FACTORS * KEYS, E_WIDTH), WIDE)
    values = tl.zeros((VALUE_FACTORS * KEYS, V_WIDTH), WIDE)
    dense_keys = tl.zeros((KEYS, D_WIDTH), WIDE)
    dense_values = tl.zeros((KEYS, D_WIDTH), WIDE)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(block * KEYS - past, 0)
    # One loop over the heads that share these keys and their queries, so that the next loads overlap with these products.
    blocks = tl.cdiv(tl.maximum(queries - begin, 0), QUERIES)
    for step in range(GROUPS * blocks):
        head, start = key_head, begin + step * QUERIES
        if GROUPS > 1:
            head, start = key_head * GROUPS + step // blocks, begin + step % blocks * QUERIES
        i = start + tl.arange(0, QUERIES)
        i_exists = i < queries
        rows = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            False,
        )  # fmt: skip
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            True,
        )  # fmt: skip
        probabilities, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
            dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
            dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists,
            rows, reverse, queries, tokens, past, num_offsets, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS,
            DENSE_SCORES, DENSE_VALUES, MASKED, CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
            QUERY_FACTORS, KEY_FACTORS, VALUE_FACTORS,
        )  # fmt: skip
        key_weights = _key_weights(key_coefficients, rows, key_factor, num_offsets, NK, KEY_FACTORS, K_BASIS, WIDE)
        for m in range(0, NQ, QUERY_FACTORS):
            other = _load(query, head, m, i, i_exists, queries, NQ, QUERY_FACTORS, E, E_WIDTH)
            query_weights = _query_weights(
                query_coefficients, reverse, m, num_offsets, NQ, QUERY_FACTORS, Q_BASIS, WIDE
            )
            weighted = _weighted(gradient, query_weights, key_weights).to(other.dtype)
            keys = tl.dot(tl.trans(weighted), other, keys, input_precision=PRECISION, out_dtype=WIDE)
        other = _load(output_gradient, head, 0, i, i_exists, queries, 1, 1, V, V_WIDTH)
        value_weights = _key_weights(
            value_coefficients, rows, value_factor, num_offsets, NV, VALUE_FACTORS, V_BASIS, WIDE
        )
        weighted = tl.reshape(probabilities[:, None, :] * value_weights, [QUERIES, VALUE_FACTORS * KEYS])
        weighted = tl.trans(weighted.to(other.dtype))
        values = tl.dot(weighted, other, values, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_SCORES:
            other = _load(dense_query, head, 0, i, i_exists, queries, 1, 1, D, D_WIDTH)
            weighted = tl.trans(gradient.to(other.dtype))
            dense_keys = tl.dot(weighted, other, dense_keys, input_precision=PRECISION, out_dtype=WIDE)
        if DENSE_VALUES:
            other = _load(dense_output_gradient, head, 0, i, i_exists, queries, 1, 1, D, D_WIDTH)
            weighted = tl.trans(probabilities.to(other.dtype))
            dense_values = tl.dot(weighted, other, dense_values, input_precision=PRECISION, out_dtype=WIDE)
    _store(key_gradient, key_head, key_factor, j, j_exists, tokens, keys, NK, KEY_FACTORS, E, E_WIDTH)
    _store(value_gradient, key_head, value_factor, j, j_exists, tokens, values, NV, VALUE_FACTORS, V, V_WIDTH)
    if part == 0:
        if DENSE_SCORES:
            _store(dense_key_gradient, key_head, 0, j, j_exists, tokens, dense_keys, 1, 1, D, D_WIDTH)
        if DENSE_VALUES:
            _store(dense_value_gradient, key_head, 0, j, j_exists, tokens, dense_values, 1, 1, D, D_WIDTH)


@triton.jit
def _store_sums(
    pointer,
    pairs,
    head,
    n,
    row,
    offset,
    exists,
    num_rows,
    num_dy,
    N: tl.constexpr,
    FACTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASS_PAIRS: tl.constexpr,
):
    """Sums of a tile of pairs `[i, n, j]` by offset, into `[heads, 2, N, num_rows, num_dy]`.

    A tile's queries are rows of `COLUMNS`. Column `c` of queries and `k` of keys have the offset `offset[c - k]`, or
    `offset[c - k + COLUMNS] - COLUMNS`; the two kinds go into different halves, so that nobody adds to what another has written.
    A class token's pairs have one offset, `row`, and go into `[heads, N, num_rows]`.
    """
    factor = n + tl.arange(0, FACTORS)
    if CLASS_PAIRS:
        sums = tl.sum(tl.sum(pairs, axis=2), axis=0)
        tl.store(pointer + (head * N + factor) * num_rows + row, sums, mask=factor < N)
    else:
        QUERIES: tl.constexpr = pairs.shape[0]
        KEYS: tl.constexpr = pairs.shape[2]
        query, key = tl.arange(0, QUERIES)[:, None, None], tl.arange(0, KEYS)[None, None, :]
        column = query % COLUMNS + key
        from_query = query - query % COLUMNS + column % COLUMNS
        turned = tl.gather(pairs, tl.broadcast_to(from_query, [QUERIES, FACTORS, KEYS]), axis=0)
        for half in tl.static_range(2):
            kept = column < COLUMNS
            if half == 1:
                kept = column >= COLUMNS
                offset -= COLUMNS
            sums = tl.sum(tl.where(kept, turned, 0.0), axis=2)
            place = (((head * 2 + half) * N + factor)[None, :] * num_rows + row[:, None]) * num_dy + offset[:, None]
            stored = (exists & (offset >= 0) & (offset < num_dy))[:, None] & (factor < N)[None, :]
            tl.store(pointer + place, sums, mask=stored)


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
    first_column_block,
    column_blocks,
    width,
    past,
    num_offsets,
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
    QUERY_FACTORS: tl.constexpr,
    KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
    CLASS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the pairs of some offsets by some factors: of grid offsets, or of a class token's three.

    A tile has one grid row of keys, or part of it, and `QUERIES / COLUMNS` rows of `COLUMNS` queries each, as far from it as the
    program says. Going through all rows and columns of keys, every tile has the same offsets in the same places, so that they are
    told apart once, at the end. For a class token the program's number is the kind of pair.
    """
    ROWS: tl.constexpr = QUERIES // COLUMNS
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    kinds = 3
    if not CLASS_PAIRS:
        kinds = column_blocks * tl.cdiv(2 * height - 1, ROWS)
    kind, part, head = _program(kinds, PARTS)
    key_head = head // GROUPS
    query_factor, key_factor, value_factor = part * QUERY_FACTORS, part * KEY_FACTORS, part * VALUE_FACTORS
    if CLASS_PAIRS:
        # Queries and keys are the class token or all patches.
        steps = 1
        if kind == 1:
            steps = tl.cdiv(tokens - 1, KEYS)
        if kind == 2:
            steps = tl.cdiv(tokens - 1, QUERIES)
    else:
        row_shift = kind // column_blocks * ROWS - height + 1
        column_shift = (first_column_block + kind % column_blocks) * COLUMNS
        # The first row of keys and the first part of it for which any query exists.
        first_row = tl.maximum(1 - row_shift - ROWS, 0)
        first_step = tl.maximum(tl.cdiv(past - column_shift - COLUMNS + 1, KEYS), 0)
        steps_of_row = tl.maximum(tl.cdiv(width - tl.maximum(column_shift, 0), KEYS) - first_step, 0)
        steps = steps_of_row * tl.maximum(tl.minimum(height, height - row_shift) - first_row, 0)
    query_total = tl.zeros((QUERY_FACTORS, QUERIES, KEYS), WIDE)
    key_total = tl.zeros((QUERIES, KEY_FACTORS, KEYS), WIDE)
    value_total = tl.zeros((QUERIES, VALUE_FACTORS, KEYS), WIDE)
    for step in range(0, steps):
        if CLASS_PAIRS:
            i, j = row, column
            i_exists, j_exists = row < 1, column < 1
            if kind == 1:
                j = step * KEYS + column + 1
                j_exists = j < tokens
            if kind == 2:
                i = step * QUERIES + row + 1
                i_exists = i < tokens
        else:
            u = first_row + step // steps_of_row
            start = (first_step + step % steps_of_row) * KEYS
            v = start + column
            x, y = u + row_shift + row // COLUMNS, start + column_shift + row % COLUMNS
            i_exists, j_exists = (x >= 0) & (x < height) & (y >= past) & (y < width), v < width
            i, j = first + x * width + y - past, first + u * width + v
        # What does not exist has an offset all the same, which must be in the bank.
        i, j = tl.where(i_exists, i, 0), tl.where(j_exists, j, 0)
        rows = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            False,
        )  # fmt: skip
        reverse = _bank_rows(
            i, j, width, past, max_row_distance, max_column_distance, stride_x, base_y, class_row, first, CAUSAL,
            True,
        )  # fmt: skip
        probabilities, gradient = _weights(
            query, key, value, query_coefficients, key_coefficients, value_coefficients, dense_query, dense_key,
            dense_value, mask, mask_stride_b, mask_stride_a, mask_stride_i, mask_stride_j, output_gradient,
            dense_output_gradient, logsumexp, delta, scale, head, key_head, num_heads, i, i_exists, j, j_exists,
            rows, reverse, queries, tokens, past, num_offsets, NQ, NK, NV, Q_BASIS, K_BASIS, V_BASIS,
            DENSE_SCORES, DENSE_VALUES, MASKED, CAUSAL, E, E_WIDTH, V, V_WIDTH, D, D_WIDTH, WIDE, PRECISION,
            QUERY_FACTORS, KEY_FACTORS, VALUE_FACTORS,
        )  # fmt: skip
        if Q_BASIS:
            for n in range(0, NK, KEY_FACTORS):
                products = _products(
                    query, key, head, key_head, query_factor, n, i, i_exists, j, j_exists, queries, tokens, NQ,
                    QUERY_FACTORS, NK, KEY_FACTORS, E, E_WIDTH, WIDE, PRECISION,
                )  # fmt: skip
                key_weights = _key_weights(key_coefficients, rows, n, num_offsets, NK, KEY_FACTORS, K_BASIS, WIDE)
                query_total += gradient[None, :, :] * _over_keys_factors(products, key_weights)
        if K_BASIS:
            for m in range(0, NQ, QUERY_FACTORS):
                products = _products(
                    query, key, head, key_head, m, key_factor, i, i_exists, j, j_exists, queries, tokens, NQ,
                    QUERY_FACTORS, NK, KEY_FACTORS, E, E_WIDTH, WIDE, PRECISION,
                )  # fmt: skip
                query_weights = _query_weights(
                    query_coefficients, reverse, m, num_offsets, NQ, QUERY_FACTORS, Q_BASIS, WIDE
                )
                key_total += gradient[:, None, :] * _over_queries_factors(products, query_weights)
        if V_BASIS:
            products = _products(
                output_gradient, value, head, key_head, 0, value_factor, i, i_exists, j, j_exists, queries, tokens, 1, 1,
                NV, VALUE_FACTORS, V, V_WIDTH, WIDE, PRECISION,
            )  # fmt: skip
            value_total += probabilities[:, None, :] * tl.reshape(products, [QUERIES, VALUE_FACTORS, KEYS])
    num_rows, num_dy = 3, 1
    offset_row, offset, exists = kind, row, row < 1
    if not CLASS_PAIRS:
        num_rows, num_dy = 2 * height - 1, width
        offset_row = kind // column_blocks * ROWS + row // COLUMNS
        offset, exists = column_shift + row % COLUMNS, offset_row < num_rows
        if not CAUSAL:
            num_dy, offset = 2 * width - 1, offset + width - 1
    if Q_BASIS:
        _store_sums(
            query_sums, tl.permute(query_total, 1, 0, 2), head, query_factor, offset_row, offset, exists, num_rows, num_dy,
            NQ, QUERY_FACTORS, COLUMNS, CLASS_PAIRS,
        )  # fmt: skip
    if K_BASIS:
        _store_sums(
            key_sums, key_total, head, key_factor, offset_row, offset, exists, num_rows, num_dy, NK, KEY_FACTORS,
            COLUMNS, CLASS_PAIRS,
        )  # fmt: skip
    if V_BASIS:
        _store_sums(
            value_sums, value_total, head, value_factor, offset_row, offset, exists, num_rows, num_dy, NV,
            VALUE_FACTORS, COLUMNS, CLASS_PAIRS,
        )  # fmt: skip


__all__ = ["coefficient_gradient_kernel", "forward_kernel", "key_value_gradient_kernel", "query_gradient_kernel"]

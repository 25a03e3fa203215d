"""The Triton kernels of local Translution; `triton_local.py` launches them.

A near offset is a shift of keys against queries: its scores are products of two vectors of the same token's place, so that there is
nothing for a tensor core to do, and everything is read once. Terms are unrolled; each has a pointer of its own, and those that share
a tensor follow each other.

`GROUPS` heads of queries, one after the other, share one of keys and values.

Legend: `n` tokens of a program, all of one batch entry and head; text is a grid of one column.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


# Lengths must not be compiled in: each new one would compile again.
_jit = triton.jit(do_not_specialize=["queries", "width", "height", "past", "far_start", "far_stop"])


@triton.jit
def _program(tokens, num_heads, TOKENS: tl.constexpr):
    """Batch entry and head of a program, and its tokens. Heads that lie side by side in memory follow each other."""
    program = tl.program_id(0)
    rest = program // num_heads
    blocks = tl.cdiv(tokens, TOKENS)
    head = (program % num_heads).to(tl.int64)
    return (rest // blocks).to(tl.int64), head, rest % blocks * TOKENS + tl.arange(0, TOKENS)


@triton.jit
def _load(
    pointer, batch, index, exists, tokens, head, num_heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """A head's features of some tokens of `[B, tokens, A·SIZE]`, `[index, WIDTH]`."""
    feature = tl.arange(0, WIDTH)
    place = ((batch * tokens + index) * num_heads + head)[:, None] * SIZE + feature[None, :]
    return tl.load(pointer + place, mask=exists[:, None] & (feature < SIZE)[None, :], other=0.0).to(WIDE)


@triton.jit
def _store(pointer, value, batch, index, exists, tokens, head, num_heads, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    feature = tl.arange(0, WIDTH)
    place = ((batch * tokens + index) * num_heads + head)[:, None] * SIZE + feature[None, :]
    tl.store(pointer + place, value, mask=exists[:, None] & (feature < SIZE)[None, :])


@triton.jit
def _load_key(
    pointer,
    batch,
    index,
    exists,
    tokens,
    head,
    num_heads,
    ONE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """As `_load`, of one token where it is the same for all queries."""
    if ONE:
        return _load(pointer, batch, index * 0, exists, 1, head, num_heads, SIZE, WIDTH, WIDE)
    return _load(pointer, batch, index, exists, tokens, head, num_heads, SIZE, WIDTH, WIDE)


@triton.jit
def _shifted(n, exists, width, past, height, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """The token that lies a number of rows and columns before another, and whether the grid has it."""
    row, column = n // width + past - ROW, n % width - COLUMN
    exists = exists & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row * width + column, exists


@_jit
def near_kernel(
    output,
    logsumexp,
    scores,
    query,
    key,
    value,
    far_output,
    far_logsumexp,
    bias,
    far_output_stride_b,
    far_output_stride_a,
    far_output_stride_i,
    far_logsumexp_stride_b,
    far_logsumexp_stride_a,
    far_logsumexp_stride_i,
    bias_stride_t,
    bias_stride_b,
    bias_stride_i,
    bias_stride_a,
    scale,
    batch_size,
    num_heads,
    queries,
    width,
    height,
    past,
    far_start,
    far_stop,
    TERMS: tl.constexpr,
    ROW_OFFSETS: tl.constexpr,
    COLUMN_OFFSETS: tl.constexpr,
    NEW_QUERY: tl.constexpr,
    ONE_KEY: tl.constexpr,
    ONE_VALUE: tl.constexpr,
    HAS_FAR: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Output and log-sum-exp of all pairs, from those of far pairs and from the near ones, whose scores are kept."""
    b, a, n = _program(queries, num_heads, TOKENS)
    exists = n < queries
    keys = height * width
    key_head, key_heads = a // GROUPS, num_heads // GROUPS
    running_max = tl.full((TOKENS,), float("-inf"), WIDE)
    total = tl.zeros((TOKENS,), WIDE)
    mixed = tl.zeros((TOKENS, V_WIDTH), WIDE)
    if HAS_FAR:
        is_far = exists & (n >= far_start) & (n < far_stop)
        i = (n - far_start).to(tl.int64)
        place = b * far_logsumexp_stride_b + a * far_logsumexp_stride_a + i * far_logsumexp_stride_i
        running_max = tl.load(far_logsumexp + place, mask=is_far, other=float("-inf")).to(WIDE)
        is_far = running_max > float("-inf")
        total = tl.where(is_far, 1.0, 0.0).to(WIDE)
        feature = tl.arange(0, V_WIDTH)
        place = b * far_output_stride_b + a * far_output_stride_a + i * far_output_stride_i
        mixed = tl.load(
            far_output + place[:, None] + feature[None, :],
            mask=is_far[:, None] & (feature < V)[None, :],
            other=0.0,
        ).to(WIDE)
    own = (b * queries + n) * num_heads + a
    term_stride = tl.cast(batch_size, tl.int64) * queries * num_heads
    for t in tl.static_range(TERMS):
        if NEW_QUERY[t]:
            q = _load(query[t], b, n, exists, queries, a, num_heads, E, E_WIDTH, WIDE)
        j, there = _shifted(n, exists, width, past, height, ROW_OFFSETS[t], COLUMN_OFFSETS[t])
        k = _load_key(key[t], b, j, there, keys, key_head, key_heads, ONE_KEY[t], E, E_WIDTH, WIDE)
        score = tl.sum(q * k, axis=1) * scale
        if BIASED:
            place = t * tl.cast(bias_stride_t, tl.int64) + b * bias_stride_b + n.to(tl.int64) * bias_stride_i
            score += tl.load(bias + place + a * bias_stride_a, mask=there, other=0.0).to(WIDE)
        score = tl.where(there, score, float("-inf"))
        tl.store(scores + t * term_stride + own, score, mask=exists)
        before = running_max
        running_max = tl.maximum(running_max, score)
        # Before a query's first pair its weights are 0, whatever finite number is taken off.
        shift = tl.where(running_max == float("-inf"), 0.0, running_max)
        weight, shrink = tl.exp(score - shift), tl.exp(before - shift)
        total = total * shrink + weight
        v = _load_key(value[t], b, j, there, keys, key_head, key_heads, ONE_VALUE[t], V, V_WIDTH, WIDE)
        mixed = mixed * shrink[:, None] + weight[:, None] * v
    # A query may have its pairs among terms of another launch.
    total = tl.where(total == 0.0, 1.0, total)
    _store(output, mixed / total[:, None], b, n, exists, queries, a, num_heads, V, V_WIDTH)
    tl.store(logsumexp + own, running_max + tl.log(total), mask=exists)


@_jit
def near_query_gradient_kernel(
    query_gradient,
    weights,
    score_gradients,
    gradient,
    output,
    logsumexp,
    scores,
    key,
    value,
    scale,
    batch_size,
    num_heads,
    queries,
    width,
    height,
    past,
    TERMS: tl.constexpr,
    ROW_OFFSETS: tl.constexpr,
    COLUMN_OFFSETS: tl.constexpr,
    NEW_QUERY: tl.constexpr,
    ONE_KEY: tl.constexpr,
    ONE_VALUE: tl.constexpr,
    GROUPS: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Gradients of queries and, for those of keys and values, weights and gradients of products of every near pair."""
    b, a, n = _program(queries, num_heads, TOKENS)
    exists = n < queries
    keys = height * width
    key_head, key_heads = a // GROUPS, num_heads // GROUPS
    own = (b * queries + n) * num_heads + a
    term_stride = tl.cast(batch_size, tl.int64) * queries * num_heads
    given = _load(gradient, b, n, exists, queries, a, num_heads, V, V_WIDTH, WIDE)
    # What softmax subtracts: Σ_j p_ij <dout_i, v_ij>, which is <dout_i, out_i>.
    delta = tl.sum(given * _load(output, b, n, exists, queries, a, num_heads, V, V_WIDTH, WIDE), axis=1)
    whole = tl.load(logsumexp + own, mask=exists, other=0.0)
    for t in tl.static_range(TERMS):
        j, there = _shifted(n, exists, width, past, height, ROW_OFFSETS[t], COLUMN_OFFSETS[t])
        place = t * term_stride + own
        weight = tl.exp(tl.load(scores + place, mask=there, other=float("-inf")) - whole)
        v = _load_key(value[t], b, j, there, keys, key_head, key_heads, ONE_VALUE[t], V, V_WIDTH, WIDE)
        score_gradient = weight * (tl.sum(given * v, axis=1) - delta) * scale
        tl.store(weights + place, weight, mask=exists)
        tl.store(score_gradients + place, score_gradient, mask=exists)
        k = _load_key(key[t], b, j, there, keys, key_head, key_heads, ONE_KEY[t], E, E_WIDTH, WIDE)
        if NEW_QUERY[t]:
            total = score_gradient[:, None] * k
        else:
            total += score_gradient[:, None] * k
        # One past the last term stands for the end.
        if NEW_QUERY[t + 1]:
            _store(query_gradient[t], total, b, n, exists, queries, a, num_heads, E, E_WIDTH)


@_jit
def near_key_gradient_kernel(
    key_gradient,
    value_gradient,
    weights,
    score_gradients,
    gradient,
    query,
    batch_size,
    num_heads,
    queries,
    width,
    height,
    past,
    TERMS: tl.constexpr,
    ROW_OFFSETS: tl.constexpr,
    COLUMN_OFFSETS: tl.constexpr,
    NEW_KEY: tl.constexpr,
    NEW_VALUE: tl.constexpr,
    ONE_KEY: tl.constexpr,
    ONE_VALUE: tl.constexpr,
    GROUPS: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    V: tl.constexpr,
    V_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Gradients of keys and values: each program owns its tokens. Of one key that all queries see, those are a product elsewhere.

    A program is of one head of keys, and adds up what the heads of queries that share it bring.
    """
    keys, key_heads = height * width, num_heads // GROUPS
    b, key_head, n = _program(keys, key_heads, TOKENS)
    exists = n < keys
    term_stride = tl.cast(batch_size, tl.int64) * queries * num_heads
    for t in tl.static_range(TERMS):
        # The query that sees this key at the term's offset lies as far on the other side.
        i, there = _shifted(n, exists, width, -past, queries // width, -ROW_OFFSETS[t], -COLUMN_OFFSETS[t])
        place = t * term_stride + (b * queries + i) * num_heads
        if not ONE_KEY[t]:
            key_part = tl.zeros((TOKENS, E_WIDTH), WIDE)
            for member in range(GROUPS):
                a = key_head * GROUPS + member
                q = _load(query[t], b, i, there, queries, a, num_heads, E, E_WIDTH, WIDE)
                key_part += tl.load(score_gradients + place + a, mask=there, other=0.0)[:, None] * q
            if NEW_KEY[t]:
                key_total = key_part
            else:
                key_total += key_part
            if NEW_KEY[t + 1]:
                _store(key_gradient[t], key_total, b, n, exists, keys, key_head, key_heads, E, E_WIDTH)
        if not ONE_VALUE[t]:
            value_part = tl.zeros((TOKENS, V_WIDTH), WIDE)
            for member in range(GROUPS):
                a = key_head * GROUPS + member
                given = _load(gradient, b, i, there, queries, a, num_heads, V, V_WIDTH, WIDE)
                value_part += tl.load(weights + place + a, mask=there, other=0.0)[:, None] * given
            if NEW_VALUE[t]:
                value_total = value_part
            else:
                value_total += value_part
            if NEW_VALUE[t + 1]:
                _store(value_gradient[t], value_total, b, n, exists, keys, key_head, key_heads, V, V_WIDTH)


__all__ = ["near_kernel", "near_key_gradient_kernel", "near_query_gradient_kernel"]

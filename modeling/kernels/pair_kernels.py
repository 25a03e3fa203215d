"""The four Triton kernels over pairs; `triton_pairs.py` launches them and says what each is for.

Text is a grid of one row here: the distance is a column offset. `d = query - key` is the offset of a pair, `row_offset` of grid rows
and `column_offset` of columns. What the numbers of a geometry mean: `_Geometry` in `triton_pairs.py`.

`GROUPS` heads of queries share one of keys, one after the other: head `h` of queries reads head `h // GROUPS` of keys.
Programs own heads of one side: each meets `MEMBERS` heads of the other, one after the other, and `SHARED` of them the same.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


# Lengths must not be compiled in: each new one would compile again.
_LENGTHS = ["batch", "height", "width", "first", "past", "least", "most", "max_row_distance", "max_column_distance", "stride_x", "base_y", "query_sign"]  # fmt: skip
_jit = triton.jit(do_not_specialize=_LENGTHS)


@triton.jit
def _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y):
    """Bank row of an offset, clamped; of the reverse offset where `sign` is -1. In 64 bits: banks can be large."""
    x = tl.minimum(tl.maximum(sign * row_offset, -max_row_distance), max_row_distance)
    y = tl.minimum(tl.maximum(sign * column_offset, -max_column_distance), max_column_distance)
    return ((x + max_row_distance) * stride_x + y + base_y).to(tl.int64)


@triton.jit
def _pairs_of_offset(rows, row_offset, column_offset, batch, height, width, first, past):
    """Batch entry, query and key position of the pairs of an offset, numbered by grid row, column and batch, and which exist.

    What is multiplied by a stride has 64 bits, here and below: a tensor may have more than 2³¹ elements.
    """
    first_x, first_y = tl.maximum(row_offset, 0), tl.maximum(column_offset, past)
    columns = tl.maximum(width + tl.minimum(column_offset, 0) - first_y, 0)
    count = (height - tl.abs(row_offset)) * columns * batch
    columns = tl.maximum(columns, 1)
    entry, pair = rows % batch, rows // batch
    x, y = first_x + pair // columns, first_y + pair % columns
    query_token = first + x * width + y - past
    key_token = first + (x - row_offset) * width + y - column_offset
    return entry.to(tl.int64), query_token.to(tl.int64), key_token.to(tl.int64), rows < count


@triton.jit
def _columns(block, num_heads, E: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """Columns of a block of heads, each padded to `WIDTH`, and which exist."""
    place = tl.arange(0, HEADS * WIDTH)
    head, inside = block * HEADS + place // WIDTH, place % WIDTH
    return head * E + inside, (inside < E) & (head < num_heads)


@triton.jit
def _other_columns(
    block,
    member,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Columns of the other side that meet those of a block of own heads, of one of the `MEMBERS` heads that each meets."""
    place = tl.arange(0, HEADS * WIDTH)
    head = ((block * HEADS + place // WIDTH) * MEMBERS + member) // SHARED
    return head * E + place % WIDTH


@triton.jit
def _heads(block, member, num_heads, stride, HEADS: tl.constexpr, MEMBERS: tl.constexpr):
    """Of one of the `MEMBERS` heads of each of a block: the place of the first, those of all after it, and which exist."""
    head = tl.arange(0, HEADS)
    start = (block.to(tl.int64) * (HEADS * MEMBERS) + member) * stride
    return start, head.to(tl.int64) * MEMBERS * stride, block * HEADS + head < num_heads


@triton.jit
def _load_heads(pointer, place, exists, block, member, num_heads, stride, HEADS: tl.constexpr, MEMBERS: tl.constexpr):
    """One number a row and head, `[rows, HEADS]`."""
    start, heads, head_exists = _heads(block, member, num_heads, stride, HEADS, MEMBERS)
    return tl.load(
        pointer + start + place[:, None] + heads[None, :], mask=exists[:, None] & head_exists[None, :], other=0.0
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
def scores_kernel(
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
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    query_sign,
    QUERY_C: tl.constexpr,
    KEY_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERY_BANK: tl.constexpr,
    KEY_BANK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    row_offset, column_offset, start = (
        tl.load(tiles + 3 * tile),
        tl.load(tiles + 3 * tile + 1),
        tl.load(tiles + 3 * tile + 2),
    )
    rows = start + tl.arange(0, ROWS)
    entry, query_token, key_token, exists = _pairs_of_offset(
        rows, row_offset, column_offset, batch, height, width, first, past
    )
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    key_columns = _other_columns(block, 0, E, WIDTH, HEADS, 1, GROUPS)
    out_size, key_out_size = num_heads * E, num_heads // GROUPS * E

    row = _bank_row(row_offset, column_offset, 1, max_row_distance, max_column_distance, stride_x, base_y)
    product = _side_tile(
        key + entry * key_strides_b + key_token * key_strides_l,
        exists,
        key_bank + row * KEY_C * key_out_size,
        key_columns,
        column_exists,
        key_out_size,
        KEY_C,
        KEY_BANK,
        WIDE,
        BLOCK_C,
        PRECISION,
    )
    row = _bank_row(row_offset, column_offset, query_sign, max_row_distance, max_column_distance, stride_x, base_y)
    product *= _side_tile(
        query + entry * query_strides_b + query_token * query_strides_l,
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
    start, heads, head_exists = _heads(block, 0, num_heads, score_strides_a, HEADS, 1)
    place = entry * score_strides_b + query_token * score_strides_i + key_token
    tl.store(
        scores + start + place[:, None] + heads[None, :],
        by_head,
        mask=exists[:, None] & head_exists[None, :],
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
    first_y, width, past, least, most, IS_QUERY: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr
):
    """The first column offset that any of a program's own tokens has, and how many follow."""
    last_y = tl.minimum(first_y + ROWS // BATCH, width) - 1
    if IS_QUERY:
        low, high = tl.maximum(least, first_y - width + 1), tl.minimum(most, last_y)
    else:
        low, high = tl.maximum(least, past - last_y), tl.minimum(most, width - 1 - first_y)
    return low, tl.maximum(high - low + 1, 0)


@triton.jit
def _others(x, y, own_exists, row_offset, column_offset, width, first, past, IS_QUERY: tl.constexpr):
    """Of own tokens at `(x, y)`: queries, keys, index of the other one, and which pairs exist."""
    if IS_QUERY:
        other_x, other_y = x - row_offset, y - column_offset
        exists = own_exists & (other_y >= 0) & (other_y < width)
        key_token = first + other_x * width + other_y
        query_token = first + x * width + y - past
        other = key_token
    else:
        other_x, other_y = x + row_offset, y + column_offset
        exists = own_exists & (other_y >= past) & (other_y < width)
        key_token = first + x * width + y
        query_token = first + other_x * width + other_y - past
        other = query_token
    return query_token.to(tl.int64), key_token.to(tl.int64), other.to(tl.int64), exists


@_jit
def sum_kernel(
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
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_QUERY: tl.constexpr,
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
    if IS_QUERY:
        own_exists = own_exists & (y >= past)
    entry = entry.to(tl.int64)
    MEMBERS: tl.constexpr = 1 if IS_QUERY else GROUPS
    SHARED: tl.constexpr = GROUPS if IS_QUERY else 1
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    out_size = num_heads * MEMBERS // SHARED * E
    low, count = _column_offsets(first_y, width, past, least, most, IS_QUERY, BATCH, ROWS)
    low_x = x - height + 1 if IS_QUERY else -x

    # One loop over offsets, heads that own ones meet and slices of C, so that the next loads overlap with these products.
    SLICES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    total = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    product = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    for step in range(height * count * (MEMBERS * SLICES)):
        offset, member, part = step // (MEMBERS * SLICES), step // SLICES % MEMBERS, step % SLICES
        row_offset, column_offset = low_x + offset // count, low + offset % count
        query_token, key_token, other, exists = _others(
            x, y, own_exists, row_offset, column_offset, width, first, past, IS_QUERY
        )
        row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
        inner = part * BLOCK_C + tl.arange(0, BLOCK_C)
        other_tokens = tl.load(
            tokens + (entry * token_strides_b + other * token_strides_l)[:, None] + inner[None, :],
            mask=exists[:, None] & (inner < C)[None, :],
            other=0.0,
        )
        other_columns = _other_columns(block, member, E, WIDTH, HEADS, MEMBERS, SHARED)
        matrix = tl.load(
            bank + row * C * out_size + inner[:, None] * out_size + other_columns[None, :],
            mask=(inner < C)[:, None] & column_exists[None, :],
            other=0.0,
        )
        product = tl.dot(other_tokens, matrix, product, input_precision=PRECISION, out_dtype=WIDE)
        if part == SLICES - 1:
            place = entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j
            weight = _load_heads(
                weights, place, exists, block, member, num_heads, weight_strides_a, HEADS, MEMBERS
            ).to(WIDE)
            total += _times_heads(product, weight, HEADS, WIDTH)
            product = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    own = (first + x * width + y).to(tl.int64)
    if IS_QUERY:
        own = own - past
    tl.store(
        output + (entry * output_strides_b + own * output_strides_l)[:, None] + columns[None, :],
        total,
        mask=own_exists[:, None] & column_exists[None, :],
    )


@triton.jit
def _add_members(
    scaled,
    weights,
    place,
    weight_strides_a,
    tokens,
    exists,
    matrix,
    block,
    num_heads,
    column_exists,
    out_size,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BANK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds `w_ij · projection of the other token`, `[rows, HEADS·WIDTH]`, of all but the first head that own heads meet."""
    for member in range(1, MEMBERS):
        columns = _other_columns(block, member, E, WIDTH, HEADS, MEMBERS, 1)
        tile = _side_tile(tokens, exists, matrix, columns, column_exists, out_size, C, BANK, WIDE, BLOCK_C, PRECISION)
        weight = _load_heads(weights, place, exists, block, member, num_heads, weight_strides_a, HEADS, MEMBERS)
        scaled += _times_heads(tile, weight.to(WIDE), HEADS, WIDTH)
    return scaled


@_jit
def token_gradient_kernel(
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
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    C: tl.constexpr,
    OTHER_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    OTHER_BANK: tl.constexpr,
    IS_QUERY: tl.constexpr,
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
    if IS_QUERY:
        own_exists = own_exists & (y >= past)
    entry = entry.to(tl.int64)
    MEMBERS: tl.constexpr = 1 if IS_QUERY else GROUPS
    SHARED: tl.constexpr = GROUPS if IS_QUERY else 1
    out_size, other_out_size = num_heads * E, num_heads * MEMBERS // SHARED * E
    inner = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    low, count = _column_offsets(first_y, width, past, least, most, IS_QUERY, BATCH, ROWS)
    low_x = x - height + 1 if IS_QUERY else -x

    blocks = tl.cdiv(num_heads, HEADS)
    total = tl.zeros((ROWS, BLOCK_C), WIDE)
    for step in range(height * count * blocks):
        offset, block = step // blocks, step % blocks
        row_offset, column_offset = low_x + offset // count, low + offset % count
        query_token, key_token, other, exists = _others(
            x, y, own_exists, row_offset, column_offset, width, first, past, IS_QUERY
        )
        columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
        other_columns = _other_columns(block, 0, E, WIDTH, HEADS, MEMBERS, SHARED)
        row = _bank_row(row_offset, column_offset, other_sign, max_row_distance, max_column_distance, stride_x, base_y)
        other_tokens = others + entry * other_strides_b + other * other_strides_l
        other_matrix = other_bank + row * OTHER_C * other_out_size
        tile = _side_tile(
            other_tokens,
            exists,
            other_matrix,
            other_columns,
            column_exists,
            other_out_size,
            OTHER_C,
            OTHER_BANK,
            WIDE,
            OTHER_BLOCK_C,
            PRECISION,
        )
        place = entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j
        weight = _load_heads(weights, place, exists, block, 0, num_heads, weight_strides_a, HEADS, MEMBERS).to(WIDE)
        row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
        matrix = tl.load(
            bank + row * C * out_size + inner[None, :] * out_size + columns[:, None],
            mask=(inner < C)[None, :] & column_exists[:, None],
            other=0.0,
        )
        scaled = _times_heads(tile, weight, HEADS, WIDTH)
        if MEMBERS > 1:
            scaled = _add_members(
                scaled, weights, place, weight_strides_a, other_tokens, exists, other_matrix, block, num_heads, column_exists,
                other_out_size, OTHER_C, E, WIDTH, MEMBERS, OTHER_BANK, WIDE, PRECISION, HEADS, OTHER_BLOCK_C,
            )  # fmt: skip
        total = tl.dot(scaled.to(bank.dtype.element_ty), matrix, total, input_precision=PRECISION, out_dtype=WIDE)
    own = (first + x * width + y).to(tl.int64)
    if IS_QUERY:
        own = own - past
    tl.store(
        output + (entry * output_strides_b + own * output_strides_l)[:, None] + inner[None, :],
        total,
        mask=own_exists[:, None] & (inner < C)[None, :],
    )


@_jit
def bank_gradient_kernel(
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
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    C: tl.constexpr,
    OTHER_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    OTHER_BANK: tl.constexpr,
    IS_QUERY: tl.constexpr,
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
    MEMBERS: tl.constexpr = 1 if IS_QUERY else GROUPS
    SHARED: tl.constexpr = GROUPS if IS_QUERY else 1
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    other_columns = _other_columns(block, 0, E, WIDTH, HEADS, MEMBERS, SHARED)
    out_size, other_out_size = num_heads * E, num_heads * MEMBERS // SHARED * E
    if CAUSAL:
        low_x, high_x = 0, 0
        low_y = row
        high_y = most if row == max_column_distance else row
    else:
        # In the bank of queries a row holds the reverse offset.
        x, y = row // stride_x - max_row_distance, row % stride_x - max_column_distance
        x, y = sign * x, sign * y
        low_x = 1 - height if x == -max_row_distance else x
        high_x = height - 1 if x == max_row_distance else x
        low_y = least if y == -max_column_distance else y
        high_y = most if y == max_column_distance else y
    low_x, high_x = tl.maximum(low_x, 1 - height), tl.minimum(high_x, height - 1)
    low_y, high_y = tl.maximum(low_y, least), tl.minimum(high_y, most)

    total = tl.zeros((BLOCK_C, HEADS * WIDTH), WIDE)
    for row_offset in range(low_x, high_x + 1):
        for column_offset in range(low_y, high_y + 1):
            first_y = tl.maximum(column_offset, past)
            count = (
                (height - tl.abs(row_offset)) * tl.maximum(width + tl.minimum(column_offset, 0) - first_y, 0) * batch
            )
            other_row = _bank_row(
                row_offset, column_offset, other_sign, max_row_distance, max_column_distance, stride_x, base_y
            )
            for start in range(0, count, ROWS):
                rows = start + tl.arange(0, ROWS)
                entry, query_token, key_token, exists = _pairs_of_offset(
                    rows, row_offset, column_offset, batch, height, width, first, past
                )
                own, other = key_token, query_token
                if IS_QUERY:
                    own, other = query_token, key_token
                other_tokens = others + entry * other_strides_b + other * other_strides_l
                other_matrix = other_bank + other_row * OTHER_C * other_out_size
                tile = _side_tile(
                    other_tokens,
                    exists,
                    other_matrix,
                    other_columns,
                    column_exists,
                    other_out_size,
                    OTHER_C,
                    OTHER_BANK,
                    WIDE,
                    OTHER_BLOCK_C,
                    PRECISION,
                )
                place = entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j
                weight = _load_heads(weights, place, exists, block, 0, num_heads, weight_strides_a, HEADS, MEMBERS).to(
                    WIDE
                )
                own_tokens = tl.load(
                    tokens + (entry * token_strides_b + own * token_strides_l)[None, :] + inner[:, None],
                    mask=exists[None, :] & (inner < C)[:, None],
                    other=0.0,
                )
                scaled = _times_heads(tile, weight, HEADS, WIDTH)
                if MEMBERS > 1:
                    scaled = _add_members(
                        scaled, weights, place, weight_strides_a, other_tokens, exists, other_matrix, block, num_heads,
                        column_exists, other_out_size, OTHER_C, E, WIDTH, MEMBERS, OTHER_BANK, WIDE, PRECISION, HEADS, OTHER_BLOCK_C,
                    )  # fmt: skip
                total = tl.dot(
                    own_tokens, scaled.to(tokens.dtype.element_ty), total, input_precision=PRECISION, out_dtype=WIDE
                )
    tl.store(
        output + row.to(tl.int64) * C * out_size + inner[:, None] * out_size + columns[None, :],
        total,
        mask=(inner < C)[:, None] & column_exists[None, :],
    )


__all__ = ["bank_gradient_kernel", "scores_kernel", "sum_kernel", "token_gradient_kernel"]

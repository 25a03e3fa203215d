"""The five Triton kernels over pairs; `triton_pairs.py` launches them and says what each is for.

Text is a grid of one row here: the distance is a column offset. `d = query - key` is the offset of a pair, `row_offset` of grid rows
and `column_offset` of columns. What the numbers of a geometry mean: `_Geometry` in `triton_pairs.py`.

The pairs of a geometry are numbered by row offset, column offset, the query's grid row and column, and batch entry. Tensors of one
row per pair are in this order. All that is known of it is computed from the geometry's numbers: there are no tables of it, which
would have to outlive a CUDA graph that reads them.

The pairs of a class token follow, where a geometry has them, as those of three more offsets, of the bank rows from `class_row` on: its
own, those of its query with each patch's key, and those of each patch's query with its key. On either side it is projected by the first
matrix to meet itself and by the third to meet a patch, and a patch by the second to meet it.

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
_LENGTHS = ["batch", "height", "width", "first", "past", "least_row", "most_row", "least", "most", "max_row_distance", "max_column_distance", "stride_x", "base_y", "class_row", "query_sign", "parts"]  # fmt: skip
_jit = triton.jit(do_not_specialize=_LENGTHS)


@triton.jit
def _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y):
    """Bank row of an offset, clamped; of the reverse offset where `sign` is -1. In 64 bits: banks can be large."""
    x = tl.minimum(tl.maximum(sign * row_offset, -max_row_distance), max_row_distance)
    y = tl.minimum(tl.maximum(sign * column_offset, -max_column_distance), max_column_distance)
    return ((x + max_row_distance) * stride_x + y + base_y).to(tl.int64)


@triton.jit
def _places_before(end, size, past):
    """Places on an axis of `size` whose query is not one of the `past` first, of all offsets below `end`, up to a constant.

    The sum of `size + min(d, 0) - max(d, past)` over `d`, in 64 bits.
    """
    end, size = end.to(tl.int64), size.to(tl.int64)
    below, above = tl.minimum(end, 0), tl.maximum(end, past)
    return size * end + below * (below - 1) // 2 - past * tl.minimum(end, past) - above * (above - 1) // 2


@triton.jit
def _pairs_before(row_offset, column_offset, batch, height, width, past, least_row, least, most):
    """Pairs of a geometry that are numbered before those of an offset, in 64 bits."""
    rows = _places_before(row_offset, height, 0) - _places_before(least_row, height, 0)
    smallest = _places_before(least, width, past)
    columns = _places_before(most + 1, width, past) - smallest
    before = _places_before(column_offset, width, past) - smallest
    return (rows * columns + (height - tl.abs(row_offset)) * before) * batch


@triton.jit
def _offset_of_tile(tile, batch, height, width, past, least_row, most_row, least, most, ROWS: tl.constexpr):
    """Offset of a tile of pairs, the number of its first pair among that offset's, and how many pairs other offsets have before.

    The tiles of the `n`-th offset start at `pairs before // ROWS + n`. That leaves each offset as many tiles as it needs or one more.
    """
    columns = most - least + 1
    low, high = tile * 0, (most_row - least_row + 1) * columns - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = _pairs_before(
            least_row + middle // columns, least + middle % columns, batch, height, width, past, least_row, least, most
        )
        reached = before // ROWS + middle <= tile
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle - 1)
    row_offset, column_offset = least_row + low // columns, least + low % columns
    before = _pairs_before(row_offset, column_offset, batch, height, width, past, least_row, least, most)
    start = (tile - low - before // ROWS) * ROWS
    return row_offset, column_offset, start.to(tl.int32), before


@triton.jit
def _class_pairs_before(kind, batch, height, width, past, least_row, most_row, least, most):
    """Pairs before those of one of a class token's three kinds, and before the end of all as the kind 3; in 64 bits."""
    grid = _pairs_before(most_row + 1, least, batch, height, width, past, least_row, least, most)
    patches = (height * width).to(tl.int64) * batch
    return grid + tl.where(kind > 0, batch, 0) + tl.maximum(kind - 1, 0) * patches


@triton.jit
def _place_of_tile(
    tile,
    batch,
    height,
    width,
    past,
    least_row,
    most_row,
    least,
    most,
    class_row,
    CLASS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As `_offset_of_tile`; how many pairs the offset has, and the kind of a class token's pairs, −1 of others."""
    row_offset, column_offset, start, before = _offset_of_tile(
        tile, batch, height, width, past, least_row, most_row, least, most, ROWS
    )
    count = _num_pairs(row_offset, column_offset, batch, height, width, past)
    kind = tile * 0 - 1
    if CLASS:
        offsets = (most_row - least_row + 1) * (most - least + 1)
        for number in tl.static_range(3):
            first = _class_pairs_before(
                tile * 0 + number, batch, height, width, past, least_row, most_row, least, most
            )
            first_tile = first // ROWS + offsets + number
            reached = (class_row >= 0) & (tile >= first_tile)
            kind = tl.where(reached, number, kind)
            before = tl.where(reached, first, before)
            start = tl.where(reached, ((tile - first_tile) * ROWS).to(tl.int32), start)
            count = tl.where(reached, batch if number == 0 else height * width * batch, count)
    return row_offset, column_offset, start, count, before, kind


@triton.jit
def _num_columns(column_offset, width, past):
    """Columns of the queries that have a key at an offset, and the first of them."""
    first_y = tl.maximum(column_offset, past)
    return tl.maximum(width + tl.minimum(column_offset, 0) - first_y, 0), first_y


@triton.jit
def _num_pairs(row_offset, column_offset, batch, height, width, past):
    """How many pairs an offset has."""
    columns, _ = _num_columns(column_offset, width, past)
    return (height - tl.abs(row_offset)) * columns * batch


@triton.jit
def _pairs_of_offset(rows, row_offset, column_offset, batch, height, width, first, past):
    """Batch entry, query and key position of the pairs of an offset, by their numbers in it.

    What is multiplied by a stride has 64 bits, here and below: a tensor may have more than 2³¹ elements.
    """
    columns, first_y = _num_columns(column_offset, width, past)
    columns = tl.maximum(columns, 1)
    entry, pair = rows % batch, rows // batch
    x, y = tl.maximum(row_offset, 0) + pair // columns, first_y + pair % columns
    query_token = first + x * width + y - past
    key_token = first + (x - row_offset) * width + y - column_offset
    return entry.to(tl.int64), query_token.to(tl.int64), key_token.to(tl.int64)


@triton.jit
def _pairs_of_place(rows, row_offset, column_offset, kind, batch, height, width, first, past, CLASS: tl.constexpr):
    """The same of an offset, or of a class token's pairs of one kind."""
    entry, query_token, key_token = _pairs_of_offset(
        rows, row_offset, column_offset, batch, height, width, first, past
    )
    if CLASS:
        patch = (first + rows // batch).to(tl.int64)
        query_token = tl.where(kind < 0, query_token, tl.where(kind == 2, patch, 0))
        key_token = tl.where(kind < 0, key_token, tl.where(kind == 1, patch, 0))
    return entry, query_token, key_token


@triton.jit
def _row_of_place(
    row_offset,
    column_offset,
    kind,
    sign,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    CLASS: tl.constexpr,
):
    """Bank row of an offset, or of a class token's pairs of one kind; of the reverse where `sign` is −1."""
    row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
    if CLASS:
        row = tl.where(kind < 0, row, (class_row + tl.where(sign < 0, (3 - kind) % 3, kind)).to(tl.int64))
    return row


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
def _add_slice(
    product,
    start,
    tokens,
    exists,
    matrix,
    columns,
    column_exists,
    out_size,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a slice of C, from `start` on, to the product of tokens and a matrix."""
    inner = start + tl.arange(0, BLOCK_C)
    x = tl.load(tokens[:, None] + inner[None, :], mask=exists[:, None] & (inner < C)[None, :], other=0.0)
    w = tl.load(
        matrix + inner[:, None] * out_size + columns[None, :],
        mask=(inner < C)[:, None] & column_exists[None, :],
        other=0.0,
    )
    return tl.dot(x, w, product, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def _token_tile(tokens, exists, columns, column_exists, WIDE: tl.constexpr):
    """Tokens themselves, `[rows, columns]` in the wide type."""
    mask = exists[:, None] & column_exists[None, :]
    return tl.load(tokens[:, None] + columns[None, :], mask=mask, other=0.0).to(WIDE)


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
            tile = _add_slice(
                tile, start, tokens, exists, matrix, columns, column_exists, out_size, C, BLOCK_C, WIDE, PRECISION
            )
    else:
        tile = _token_tile(tokens, exists, columns, column_exists, WIDE)
    return tile


@_jit
def scores_kernel(
    scores,
    query,
    key,
    query_bank,
    key_bank,
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
    least_row,
    most_row,
    least,
    most,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    query_sign,
    QUERY_C: tl.constexpr,
    KEY_C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERY_BANK: tl.constexpr,
    KEY_BANK: tl.constexpr,
    CLASS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(1)
    row_offset, column_offset, start, count, _, kind = _place_of_tile(
        tl.program_id(0), batch, height, width, past, least_row, most_row, least, most, class_row, CLASS, ROWS
    )
    if start >= count:
        return
    rows = start + tl.arange(0, ROWS)
    exists = rows < count
    entry, query_token, key_token = _pairs_of_place(
        rows, row_offset, column_offset, kind, batch, height, width, first, past, CLASS
    )
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    key_columns = _other_columns(block, 0, E, WIDTH, HEADS, 1, GROUPS)
    out_size, key_out_size = num_heads * E, num_heads // GROUPS * E

    row = _row_of_place(
        row_offset, column_offset, kind, 1, max_row_distance, max_column_distance, stride_x, base_y, class_row, CLASS
    )
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
    row = _row_of_place(
        row_offset,
        column_offset,
        kind,
        query_sign,
        max_row_distance,
        max_column_distance,
        stride_x,
        base_y,
        class_row,
        CLASS,
    )
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
def _own_tokens(
    tile,
    batch,
    width,
    first,
    past,
    class_row,
    CLASS: tl.constexpr,
    IS_QUERY: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid row, first column, columns, batch entries and positions of a program that owns tokens: `BATCH` entries of a few columns.

    And which of them exist, and whether it owns class tokens: the first programs do.

    Of a text the last queries and the first keys have the most pairs. Those programs start first, so that none of them is the last
    to end.
    """
    COLUMNS: tl.constexpr = ROWS // BATCH
    batches, blocks = tl.cdiv(batch, BATCH), tl.cdiv(width, COLUMNS)
    place = tl.arange(0, ROWS)
    entry = tile % batches * BATCH + place % BATCH
    tile = tile // batches
    is_class = tile < 0
    if CLASS:
        is_class = (class_row >= 0) & (tile == 0)
        tile = tl.where((class_row >= 0) & (tile > 0), tile - 1, tile)
    column = blocks - 1 - tile % blocks if IS_QUERY else tile % blocks
    x, first_y = tile // blocks, column * COLUMNS
    y = first_y + place // BATCH
    exists = (entry < batch) & (y < width)
    own = (first + x * width + y).to(tl.int64)
    if IS_QUERY:
        exists, own = exists & (y >= past), own - past
    if CLASS:
        exists = tl.where(is_class, (entry < batch) & (place < BATCH), exists)
        own = tl.where(is_class, 0, own)
    return x, first_y, y, entry.to(tl.int64), own, exists, is_class


@triton.jit
def _own_offsets(
    x,
    first_y,
    height,
    width,
    past,
    least_row,
    most_row,
    least,
    most,
    IS_QUERY: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The first row and column offset that any of a program's own tokens has, and how many of each follow."""
    last_y = tl.minimum(first_y + ROWS // BATCH, width) - 1
    if IS_QUERY:
        low_x, high_x = tl.maximum(least_row, x - height + 1), tl.minimum(most_row, x)
        low_y, high_y = tl.maximum(least, first_y - width + 1), tl.minimum(most, last_y)
    else:
        low_x, high_x = tl.maximum(least_row, -x), tl.minimum(most_row, height - 1 - x)
        low_y, high_y = tl.maximum(least, past - last_y), tl.minimum(most, width - 1 - first_y)
    return low_x, tl.maximum(high_x - low_x + 1, 0), low_y, tl.maximum(high_y - low_y + 1, 0)


@triton.jit
def _rotated(step, low, count):
    """The offset of a step of `count`, which starts at 0 and goes on from `low`.

    Steps of programs that own different tokens have the same offset then, or the one of two that is less by `count`.
    """
    return low + (step + tl.maximum(-low, 0)) % count


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


@triton.jit
def _begin(part, count, parts):
    """The first of `count` steps that one of `parts` takes; that of the next is where it ends."""
    return (part.to(tl.int64) * count // parts).to(tl.int32)


@triton.jit
def _add_weighted(
    total,
    product,
    step,
    tokens,
    exists,
    matrix,
    column_exists,
    out_size,
    weights,
    weight_place,
    weight_stride,
    num_heads,
    block,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SHARED: tl.constexpr,
    SLICES: tl.constexpr,
    BANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one slice of C to the product of tokens and a matrix, and after the last the weighted product to the sum.

    Without a bank there is one slice, and tokens themselves are weighted.
    """
    member, part = step // SLICES, step % SLICES
    columns = _other_columns(block, member, E, WIDTH, HEADS, MEMBERS, SHARED)
    if BANK:
        start = part * BLOCK_C
        product = _add_slice(
            product, start, tokens, exists, matrix, columns, column_exists, out_size, C, BLOCK_C, WIDE, PRECISION
        )
    else:
        product = _token_tile(tokens, exists, columns, column_exists, WIDE)
    if part == SLICES - 1:
        weight = _load_heads(
            weights, weight_place, exists, block, member, num_heads, weight_stride, HEADS, MEMBERS
        ).to(WIDE)
        total += _times_heads(product, weight, HEADS, WIDTH)
        product = tl.zeros(product.shape, WIDE)
    return total, product


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
    output_strides_p,
    output_strides_b,
    output_strides_l,
    num_heads,
    sign,
    parts,
    batch,
    height,
    width,
    first,
    past,
    least_row,
    most_row,
    least,
    most,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BANK: tl.constexpr,
    IS_QUERY: tl.constexpr,
    CLASS: tl.constexpr,
    ROTATE: tl.constexpr,
    APART: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`Σ w_ij · projection of the other token`, of the pairs of a geometry; one of `parts` sums of some offsets each.

    With `APART` they are sums of one row offset each, `"row"`, or of one column offset each, `"column"`.

    Programs that run at the same time read the same tokens, each with the matrix of its own offset; with `ROTATE` the same few
    matrices, each with tokens of its own.
    """
    block, part = tl.program_id(1), tl.program_id(0) % parts
    x, first_y, y, entry, own, own_exists, is_class = _own_tokens(
        tl.program_id(0) // parts, batch, width, first, past, class_row, CLASS, IS_QUERY, BATCH, ROWS
    )
    MEMBERS: tl.constexpr = 1 if IS_QUERY else GROUPS
    SHARED: tl.constexpr = GROUPS if IS_QUERY else 1
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    out_size = num_heads * MEMBERS // SHARED * E
    if APART == "row":
        least_row += part
        most_row = least_row
    if APART == "column":
        least += part
        most = least
    low_x, count_x, low_y, count_y = _own_offsets(
        x, first_y, height, width, past, least_row, most_row, least, most, IS_QUERY, BATCH, ROWS
    )
    count = count_x * count_y
    if CLASS:
        count = tl.where(is_class, 0, count)

    # One loop over offsets, heads that own ones meet and slices of C, so that the next loads overlap with these products.
    SLICES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C if BANK else 1
    STEPS: tl.constexpr = MEMBERS * SLICES
    total = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    product = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    begin, end = count * 0, count
    if APART == "":
        begin, end = _begin(part, count, parts), _begin(part + 1, count, parts)
    for step in range(begin * STEPS, end * STEPS):
        offset = step // STEPS
        if ROTATE:
            row_offset = _rotated(offset // count_y, low_x, count_x)
            column_offset = _rotated(offset % count_y, low_y, count_y)
        else:
            row_offset, column_offset = low_x + offset // count_y, low_y + offset % count_y
        query_token, key_token, other, exists = _others(
            x, y, own_exists, row_offset, column_offset, width, first, past, IS_QUERY
        )
        row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
        total, product = _add_weighted(
            total, product, step % STEPS, tokens + entry * token_strides_b + other * token_strides_l, exists,
            bank + row * C * out_size, column_exists, out_size, weights,
            entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j, weight_strides_a,
            num_heads, block, C, E, WIDTH, HEADS, MEMBERS, SHARED, SLICES, BANK, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
    if CLASS:
        # A patch has one pair with the class token, which has one with each token.
        count = tl.where(class_row < 0, 0, tl.where(is_class, 1 + height * width, 1))
        for step in range(_begin(part, count, parts) * STEPS, _begin(part + 1, count, parts) * STEPS):
            other = own * 0 + step // STEPS
            query_token, key_token = (own, other) if IS_QUERY else (other, own)
            row = (class_row + tl.where(is_class, tl.where(step < STEPS, 0, 1), 2)).to(tl.int64)
            total, product = _add_weighted(
                total, product, step % STEPS, tokens + entry * token_strides_b + other * token_strides_l, own_exists,
                bank + row * C * out_size, column_exists, out_size, weights,
                entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j, weight_strides_a,
                num_heads, block, C, E, WIDTH, HEADS, MEMBERS, SHARED, SLICES, BANK, BLOCK_C, WIDE, PRECISION,
            )  # fmt: skip
    place = part.to(tl.int64) * output_strides_p + entry * output_strides_b + own * output_strides_l
    tl.store(output + place[:, None] + columns[None, :], total, mask=own_exists[:, None] & column_exists[None, :])


@_jit
def projection_kernel(
    projections,
    weights,
    tokens,
    bank,
    weight_strides_b,
    weight_strides_a,
    weight_strides_i,
    weight_strides_j,
    token_strides_b,
    token_strides_l,
    num_heads,
    sign,
    batch,
    height,
    width,
    first,
    past,
    least_row,
    most_row,
    least,
    most,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    C: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BANK: tl.constexpr,
    IS_QUERY: tl.constexpr,
    CLASS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`w_ij · projection of the other token` of each pair of a geometry, summed over the heads that an own one meets."""
    block = tl.program_id(1)
    row_offset, column_offset, start, count, before, kind = _place_of_tile(
        tl.program_id(0), batch, height, width, past, least_row, most_row, least, most, class_row, CLASS, ROWS
    )
    if start >= count:
        return
    rows = start + tl.arange(0, ROWS)
    exists = rows < count
    entry, query_token, key_token = _pairs_of_place(
        rows, row_offset, column_offset, kind, batch, height, width, first, past, CLASS
    )
    MEMBERS: tl.constexpr = 1 if IS_QUERY else GROUPS
    SHARED: tl.constexpr = GROUPS if IS_QUERY else 1
    columns, column_exists = _columns(block, num_heads, E, WIDTH, HEADS)
    own_size, out_size = num_heads * E, num_heads * MEMBERS // SHARED * E
    other = key_token if IS_QUERY else query_token
    row = _row_of_place(
        row_offset,
        column_offset,
        kind,
        sign,
        max_row_distance,
        max_column_distance,
        stride_x,
        base_y,
        class_row,
        CLASS,
    )
    place = entry * weight_strides_b + query_token * weight_strides_i + key_token * weight_strides_j

    total = tl.zeros((ROWS, HEADS * WIDTH), WIDE)
    for member in range(0, MEMBERS):
        tile = _side_tile(
            tokens + entry * token_strides_b + other * token_strides_l,
            exists,
            bank + row * C * out_size,
            _other_columns(block, member, E, WIDTH, HEADS, MEMBERS, SHARED),
            column_exists,
            out_size,
            C,
            BANK,
            WIDE,
            BLOCK_C,
            PRECISION,
        )
        weight = _load_heads(weights, place, exists, block, member, num_heads, weight_strides_a, HEADS, MEMBERS)
        total += _times_heads(tile, weight.to(WIDE), HEADS, WIDTH)
    tl.store(
        projections + ((before + rows) * own_size)[:, None] + columns[None, :],
        total,
        mask=exists[:, None] & column_exists[None, :],
    )


@triton.jit
def _add_transposed(
    total,
    part,
    projections,
    exists,
    matrix,
    inner,
    C: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one slice of OUT of the product of projections and a transposed matrix."""
    features = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    projection = tl.load(
        projections[:, None] + features[None, :], mask=exists[:, None] & (features < OUT)[None, :], other=0.0
    )
    w = tl.load(
        matrix + inner[None, :] * OUT + features[:, None],
        mask=(inner < C)[None, :] & (features < OUT)[:, None],
        other=0.0,
    )
    return tl.dot(projection, w, total, input_precision=PRECISION, out_dtype=WIDE)


@_jit
def token_gradient_kernel(
    output,
    projections,
    bank,
    output_strides_p,
    output_strides_b,
    output_strides_l,
    sign,
    parts,
    batch,
    height,
    width,
    first,
    past,
    least_row,
    most_row,
    least,
    most,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    C: tl.constexpr,
    OUT: tl.constexpr,
    IS_QUERY: tl.constexpr,
    CLASS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Adds `Σ projection W[o]ᵀ` over the pairs of a geometry to what own tokens have already; to one of `parts` sums, some offsets each.

    The projections of a class token with all patches have been summed, after those of all pairs: it is projected by one matrix for them.
    """
    part = tl.program_id(0) % parts
    x, first_y, y, entry, own, own_exists, is_class = _own_tokens(
        tl.program_id(0) // parts, batch, width, first, past, class_row, CLASS, IS_QUERY, BATCH, ROWS
    )
    inner = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    low_x, count_x, low_y, count_y = _own_offsets(
        x, first_y, height, width, past, least_row, most_row, least, most, IS_QUERY, BATCH, ROWS
    )
    count, class_count = count_x * count_y, 0
    if CLASS:
        count = tl.where(is_class, 0, count)
        class_count = tl.where((class_row < 0) | (part < parts - 1), 0, tl.where(is_class, 2, 1))
    begin, end = _begin(part, count, parts), _begin(part + 1, count, parts)
    if end - begin + class_count == 0:
        return
    place = part.to(tl.int64) * output_strides_p + entry * output_strides_b + own * output_strides_l
    place = output + place[:, None] + inner[None, :]
    mask = own_exists[:, None] & (inner < C)[None, :]

    # Own tokens' pairs of an offset are numbered in the order of the tokens.
    number = (y * batch + entry).to(tl.int64) * OUT
    SLICES: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    total = tl.load(place, mask=mask, other=0.0)
    for step in range(begin * SLICES, end * SLICES):
        offset = step // SLICES
        row_offset, column_offset = low_x + offset // count_y, low_y + offset % count_y
        # Place of the first column's query among the offset's, and how far an own token's query is from it.
        columns, query_y = _num_columns(column_offset, width, past)
        query_x = x - tl.maximum(row_offset, 0)
        if not IS_QUERY:
            query_x, query_y = query_x + row_offset, query_y - column_offset
        exists = own_exists & (y >= query_y) & (y < query_y + columns)
        before = _pairs_before(row_offset, column_offset, batch, height, width, past, least_row, least, most)
        before += (query_x * columns - query_y) * batch
        row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
        total = _add_transposed(
            total, step % SLICES, projections + before * OUT + number, exists, bank + row * C * OUT, inner, C, OUT,
            BLOCK_OUT, WIDE, PRECISION,
        )  # fmt: skip
    if CLASS:
        for step in range(0, class_count * SLICES):
            # A class token meets itself, then all patches; a patch meets the class token.
            last = step // SLICES
            kind = tl.where(is_class, last * 3, 2 if IS_QUERY else 1)
            before = _class_pairs_before(kind, batch, height, width, past, least_row, most_row, least, most)
            number = tl.where(is_class, entry, (x * width + y) * batch + entry) * OUT
            row = (class_row + tl.where(is_class, last * 2, 1)).to(tl.int64)
            total = _add_transposed(
                total, step % SLICES, projections + before * OUT + number, own_exists, bank + row * C * OUT, inner, C,
                OUT, BLOCK_OUT, WIDE, PRECISION,
            )  # fmt: skip
    tl.store(place, total, mask=mask)


@triton.jit
def _add_pairs(
    total,
    tokens,
    own,
    projections,
    before,
    begin,
    end,
    columns,
    width,
    batch,
    token_strides_b,
    token_strides_l,
    inner,
    features,
    C: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `Σ xᵀ projection` over the pairs from `begin` to `end`; own tokens are rows of `columns` tokens of the grid, from `own` on."""
    rows = begin + tl.arange(0, ROWS)
    step_entry, step_pair = ROWS % batch, ROWS // batch
    # Divided once; from one tile of pairs to the next is a step along each axis, and at most one more.
    entry, pair = rows % batch, rows // batch
    x, y = pair // columns, pair % columns
    for start in range(0, end - begin, ROWS):
        exists = start + rows < end
        token = (own + x * width + y).to(tl.int64)
        x_tile = tl.load(
            tokens + (entry.to(tl.int64) * token_strides_b + token * token_strides_l)[None, :] + inner[:, None],
            mask=exists[None, :] & (inner < C)[:, None],
            other=0.0,
        )
        projection = tl.load(
            projections + ((before + start + rows) * OUT)[:, None] + features[None, :],
            mask=exists[:, None] & (features < OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(x_tile, projection, total, input_precision=PRECISION, out_dtype=WIDE)
        entry += step_entry
        y += step_pair % columns + (entry >= batch).to(tl.int32)
        x += step_pair // columns + (y >= columns).to(tl.int32)
        entry = tl.where(entry >= batch, entry - batch, entry)
        y = tl.where(y >= columns, y - columns, y)
    return total


@_jit
def bank_gradient_kernel(
    output,
    projections,
    tokens,
    token_strides_b,
    token_strides_l,
    sign,
    parts,
    batch,
    height,
    width,
    first,
    past,
    least_row,
    most_row,
    least,
    most,
    max_row_distance,
    max_column_distance,
    stride_x,
    base_y,
    class_row,
    C: tl.constexpr,
    OUT: tl.constexpr,
    IS_QUERY: tl.constexpr,
    CLASS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """`Σ xᵀ projection` over the pairs of each offset, none of which share a bank row.

    The output is the bank's gradient; with `SPLIT` `[parts, offsets, C, OUT]`, sums of some pairs of each offset.

    What follows the projections of all pairs: see `token_gradient_kernel`.
    """
    inner = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    features = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns_of_row = most - least + 1
    offset, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row_offset, column_offset = least_row + offset // columns_of_row, least + offset % columns_of_row
    row = _bank_row(row_offset, column_offset, sign, max_row_distance, max_column_distance, stride_x, base_y)
    count = _num_pairs(row_offset, column_offset, batch, height, width, past)
    columns, y = _num_columns(column_offset, width, past)
    columns = tl.maximum(columns, 1)
    before = _pairs_before(row_offset, column_offset, batch, height, width, past, least_row, least, most)
    # Own token of the offset's first pair.
    x = tl.maximum(row_offset, 0)
    own = first + x * width + y - past
    if not IS_QUERY:
        own = first + (x - row_offset) * width + y - column_offset
    if CLASS:
        # The last programs have a class token's rows: it with itself, each patch with it, and it with all patches, which have been summed.
        class_kind = offset - (most_row - least_row + 1) * columns_of_row
        if class_kind >= 0:
            row = (class_row + class_kind).to(tl.int64)
            patches = class_kind == 1
            kind = tl.where(patches, 2 if IS_QUERY else 1, tl.where(class_kind == 0, 0, 3))
            before = _class_pairs_before(kind, batch, height, width, past, least_row, most_row, least, most)
            count = tl.where(patches, height * width * batch, batch)
            own, columns = tl.where(patches, first, 0), height * width
    begin, end = tl.program_id(0) * 0, count
    if SPLIT:
        row = part.to(tl.int64) * (tl.num_programs(0) // parts) + offset
        tiles = tl.cdiv(count, ROWS)
        begin, end = _begin(part, tiles, parts) * ROWS, tl.minimum(_begin(part + 1, tiles, parts) * ROWS, count)
    total = _add_pairs(
        tl.zeros((BLOCK_C, BLOCK_OUT), WIDE), tokens, own, projections, before, begin, end, columns, width, batch,
        token_strides_b, token_strides_l, inner, features, C, OUT, ROWS, WIDE, PRECISION,
    )  # fmt: skip
    mask = (inner < C)[:, None] & (features < OUT)[None, :]
    tl.store(output + row * C * OUT + inner[:, None] * OUT + features[None, :], total, mask=mask)


__all__ = [
    "bank_gradient_kernel",
    "projection_kernel",
    "scores_kernel",
    "sum_kernel",
    "token_gradient_kernel",
]

"""Arguments of `local_attention`, and what it must be, one query at a time."""

import torch

from translution.modeling.operators.pair_layout import PairLayout


# An image is `(height, width)`, a text its length.
Size = int | tuple[int, int]
OPERANDS = [(6, "kv"), (5, "q"), ((3, 4), "qkv"), ((4, 3), "v"), ((1, 4), "qk"), (3, "k")]


def operands(size: Size, each: str, dtype=torch.float64, batch=2, features=3, wide=4, distance=2, groups=1):
    """Arguments of `local_attention` for a text, or for the patches of an image with a class token as one more key.

    Args:
        size: of a text its length, of an image `(height, width)`.
        each: which of q, k, v have a tensor for each near offset; of the others one serves all.
        features, wide: per head, of scores and values.
        distance: of a text, the number of near offsets; an image has those of a 3 × 3 window.
        groups: heads of queries that share one of keys and values, which have two.
    """
    heads = {"q": 2 * groups, "k": 2, "v": 2}
    is_text = isinstance(size, int)
    if is_text:
        layout, tokens = PairLayout.for_text(size, size, distance).near(0), size
    else:
        layout, tokens = PairLayout(*size, False, False, 2, 2, clamp=True, share_far=True), size[0] * size[1]
    near = len(layout.near_offsets())

    def make(*shape):
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    def side(name, width):
        parts = [make(batch, tokens, heads[name] * width) for _ in range(near if name in each else 1)]
        if is_text or (name == "q" and name not in each):
            return parts
        # The query for the class token, or the class token.
        return [*parts, make(batch, tokens if name == "q" else 1, heads[name] * width)]

    queries, keys, values = side("q", features), side("k", features), side("v", wide)
    far = [
        make(batch, heads[name], tokens, width) for name, width in zip("qkv", (features, features, wide), strict=True)
    ]
    near_bias = torch.randn(near + (not is_text), batch, tokens, heads["q"], dtype=dtype)
    far_bias = torch.randn(batch, heads["q"], tokens, tokens, dtype=dtype)
    if is_text:
        lowest = torch.finfo(dtype).min
        far_bias = far_bias.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), lowest)
        for apart in range(near):
            near_bias[apart, :, :apart] = lowest
    return queries, keys, values, far, layout, near_bias, far_bias


def repeated(keys, values, far, groups):
    """Keys and values with a copy of each head for every head of queries that shares it; gradients of the copies add up."""

    def repeat(parts):
        return [part.unflatten(-1, (2, -1)).repeat_interleave(groups, dim=-2).flatten(-2) for part in parts]

    if far is not None:
        far = [far[0], *(part.repeat_interleave(groups, dim=1) for part in far[1:])]
    return repeat(keys), repeat(values), far


def attention_by_hand(queries, keys, values, far, num_heads, scale, layout, near_bias=None, far_bias=None):
    """`local_attention`, one query at a time, of keys and values with two heads."""
    keys, values, far = repeated(keys, values, far, num_heads // 2)
    height, width, causal = layout.height, layout.width, layout.causal
    terms = max(len(queries), len(keys), len(values))
    reach = layout.band - 1 if causal else layout.bank_height - 1
    if causal:
        near = [(distance, 0) for distance in range(min(layout.band, height))]
    else:
        near = [
            (dx, dy)
            for dy in range(-min(reach, width - 1), min(reach, width - 1) + 1)
            for dx in range(-min(reach, height - 1), min(reach, height - 1) + 1)
        ]

    def part(parts, index):
        # The first serves all near offsets where there are fewer parts than terms.
        return parts[max(index - (terms - len(parts)), 0)].unflatten(-1, (num_heads, -1))

    outputs = []
    for i in range(height * width):
        scores, given, (x, y) = [], [], divmod(i, width)
        seen = [(index, x - dx, y - dy) for index, (dx, dy) in enumerate(near)]
        seen = [(index, u * width + v) for index, u, v in seen if 0 <= u < height and 0 <= v < width]
        seen += [(index, -1) for index in range(len(near), terms)]
        for index, j in seen:
            query, key, value = part(queries, index), part(keys, index), part(values, index)
            score = (query[:, i if query.shape[1] > 1 else 0] * key[:, j]).sum(-1) * scale
            scores.append(score if near_bias is None else score + near_bias[index, :, i])
            given.append(value[:, j])
        for j in range(height * width):
            u, v = divmod(j, width)
            is_far = i - j > reach if causal else max(abs(x - u), abs(y - v)) > reach
            if far is not None and is_far:
                score = (far[0][:, :, i] * far[1][:, :, j]).sum(-1) * scale
                scores.append(score if far_bias is None else score + far_bias[:, :, i, j])
                given.append(far[2][:, :, j])
        shares = torch.stack(scores).softmax(0)
        outputs.append((shares[..., None] * torch.stack(given)).sum(0).flatten(-2))
    return torch.stack(outputs, dim=1)

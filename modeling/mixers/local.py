"""Local Translution: what a layer with a distance brings to near offsets, to far pairs and to a class token's.

The operator over them is in `operators/local.py`; here its inputs are made from tokens and banks, for images and text, full and
low-rank, rotated or not.

Legend: `B` batch, `L` tokens, `N` patches, `A` heads, `e` features per head, `T` near offsets, `Q` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache

from ..operators.class_token import class_blocks
from ..operators.dispatch import local_operator
from ..operators.heads import merge_heads, split_heads
from ..operators.local import of_term
from ..operators.pair_autograd import accumulation_dtype
from ..operators.pair_layout import (
    CLASS_FROM_PATCH,
    CLASS_TO_CLASS,
    PATCH_FROM_CLASS,
    PairLayout,
    StepLayout,
    distances,
)
from ..operators.project_each import project_each
from ..operators.rotary import patch_rotation, rotate, rotate_bank
from .cache import remember_recent
from .masks import AttentionMask
from .near_far import AllPairs, NearAndFarPairs, PairInputs, join_biases, pack_rotation


DenseHeads = tuple[Tensor | None, Tensor | None, Tensor | None]


def attend_text(pairs: NearAndFarPairs, dense: DenseHeads, scale: float, mask: AttentionMask) -> Tensor:
    """`[B, Q, A·e]` of a text. The features of low-rank Translution are the dense ones of a head, then its relative ones.

    Args:
        pairs: the relative part, which has remembered what a cache holds.
        dense: queries, keys and values of ordinary attention, `[B, A, Q, d]` and `[B, A / groups, L, d]`, where a side has such.
        scale: of the scores.
        mask: what is hidden, beside the future.
    """
    layout, num_heads = pairs.layout, pairs.num_heads
    # Of the tokens before the new ones, as many as there are and near pairs reach.
    window = min(pairs.window, layout.past)
    near = layout.near(window)
    sides = []
    for name, side, heads in zip("qkv", (pairs.query, pairs.key, pairs.value), dense, strict=True):
        count = layout.num_queries + (0 if name == "q" else window)
        rows = [offset.reverse_row if name == "q" else offset.row for offset in near.near_offsets()]
        relative, heads_of_side = None, num_heads if name == "q" else num_heads // pairs.groups
        if side is not None:
            tokens, matrices = side.tokens[:, side.tokens.shape[1] - count :], _matrices(side)
            relative = [tokens] if matrices is None else project_each(tokens, [matrices[row] for row in rows])
            if side.bias is not None:
                biases = side.bias.unbind(0)
                relative = [part + biases[row] for part, row in zip(relative, rows, strict=True)]
            norm = None if matrices is None else pairs.norms.get(name)
            if norm is not None:
                relative = [merge_heads(norm(split_heads(part, heads_of_side))) for part in relative]
            if pairs.near_rotation is not None and name != "v":
                turns = tuple(part[:, :, part.shape[2] - count :] for part in pairs.near_rotation)
                relative = [_rotate_tokens(part, turns, heads_of_side) for part in relative]
        own = None if heads is None else [merge_heads(heads[:, :, heads.shape[2] - count :])]
        sides.append(_join(own, relative, heads_of_side))
    far = None
    if layout.has_far_pairs:
        far = [_join_heads(heads, part) for heads, part in zip(dense, pairs.far(), strict=True)]
    near_bias = far_bias = None
    if mask.additive is not None:
        far_bias = mask.additive
        query = torch.arange(layout.num_queries, device=far_bias.device)[:, None] + layout.past
        distance = torch.arange(len(near.near_offsets()), device=far_bias.device)
        near_bias = _of_near(far_bias, query - distance)
    attend = local_operator(pairs.path)
    return attend(*sides, far, num_heads, scale, near, near_bias, far_bias)


def attend_step(
    tokens: Tensor,
    query: Tensor | None,
    sides: Sequence[PairInputs],
    num_heads: int,
    scale: float,
    layout: StepLayout,
    mask: AttentionMask,
    rotation: tuple[Tensor, Tensor] | None,
    cache: Cache,
    layer_idx: int,
    groups: int = 1,
    norms: dict[str, nn.Module | None] | None = None,
) -> Tensor:
    """`[B, 1, A·e]` of one new token with a cache, as `NearAndFarPairs` keeps it.

    The last few tokens are projected for their distance from the new one and put behind the far keys and values of all, so that
    one attention serves both: a step has little else to do than to call operations.

    Args:
        tokens: `[B, 1, in]`, what the banks project.
        query: its plain projection, `[B, A, 1, e]`, where queries have no bank.
        sides: queries, if they have a bank, keys and values: their banks, `[D + 1, in, A·e]` each, and biases.
        num_heads, scale, layout, mask: see `attend_text`.
        rotation: cosines and sines of the token, `[B or 1, 1, 1, e]`, where queries and keys are rotated.
        cache, layer_idx: what to remember it in.
        groups, norms: see `AllPairs`.
    """
    distance, batch, heads = layout.max_row_distance, len(tokens), num_heads // groups
    turns = None if rotation is None else layout.once("own_turn", lambda: pack_rotation(rotation, batch))
    states, _, turns = remember_recent(cache, layer_idx, [tokens, None, turns], distance - 1)
    # By distance, and once more itself, for all that are further away.
    order = layout.once(
        "near_order", lambda: (distance - 1 - torch.arange(distance + 1, device=tokens.device)) % distance
    )
    states = states.transpose(0, 1).index_select(0, order)
    keys, values = (_by_distance(states, side).unflatten(-1, (heads, -1)) for side in sides[-2:])
    norms = norms or {"q": None, "k": None}
    if norms["k"] is not None:
        keys = norms["k"](keys)
    # Heads that share keys are as many queries, `[queries, B, A / groups, e]`.
    if query is not None:
        queries = query.permute(2, 0, 1, 3)
    else:
        queries = _by_distance(tokens.transpose(0, 1).expand(distance + 1, -1, -1), sides[0])
        queries = queries.unflatten(-1, (num_heads, -1))
        queries = queries if norms["q"] is None else norms["q"](queries)
    if groups > 1:
        queries = queries.unflatten(2, (heads, groups)).movedim(3, 1).flatten(0, 1)
    if turns is not None:
        # The same for all layers.
        turns = layout.once("near_turns", lambda: _step_rotation(turns, order, len(queries)))
        both = _rotate_rows(torch.cat((queries, keys)), turns).to(keys.dtype)
        queries, keys = both[: len(queries)], both[len(queries) :]
    own_scores = None
    if query is None:
        # A query for each distance. Their scores are added to those of near keys that are zero.
        own_scores = (queries.unflatten(0, (-1, groups))[:-1] * keys[:-1, None]).sum(-1).permute(2, 3, 1, 0) * scale
        queries, keys = queries[-groups:], pad(keys[-1:], (0, 0) * 3 + (distance, 0))
    # As `remember` packs them. Near ones are of this step alone.
    new = torch.cat((keys, values), dim=-1).permute(1, 2, 0, 3)
    both, _ = cache.update(new[:, :, -1:], new[:, :, -1:, :0], layer_idx, behind=new[:, :, :-1])
    bias = layout.once("step_bias", lambda: _step_bias(layout, mask.additive, both.shape[2], heads).to(values.dtype))
    if own_scores is not None:
        bias = bias + pad(own_scores, (both.shape[2] - distance, 0))
    size = both.shape[-1] - values.shape[-1]
    output = scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3), both[..., :size], both[..., size:], bias, scale=scale
    )
    return output.reshape(batch, 1, num_heads * output.shape[-1])


def _by_distance(states: Tensor, side: PairInputs) -> Tensor:
    """`[D + 1, B, in]`, each by the matrix of its distance, `[D + 1, B, A·e]`."""
    if side.bias is None:
        return torch.bmm(states, side.bank)
    return torch.baddbmm(side.bias.unsqueeze(1), states, side.bank)


def _step_rotation(turns: Tensor, order: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """What `_rotate_rows` takes of the query, as often as there are queries, and of the keys by distance, `[…, B, 1, e]` each."""
    own = turns[:, -1:].expand(-1, num_queries, -1)
    cos, sin = torch.cat((own, turns.index_select(1, order)), dim=1).transpose(0, 1).unsqueeze(2).chunk(2, dim=-1)
    first, second = sin.chunk(2, dim=-1)
    return cos.contiguous(), torch.cat((-first, second), dim=-1)


def _rotate_rows(rows: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """As `rotate`, in few operations: the sines of the first half of the features are negative."""
    cos, sin = turns
    return torch.addcmul(rows * cos, rows.roll(rows.shape[-1] // 2, -1), sin)


def _step_bias(layout: StepLayout, bias: Tensor, num_slots: int, heads: int) -> Tensor:
    """What is added to the scores of far slots and, behind them, of near distances, `[B or 1, A / groups or 1, groups or 1, slots]`."""
    lowest, distance = torch.finfo(bias.dtype).min, layout.max_row_distance
    far = bias.masked_fill(distances(layout, bias.device) < distance, lowest)[..., : num_slots - distance]
    near = layout.position - torch.arange(distance, device=bias.device)
    of_near = bias.index_select(-1, near.clamp(min=0)).masked_fill(near < 0, lowest)
    bias = torch.cat((far, of_near), dim=-1)
    return bias if bias.shape[1] == 1 else bias.view(len(bias), heads, bias.shape[1] // heads, num_slots)


def attend_image(
    pairs: AllPairs,
    dense: DenseHeads,
    scale: float,
    mask: AttentionMask,
    rotation: tuple[Tensor, Tensor] | None,
    rope_theta: float,
) -> Tensor:
    """`[B, L, A·e]` of images; see `attend_text`.

    Args:
        rotation: cosines and sines of all tokens, `[L, e]`, where relative queries and keys are rotated.
        rope_theta: base of the rotary frequencies.
    """
    layout, num_heads = pairs.layout, pairs.num_heads
    first = int(layout.class_token)
    pairs.query, pairs.key, pairs.value = join_biases(pairs.query, pairs.key, pairs.value)
    grid = replace(layout, class_token=False)
    image = _Image(pairs, rotation, rope_theta)
    of_offsets = image.near_and_shared if layout.share_far else image.clamped
    sides, far = [], []
    for name, heads in zip("qkv", dense, strict=True):
        near, own_far = of_offsets(name)
        own = own_heads = None
        if heads is not None:
            merged = merge_heads(heads)
            patches = merged[:, first:].contiguous()
            own = [patches]
            if name != "q" and layout.class_token:
                own = [*[patches] * min(len(grid.near_offsets()), 1), merged[:, :1]]
            own_heads = image.repeated(name, patches)
        sides.append(_join(own, near, num_heads))
        far.append(_join(own_heads, own_far, num_heads))
    near_bias = far_bias = None
    if mask.additive is not None:
        far_bias = mask.additive[:, :, first:, first:]
        near_bias = _of_near(mask.additive[:, :, first:], _key_columns(layout, far_bias.device))
    # All queries, then keys and values of each kind of far pairs.
    query, keys, values = far
    count = max(len(keys), len(values))
    keys, values = (parts if len(parts) == count else parts * count for parts in (keys, values))
    far = [part for pair in zip(keys, values, strict=True) for part in pair]
    far = [split_heads(part, num_heads) for part in (*query, *far)]
    has_far = layout.has_far_pairs or not layout.share_far
    attend = local_operator(pairs.path)
    output = attend(*sides, far if has_far else None, num_heads, scale, grid, near_bias, far_bias)
    if not layout.class_token:
        return output
    return torch.cat((_of_class_token(pairs, image.matrices, dense, scale, mask, rotation), output), dim=1)


class _Image:
    """What the relative part of an image brings to near and far pairs.

    Args:
        pairs: the relative part.
        rotation, rope_theta: see `attend_image`.
    """

    def __init__(self, pairs: AllPairs, rotation: tuple[Tensor, Tensor] | None, rope_theta: float):
        self.grid, self.rope_theta = replace(pairs.layout, class_token=False), rope_theta
        # Patches follow it.
        self.class_token = pairs.layout.class_token
        self.sides = dict(zip("qkv", (pairs.query, pairs.key, pairs.value), strict=True))
        self.matrices = {name: _matrices(side) for name, side in self.sides.items()}
        self.num_heads, self.first_class_row = pairs.num_heads, self.grid.num_grid_offsets
        # Patches are rotated and the class token is not.
        self.rotation = None if rotation is None else tuple(part[int(self.class_token) :] for part in rotation)
        self.patches: dict[int, Tensor] = {}

    def near_and_shared(self, name: str) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Projections for each near offset, then for the pairs of patches with a class token; and for far pairs."""
        side, matrices = self.sides[name], self.matrices[name]
        if side is None:
            return None, None
        tokens, at_class = self._patches(side), side.tokens[:, :1]
        key_is_class = self.class_token and name != "q"
        if matrices is None:
            near, far = ([tokens, at_class] if key_is_class else [tokens]), tokens
        else:
            # Each patch looks at the class token once more.
            ends = [matrices[self.first_class_row + CLASS_FROM_PATCH]] if self.class_token and name == "q" else []
            *near, far = project_each(tokens, [*self._near_matrices(name), *ends, matrices[self.grid.far_row]])
            if key_is_class:
                near.append(at_class @ matrices[self.first_class_row + PATCH_FROM_CLASS])
        if self.rotation is None or name == "v":
            return near, [far]
        if name == "k" and key_is_class:
            # Seen from a patch, the class token is rotated back.
            cos, sin = self.rotation
            near[-1] = _rotate_tokens(near[-1], (cos, -sin), self.num_heads)
        return near, [_rotate_tokens(far, self.rotation, self.num_heads)]

    def clamped(self, name: str) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Projections for the pairs of patches with the class token; and for pairs of patches, by clamped row offset."""
        side, matrices = self.sides[name], self.matrices[name]
        if side is None:
            return None, None
        tokens, at_class = self._patches(side), side.tokens[:, :1]
        turned = self.rotation is not None and name != "v"
        if matrices is None:
            tokens = _rotate_tokens(tokens, self.rotation, self.num_heads) if turned else tokens
            return ([tokens] if name == "q" else [at_class]), self.repeated(name, tokens)
        kinds = 2 * self.grid.max_column_distance + 1
        far = [tokens @ torch.cat(matrices[row : row + kinds], dim=-1) for row in range(0, kinds**2, kinds)]
        far = [part.unflatten(-1, (kinds, -1)).flatten(1, 2) for part in far]
        if turned:
            rotation = tuple(part.repeat_interleave(kinds, dim=0) for part in self.rotation)
            far = [_rotate_tokens(part, rotation, self.num_heads) for part in far]
        return [at_class @ matrices[self.first_class_row + PATCH_FROM_CLASS]], far

    def repeated(self, name: str, tokens: Tensor) -> list[Tensor]:
        """The same projections for pairs of every kind: where offsets are clamped, once for each column offset."""
        if name == "q" or self.grid.share_far:
            return [tokens]
        return [tokens.repeat_interleave(2 * self.grid.max_column_distance + 1, dim=1)]

    def _patches(self, side: PairInputs) -> Tensor:
        # One input of several banks is arranged once.
        return self.patches.setdefault(id(side.tokens), side.tokens[:, int(self.class_token) :].contiguous())

    def _near_matrices(self, name: str) -> list[Tensor]:
        offsets, side = self.grid.near_offsets(), self.sides[name]
        rows = [offset.reverse_row if name == "q" else offset.row for offset in offsets]
        # Of queries and keys one is enough to be rotated by the offset.
        turned = "k" if self.matrices["k"] is not None else "q"
        if self.rotation is None or name != turned:
            return [self.matrices[name][row] for row in rows]
        # Keys are rotated back by their offset from the query.
        steps = (-part if name == "k" else part for part in self.grid.near_steps(side.bank.device))
        cos, sin = patch_rotation(
            *steps, side.bank.shape[-1] // self.num_heads, self.rope_theta, self.rotation[0].dtype
        )
        near = torch.stack([self.matrices[name][row] for row in rows])
        return list(rotate_bank(near, (cos, sin), self.num_heads).unbind(0))


def _of_class_token(
    pairs: AllPairs,
    matrices: dict[str, tuple[Tensor, ...] | None],
    dense: DenseHeads,
    scale: float,
    mask: AttentionMask,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The output of the class token, `[B, 1, A·e]`: one query whose keys are projected by two matrices."""
    num_heads, first = pairs.num_heads, pairs.layout.num_grid_offsets
    wide = accumulation_dtype((pairs.value.tokens if pairs.value is not None else dense[2]).dtype)
    scores = 0
    if dense[0] is not None:
        scores = (dense[0][:, :, :1] @ dense[1].transpose(-1, -2)).to(wide)
    if pairs.query is not None:
        # To itself, and to the patches.
        parts = [
            _class_scores(pairs, matrices, keys, row, reverse, rotation)
            for _, keys, row, reverse in class_blocks(pairs.layout)[:2]
        ]
        scores = scores + torch.cat(parts, dim=-1).to(wide)
    scores = scores * scale
    if mask.additive is not None:
        scores = scores + mask.additive[:, :, :1]
    weights = scores.softmax(-1)
    own = relative = None
    if dense[2] is not None:
        own = [merge_heads(weights.to(dense[2].dtype) @ dense[2])]
    if pairs.value is not None:
        tokens = pairs.value.tokens
        given = weights.to(tokens.dtype)
        sums = given[..., 1:] @ tokens[:, None, 1:]
        matrix = _by_head(matrices["v"][first + CLASS_FROM_PATCH], num_heads)
        value = torch.einsum("bati,iae->btae", sums, matrix).flatten(2)
        itself = split_heads(tokens[:, :1] @ matrices["v"][first + CLASS_TO_CLASS], num_heads)
        relative = [value + merge_heads(given[..., :1] * itself)]
    return _join(own, relative, num_heads)[0]


def _class_scores(
    pairs: AllPairs,
    matrices: dict[str, tuple[Tensor, ...] | None],
    places: slice,
    row: int,
    reverse_row: int,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`<q_ij, k_ij>` of the class token with some tokens, `[B, A, 1, tokens]`."""
    num_heads = pairs.num_heads
    query = split_heads(_projected(pairs.query.tokens[:, :1], matrices["q"], reverse_row), num_heads)
    tokens = pairs.key.tokens[:, places]
    if matrices["k"] is not None and rotation is None:
        # One query is taken back through a matrix with less work than all keys forward.
        query = torch.einsum("bate,iae->bati", query, _by_head(matrices["k"][row], num_heads))
        return query @ tokens.transpose(1, 2).unsqueeze(1)
    keys = split_heads(_projected(tokens, matrices["k"], row), num_heads)
    if rotation is not None:
        keys = rotate(keys, tuple(part[places] for part in rotation)).to(keys.dtype)
    return query @ keys.transpose(-1, -2)


def _matrices(side: PairInputs | None) -> tuple[Tensor, ...] | None:
    # Taken apart once: the gradient of a matrix that is taken alone is as large as the bank.
    return None if side is None or side.bank is None else side.bank.unbind(0)


def _projected(tokens: Tensor, matrices: tuple[Tensor, ...] | None, row: int) -> Tensor:
    return tokens if matrices is None else tokens @ matrices[row]


def _by_head(matrix: Tensor, num_heads: int) -> Tensor:
    return matrix.unflatten(-1, (num_heads, -1))


def _rotate_tokens(tokens: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
    """Rotates projections `[B, N, A·e]`."""
    return merge_heads(rotate(split_heads(tokens, num_heads), rotation).to(tokens.dtype))


def _key_columns(layout: PairLayout, device: torch.device) -> Tensor:
    """The token that each patch sees at each near offset, and a class token, `[N, T]`; any where there is none."""
    first, last = int(layout.class_token), layout.num_tokens - 1
    patch = torch.arange(first, layout.num_tokens, device=device)[:, None]
    rows, columns = layout.near_steps(device)
    columns = patch - (rows * layout.width + columns)
    return pad(columns.clamp(0, last), (0, first))


def _of_near(bias: Tensor, keys: Tensor) -> Tensor:
    """The bias of near pairs, `[T, B or 1, Q, A or 1]`, out of `[B or 1, A or 1, Q, L]`, by the keys `[Q, T]` of each query."""
    return bias.gather(-1, keys.clamp(min=0).expand(*bias.shape[:2], -1, -1)).permute(3, 0, 2, 1)


def _join(own: list[Tensor] | None, relative: list[Tensor] | None, num_heads: int) -> list[Tensor]:
    """Dense and relative features of each head, side by side."""
    if own is None or relative is None:
        return relative if own is None else own
    count = max(len(own), len(relative))
    pairs = [[of_term(parts, index, count) for parts in (own, relative)] for index in range(count)]
    return [merge_heads(_join_heads(*(split_heads(part, num_heads) for part in pair))) for pair in pairs]


def _join_heads(own: Tensor | None, relative: Tensor | None) -> Tensor:
    if own is None or relative is None:
        return relative if own is None else own
    return torch.cat((own, relative), dim=-1)


__all__ = ["attend_image", "attend_step", "attend_text"]

"""Local Translution: what a layer with a distance brings to near offsets, to far pairs and to a class token's.

The operator over them is in `operators/local.py`; here its inputs are made from tokens and banks, for images and text, full and
low-rank, rotated or not.

Legend: `B` batch, `L` tokens, `N` patches, `A` heads, `e` features per head, `T` near offsets, `Q` queries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..operators.heads import merge_heads, split_heads
from ..operators.local import local_attention, project_each
from ..operators.pair_autograd import accumulation_dtype
from ..operators.pair_layout import CLASS_FROM_PATCH, CLASS_TO_CLASS, PATCH_FROM_CLASS, PairLayout
from ..operators.rotary import patch_rotation, rotate, rotate_bank
from .masks import AttentionMask
from .near_far import AllPairs, NearAndFarPairs, PairInputs


NAMES = {"q": "query", "k": "key", "v": "value"}
DenseHeads = tuple[Tensor | None, Tensor | None, Tensor | None]


def attend_text(pairs: NearAndFarPairs, dense: DenseHeads, scale: float, mask: AttentionMask) -> Tensor:
    """`[B, Q, A·e]` of a text. The features of low-rank Translution are the dense ones of a head, then its relative ones.

    Args:
        pairs: the relative part, which has remembered what a cache holds.
        dense: queries, keys and values of ordinary attention, `[B, A, Q or L, d]`, where a side has such.
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
        relative = None
        if side is not None:
            tokens, matrices = side.tokens[:, side.tokens.shape[1] - count :], _matrices(side)
            relative = [tokens] if matrices is None else project_each(tokens, [matrices[row] for row in rows])
            if pairs.near_rotation is not None and name != "v":
                turns = tuple(part[:, :, part.shape[2] - count :] for part in pairs.near_rotation)
                relative = [_rotate_tokens(part, turns, num_heads) for part in relative]
        own = None if heads is None else [merge_heads(heads[:, :, heads.shape[2] - count :])]
        sides.append(_join(own, relative, num_heads))
    far = None
    if layout.num_tokens > layout.max_row_distance:
        far = [_join_heads(heads, part) for heads, part in zip(dense, pairs.far(), strict=True)]
    near_bias = far_bias = None
    if mask.additive is not None:
        far_bias = mask.additive
        query = torch.arange(layout.num_queries, device=far_bias.device)[:, None] + layout.past
        distance = torch.arange(len(near.near_offsets()), device=far_bias.device)
        near_bias = _of_near(far_bias, query - distance)
    return local_attention(*sides, far, num_heads, scale, near, near_bias, far_bias)


def attend_image(
    pairs: AllPairs,
    dense: DenseHeads,
    scale: float,
    mask: AttentionMask,
    rotation: tuple[Tensor, Tensor] | None,
    rope_theta: float,
) -> Tensor:
    """`[B, L, A·e]` of images whose far offsets share a matrix; see `attend_text`.

    Args:
        rotation: cosines and sines of all tokens, `[L, e]`, where relative queries and keys are rotated.
        rope_theta: base of the rotary frequencies.
    """
    layout, num_heads = pairs.layout, pairs.num_heads
    grid = replace(layout, class_token=False)
    offsets, first = grid.near_offsets(), layout.num_grid_offsets
    has_far = max(layout.height, layout.width) > layout.bank_height
    patches: dict[int, Tensor] = {}
    matrices = {name: _matrices(getattr(pairs, side)) for name, side in NAMES.items()}
    sides, far = [], []
    for name, side, heads in zip("qkv", (pairs.query, pairs.key, pairs.value), dense, strict=True):
        rows = [offset.reverse_row if name == "q" else offset.row for offset in offsets]
        relative = far_part = None
        if side is not None:
            tokens = patches.setdefault(id(side.tokens), side.tokens[:, 1:].contiguous())
            if side.bank is None:
                relative, far_part = [tokens], tokens
                if name != "q":
                    relative = [tokens, side.tokens[:, :1]]
            else:
                own_matrices = list(matrices[name])
                turned = "k" if pairs.key is not None and pairs.key.bank is not None else "q"
                if rotation is not None and name == turned:
                    near = _rotated(side.bank[rows], offsets, num_heads, name == "k", rope_theta, rotation[0].dtype)
                    for row, matrix in zip(rows, near.unbind(0), strict=True):
                        own_matrices[row] = matrix
                chosen = [own_matrices[row] for row in rows]
                # Each patch looks at the class token once more, and at far patches.
                ends = [own_matrices[first + CLASS_FROM_PATCH]] if name == "q" else []
                ends += [own_matrices[layout.far_row]] if has_far else []
                relative = project_each(tokens, [*chosen, *ends])
                far_part = relative.pop() if has_far else None
                if name != "q":
                    relative.append(side.tokens[:, :1] @ own_matrices[first + PATCH_FROM_CLASS])
        own = own_far = None
        if heads is not None:
            merged = merge_heads(heads)
            own_far = merged[:, 1:]
            own = [own_far] if name == "q" else [own_far, merged[:, :1]]
        if rotation is not None and name == "k":
            # Patches are rotated and the class token is not: seen from a patch it is rotated back.
            back = tuple(part[1:] for part in (rotation[0], -rotation[1]))
            relative[-1] = _rotate_tokens(relative[-1], back, num_heads)
        sides.append(_join(own, relative, num_heads))
        if has_far:
            part = None if far_part is None else split_heads(far_part, num_heads)
            if rotation is not None and name != "v":
                part = rotate(part, tuple(part[1:] for part in rotation)).to(part.dtype)
            far.append(_join_heads(None if own_far is None else split_heads(own_far, num_heads), part))
    near_bias = far_bias = None
    if mask.additive is not None:
        far_bias = mask.additive[:, :, 1:, 1:]
        near_bias = _of_near(mask.additive[:, :, 1:], _key_columns(grid, far_bias.device))
    output = local_attention(*sides, far or None, num_heads, scale, grid, near_bias, far_bias)
    return torch.cat((_of_class_token(pairs, matrices, dense, scale, mask, rotation), output), dim=1)


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
        for places, row, reverse in (
            (slice(0, 1), CLASS_TO_CLASS, CLASS_TO_CLASS),
            (slice(1, None), CLASS_FROM_PATCH, PATCH_FROM_CLASS),
        ):
            query = split_heads(_projected(pairs.query.tokens[:, :1], matrices["q"], first + reverse), num_heads)
            tokens = pairs.key.tokens[:, places]
            if matrices["k"] is not None and rotation is None:
                # One query is taken back through a matrix with less work than all keys forward.
                heads = torch.einsum("bate,iae->bati", query, _by_head(matrices["k"][first + row], num_heads))
                part = heads @ tokens.transpose(1, 2).unsqueeze(1)
            else:
                heads = split_heads(_projected(tokens, matrices["k"], first + row), num_heads)
                if rotation is not None:
                    heads = rotate(heads, tuple(part[places] for part in rotation)).to(heads.dtype)
                part = query @ heads.transpose(-1, -2)
            found = part.to(wide) if places.start == 0 else torch.cat((found, part.to(wide)), dim=-1)
        scores = scores + found
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


def _matrices(side: PairInputs | None) -> tuple[Tensor, ...] | None:
    # Taken apart once: the gradient of a matrix that is taken alone is as large as the bank.
    return None if side is None or side.bank is None else side.bank.unbind(0)


def _projected(tokens: Tensor, matrices: tuple[Tensor, ...] | None, row: int) -> Tensor:
    return tokens if matrices is None else tokens @ matrices[row]


def _by_head(matrix: Tensor, num_heads: int) -> Tensor:
    return matrix.unflatten(-1, (num_heads, -1))


def _rotated(matrices: Tensor, offsets, num_heads: int, back: bool, rope_theta: float, dtype: torch.dtype) -> Tensor:
    """Matrices of near offsets, each rotated by its offset: those of keys `back`."""
    steps = torch.tensor([(offset.row_offset, offset.column_offset) for offset in offsets], device=matrices.device)
    size = matrices.shape[-1] // num_heads
    cos, sin = patch_rotation(*(-steps if back else steps).unbind(1), size, rope_theta, dtype)
    return rotate_bank(matrices, (cos, sin), num_heads)


def _rotate_tokens(tokens: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
    """Rotates projections `[B, N, A·e]`."""
    return merge_heads(rotate(split_heads(tokens, num_heads), rotation).to(tokens.dtype))


def _key_columns(grid: PairLayout, device: torch.device) -> Tensor:
    """The token that each patch sees at each near offset, and the class token, `[N, T + 1]`; any where there is none."""
    patch = torch.arange(grid.num_tokens, device=device)[:, None]
    steps = [offset.row_offset * grid.width + offset.column_offset for offset in grid.near_offsets()]
    columns = 1 + patch - torch.tensor(steps, device=device)
    return torch.nn.functional.pad(columns.clamp(0, grid.num_tokens), (0, 1))


def _of_near(bias: Tensor, keys: Tensor) -> Tensor:
    """The bias of near pairs, `[T, B or 1, Q, A or 1]`, out of `[B or 1, A or 1, Q, L]`, by the keys `[Q, T]` of each query."""
    return bias.gather(-1, keys.clamp(min=0).expand(*bias.shape[:2], -1, -1)).permute(3, 0, 2, 1)


def _join(own: list[Tensor] | None, relative: list[Tensor] | None, num_heads: int) -> list[Tensor]:
    """Dense and relative features of each head, side by side."""
    if own is None or relative is None:
        return relative if own is None else own
    count = max(len(own), len(relative))
    # Fewer parts begin with one for all near offsets.
    pairs = [[parts[max(index - (count - len(parts)), 0)] for parts in (own, relative)] for index in range(count)]
    return [merge_heads(_join_heads(*(split_heads(part, num_heads) for part in pair))) for pair in pairs]


def _join_heads(own: Tensor | None, relative: Tensor | None) -> Tensor:
    if own is None or relative is None:
        return relative if own is None else own
    return torch.cat((own, relative), dim=-1)


__all__ = ["attend_image", "attend_text"]

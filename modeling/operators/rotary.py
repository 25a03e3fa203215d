"""Rotary position embeddings (Su et al. 2021), 1-D for text and 2-D for a grid of patches.

The rotation pairs element `n` of a head with element `n + d/2`. In two dimensions the first `d/4` of the `d/2` angles belong
to the row and the others to the column; the class token is not rotated.

Legend: `B` batch, `L` tokens, `d` head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype


def text_rotation(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `[B, L]` positions, each `[B, 1, L, d]` of `dtype`."""
    angles = position_ids[:, None, :, None] * _frequencies(head_dim // 2, head_dim, theta, dtype, position_ids.device)
    return _cos_sin(angles, dtype)


def image_rotation(
    height: int,
    width: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
    class_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a class token, unless there is none, and a `height × width` grid, each `[L, d]` of `dtype`."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    cos, sin = patch_rotation(rows, columns, head_dim, theta, dtype)
    if not class_token:
        return cos, sin
    # The class token's angle is 0.
    return torch.nn.functional.pad(cos, (0, 0, 1, 0), value=1), torch.nn.functional.pad(sin, (0, 0, 1, 0))


def patch_rotation(
    rows: Tensor, columns: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of patches, or of offsets between them, at `[n]` rows and columns, each `[n, d]` of `dtype`."""
    frequencies = _frequencies(head_dim // 4, head_dim // 2, theta, dtype, rows.device)
    return _cos_sin(torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=-1), dtype)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates `[B, A, L, d]` by cosines and sines that broadcast to it."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_bank(bank: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
    """Rotates what each matrix of a bank puts out by an angle of its own.

    Two rotations of a score are one of its offset, `<R_i q, R_j x W> = <q, x W R_(j - i)>`: where a matrix belongs to a single
    offset, its few rows may be rotated instead of every token.

    Args:
        bank: `[num_offsets, in, A·d]`.
        rotation: cosines and sines of the offsets, each `[num_offsets, d]`.
        num_heads: `A`.
    """
    cos, sin = (part[:, None, None] for part in rotation)
    return rotate(bank.unflatten(-1, (num_heads, -1)), (cos, sin)).flatten(-2).to(bank.dtype)


def _frequencies(count: int, span: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Angles of long texts do not fit half precision, so they are never computed in less than float32.
    wide = accumulation_dtype(dtype)
    # PyTorch takes no integer of more than 64 bits.
    return float(theta) ** (-2 * torch.arange(count, dtype=wide, device=device) / span)


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


__all__ = ["image_rotation", "patch_rotation", "rotate", "rotate_bank", "text_rotation"]

"""What is learned for one grid of patches, resampled to another.

Legend: `H`, `W` grid height and width in patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_layout import PairLayout, StepLayout


def resample_offsets(table: Tensor, old: PairLayout, new: PairLayout | StepLayout) -> Tensor:
    """Rows of offsets for another grid: bicubic over both offset axes, the rows of a class token kept.

    Args:
        table: `[old.num_offsets, …]`.
        old, new: layouts with the bank sizes to go from and to.

    Returns:
        `[new.num_offsets, …]`; `table` itself where both are made for the same distances.
    """
    if old.causal:
        return table
    sizes = [(2 * layout.max_row_distance + 1, 2 * layout.max_column_distance + 1) for layout in (old, new)]
    if sizes[0] == sizes[1]:
        return table
    grid, rest = table[: old.num_grid_offsets], table[old.num_grid_offsets :]
    return torch.cat((_bicubic(grid, *sizes), rest))


def resample_positions(embeddings: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute position embeddings `[1, 1 + H·W, C]` for another grid, bicubic; that of the class token is kept."""
    if old == new:
        return embeddings
    return torch.cat((embeddings[:, :1], _bicubic(embeddings[0, 1:], old, new)[None]), dim=1)


def _bicubic(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """`[old height · old width, …]` to `[new height · new width, …]`."""
    maps = rows.flatten(1).T.unflatten(1, old)[None]
    # Bicubic interpolation of half precision is not implemented on every device, and would not be precise.
    wide = maps if maps.dtype == torch.float64 else maps.float()
    maps = torch.nn.functional.interpolate(wide, size=new, mode="bicubic", align_corners=False).to(rows.dtype)
    return maps[0].flatten(1).T.unflatten(1, rows.shape[1:])


__all__ = ["resample_offsets", "resample_positions"]

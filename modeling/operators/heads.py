"""Heads as an axis of their own.

Legend: `B` batch, `L` tokens, `A` heads, `e` features per head.
"""

from __future__ import annotations

from torch import Tensor


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """`[B, L, A·e]` to `[B, A, L, e]`, a view."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """`[B, A, L, e]` to `[B, L, A·e]`."""
    return heads.transpose(1, 2).flatten(2)


__all__ = ["merge_heads", "split_heads"]

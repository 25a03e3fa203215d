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


def projected_size(tokens: Tensor, bank: Tensor | None) -> int:
    """Features of what tokens bring to their pairs, `A·e`: projected by a bank, or as they are."""
    return (tokens if bank is None else bank).shape[-1]


def groups_of(query: Tensor, key: Tensor, query_bank: Tensor | None = None, key_bank: Tensor | None = None) -> int:
    """How many heads of queries share one of keys, `groups`: queries bring `A·e` features to a pair, keys `A / groups · e`.

    Raises:
        ValueError: if the one is no multiple of the other.
    """
    queries, keys = projected_size(query, query_bank), projected_size(key, key_bank)
    if queries % keys:
        raise ValueError(f"Queries of {queries} features must have a multiple of the keys', got keys of {keys}.")
    return queries // keys


def repeat_heads(heads: Tensor | None, groups: int) -> Tensor | None:
    """`[B, A / groups, L, e]` to `[B, A, L, e]`: each head serves `groups` heads of queries, one after the other."""
    return heads if heads is None or groups == 1 else heads.repeat_interleave(groups, dim=1)


def repeat_features(tokens: Tensor, num_heads: int, groups: int) -> Tensor:
    """The same where heads are side by side, `[…, A / groups · e]` to `[…, A · e]`; `num_heads` is `A`."""
    if groups == 1:
        return tokens
    return tokens.unflatten(-1, (num_heads // groups, -1)).repeat_interleave(groups, dim=-2).flatten(-2)


def grouped_product(heads: Tensor, shared: Tensor) -> Tensor:
    """`heads @ shared` where heads share one: `[B, A, n, x]` by `[B, A / groups, x, y]`, `[B, A, n, y]`; nothing is repeated."""
    groups = heads.shape[1] // shared.shape[1]
    if groups == 1:
        return heads @ shared
    # To what they share, several heads are one with more rows.
    rows = heads.unflatten(1, (-1, groups)).flatten(2, 3)
    return (rows @ shared).unflatten(2, (groups, -1)).flatten(1, 2)


def sum_groups(gradient: Tensor, num_heads: int, groups: int) -> Tensor:
    """The gradient of what `repeat_features` repeated: `[…, A·e]` to `[…, A / groups · e]`."""
    if groups == 1:
        return gradient
    return gradient.unflatten(-1, (num_heads // groups, groups, -1)).sum(-2).flatten(-2)


__all__ = [
    "grouped_product",
    "groups_of",
    "merge_heads",
    "projected_size",
    "repeat_features",
    "repeat_heads",
    "split_heads",
    "sum_groups",
]

"""The relative part of Translution over all pairs of a layer, and what a cache stores of it.

`AllPairs` gives every pair its own projections. `NearAndFarPairs` is text with a distance `D`: pairs at that distance or more
share one matrix, so that a far key or value belongs to a token and is computed once, as in attention.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `D` largest distance told apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..operators.basis import OffsetBasis
from ..operators.dispatch import pair_operators
from ..operators.heads import merge_heads, split_heads
from ..operators.pair_layout import PairLayout, StepLayout, distances
from .cache import remember, remember_recent


class PairInputs(NamedTuple):
    """Tokens `[B, L, in]` and their bank, or plain projections `[B, L, A·e]` and `None`."""

    tokens: Tensor
    bank: Tensor | OffsetBasis | None


class AllPairs:
    """Every pair has projections of its own.

    Args:
        path: the implementation that computes them, see `dispatch.py`.
        layout: the pairs.
        num_heads: `A`.
        query, key, value: of the new tokens; `None` where scores or values are not relative.
    """

    def __init__(
        self,
        path: str,
        layout: PairLayout | StepLayout,
        num_heads: int,
        query: PairInputs | None,
        key: PairInputs | None,
        value: PairInputs | None,
    ):
        self.path, self.layout, self.num_heads = path, layout, num_heads
        self.query, self.key, self.value = query, key, value
        # One input of two banks is remembered once.
        self.shared = key is not None and value is not None and key.tokens is value.tokens

    def remember(
        self, cache: Cache | None, layer_idx: int, dense_key: Tensor | None, dense_value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Extends keys and values by those a cache remembers; returns the dense ones.

        Args:
            dense_key, dense_value: those of ordinary attention, `[B, A, new, d]`.

        Returns:
            The same of all tokens, `[B, A, L, d]`.
        """
        tokens = [None if part is None else part.unsqueeze(1) for part in self._inputs()]
        dense, tokens = (
            [None if part is None else part[:, :, : self.layout.num_tokens] for part in parts]
            for parts in remember(cache, layer_idx, [dense_key, dense_value], tokens)
        )
        self._extend(*(None if part is None else part.squeeze(1) for part in tokens))
        return dense[0], dense[1]

    def _inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """What keys and values are projected from; `None` for values that share the keys' input."""
        key = None if self.key is None else self.key.tokens
        value = None if self.value is None or self.shared else self.value.tokens
        return key, value

    def _extend(self, key: Tensor | None, value: Tensor | None) -> None:
        """Puts the inputs of all tokens, in the form of `_inputs`, in the place of the new ones'."""
        if key is not None:
            self.key = self.key._replace(tokens=key)
        if self.value is not None:
            self.value = self.value._replace(tokens=key if self.shared else value)

    def far(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What queries, keys and values bring to far pairs, `[B, A, L, e]`; `None` where that is not relative."""
        return None, None, None

    def scores(self) -> Tensor:
        """`<q_ij, k_ij>`, `[B, A, queries, L]`."""
        (query, query_bank), (key, key_bank) = self.query, self.key
        return pair_operators(self.path).pair_scores(query, key, query_bank, key_bank, self.num_heads, self.layout)

    def values(self, weights: Tensor) -> Tensor:
        """`Σ_j p_ij v_ij`, `[B, queries, A·e]`, from `[B, A, queries, L]` probabilities."""
        return pair_operators(self.path).pair_values(weights, *self.value, self.layout)


class NearAndFarPairs(AllPairs):
    """Text with a distance `D`: pairs nearer than `D` have projections of their own, the others share the last matrix."""

    def remember(
        self, cache: Cache | None, layer_idx: int, dense_key: Tensor | None, dense_value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `AllPairs.remember`. Of each token its far key and value are remembered, and of the last few their inputs."""
        far = [_far_heads(inputs, self.num_heads) for inputs in (self.key, self.value)]
        stored, _ = remember(cache, layer_idx, [dense_key, dense_value, *far], [])
        dense_key, dense_value, self.far_key, self.far_value = (
            None if part is None else part[:, :, : self.layout.num_tokens] for part in stored
        )
        self.distance = self.layout.max_row_distance
        # The token itself is at distance 0, so D - 1 tokens before it are near.
        self.window = 0 if cache is None else max(self.distance - 1, 0)
        if self.distance == 0:
            return dense_key, dense_value
        self._extend(*remember_recent(cache, layer_idx, self._inputs(), self.window))
        return dense_key, dense_value

    def far(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `AllPairs.far`."""
        return _far_heads(self.query, self.num_heads), self.far_key, self.far_value

    def scores(self) -> Tensor:
        """See `AllPairs.scores`."""
        scores = _far_heads(self.query, self.num_heads) @ self.far_key.transpose(-1, -2)
        if self.distance == 0:
            return scores
        near = pair_operators(self.path).pair_scores(
            self.query.tokens,
            self.key.tokens,
            self.query.bank,
            self.key.bank,
            self.num_heads,
            self.layout.near(self.window),
        )
        between = distances(self.layout, near.device)
        if near.shape != scores.shape or isinstance(self.layout, StepLayout):
            place = self.window + torch.arange(near.shape[2], device=near.device)[:, None] - between
            near = near.gather(-1, place.clamp(0, near.shape[-1] - 1).expand(*near.shape[:2], -1, -1))
        return torch.where((between >= 0) & (between < self.distance), near, scores.to(near.dtype))

    def values(self, weights: Tensor) -> Tensor:
        """See `AllPairs.values`."""
        between = distances(self.layout, weights.device)
        far = weights.masked_fill(between < self.distance, 0).to(self.far_value.dtype)
        output = merge_heads(far @ self.far_value)
        if self.distance == 0:
            return output
        near = weights
        num_near = self.window + weights.shape[2]
        if num_near != weights.shape[3] or isinstance(self.layout, StepLayout):
            # The slot that each place of the window has for each query; there are none before the first.
            positions = self.layout.positions(weights.device)[:, None]
            behind = self.window + torch.arange(weights.shape[2], device=weights.device)[:, None]
            slot = positions - (behind - torch.arange(num_near, device=weights.device))
            inside = slot.clamp(0, weights.shape[3] - 1).expand(*weights.shape[:2], -1, -1)
            near = weights.gather(-1, inside).masked_fill((slot < 0) | (slot > positions), 0)
        return output + pair_operators(self.path).pair_values(near, *self.value, self.layout.near(self.window))


def _far_heads(inputs: PairInputs | None, num_heads: int) -> Tensor | None:
    """The projection that a token has in all far pairs, by the last matrix of its bank, `[B, A, L, e]`."""
    if inputs is None:
        return None
    tokens, bank = inputs
    if isinstance(bank, OffsetBasis):
        tokens = tokens @ torch.einsum("m,mcd->cd", bank.coefficients[-1], bank.factors)
    elif bank is not None:
        tokens = tokens @ bank[-1]
    return split_heads(tokens, num_heads)


__all__ = ["AllPairs", "NearAndFarPairs", "PairInputs"]

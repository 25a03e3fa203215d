"""The relative part of Translution over all pairs of a layer, and what a cache stores of it.

`AllPairs` gives every pair its own projections. `NearAndFarPairs` is text with a distance `D`: pairs at that distance or more
share one matrix, so that a far key or value belongs to a token and is computed once, as in attention.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `D` largest distance told apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.basis import OffsetBasis
from ..operators.dispatch import pair_operators
from ..operators.heads import grouped_product, merge_heads, split_heads
from ..operators.pair_layout import PairLayout, StepLayout, distances
from ..operators.rotary import rotate, rotate_bank
from .cache import remember, remember_recent


# Paths whose operators rotate what banks project.
ROTATING = ("reference", "gathered", "decode")


class PairInputs(NamedTuple):
    """Tokens `[B, L, in]` and their bank, or plain projections `[B, L, A·e]` and `None`.

    `bias`, `[num_offsets, A·e]`, is added to what the bank projects; of a basis it is among the factors.
    """

    tokens: Tensor
    bank: Tensor | OffsetBasis | None
    bias: Tensor | None = None

    def by_row(self, row: int) -> Tensor:
        """The tokens' projections by one matrix of the bank, `[B, L, A·e]`."""
        if isinstance(self.bank, OffsetBasis):
            matrix = torch.einsum("m,mcd->cd", self.bank.coefficients[row], self.bank.factors)
        else:
            matrix = self.bank[row]
        projected = self.tokens @ matrix
        return projected if self.bias is None else projected + self.bias[row]


def join_biases(*sides: PairInputs | None) -> list[PairInputs | None]:
    """The same without biases: they become one row more of each matrix, for a feature that is always 1.

    For operators that know matrices alone; it copies the bank. Tokens that several have stay shared.
    """
    padded: dict[int, Tensor] = {}
    found = []
    for side in sides:
        if side is not None and side.bias is not None:
            if id(side.tokens) not in padded:
                padded[id(side.tokens)] = nn.functional.pad(side.tokens, (0, 1), value=1)
            bank = torch.cat((side.bank, side.bias.unsqueeze(1)), dim=1)
            side = PairInputs(padded[id(side.tokens)], bank)
        found.append(side)
    return found


class AllPairs:
    """Every pair has projections of its own.

    Args:
        path: the implementation that computes them, see `dispatch.py`.
        layout: the pairs.
        num_heads: `A`.
        query, key, value: of the new tokens; `None` where scores or values are not relative.
        rotation: cosines and sines of the new tokens where relative queries and keys are rotated by position.
        groups: heads of queries that share one of keys and values, whose banks and plain projections have `A / groups` heads.
        norms: of each head that a bank projects, by `"q"` and `"k"`.
    """

    def __init__(
        self,
        path: str,
        layout: PairLayout | StepLayout,
        num_heads: int,
        query: PairInputs | None,
        key: PairInputs | None,
        value: PairInputs | None,
        rotation: tuple[Tensor, Tensor] | None = None,
        groups: int = 1,
        norms: dict[str, nn.Module | None] | None = None,
    ):
        self.groups, self.norms = groups, norms or {"q": None, "k": None}
        self.path, self.layout, self.num_heads, self.rotation = path, layout, num_heads, rotation
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
        """What queries, keys and values bring to far pairs, `[B, A, Q, e]` and `[B, A / groups, L, e]`; `None` where that is not
        relative.
        """
        return None, None, None

    def scores(self) -> Tensor:
        """`<q_ij, k_ij>`, `[B, A, queries, L]`."""
        if self._norm("q") is not None or self._norm("k") is not None:
            return self._normed_scores()
        path = self.path if self.rotation is None or self.path in ROTATING else "reference"
        operator = pair_operators(path).pair_scores
        if path == "decode":
            # Of one new token the bank is most of the work: nothing of it is copied.
            query, key = self.query, self.key
            inputs = (query.tokens, key.tokens, query.bank, key.bank, self.num_heads, self.layout, self.rotation)
            return operator(*inputs, (query.bias, key.bias), self.groups)
        query, key = join_biases(self.query, self.key)
        rotation = () if self.rotation is None else (self.rotation,)
        return operator(query.tokens, key.tokens, query.bank, key.bank, self.num_heads, self.layout, *rotation)

    def values(self, weights: Tensor) -> Tensor:
        """`Σ_j p_ij v_ij`, `[B, queries, A·e]`, from `[B, A, queries, L]` probabilities."""
        return self._values(weights, self.layout)

    def _values(self, weights: Tensor, layout: PairLayout | StepLayout) -> Tensor:
        operator = pair_operators(self.path).pair_values
        if self.path == "decode":
            return operator(weights, self.value.tokens, self.value.bank, layout, self.value.bias, self.groups)
        (value,) = join_biases(self.value)
        return operator(weights, value.tokens, value.bank, layout, self.groups)

    def _norm(self, name: str) -> nn.Module | None:
        """The norm of what a bank projects; plain projections had theirs before."""
        side = self.query if name == "q" else self.key
        return None if side.bank is None else self.norms[name]

    def _normed_scores(self) -> Tensor:
        """As `scores`, one matrix after the other: no operator has a norm between a bank and the product."""
        rows, _ = self.layout.offsets(self.key.tokens.device)
        bank = self.key.bank if self.query.bank is None else self.query.bank
        scores = 0
        for row in range(len(bank)):
            # Of a text both banks are read at the same row.
            of_row = grouped_product(self._heads("q", row), self._heads("k", row).transpose(-1, -2))
            scores = scores + of_row.masked_fill(rows != row, 0)
        return scores

    def _heads(self, name: str, row: int) -> Tensor:
        """Queries or keys by one matrix, normed and rotated, `[B, A, queries, e]` or `[B, A / groups, L, e]`."""
        side = self.query if name == "q" else self.key
        heads = side.tokens if side.bank is None else side.by_row(row)
        heads = split_heads(heads, self.num_heads if name == "q" else self.num_heads // self.groups)
        heads = heads if self._norm(name) is None else self._norm(name)(heads)
        if self.rotation is not None:
            turns = tuple(part[..., part.shape[-2] - heads.shape[2] :, :] for part in self.rotation)
            heads = rotate(heads, turns).to(heads.dtype)
        return heads


class NearAndFarPairs(AllPairs):
    """Text with a distance `D`: pairs nearer than `D` have projections of their own, the others share the last matrix.

    Where queries and keys are rotated, far ones are rotated by their position. So are near ones, unless positions count on from
    token to token: then the matrix of a near pair is rotated by its distance instead, which is less work.

    Args:
        bank_rotation: cosines and sines of the distances, `[D + 1, e]`, where `rotation` is given and positions count on.
    """

    def __init__(self, *args, bank_rotation: tuple[Tensor, Tensor] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.far_query, self.far_key, self.far_value = (
            _far_heads(inputs, num_heads, rotation, norm)
            for inputs, num_heads, rotation, norm in (
                (self.query, self.num_heads, self.rotation, self.norms["q"]),
                (self.key, self.num_heads // self.groups, self.rotation, self.norms["k"]),
                (self.value, self.num_heads // self.groups, None, None),
            )
        )
        # Of the near tokens, those that a cache remembers included.
        self.near_rotation = self.rotation if bank_rotation is None else None
        if bank_rotation is None:
            return
        cos, sin = bank_rotation
        if self.key.bank is None:
            self.query = self.query._replace(bank=rotate_bank(self.query.bank, (cos, sin), self.num_heads))
        else:
            # The key is rotated back by its distance from the query.
            self.key = self.key._replace(bank=rotate_bank(self.key.bank, (cos, -sin), self.num_heads // self.groups))

    def remember(
        self, cache: Cache | None, layer_idx: int, dense_key: Tensor | None, dense_value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `AllPairs.remember`. Of each token its far key and value are remembered, and of the last few their inputs."""
        stored, _ = remember(cache, layer_idx, [dense_key, dense_value, self.far_key, self.far_value], [])
        dense_key, dense_value, self.far_key, self.far_value = (
            None if part is None else part[:, :, : self.layout.num_tokens] for part in stored
        )
        self.distance = self.layout.max_row_distance
        # The token itself is at distance 0, so D - 1 tokens before it are near.
        self.window = 0 if cache is None else max(self.distance - 1, 0)
        if self.distance == 0:
            return dense_key, dense_value
        turns = None
        if self.rotation is not None and cache is not None:
            turns = pack_rotation(self.rotation, self.far_query.shape[0])
        key, value, turns = remember_recent(cache, layer_idx, [*self._inputs(), turns], self.window)
        self._extend(key, value)
        if turns is not None and self.near_rotation is not None:
            self.near_rotation = tuple(part[:, None] for part in turns.chunk(2, dim=-1))
        return dense_key, dense_value

    def far(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `AllPairs.far`."""
        return self.far_query, self.far_key, self.far_value

    def scores(self) -> Tensor:
        """See `AllPairs.scores`."""
        scores = grouped_product(self.far_query, self.far_key.transpose(-1, -2))
        if self.distance == 0:
            return scores
        near_pairs = AllPairs(
            self.path,
            self.layout.near(self.window),
            self.num_heads,
            self.query,
            self.key,
            None,
            self.near_rotation,
            self.groups,
            self.norms,
        )
        near = near_pairs.scores()
        between = distances(self.layout, near.device)
        if near.shape != scores.shape or isinstance(self.layout, StepLayout):
            place = self.window + torch.arange(near.shape[2], device=near.device)[:, None] - between
            near = near.gather(-1, place.clamp(0, near.shape[-1] - 1).expand(*near.shape[:2], -1, -1))
        return torch.where((between >= 0) & (between < self.distance), near, scores.to(near.dtype))

    def values(self, weights: Tensor) -> Tensor:
        """See `AllPairs.values`."""
        between = distances(self.layout, weights.device)
        far = weights.masked_fill(between < self.distance, 0).to(self.far_value.dtype)
        output = merge_heads(grouped_product(far, self.far_value))
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
        return output + self._values(near, self.layout.near(self.window))


def pack_rotation(rotation: tuple[Tensor, Tensor], batch: int) -> Tensor:
    """Cosines and sines `[B or 1, 1, L, e]` as a cache keeps them of the last few tokens, `[B, L, 2·e]`."""
    return torch.cat(rotation, dim=-1)[:, 0].expand(batch, -1, -1)


def _far_heads(
    inputs: PairInputs | None,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    norm: nn.Module | None,
) -> Tensor | None:
    """The projection that a token has in all far pairs, by the last matrix of its bank, `[B, A, L, e]`."""
    if inputs is None:
        return None
    heads = split_heads(inputs.tokens if inputs.bank is None else inputs.by_row(-1), num_heads)
    if norm is not None and inputs.bank is not None:
        heads = norm(heads)
    return heads if rotation is None else rotate(heads, rotation).to(heads.dtype)


__all__ = ["AllPairs", "NearAndFarPairs", "PairInputs", "join_biases", "pack_rotation"]

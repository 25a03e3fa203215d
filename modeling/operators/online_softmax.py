"""A softmax that is finished before all scores are known (Milakov and Gimelshein 2018).

For each query the running maximum of the scores, the running sum of exponentials and the weighted sum of values are kept, and
rescaled when the maximum grows.

Legend: `B` batch, `L` tokens, `A` heads, `e` output size per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype


class OnlineSoftmax:
    """For each query: running maximum, running sum of exponentials, weighted sum of values; tokens first."""

    def __init__(self, query: Tensor, num_heads: int, features: int):
        wide = accumulation_dtype(query.dtype)
        shape = (query.shape[1], query.shape[0], num_heads)
        self.running_max = query.new_full(shape, torch.finfo(wide).min, dtype=wide)
        self.running_sum = query.new_zeros(shape, dtype=wide)
        self.output = query.new_zeros(*shape[:2], features, dtype=wide)

    def add(self, queries: slice, scores: Tensor, values: Tensor) -> None:
        """Adds pairs of one query and many keys, or of many queries with one key each.

        Args:
            scores: `[pairs, B, A]`.
            values: `[pairs or 1, B, A·e]`.
        """
        old, running_sum, output = (part[queries] for part in (self.running_max, self.running_sum, self.output))
        together = old.shape[0] < scores.shape[0]
        running_max = torch.maximum(old, scores.amax(0, keepdim=True) if together else scores)
        decay, weight = (old - running_max).exp(), (scores - running_max).exp()
        given = by_head(values, weight) * weight.unsqueeze(-1)
        if together:
            weight, given = weight.sum(0, keepdim=True), given.sum(0, keepdim=True)
        running_sum.mul_(decay).add_(weight)
        by_head(output, decay).mul_(decay.unsqueeze(-1)).add_(given)
        old.copy_(running_max)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The output, `[L, B, A·e]`, and the logarithm of the sum of exponentials, `[L, B, A]`."""
        by_head(self.output, self.running_sum).div_(self.running_sum.unsqueeze(-1))
        return self.output, self.running_sum.log_().add_(self.running_max)


def by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """`[…, A·e]` to `[…, A, e]`, with the heads of `[…, A]`."""
    return tokens.unflatten(-1, (like.shape[-1], -1))


__all__ = ["OnlineSoftmax", "by_head"]

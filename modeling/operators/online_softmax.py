"""A softmax that is finished before all scores are known (Milakov and Gimelshein 2018).

Of each receiver the greatest score so far, the sum of exponentials and the weighted sum of values are kept, and rescaled where a
greater score comes.

Legend: `B` batch, `L` tokens, `A` heads, `e` output size per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype


class OnlineSoftmax:
    """Per receiver: the greatest score so far, the sum of exponentials, the weighted sum of values; tokens first."""

    def __init__(self, query: Tensor, num_heads: int, features: int):
        wide = accumulation_dtype(query.dtype)
        shape = (query.shape[1], query.shape[0], num_heads)
        self.greatest = query.new_full(shape, torch.finfo(wide).min, dtype=wide)
        self.total = query.new_zeros(shape, dtype=wide)
        self.output = query.new_zeros(*shape[:2], features, dtype=wide)

    def start_far(self, output: Tensor, logsumexp: Tensor, distance: int) -> None:
        """Takes over a finished attention, `[B, A, L - D, e]`, of the tokens from `distance` on."""
        self.output[distance:] = output.permute(2, 0, 1, 3).flatten(2)
        self.greatest[distance:] = logsumexp.permute(2, 0, 1)
        self.total[distance:] = 1

    def add(self, receivers: slice, scores: Tensor, values: Tensor) -> None:
        """Adds pairs of one receiver and many givers, or of many receivers with one giver each.

        Args:
            scores: `[pairs, B, A]`.
            values: `[pairs or 1, B, A·e]`.
        """
        merge(tuple(part[receivers] for part in (self.greatest, self.total, self.output)), scores, values)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The output, `[L, B, A·e]`, and the logarithm of the sum of exponentials, `[L, B, A]`."""
        by_head(self.output, self.total).div_(self.total.unsqueeze(-1))
        return self.output, self.total.log_().add_(self.greatest)


def merge(parts: tuple[Tensor, Tensor, Tensor], scores: Tensor, values: Tensor) -> None:
    """Adds pairs to the softmax of their receivers, in place.

    Args:
        parts: greatest score so far and sum of exponentials, `[…, A]`, and the weighted sum of values, `[…, A·e]`.
        scores: `[…, A]`; of one receiver, `[1, …]`, there may be several.
        values: `[…, A·e]`, or one for all, `[1, …]`.
    """
    old, total, output = parts
    together = old.shape[0] < scores.shape[0]
    greatest = torch.maximum(old, scores.amax(0, keepdim=True) if together else scores)
    decay, weight = (old - greatest).exp(), (scores - greatest).exp()
    given = by_head(values, weight) * weight.unsqueeze(-1)
    if together:
        weight, given = weight.sum(0, keepdim=True), given.sum(0, keepdim=True)
    total.mul_(decay).add_(weight)
    by_head(output, decay).mul_(decay.unsqueeze(-1)).add_(given)
    old.copy_(greatest)


def by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """`[…, A·e]` to `[…, A, e]`, with the heads of `[…, A]`."""
    return tokens.unflatten(-1, (like.shape[-1], -1))


__all__ = ["OnlineSoftmax", "by_head", "merge"]

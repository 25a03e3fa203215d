"""Weights that are stored in fewer bits, as the operators take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as an ordinary tensor: itself, or what the integers of a quantised one stand for, in `dtype`.

    Operators here read the matrices of a bank in an order of their own, or rotate them first, which no quantised tensor
    takes part in. Such a tensor is of a class of its own, by any library, that knows how to undo it.
    """
    kind = type(weight)
    if kind in (Tensor, nn.Parameter) or kind.dequantize is Tensor.dequantize:
        return weight
    return weight.dequantize().to(dtype)


__all__ = ["dense"]

"""Floating point operations of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def forward_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Operations of matrix products and convolutions in a forward pass: a multiplication and an addition are two.

    The counter does not know every fused attention of PyTorch, which the math backend replaces.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()

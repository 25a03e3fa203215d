"""How far apart two results of the same matrix products may lie."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_in_rounding(
    actual: Tensor, expected: Tensor, roundings: float = 64, dtype: torch.dtype | None = None
) -> None:
    """Asserts that two tensors differ by no more than rounding.

    A matrix product is not a function of its inputs' values alone. Libraries choose a kernel, and with it the order of
    the sum, by the processor, by the number of threads, and by whether a matrix lies at a multiple of 64 bytes; weights
    that were read from a file lie elsewhere than those that were written. So the same weights and inputs may give
    logits that differ in their last bits. Weights, integers, masks and files have no such excuse: compare those with
    `torch.equal`.

    Args:
        actual (`torch.Tensor`): What was computed, of any shape and of a floating point dtype.
        expected (`torch.Tensor`): What it is compared with, of the same shape and dtype.
        roundings (`float`): The largest difference allowed, in units of the relative rounding error of `dtype` times the
            largest magnitude in `expected`. The default leaves a model of a few layers room for what the kernels of
            processors and addresses differ in, which is about 5; what is wrong is wrong by millions, in float64.
        dtype (`torch.dtype`, *optional*): The least precise dtype that the computation uses; by default that of the
            tensors.

    Raises:
        AssertionError: if shapes or dtypes differ, or an element differs by more, or is not finite.
    """
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach(), expected.detach()
    assert expected.isfinite().all(), "not all that is expected is finite"
    unit = torch.finfo(dtype or expected.dtype).eps * expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    # Not the other way round: nothing that is not a number passes.
    assert difference <= roundings * unit, (
        f"differs by {difference}, at most {roundings} roundings of {unit} are allowed"
    )

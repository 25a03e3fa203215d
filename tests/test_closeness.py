"""What other tests compare with: rounding passes, and nothing else does."""

import pytest
import torch
from closeness import assert_close_in_rounding


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1024.0])
def test_the_bound_is_in_roundings_of_the_largest_element(scale, dtype):
    expected = torch.tensor([scale, 0, -scale / 2], dtype=torch.float64).to(dtype)
    step = expected.abs().max() * torch.finfo(dtype).eps
    for roundings, few, many in ((64, 32, 128), (4, 2, 8)):
        assert_close_in_rounding(expected + few * step, expected, roundings)
        with pytest.raises(AssertionError, match=f"at most {roundings} roundings"):
            assert_close_in_rounding(expected + many * step, expected, roundings)
    # An element that is 0 differs by no more than the others may.
    assert_close_in_rounding(expected + torch.tensor([0, 2, 0], dtype=dtype) * step, expected)


def test_a_result_in_float32_that_was_rounded_to_bfloat16_on_the_way():
    expected = torch.randn(9)
    rounded = expected.bfloat16().float()
    assert_close_in_rounding(rounded, expected, 1, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_close_in_rounding(rounded, expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_fails(wrong):
    right = torch.ones(3)
    broken = torch.tensor([1.0, wrong, 1.0])
    for actual, expected in ((broken, right), (right, broken), (broken, broken)):
        with pytest.raises(AssertionError):
            assert_close_in_rounding(actual, expected)


@pytest.mark.parametrize("other", [torch.zeros(1, 3), torch.zeros(4), torch.zeros(3, dtype=torch.float64)], ids=str)
def test_shape_and_dtype_are_compared(other):
    with pytest.raises(AssertionError, match="instead of"):
        assert_close_in_rounding(other, torch.zeros(3))


def test_nothing_but_zero_is_close_to_zero():
    zero = torch.zeros(3)
    assert_close_in_rounding(zero, -zero)
    with pytest.raises(AssertionError):
        assert_close_in_rounding(zero + 1e-30, zero)
    assert_close_in_rounding(torch.empty(0, 3), torch.empty(0, 3))

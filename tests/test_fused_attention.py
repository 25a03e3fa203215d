"""Which of PyTorch's fused attentions serves, and what is handed to those of CUDA.

No test calls those: in their place is the one of the CPU, behind checks of what they ask for. PyTorch says itself, from the shapes of
the arguments, whether an operator takes them and what shapes it gives.
"""

import math

import pytest
import torch
from small_layers import relative_error

from translution.modeling.operators import fused_attention
from translution.modeling.operators.fused_attention import (
    _CPU,
    _EFFICIENT,
    _FLASH,
    attention,
    attention_backward,
    fused,
)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHOICES = {
    "cpu": ((CPU, DOUBLE, 64, True), None, _CPU),
    "half": ((CUDA, HALF, 64), 8, _FLASH),
    "bfloat16": ((CUDA, BFLOAT, 64), 9, _FLASH),
    "half-biased": ((CUDA, HALF, 64, True), 9, _EFFICIENT),
    "half-wide": ((CUDA, HALF, 257), 9, _EFFICIENT),
    "half-older": ((CUDA, HALF, 64), 7, _EFFICIENT),
    "single": ((CUDA, SINGLE, 64), 9, _EFFICIENT),
    "double": ((CUDA, DOUBLE, 64), 9, None),
    "bfloat16-older": ((CUDA, BFLOAT, 64), 7, None),
    "half-oldest": ((CUDA, HALF, 64), 6, None),
    "other": ((torch.device("mps"), SINGLE, 64), None, None),
}


@pytest.fixture
def nvidia(monkeypatch):
    """A machine that seems to have a GPU, of the capability that a test may set."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize("case", CHOICES)
def test_what_serves(case, nvidia):
    wanted, capability, expected = CHOICES[case]
    nvidia.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert fused(*wanted) is expected


def test_what_serves_without_flash_attention_and_on_rocm(nvidia):
    nvidia.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert fused(CUDA, HALF, 64) is _EFFICIENT
    nvidia.setattr(torch.version, "hip", "6.4")
    assert fused(CUDA, HALF, 64) is None


class StandIn:
    """Takes the place of an operator: asks PyTorch for the shapes it gives, and computes what has them."""

    def __init__(self, name, compute):
        self.operator, self.compute, self.calls = getattr(torch.ops.aten, name).default, compute, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        shapes = self.operator(*map(without_values, args), **kwargs)
        found = self.compute(*args, **kwargs)
        for one, expected in zip(found, shapes, strict=False):
            assert one.shape == expected.shape
        return (*found, *shapes[len(found) :])


def without_values(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")


def check_heads(query, key, value):
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1


def check_bias(bias, query, key):
    if bias is None:
        return
    assert bias.shape == (*query.shape[:3], key.shape[2])
    assert bias.dtype == query.dtype
    assert bias.stride(-1) == 1
    assert bias.stride(-2) % 8 == 0
    # Finite after it is multiplied by log2(e).
    assert (bias * math.log2(math.e)).isfinite().all()


def copies(key, query):
    """Keys or values with as many heads as queries have."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def flash(query, key, value, dropout, causal, scale):
    check_heads(query, key, value)
    assert dropout == 0
    return _CPU.forward(query, copies(key, query), copies(value, query), scale, causal, None)


def flash_backward(
    gradient,
    query,
    key,
    value,
    output,
    logsumexp,
    _,
    __,
    most_queries,
    most_keys,
    dropout,
    causal,
    state,
    unused,
    scale,
):
    check_heads(query, key, value)
    check_heads(gradient, output, output)
    assert (dropout, most_queries, most_keys) == (0, query.shape[2], key.shape[2])
    assert logsumexp.is_contiguous()
    inputs = (gradient, query, copies(key, query), copies(value, query), output, logsumexp)
    own, *others = _CPU.backward(*inputs, scale, causal, None)
    return own, *(part.unflatten(1, (key.shape[1], -1)).sum(2) for part in others)


def efficient(query, key, value, bias, wants_logsumexp, dropout, causal, scale):
    check_heads(query, key, value)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    check_bias(bias, query, key)
    assert wants_logsumexp
    assert dropout == 0
    output, logsumexp = _CPU.forward(query, key, value, scale, causal, bias)
    return output, torch.nn.functional.pad(logsumexp, (0, -query.shape[2] % 32), value=math.inf)


def efficient_backward(
    gradient, query, key, value, bias, output, logsumexp, seed, offset, dropout, needed, causal, scale
):
    check_heads(query, key, value)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    check_heads(gradient, output, output)
    check_bias(bias, query, key)
    assert dropout == 0
    assert needed == [True, True, True, False]
    queries = query.shape[2]
    assert logsumexp.is_contiguous()
    assert logsumexp.shape[2] % 32 == 0
    assert (logsumexp[:, :, queries:] == math.inf).all()
    return _CPU.backward(gradient, query, key, value, output, logsumexp[:, :, :queries], scale, causal, bias)


OPERATORS = {
    "flash": (_FLASH, flash, flash_backward),
    "efficient": (_EFFICIENT, efficient, efficient_backward),
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("features", [(8, 8), (3, 5), (16, 9)], ids=str)
@pytest.mark.parametrize(
    ("name", "causal", "biased"),
    [("flash", False, False), ("flash", True, False), ("efficient", False, True), ("efficient", True, False)],
)
def test_cudas_attention_equals_plain_products(name, causal, biased, features, groups, monkeypatch):
    operator, forward, backward = OPERATORS[name]
    stand_ins = [
        StandIn(f"_scaled_dot_product_{name}_attention{suffix}", compute)
        for suffix, compute in (("", forward), ("_backward", backward))
    ]
    for suffix, stand_in in zip(("", "_backward"), stand_ins, strict=True):
        monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention{suffix}", stand_in)
    queries, keys = (7, 7) if causal else (7, 10)
    # As heads lie beside each other in what is projected.
    query = torch.randn(2, queries, 3 * groups, features[0]).transpose(1, 2)
    key, value = (torch.randn(2, keys, 3, size).transpose(1, 2) for size in features)
    gradient, output = torch.randn(2, 2, 3 * groups, queries, features[1])
    bias = torch.randn(2, 1, queries, keys) if biased else None
    if biased:
        bias[0, :, :, 2] = torch.finfo(bias.dtype).min
    found = []
    for served in (operator, None):
        monkeypatch.setattr(fused_attention, "fused", lambda *given, served=served: served)
        attended, logsumexp = attention(query, key, value, 0.6, causal, bias)
        # As if there were other keys with a little weight.
        whole = found[0][1] + 0.3 if found else logsumexp + 0.3
        gradients = attention_backward(gradient, query, key, value, output, whole, 0.6, causal, bias)
        found.append((attended, logsumexp, *gradients))
    # Efficient attention wants as many keys as queries.
    calls = groups if name == "efficient" else 1
    assert [stand_in.calls for stand_in in stand_ins] == [calls, calls]
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        # Sums of ten products in another order.
        assert relative_error(one, other) < 64 * torch.finfo(one.dtype).eps


WAYS = {"fused": _CPU, "by-member": _CPU._replace(takes_groups=False), "plain": None}


@pytest.mark.parametrize("mask", ["none", "causal", "bias", "bias-of-heads"])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_heads_that_share_keys(way, groups, mask, monkeypatch):
    """Each way without copies of keys and values equals plain products with them, whose gradients are summed."""
    monkeypatch.setattr(fused_attention, "SCORES_ELEMENTS", 200)
    queries, keys = (7, 7) if mask == "causal" else (7, 10)
    query = torch.randn(2, queries, 2 * groups, 3, dtype=DOUBLE).transpose(1, 2)
    key, value = (torch.randn(2, keys, 2, size, dtype=DOUBLE).transpose(1, 2) for size in (3, 5))
    gradient, output = torch.randn(2, 2, 2 * groups, queries, 5, dtype=DOUBLE)
    bias = None
    if mask.startswith("bias"):
        bias = torch.randn(1, 2 * groups if mask == "bias-of-heads" else 1, queries, keys, dtype=DOUBLE)
        bias[..., 2] = torch.finfo(DOUBLE).min
    found = []
    for served, inputs in ((WAYS[way], (key, value)), (None, (copies(key, query), copies(value, query)))):
        monkeypatch.setattr(fused_attention, "fused", lambda *given, served=served: served)
        attended, logsumexp = attention(query, *inputs, 0.6, mask == "causal", bias)
        # As if there were other keys with a little weight.
        whole = found[0][1] + 0.3 if found else logsumexp + 0.3
        gradients = attention_backward(gradient, query, *inputs, output, whole, 0.6, mask == "causal", bias)
        found.append([attended, logsumexp, *gradients])
    found[1][3:] = (part.unflatten(1, (2, groups)).sum(2) for part in found[1][3:])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        # Sums of ten products for each of three heads, in another order.
        assert relative_error(one, other) < 64 * torch.finfo(DOUBLE).eps


def test_a_query_whose_far_keys_are_hidden_has_no_weight_there(monkeypatch):
    """Efficient attention is given a bias that is not quite the lowest number."""
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient)
    monkeypatch.setattr(fused_attention, "fused", lambda *given: _EFFICIENT)
    query, key, value = torch.randn(3, 1, 1, 4, 8)
    bias = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)
    output, logsumexp = attention(query, key, value, 0.6, False, bias)
    assert output.isfinite().all()
    assert (logsumexp < -1e30).all()
    assert logsumexp.isfinite().all()
    assert not logsumexp.exp().any()

"""Attention in one pass, with online softmax, against the readable reference."""

import pytest
import torch
from layouts import every_layout
from small_layers import BATCH, HEADS, HIDDEN, SUBSETS, LargestTensor, make_mixer, relative_error, run

from translution.modeling.mixers.masks import AttentionMask
from translution.modeling.operators import (
    dispatch,
    offset_blocks,
    pair_autograd,
    pair_layout,
    reference,
    registration,
    streamed,
)
from translution.modeling.operators.pair_layout import PairLayout


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def all_pairs_alike(monkeypatch):
    """Near and far pairs computed apart are tested in `test_local.py`."""
    monkeypatch.setattr(dispatch, "LOCAL", False)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls, so that a test knows that the path ran."""
    calls = []

    def count(*args):
        calls.append(args)
        return forward(*args)

    forward = streamed._forward
    monkeypatch.setattr(streamed, "_forward", count)
    return calls


def compare(mixer, layout, tolerance=1e-10):
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, None, weight)
    actual = run(mixer, "auto", hidden_states, layout, None, weight)
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name].norm() < 1e-12:  # one token: its probability is 1, and the scores' gradients are rounding
            assert actual[name].norm() < 1e-12, name
        else:
            assert relative_error(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("subset", SUBSETS)
@every_layout
def test_equals_reference(layout, subset, calls):
    compare(make_mixer(layout, subset), layout)
    assert bool(calls) == (layout.past == 0 and not (layout.causal and layout.has_far_pairs))


@pytest.mark.parametrize("subset", ["qkv", "kv", "v"])
@pytest.mark.parametrize("distance", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 23])
def test_text_with_a_distance(length, distance, subset, calls):
    layout = PairLayout.for_text(length, 64, distance)
    compare(make_mixer(layout, subset), layout)
    # Far pairs are one product of their own, beside the square of near ones.
    assert bool(calls) == (length <= distance)


@pytest.mark.parametrize(
    "layout",
    [PairLayout.for_image(4, 3, 4, 3), PairLayout.for_image(5, 4, 5, 4, 1), PairLayout.for_text(11, 11)],
    ids=["image", "image-distance", "text"],
)
@pytest.mark.parametrize("elements", [1, 40, 1 << 20])
def test_sizes_of_groups_and_workspace_change_nothing(elements, layout, monkeypatch, calls):
    monkeypatch.setattr(streamed, "GROUP_ELEMENTS", elements)
    monkeypatch.setattr(offset_blocks, "WORKSPACE_ELEMENTS", elements)
    compare(make_mixer(layout, "qkv"), layout)
    assert calls


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "square"])
@pytest.mark.parametrize("size", [(6, 5), (2, 7), (7, 2), (1, 6), (4, 4)])
@pytest.mark.parametrize("distance", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("subset", ["qkv", "qk", "v"])
def test_image_with_a_distance(subset, distance, size, stream, calls, monkeypatch):
    monkeypatch.setattr(dispatch, "STREAM", stream)
    layout = PairLayout.for_image(*size, *size, distance)
    compare(make_mixer(layout, subset), layout)
    assert bool(calls) == stream


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "square"])
def test_a_geometry_forgotten_in_between_changes_nothing(stream, calls, monkeypatch):
    """What is known of a geometry is kept in several places, and none of them may rely on another."""
    monkeypatch.setattr(dispatch, "STREAM", stream)
    layout = PairLayout.for_image(5, 6, 5, 6, 2)
    mixer = make_mixer(layout, "qkv")
    compare(mixer, layout)
    for forget in (pair_layout._column_shifts, offset_blocks._blocks):
        forget.cache_clear()
        compare(mixer, layout)


@pytest.mark.parametrize("need", ["hidden_states", "bank"])
def test_image_with_a_distance_and_gradients_of_one_input(need, calls):
    layout = PairLayout.for_image(5, 6, 5, 6, 2)
    mixer = make_mixer(layout, "qkv")
    hidden_states = torch.randn(BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    gradients = {}
    for implementation in ("eager", "auto"):
        mixer.config._attn_implementation = implementation
        inputs = hidden_states.clone().requires_grad_(need == "hidden_states")
        mixer.requires_grad_(False)
        mixer.k_bank.requires_grad_(need == "bank")
        output = mixer(inputs, layout)[0].pow(2).sum()
        gradients[implementation] = torch.autograd.grad(output, mixer.k_bank if need == "bank" else inputs)[0]
    assert calls
    assert relative_error(gradients["auto"], gradients["eager"]) < 1e-10


def test_switched_off_the_square_runs(monkeypatch, calls):
    monkeypatch.setattr(dispatch, "STREAM", False)
    compare(make_mixer(PairLayout.for_text(9, 9), "qkv"), PairLayout.for_text(9, 9))
    compare(make_mixer(PairLayout.for_text(9, 9, 3), "kv"), PairLayout.for_text(9, 9, 3))
    compare(make_mixer(PairLayout.for_image(3, 4, 3, 4), "kv"), PairLayout.for_image(3, 4, 3, 4))
    assert not calls


def test_a_mask_dropout_and_low_rank_take_the_square(calls):
    layout = PairLayout.for_text(5, 5)
    hidden_states = torch.randn(BATCH, 5, HIDDEN, dtype=torch.float64)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e300)
    mixer = make_mixer(layout, "kv")
    mixer(hidden_states, layout, AttentionMask(mask))
    assert not calls
    mixer.attention_dropout = 0.5
    mixer.train()(hidden_states, layout)
    assert not calls
    mixer.eval()(hidden_states, layout)
    assert calls
    calls.clear()
    make_mixer(layout, "kv", rank=2)(hidden_states, layout)
    assert not calls


@pytest.mark.parametrize("subset", ["qkv", "kv", "qv"])
@pytest.mark.parametrize(
    "layout", [PairLayout.for_image(2, 3, 2, 3), PairLayout.for_text(5, 5, 5)], ids=["image", "text"]
)
def test_gradcheck(layout, subset, calls):
    mixer = make_mixer(layout, subset)
    names = [f"{letter}_bank" for letter in subset]
    plain = {name: parameter for name, parameter in mixer.named_parameters() if name not in names}

    def run_with(tokens, *banks):
        parameters = {**plain, **dict(zip(names, banks, strict=True))}
        return torch.func.functional_call(mixer, parameters, (tokens, layout))[0]

    tokens = torch.randn(2, layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    banks = [getattr(mixer, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run_with, (tokens, *banks), fast_mode=True)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout",
    [PairLayout.for_image(4, 3, 4, 3), PairLayout.for_image(4, 6, 4, 6, 2), PairLayout.for_text(19, 19)],
    ids=["image", "image-distance", "text"],
)
def test_lower_precision_is_as_good_as_the_reference(layout, dtype, calls):
    """The backward pass takes weights from the log-sum-exp, which costs a few roundings where scores are not small.

    A score `s` is known to `|s|` roundings, and so is the weight `exp(s - log-sum-exp)`, relative to itself. Sums are made in single
    precision at least, which is as coarse as the results in single precision alone.
    """
    mixer = make_mixer(layout, "qkv")
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    roundings = 1
    if dtype == torch.float32:
        scores = reference.pair_scores(hidden_states, hidden_states, mixer.q_bank, mixer.k_bank, HEADS, layout)
        roundings = (scores * mixer.scaling).abs().max().item()
    truth = run(mixer, "eager", hidden_states, layout, None, weight)
    mixer.to(dtype)
    expected = run(mixer, "eager", hidden_states.to(dtype), layout, None, weight)
    actual = run(mixer, "auto", hidden_states.to(dtype), layout, None, weight)
    assert calls
    for name in truth:
        assert actual[name].dtype == expected[name].dtype
        error = relative_error(actual[name], truth[name])
        allowed = 2 * relative_error(expected[name], truth[name]) + roundings * torch.finfo(dtype).eps
        assert error < allowed, name


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_scores_far_from_zero(extreme, calls):
    """The largest score may be in any group; what was summed before must be rescaled, and must never overflow."""
    layout = PairLayout.for_text(12, 12)
    mixer = make_mixer(layout, "kv")
    with torch.no_grad():
        mixer.k_bank *= torch.linspace(0, extreme, 12, dtype=torch.float64).view(-1, 1, 1)
    hidden_states = torch.randn(BATCH, 12, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, None, torch.ones(()))["output"]
    for elements in (1, 1 << 20):
        streamed.GROUP_ELEMENTS, before = elements, streamed.GROUP_ELEMENTS
        actual = run(mixer, "auto", hidden_states, layout, None, torch.ones(()))["output"]
        streamed.GROUP_ELEMENTS = before
        assert relative_error(actual, expected) < 1e-10
    assert calls


@pytest.mark.parametrize(
    "layout", [PairLayout.for_text(600, 600), PairLayout.for_image(20, 20, 20, 20, 2)], ids=["text", "image"]
)
def test_nothing_as_large_as_the_square(layout, monkeypatch, calls):
    monkeypatch.setattr(offset_blocks, "WORKSPACE_ELEMENTS", 1 << 9)
    monkeypatch.setattr(streamed, "GROUP_ELEMENTS", 1 << 9)
    length = layout.num_tokens
    mixer = make_mixer(layout, "kv").float()
    hidden_states = torch.randn(1, length, HIDDEN, requires_grad=True)
    largest = LargestTensor()
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(streamed, name, largest.inside(getattr(streamed, name)))
    mixer(hidden_states, layout)[0].sum().backward()
    assert calls
    # Twenty elements a token, or a bank.
    most = max(20 * length, mixer.k_bank.numel())
    assert 2 * length < largest.numel <= most < length**2 / 10


def test_the_operator_is_one_that_pytorch_knows():
    layout = PairLayout.for_image(2, 3, 2, 3)
    tokens = torch.randn(2, 7, 4, requires_grad=True)
    bank = torch.randn(layout.num_offsets, 4, 6, requires_grad=True)
    arguments = (tokens, tokens, tokens, bank, bank, bank, 2, 0.5, pair_autograd.pack(layout))
    torch.library.opcheck(registration.operator("streamed_attention").default, arguments)

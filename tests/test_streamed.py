"""Attention in one pass, with online softmax and far pairs merged in, against the readable reference."""

import pytest
import torch
from test_operators import BATCH, HIDDEN, SUBSETS, LargestTensor, make_mixer, relative_error, run
from test_pair_layout import every_layout

from translution.modeling import pair_runs, streamed_attention
from translution.modeling.pair_layout import PairLayout


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def streamed(monkeypatch):
    """Counts the calls, so that a test knows that the path ran."""
    calls = []

    def count(*args):
        calls.append(args)
        return forward(*args)

    forward = streamed_attention._forward
    monkeypatch.setattr(streamed_attention, "SQUARE_ELEMENTS", 0)
    monkeypatch.setattr(streamed_attention, "_forward", count)
    return calls


def compare(mixer, layout, tolerance=1e-10):
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, None, weight)
    actual = run(mixer, "grouped", hidden_states, layout, None, weight)
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name].norm() < 1e-12:  # one token: its probability is 1, and the scores' gradients are rounding
            assert actual[name].norm() < 1e-12, name
        else:
            assert relative_error(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("subset", SUBSETS)
@every_layout
def test_equals_reference(layout, subset, streamed):
    compare(make_mixer(layout, subset), layout)
    assert bool(streamed) == (layout.past == 0)


@pytest.mark.parametrize("subset", ["qkv", "kv", "v"])
@pytest.mark.parametrize("distance", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 23])
def test_text_with_a_distance(length, distance, subset, streamed):
    layout = PairLayout.for_text(length, 64, distance)
    compare(make_mixer(layout, subset), layout)
    assert streamed


@pytest.mark.parametrize(
    "layout", [PairLayout.for_image(4, 3, 4, 3), PairLayout.for_text(11, 11)], ids=["image", "text"]
)
@pytest.mark.parametrize("elements", [1, 40, 1 << 20])
def test_sizes_of_groups_and_workspace_change_nothing(elements, layout, monkeypatch, streamed):
    monkeypatch.setattr(streamed_attention, "GROUP_ELEMENTS", elements)
    monkeypatch.setattr(pair_runs, "WORKSPACE_ELEMENTS", elements)
    compare(make_mixer(layout, "qkv"), layout)
    assert streamed

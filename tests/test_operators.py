"""The grouped operators and the readable reference against each other, brute force, `gradcheck` and identities."""

import itertools

import pytest
import torch
from closeness import assert_close_in_rounding
from layouts import LAYOUTS, every_layout, expected_rows, layout_id
from small_layers import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    SUBSETS,
    LargestTensor,
    assert_precise,
    make_mask,
    make_mixer,
    relative_error,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

from translution.modeling.mixers.masks import AttentionMask
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators import dispatch, grouped, offset_blocks, reference, registration
from translution.modeling.operators.pair_autograd import register_pair_operators
from translution.modeling.operators.pair_layout import PairLayout


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def square_of_scores(monkeypatch):
    """Others would do without it: those are tested in `test_streamed.py` and `test_local.py`."""
    monkeypatch.setattr(dispatch, "STREAM", False)
    monkeypatch.setattr(dispatch, "LOCAL", False)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "lor3"])
@pytest.mark.parametrize("subset", SUBSETS)
@every_layout
def test_grouped_equals_reference(layout, subset, rank, masked):
    mixer, mask = make_mixer(layout, subset, rank), make_mask(layout, masked)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    actual = run(mixer, "auto", hidden_states, layout, mask, weight)
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name].norm() < 1e-12:  # one token: its probability is 1, and the scores' gradients are rounding
            assert actual[name].norm() < 1e-12, name
        else:
            assert relative_error(actual[name], expected[name]) < 1e-10, name


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize("subset", ["qkv", "v"])
def test_text_of_every_length_up_to_the_bank(length, subset):
    layout = PairLayout.for_text(length, 7)
    mixer, mask = make_mixer(layout, subset), make_mask(layout, False)
    hidden_states, weight = torch.randn(2, BATCH, length, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    actual = run(mixer, "auto", hidden_states, layout, mask, weight)
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= 1e-10 * expected[name].norm() + 1e-14, name


def by_the_formulas(mixer: TranslutionMixer, tokens: torch.Tensor, layout: PairLayout) -> torch.Tensor:
    """One sequence `[L, C]` through the mixer, pair by pair and head by head."""
    length, low_rank = len(tokens), mixer.low_rank
    parameters = dict(mixer.named_parameters())

    def plain(name, x):
        return parameters[f"{name}.weight"] @ x

    def projected(name, x, row):
        source = plain(f"{name}_down", x) if low_rank else x
        if f"{name}_bank" in parameters:
            return source @ parameters[f"{name}_bank"][row]
        return source if low_rank else plain(f"{name}_proj", x)

    outputs = []
    for i in range(length):
        keys = [j for j in range(length) if expected_rows(layout, i, j)[0] >= 0]
        merged = []
        for head in range(HEADS):
            scores, values, relative_values = [], [], []
            for j in keys:
                row, reverse = expected_rows(layout, i, j)
                score = 0
                part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                if low_rank or not mixer.scores_are_relative:
                    score = plain("q_proj", tokens[i])[part] @ plain("k_proj", tokens[j])[part]
                if mixer.scores_are_relative:
                    query, key = projected("q", tokens[i], reverse), projected("k", tokens[j], row)
                    size = len(query) // HEADS
                    relative_part = slice(head * size, (head + 1) * size)
                    product = query[relative_part] @ key[relative_part]
                    score = (score + product) / 2 if low_rank else product
                scores.append(score * HEAD_DIM**-0.5)
                if low_rank:
                    values.append(plain("v_proj", tokens[j])[part])
                    if "v" in mixer.relative:
                        value = projected("v", tokens[j], row)
                        relative_values.append(value[head * len(value) // HEADS : (head + 1) * len(value) // HEADS])
                else:
                    values.append(projected("v", tokens[j], row)[part])
            weights = torch.stack(scores).softmax(0)
            mean = weights @ torch.stack(values)
            merged.append((mean, weights @ torch.stack(relative_values) if relative_values else None))
        output = torch.cat([mean for mean, _ in merged])
        if low_rank and "v" in mixer.relative:
            output = (output + mixer.v_up.weight @ torch.cat([relative for _, relative in merged])) / 2
        outputs.append(mixer.o_proj(output))
    return torch.stack(outputs)


@pytest.mark.parametrize("rank", [None, 3], ids=["full", "lor3"])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5], LAYOUTS[8], LAYOUTS[10]], ids=layout_id)
def test_both_equal_the_formulas(layout, subset, rank):
    mixer, mask = make_mixer(layout, subset, rank), make_mask(layout, False)
    hidden_states = torch.randn(BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    for implementation in ("eager", "auto"):
        mixer.config._attn_implementation = implementation
        with torch.no_grad():
            output, _ = mixer(hidden_states, layout, AttentionMask(mask))
            assert relative_error(output[1], by_the_formulas(mixer, hidden_states[1], layout)) < 1e-12


SMALL_LAYOUTS = [
    PairLayout.for_image(1, 3, 1, 3),
    PairLayout.for_image(2, 2, 3, 2),
    PairLayout.for_image(2, 3, 2, 3, max_relative_distance=1),
    PairLayout.for_text(4, 5),
    PairLayout.for_text(5, 3, max_relative_distance=2),
]


@pytest.mark.parametrize("layout", SMALL_LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("banks", list(itertools.product([True, False], repeat=2)), ids=["qk", "q", "k", "plain"])
def test_gradcheck_scores(layout, banks):
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    query_bank, key_bank = (tensor(layout.num_offsets, 3, 4) if bank else None for bank in banks)
    query, key = (tensor(2, layout.num_tokens, 3 if bank else 4) for bank in banks)
    for operators in (grouped, reference):
        assert torch.autograd.gradcheck(
            lambda *inputs, o=operators: o.pair_scores(*inputs, 2, layout), (query, key, query_bank, key_bank)
        )


@pytest.mark.parametrize("layout", SMALL_LAYOUTS, ids=layout_id)
def test_gradcheck_values(layout):
    tokens = layout.num_tokens
    probabilities = torch.rand(2, 2, tokens, tokens, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(layout.num_offsets, 3, 4, dtype=torch.float64, requires_grad=True)
    for operators in (grouped, reference):
        assert torch.autograd.gradcheck(
            lambda *inputs, o=operators: o.pair_values(*inputs, layout), (probabilities, value, bank)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "lor3"])
@pytest.mark.parametrize("subset", ["qkv", "kv", "q"])
@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[5], LAYOUTS[9], LAYOUTS[10]], ids=layout_id)
def test_lower_precision_within_twice_the_reference(layout, subset, rank, dtype):
    assert_precise(make_mixer(layout, subset, rank), layout, make_mask(layout, True), dtype)


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[9]], ids=layout_id)
def test_equal_matrices_are_self_attention(layout):
    mixer, mask = make_mixer(layout, "qkv"), make_mask(layout, False)
    hidden_states = torch.randn(BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    query, key, value = torch.randn(3, HIDDEN, HEADS * HEAD_DIM, dtype=torch.float64)
    with torch.no_grad():
        for name, matrix in (("q", query), ("k", key), ("v", value)):
            getattr(mixer, f"{name}_bank").copy_(matrix)
        heads = [(hidden_states @ m).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        expected = mixer.o_proj(expected.transpose(1, 2).flatten(2))
        output, _ = mixer(hidden_states, layout, AttentionMask(mask))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_no_tensor_per_pair(monkeypatch):
    monkeypatch.setattr(offset_blocks, "WORKSPACE_ELEMENTS", 1 << 10)
    batch, heads, features = 4, 2, 16
    layout = PairLayout.for_image(9, 8, 9, 8)
    tokens = layout.num_tokens
    query, key = (torch.randn(batch, tokens, features) for _ in range(2))
    query_bank, key_bank = (torch.randn(layout.num_offsets, features, features) for _ in range(2))
    per_pair = batch * tokens * tokens * features
    bound = max(query_bank.numel(), (tokens * tokens + 1) * batch * heads)
    assert bound < per_pair / 4
    gradient = torch.randn(batch, heads, tokens, tokens)
    with LargestTensor() as largest:
        grouped._scores(query, key, query_bank, key_bank, heads, layout)
        grouped._scores_backward(gradient, query, key, query_bank, key_bank, layout, True, True)
        grouped._values(gradient, key, key_bank, layout)
    assert largest.numel <= bound


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("distance", [None, 1])
@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"offset_basis": 2}], ids=["full", "LoR", "basis"])
def test_an_empty_batch(fields, distance, threads):
    torch.set_num_threads(threads)
    for layout in (PairLayout.for_image(4, 5, 4, 5, distance), PairLayout.for_text(9, 9, distance)):
        mixer = make_mixer(layout, "kv", **fields)
        hidden_states = torch.randn(0, layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
        output = mixer(hidden_states, layout)[0]
        output.sum().backward()
        assert output.shape == hidden_states.grad.shape == hidden_states.shape
        assert all(not parameter.grad.any() for parameter in mixer.parameters())


def test_backward_keeps_no_projection():
    layout = PairLayout.for_image(5, 4, 5, 4)
    mixer = make_mixer(layout, "qkv")
    hidden_states = torch.randn(8, layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    mixer.config._attn_implementation = "auto"
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        mixer(hidden_states, layout)
    assert max(sizes) <= max(mixer.q_bank.numel(), 8 * HEADS * layout.num_tokens**2)
    assert max(sizes) < 8 * layout.num_tokens**2 * HEADS * HEAD_DIM


@pytest.mark.parametrize("elements", [1, 64, 1 << 20])
def test_workspace_size_changes_nothing(elements, monkeypatch):
    layout = PairLayout.for_image(4, 3, 4, 3)
    mixer = make_mixer(layout, "qkv")
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, None, weight)
    monkeypatch.setattr(offset_blocks, "WORKSPACE_ELEMENTS", elements)
    actual = run(mixer, "auto", hidden_states, layout, None, weight)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


def test_autocast_computes_in_its_dtype_and_returns_parameter_gradients_in_theirs():
    layout = PairLayout.for_image(3, 4, 3, 4)
    for subset, rank in (("qkv", None), ("kv", 3)):
        mixer = make_mixer(layout, subset, rank).float()
        hidden_states = torch.randn(BATCH, layout.num_tokens, HIDDEN, requires_grad=True)
        truth = mixer(hidden_states, layout)[0]
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = mixer(hidden_states, layout)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, truth) < 0.03
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("need", ["query", "key", "query_bank", "key_bank"])
def test_gradient_of_one_input_alone(need):
    layout = PairLayout.for_text(5, 5)
    inputs = {
        "query": torch.randn(2, 5, 3, dtype=torch.float64),
        "key": torch.randn(2, 5, 3, dtype=torch.float64),
        "query_bank": torch.randn(5, 3, 4, dtype=torch.float64),
        "key_bank": torch.randn(5, 3, 4, dtype=torch.float64),
    }
    inputs[need].requires_grad_()
    gradients = []
    for operators in (reference, grouped):
        scores = operators.pair_scores(**inputs, num_heads=2, layout=layout)
        gradients.append(torch.autograd.grad(scores.square().sum(), inputs[need])[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_second_copy_of_the_code_leaves_the_operators_of_the_first():
    """A checkpoint that carries the code brings one: registering again would destroy what the first copy holds."""
    layout = PairLayout.for_text(3, 3)
    query, key = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    bank = torch.randn(3, 4, 4, dtype=torch.float64)
    first = grouped.pair_scores
    held = registration.operator("pair_scores").default
    expected = first(query, key, None, bank, 2, layout)
    second, _ = register_pair_operators("", None, None, None)
    assert registration.operator("pair_scores").default is held
    assert_close_in_rounding(first(query, key, None, bank, 2, layout), expected)
    assert_close_in_rounding(second(query, key, None, bank, 2, layout), expected)


class Called(TorchDispatchMode):
    """Notes the names of PyTorch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_that_overlap_are_taken_by_one_call_on_a_cpu_alone(device):
    """A GPU computes the tensors of such a list at once: of rows that overlap it keeps what was written last."""
    rows = torch.zeros(5, 2, device=device)
    targets, parts = [rows[:3], rows[1:4]], [torch.ones(3, 2, device=device) for _ in range(2)]
    with Called() as called:
        offset_blocks.add_each(targets, parts)
        offset_blocks.add_weighted_each(targets, parts, parts)
        offset_blocks.maximum_each(targets, parts)
    assert any(name.startswith("_foreach") for name in called.names) == (device == "cpu")
    if device == "cpu":
        assert rows[:, 0].tolist() == [2, 4, 4, 2, 0]

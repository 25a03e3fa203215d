"""Pairs a chunk of offsets at a time against the readable reference: operators, layers, PyTorch's grouped product, memory."""

import itertools
from collections import Counter

import pytest
import torch
from layouts import LAYOUTS, layout_id
from small_layers import (
    BATCH,
    HIDDEN,
    SUBSETS,
    LargestTensor,
    assert_precise,
    assert_same,
    make_mask,
    make_mixer,
    relative_error,
    run,
)

from translution.modeling.operators import dispatch, grouped_gemm, reference
from translution.modeling.operators.pair_layout import PairLayout


pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS, SIZE, INPUT = 4, 3, 5
# Texts of which a chunk takes several distances, and whose first tokens are keys alone.
TEXTS = [
    PairLayout.for_text(30, 30),
    PairLayout.for_text(9, 9, past=3),
    PairLayout.for_text(40, 40, past=20),
    PairLayout.for_text(40, 9, 8, past=5, band=8),
    PairLayout.for_text(20, 4, 3),
]
EVERY = [*LAYOUTS, *TEXTS]
CHOSEN = [LAYOUTS[place] for place in (2, 11, 9, 10)]


def case_id(value):
    if isinstance(value, PairLayout):
        return f"{layout_id(value)}-past{value.past}" if value.past else layout_id(value)
    return str(value)


@pytest.fixture
def on_this_device(monkeypatch):
    """The path of GPUs, for layers on a CPU."""
    monkeypatch.setattr(dispatch, "GEMM_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "LOCAL", False)


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def scores_inputs(layout, banks, groups, size=SIZE, inputs=INPUT):
    """Query, key and their banks; `groups` heads of queries share one of keys."""
    widths = HEADS * size, HEADS // groups * size
    tokens = layout.num_queries, layout.num_tokens
    query, key = (
        tensor(BATCH, count, inputs if bank else width)
        for count, bank, width in zip(tokens, banks, widths, strict=True)
    )
    return (
        query,
        key,
        *(
            tensor(layout.num_offsets, inputs, width) if bank else None
            for bank, width in zip(banks, widths, strict=True)
        ),
    )


def outcome(function, inputs):
    """Output, and the gradients of its sum with random weights, the same in every call."""
    output = function(*inputs)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]
    return output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves)


def errors(function, expected, inputs):
    pairs = zip(outcome(function, inputs), outcome(expected, inputs), strict=True)
    return [relative_error(actual, truth) for actual, truth in pairs]


@pytest.mark.parametrize("chunk_bytes", [3000, grouped_gemm.CHUNK_BYTES])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", EVERY, ids=case_id)
def test_operators_equal_the_reference(layout, groups, chunk_bytes, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "CHUNK_BYTES", chunk_bytes)
    for banks in itertools.product([True, False], repeat=2):
        inputs = (*scores_inputs(layout, banks, groups), HEADS, layout)
        assert max(errors(grouped_gemm.pair_scores, reference.pair_scores, inputs)) < 1e-10, banks
    probabilities = torch.rand(BATCH, HEADS, layout.num_queries, layout.num_tokens, dtype=torch.float64)
    _, value, _, bank = scores_inputs(layout, (True, True), groups)
    inputs = (probabilities.requires_grad_(), value, bank, layout, groups)
    assert max(errors(grouped_gemm.pair_values, reference.pair_values, inputs)) < 1e-10


@pytest.mark.parametrize(
    ("rank", "masked"), [(None, False), (None, True), (3, True)], ids=["full", "masked", "lor3-masked"]
)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("layout", CHOSEN, ids=layout_id)
def test_layers_equal_the_reference(layout, subset, rank, masked, on_this_device):
    mixer, mask = make_mixer(layout, subset, rank), make_mask(layout, masked)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    inputs = (hidden_states, layout, mask, weight)
    calls = []
    operators = dispatch.pair_operators
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "translution.modeling.mixers.near_far.pair_operators", lambda path: calls.append(path) or operators(path)
        )
        actual = run(mixer, "auto", *inputs)
    assert set(calls) == {"grouped_gemm"}
    assert_same(actual, run(mixer, "eager", *inputs), 1e-10)


# Sides and lengths that divide by nothing.
ODD = [
    PairLayout.for_image(5, 7, 5, 7),
    PairLayout.for_image(7, 5, 9, 11, 2),
    PairLayout.for_image(7, 5, 7, 5, 1, share_far=True),
    PairLayout.for_image(3, 5, 3, 5, class_token=False),
    PairLayout.for_text(31, 37),
    PairLayout.for_text(29, 29, 5),
]


@pytest.mark.parametrize("layout", ODD, ids=case_id)
def test_layers_at_any_memory_of_a_chunk(layout, on_this_device, monkeypatch):
    """From a shift at a time to all of a column's at once, with tokens that are hidden; outputs and every gradient."""
    mixer, mask = make_mixer(layout, "qkv"), make_mask(layout, True)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    inputs = (hidden_states, layout, mask, weight)
    expected, split, counts = run(mixer, "eager", *inputs), grouped_gemm.chunks, []

    def counted(*given):
        made = split(*given)
        counts[-1] = max(counts[-1], sum(len(parts) for _, parts in made))
        return made

    monkeypatch.setattr(grouped_gemm, "chunks", counted)
    for chunk_bytes in (1, 4_000, 11_000, 1 << 25):
        counts.append(0)
        monkeypatch.setattr(grouped_gemm, "CHUNK_BYTES", chunk_bytes)
        assert_same(run(mixer, "auto", *inputs), expected, 1e-10)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


@pytest.mark.parametrize("layout", [LAYOUTS[6], PairLayout.for_text(6, 6, 0)], ids=case_id)
def test_a_distance_of_0(layout, on_this_device):
    mixer, mask = make_mixer(layout, "qkv"), make_mask(layout, False)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    inputs = (hidden_states, layout, mask, weight)
    assert_same(run(mixer, "auto", *inputs), run(mixer, "eager", *inputs), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("subset", ["qkv", "q"])
@pytest.mark.parametrize("layout", CHOSEN, ids=layout_id)
def test_lower_precision_within_twice_the_reference(layout, subset, dtype, on_this_device):
    assert_precise(make_mixer(layout, subset), layout, make_mask(layout, True), dtype)


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="PyTorch before 2.10 has no grouped product"
)
@pytest.mark.parametrize("chunk_bytes", [1, grouped_gemm.CHUNK_BYTES])
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[4], LAYOUTS[5], LAYOUTS[14], TEXTS[0]], ids=case_id)
def test_grouped_product_of_pytorch(layout, chunk_bytes, monkeypatch):
    """A CPU has it in float32, for rows of 16 bytes; a GPU with tensor cores is asked for bfloat16."""
    monkeypatch.setattr(grouped_gemm, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(grouped_gemm, "has_grouped_product", lambda left, right: True)
    product, calls = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *inputs, **kwargs: calls.append(inputs) or product(*inputs, **kwargs)
    )
    inputs = scores_inputs(layout, (True, True), 2, size=4, inputs=8)
    truth = outcome(reference.pair_scores, (*inputs, HEADS, layout))
    rounded = [one.detach().float().requires_grad_() for one in inputs]
    actual = outcome(grouped_gemm.pair_scores, (*rounded, HEADS, layout))
    # Inputs are rounded, and sums of at most 40 tokens' products: 16 roundings are more than either takes.
    assert max(map(relative_error, actual, truth)) < 16 * torch.finfo(torch.float32).eps
    # Groups of a text are of one size, for which PyTorch has a batched product.
    assert bool(calls) != layout.causal
    assert all(len(left.shape) == 2 and max(len(left), len(right)) > 0 for left, right in calls)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"is_cuda": False}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (64, 12)}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (12, 0)}, False),
        ({"hip": "6.4"}, False),
    ],
    ids=str,
)
def test_grouped_product_is_asked_where_it_is_one_kernel(change, serves, monkeypatch):
    class Rows:
        is_cuda, dtype, shape, device = True, torch.bfloat16, (64, 16), torch.device("cuda")

    for name in change.keys() & {"is_cuda", "dtype", "shape"}:
        monkeypatch.setattr(Rows, name, change[name])
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)
    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    assert grouped_gemm.has_grouped_product(Rows, Rows) is serves


# What a chunk takes


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 25])
@pytest.mark.parametrize("layout", EVERY, ids=case_id)
def test_chunks_are_small_and_have_every_pair_of_the_grid_once(layout, chunk_bytes):
    row_bytes, matrix_bytes, pairs, extra = 24, 100, Counter(), 0
    for shift, parts in grouped_gemm.chunks(layout, row_bytes, matrix_bytes, chunk_bytes):
        for chunk in parts:
            num_rows = chunk.num_shifts * chunk.num_rows
            assert sum(chunk.sizes) == num_rows
            needed = max(num_rows * shift.num_columns * row_bytes, len(chunk.rows) * matrix_bytes)
            assert chunk.num_shifts == 1 or needed <= chunk_bytes
            groups = list(zip(chunk.rows, chunk.reverse_rows, chunk.sizes, strict=True))
            place, begin = 0, chunk.start
            for step in range(chunk.last, chunk.first - 1, -1):
                for query in range(begin, begin + chunk.num_rows):
                    row, reverse_row, size = groups[place]
                    key = query - step
                    if layout.causal:
                        extra += key < 0
                    elif key < 0:
                        key += layout.height
                    # The groups of a shift follow one another, each with the rows of its offset.
                    column_offset = shift.queries.start - shift.keys.start
                    if key >= 0:
                        assert layout.row(query - key, column_offset) == row
                        assert (layout.row(key - query, -column_offset) if not layout.causal else row) == reverse_row
                        pairs[query, key, column_offset] += 1
                    size -= 1
                    groups[place] = row, reverse_row, size
                    place += size == 0
            assert place == len(groups)
    order, _ = layout.pair_order()
    assert set(pairs.values()) <= {1}
    columns = {column: layout.width - abs(column) for _, _, column in pairs}
    assert sum(columns[column] for _, _, column in pairs) == len(order)
    # Pairs of a text that do not exist: half a chunk's distances for each of these, an eighth of its rows at most.
    assert extra <= len(order) / 8


@pytest.mark.parametrize("layout", [PairLayout.for_image(9, 8, 9, 8), PairLayout.for_text(72, 72)], ids=layout_id)
def test_no_tensor_per_pair(layout, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "CHUNK_BYTES", 1 << 12)
    batch, heads, features = 4, 2, 16
    tokens = layout.num_tokens
    query, key = (torch.randn(batch, tokens, features) for _ in range(2))
    query_bank, key_bank = (torch.randn(layout.num_offsets, features, features) for _ in range(2))
    # One shift of tokens, twice as many where their gradients are laid out; keys stand in memory twice; a bank; a square.
    bound = max(query_bank.numel(), tokens * tokens * batch * heads, 2 * tokens * batch * features)
    assert bound < batch * tokens * tokens * features / 4
    gradient = torch.randn(batch, heads, tokens, tokens)
    with LargestTensor() as largest:
        grouped_gemm._scores(query, key, query_bank, key_bank, heads, layout)
        grouped_gemm._scores_backward(gradient, query, key, query_bank, key_bank, layout, True, True)
        grouped_gemm._values(gradient, key, key_bank, layout)
    assert largest.numel <= bound


@pytest.mark.parametrize("fields", [{}, {"rank": 2}], ids=["full", "LoR"])
def test_an_empty_batch(fields, on_this_device):
    for layout in (PairLayout.for_image(4, 5, 4, 5), PairLayout.for_text(9, 9)):
        mixer = make_mixer(layout, "qkv", **fields)
        hidden_states = torch.randn(0, layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
        output = mixer(hidden_states, layout)[0]
        output.sum().backward()
        assert output.shape == hidden_states.grad.shape == hidden_states.shape
        assert all(not parameter.grad.any() for parameter in mixer.parameters())


def test_later_tokens_of_a_text_do_not_reach_earlier_ones():
    """Not even as a product with weight 0, which infinity survives."""
    layout, seen = PairLayout.for_text(30, 30), 20
    query, key, query_bank, key_bank = (one.detach() for one in scores_inputs(layout, (True, True), 1))
    probabilities = torch.rand(BATCH, HEADS, 30, 30, dtype=torch.float64)
    spoiled_query, spoiled_key = query.clone(), key.clone()
    spoiled_query[:, seen:], spoiled_key[:, seen:], probabilities[:, :, :seen, seen:] = torch.inf, torch.inf, torch.inf
    scores = grouped_gemm.pair_scores(spoiled_query, spoiled_key, query_bank, key_bank, HEADS, layout)
    assert scores[:, :, :seen].isfinite().all()
    assert grouped_gemm.pair_values(probabilities, spoiled_key, key_bank, layout)[:, :seen].isfinite().all()

"""The Triton kernels against the readable reference, interpreted on a CPU or run on a GPU; and how they are chosen."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_in_rounding
from layouts import layout_id
from small_layers import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LargestTensor,
    assert_same,
    make_mask,
    make_mixer,
    relative_error,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.operators import dispatch, registration
from translution.modeling.operators.dispatch import AUTO, TRITON
from translution.modeling.operators.pair_autograd import pack
from translution.modeling.operators.pair_layout import PairLayout


pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter
from triton_devices import DEVICE, EXACT, TOLERANCE, TightDevice

from translution.modeling.kernels import launch
from translution.modeling.operators import reference, triton_basis, triton_local, triton_pairs


LAYOUTS = [
    PairLayout.for_image(1, 1, 1, 1),
    PairLayout.for_image(2, 3, 2, 3),
    PairLayout.for_image(1, 3, 2, 4),
    PairLayout.for_image(3, 2, 3, 2, max_relative_distance=1),
    PairLayout.for_image(2, 2, 2, 2, max_relative_distance=0),
    PairLayout.for_text(1, 4),
    PairLayout.for_text(5, 6),
    PairLayout.for_text(7, 3, max_relative_distance=2),
    PairLayout.for_image(2, 3, 2, 3, class_token=False),
]
SMALL_TILES = dict.fromkeys((2, 4, 8), ((16, 16, 16, 2, 1),))


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton's interpreter holds bfloat16 as integers and multiplies them as such; here they become float32 before."""
    if DEVICE == "cuda":
        return
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *arguments):
        return multiply(self, widened(a), widened(b), *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that every loop and every edge of a kernel is reached."""
    monkeypatch.setattr(triton_pairs, "_TILES", dict.fromkeys(triton_pairs._TILES, SMALL_TILES))


@pytest.fixture
def all_pairs_alike(monkeypatch):
    """The kernels over all pairs serve layouts with a distance too, which otherwise has its own (`test_triton_local.py`)."""
    monkeypatch.setattr(dispatch, "LOCAL", False)


def on_device(mixer, hidden_states, mask, weight, dtype):
    mask = None if mask is None else mask.clamp(min=torch.finfo(dtype).min).to(DEVICE)
    return mixer.to(DEVICE, dtype), hidden_states.to(DEVICE, dtype), mask, weight.to(DEVICE, dtype)


# Two banks for every layout, and one of the other forms in turn: the interpreter takes seconds for each.
OTHERS = [("kv", None), ("q", None), ("qk", 3), ("v", 3)]
CASES = [(layout, "qkv", None) for layout in LAYOUTS]
CASES += [(layout, *OTHERS[place % 4]) for place, layout in enumerate(LAYOUTS)]


@pytest.mark.parametrize(("layout", "subset", "rank"), CASES, ids=lambda v: layout_id(v) if isinstance(v, PairLayout) else str(v))  # fmt: skip
@pytest.mark.usefixtures("all_pairs_alike")
def test_kernels_equal_reference(layout, subset, rank):
    mixer, mask = make_mixer(layout, subset, rank), make_mask(layout, True)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer.to(DEVICE), "eager", hidden_states.to(DEVICE), layout, None if mask is None else mask.to(DEVICE), weight.to(DEVICE))  # fmt: skip
    mixer, hidden_states, mask, weight = on_device(mixer, hidden_states, mask, weight, EXACT)
    assert_same(run(mixer, TRITON, hidden_states, layout, mask, weight), expected, TOLERANCE)


@pytest.mark.parametrize("layout", [PairLayout.for_image(1, 2, 1, 2), PairLayout.for_text(3, 4)], ids=layout_id)
def test_every_edge_of_a_tile(layout, small_tiles):
    """Inner sizes, heads, batches and pairs that fill several tiles, and the last of each in part."""
    batch, heads, size, features = 17, 3, 5, 17
    operators = [triton_pairs, reference]

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, EXACT).requires_grad_()

    query, key = (tensor(batch, layout.num_tokens, features) for _ in range(2))
    plain = tensor(batch, layout.num_tokens, heads * size)
    query_bank, key_bank = (tensor(layout.num_offsets, features, heads * size) for _ in range(2))
    pairs = tensor(batch, heads, layout.num_tokens, layout.num_tokens)
    cases = [(query, key, query_bank, key_bank)]
    if layout.causal:
        cases += [(plain, key, None, key_bank), (query, plain, query_bank, None)]
    for inputs in cases:
        given = [tensor for tensor in inputs if tensor is not None]
        results = [module.pair_scores(*inputs, heads, layout) for module in operators]
        gradients = [torch.autograd.grad((result * pairs.detach()).sum(), given) for result in results]
        for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
            assert relative_error(actual, expected) < TOLERANCE
    results = [module.pair_values(pairs, key, key_bank, layout) for module in operators]
    gradients = [torch.autograd.grad(result.square().sum(), (pairs, key, key_bank)) for result in results]
    for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize(("past", "band"), [(0, 2), (3, 3), (2, None)])
def test_text_with_a_past_and_a_band(past, band):
    layout = PairLayout(6, 1, False, True, 4 if band else 6, 1, band is not None, past, band)
    queries, tokens = layout.num_queries, layout.num_tokens

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, EXACT).requires_grad_()

    inputs = (tensor(2, queries, 4), tensor(2, tokens, 4), *(tensor(layout.num_offsets, 4, 6) for _ in range(2)))
    pairs = tensor(2, 2, queries, tokens).detach()
    results = [m.pair_scores(*inputs, 2, layout) for m in (triton_pairs, reference)]
    gradients = [torch.autograd.grad((result * pairs).sum(), inputs) for result in results]
    for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        assert relative_error(actual, expected) < TOLERANCE
    values = [m.pair_values(pairs, inputs[1], inputs[3], layout) for m in (triton_pairs, reference)]
    assert relative_error(*values) < TOLERANCE


# Heads of keys, queries' heads of each, features per head, inner size: some fill several small tiles, and the last in part.
GROUPED = [
    (PairLayout.for_image(1, 2, 1, 2), 3, 2, 3, 17),
    (PairLayout.for_image(2, 1, 2, 1, max_relative_distance=0, class_token=False), 1, 3, 3, 4),
    (PairLayout.for_text(3, 3, max_relative_distance=1, past=1), 3, 2, 5, 5),
]


@pytest.mark.parametrize(
    ("layout", "key_heads", "groups", "size", "features"),
    GROUPED,
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
@pytest.mark.usefixtures("small_tiles", "poisoned_memory")
def test_heads_of_queries_share_one_of_keys(layout, key_heads, groups, size, features):
    """Scores, values and every gradient, from banks that have the keys' heads alone."""
    heads, queries, tokens = key_heads * groups, layout.num_queries, layout.num_tokens

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, EXACT).requires_grad_()

    query, key = tensor(2, queries, features), tensor(2, tokens, features)
    plain_query, plain_key = tensor(2, queries, heads * size), tensor(2, tokens, key_heads * size)
    query_bank = tensor(layout.num_offsets, features, heads * size)
    key_bank = tensor(layout.num_offsets, features, key_heads * size)
    pairs = tensor(2, heads, queries, tokens)
    cases = [
        (query, key, query_bank, key_bank),
        (plain_query, key, None, key_bank),
        (query, plain_key, query_bank, None),
    ]
    for inputs in cases:
        given = [tensor for tensor in inputs if tensor is not None]
        results = [module.pair_scores(*inputs, heads, layout) for module in (triton_pairs, reference)]
        gradients = [torch.autograd.grad((result * pairs.detach()).sum(), given) for result in results]
        for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
            assert relative_error(actual, expected) < TOLERANCE
    results = [module.pair_values(pairs, key, key_bank, layout, groups) for module in (triton_pairs, reference)]
    gradients = [torch.autograd.grad(result.square().sum(), (pairs, key, key_bank)) for result in results]
    for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        assert relative_error(actual, expected) < TOLERANCE


# Layouts, and the offsets of all queries that fit in a chunk's memory: with none, each chunk has one offset.
CHUNKED = [
    (PairLayout.for_image(2, 2, 3, 2), 1),  # a bank with rows that no offset uses
    (PairLayout.for_image(1, 2, 1, 2), 0),  # a chunk of a class token's pairs alone
    (PairLayout.for_image(2, 3, 2, 3, class_token=False), 0),
    (
        PairLayout.for_image(3, 2, 3, 2, max_relative_distance=1, class_token=False),
        0,
    ),  # row offsets that share matrices
    (PairLayout.for_image(2, 4, 2, 4, max_relative_distance=2), 1),  # column offsets
    (PairLayout.for_text(5, 5, past=2), 2),
    (PairLayout.for_text(6, 6, max_relative_distance=2, past=1), 1),
    (PairLayout(6, 1, False, True, 4, 1, True, 2, 3), 0),  # a band
]


@pytest.mark.parametrize(("layout", "offsets"), CHUNKED, ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value))  # fmt: skip
@pytest.mark.usefixtures("small_tiles", "poisoned_memory")
def test_projections_in_several_chunks(layout, offsets, monkeypatch):
    """Matrices whose pairs several chunks have, tokens whose sums go on from chunk to chunk, and sums in the other order."""
    batch, heads, size, features = 2, 1, 3, 4
    pairs_of_offset = layout.num_queries * batch * heads * size * EXACT.itemsize
    monkeypatch.setattr(triton_pairs, "SCRATCH_BYTES", offsets * pairs_of_offset)
    monkeypatch.setattr(triton_pairs, "CACHED_BYTES", 0)
    chunks = []
    split = triton_pairs._chunks
    monkeypatch.setattr(triton_pairs, "_chunks", lambda *given: chunks.append(split(*given)) or chunks[-1])

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, EXACT).requires_grad_()

    query, key = tensor(batch, layout.num_queries, features), tensor(batch, layout.num_tokens, features)
    banks = [tensor(layout.num_offsets, features, heads * size) for _ in range(2)]
    pairs = tensor(batch, heads, layout.num_queries, layout.num_tokens).detach()
    results = []
    for module in (triton_pairs, reference):
        scores = module.pair_scores(query, key, *banks, heads, layout)
        gradients = torch.autograd.grad((scores * pairs).sum(), (query, key, *banks))
        results.append((scores, *gradients, module.pair_values(pairs, key, banks[1], layout)))
    assert all(len(each) > 1 for each in chunks)
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < TOLERANCE


def offsets(geometry):
    rows, columns = range(geometry.least_row, geometry.most_row + 1), range(geometry.least, geometry.most + 1)
    return [(row, column) for row in rows for column in columns]


SPLIT = [
    PairLayout.for_image(3, 5, 3, 5),
    PairLayout.for_image(3, 5, 9, 9),
    PairLayout.for_image(4, 5, 4, 5, max_relative_distance=1),
    PairLayout.for_image(2, 7, 2, 7, max_relative_distance=2, class_token=False),
    PairLayout.for_image(2, 3, 2, 3, max_relative_distance=0),
    PairLayout.for_image(1, 1, 1, 1, max_relative_distance=0),
    PairLayout.for_text(1, 1, max_relative_distance=3),
    PairLayout.for_text(7, 7, max_relative_distance=3, past=2),
    PairLayout.for_text(7, 7, max_relative_distance=0),
]


@pytest.mark.parametrize("layout", SPLIT, ids=layout_id)
def test_offsets_that_share_a_bank_row_are_taken_together(layout):
    geometry = triton_pairs._geometry(layout, 1)
    alone, groups = triton_pairs._split_by_rows(geometry)
    rows = {}
    for offset in offsets(geometry):
        rows.setdefault(layout.row(*(reversed(offset) if layout.causal else offset)), []).append(offset)
    assert offsets(alone) == [offset for each in rows.values() if len(each) == 1 for offset in each]
    taken = {}
    for group, apart in groups:
        count, of_offset = 1, offsets(group)
        if apart:
            of_offset.sort(key=lambda offset: offset[apart == "column"])
            count = len({offset[apart == "column"] for offset in of_offset})
        size = len(of_offset) // count
        group_rows = triton_pairs._bank_rows(group, 1, torch.device("cpu")).tolist()
        assert len(group_rows) == count
        for number, row in enumerate(group_rows):
            taken[row] = sorted(of_offset[number * size : (number + 1) * size])
        assert group.class_row < 0
    assert taken == {row: each for row, each in rows.items() if len(each) > 1}
    assert alone.class_row == geometry.class_row
    # Those of an image are no more groups for a longer distance.
    assert len(groups) <= 8


@pytest.mark.parametrize("layout", SPLIT, ids=layout_id)
@pytest.mark.parametrize("is_query", [True, False], ids=["query", "key"])
def test_tokens_that_have_offsets_of_a_group(layout, is_query):
    geometry = triton_pairs._geometry(layout, 1)
    height, width, past = geometry.height, geometry.width, geometry.past
    for group, _ in triton_pairs._split_by_rows(geometry)[1]:
        found = set()
        for (row, column), x, y in product(offsets(group), range(height), range(past, width)):
            other = (x - row, y - column)
            if 0 <= other[0] < height and 0 <= other[1] < width:
                found.add((x, y - past) if is_query else other)
        rows, columns = triton_pairs._own_places(group, is_query)
        assert set(product(range(rows.start, rows.stop), range(columns.start, columns.stop))) >= found
        # The smallest such rectangle.
        for axis, place in enumerate((rows, columns)):
            assert {each[axis] for each in found} == set(range(place.start, place.stop))


@pytest.mark.parametrize("layout", [layout for layout, _ in CHUNKED], ids=layout_id)
def test_chunks_have_every_offset_once(layout):
    geometry = triton_pairs._geometry(layout, 1)
    every = offsets(geometry)
    assert triton_pairs._pairs_of(geometry) == (layout.offsets()[0] >= 0).sum()
    for most in (0, 3, 10, 10**6):
        chunks = triton_pairs._chunks(geometry, most)
        assert [offset for chunk in chunks for offset in offsets(chunk)] == every
        assert all(triton_pairs._pairs_of(chunk) <= most or len(offsets(chunk)) <= 1 for chunk in chunks)
        assert [chunk.class_row for chunk in chunks if chunk.class_row >= 0] == [
            geometry.class_row
        ] * layout.class_token
    assert len(chunks) == 1


@pytest.mark.parametrize(
    "layout",
    [
        PairLayout.for_image(2, 2, 2, 3),
        PairLayout.for_image(3, 1, 3, 1, 1),
        PairLayout.for_image(1, 2, 1, 2, 0),
        PairLayout.for_text(5, 6, past=1),
    ],
    ids=layout_id,
)
@pytest.mark.usefixtures("small_tiles", "poisoned_memory")
def test_programs_that_share_a_sum(layout, monkeypatch):
    """Sums in several parts, some of which have no offset of some tokens, or no pair of some offsets."""
    monkeypatch.setattr(triton_pairs, "_num_parts", lambda *given: 3)
    batch, heads, size, features = 2, 2, 3, 4
    pairs_of_offset = layout.num_queries * batch * heads * size * EXACT.itemsize
    monkeypatch.setattr(triton_pairs, "SCRATCH_BYTES", 3 * pairs_of_offset)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, EXACT).requires_grad_()

    tokens = [tensor(batch, count, features) for count in (layout.num_queries, layout.num_tokens)]
    plain = tensor(batch, layout.num_queries, heads * size)
    banks = [tensor(layout.num_offsets, features, heads * size) for _ in range(2)]
    pairs = tensor(batch, heads, layout.num_queries, layout.num_tokens)
    for inputs in ((plain, tokens[1], None, banks[1]), (*tokens, *banks)):
        given = [each for each in inputs if each is not None]
        results = []
        for module in (triton_pairs, reference):
            scores = module.pair_scores(*inputs, heads, layout)
            gradients = torch.autograd.grad((scores * pairs.detach()).sum(), given)
            results.append((scores, *gradients, module.pair_values(pairs, tokens[1], banks[1], layout)))
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("programs", "steps", "parts"),
    [(264, 10**6, 1), (263, 4096, 5), (192, 4096, 6), (96, 4096, 8), (96, 40, 2), (1, 3, 1), (0, 0, 1)],
)
def test_sums_are_shared_where_programs_are_few(programs, steps, parts):
    assert triton_pairs._num_parts(programs, steps) == parts
    assert triton_pairs._num_parts(programs, steps, 3) == min(parts, 3)
    assert triton_pairs._num_parts(programs, steps, 0) == 1


class Operations(TorchDispatchMode):
    """Counts what is done besides launches: operations that are no view of what they are given, and not only memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(
            returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns
        )
        self.count += not is_view and "empty" not in function.name()
        return result


@pytest.mark.parametrize("subset", ["kv", "qkv"])
def test_a_class_token_takes_hardly_an_operation_of_its_own(subset, monkeypatch):
    """One for each bank of a backward pass, beside kernels that others have as well."""
    launched = []
    monkeypatch.setattr(triton_pairs, "launch", lambda kernel, *args, **arguments: launched.append(kernel))
    found = {}
    for class_token in (False, True):
        layout = PairLayout.for_image(5, 4, 5, 4, class_token=class_token)
        tokens, bank, pairs = (
            torch.empty(*shape, device="meta", dtype=torch.bfloat16)
            for shape in ((2, layout.num_tokens, 8), (layout.num_offsets, 8, 8), (2, 2, *[layout.num_tokens] * 2))
        )
        query_bank = bank if subset == "qkv" else None
        launched.clear()
        with Operations() as forward:
            triton_pairs._scores(tokens, tokens, query_bank, bank, 2, layout)
            triton_pairs._values(pairs, tokens, bank, layout)
        with Operations() as backward:
            triton_pairs._scores_backward(pairs, tokens, tokens, query_bank, bank, layout, True, True)
        found[class_token] = forward.count, backward.count, len(launched)
    banks = 2 if subset == "qkv" else 1
    (forward, backward, launches), with_class = found[False], found[True]
    assert with_class == (forward, backward + banks, launches)
    assert launches == 2 + (6 if subset == "qkv" else 4)


def test_heads_that_do_not_divide_are_an_error():
    layout = PairLayout.for_text(2, 2)
    hidden, bank = torch.zeros(1, 2, 4), torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match=r"Queries of 6 features .* got keys of 4"):
        triton_pairs.pair_scores(hidden, hidden, bank, None, 3, layout)
    with pytest.raises(ValueError, match=r"`groups` must divide the 3 heads of queries, got 2"):
        triton_pairs.pair_values(torch.zeros(1, 3, 2, 2), hidden, bank, layout, 2)


# Every form of one layout, and two of the others: the interpreter takes seconds for each.
FORMS = [("qkv", None), ("kv", None), ("v", None), ("kv", 3), ("qk", 3), ("v", 3)]
BASIS_CASES = [(LAYOUTS[6], *form) for form in FORMS]
BASIS_CASES += [(layout, *form) for layout in (LAYOUTS[1], LAYOUTS[3], LAYOUTS[7]) for form in (FORMS[0], FORMS[3])]
BASIS_CASES += [(LAYOUTS[8], *FORMS[0])]


@pytest.mark.parametrize(("layout", "subset", "rank"), BASIS_CASES, ids=lambda v: v if isinstance(v, str) else layout_id(v) if isinstance(v, PairLayout) else str(v))  # fmt: skip
@pytest.mark.usefixtures("all_pairs_alike")
def test_basis_kernels_equal_reference(layout, subset, rank):
    mixer, mask = make_mixer(layout, subset, rank, offset_basis=2), make_mask(layout, True)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer.to(DEVICE), "eager", hidden_states.to(DEVICE), layout, mask.to(DEVICE), weight.to(DEVICE))
    mixer, hidden_states, mask, weight = on_device(mixer, hidden_states, mask, weight, EXACT)
    assert_same(run(mixer, TRITON, hidden_states, layout, mask, weight), expected, TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [PairLayout.for_image(3, 20, 3, 20), PairLayout.for_text(37, 37, max_relative_distance=20)],
    ids=layout_id,
)
@pytest.mark.usefixtures("all_pairs_alike")
def test_basis_over_several_tiles(layout):
    """More tokens than a tile has, and more offsets than a program owns."""
    mixer, mask = make_mixer(layout, "kv", offset_basis=2), make_mask(layout, False)
    mixer.attention_dropout = 0.5  # of training alone
    mixer.eval()
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    hidden_states, weight = hidden_states[:1], weight[:1]
    mask = None if mask is None else mask[:1]
    mixer.to(DEVICE)
    expected = run(mixer, AUTO, *(None if t is None else t.to(DEVICE) for t in (hidden_states,)), layout, mask, weight.to(DEVICE))  # fmt: skip
    mixer, hidden_states, mask, weight = on_device(mixer, hidden_states, mask, weight, EXACT)
    assert_same(run(mixer, TRITON, hidden_states, layout, mask, weight), expected, TOLERANCE)


def test_basis_with_dropout_falls_back_or_refuses():
    layout = LAYOUTS[1]
    mixer = make_mixer(layout, "kv", offset_basis=2, attention_dropout=0.5).train()
    mixer.config._attn_implementation = TRITON
    with pytest.raises(ValueError, match="attention dropout is on"):
        mixer(torch.randn(1, layout.num_tokens, HIDDEN, dtype=torch.float64), layout)


def test_basis_stores_nothing_per_pair():
    layout = PairLayout.for_text(64, 64)
    mixer = make_mixer(layout, "kv", offset_basis=2)
    mixer.config._attn_implementation = TRITON
    hidden_states = torch.randn(1, 64, HIDDEN, dtype=torch.float64).to(DEVICE, EXACT)
    with LargestTensor() as largest:
        mixer.to(DEVICE, EXACT)(hidden_states, layout)[0].sum().backward()
    # Projections by two factors, sums of coefficients by head and offset.
    assert largest.numel <= 64 * max(2 * HEADS * HEAD_DIM, HEADS * 2)
    assert largest.numel < 64 * 64


@pytest.mark.parametrize(
    ("subset", "rank", "basis", "dtype"),
    [
        ("qkv", None, None, torch.float32),
        ("qkv", None, None, torch.bfloat16),
        ("qkv", None, None, torch.float16),
        ("kv", 3, None, torch.bfloat16),
        ("kv", 3, 2, torch.bfloat16),
        ("kv", 3, 2, torch.float16),
    ],
    ids=str,
)
def test_lower_precision_within_twice_plain_pytorch(subset, rank, basis, dtype):
    layout = LAYOUTS[1]
    mixer, mask = make_mixer(layout, subset, rank, offset_basis=basis), make_mask(layout, True)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    mixer, hidden_states, mask, weight = on_device(mixer, hidden_states, mask, weight, dtype)
    plain = run(mixer, "eager", hidden_states, layout, mask, weight)
    actual = run(mixer, TRITON, hidden_states, layout, mask, weight)
    truth = run(mixer.double(), "eager", hidden_states.double(), layout, mask, weight)
    for name in truth:
        allowed = 2 * relative_error(plain[name], truth[name]) + torch.finfo(dtype).eps
        assert relative_error(actual[name], truth[name]) <= allowed, name


def test_the_same_twice():
    """From the same tensors: no sum depends on which program came first. On a GPU bit for bit; a CPU's products depend on addresses."""
    # The interpreter runs programs one after the other.
    layout = LAYOUTS[1 if DEVICE == "cuda" else 0]
    mixer = make_mixer(layout, "qkv")
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN)
    mixer, hidden_states, _, weight = on_device(mixer, hidden_states, None, weight, torch.float32)
    first, second = (run(mixer, TRITON, hidden_states, layout, None, weight) for _ in range(2))
    for name in first:
        if DEVICE == "cuda":
            assert torch.equal(first[name], second[name]), name
        else:
            assert_close_in_rounding(first[name], second[name])


def test_opcheck_of_the_basis():
    layout = LAYOUTS[1]
    tokens = layout.num_tokens

    def tensor(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    # Two heads of queries share one of keys.
    factors = (tensor(1, 2, 1, tokens, 3), tensor(1, 1, 2, tokens, 3), tensor(1, 1, 2, tokens, 4))
    coefficients = (None, tensor(layout.num_offsets, 2), tensor(layout.num_offsets, 2))
    arguments = (*factors, *coefficients, *(tensor(1, n, tokens, 4) for n in (2, 1, 1)), None, 0.5, pack(layout))
    torch.library.opcheck(registration.operator("basis_attention").default, arguments)


@pytest.mark.parametrize("operator", ["pair_scores", "pair_scores_backward", "pair_values"])
def test_opcheck(operator):
    layout = PairLayout.for_text(2, 2)
    tokens, trained = layout.num_tokens, operator != "pair_scores_backward"

    def tensor(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=trained)

    query, key, pairs = tensor(2, tokens, 4), tensor(2, tokens, 4), tensor(2, 2, tokens, tokens)
    # Two heads of queries share one of keys.
    banks = [tensor(layout.num_offsets, 4, width) for width in (6, 3)]
    arguments = {
        "pair_scores": (query, key, *banks, 2, pack(layout)),
        "pair_scores_backward": (pairs, query, key, *banks, pack(layout), True, True),
        "pair_values": (pairs, key, banks[1], 2, pack(layout)),
    }[operator]
    torch.library.opcheck(registration.operator(f"triton_{operator}").default, arguments)


def image_model(**fields):
    fields = {"relative_projections": "kv", "image_size": 8, "patch_size": 4, "num_labels": 3, **fields}
    return TranslutionForImageClassification(small_config(**fields)).to(DEVICE).eval()


def small_config(**fields):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
    return TranslutionConfig(**{**sizes, "intermediate_size": 16, "num_channels": 1, **fields})


@pytest.mark.parametrize(
    "fields", [{}, {"relative_rank": 3}, {"max_relative_distance": 1}, {"offset_basis": 2}], ids=str
)
def test_models_train_and_generate_with_the_kernels(fields):
    model = image_model(num_hidden_layers=1, **fields)
    pixels = torch.randn(2, 1, 8, 8, device=DEVICE)
    expected = model(pixel_values=pixels).logits
    model.set_attn_implementation(TRITON)
    outputs = model(pixel_values=pixels, labels=torch.tensor([0, 1], device=DEVICE))
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    config = small_config(
        modality="text",
        vocab_size=11,
        max_position_embeddings=12,
        relative_projections="kv",
        # Wide enough for the most likely token to be far from the next.
        initializer_range=0.5,
        **fields,
    )
    model = TranslutionForCausalLM(config).to(DEVICE, EXACT).eval()
    ids = torch.randint(1, 11, (2, 5), device=DEVICE)
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.set_attn_implementation(TRITON)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).equal(wanted)


def test_autocast_and_checkpointing_with_the_kernels():
    gradients = []
    pixels, labels = torch.randn(2, 1, 4, 8, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    model = image_model(num_hidden_layers=1, image_size=[4, 8]).train()
    model.set_attn_implementation(TRITON)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            model(pixel_values=pixels, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert_close_in_rounding(gradients[1][name], gradient, 4, torch.bfloat16)
    model.set_attn_implementation(AUTO)
    model.zero_grad()
    model(pixel_values=pixels, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[0][name], parameter.grad) < 0.05, name


def test_one_graph_with_the_kernels():
    torch.compiler.reset()  # other tests of this process compile the same code too, and their number is limited
    model = image_model(num_hidden_layers=1)
    model.set_attn_implementation(TRITON)
    pixels = torch.randn(2, 1, 8, 8, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("dtype", "option", "backend", "architecture", "shared"),
    [("bfloat16", 0, "cuda", "90", 227), ("float32", -1, "cuda", "80", 48), ("bfloat16", 2, "hip", "gfx942", 64)],
)
def test_kernels_compile_without_a_gpu(dtype, option, backend, architecture, shared, tmp_path):
    """For a data centre's GPU, for little shared memory (KiB), and for ROCm."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).parent / "compile_kernels.py"
    command = [sys.executable, str(program), dtype, str(option), backend, architecture]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    names, taken = zip(*(line.split() for line in output.splitlines()), strict=True)
    modules = (triton_pairs, triton_basis, triton_local)
    assert set(names) == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert max(map(int, taken)) <= shared << 10


def test_no_triton_is_imported_without_a_gpu():
    code = """
import sys, torch
sys.modules["triton"] = None  # as where it is not installed
from translution import TranslutionConfig, TranslutionForImageClassification
model = TranslutionForImageClassification(TranslutionConfig(image_size=32, num_hidden_layers=1))
model(pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
assert not any(name.startswith("translution.modeling.kernels.") for name in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_device_with_little_shared_memory_gets_smaller_tiles():
    options = [{"ROWS": rows} for rows in (128, 64, 32)]
    kernel = TightDevice(64)
    for _ in range(2):
        launch.launch(kernel, lambda option: (1,), options, lambda option: {}, tokens=torch.zeros(1))
    assert kernel.tried == [128, 64, 64]
    with pytest.raises(RuntimeError, match=r"tight does not fit .* `TRANSLUTION_TRITON=0`"):
        launch.launch(TightDevice(8), lambda option: (1,), options[1:], lambda option: {}, tokens=torch.zeros(1))


def test_tile_sizes_suit_the_problem():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for heads, width, features in ((3, 64, 192), (1, 1, 3), (12, 64, 768), (3, 8, 24), (2, 256, 512)):
            for kernel in triton_pairs._TILES:
                for option in triton_pairs._head_tiles(kernel, torch.empty(0, dtype=dtype), features, heads, width):
                    columns = option["HEADS"] * width
                    assert columns >= 16
                    assert columns <= max(128, width)
                    assert option["HEADS"] & (option["HEADS"] - 1) == 0
                    assert 16 <= option["BLOCK_C"] <= max(16, 2 * features)


@pytest.mark.parametrize(("size", "block"), [(1, 16), (17, 32), (64, 64), (128, 128), (192, 64), (768, 128)])
def test_blocks_waste_little(size, block):
    assert triton_pairs._block(size, 128) == block


@pytest.mark.skipif(DEVICE == "cuda", reason="products are counted by Triton's interpreter")
def test_the_backward_pass_has_six_products_a_pair(small_tiles, monkeypatch):
    """With two banks: of each side a projection, the tokens' gradients and the matrices', at any number of tiles."""
    batch, heads, size = 16, 2, 16
    features = heads * size
    layout = PairLayout.for_image(2, 1, 2, 1, class_token=False)
    query, key = torch.randn(2, batch, 2, features, dtype=torch.float64)
    banks = torch.randn(2, layout.num_offsets, features, features, dtype=torch.float64)
    counted, multiply = [], interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *arguments):
        counted.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return multiply(self, a, b, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    triton_pairs._scores_backward(torch.randn(batch, heads, 2, 2, dtype=torch.float64), query, key, *banks, layout, True, True)  # fmt: skip
    assert sum(counted) == 6 * batch * 2**2 * features**2

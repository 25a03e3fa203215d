"""Heads of queries that share one of keys and values: operators over pairs against those whose matrices are repeated."""

import itertools

import pytest
import torch
from closeness import assert_close_in_rounding
from layouts import layout_id
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

from translution.modeling.operators import (
    basis,
    dispatch,
    gathered,
    grouped,
    offset_blocks,
    pair_autograd,
    reference,
    registration,
    streamed,
)
from translution.modeling.operators.basis import OffsetBasis
from translution.modeling.operators.pair_layout import PairLayout


pytestmark = pytest.mark.usefixtures("poisoned_memory")

OWN_HEADS = 2  # of keys and values
CHOSEN = [
    PairLayout.for_image(3, 4, 3, 4),
    PairLayout.for_image(4, 5, 4, 5, max_relative_distance=2),
    PairLayout.for_image(4, 3, 4, 3, max_relative_distance=1, share_far=True, class_token=False),
    PairLayout.for_text(6, 7),
    PairLayout.for_text(9, 4, max_relative_distance=3),
    PairLayout.for_text(7, 9, past=3),
    PairLayout.for_text(7, 4, max_relative_distance=3, past=2, band=3),
]
CASES = [(layout, 2 + place % 2) for place, layout in enumerate(CHOSEN)]


def case_id(value):
    if isinstance(value, PairLayout):
        return f"{layout_id(value)}-past{value.past}" if value.past else layout_id(value)
    return str(value)


layouts_and_groups = pytest.mark.parametrize(("layout", "groups"), CASES, ids=case_id)


def tensor(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def repeated(part, groups):
    """Every head of the last axis `groups` times, one after the other."""
    heads = part.chunk(OWN_HEADS, dim=-1)
    return torch.cat([head for head in heads for _ in range(groups)], dim=-1)


def repeated_bank(bank, groups):
    return (
        bank._replace(factors=repeated(bank.factors, groups))
        if isinstance(bank, OffsetBasis)
        else repeated(bank, groups)
    )


def as_matrices(bank):
    return bank.bank() if isinstance(bank, OffsetBasis) else bank


def leaves(*parts):
    """The tensors of inputs and banks."""
    found = []
    for part in parts:
        found += list(part) if isinstance(part, OffsetBasis) else [part] if part is not None else []
    return found


def make_bank(layout, features, width, factors=None):
    if factors is None:
        return tensor(layout.num_offsets, features, width)
    return OffsetBasis(tensor(layout.num_offsets, factors), tensor(factors, features, width))


def results(output, weight, inputs):
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


def assert_each(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < tolerance


# Operators that serve with matrices, and with a basis of so many factors.
OPERATORS = {
    "reference": (reference, None),
    "gathered": (gathered, None),
    "grouped": (grouped, None),
    "basis": (basis, 2),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


@every_operator
@pytest.mark.parametrize("banks", list(itertools.product([True, False], repeat=2)), ids=["qk", "q", "k", "plain"])
@layouts_and_groups
def test_scores(layout, banks, groups, name):
    operators, factors = OPERATORS[name]
    size, num_heads = 3, OWN_HEADS * groups
    widths = (num_heads * size, OWN_HEADS * size)
    banks = [make_bank(layout, 5, width, factors) if has else None for has, width in zip(banks, widths, strict=True)]
    query, key = (
        tensor(BATCH, tokens, width if bank is None else 5)
        for tokens, width, bank in zip((layout.num_queries, layout.num_tokens), widths, banks, strict=True)
    )
    weight = torch.randn(BATCH, num_heads, layout.num_queries, layout.num_tokens, dtype=torch.float64)
    actual = operators.pair_scores(query, key, *banks, num_heads, layout)
    wide_key = repeated(key, groups) if banks[1] is None else key
    wide_bank = None if banks[1] is None else as_matrices(repeated_bank(banks[1], groups))
    query_bank = None if banks[0] is None else as_matrices(banks[0])
    expected = reference.pair_scores(query, wide_key, query_bank, wide_bank, num_heads, layout)
    inputs = leaves(query, key, *banks)
    assert_each(results(actual, weight, inputs), results(expected, weight, inputs))


# Narrow heads are weighted by a product with ones, wide ones are not.
@pytest.mark.parametrize("size", [3, offset_blocks.NARROW + 2])
@every_operator
@layouts_and_groups
def test_values(layout, groups, name, size):
    operators, factors = OPERATORS[name]
    bank = make_bank(layout, 5, OWN_HEADS * size, factors)
    value = tensor(BATCH, layout.num_tokens, 5)
    probabilities = torch.rand(BATCH, OWN_HEADS * groups, layout.num_queries, layout.num_tokens, dtype=torch.float64)
    # Pairs that do not exist are not read; a gradient of theirs has no meaning.
    exists = layout.offsets()[0] >= 0
    probabilities.requires_grad_()
    weight = torch.randn(BATCH, layout.num_queries, OWN_HEADS * groups * size, dtype=torch.float64)
    inputs = leaves(probabilities, value, bank)
    actual = results(operators.pair_values(probabilities, value, bank, layout, groups), weight, inputs)
    wide = as_matrices(repeated_bank(bank, groups))
    expected = results(reference.pair_values(probabilities, value, wide, layout), weight, inputs)
    actual[1], expected[1] = (part[1] * exists for part in (actual, expected))
    assert_each(actual, expected)


def attention(query, key, value, banks, num_heads, scale, layout):
    """Softmax over the reference's scores."""
    scores = reference.pair_scores(query, key, *banks[:2], num_heads, layout) * scale
    weights = scores.masked_fill(layout.offsets()[0] < 0, -torch.inf).softmax(-1)
    if banks[2] is None:
        heads = value.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        return (weights @ heads).transpose(1, 2).flatten(2)
    return reference.pair_values(weights, value, banks[2], layout)


@pytest.mark.parametrize("size", [3, offset_blocks.NARROW + 2])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(("layout", "groups"), CASES[:4], ids=case_id)
def test_streamed(layout, subset, groups, size):
    num_heads = OWN_HEADS * groups
    widths = dict(zip("qkv", (num_heads * size, OWN_HEADS * size, OWN_HEADS * size), strict=True))
    # One input of all that have a bank, as a layer has.
    hidden = tensor(BATCH, layout.num_tokens, 5)
    banks = [make_bank(layout, 5, width) if name in subset else None for name, width in widths.items()]
    tokens = [hidden if name in subset else tensor(BATCH, layout.num_tokens, width) for name, width in widths.items()]
    with torch.no_grad():
        for bank in leaves(*banks):
            bank *= size**-0.5
    weight = torch.randn(BATCH, layout.num_tokens, num_heads * size, dtype=torch.float64)
    inputs = list(dict.fromkeys(leaves(*tokens, *banks)))
    actual = streamed.streamed_attention(*tokens, *banks, num_heads, 0.5, layout)
    wide_tokens = [
        tokens[0],
        *(repeated(t, groups) if b is None else t for t, b in zip(tokens[1:], banks[1:], strict=True)),
    ]
    wide_banks = [banks[0], *(None if bank is None else repeated(bank, groups) for bank in banks[1:])]
    expected = attention(*wide_tokens, wide_banks, num_heads, 0.5, layout)
    assert_each(results(actual, weight, inputs), results(expected, weight, inputs))


@pytest.mark.parametrize("layout", [PairLayout.for_image(2, 2, 3, 2), PairLayout.for_text(4, 5)], ids=layout_id)
@pytest.mark.parametrize("name", ["grouped", "basis"])
def test_gradcheck(layout, name):
    operators, factors = OPERATORS[name]
    tokens, groups = layout.num_tokens, 2
    num_heads = OWN_HEADS * groups
    query_bank, key_bank = make_bank(layout, 3, num_heads * 2, factors), make_bank(layout, 3, OWN_HEADS * 2, factors)

    def check(function, *inputs):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    def bank_of(parts):
        return OffsetBasis(*parts) if factors else parts[0]

    parts = len(leaves(key_bank))
    check(
        lambda query, key, *banks: operators.pair_scores(
            query, key, bank_of(banks[:parts]), bank_of(banks[parts:]), num_heads, layout
        ),
        *(tensor(2, tokens, 3) for _ in range(2)),
        *leaves(query_bank, key_bank),
    )
    check(
        lambda probabilities, value, *bank: operators.pair_values(probabilities, value, bank_of(bank), layout, groups),
        torch.rand(2, num_heads, tokens, tokens, dtype=torch.float64, requires_grad=True),
        tensor(2, tokens, 3),
        *leaves(key_bank),
    )


@pytest.mark.parametrize("layout", [PairLayout.for_image(2, 2, 3, 2), PairLayout.for_text(4, 5)], ids=layout_id)
@pytest.mark.parametrize("subset", ["qkv", "q", "kv"])
def test_gradcheck_of_streamed(layout, subset):
    widths = (8, 4, 4)
    banks = [
        tensor(layout.num_offsets, 3, width) if name in subset else None
        for name, width in zip("qkv", widths, strict=True)
    ]
    tokens = [
        tensor(2, layout.num_tokens, width if bank is None else 3) for width, bank in zip(widths, banks, strict=True)
    ]
    assert torch.autograd.gradcheck(
        lambda *inputs: streamed.streamed_attention(*inputs, 4, 0.5, layout), (*tokens, *banks), fast_mode=True
    )


@pytest.fixture
def all_pairs_alike(monkeypatch):
    """Near and far pairs computed apart are tested in `test_local.py`."""
    monkeypatch.setattr(dispatch, "LOCAL", False)


FORMS = {
    "full": {},
    "biases": {"qkv_bias": True},
    "low-rank": {"rank": 3},
    "basis": {"offset_basis": 2},
    "basis-biases": {"offset_basis": 2, "qkv_bias": True},
    "low-rank-basis": {"rank": 3, "offset_basis": 2},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("subset", ["qkv", "qv"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layout", "groups"), [CASES[place] for place in (0, 1, 3, 4)], ids=case_id)
@pytest.mark.usefixtures("all_pairs_alike")
def test_layers_equal_the_reference(layout, groups, form, subset, masked):
    mixer, mask = make_mixer(layout, subset, groups=groups, num_heads=6, **FORMS[form]), make_mask(layout, masked)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    # A text's own mask is known to what needs none.
    assert_same(run(mixer, "auto", hidden_states, layout, mask if masked else None, weight), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["full", "low-rank", "basis"])
@pytest.mark.parametrize("layout", CHOSEN[:2], ids=layout_id)
@pytest.mark.usefixtures("all_pairs_alike")
def test_lower_precision_within_twice_the_reference(layout, form, dtype):
    assert_precise(
        make_mixer(layout, "qkv", groups=3, num_heads=6, **FORMS[form]), layout, make_mask(layout, True), dtype
    )


@pytest.mark.parametrize("elements", [1, 64])
@pytest.mark.parametrize("form", ["full", "basis"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_sizes_of_workspaces_change_nothing(elements, form, masked, monkeypatch):
    layout = CHOSEN[0]
    mixer, mask = make_mixer(layout, "qkv", groups=3, num_heads=6, **FORMS[form]), make_mask(layout, masked)
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    for module, name in (
        (offset_blocks, "WORKSPACE_ELEMENTS"),
        (streamed, "GROUP_ELEMENTS"),
        (basis, "CHUNK_ELEMENTS"),
    ):
        monkeypatch.setattr(module, name, elements)
    assert_same(run(mixer, "auto", hidden_states, layout, mask, weight), expected, 1e-10)


@pytest.mark.parametrize("form", ["full", "low-rank", "basis"])
@pytest.mark.parametrize("layout", [CHOSEN[0], CHOSEN[3]], ids=layout_id)
def test_an_empty_batch(layout, form, monkeypatch):
    mixer = make_mixer(layout, "qkv", groups=3, num_heads=6, **FORMS[form])
    hidden_states = torch.randn(0, layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    for stream in (True, False):
        monkeypatch.setattr(dispatch, "STREAM", stream)
        output = mixer(hidden_states, layout)[0]
        output.sum().backward()
        assert output.shape == hidden_states.grad.shape == hidden_states.shape
        assert all(not parameter.grad.any() for parameter in mixer.parameters())


@pytest.mark.parametrize(("form", "path"), [("full", "streamed"), ("full", "grouped"), ("basis", "basis")])
@pytest.mark.parametrize(
    "layout", [PairLayout.for_text(5, 5), PairLayout.for_image(1, 3, 1, 3)], ids=["text", "image"]
)
def test_no_bank_is_repeated(layout, form, path, monkeypatch):
    """A bank is the largest tensor here: of a layer with few tokens, forward and backward, nothing is larger than that."""
    monkeypatch.setattr(dispatch, "STREAM", path == "streamed")
    groups, features = 3, 40
    fields = {"offset_basis": 8} if form == "basis" else {}
    mixer = make_mixer(layout, "kv", groups=groups, num_heads=6, head_dim=10, hidden_size=features, **fields)
    largest = LargestTensor()
    for module, names in (
        (streamed, ("_forward", "_backward")),
        (grouped, ("_scores", "_scores_backward", "_values")),
        (basis, ("_scores", "_backward", "_values")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, largest.inside(getattr(module, name)))
    hidden_states = torch.randn(1, layout.num_tokens, features, dtype=torch.float64, requires_grad=True)
    with largest:
        mixer(hidden_states, layout)[0].sum().backward()
    bank = mixer.k_factors if form == "basis" else mixer.k_bank
    assert bank.shape[-1] == 6 // groups * 10
    assert largest.made == bank.numel()


def operator_calls():
    layout = PairLayout.for_image(2, 3, 2, 3)
    packed, tokens = pair_autograd.pack(layout), torch.randn(2, 7, 5, requires_grad=True)
    query_bank, own_bank = tensor(layout.num_offsets, 5, 18, dtype=None), tensor(layout.num_offsets, 5, 6, dtype=None)
    pairs = torch.rand(2, 6, 7, 7, requires_grad=True)
    query, keys, weights = (
        tensor(2, 6, 7, 3, dtype=None),
        tensor(2, 2, 4, 7, 3, dtype=None),
        tensor(4, 7, 7, dtype=None),
    )
    scores, values = (tokens, tokens, query_bank, own_bank, 6, packed), (pairs, tokens, own_bank, 3, packed)
    return {
        "pair_scores": scores,
        "pair_values": values,
        "gemm_pair_scores": scores,
        "gemm_pair_values": values,
        "streamed_attention": (tokens, tokens, tokens, query_bank, own_bank, own_bank, 6, 0.5, packed),
        "basis_scores": (query, keys, weights),
        "basis_values": (pairs, keys, weights),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    torch.library.opcheck(registration.operator(name).default, operator_calls()[name])


@pytest.mark.parametrize(("form", "subset"), [("full", "qkv"), ("low-rank", "q"), ("basis", "kv"), ("basis", "q")])
def test_kernels_of_cuda_equal_the_reference(form, subset):
    devices = pytest.importorskip("triton_devices")
    layout, device, dtype = PairLayout.for_text(3, 4), devices.DEVICE, devices.EXACT
    mixer = make_mixer(layout, subset, groups=2, num_heads=4, **FORMS[form]).to(device, dtype)
    hidden_states, weight = torch.randn(2, 1, 3, HIDDEN, dtype=torch.float64).to(device, dtype)
    mask = make_mask(layout, False)[:1].to(device, dtype)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    assert_same(run(mixer, "triton", hidden_states, layout, mask, weight), expected, devices.TOLERANCE)


def test_exported_basis_equals_the_eager_one():
    """An exported graph has no operators of the package: plain operations read the same factors."""
    layout, groups = PairLayout.for_text(4, 5), 3
    bank = make_bank(layout, 5, OWN_HEADS * 3, factors=2)
    query, key = torch.randn(BATCH, 4, OWN_HEADS * groups * 3).double(), torch.randn(BATCH, 4, 5).double()
    probabilities = torch.rand(BATCH, OWN_HEADS * groups, 4, 4, dtype=torch.float64)

    class Both(torch.nn.Module):
        def forward(self, query, key, probabilities):
            scores = basis.pair_scores(query, key, None, bank_of_graph, OWN_HEADS * groups, layout)
            return scores, basis.pair_values(probabilities, key, bank_of_graph, layout, groups)

    bank_of_graph = OffsetBasis(*(part.detach() for part in bank))
    inputs = (query, key, probabilities)
    exported = torch.export.export(Both(), inputs)
    assert not any(registration.namespace() in str(node.target) for node in exported.graph.nodes)
    for actual, expected in zip(exported.module()(*inputs), Both()(*inputs), strict=True):
        assert_close_in_rounding(actual, expected)

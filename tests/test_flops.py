"""PyTorch's `FlopCounterMode` counts the package's operators: as many operations as a loop over the pairs."""

import importlib
from collections import Counter

import pytest
import torch
from small_models import make_config
from torch.utils.flop_counter import FlopCounterMode

from translution import TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.operators import dispatch, flops, registration
from translution.modeling.operators.pair_autograd import pack
from translution.modeling.operators.pair_layout import PairLayout


BATCH, HIDDEN, HEADS, HEAD_DIM, LENGTH = 2, 12, 2, 8, 9
INNER, MATRIX = HEADS * HEAD_DIM, HIDDEN * HEADS * HEAD_DIM


def counted(model, **inputs):
    """Operations of a forward and a backward pass of each of the package's operators, by its name."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.sum().backward()
    prefix = registration.namespace() + "."
    found = {str(operator): number for operator, number in counter.get_flop_counts()["Global"].items()}
    return {name.removeprefix(prefix): number for name, number in found.items() if name.startswith(prefix)}


def text_model(variant, **fields):
    torch.manual_seed(0)
    return TranslutionForCausalLM(make_config("text", variant, num_hidden_layers=1, **fields))


def image_model(variant, **fields):
    torch.manual_seed(0)
    return TranslutionForImageClassification(make_config("image", variant, num_hidden_layers=1, **fields))


TOKENS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 19
PIXELS = torch.linspace(-1, 1, BATCH * 3 * 12 * 10).view(BATCH, 3, 12, 10)
PATCHES = 1 + 3 * 2


def text_distances():
    return [i - j for i in range(LENGTH) for j in range(i + 1)]


@pytest.mark.parametrize("variant", ["full-qkv", "full-kv", "full-v"])
def test_full_translution_of_an_image(variant):
    banks = len(variant.removeprefix("full-"))
    forward = backward = 0
    for _ in range(BATCH * PATCHES**2):
        # A vector times its matrix for each bank; the inner product and the weighted sum.
        forward += 2 * (banks * MATRIX + 2 * INNER)
        # All but the weighted sum again, the gradient of the weight; then one of each of query, key and value, each by the
        # matrix and the token of the pair where there is a bank.
        backward += 2 * (banks * MATRIX + 2 * INNER + 3 * INNER + 2 * banks * MATRIX)
    assert counted(image_model(variant), pixel_values=PIXELS) == {
        "streamed_attention": forward,
        "streamed_attention_backward": backward,
    }


@pytest.mark.parametrize("distance", [None, 40])
def test_full_translution_of_a_text(distance):
    forward = backward = 0
    for _ in BATCH * text_distances():
        forward += 2 * (2 * MATRIX + 2 * INNER)
        backward += 2 * (3 * 2 * MATRIX + 5 * INNER)
    assert counted(text_model("full-kv", max_relative_distance=distance), input_ids=TOKENS) == {
        "streamed_attention": forward,
        "streamed_attention_backward": backward,
    }


def test_near_pairs_of_a_text_with_a_distance(monkeypatch):
    monkeypatch.setattr(dispatch, "LOCAL", False)
    near = BATCH * sum(between < 3 for between in text_distances())
    assert counted(text_model("full-kv", max_relative_distance=3), input_ids=TOKENS) == {
        # The gradient of probabilities has the form of scores.
        "pair_scores": 2 * 2 * near * (MATRIX + INNER),
        # Weighted sums for queries, keys and values; the keys again, then the tokens and matrices of keys and of values.
        "pair_scores_backward": 2 * near * (3 * INNER + MATRIX + 2 * 2 * MATRIX),
        "pair_values": 2 * near * (MATRIX + INNER),
    }


def expected_of_local(pairs, near, projections):
    """Every pair has an inner product and a weighted sum, and two products of each in the backward pass, beside the scores of
    far pairs again; every projection has one product, and two in the backward pass.
    """
    return {
        "project_each": 2 * BATCH * projections * MATRIX,
        "project_each_backward": 4 * BATCH * projections * MATRIX,
        "local_attention": 2 * BATCH * pairs * 2 * INNER,
        "local_attention_backward": 2 * BATCH * (pairs * 4 * INNER + (pairs - near) * INNER),
    }


@pytest.mark.parametrize("distance", [1, 3])
def test_local_text(distance):
    near = sum(between < distance for between in text_distances())
    expected = expected_of_local(len(text_distances()), near, 2 * distance * LENGTH)
    model = text_model("full-kv", max_relative_distance=distance)
    assert counted(model, input_ids=TOKENS) == expected


def test_local_image_with_shared_far_offsets():
    patches = [(x, y) for x in range(3) for y in range(2)]
    far = [max(abs(x - u), abs(y - v)) > 1 for x, y in patches for u, v in patches]
    # Of 3 × 2 patches all near offsets exist; each patch looks at the class token as well, which is one more near pair.
    expected = expected_of_local(len(far) + len(patches), len(far) - sum(far) + len(patches), 2 * 10 * len(patches))
    model = image_model("full-kv", max_relative_distance=1, far_offsets="shared")
    assert counted(model, pixel_values=PIXELS) == expected


@pytest.mark.parametrize("distance", [None, 3])
def test_grouped_pairs(distance):
    """Attention dropout needs the square of probabilities, so scores and values are operators of their own."""
    model = text_model("full-qkv", max_relative_distance=distance, attention_dropout=0.1).train()
    expected = Counter()
    for between in BATCH * text_distances():
        if distance is None or between < distance:
            expected["pair_scores"] += 2 * (2 * MATRIX + INNER)
            expected["pair_values"] += 2 * (MATRIX + INNER)
            # The gradient of the probabilities has the form of scores of values.
            expected["pair_scores"] += 2 * (MATRIX + INNER)
            # Queries and keys, each weighted and with the other's projection again; and values, whose other side has no bank.
            expected["pair_scores_backward"] += 2 * (2 * (MATRIX + INNER + 2 * MATRIX) + INNER + 2 * MATRIX)
    assert counted(model, input_ids=TOKENS) == expected


def test_low_rank_pairs():
    rank = 3 * HEADS
    expected = Counter()
    for _ in range(BATCH * PATCHES**2):
        expected["pair_scores"] += 2 * (2 * rank**2 + rank) + 2 * (rank**2 + rank)
        expected["pair_values"] += 2 * (rank**2 + rank)
        expected["pair_scores_backward"] += 2 * (2 * (3 * rank**2 + rank) + rank + 2 * rank**2)
    assert counted(image_model("lor-qkv"), pixel_values=PIXELS) == expected


def test_basis():
    factors = 3
    expected = Counter()
    for _ in range(BATCH * PATCHES**2):
        for _ in range(factors):
            for _ in range(factors):
                # Of keys for every factor of queries; then queries, keys, and weights.
                expected["basis_scores"] += 2 * INNER
                expected["basis_backward"] += 3 * 2 * INNER
            expected["basis_values"] += 2 * INNER
            expected["basis_scores"] += 2 * INNER
            expected["basis_backward"] += 2 * 2 * INNER
    assert counted(image_model("basis-qkv"), pixel_values=PIXELS) == expected


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("band", [None, 1, 3, 6, 40])
def test_pairs_of_new_tokens(past, band):
    layout = PairLayout.for_text(LENGTH, LENGTH, past=past, band=band)
    pairs = int((layout.offsets()[0] >= 0).sum())
    query, key = torch.zeros(BATCH, LENGTH - past, HIDDEN), torch.zeros(BATCH, LENGTH, INNER)
    bank = torch.zeros(layout.num_offsets, HIDDEN, INNER)
    with FlopCounterMode(display=False) as counter:
        registration.operator("pair_scores")(query, key, bank, None, HEADS, pack(layout))
    assert counter.get_total_flops() == 2 * BATCH * pairs * (MATRIX + INNER)


GROUPS = 3


def operations(name, *arguments):
    """Forward, and forward and backward, of an operator whose tensors all need gradients."""
    given = [part.requires_grad_() if isinstance(part, torch.Tensor) else part for part in arguments]
    with FlopCounterMode(display=False) as counter:
        output = registration.operator(name)(*given)
        forward = counter.get_total_flops()
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return forward, counter.get_total_flops()


def test_heads_that_share_keys_and_values():
    """Matrices and their gradients have the keys' heads, inner products and sums the queries'."""
    layout = PairLayout.for_text(LENGTH, LENGTH)
    packed, tokens = pack(layout), torch.randn(BATCH, LENGTH, HIDDEN)
    inner, matrix = GROUPS * INNER, GROUPS * MATRIX
    bank, own_bank = torch.randn(LENGTH, HIDDEN, inner), torch.randn(LENGTH, HIDDEN, INNER)
    pairs = torch.rand(BATCH, GROUPS * HEADS, LENGTH, LENGTH)
    counts = Counter()
    for _ in BATCH * text_distances():
        counts["pair_scores"] += 2 * (matrix + MATRIX + inner)
        counts["pair_scores_backward"] += 2 * ((MATRIX + inner + 2 * matrix) + (matrix + inner + 2 * MATRIX))
        counts["pair_values"] += 2 * (MATRIX + inner)
        # Probabilities have the gradient of scores of values; then values, whose other side has no bank.
        counts["pair_values_backward"] += 2 * (MATRIX + inner) + 2 * (inner + 2 * MATRIX)
        counts["streamed_attention"] += 2 * (matrix + 2 * MATRIX + 2 * inner)
        counts["streamed_attention_backward"] += 2 * (3 * (matrix + 2 * MATRIX) + 5 * inner)
    num_heads = HEADS * GROUPS
    calls = {
        "pair_scores": (tokens, tokens, bank, own_bank, num_heads, packed),
        "pair_values": (pairs, tokens, own_bank, GROUPS, packed),
        "streamed_attention": (tokens, tokens, tokens, bank, own_bank, own_bank, num_heads, 1.0, packed),
    }
    for name, arguments in calls.items():
        assert operations(name, *arguments) == (counts[name], counts[name] + counts[f"{name}_backward"]), name


def test_heads_that_share_factors():
    """Each head of queries has its products with the factors' head."""
    factors, products = 5, 2 * BATCH * GROUPS * HEADS * 5 * LENGTH**2 * HEAD_DIM
    queries = torch.randn(BATCH, GROUPS * HEADS, LENGTH, HEAD_DIM)
    keys, weights = torch.randn(BATCH, HEADS, factors, LENGTH, HEAD_DIM), torch.randn(factors, LENGTH, LENGTH)
    pairs = torch.rand(BATCH, GROUPS * HEADS, LENGTH, LENGTH)
    # Forward; queries or probabilities, keys, and weights.
    assert operations("basis_scores", queries, keys, weights) == (products, 4 * products)
    assert operations("basis_values", pairs, keys, weights) == (products, 4 * products)


@pytest.fixture
def kernels():
    """The operators of the CUDA kernels, of tensors without values: nothing is launched."""
    pytest.importorskip("triton")
    for name in ("triton_basis", "triton_local", "triton_pairs"):
        importlib.import_module(f"translution.modeling.operators.{name}")
    return registration.operator


def empty(*shape):
    return torch.empty(*shape, device="meta")


def test_basis_kernel(kernels):
    layout, size, dense = PairLayout.for_text(LENGTH, LENGTH), 4, 5
    query, key, value = (empty(BATCH, HEADS, factors, LENGTH, size) for factors in (1, 3, 2))
    key_mix, value_mix = empty(LENGTH, 3), empty(LENGTH, 2)
    ones = [empty(BATCH, HEADS, LENGTH, dense) for _ in range(3)]
    for dense_parts in (ones, [None] * 3):
        given = (query, key, value, None, key_mix, value_mix, *dense_parts, None, 1.0, pack(layout))
        with FlopCounterMode(display=False) as counter:
            outputs = kernels("basis_attention")(*given)
            kernels("basis_attention_backward")(*outputs[:2], *outputs, *given)
        scores, values = 3 * size, 2 * size
        if dense_parts is ones:
            scores, values = scores + dense, values + dense
        pairs = BATCH * HEADS * len(text_distances())
        # Backward makes scores again and the gradients of both sides; gradients of the weights and of values.
        assert counter.get_total_flops() == 2 * pairs * (scores + values) + 2 * pairs * (3 * scores + 2 * values)


def test_heads_that_share_keys_count_as_copies():
    """Of every pair and head of queries a product with its key and one with its value, whoever else reads them."""
    layout = PairLayout.for_text(LENGTH, LENGTH, 3).near(0)
    totals = []
    for groups in (1, 2):
        heads = HEADS // groups
        near = [[empty(BATCH, LENGTH, count * HEAD_DIM) for _ in range(3)] for count in (heads, heads)]
        far = [empty(BATCH, count, LENGTH, HEAD_DIM) for count in (HEADS, heads, heads)]
        inputs = ([empty(BATCH, LENGTH, INNER)], *near, far)
        with FlopCounterMode(display=False) as counter:
            outputs = registration.operator("local_attention")(*inputs, None, None, HEADS, 1.0, pack(layout))
            registration.operator("local_attention_backward")(
                outputs[0], *outputs, *inputs, None, HEADS, 1.0, pack(layout)
            )
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_pair_kernels_count_as_the_grouped_pairs(kernels):
    layout = PairLayout.for_image(3, 2, 3, 2)
    tokens, pairs = empty(BATCH, PATCHES, HIDDEN), empty(BATCH, HEADS, PATCHES, PATCHES)
    bank = empty(layout.num_offsets, HIDDEN, INNER)
    calls = {
        "pair_scores": (tokens, tokens, bank, bank, HEADS, pack(layout)),
        "pair_scores_backward": (pairs, tokens, tokens, bank, bank, pack(layout), False, True),
        "pair_values": (pairs, tokens, bank, 1, pack(layout)),
    }
    for name, arguments in calls.items():
        totals = set()
        for prefix in ("", "gemm_", "triton_"):
            with FlopCounterMode(display=False) as counter:
                kernels(f"{prefix}{name}")(*arguments)
            totals.add(counter.get_total_flops())
        assert len(totals) == 1
        assert totals.pop() > 0


def test_every_formula_belongs_to_an_operator(kernels):
    """An operator without a formula cannot be registered."""
    assert all(registration.is_registered(name) for name in flops.FORMULAS)
    with pytest.raises(KeyError):
        flops.count_flops("no_operator", torch.ops.aten.add)

"""Local Translution with Triton kernels for near pairs, interpreted on a CPU or run on a GPU."""

import pytest
import torch
from local_pairs import attention_by_hand, operands
from small_layers import HIDDEN, make_mixer, relative_error
from small_models import assert_same, gradients, greedy, make_inputs, make_model, num_tokens
from torch.utils.flop_counter import FlopCounterMode

from translution import explain_dispatch
from translution.modeling.operators import dispatch, far_blocks, local, registration
from translution.modeling.operators.dispatch import AUTO, EAGER, TRITON
from translution.modeling.operators.pair_autograd import pack
from translution.modeling.operators.pair_layout import PairLayout


pytest.importorskip("triton")

from triton_devices import DEVICE, EXACT, TOLERANCE

from translution.modeling.kernels import launch
from translution.modeling.operators import triton_local


pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS, SCALE = 2, 0.7


def moved(arguments, dtype):
    """What `operands` gives, on the device of the kernels and in a type."""

    def move(given):
        if isinstance(given, list):
            return [move(one) for one in given]
        if not isinstance(given, torch.Tensor):
            return given
        given = given.detach().double().to(DEVICE)
        # What hides a pair is the lowest number of its own type.
        given = given if dtype == torch.float64 else given.clamp(min=torch.finfo(dtype).min)
        return given.to(dtype).requires_grad_()

    return [move(given) for given in arguments]


def results(function, arguments, has_far=True, biased=False, heads=HEADS):
    """Output, and gradients of a fixed random combination of it."""
    queries, keys, values, far, layout, near_bias, far_bias = arguments
    far, far_bias = (far, far_bias) if has_far else (None, None)
    biases = (near_bias.detach(), None if far_bias is None else far_bias.detach()) if biased else (None, None)
    output = function(queries, keys, values, far, heads, SCALE, layout, *biases)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [*queries, *keys, *values, *(far or [])]
    total = (output * weight.to(output)).sum()
    return [output.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_close(found, expected, tolerance=TOLERANCE):
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        largest = max(1, other.abs().max().item())
        assert (one - other).abs().max().item() <= tolerance * largest, index


# The interpreter takes its time for each term and head: one image has rows and columns, the others one of them.
CASES = [
    (6, "kv", True, False),
    (4, "q", True, True),
    (3, "k", False, True),
    ((3, 4), "qkv", True, True),
    ((4, 1), "v", True, False),
    ((1, 4), "qk", False, False),
    ((1, 1), "kv", False, False),
]


@pytest.mark.parametrize(("size", "each", "has_far", "biased"), CASES, ids=str)
def test_equals_a_loop(size, each, has_far, biased):
    arguments = operands(size, each, batch=2 if size == 6 else 1)
    expected = results(attention_by_hand, arguments, has_far, biased)
    found = results(triton_local.local_attention, moved(arguments, EXACT), has_far, biased)
    assert_close(found, [one.to(DEVICE) for one in expected])


@pytest.mark.parametrize(
    ("size", "each", "has_far", "biased", "groups"),
    [
        (5, "kv", True, False, 2),
        (3, "q", True, True, 3),
        (3, "k", False, True, 2),
        ((2, 3), "qkv", True, True, 2),
        ((4, 1), "v", True, False, 3),
        ((1, 4), "qk", False, False, 2),
    ],
    ids=str,
)
def test_heads_that_share_keys_equal_a_loop(size, each, has_far, biased, groups):
    arguments, heads = operands(size, each, batch=1, groups=groups), HEADS * groups
    expected = results(attention_by_hand, arguments, has_far, biased, heads)
    found = results(triton_local.local_attention, moved(arguments, EXACT), has_far, biased, heads)
    assert_close(found, [one.to(DEVICE) for one in expected])


@pytest.mark.parametrize(("size", "each", "most"), [(9, "kv", 1), ((1, 5), "v", 3)], ids=str)
def test_several_programs_and_launches_with_heads_that_share_keys(size, each, most, monkeypatch):
    monkeypatch.setattr(triton_local, "_TILES", ((16, 4, 1),))
    monkeypatch.setattr(triton_local, "MAX_TERMS", most)
    arguments = moved(operands(size, each, batch=2, groups=2), EXACT)
    found, expected = (results(place.local_attention, arguments, heads=2 * HEADS) for place in (triton_local, local))
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("distance", "features", "wide", "batch"), [(1, 8, 8, 2), (2, 16, 24, 3), (3, 24, 16, 1), (1, 64, 64, 1)], ids=str
)
def test_head_sizes(distance, features, wide, batch):
    arguments = operands(5, "kv", batch=batch, features=features, wide=wide, distance=distance)
    expected = results(attention_by_hand, arguments)
    assert_close(results(triton_local.local_attention, moved(arguments, EXACT)), [one.to(DEVICE) for one in expected])


@pytest.mark.parametrize(("size", "each"), [(21, "kv"), ((1, 9), "v")], ids=str)
def test_several_programs(size, each, monkeypatch):
    """More tokens than a program has, the last of which has less than its share; far pairs in several blocks."""
    monkeypatch.setattr(triton_local, "_TILES", ((32, 4, 1),))
    monkeypatch.setattr(far_blocks, "BIAS_ELEMENTS", 60)
    arguments = moved(operands(size, each, batch=1), EXACT)
    assert_close(results(triton_local.local_attention, arguments), results(local.local_attention, arguments))


@pytest.mark.parametrize(("size", "each", "most"), [((1, 4), "qk", 1), ((4, 1), "v", 3), (5, "k", 1)], ids=str)
def test_more_terms_than_a_launch_takes(size, each, most, monkeypatch):
    monkeypatch.setattr(triton_local, "MAX_TERMS", most)
    arguments = moved(operands(size, each, batch=1), EXACT)
    assert_close(results(triton_local.local_attention, arguments), results(local.local_attention, arguments))


def test_an_empty_batch():
    arguments = moved(operands(4, "kv", batch=0), EXACT)
    output, *gradients = results(triton_local.local_attention, arguments)
    assert output.shape == (0, 4, 8)
    assert [gradient.shape[0] for gradient in gradients] == [0] * len(gradients)


@pytest.mark.parametrize("past", [1, 3])
def test_tokens_before_the_queries(past):
    """As with a cache: near keys of `past` tokens more, and far ones of all."""
    queries, distance = 4, 3
    whole = PairLayout.for_text(queries + past, queries + past, distance, past=past)
    near = whole.near(min(past, distance - 1))

    def make(*shape):
        return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)

    keys, values = ([make(near.height, 6) for _ in range(distance)] for _ in range(2))
    far = [make(HEADS, tokens, 3) for tokens in (queries, queries + past, queries + past)]
    arguments = moved([[make(queries, 6)], keys, values, far, near, None, None], EXACT)
    assert_close(results(triton_local.local_attention, arguments), results(local.local_attention, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "each"), [(7, "kv"), ((1, 4), "qkv")], ids=str)
def test_lower_precision_within_twice_plain_pytorch(size, each, dtype):
    arguments = moved(operands(size, each, batch=1, features=8, wide=8), dtype)
    plain, found = (results(module.local_attention, arguments) for module in (local, triton_local))
    truth = results(local.local_attention, moved(arguments, torch.float64))
    for index, exact in enumerate(truth):
        assert found[index].dtype == dtype
        allowed = 2 * relative_error(plain[index], exact) + torch.finfo(dtype).eps
        assert relative_error(found[index], exact) <= allowed, index


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_scores_far_from_zero(extreme):
    """Near scores may be greater than far ones by far, or less."""
    arguments = operands(4, "kv", batch=1)
    with torch.no_grad():
        arguments[1][1] *= extreme
    expected = results(attention_by_hand, arguments)
    assert_close(results(triton_local.local_attention, moved(arguments, EXACT)), [one.to(DEVICE) for one in expected])


@pytest.mark.parametrize("groups", [1, 2])
def test_the_operators_are_ones_that_pytorch_knows(groups):
    queries, keys, values, far, layout, *_ = moved(operands(3, "kv", batch=1, groups=groups), torch.float32)
    arguments = (queries, keys, values, far, None, None, HEADS * groups, SCALE, pack(layout))
    # That it can be traced is tested with a mixer.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registration.operator("triton_local_attention").default, arguments, test_utils=checks)


# Models

MODELS = {
    "text": ("text", "local-rotary", {"relative_projections": "kv", "max_relative_distance": 3}),
    "low-rank": ("text", "lor-qkv", {"max_relative_distance": 2}),
    "basis": ("text", "basis-kv-clamped", {}),
    "shared": ("image", "local-rotary", {"max_relative_distance": 1, "image_size": [4, 15]}),
    "clamped": ("image", "full-kv", {"max_relative_distance": 1, "image_size": [12, 15]}),
}


def local_model(name, dtype=EXACT):
    modality, variant, fields = MODELS[name]
    return make_model(modality, variant, dtype, num_hidden_layers=1, **fields).to(DEVICE)


def inputs_of(model):
    made = {name: tensor.to(DEVICE) for name, tensor in make_inputs(model.config, 1, 5).items()}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in made.items()}


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in MODELS), ("text", True), ("shared", True)], ids=str
)
def test_models_equal_the_reference(name, masked):
    model = local_model(name)
    inputs = inputs_of(model)
    if masked:
        mask = torch.ones(1, num_tokens(model.config, 5), dtype=torch.long, device=DEVICE)
        mask[0, 1:3] = 0
        inputs["attention_mask"] = mask
    found = {}
    for implementation in (EAGER, TRITON):
        model.set_attn_implementation(implementation)
        with dispatch._recorded() as choices:
            found[implementation] = gradients(model, inputs)
    assert choices[0][2].path == "local_kernel"
    assert_same(found[TRITON], found[EAGER], TOLERANCE)


def test_generation():
    model = local_model("text")
    ids = torch.randint(1, 19, (1, 5), device=DEVICE)
    expected = greedy(model, ids, 3)
    model.set_attn_implementation(TRITON)
    assert " local_kernel: near pairs by a CUDA kernel" in explain_dispatch(model, ids)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).equal(expected)


def test_operations_are_counted_as_those_of_plain_pytorch():
    counts = []
    model = local_model("text")
    inputs = inputs_of(model)
    for implementation in (AUTO, TRITON):
        model.set_attn_implementation(implementation)
        with FlopCounterMode(display=False) as counter:
            model(**inputs).logits.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_one_graph():
    torch.compiler.reset()  # other tests of this process compile the same code too, and their number is limited
    layout = PairLayout.for_text(3, 3, 1)
    mixer = make_mixer(layout, "kv").to(DEVICE, torch.float32)
    mixer.config._attn_implementation = TRITON
    tokens = torch.randn(1, 3, HIDDEN, device=DEVICE)
    results = []
    for run in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        mixer.zero_grad()
        output, _ = run(tokens, layout)
        output.sum().backward()
        results.append((output.detach(), mixer.k_bank.grad))
    torch.testing.assert_close(*results)


def test_what_a_kernel_of_several_tensors_is_compiled_for():
    """What did not fit once is not tried again, unless types or addresses of the tensors differ."""
    aligned, longer = torch.zeros(8), torch.zeros(9)
    first, again, other, unaligned = (
        launch._compiled_for("kernel", torch.device("cpu"), {"keys": keys})
        for keys in ((aligned, longer), (longer, aligned), (aligned, longer.half()), (aligned, longer[1:]))
    )
    assert first == again
    assert len({first, other, unaligned}) == 3

"""`TranslutionAttention`, the layer for networks in plain PyTorch: what it computes by its formula, masks, other grids, bad input."""

import copy
import io
import re

import pytest
import torch
from closeness import assert_close_in_rounding
from torch.nn import functional as F
from triton_devices import DEVICE

from translution import TranslutionAttention, TranslutionConfig, TranslutionModel, explain_dispatch
from translution.modeling.mixers.masks import make_mask
from translution.modeling.operators.pair_layout import bank_layout


BATCH, DIM, HEADS, HEAD_DIM, GRID = 2, 6, 2, 4, (3, 5)
TEXT = {"causal": True}
TOKENS = {"grid_size": GRID, "class_token": True}
# Sums over tokens of products of projections, and their gradients: more roundings than one product has.
ROUNDINGS = 512


def make_layer(dtype=torch.float64, **fields):
    layer = TranslutionAttention(DIM, HEADS, **{"head_dim": HEAD_DIM, **fields}).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def make_input(layer, length=9, grid=GRID, dtype=torch.float64):
    if layer.causal:
        return torch.randn(BATCH, length, DIM, dtype=dtype)
    if layer.grid_size is not None:
        return torch.randn(BATCH, grid[0] * grid[1] + layer.class_token, DIM, dtype=dtype)
    return torch.randn(BATCH, *grid, DIM, dtype=dtype)


def make_token_mask(x):
    """Hides two tokens of the first sequence, and none of the others; each query sees something."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    mask.view(BATCH, -1)[0, [3, -1]] = False
    return mask


# By hand


def row_of(layer, i, j, grid):
    """The bank row of the offset from `j` to `i`; of a text that of their distance."""
    distance, reach = layer.mixer.config.max_relative_distance, grid
    if layer.causal:
        return max(i - j, 0) if distance is None else min(max(i - j, 0), distance)
    shared = layer.mixer.config.far_offsets == "shared"
    if distance is not None:
        reach = (distance + 1, distance + 1)
    window = (2 * reach[0] - 1) * (2 * reach[1] - 1)
    first = int(layer.class_token)
    if min(i, j) < first:
        return window + int(shared) + (0 if i == j else 1 if i < first else 2)
    steps = [a - b for a, b in zip(divmod(i - first, grid[1]), divmod(j - first, grid[1]), strict=True)]
    if shared and any(abs(step) >= size for step, size in zip(steps, reach, strict=True)):
        return window
    down, right = (max(1 - size, min(step, size - 1)) for step, size in zip(steps, reach, strict=True))
    return (down + reach[0] - 1) * (2 * reach[1] - 1) + right + reach[1] - 1


def angles_of(layer, count, grid):
    """The angle of each token and pair of features, `[L, d / 2]`."""
    token = torch.arange(count, dtype=torch.float64)[:, None]
    if layer.causal:
        return token * 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM).double()
    place = token - int(layer.class_token)
    speeds = 10000.0 ** -(torch.arange(0, HEAD_DIM // 2, 2) / (HEAD_DIM // 2)).double()
    angles = torch.cat([(place // grid[1]) * speeds, (place % grid[1]) * speeds], dim=-1)
    return angles * (place >= 0)


def by_hand(layer, x, mask=None, grid=GRID):
    """Full Translution by its formula, each pair of tokens projected for itself."""
    mixer, tokens = layer.mixer, x.flatten(1, -2)
    count = tokens.shape[1]
    rows = torch.tensor([[row_of(layer, i, j, grid) for j in range(count)] for i in range(count)])
    # A text's queries have the matrix of the same distance.
    reverse = rows if layer.causal else rows.T

    def project(name):
        if name not in mixer.relative:
            projected = getattr(mixer, f"{name}_proj")(tokens)
            pairs = projected[:, :, None] if name == "q" else projected[:, None]
            return pairs.expand(-1, count, count, -1).unflatten(-1, (HEADS, HEAD_DIM))
        used = reverse if name == "q" else rows
        index = "bic,ijcd->bijd" if name == "q" else "bjc,ijcd->bijd"
        pairs = torch.einsum(index, tokens, getattr(mixer, f"{name}_bank")[used])
        bias = getattr(mixer, f"{name}_bias_bank")
        return (pairs if bias is None else pairs + bias[used]).unflatten(-1, (HEADS, HEAD_DIM))

    query, key, value = (project(name) for name in "qkv")
    if mixer.rotary:
        angles = angles_of(layer, count, grid)
        turns = torch.polar(torch.ones_like(angles), angles)

        def rotate(pairs, turn):
            turned = torch.complex(*pairs.chunk(2, dim=-1)) * turn
            return torch.cat([turned.real, turned.imag], dim=-1)

        query, key = rotate(query, turns[:, None, None]), rotate(key, turns[None, :, None])
    scores = (query * key).sum(-1) / HEAD_DIM**0.5
    seen = torch.ones(count, count, dtype=torch.bool)
    seen = (seen.tril() if layer.causal else seen).expand(BATCH, -1, -1)
    if mask is not None:
        seen = seen & mask.flatten(1)[:, None]
    weights = scores.masked_fill(~seen[..., None], -torch.inf).softmax(dim=2)
    return mixer.o_proj((weights[..., None] * value).sum(2).flatten(2)).view(x.shape)


def results(layer, x, run, weight):
    x = x.clone().requires_grad_()
    output = run(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((output * weight).sum(), [x, *parameters])
    return dict(zip(["output", "x", *names], [output, *gradients], strict=True))


def assert_results(actual, expected):
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values()).item()
    for name, value in expected.items():
        # Two gradients may cancel, where rounding is of what they were.
        assert (actual[name] - value).abs().max().item() <= ROUNDINGS * torch.finfo(value.dtype).eps * largest, name
        # What is added to all keys alike changes no probability, unless keys are rotated.
        assert name == "mixer.k_proj.bias" or value.abs().max() > 1e-6 * largest, f"{name} is compared with nothing"


CASES = {
    "grid": {},
    "grid-rotary-qkv": {"rotary": True, "relative_projections": "qkv"},
    "grid-clamped": {"far_offsets": "clamped"},
    "grid-clamped-rotary": {"far_offsets": "clamped", "rotary": True},
    "grid-biases": {"qkv_bias": True, "relative_projections": "qv"},
    "grid-all-offsets": {"max_relative_distance": None, "grid_size": GRID},
    "class-token": TOKENS,
    "class-token-rotary": {**TOKENS, "rotary": True},
    "class-token-all-offsets": {**TOKENS, "max_relative_distance": None},
    "tokens-of-a-grid": {"grid_size": GRID, "relative_projections": "q"},
    "text": TEXT,
    "text-biases-plain": {**TEXT, "rotary": False, "qkv_bias": True},
    "text-all-offsets": {**TEXT, "max_relative_distance": None, "max_length": 9},
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_formula(name, masked):
    layer = make_layer(**CASES[name])
    x = make_input(layer)
    mask = make_token_mask(x) if masked else None
    weight = torch.randn_like(x)
    expected = results(layer, x, lambda x: by_hand(layer, x, mask), weight)
    for implementation in ("auto", "eager"):
        layer.mixer.config._attn_implementation = implementation
        assert_results(results(layer, x, lambda x: layer(x, mask), weight), expected)


FORMS = {
    "low-rank": {"relative_rank": 2},
    "low-rank-biases": {"relative_rank": 2, "qkv_bias": True},
    "basis": {"offset_basis": 3},
    "basis-biases": {"offset_basis": 3, "qkv_bias": True},
    "low-rank-basis": {"relative_rank": 2, "offset_basis": 3},
}


@pytest.mark.parametrize("where", [{}, TOKENS, TEXT], ids=["grid", "class-token", "text"])
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_their_reference(form, where):
    layer = make_layer(**where, **FORMS[form])
    x = make_input(layer)
    mask, weight = make_token_mask(x), torch.randn_like(x)
    twin = copy.deepcopy(layer)
    twin.mixer.config._attn_implementation = "eager"
    assert "reference" in explain_dispatch(twin, x)
    assert "reference" not in explain_dispatch(layer, x)
    assert_results(
        results(layer, x, lambda x: layer(x, mask), weight), results(twin, x, lambda x: twin(x, mask), weight)
    )


def test_the_kernel_serves_a_grid_without_a_class_token():
    layer = make_layer(torch.float32, attn_implementation="triton").to(DEVICE)
    x = make_input(layer, grid=(1, 4), dtype=torch.float32).to(DEVICE)
    mask, weight = make_token_mask(x), torch.randn_like(x)
    assert "  local_kernel: " in explain_dispatch(layer, x, mask)
    found = results(layer, x, lambda x: layer(x, mask), weight)
    twin = copy.deepcopy(layer).double()
    twin.mixer.config._attn_implementation = "eager"
    expected = results(twin, x.double(), lambda x: twin(x, mask), weight.double())
    for name, value in expected.items():
        assert_close_in_rounding(found[name], value.float(), ROUNDINGS)


@pytest.mark.parametrize("where", [{}, TOKENS, TEXT], ids=["grid", "class-token", "text"])
def test_defaults_are_local_translution(where):
    layer = TranslutionAttention(16, 2, **where)
    config = layer.mixer.config
    expected = TranslutionConfig.from_size("tiny", "local", modality="text" if layer.causal else "image")
    assert config.max_relative_distance == expected.max_relative_distance
    assert config.relative_projections == expected.relative_projections
    assert config.mixer_types[0] == expected.mixer_types[0]
    # 3 × 3 near offsets and one for all others, and those of a class token; or three distances and one.
    assert layer.mixer.k_bank.shape == (4 if layer.causal else 13 if layer.class_token else 10, 16, 16)
    x = torch.randn(1, 16, 16) if where else torch.randn(1, 3, 5, 16)
    assert "  local: " in explain_dispatch(layer, x)


def test_is_the_layer_of_a_model():
    grid, fields = (3, 5), {"max_relative_distance": 1, "far_offsets": "shared"}
    config = TranslutionConfig(
        image_size=grid, patch_size=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, **fields
    )
    mixer = TranslutionModel(config).layers[0].mixer.double()
    layer = TranslutionAttention(16, 2, grid_size=grid, class_token=True).double()
    assert layer.mixer.load_state_dict(mixer.state_dict())
    x, layout = torch.randn(BATCH, 16, 16, dtype=torch.float64), bank_layout(config)
    assert_close_in_rounding(layer(x), mixer(x, layout, make_mask(None, layout, x))[0])


@pytest.mark.parametrize("bias", [False, True], ids=["no-biases", "biases"])
@pytest.mark.parametrize("form", [{}, {"offset_basis": 4}, {"relative_rank": 8}], ids=["full", "basis", "low-rank"])
def test_initial_weights_are_those_of_a_linear(form, bias):
    layer = TranslutionAttention(64, 2, head_dim=48, qkv_bias=bias, **form)
    biases = 0
    for name, weight in layer.named_parameters():
        if name.endswith(("_bias_bank", ".bias")):
            assert (weight == 0).all(), name
            biases += 1
            continue
        if name.endswith("_factors") and bias:
            assert (weight[:, -1] == 0).all(), name
            weight = weight[:, :-1]
            biases += 1
        # Banks are `[offsets, in, out]`, Linears `[out, in]`.
        size = weight.shape[1]
        if name.endswith("_coefficients"):
            assert weight.std().item() == pytest.approx(size**-0.5, rel=0.5), name
            continue
        assert weight.abs().max() <= size**-0.5, name
        # Of at least 96 uniform numbers.
        assert weight.std().item() == pytest.approx((3 * size) ** -0.5, rel=0.15), name
    assert biases == (4 if bias else 1)


# Other sizes


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("grid", [(5, 2), (1, 4), (2, 2), (6, 7)], ids=str)
def test_a_distance_serves_every_grid(grid, rotary):
    layer = make_layer(rotary=rotary)
    x = make_input(layer, grid=grid)
    expected = by_hand(layer, x, grid=grid)
    assert_close_in_rounding(layer(x), expected, ROUNDINGS)
    assert_close_in_rounding(layer(x.flatten(1, 2), grid_size=grid).view(x.shape), expected, ROUNDINGS)


def test_another_grid_resamples():
    layer = make_layer(max_relative_distance=None, grid_size=(4, 4))
    with torch.no_grad():
        for bank in (layer.mixer.k_bank, layer.mixer.v_bank):
            bank.copy_(bank[:1].clone().expand_as(bank))
    x = torch.randn(BATCH, 3, 5, DIM, dtype=torch.float64)
    tokens, mixer = x.flatten(1, 2), layer.mixer
    # With one matrix for all offsets it is attention.
    heads = [mixer.q_proj(tokens), tokens @ mixer.k_bank[0], tokens @ mixer.v_bank[0]]
    attended = F.scaled_dot_product_attention(*(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in heads))
    expected = mixer.o_proj(attended.transpose(1, 2).flatten(2)).view(x.shape)
    # Weights of an interpolation sum to 1 up to rounding.
    assert_close_in_rounding(layer(x), expected, ROUNDINGS)


# As a module


@pytest.mark.parametrize("where", [{}, TOKENS, TEXT], ids=["grid", "class-token", "text"])
def test_what_is_hidden_changes_nothing(where):
    layer = make_layer(**where)
    x = make_input(layer)
    mask = make_token_mask(x)
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    assert not torch.equal(x, other)
    assert_close_in_rounding(layer(other, mask)[mask], layer(x, mask)[mask])


@pytest.mark.parametrize(
    "fields", [{}, {"max_relative_distance": None, "max_length": 9}], ids=["local", "all-offsets"]
)
def test_text_does_not_see_the_future(fields):
    layer = make_layer(causal=True, **fields)
    x = make_input(layer)
    output = layer(x)
    for length in range(1, 9):
        changed = torch.cat([x[:, :length], torch.randn_like(x[:, length:])], dim=1)
        found = layer(changed)
        assert_close_in_rounding(found[:, :length], output[:, :length])
        assert (found[:, length:] - output[:, length:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_weights_travel(name):
    layer, other = make_layer(**CASES[name]), make_layer(**CASES[name])
    x, file = make_input(layer), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not torch.equal(layer.mixer.o_proj.weight, other.mixer.o_proj.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(layer)
    for made in (other, copied):
        for key, value in layer.state_dict().items():
            assert torch.equal(made.state_dict()[key], value)
            assert made.state_dict()[key].data_ptr() != value.data_ptr()
        assert_close_in_rounding(made(x), layer(x))
    copied.mixer.config._attn_implementation = "eager"
    assert layer.mixer.config._attn_implementation == "auto"


@pytest.mark.parametrize("where", [{}, TOKENS, TEXT], ids=["grid", "class-token", "text"])
def test_autocast(where):
    layer = make_layer(torch.float32, **where)
    x = make_input(layer, dtype=torch.float32)
    mask, weight = make_token_mask(x), torch.randn_like(x)
    expected = results(layer, x, lambda x: layer(x, mask), weight)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, mask)

    found = results(layer, x, run, weight)
    assert found["output"].dtype == torch.bfloat16
    for name, value in expected.items():
        if name != "output":
            assert found[name].dtype == torch.float32, name
        # Projections, scores, values and output are each rounded to 8 bits.
        assert (found[name].float() - value).norm() <= 16 * torch.finfo(torch.bfloat16).eps * value.norm(), name


def test_dropout_is_for_training_alone():
    layer = make_layer(dropout=0.5)
    x = make_input(layer)
    assert (layer(x) - layer(x)).abs().max() > 1e-3
    layer.eval()
    assert_close_in_rounding(layer(x), by_hand(layer, x), ROUNDINGS)


# Bad input

BAD_ARGUMENTS = {
    "dim": ({"dim": 0}, "`dim` must be a multiple of `num_heads`.* got 0 and 8"),
    "num_heads": ({"num_heads": 5}, "`dim` must be a multiple of `num_heads`.* got 16 and 5"),
    "num_heads-type": ({"num_heads": "4", "head_dim": 4}, "'num_heads' expected int, got str"),
    "head_dim": ({"head_dim": 0}, "`head_dim` must be an integer of at least 1.* got 0"),
    "dropout": ({"dropout": 1.5}, "`dropout` must be at least 0 and less than 1, got 1.5"),
    "relative_projections": ({"relative_projections": "kq"}, "`relative_projections` must be one of 'qkv'.* got 'kq'"),
    "distance": ({"max_relative_distance": -1}, "`max_relative_distance` must be an integer of at least 0.* got -1"),
    "far_offsets": ({"far_offsets": "none"}, "`far_offsets` must be one of 'clamped', 'shared', got 'none'"),
    "rotary": ({"rotary": "no"}, "`rotary` must be True, False or 'auto', got 'no'"),
    "rotary-size": ({"rotary": True, "head_dim": 6}, "`head_dim` must be a multiple of 4.* got 6"),
    "rotary-all-offsets": (
        {"rotary": True, "max_relative_distance": None, "grid_size": 3},
        "`rotary` True needs an integer `relative_rank` or `max_relative_distance`",
    ),
    "no-grid": ({"max_relative_distance": None}, "`grid_size` must be given where `max_relative_distance` is None"),
    "no-length": (
        {"causal": True, "max_relative_distance": None},
        "`max_length` must be given where `max_relative_distance` is None",
    ),
    "length": ({"causal": True, "max_length": 9}, "`max_length` must be None unless.* got 9"),
    "length-0": (
        {"causal": True, "max_relative_distance": None, "max_length": 0},
        "`max_length` must be an integer of at least 1.* got 0",
    ),
    "grid": ({"grid_size": (3, 0)}, r"`grid_size` must be a positive int or \(height, width\) of such, got \(3, 0\)"),
    "grid-of-a-text": ({"causal": True, "grid_size": 3}, "`grid_size` must be None and `class_token` False, got 3"),
    "class-token-of-a-text": ({"causal": True, "class_token": True}, "got None and True"),
    "implementation": ({"attn_implementation": "sdpa"}, "`attn_implementation` must be 'auto', .* got 'sdpa'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    fields, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        TranslutionAttention(**{"dim": 16, **fields})


GRID_OR_TOKENS = "`x` must be [batch, height, width, 6] or [batch, tokens, 6]"
BAD_INPUTS = {
    "2-d": ({}, (2, 6), {}, f"{GRID_OR_TOKENS}, with at least one token, got shape [2, 6]"),
    "features": ({}, (2, 3, 5, 7), {}, f"{GRID_OR_TOKENS}, with at least one token, got shape [2, 3, 5, 7]"),
    "empty": ({}, (2, 0, 5, 6), {}, "with at least one token, got shape [2, 0, 5, 6]"),
    "no-grid": ({}, (2, 15, 6), {}, "`grid_size` must be given"),
    "grid-twice": ({}, (2, 3, 5, 6), {"grid_size": 3}, "`grid_size` must be None where `x` is [batch, height"),
    "count": ({"grid_size": GRID}, (2, 16, 6), {}, "as many tokens as `grid_size` says, 3 · 5, got 16"),
    "no-class-token": (TOKENS, (2, 15, 6), {}, "says, 3 · 5 and a class token, got 15"),
    "class-token-in-a-grid": (TOKENS, (2, 3, 5, 6), {}, "`x` must be [batch, tokens, 6], with"),
    "grid-as-text": (TEXT, (2, 3, 5, 6), {}, "`x` must be [batch, tokens, 6], with"),
    "grid-of-a-text": (TEXT, (2, 9, 6), {"grid_size": 3}, "`grid_size` must be None where `causal` is True, got 3"),
    "length": (
        {**TEXT, "max_relative_distance": None, "max_length": 8},
        (2, 9, 6),
        {},
        "`x` must have at most `max_length` 8 tokens, got 9",
    ),
    "mask-type": (TEXT, (2, 9, 6), {"mask": torch.ones(2, 9)}, "`mask` must be bool [2, 9]"),
    "mask-shape": (TEXT, (2, 9, 6), {"mask": torch.ones(2, 8).bool()}, "got torch.bool of shape [2, 8]"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    fields, shape, options, message = BAD_INPUTS[name]
    layer = make_layer(**fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.randn(shape, dtype=torch.float64), **options)


def test_integers_are_no_features():
    with pytest.raises(ValueError, match=r"`x` must be of a floating point dtype, got torch.int64"):
        make_layer()(torch.ones(2, 3, 5, DIM, dtype=torch.long))

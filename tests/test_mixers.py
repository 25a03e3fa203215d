"""The family of mixers: identities between its members, the original ACmix, other sizes of input, shifts."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from small_layers import LargestTensor
from torch.nn import functional as F

from translution import TranslutionConfig, TranslutionForImageClassification, TranslutionModel
from translution.configuration.configuration_translution import MIXER_TYPES
from translution.modeling.mixers.acmix import ACmixMixer
from translution.modeling.mixers.attention import RelativeBiasAttentionMixer, RelativeVectorAttentionMixer
from translution.modeling.mixers.convolution import ConvolutionMixer
from translution.modeling.mixers.masks import ALL_VISIBLE, AttentionMask, make_mask
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.models.modeling_translution import build_mixer
from translution.modeling.operators import basis, grouped, reference
from translution.modeling.operators.pair_layout import PairLayout, StepLayout
from translution.modeling.operators.resampling import resample_offsets, resample_positions


REFERENCE = Path(__file__).parent / "reference"
BATCH, HIDDEN, HEADS, HEAD_DIM = 2, 12, 3, 4


def make_config(modality="image", grid=(3, 4), length=7, **fields):
    values = {
        "modality": modality,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "intermediate_size": 20,
        "image_size": [2 * grid[0], 2 * grid[1]],
        "patch_size": 2,
        "max_position_embeddings": length,
        "vocab_size": 11,
        "initializer_range": 0.3,
    }
    return TranslutionConfig(**{**values, **fields})


def layout_of(config, length=7):
    if config.modality == "text":
        return PairLayout.for_text(length, config.max_position_embeddings, config.max_relative_distance)
    height, width = config.grid_height_width
    return PairLayout.for_image(height, width, height, width, config.max_relative_distance)


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return module.double()


def mask_of(layout, dtype=torch.float64):
    """The causal mask where there is one."""
    if not layout.causal:
        return ALL_VISIBLE
    ahead = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool).triu(1)[None, None]
    return AttentionMask(torch.zeros(ahead.shape, dtype=dtype).masked_fill(ahead, torch.finfo(dtype).min))


def tokens_of(layout):
    return torch.randn(BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)


# Translution is convolution, and is self-attention


@pytest.mark.parametrize("operators", [grouped, reference], ids=["grouped", "reference"])
@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_uniform_window_is_conv2d(operators, grid, kernel_size):
    height, width = grid
    layout = PairLayout(height, width, class_token=False, causal=False, bank_height=height, bank_width=width)
    bank = torch.randn(layout.num_offsets, HIDDEN, 5, dtype=torch.float64)
    tokens = tokens_of(layout)
    x, y = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    reach = kernel_size // 2
    window = ((x[:, None] - x).abs() <= reach) & ((y[:, None] - y).abs() <= reach)
    output = operators.pair_values(window.double().expand(BATCH, 1, -1, -1), tokens, bank, layout)
    # The kernel's taps, from the same bank: an offset that the grid does not have is never read.
    kernel = torch.zeros(5, HIDDEN, kernel_size, kernel_size, dtype=torch.float64)
    for row_offset in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for column_offset in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            kernel[:, :, reach - row_offset, reach - column_offset] = bank[layout.row(row_offset, column_offset)].T
    expected = F.conv2d(tokens.transpose(1, 2).unflatten(2, grid), kernel, padding=reach).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operators", [grouped, reference], ids=["grouped", "reference"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_uniform_window_is_causal_conv1d(operators, kernel_size):
    length = 7
    layout = PairLayout.for_text(length, length)
    bank = torch.randn(length, HIDDEN, 5, dtype=torch.float64)
    tokens = tokens_of(layout)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    window = ((distance >= 0) & (distance < kernel_size)).double().expand(BATCH, 1, -1, -1)
    output = operators.pair_values(window, tokens, bank, layout)
    kernel = bank[:kernel_size].flip(0).permute(2, 1, 0)
    expected = F.conv1d(F.pad(tokens.transpose(1, 2), (kernel_size - 1, 0)), kernel).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_convolution_mixer_is_translution_with_uniform_weights(modality, kernel_size):
    config = make_config(modality, mixer_types="convolution", kernel_size=kernel_size)
    layout, mixer = layout_of(config), randomise(ConvolutionMixer(config, 0))
    tokens = tokens_of(layout)
    output, _ = mixer(tokens, layout)
    bank = torch.zeros(layout.num_offsets, HIDDEN, HEADS * HEAD_DIM, dtype=torch.float64)
    weight = torch.zeros(layout.num_offsets, dtype=torch.float64)
    reach = kernel_size // 2
    if modality == "text":
        bank[:kernel_size], weight[:kernel_size] = mixer.window_weight, 1
    else:
        taps = mixer.window_weight.unflatten(0, (kernel_size, kernel_size))
        for row_offset in range(-min(reach, 2), min(reach, 2) + 1):
            for column_offset in range(-min(reach, 3), min(reach, 3) + 1):
                bank[layout.row(row_offset, column_offset)], weight[layout.row(row_offset, column_offset)] = (
                    taps[row_offset + reach, column_offset + reach],
                    1,
                )
        bank[layout.num_grid_offsets], weight[layout.num_grid_offsets] = mixer.class_proj.weight.T, 1
    rows, _ = layout.offsets()
    pairs = (weight[rows.clamp(min=0)] * (rows >= 0)).expand(BATCH, 1, -1, -1)
    expected = mixer.o_proj(reference.pair_values(pairs, tokens, bank, layout))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_equal_matrices_are_self_attention(modality):
    config = make_config(modality, relative_projections="qkv")
    layout, mixer = layout_of(config), randomise(TranslutionMixer(config, 0))
    attention = randomise(build_mixer(make_config(modality, mixer_types="attention"), 0))
    with torch.no_grad():
        for name in "qkv":
            getattr(mixer, f"{name}_bank").copy_(getattr(attention, f"{name}_proj").weight.T)
        attention.o_proj.load_state_dict(mixer.o_proj.state_dict())
    tokens, mask = tokens_of(layout), mask_of(layout)
    expected, _ = attention(tokens, layout, mask)
    torch.testing.assert_close(mixer(tokens, layout, mask)[0], expected, rtol=1e-11, atol=1e-12)


# Basis Translution


def full_and_basis(modality, subset, rank, basis, clamp=None):
    fields = {"relative_projections": subset, "relative_rank": rank, "max_relative_distance": clamp}
    full_config = make_config(modality, **fields)
    basis_config = make_config(modality, offset_basis=basis, **fields)
    full, mixed = randomise(TranslutionMixer(full_config, 0)), randomise(TranslutionMixer(basis_config, 0))
    shared = {name: value for name, value in mixed.state_dict().items() if name in full.state_dict()}
    full.load_state_dict(shared, strict=False)
    return full, mixed, layout_of(full_config)


@pytest.mark.parametrize("clamp", [None, 1], ids=["", "clamped"])
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lor"])
@pytest.mark.parametrize("subset", ["qkv", "qk", "qv", "kv", "q", "k", "v"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_basis_equals_the_built_bank(modality, subset, rank, clamp):
    full, mixed, layout = full_and_basis(modality, subset, rank, 3, clamp)
    with torch.no_grad():
        for name in subset:
            coefficients, factors = getattr(mixed, f"{name}_coefficients"), getattr(mixed, f"{name}_factors")
            bank = sum(coefficients[:, m, None, None] * factors[m] for m in range(3))
            getattr(full, f"{name}_bank").copy_(bank)
    tokens, mask = tokens_of(layout), mask_of(layout)
    expected = full(tokens, layout, mask)[0]
    torch.testing.assert_close(mixed(tokens, layout, mask)[0], expected, rtol=1e-10, atol=1e-11)
    # The eager path builds the bank: gradients of both by every parameter agree as well.
    gradients = []
    for implementation in ("auto", "eager"):
        mixed.config._attn_implementation = implementation
        output = mixed(tokens, layout, mask)[0]
        gradients.append(torch.autograd.grad(output.sin().sum(), list(mixed.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("elements", [1, 150, 700, 1 << 18])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_basis_in_parts(modality, elements, monkeypatch):
    """One query at a time, several queries, several inputs: all give the same."""
    monkeypatch.setattr(basis, "CHUNK_ELEMENTS", elements)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    config = make_config(modality, relative_projections="qkv", offset_basis=3)
    layout, mixer = layout_of(config), randomise(TranslutionMixer(config, 0))
    tokens, mask = tokens_of(layout).requires_grad_(), mask_of(layout)
    found = []
    for implementation in ("auto", "eager"):
        mixer.config._attn_implementation = implementation
        output = mixer(tokens, layout, mask)[0]
        found.append([output, *torch.autograd.grad(output.sin().sum(), [tokens, *mixer.parameters()])])
    torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_products_of_a_basis_never_exist_whole(monkeypatch):
    monkeypatch.setattr(basis, "CHUNK_ELEMENTS", 1 << 11)
    query, weights = torch.randn(1, 1, 60, 4), torch.randn(8, 60, 60)
    keys, pairs = torch.randn(1, 1, 8, 60, 4), torch.randn(1, 1, 60, 60)
    largest = LargestTensor()
    largest.inside(basis._scores)(query, keys, weights)
    largest.inside(basis._values)(pairs, keys, weights)
    largest.inside(basis._backward)(pairs, query, keys, weights, True, True, False)
    # The scores are the largest; what is viewed, weights and inputs, is there before.
    assert 60 * 60 <= largest.made <= max(60 * 60, 1 << 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_basis_in_half_precision_is_as_good_as_the_reference(modality, dtype):
    size = {"grid": (10, 9), "length": 90}
    config = make_config(modality, relative_projections="kv", offset_basis=3, max_relative_distance=1, **size)
    layout, mixer = layout_of(config, 90), randomise(TranslutionMixer(config, 0))
    tokens = tokens_of(layout)

    def gradients(implementation, dtype):
        mixer.config._attn_implementation = implementation
        mixer.to(dtype)
        output = mixer(tokens.to(dtype), layout, mask_of(layout, dtype))[0]
        return torch.autograd.grad(
            (output.double() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), list(mixer.parameters())
        )

    start = {name: value.clone() for name, value in mixer.state_dict().items()}
    truth = gradients("eager", torch.float64)
    expected, actual = gradients("eager", dtype), gradients("auto", dtype)
    mixer.double().load_state_dict(start)
    for one, other, right in zip(actual, expected, truth, strict=True):
        errors = [((part.double() - right).norm() / right.norm()).item() for part in (one, other)]
        assert errors[0] < 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("modality", ["image", "text"])
def test_basis_of_all_offsets_is_full(modality):
    num_offsets = layout_of(make_config(modality)).num_offsets
    full, mixed, layout = full_and_basis(modality, "qkv", None, num_offsets)
    with torch.no_grad():
        for name in "qkv":
            getattr(mixed, f"{name}_coefficients").copy_(torch.eye(num_offsets))
            getattr(mixed, f"{name}_factors").copy_(getattr(full, f"{name}_bank"))
    tokens, mask = tokens_of(layout), mask_of(layout)
    torch.testing.assert_close(mixed(tokens, layout, mask)[0], full(tokens, layout, mask)[0], rtol=1e-10, atol=1e-11)


def test_basis_never_builds_the_bank(monkeypatch):
    config = make_config(grid=(6, 7), relative_projections="qkv", offset_basis=2)
    layout, mixer = layout_of(config), randomise(TranslutionMixer(config, 0))
    monkeypatch.setattr("translution.modeling.operators.basis.OffsetBasis.bank", None)
    mixer(tokens_of(layout), layout)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


# Attention with relative scalars and vectors


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("mixer_class", [RelativeBiasAttentionMixer, RelativeVectorAttentionMixer])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_relative_attention_pair_by_pair(modality, mixer_class, implementation):
    config = make_config(modality)
    layout, mixer = layout_of(config), randomise(mixer_class(config, 0))
    config._attn_implementation = implementation
    tokens, rows = tokens_of(layout), layout.offsets()[0].tolist()
    mask = mask_of(layout)
    output, _ = mixer(tokens, layout, mask)
    vectors = mixer_class is RelativeVectorAttentionMixer
    query, key, value = (p(tokens[0]).unflatten(-1, (HEADS, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    expected = []
    for i in range(layout.num_tokens):
        visible = [j for j in range(layout.num_tokens) if rows[i][j] >= 0]
        heads = []
        for h in range(HEADS):
            keys = [key[j, h] + (mixer.relative_key[rows[i][j]] if vectors else 0) for j in visible]
            values = [value[j, h] + (mixer.relative_value[rows[i][j]] if vectors else 0) for j in visible]
            scores = [query[i, h] @ k * HEAD_DIM**-0.5 for k in keys]
            if not vectors:
                scores = [s + mixer.relative_bias[rows[i][j], h] for s, j in zip(scores, visible, strict=True)]
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        expected.append(mixer.o_proj(torch.cat(heads)))
    torch.testing.assert_close(output[0], torch.stack(expected), rtol=1e-11, atol=1e-12)


# ACmix


def original_acmix(dtype=torch.float64):
    """The mixer of `image-acmix-layer` with the original's weights, its input and output, and a layout without class token."""
    with safe_open(REFERENCE / "image-acmix-layer.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    original = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}
    height, width = case["H"], case["W"]
    config = make_config(
        grid=(height, width),
        hidden_size=case["C"],
        num_attention_heads=case["heads"],
        head_dim=case["hd"],
        mixer_types="acmix",
        kernel_size=case["kernel"],
    )
    mixer = ACmixMixer(config, 0)
    taps = case["kernel"] ** 2
    query, key, value = original["qkv.weight"].chunk(3)
    class_rows = torch.zeros(3, case["heads"])
    mixer.load_state_dict(
        {
            "q_proj.weight": query,
            "k_proj.weight": key,
            "v_proj.weight": value,
            "o_proj.weight": original["proj.weight"],
            "o_proj.bias": original["proj.bias"],
            "relative_bias": torch.cat((original["relative_position_bias_table"], class_rows)),
            "shift_maps.weight": original["fc.weight"].view(taps, 3 * case["heads"]),
            "shift_maps.bias": original["fc.bias"],
            "shift_kernel": original["dep_conv.weight"],
            "attention_rate": original["rate1"],
            "convolution_rate": original["rate2"],
        }
    )
    layout = PairLayout(height, width, class_token=False, causal=False, bank_height=height, bank_width=width)
    tokens = tensors["input"].flatten(1, 2).to(dtype)
    return mixer.to(dtype), tokens, tensors["output"].flatten(1, 2), layout


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_acmix_equals_the_original(implementation):
    mixer, tokens, expected, layout = original_acmix()
    mixer.config._attn_implementation = implementation
    output, _ = mixer(tokens, layout)
    assert ((output - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_acmix_in_half_precision(dtype):
    mixer, tokens, expected, layout = original_acmix(dtype)
    tokens.requires_grad_()
    output, _ = mixer(tokens, layout)
    assert output.dtype == dtype
    assert ((output - expected).norm() / expected.norm()).item() < 0.02
    output.float().sum().backward()
    assert tokens.grad.dtype == dtype
    assert all(parameter.grad.dtype == dtype for parameter in mixer.parameters())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_acmix_without_convolution_is_relative_bias_attention(modality):
    config = make_config(modality, mixer_types="acmix")
    layout, mixer = layout_of(config), randomise(ACmixMixer(config, 0))
    attention = RelativeBiasAttentionMixer(config, 0).double()
    attention.load_state_dict(
        {name: value for name, value in mixer.state_dict().items() if name in attention.state_dict()}
    )
    with torch.no_grad():
        mixer.attention_rate.fill_(1)
        mixer.convolution_rate.fill_(0)
    tokens, mask = tokens_of(layout), mask_of(layout)
    expected, _ = attention(tokens, layout, mask)
    torch.testing.assert_close(mixer(tokens, layout, mask)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_acmix_starts_with_exact_shifts(modality):
    config = make_config(modality, mixer_types="acmix", num_labels=2)
    mixer = TranslutionModel(config).layers[0].mixer
    window = (3,) if modality == "text" else (3, 3)
    expected = torch.zeros(HEADS * HEAD_DIM, mixer.num_taps, *window)
    for tap in range(mixer.num_taps):
        expected.flatten(2)[:, tap, tap] = 1
    assert torch.equal(mixer.shift_kernel, expected)
    assert mixer.attention_rate.item() == mixer.convolution_rate.item() == 0.5


# gradcheck of whole mixers


@pytest.mark.parametrize("name", MIXER_TYPES)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_gradcheck(modality, name):
    fields = {
        "hidden_size": 4,
        "num_attention_heads": 1,
        "head_dim": 4,
        "relative_rank": 1,
        "relative_projections": "kv",
    }
    config = make_config(modality, grid=(2, 2), length=3, mixer_types=name, offset_basis=2, **fields)
    layout, mixer = layout_of(config, length=3), randomise(build_mixer(config, 0))
    model = TranslutionModel(config)
    position_ids = torch.arange(3)[None] if layout.causal else None
    rotation = model._rotation(torch.empty(1, 1, 4, dtype=torch.float64), layout, position_ids)
    mask = mask_of(layout)
    names = [parameter for parameter, _ in mixer.named_parameters()]
    tokens = torch.randn(1, layout.num_tokens, 4, dtype=torch.float64, requires_grad=True)

    def run(tokens, *parameters):
        arguments = (tokens, layout, mask)
        return torch.func.functional_call(
            mixer, dict(zip(names, parameters, strict=True)), arguments, {"rotation": rotation}
        )[0]

    assert torch.autograd.gradcheck(run, (tokens, *mixer.parameters()))


# Any size


def test_distance_as_large_as_the_grid_changes_nothing():
    tokens = torch.randn(BATCH, 13, HIDDEN, dtype=torch.float64)
    for name in ("translution", "relative_bias_attention", "relative_vector_attention", "acmix"):
        free_config = make_config(mixer_types=name, relative_projections="qkv")
        free = randomise(build_mixer(free_config, 0))
        free_layout = layout_of(free_config)
        expected, _ = free(tokens, free_layout)
        for distance in (3, 5):
            config = make_config(mixer_types=name, relative_projections="qkv", max_relative_distance=distance)
            mixer, layout = build_mixer(config, 0).double(), layout_of(config)
            state = free.state_dict()
            for parameter in mixer.offset_parameters():
                table = torch.randn(layout.num_offsets, *state[parameter].shape[1:], dtype=torch.float64)
                for row_offset in range(-2, 3):
                    for column_offset in range(-3, 4):
                        table[layout.row(row_offset, column_offset)] = state[parameter][
                            free_layout.row(row_offset, column_offset)
                        ]
                table[-3:] = state[parameter][-3:]
                state[parameter] = table
            mixer.load_state_dict(state)
            torch.testing.assert_close(mixer(tokens, layout)[0], expected, rtol=1e-12, atol=1e-13)


def bank_for(height, width, features=2):
    layout = PairLayout.for_image(height, width, height, width)
    return torch.randn(layout.num_offsets, features, dtype=torch.float64), layout


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 4)], ids=str)
def test_resampling_to_the_same_grid_is_exact(grid):
    table, layout = bank_for(*grid)
    assert torch.equal(resample_offsets(table, layout, layout), table)
    embeddings = torch.randn(1, 1 + grid[0] * grid[1], 3)
    assert torch.equal(resample_positions(embeddings, grid, grid), embeddings)


def mirrored(table, layout, axis):
    shape = (2 * layout.bank_height - 1, 2 * layout.bank_width - 1)
    grid = table[: layout.num_grid_offsets].unflatten(0, shape).flip(axis).flatten(0, 1)
    return torch.cat((grid, table[layout.num_grid_offsets :]))


@pytest.mark.parametrize("new", [(4, 3), (2, 6), (7, 2)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_mirrored_grids_resample_to_mirrored_banks(axis, new):
    table, old_layout = bank_for(3, 5)
    new_layout = PairLayout.for_image(*new, *new)
    resampled = resample_offsets(table, old_layout, new_layout)
    assert resampled.shape == (new_layout.num_offsets, 2)
    assert torch.equal(resampled[-3:], table[-3:])
    again = resample_offsets(mirrored(table, old_layout, axis), old_layout, new_layout)
    torch.testing.assert_close(again, mirrored(resampled, new_layout, axis), rtol=1e-12, atol=1e-12)


def test_resampling_keeps_height_and_width_apart():
    """A bank that varies along one axis alone still does, and keeps its order, on a grid of another shape."""
    layout, new = PairLayout.for_image(2, 4, 2, 4), PairLayout.for_image(5, 3, 5, 3)
    rows = torch.arange(3, dtype=torch.float64).repeat_interleave(7)
    table = torch.cat((rows, torch.zeros(3)))[:, None]
    grid = resample_offsets(table, layout, new)[:-3, 0].view(9, 5)
    torch.testing.assert_close(grid, grid[:, :1].expand(-1, 5))
    assert (grid[1:, 0] >= grid[:-1, 0] - 0.2).all()
    assert grid[-1, 0] - grid[0, 0] > 1.5
    torch.testing.assert_close(grid[4, 0].item(), 1.0)


ALL_MIXERS = {
    "num_hidden_layers": 8,
    "mixer_types": list(MIXER_TYPES),
    "relative_rank": 2,
    "relative_projections": "qkv",
    "use_absolute_position_embeddings": True,
    "num_labels": 3,
}


@pytest.mark.parametrize("basis", [None, 2], ids=["full", "basis"])
@pytest.mark.parametrize("distance", [None, 1], ids=["", "clamped"])
@pytest.mark.parametrize("size", [[10, 4], [2, 14], [6, 8]], ids=str)
def test_other_resolutions(size, distance, basis, tmp_path):
    config = make_config(**ALL_MIXERS, max_relative_distance=distance, offset_basis=basis)
    model = TranslutionForImageClassification(config).double().eval()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    if size != [6, 8]:
        with pytest.raises(
            ValueError, match=r"`pixel_values` must be images of `image_size` \[6, 8\].*got .*interpolate"
        ):
            model(pixels)
    logits = model(pixels, interpolate_pos_encoding=True).logits
    model.model.resize_image(size)
    assert model.config.image_size == size
    torch.testing.assert_close(model(pixels).logits, logits, rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = TranslutionForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(pixels).logits, logits, rtol=1e-12, atol=1e-12)


def test_resizing_to_the_own_size_changes_nothing():
    model = TranslutionModel(make_config(**ALL_MIXERS))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.resize_image([6, 8])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_sizes():
    model = TranslutionModel(make_config())
    with pytest.raises(ValueError, match=r"multiple of `patch_size` \[2, 2\] on each axis, got \[7, 8\]"):
        model(pixel_values=torch.randn(1, 3, 7, 8), interpolate_pos_encoding=True)
    with pytest.raises(
        StrictDataclassError, match=r"`image_size` must be a multiple of `patch_size` 2 on each axis, got \[7, 8\]"
    ):
        model.resize_image([7, 8])
    with pytest.raises(ValueError, match="`resize_image` needs `modality` 'image', got 'text'"):
        TranslutionModel(make_config("text")).resize_image(8)


@pytest.mark.parametrize("name", MIXER_TYPES)
def test_text_longer_than_the_bank(name):
    fields = {"mixer_types": name, "relative_rank": 2, "num_hidden_layers": 2}
    ids = torch.randint(11, (2, 12))
    clamped = TranslutionModel(make_config("text", max_relative_distance=3, **fields)).double().eval()
    whole = clamped(input_ids=ids).last_hidden_state
    torch.testing.assert_close(clamped(input_ids=ids[:, :9]).last_hidden_state, whole[:, :9], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="at most `max_position_embeddings` 7 tokens, got 12"):
        TranslutionModel(make_config("text", **fields))(input_ids=ids)


# Shifts

RELATIVE = ["translution", "rope_translution", "relative_bias_attention", "relative_vector_attention", "convolution"]
RELATIVE += ["acmix", "rope_attention"]


@pytest.mark.parametrize("name", [*RELATIVE, "attention"])
def test_shifted_content_moves_the_outputs(name):
    """Content on an empty canvas, shifted by whole patches: what patches know of it moves along, border effects aside."""
    absolute = name == "attention"
    config = make_config(
        grid=(7, 7),
        mixer_types=name,
        relative_rank=2,
        relative_projections="qkv",
        use_absolute_position_embeddings=absolute,
    )
    torch.manual_seed(3)
    layout, mixer = layout_of(config), randomise(build_mixer(config, 0))
    rotation = TranslutionModel(config)._rotation(torch.empty(1, 1, 1, dtype=torch.float64), layout)
    position_embeddings = torch.randn(1, 50, HIDDEN, dtype=torch.float64) if absolute else 0
    content = torch.randn(3, 3, HIDDEN, dtype=torch.float64)

    def patches(x, y):
        """Outputs of the nine patches of the content at `(x, y)`, and nothing but the content visible."""
        grid = torch.zeros(1, 7, 7, HIDDEN, dtype=torch.float64)
        grid[0, x : x + 3, y : y + 3] = content
        tokens = torch.cat((torch.zeros(1, 1, HIDDEN, dtype=torch.float64), grid.flatten(1, 2)), dim=1)
        inside = torch.zeros(7, 7, dtype=torch.long)
        inside[x : x + 3, y : y + 3] = 1
        token_mask = torch.cat((torch.zeros(1, dtype=torch.long), inside.flatten()))[None]
        mask = make_mask(token_mask, layout, tokens)
        output, _ = mixer(tokens + position_embeddings, layout, mask, rotation=rotation)
        return output[0, 1:].unflatten(0, (7, 7))[x : x + 3, y : y + 3]

    here, there = patches(1, 1), patches(3, 2)
    if absolute:
        assert (here - there).norm() > 0.1 * here.norm()
    else:
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mixer_type", ["attention", "relative_bias_attention", "relative_vector_attention"])
@pytest.mark.parametrize(
    ("layout", "queries"),
    [(PairLayout.for_text(9, 9), 9), (PairLayout.for_text(9, 9, past=3), 6), (StepLayout(8, 9, 9, False), 1)],
    ids=["whole", "past", "step"],
)
def test_attention_without_a_mask_looks_back_from_where_it_is(mixer_type, layout, queries):
    torch.manual_seed(0)
    config = TranslutionConfig(
        modality="text",
        hidden_size=12,
        num_attention_heads=2,
        head_dim=6,
        num_hidden_layers=1,
        max_position_embeddings=9,
        mixer_types=mixer_type,
    )
    mixer = build_mixer(config, 0).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    query, key, value = mixer.project(torch.randn(2, 9, 12, dtype=torch.float64))
    config._attn_implementation = "auto"
    whole, _ = mixer.attend(query, key, value, PairLayout.for_text(9, 9), ALL_VISIBLE, False)
    part, _ = mixer.attend(query[:, :, -queries:], key, value, layout, ALL_VISIBLE, False)
    torch.testing.assert_close(part, whole[:, -queries:])
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e300)
    masked, _ = mixer.attend(query, key, value, PairLayout.for_text(9, 9), AttentionMask(mask[None, None]), False)
    torch.testing.assert_close(whole, masked)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_convolution_to_one_channel_has_gradients(modality):
    config = make_config(modality, mixer_types="convolution", num_attention_heads=1, head_dim=1)
    layout, mixer = layout_of(config), randomise(build_mixer(config, 0))
    tokens = tokens_of(layout).requires_grad_()
    parameters = [tokens, *mixer.parameters()]
    assert torch.autograd.gradcheck(lambda *_: mixer(tokens, layout)[0], parameters, fast_mode=True)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rotary_base_may_be_an_integer_of_any_size(modality):
    fields = {"modality": modality, "mixer_types": "rope_attention", "num_hidden_layers": 1}
    like = torch.empty(1, 7, 4, dtype=torch.float64)
    layout = PairLayout.for_text(7, 7) if modality == "text" else PairLayout.for_image(3, 2, 3, 2)
    places = torch.arange(7)[None] if modality == "text" else None
    found, expected = (
        TranslutionModel(TranslutionConfig(**fields, rope_theta=theta))._rotation(like, layout, places)
        for theta in (10**30, 1e30)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)

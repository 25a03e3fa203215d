"""Local Translution against a loop over pairs that shares nothing with the package, and against what it must equal.

`by_hand` takes the formulas at their word: it looks up the matrices of every pair by the coordinates of its tokens, rotates with
complex numbers, and divides exponentials by their sum.

Legend: `B` batch, `L` tokens, `A` heads, `e` features per head, `D` largest distance told apart.
"""

import itertools
import math
from functools import lru_cache

import pytest
import torch
from local_pairs import OPERANDS, Size, attention_by_hand, operands, repeated
from small_layers import LargestTensor, relative_error
from small_models import assert_same, greedy
from small_models import make_model as make_small_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from translution import TranslutionConfig, explain_dispatch
from translution.modeling.mixers.build import build_mixer
from translution.modeling.mixers.masks import AttentionMask, find_packed_texts, make_mask
from translution.modeling.operators import dispatch, far_blocks, fused_attention, local, pair_autograd, registration
from translution.modeling.operators import project_each as projections
from translution.modeling.operators.local import local_attention
from translution.modeling.operators.pair_layout import PairLayout, bank_layout
from translution.modeling.operators.project_each import project_each
from translution.modeling.operators.rotary import image_rotation, text_rotation


pytestmark = pytest.mark.usefixtures("poisoned_memory")

SUBSETS = ["qkv", "qk", "qv", "kv", "q", "k", "v"]
BATCH, HIDDEN, HEADS, HEAD_DIM, THETA = 2, 5, 2, 8, 20.0
# An image is `(height, width)`, a text its length.
IMAGES, TEXTS = [(3, 2), (4, 3), (1, 5)], [1, 2, 7]

each_subset = pytest.mark.parametrize("subset", SUBSETS)
each_turn = pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])


# By hand


@lru_cache
def bank_rows(size: Size, distance: int | None, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `o(i, j)` and `o(j, i)` of every pair, `[L, L]`; of a text the distance in both, and 0 where `j` comes later."""
    if isinstance(size, int):
        reach = size if distance is None else distance
        rows = torch.tensor([[min(max(i - j, 0), reach) for j in range(size)] for i in range(size)])
        return rows, rows
    height, width = size
    rows_apart, columns_apart = (height - 1, width - 1) if distance is None else (distance, distance)
    window = (2 * rows_apart + 1) * (2 * columns_apart + 1)
    first = window + int(shared)

    def row(i, j):
        if i == 0 or j == 0:
            return first + (0 if i == j else 1 if i == 0 else 2)
        (x, y), (u, v) = divmod(i - 1, width), divmod(j - 1, width)
        row_offset, column_offset = x - u, y - v
        if shared and (abs(row_offset) > rows_apart or abs(column_offset) > columns_apart):
            return window
        row_offset = max(-rows_apart, min(row_offset, rows_apart))
        column_offset = max(-columns_apart, min(column_offset, columns_apart))
        return (row_offset + rows_apart) * (2 * columns_apart + 1) + column_offset + columns_apart

    tokens = range(1 + height * width)
    rows = torch.tensor([[row(i, j) for j in tokens] for i in tokens])
    return rows, rows.T


def turns(size: Size, positions: torch.Tensor | None) -> torch.Tensor:
    """A complex number of length 1 for each token and pair of features, `[B or 1, L, 1, e / 2]`."""
    if isinstance(size, int):
        frequencies = torch.tensor([THETA ** (-2 * k / HEAD_DIM) for k in range(HEAD_DIM // 2)], dtype=torch.float64)
        angles = positions[:, :, None] * frequencies
    else:
        quarter = HEAD_DIM // 4
        frequencies = [THETA ** (-2 * k / (HEAD_DIM / 2)) for k in range(quarter)]
        places = [(x, y) for x in range(size[0]) for y in range(size[1])]
        angles = [[x * f for f in frequencies] + [y * f for f in frequencies] for x, y in places]
        angles = torch.tensor([[0.0] * 2 * quarter, *angles], dtype=torch.float64)[None]
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def turned(heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Feature `n` of `[…, A, e]` is the real part of a number, and feature `n + e / 2` its imaginary part."""
    first, second = heads.chunk(2, dim=-1)
    number = torch.complex(first, second) * turn
    return torch.cat((number.real, number.imag), dim=-1)


def visible_by_hand(size: Size, mask, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs count, and what is added to their scores, `[B, A, L, L]`."""
    length = size if isinstance(size, int) else 1 + size[0] * size[1]
    visible = torch.ones(BATCH, HEADS, length, length, dtype=torch.bool)
    bias = torch.zeros(visible.shape, dtype=torch.float64)
    if mask is not None and mask.ndim == 2:
        visible &= mask.bool()[:, None, None]
    elif mask is not None and mask.dtype == torch.bool:
        visible &= mask
    elif mask is not None:
        visible &= mask > -1e3
        bias = torch.where(visible, mask, 0.0)
    for i, j in itertools.product(range(length), repeat=2):
        if isinstance(size, int) and j > i:
            visible[..., i, j] = False
        if positions is not None:
            # A text begins wherever positions do not count on: none may lie between the two tokens.
            visible[..., i, j] &= (positions[:, min(i, j) : max(i, j) + 1].diff() == 1).all(-1)[:, None]
    for i in range(length):
        # Who sees nothing sees itself.
        visible[..., i, i] |= ~visible[..., i, :].any(-1)
    return visible, bias


def by_hand(mixer, tokens, size, turn=None, visible=None, bias=None):
    """The output of a mixer, `[B, L, C]`."""
    config, weights = mixer.config, dict(mixer.named_parameters())
    relative, rank = config.relative_projections, config.relative_rank
    rows, reverse = bank_rows(size, config.max_relative_distance, config.far_offsets == "shared")
    if visible is None:
        visible, bias = visible_by_hand(size, None)

    def linear(name, inputs):
        return inputs @ weights[f"{name}.weight"].T

    def heads(projections):
        return projections.unflatten(-1, (HEADS, -1))

    def of_pairs(name, inputs):
        """`[B, L, L, A, e]`, the projection that every pair has of its query's token or of its key's."""
        inputs = inputs[:, :, None] if name == "q" else inputs[:, None]
        if name not in relative:
            return heads(inputs)
        if config.offset_basis is None:
            bank = weights[f"{name}_bank"]
        else:
            factors = weights[f"{name}_factors"]
            bank = sum(weights[f"{name}_coefficients"][:, m, None, None] * factors[m] for m in range(len(factors)))
        matrices = bank[reverse if name == "q" else rows]
        return heads((inputs[..., None, :] @ matrices).squeeze(-2))

    def of_tokens(name):
        """The same of a projection that is one for all pairs, rotated."""
        projections = heads(linear(f"{name}_proj", tokens))
        if turn is not None and name != "v":
            projections = turned(projections, turn)
        return projections[:, :, None] if name == "q" else projections[:, None]

    def scores(queries, keys):
        return (queries * keys).sum(-1).permute(0, 3, 1, 2)

    def sums(values):
        return torch.einsum(
            "baij,bijae->biae", shares, values.expand(*shares.shape[:1], *shares.shape[2:], -1, -1)
        ).flatten(-2)

    scores_are_relative = "q" in relative or "k" in relative
    if rank is not None:
        total = scores(of_tokens("q"), of_tokens("k"))
        if scores_are_relative:
            queries, keys = (of_pairs(name, linear(f"{name}_down", tokens)) for name in "qk")
            total = (total + scores(queries, keys)) / 2
    elif not scores_are_relative:
        total = scores(of_tokens("q"), of_tokens("k"))
    else:
        queries, keys = (
            of_pairs(name, tokens if name in relative else linear(f"{name}_proj", tokens)) for name in "qk"
        )
        if turn is not None:
            queries, keys = turned(queries, turn[:, :, None]), turned(keys, turn[:, None])
        total = scores(queries, keys)
    total = (total / math.sqrt(HEAD_DIM) + bias).masked_fill(~visible, -math.inf)
    exponentials = torch.exp(total - total.detach().amax(-1, keepdim=True))
    shares = exponentials / exponentials.sum(-1, keepdim=True)
    if "v" not in relative:
        output = sums(of_tokens("v"))
    elif rank is None:
        output = sums(of_pairs("v", tokens))
    else:
        output = (sums(of_tokens("v")) + linear("v_up", sums(of_pairs("v", linear("v_down", tokens))))) / 2
    return output @ weights["o_proj.weight"].T + weights["o_proj.bias"]


# By the package


def make_mixer(size: Size, distance: int | None, far_offsets="clamped", rotary=False, **fields):
    text = isinstance(size, int)
    values = {
        "modality": "text" if text else "image",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "image_size": [1, 1] if text else list(size),
        "patch_size": 1,
        "max_position_embeddings": size if text else 1,
        "max_relative_distance": distance,
        "far_offsets": far_offsets,
        "mixer_types": "rope_translution" if rotary else "translution",
        "rope_theta": THETA,
    }
    mixer = build_mixer(TranslutionConfig(**{**values, **fields}), 0).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def rotation_of(mixer, size: Size, positions=None, dtype=torch.float64):
    if not mixer.config.mixer_types[0].startswith("rope_"):
        return None
    if isinstance(size, int):
        return text_rotation(positions, HEAD_DIM, THETA, dtype)
    return image_rotation(*size, HEAD_DIM, THETA, dtype, torch.device("cpu"))


def num_tokens(size: Size) -> int:
    return size if isinstance(size, int) else 1 + size[0] * size[1]


def results(mixer, tokens, weight, run):
    """What `run(mixer, tokens)` gives, and the gradients of `sum(output · weight)`."""
    tokens = tokens.detach().requires_grad_()
    output = run(mixer, tokens)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((output * weight).sum(), [tokens, *parameters], materialize_grads=True)
    return dict(zip(["output", "tokens", *names], [output.detach(), *gradients], strict=True))


def compare(mixer, size: Size, mask=None, positions=None, packed=False, tolerance=1e-10) -> str:
    """Asserts that the reference and the default path do what is done by hand; returns the path.

    Args:
        mask: as a user gives it.
        positions: `[B, L]`, where they are not those that count from 0.
        packed: whether positions that do not count on begin another text.
    """
    layout = bank_layout(mixer.config)
    tokens, weight = torch.randn(2, BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    if positions is None:
        positions = torch.arange(num_tokens(size))[None]
    additive = make_mask(mask, layout, tokens, find_packed_texts(positions) if packed else None)
    rotation = rotation_of(mixer, size, positions)
    turn = None if rotation is None else turns(size, positions)
    visible, bias = visible_by_hand(size, mask, positions if packed else None)
    expected = results(mixer, tokens, weight, lambda mixer, tokens: by_hand(mixer, tokens, size, turn, visible, bias))
    paths = {}
    for implementation in ("eager", "auto"):
        mixer.config._attn_implementation = implementation
        with dispatch._recorded() as choices:
            found = results(
                mixer, tokens, weight, lambda mixer, tokens: mixer(tokens, layout, additive, rotation=rotation)[0]
            )
        paths[implementation] = choices[0][2].path
        assert found.keys() == expected.keys()
        for name, exact in expected.items():
            difference, largest = (found[name] - exact).abs().max().item(), max(1, exact.abs().max().item())
            assert difference <= tolerance * largest, f"{implementation}: {name} is {difference} off, of {largest}"
    assert paths["eager"] == "reference"
    return paths["auto"]


def compare_local(*args, **kwargs):
    assert compare(*args, **kwargs) == "local"


@each_subset
@pytest.mark.parametrize("distance", [0, 1, 2, 6])
@each_turn
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_image_with_shared_far_offsets(size, rotary, distance, subset):
    path = compare(make_mixer(size, distance, "shared", rotary, relative_projections=subset), size)
    # Without far pairs only those that are rotated, which no other path serves.
    assert path == "local" or (max(size) <= distance + 1 and (not rotary or subset == "v"))


@each_subset
@pytest.mark.parametrize("distance", [0, 1, 6])
@each_turn
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_image_with_clamped_far_offsets(size, rotary, distance, subset):
    compare(make_mixer(size, distance, "clamped", rotary, relative_projections=subset), size)


@each_subset
@pytest.mark.parametrize("distance", [0, 1, 3, 9])
@each_turn
@pytest.mark.parametrize("size", TEXTS)
def test_text(size, rotary, distance, subset):
    path = compare(make_mixer(size, distance, rotary=rotary, relative_projections=subset), size)
    assert (path == "local") == (0 < distance < size or (distance > 0 and rotary and subset != "v"))


LOW_RANK_AND_BASIS = {
    "lor": {"relative_rank": 3},
    "basis": {"offset_basis": 2},
    "lor-basis": {"relative_rank": 3, "offset_basis": 2},
}


@pytest.mark.parametrize("subset", ["qkv", "kv", "q", "v"])
@pytest.mark.parametrize("form", LOW_RANK_AND_BASIS)
@each_turn
@pytest.mark.parametrize(
    ("size", "far_offsets"),
    [((4, 3), "shared"), ((4, 3), "clamped"), (7, "clamped")],
    ids=["shared", "clamped", "text"],
)
def test_low_rank_and_basis(size, far_offsets, rotary, form, subset):
    fields = {"relative_projections": subset, **LOW_RANK_AND_BASIS[form]}
    path = compare(make_mixer(size, 1, far_offsets, rotary, **fields), size)
    assert (far_offsets, size) == ("clamped", (4, 3)) or path == "local"


FORMS = {
    "full-qkv": {"relative_projections": "qkv"},
    "full-kv": {"relative_projections": "kv"},
    "full-v": {"relative_projections": "v"},
    "lor-kv": {"relative_projections": "kv", "relative_rank": 3},
    "basis-qk": {"relative_projections": "qk", "offset_basis": 2},
}
each_form = pytest.mark.parametrize("form", FORMS)


def masks(length):
    """Masks of every kind; some queries see nothing."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.ones(BATCH, length, dtype=torch.long)
    left, right, holes, nothing = (tokens.clone() for _ in range(4))
    left[0, :2], right[1, -3:], nothing[0] = 0, 0, 0
    holes[0, 1], holes[1, 2:4] = 0, 0
    pairs = torch.rand(BATCH, HEADS, length, length, generator=generator)
    bias = torch.randn(pairs.shape, generator=generator, dtype=torch.float64)
    return {
        "left": left,
        "right": right,
        "holes": holes,
        "nothing": nothing,
        "bool": pairs < 0.6,
        "bool-of-all-heads": pairs[:, :1] < 0.6,
        "bias": bias,
        "additive": bias.masked_fill(pairs < 0.4, torch.finfo(torch.float64).min),
        "additive-of-all-rows": bias[:1, :1].masked_fill(pairs[:1, :1] < 0.4, -math.inf),
        "additive-by-key": bias[:, :, :1].masked_fill(pairs[:, :, :1] < 0.4, -1e4),
    }


few_forms = pytest.mark.parametrize("form", ["full-qkv", "full-v", "lor-kv"])


@few_forms
@each_turn
@pytest.mark.parametrize("name", masks(8))
def test_masks_of_text(name, rotary, form):
    # Positions of padded rows begin where the text does.
    mask = masks(8)[name]
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if mask.ndim == 2 else None
    compare_local(make_mixer(8, 3, rotary=rotary, **FORMS[form]), 8, mask, positions)


@few_forms
@each_turn
@pytest.mark.parametrize("name", masks(13))
def test_masks_of_images(name, rotary, form):
    compare_local(make_mixer((4, 3), 1, "shared", rotary, **FORMS[form]), (4, 3), masks(13)[name])


@each_form
@each_turn
def test_packed_texts(rotary, form):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 2, 0, 1]])
    compare_local(make_mixer(8, 2, rotary=rotary, **FORMS[form]), 8, positions=positions, packed=True)


@pytest.mark.parametrize("first", [3, 100])
def test_positions_may_begin_anywhere(first):
    positions = torch.arange(first, first + 7)[None]
    compare_local(make_mixer(7, 2, rotary=True, relative_projections="qkv"), 7, positions=positions)


# Identities


@pytest.mark.parametrize(
    ("size", "far_offsets"),
    [((3, 4), "shared"), ((3, 4), "clamped"), (7, "clamped")],
    ids=["shared", "clamped", "text"],
)
@pytest.mark.parametrize("subset", ["qkv", "kv", "q"])
def test_equal_matrices_and_rotation_are_rotary_attention(subset, size, far_offsets):
    mixer = make_mixer(size, 1, far_offsets, rotary=True, relative_projections=subset)
    attention = make_mixer(size, None, mixer_types="rope_attention")
    with torch.no_grad():
        for name in "qkv":
            weight = getattr(attention, f"{name}_proj").weight
            if name in subset:
                getattr(mixer, f"{name}_bank").copy_(weight.T)
            else:
                getattr(mixer, f"{name}_proj").weight.copy_(weight)
    attention.o_proj.load_state_dict(mixer.o_proj.state_dict())
    tokens = torch.randn(BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    layout, rotation = bank_layout(mixer.config), rotation_of(mixer, size, torch.arange(num_tokens(size))[None])
    expected = attention(tokens, bank_layout(attention.config), rotation=rotation)[0]
    torch.testing.assert_close(mixer(tokens, layout, rotation=rotation)[0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("subset", ["qkv", "qk", "v"])
@pytest.mark.parametrize(
    ("size", "distance"), [((3, 2), 2), ((3, 2), 3), ((1, 4), 3), (6, 5), (6, 9)], ids=lambda value: str(value)
)
def test_a_distance_past_the_input_is_no_distance(size, distance, subset):
    free = make_mixer(size, None, relative_projections=subset)
    bounded = make_mixer(size, distance, "shared", relative_projections=subset)
    rows, _ = bank_rows(size, None, False)
    bounded_rows, _ = bank_rows(size, distance, True)
    with torch.no_grad():
        for name, parameter in bounded.named_parameters():
            given = getattr(free, name) if name.endswith("_bank") else free.get_parameter(name)
            if name.endswith("_bank"):
                parameter[bounded_rows] = given[rows]
            else:
                parameter.copy_(given)
    tokens = torch.randn(BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    layout = bank_layout(bounded.config)
    expected = free(tokens, bank_layout(free.config))[0]
    torch.testing.assert_close(bounded(tokens, layout)[0], expected, rtol=1e-11, atol=1e-12)


def uniform_mixer(size, distance, **fields):
    """One that gives all visible tokens the same weight, and returns what heads see: keys are 0, and there is no projection."""
    sizes = {"num_attention_heads": 1, "head_dim": HIDDEN, "relative_projections": "kv", **fields}
    mixer = make_mixer(size, distance, "shared", **sizes)
    torch.nn.init.zeros_(mixer.k_bank)
    return mixer


def test_uniform_weights_in_a_window_are_a_convolution_of_images():
    size = height, width = 4, 5
    mixer = uniform_mixer(size, 1)
    tokens = torch.randn(BATCH, 1 + height * width, HIDDEN, dtype=torch.float64)
    x, y = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    window = ((x[:, None] - x).abs() <= 1) & ((y[:, None] - y).abs() <= 1)
    mask = F.pad(window, (1, 0, 1, 0))[None, None]
    layout = bank_layout(mixer.config)
    mask = make_mask(mask, layout, tokens)
    assert " local: " in explain_dispatch(mixer, tokens, layout, mask)
    # Row `(dx + 1) · 3 + dy + 1` of the bank is for the key at `(x − dx, y − dy)`: the kernel is turned around.
    kernel = mixer.v_bank[:9].unflatten(0, (3, 3)).flip(0, 1).permute(3, 2, 0, 1)
    patches = tokens[:, 1:].transpose(1, 2).unflatten(2, size)
    expected = F.conv2d(patches, kernel, padding=1).flatten(2).transpose(1, 2)
    output = mixer(tokens, layout, mask)[0][:, 1:] * window.sum(-1, keepdim=True)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)


def test_uniform_weights_in_a_window_are_a_causal_convolution():
    length, distance = 9, 3
    mixer = uniform_mixer(length, distance)
    tokens = torch.randn(BATCH, length, HIDDEN, dtype=torch.float64)
    apart = torch.arange(length)[:, None] - torch.arange(length)
    window = (apart >= 0) & (apart < distance)
    layout = bank_layout(mixer.config)
    mask = make_mask(window[None, None], layout, tokens)
    assert " local: " in explain_dispatch(mixer, tokens, layout, mask)
    kernel = mixer.v_bank[:distance].flip(0).permute(2, 1, 0)
    expected = F.conv1d(F.pad(tokens.transpose(1, 2), (distance - 1, 0)), kernel).transpose(1, 2)
    output = mixer(tokens, layout, mask)[0] * window.sum(-1, keepdim=True)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)


# Caches

MODELS = {
    "rotary-kv-D3": {"mixer_types": "rope_translution", "relative_projections": "kv", "max_relative_distance": 3},
    "rotary-qkv-D2": {"mixer_types": "rope_translution", "relative_projections": "qkv", "max_relative_distance": 2},
    "rotary-q-D1": {"mixer_types": "rope_translution", "relative_projections": "q", "max_relative_distance": 1},
    "plain-kv-D3": {"relative_projections": "kv", "max_relative_distance": 3},
    "rotary-lor-D2": {"mixer_types": "rope_translution", "relative_rank": 2, "max_relative_distance": 2},
    "rotary-basis-D2": {"mixer_types": "rope_translution", "offset_basis": 2, "max_relative_distance": 2},
    "rotary-kv-D0": {"mixer_types": "rope_translution", "relative_projections": "kv", "max_relative_distance": 0},
}


def make_model(name, **fields):
    return make_small_model("text", **{"rope_theta": THETA, "num_hidden_layers": 2, **MODELS[name], **fields})


def padding(name, length):
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if name == "left":
        mask[0, :3] = 0
    elif name == "holes":
        mask[0, 1], mask[1, 4:6] = 0, 0
    return None if name == "none" else mask


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("hidden", ["none", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_steps_equal_the_whole(name, hidden, static):
    model, length = make_model(name), 11
    ids, mask = torch.randint(19, (BATCH, length)), padding(hidden, length)
    positions = torch.arange(length).expand(BATCH, -1)
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation("auto")
        for sizes in ([1] * length, [4, 3, 2, 1, 1], [6] + [1] * 5, [2, 9]):
            cache = (
                StaticCache(model.config, max_cache_len=length + 2) if static else DynamicCache(config=model.config)
            )
            found, place = [], 0
            for size in sizes:
                end = place + size
                found.append(
                    model(
                        ids[:, place:end],
                        attention_mask=None if mask is None else mask[:, :end],
                        position_ids=positions[:, place:end],
                        past_key_values=cache,
                        use_cache=True,
                    ).logits
                )
                place = end
            difference = torch.cat(found, dim=1) - expected
            shown = difference if mask is None else difference[mask.bool()]
            assert shown.abs().max() < 1e-10 * expected.abs().max(), sizes


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 1, 1, 1, 2], [5, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("distance", [1, 3, 8, 9])
@pytest.mark.parametrize("subset", ["kv", "qkv"])
def test_a_static_cache_is_filled_to_its_last_slot(subset, distance, sizes):
    """Steps use its last slots for near keys, which must not be missed by the tokens that come there, one or several at once."""
    model = make_model("rotary-kv-D3", relative_projections=subset, max_relative_distance=distance)
    ids, mask = torch.randint(19, (BATCH, 8)), padding("left", 8)
    cache, found, place = StaticCache(model.config, max_cache_len=8), [], 0
    with torch.no_grad():
        for size in sizes:
            end = place + size
            step = model(ids[:, place:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            found.append(step.logits)
            place = end
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    difference = (torch.cat(found, dim=1) - expected)[mask.bool()]
    assert difference.abs().max() < 1e-10 * expected.abs().max()


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_step_calls_about_as_many_operations_as_rotary_attention(static):
    """Of so small products a step spends most of its time on calling them."""
    counts = []
    for fields in ({}, {"mixer_types": "rope_attention", "max_relative_distance": None}):
        model = make_model("rotary-kv-D3", num_hidden_layers=6, **fields)
        cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            for tokens in (6, 1):
                model(torch.randint(19, (BATCH, tokens)), past_key_values=cache, use_cache=True)
            with Operations() as operations:
                model(torch.randint(19, (BATCH, 1)), past_key_values=cache, use_cache=True)
        counts.append(operations.count)
    assert counts[0] < 1.2 * counts[1], counts


@pytest.mark.parametrize("name", ["rotary-qkv-D2", "plain-kv-D3"])
def test_chunks_after_a_cache_take_the_path(name):
    model, ids = make_model(name), torch.randint(19, (BATCH, 9))
    cache = DynamicCache(config=model.config)
    assert explain_dispatch(model, ids[:, :5], past_key_values=cache, use_cache=True).count(" local: ") == 2
    assert explain_dispatch(model, ids[:, 5:], past_key_values=cache, use_cache=True).count(" local: ") == 2


@pytest.mark.parametrize("name", ["rotary-kv-D3", "rotary-qkv-D2"])
def test_generation(name):
    model = make_model(name, initializer_range=0.5, max_position_embeddings=40)
    ids = torch.randint(1, 19, (1, 5))
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(found, greedy(model, ids, 12))


# The operators


each_operand = pytest.mark.parametrize(("size", "each"), OPERANDS, ids=str)


def compare_with_a_loop(size, each, has_far, biased, groups=1):
    queries, keys, values, far, layout, near_bias, far_bias = operands(size, each, groups=groups)
    far, biases = far if has_far else None, (near_bias, far_bias if has_far else None) if biased else (None, None)
    leaves = [*queries, *keys, *values, *(far or [])]
    found, expected = (
        function(queries, keys, values, far, 2 * groups, 0.7, layout, *biases)
        for function in (local_attention, attention_by_hand)
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(found)
    pairs = zip(
        *(
            torch.autograd.grad((output * weight).sum(), leaves, materialize_grads=True)
            for output in (found, expected)
        ),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("has_far", [False, True])
@each_operand
def test_operator_equals_a_loop(size, each, has_far, biased, groups):
    compare_with_a_loop(size, each, has_far, biased, groups)


@pytest.mark.parametrize("by_member", [False, True], ids=["groups", "members"])
def test_blocks_of_queries_with_heads_that_share_keys(by_member, monkeypatch):
    monkeypatch.setattr(far_blocks, "BIAS_ELEMENTS", 30)
    if by_member:
        monkeypatch.setattr(fused_attention, "_CPU", fused_attention._CPU._replace(takes_groups=False))
    compare_with_a_loop(5, "q", True, True, groups=3)
    compare_with_a_loop((3, 4), "qkv", True, True, groups=2)


@pytest.mark.parametrize("past", [1, 3])
def test_tokens_before_the_queries_with_heads_that_share_keys(past):
    """As with a cache: near keys of `past` tokens more, and far ones of all. As good as the same with keys and values repeated."""
    queries, distance, groups = 4, 3, 3
    near = PairLayout.for_text(queries + past, queries + past, distance, past=past).near(min(past, distance - 1))

    def make(*shape):
        return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)

    query, far = [make(queries, 6 * 3)], [make(6, queries, 3), make(2, queries + past, 3), make(2, queries + past, 5)]
    keys, values = ([make(near.height, 2 * width) for _ in range(distance)] for width in (3, 5))
    weight = torch.randn(2, queries, 6 * 5, dtype=torch.float64)
    results = []
    for inputs in ((keys, values, far), repeated(keys, values, far, groups)):
        output = local_attention(query, *inputs, 6, 0.7, near)
        leaves = [*query, *keys, *values, *far]
        results.append([output, *torch.autograd.grad((output * weight).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "each"), [(7, "kv"), ((3, 4), "qkv"), (5, "q")], ids=str)
def test_heads_that_share_keys_are_as_precise_as_copies(size, each, dtype):
    """In the type of the inputs, copies sum rounded gradients; here they are summed before they are rounded, or as often."""
    groups = 3
    queries, keys, values, far, layout, *_ = operands(size, each, dtype, groups=groups, features=8, wide=8)
    leaves = [*queries, *keys, *values, *far]
    weight = torch.randn(2, layout.num_queries, 6 * 8)
    results = {}
    for name in ("exact", "shared", "copied"):
        given = [part.detach().to(torch.float64 if name == "exact" else dtype).requires_grad_() for part in leaves]
        query, *inputs = local._split(given, [len(queries), len(keys), len(values), 3])
        inputs = repeated(*inputs, groups) if name == "copied" else inputs
        output = local_attention(query, *inputs, 2 * groups, 0.3, layout)
        gradients = torch.autograd.grad((output * weight.to(output)).sum(), given, materialize_grads=True)
        results[name] = [output, *gradients]
    for shared, copied, exact in zip(results["shared"], results["copied"], results["exact"], strict=True):
        assert shared.dtype == dtype
        assert relative_error(shared, exact) < 2 * relative_error(copied, exact) + torch.finfo(dtype).eps


def test_nothing_as_large_as_copies_of_near_keys(monkeypatch):
    """Few queries after many near tokens: keys of all heads would be larger than all else."""
    queries, tokens, distance, groups, features = 3, 60, 40, 4, 32
    near = PairLayout.for_text(tokens, tokens, distance, past=tokens - queries).near(distance - 1)
    query = [torch.randn(1, queries, 2 * groups * features, requires_grad=True)]
    keys, values = (
        [torch.randn(1, near.height, 2 * features, requires_grad=True) for _ in range(distance)] for _ in range(2)
    )
    far = [
        torch.randn(1, heads, count, features) for heads, count in ((2 * groups, queries), (2, tokens), (2, tokens))
    ]
    largest = LargestTensor()
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(local, name, largest.inside(getattr(local, name)))
    with largest:
        local_attention(query, keys, values, far, 2 * groups, 0.3, near).sum().backward()
    # The largest are gradients of far keys and values.
    assert 0 < largest.made <= tokens * 2 * features < near.height * 2 * groups * features


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("has_far", [False, True])
@each_operand
def test_gradcheck(size, each, has_far, biased):
    queries, keys, values, far, layout, near_bias, far_bias = operands(size, each, batch=1, features=2, wide=3)
    biases = (near_bias, far_bias if has_far else None) if biased else (None, None)
    counts = [len(queries), len(keys), len(values)]

    def run(*leaves):
        lists = local._split(leaves, [*counts, len(leaves) - sum(counts)])
        return local_attention(*lists[:3], lists[3] or None, 2, 0.7, layout, *biases)

    leaves = [*queries, *keys, *values, *(far if has_far else [])]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_gradcheck_of_projections():
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    matrices = [torch.randn(4, size, dtype=torch.float64, requires_grad=True) for size in (2, 2, 5)]
    for found, matrix in zip(project_each(tokens, matrices), matrices, strict=True):
        torch.testing.assert_close(found, tokens @ matrix)
    assert torch.autograd.gradcheck(
        lambda tokens, *matrices: tuple(project_each(tokens, matrices)), (tokens, *matrices)
    )
    # An output that nothing is made of has no gradient.
    gradient = torch.autograd.grad(project_each(tokens, matrices)[1].sum(), matrices, materialize_grads=True)
    assert [bool(part.any()) for part in gradient] == [False, True, False]


def test_the_operators_are_ones_that_pytorch_knows():
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    matrices = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(registration.operator("project_each").default, (tokens, matrices))
    for (size, each), groups in itertools.product(OPERANDS[:3:2], (1, 3)):
        queries, keys, values, far, layout, near_bias, far_bias = operands(size, each, torch.float32, groups=groups)
        settings = (2 * groups, 0.7, pair_autograd.pack(layout))
        operator = registration.operator("local_attention").default
        far, biases = (far, (near_bias, far_bias)) if each == "kv" else ([], (None, None))
        torch.library.opcheck(operator, (queries, keys, values, far, *biases, *settings))


# What decides how it is computed changes nothing

WAYS = {
    "image": ((5, 4), 1, "shared"),
    "wide-image": ((2, 9), 2, "shared"),
    "text": (13, 3, "clamped"),
    "text-one": (6, 1, "clamped"),
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize("elements", [1, 30, 70])
@pytest.mark.parametrize("masked", [False, True])
@each_turn
@each_way
def test_blocks_of_queries_change_nothing(way, rotary, masked, elements, monkeypatch):
    monkeypatch.setattr(far_blocks, "BIAS_ELEMENTS", elements)
    blocks, original = [], local.far_blocks

    def count(*args):
        found = list(original(*args))
        blocks.append(len(found))
        return iter(found)

    monkeypatch.setattr(local, "far_blocks", count)
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, rotary, relative_projections="kv")
    compare_local(mixer, size, masks(num_tokens(size))["additive"] if masked else None)
    # A causal square without a mask needs no bias.
    assert (max(blocks) > 1) == (masked or not isinstance(size, int))


@pytest.mark.parametrize("masked", [False, True])
@each_form
@each_way
def test_plain_products_equal_fused_attention(way, form, masked, monkeypatch):
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, **FORMS[form])
    mask = masks(num_tokens(size))["additive"] if masked else None
    compare_local(mixer, size, mask)

    def refuse(*args, **kwargs):
        raise AssertionError("fused attention was called")

    monkeypatch.setattr(fused_attention, "fused", lambda *given: None)
    monkeypatch.setattr(fused_attention, "FLASH", refuse)
    monkeypatch.setattr(fused_attention, "FLASH_BACKWARD", refuse)
    compare_local(mixer, size, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", [(4, 4), (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_attention_equals_fused_attention(dtype, features, causal, monkeypatch):
    """Both also say how large the scores are, and take the output of more keys than these."""
    queries = keys = 7
    query, key = torch.randn(2, 2, 3, keys, features[0], dtype=dtype)
    value = torch.randn(2, 3, keys, features[1], dtype=dtype)
    bias = None if causal else torch.randn(2, 1, queries, keys, dtype=dtype)
    gradient, output = torch.randn(2, 2, 3, queries, features[1], dtype=dtype)
    found = []
    for operator in (fused_attention._CPU, None):
        monkeypatch.setattr(fused_attention, "fused", lambda *given, operator=operator: operator)
        attended, logsumexp = fused_attention.attention(query, key, value, 0.6, causal, bias)
        # As if there were other keys with a little weight.
        backward = fused_attention.attention_backward(
            gradient, query, key, value, output, found[0][1] + 0.3 if found else logsumexp + 0.3, 0.6, causal, bias
        )
        found.append((attended, logsumexp, *backward))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        # Sums of seven products in another order.
        assert relative_error(one, other) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("extreme", [1e3, -1e3])
@each_way
def test_scores_far_from_zero(way, extreme):
    """Near or far scores may be greater by far; nothing overflows when the two are merged."""
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, relative_projections="kv")
    layout = bank_layout(mixer.config)
    with torch.no_grad():
        mixer.k_bank[layout.far_row if far_offsets == "shared" else -1] *= extreme
    tokens = torch.randn(BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    assert " local: " in explain_dispatch(mixer, tokens, layout)
    with torch.no_grad():
        found, expected = mixer(tokens, layout)[0], by_hand(mixer, tokens, size)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["full-qkv", "full-kv", "lor-kv"])
@each_turn
@each_way
def test_lower_precision_is_as_good_as_the_reference(way, rotary, form, dtype):
    """The backward pass takes weights from the log-sum-exp, which costs a few roundings where scores are not small.

    In single precision that is as much as the reference's own error, which hangs on the processor's exponential.
    """
    roundings = 4 if dtype == torch.float32 else 1
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, rotary, **FORMS[form]).to(dtype)
    layout, positions = bank_layout(mixer.config), torch.arange(num_tokens(size))[None]
    tokens, weight = torch.randn(2, BATCH, num_tokens(size), HIDDEN).to(dtype)
    wide = make_mixer(size, distance, far_offsets, rotary, **FORMS[form])
    wide.load_state_dict(mixer.state_dict())
    turn = turns(size, positions) if rotary else None
    truth = results(wide, tokens.double(), weight.double(), lambda *inputs: by_hand(*inputs, size, turn))
    found = {}
    for implementation in ("eager", "auto"):
        mixer.config._attn_implementation = implementation
        rotation = rotation_of(mixer, size, positions, dtype)
        with dispatch._recorded() as choices:
            found[implementation] = results(
                mixer,
                tokens,
                weight,
                lambda mixer, tokens: mixer(tokens, layout, rotation=rotation)[0],  # noqa: B023
            )
    assert choices[0][2].path == "local"
    for name in truth:
        assert found["auto"][name].dtype == dtype
        error, usual = (relative_error(found[path][name], truth[name]) for path in ("auto", "eager"))
        assert error < 2 * usual + roundings * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(
    ("size", "distance", "far_offsets", "rotary"),
    [
        (300, 3, "clamped", False),
        (300, 3, "clamped", True),
        ((19, 20), 1, "shared", False),
        ((19, 20), 1, "shared", True),
    ],
    ids=["text", "rotary-text", "image", "rotary-image"],
)
def test_nothing_as_large_as_the_square(size, distance, far_offsets, rotary, monkeypatch):
    monkeypatch.setattr(far_blocks, "BIAS_ELEMENTS", 1 << 9)
    length = num_tokens(size)
    mixer = make_mixer(size, distance, far_offsets, rotary, relative_projections="kv").float()
    layout, positions = bank_layout(mixer.config), torch.arange(length)[None]
    tokens = torch.randn(1, length, HIDDEN, requires_grad=True)
    rotation = rotation_of(mixer, size, positions, torch.float32)
    assert " local: " in explain_dispatch(mixer, tokens, layout, rotation=rotation)
    largest = LargestTensor()
    for place, name in ((local, "_forward"), (local, "_backward"), (projections, "_project_backward")):
        monkeypatch.setattr(place, name, largest.inside(getattr(place, name)))
    with largest:
        mixer(tokens, layout, rotation=rotation)[0].sum().backward()
    # Each head's features of each token, for as many near offsets as a token has and the far ones.
    assert length < largest.numel <= 2 * HEADS * HEAD_DIM * length < length**2 / 5


# What needs the square of weights


@each_turn
@each_way
def test_dropout_takes_another_path(way, rotary):
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, rotary, relative_projections="kv", attention_dropout=0.4).train()
    layout, positions = bank_layout(mixer.config), torch.arange(num_tokens(size))[None]
    tokens, weight = torch.randn(2, BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    found = {}
    for implementation in ("eager", "auto"):
        mixer.config._attn_implementation = implementation
        rotation = rotation_of(mixer, size, positions)
        with dispatch._recorded() as choices:
            torch.manual_seed(1)
            found[implementation] = results(
                mixer,
                tokens,
                weight,
                lambda mixer, tokens: mixer(tokens, layout, rotation=rotation)[0],  # noqa: B023
            )
        torch.manual_seed(2)
        another = mixer(tokens, layout, rotation=rotation)[0]
        assert relative_error(another, found[implementation]["output"]) > 0.01
    assert choices[0][2].path == ("reference" if rotary and not isinstance(size, int) else "grouped")
    assert_same(found["auto"], found["eager"])


@each_turn
@each_way
def test_a_learned_mask_has_gradients(way, rotary):
    size, distance, far_offsets = WAYS[way]
    mixer = make_mixer(size, distance, far_offsets, rotary, relative_projections="qv")
    layout, length = bank_layout(mixer.config), num_tokens(size)
    positions = torch.arange(length)[None]
    tokens, weight = torch.randn(2, BATCH, length, HIDDEN, dtype=torch.float64)
    bias = torch.randn(1, HEADS, length, length, dtype=torch.float64)
    found = {}
    for path in ("by hand", "eager", "auto"):
        learned = bias.clone().requires_grad_()
        if path == "by hand":
            visible, _ = visible_by_hand(size, None)
            turn = turns(size, positions) if rotary else None
            output = by_hand(mixer, tokens, size, turn, visible, learned)
        else:
            mixer.config._attn_implementation = path
            mask, rotation = make_mask(learned, layout, tokens), rotation_of(mixer, size, positions)
            with dispatch._recorded() as choices:
                output = mixer(tokens, layout, mask, rotation=rotation)[0]
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        gradients = torch.autograd.grad((output * weight).sum(), [learned, *parameters])
        found[path] = dict(zip(["output", "mask", *names], [output.detach(), *gradients], strict=True))
    assert choices[0][2].path not in ("local", "streamed")
    assert_same(found["eager"], found["by hand"])
    assert_same(found["auto"], found["by hand"])


# Switches


@each_way
@each_form
def test_switched_off_others_serve(way, form, monkeypatch):
    monkeypatch.setattr(dispatch, "LOCAL", False)
    size, distance, far_offsets = WAYS[way]
    for rotary in (False, True):
        assert compare(make_mixer(size, distance, far_offsets, rotary, **FORMS[form]), size) != "local"


def test_gradients_of_one_input_alone():
    size = (4, 3)
    mixer = make_mixer(size, 1, "shared", relative_projections="qkv")
    layout = bank_layout(mixer.config)
    tokens = torch.randn(BATCH, num_tokens(size), HIDDEN, dtype=torch.float64)
    for need in ("tokens", "q_bank", "k_bank", "v_bank"):
        found = []
        for run in (lambda tokens: mixer(tokens, layout)[0], lambda tokens: by_hand(mixer, tokens, size)):
            mixer.requires_grad_(False)
            inputs = tokens.clone().requires_grad_(need == "tokens")
            leaf = inputs if need == "tokens" else getattr(mixer, need).requires_grad_()
            found.append(torch.autograd.grad(run(inputs).pow(2).sum(), leaf)[0])
        assert relative_error(*found) < 1e-10, need


def test_an_empty_batch():
    for size, far_offsets in (((3, 2), "shared"), (6, "clamped")):
        mixer = make_mixer(size, 1, far_offsets, relative_projections="kv")
        tokens = torch.randn(0, num_tokens(size), HIDDEN, dtype=torch.float64, requires_grad=True)
        output = mixer(tokens, bank_layout(mixer.config), AttentionMask())[0]
        assert output.shape == (0, num_tokens(size), HIDDEN)
        output.sum().backward()
        assert not mixer.k_bank.grad.any()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["rotary-kv-D3", "rotary-q-D1"])
def test_positions_that_jump_within_a_text(name, use_cache):
    """Where a mask is given positions do not tell texts apart: they are what tokens are rotated by, whatever they are."""
    model = make_model(name)
    ids, positions = torch.randint(19, (BATCH, 7)), torch.tensor([[0, 1, 2, 8, 9, 10, 20]]).expand(BATCH, -1)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found = model(**inputs, use_cache=use_cache).logits
        model.set_attn_implementation("eager")
        expected = model(**inputs, use_cache=False).logits
    assert_same(found, expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["plain-kv-D3", "rotary-qkv-D2"])
def test_other_paths_fill_a_cache_too(name, static, monkeypatch):
    monkeypatch.setattr(dispatch, "LOCAL", False)
    test_chunks_and_steps_equal_the_whole(name, "none", static)


def test_an_empty_batch_with_a_mask():
    for size, far_offsets in (((3, 2), "shared"), (6, "clamped")):
        mixer = make_mixer(size, 1, far_offsets, relative_projections="kv")
        layout, length = bank_layout(mixer.config), num_tokens(size)
        tokens = torch.randn(0, length, HIDDEN, dtype=torch.float64)
        mask = make_mask(torch.ones(0, 1, length, length, dtype=torch.bool), layout, tokens)
        assert mixer(tokens, layout, mask)[0].shape == tokens.shape


def test_a_step_of_an_empty_batch_with_a_mask_for_each_head():
    model = make_model("rotary-kv-D3")
    heads = model.config.num_attention_heads
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5)):
            ids, mask = torch.zeros(0, stop - start, dtype=torch.long), torch.zeros(0, heads, stop - start, stop)
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits
            assert logits.shape == (0, stop - start, model.config.vocab_size)

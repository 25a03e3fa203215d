"""`TranslutionConfig`: defaults, sizes, round trips, and clear errors for bad values."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from translution import TranslutionConfig


DEFAULTS = {
    "modality": "image",
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "head_dim": 64,
    "intermediate_size": 768,
    "mixer_types": ["translution"] * 6,
    "relative_projections": "kv",
    "relative_rank": None,
    "offset_basis": None,
    "max_relative_distance": None,
    "far_offsets": "clamped",
    "use_absolute_position_embeddings": False,
    "kernel_size": 3,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0,
    "attention_dropout": 0,
    "classifier_dropout": None,
    "layer_norm_eps": 1e-5,
    "initializer_range": None,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "pooling": "cls",
    "out_features": None,
    "out_indices": None,
    "vocab_size": 50257,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "use_cache": True,
}
SIZES = {
    "tiny": (192, 6, 3, 768),
    "mini": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
SUBSETS = ["qkv", "qk", "qv", "kv", "q", "k", "v"]
MIXERS = [
    "translution",
    "rope_translution",
    "attention",
    "rope_attention",
    "relative_bias_attention",
    "relative_vector_attention",
    "convolution",
    "acmix",
]
# Every field away from its default.
UNUSUAL = {
    "image": {
        "modality": "image",
        "hidden_size": 20,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "head_dim": 4,
        "intermediate_size": 33,
        "mixer_types": MIXERS,
        "relative_projections": "qv",
        "relative_rank": 3,
        "max_relative_distance": 0,
        "far_offsets": "shared",
        "use_absolute_position_embeddings": True,
        "kernel_size": 5,
        "rope_theta": 100.0,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.25,
        "attention_dropout": 0.5,
        "classifier_dropout": 0.75,
        "layer_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "image_size": [15, 28],
        "patch_size": [5, 4],
        "num_channels": 1,
        "pooling": "mean",
        "out_features": ["stem", "stage3", "stage8"],
        "out_indices": [0, 3, -1],
        "num_labels": 7,
    },
    "text": {
        "modality": "text",
        "num_hidden_layers": 1,
        "mixer_types": ["attention"],
        "head_dim": 6,
        "vocab_size": 11,
        "max_position_embeddings": 17,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 4,
    },
}


def assert_rejected(words: tuple[str, ...], make, *args, **kwargs):
    """`make` raises an error whose message contains every one of `words`."""
    with pytest.raises((StrictDataclassError, ValueError, TypeError)) as caught:
        make(*args, **kwargs)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("field", DEFAULTS)
def test_default(field):
    assert getattr(TranslutionConfig(), field) == DEFAULTS[field]


def test_model_type_and_cache_keys():
    assert TranslutionConfig.model_type == "translution"
    assert TranslutionConfig().keys_to_ignore_at_inference == ["past_key_values"]


@pytest.mark.parametrize("size", SIZES)
def test_from_size(size):
    config = TranslutionConfig.from_size(size)
    measured = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert measured == SIZES[size]
    assert config.head_dim == 64
    assert config.mixer_types == ["translution"] * config.num_hidden_layers


def test_from_size_fields_override():
    config = TranslutionConfig.from_size("small", num_hidden_layers=2, modality="text", relative_rank=8)
    assert (config.hidden_size, config.num_hidden_layers, config.modality, config.relative_rank) == (384, 2, "text", 8)
    assert config.mixer_types == ["translution"] * 2


def test_from_size_unknown():
    assert_rejected(("`size`", "'huge'", *map(repr, SIZES)), TranslutionConfig.from_size, "huge")


LOCAL = {
    "image": {"mixer_types": "translution", "max_relative_distance": 1, "far_offsets": "shared"},
    "text": {"mixer_types": "rope_translution", "max_relative_distance": 3, "far_offsets": "clamped"},
}


@pytest.mark.parametrize("modality", LOCAL)
@pytest.mark.parametrize("size", SIZES)
def test_from_size_local(size, modality):
    config = TranslutionConfig.from_size(size, "local", modality=modality)
    expected = TranslutionConfig.from_size(size, modality=modality, relative_projections="kv", **LOCAL[modality])
    assert config.to_dict() == expected.to_dict()
    assert config.max_relative_distance == LOCAL[modality]["max_relative_distance"]
    # As a keyword too, and images where no modality is named.
    assert TranslutionConfig.from_size(size, preset="local", modality=modality).to_dict() == config.to_dict()
    assert (
        TranslutionConfig.from_size(size, "local").to_dict()
        == TranslutionConfig.from_size(size, "local", modality="image").to_dict()
    )
    assert (
        TranslutionConfig.from_size(size, None, modality=modality).to_dict()
        == TranslutionConfig.from_size(size, modality=modality).to_dict()
    )


def test_from_size_local_fields_override():
    fields = {"relative_projections": "qkv", "max_relative_distance": 2, "num_hidden_layers": 2, "relative_rank": 4}
    config = TranslutionConfig.from_size("tiny", "local", modality="text", **fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.mixer_types == ["rope_translution"] * 2
    mixers = ["attention", "translution"]
    assert TranslutionConfig.from_size("tiny", "local", num_hidden_layers=2, mixer_types=mixers).mixer_types == mixers


def test_from_size_local_errors():
    from_size = TranslutionConfig.from_size
    assert_rejected(("`preset`", "None", "'local'", "got 'global'"), from_size, "tiny", "global")
    assert_rejected(("`size`", "'huge'", *map(repr, SIZES)), from_size, "huge", "local")
    assert_rejected(("`size`", "['tiny']", *map(repr, SIZES)), from_size, ["tiny"])
    assert_rejected(("`preset`", "['local']", "'local'"), from_size, "tiny", ["local"])
    assert_rejected(("`modality`", "'video'", "'image'", "'text'"), from_size, "tiny", "local", modality="video")
    words = ("`far_offsets` 'shared'", "`max_relative_distance`", "got None")
    assert_rejected(words, from_size, "tiny", "local", max_relative_distance=None)
    words = ("`mixer_types`", "'rope_translution'", "`max_relative_distance`")
    assert_rejected(words, from_size, "tiny", "local", modality="text", max_relative_distance=None)


@pytest.mark.parametrize("modality", UNUSUAL)
def test_json_round_trip(modality):
    config = TranslutionConfig(**UNUSUAL[modality])
    again = TranslutionConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert {field: getattr(again, field) for field in UNUSUAL[modality]} == UNUSUAL[modality]


@pytest.mark.parametrize("load", [TranslutionConfig.from_pretrained, AutoConfig.from_pretrained], ids=["own", "auto"])
@pytest.mark.parametrize("modality", UNUSUAL)
def test_save_and_load(tmp_path, modality, load):
    config = TranslutionConfig(**UNUSUAL[modality])
    config.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is TranslutionConfig
    assert {field: getattr(again, field) for field in UNUSUAL[modality]} == UNUSUAL[modality]


def test_auto_config_for_model():
    config = AutoConfig.for_model("translution", modality="text", hidden_size=24)
    assert type(config) is TranslutionConfig
    assert (config.modality, config.hidden_size) == ("text", 24)


def test_load_checks_values(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "translution", "relative_projections": "vk"}')
    assert_rejected(("`relative_projections`", "'vk'", "'kv'"), AutoConfig.from_pretrained, tmp_path)


@pytest.mark.parametrize("name", MIXERS)
def test_one_mixer_name_stands_for_all_layers(name):
    config = TranslutionConfig(mixer_types=name, relative_rank=2, num_hidden_layers=3)
    assert config.mixer_types == [name] * 3


def test_mixer_types_default_follows_num_hidden_layers():
    assert TranslutionConfig(num_hidden_layers=2).mixer_types == ["translution"] * 2
    assert TranslutionConfig(num_hidden_layers=2, mixer_types=None).mixer_types == ["translution"] * 2


def test_mixer_types_list_is_kept():
    assert TranslutionConfig(num_hidden_layers=8, mixer_types=MIXERS, relative_rank=2).mixer_types == MIXERS


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_subsets(subset, rank):
    config = TranslutionConfig(relative_projections=subset, relative_rank=rank)
    assert (config.relative_projections, config.relative_rank) == (subset, rank)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [(24, 8, (3, 3)), ([24, 40], 8, (3, 5)), ((24, 40), (12, 4), (2, 10)), (12, [4, 12], (3, 1)), (7, 7, (1, 1))],
)
def test_grid(image_size, patch_size, grid):
    assert TranslutionConfig(image_size=image_size, patch_size=patch_size).grid_height_width == grid


def test_text_does_not_check_the_image():
    assert TranslutionConfig(modality="text", image_size=225).image_size == 225


# Fields, and what the message must contain: the field, the value, what is allowed.
BAD_VALUES = {
    "modality": ({"modality": "video"}, ("`modality`", "'video'", "'image'", "'text'")),
    "pooling": ({"pooling": "max"}, ("`pooling`", "'max'", "'cls'", "'mean'")),
    "subset-order": ({"relative_projections": "vk"}, ("`relative_projections`", "'vk'", *map(repr, SUBSETS))),
    "subset-empty": ({"relative_projections": ""}, ("`relative_projections`", "''", *map(repr, SUBSETS))),
    "subset-unknown": ({"relative_projections": "qx"}, ("`relative_projections`", "'qx'", *map(repr, SUBSETS))),
    "rank-zero": ({"relative_rank": 0}, ("`relative_rank`", "got 0", "integer of at least 1")),
    "rank-negative": ({"relative_rank": -1}, ("`relative_rank`", "got -1", "integer of at least 1")),
    "mixer-unknown": ({"mixer_types": "mamba"}, ("`mixer_types`", "'mamba'", *map(repr, MIXERS))),
    "mixer-unknown-in-list": (
        {"mixer_types": ["translution", "mamba"], "num_hidden_layers": 2},
        ("`mixer_types`", "'mamba'", *map(repr, MIXERS)),
    ),
    "mixers-too-few": ({"mixer_types": ["attention"]}, ("`mixer_types`", "`num_hidden_layers` is 6", "got 1")),
    "mixers-none": ({"mixer_types": []}, ("`mixer_types`", "`num_hidden_layers` is 6", "got 0")),
    "mixers-too-many": (
        {"mixer_types": ["attention"] * 3, "num_hidden_layers": 2},
        ("`mixer_types`", "`num_hidden_layers` is 2", "got 3", "'attention'"),
    ),
    "far-offsets-unknown": (
        {"max_relative_distance": 1, "far_offsets": "same"},
        ("`far_offsets`", "'same'", "'clamped'", "'shared'"),
    ),
    "far-offsets-without-a-distance": (
        {"far_offsets": "shared"},
        ("`far_offsets` 'shared'", "`max_relative_distance`", "integer", "got None"),
    ),
    "offset-basis-zero": ({"offset_basis": 0}, ("`offset_basis`", "got 0", "at least 1")),
    "distance-negative": ({"max_relative_distance": -1}, ("`max_relative_distance`", "got -1", "at least 0")),
    "image-indivisible": ({"image_size": 225}, ("`image_size`", "225", "multiple of `patch_size` 16")),
    "image-indivisible-width": (
        {"image_size": [32, 40], "patch_size": 16},
        ("`image_size`", "[32, 40]", "multiple of `patch_size` 16"),
    ),
    "image-indivisible-height": (
        {"image_size": [33, 40], "patch_size": [16, 8]},
        ("`image_size`", "[33, 40]", "multiple of `patch_size` [16, 8]"),
    ),
    "image-smaller-than-patch": ({"image_size": 8}, ("`image_size`", "8", "multiple of `patch_size` 16")),
    "image-zero": ({"image_size": 0}, ("`image_size`", "got 0", "positive")),
    "image-one-side": ({"image_size": [32]}, ("`image_size`", "[32]", "int or [height, width]")),
    "image-three-sides": ({"image_size": [32, 32, 32]}, ("`image_size`", "[32, 32, 32]", "int or [height, width]")),
    "patch-zero": ({"patch_size": [0, 4]}, ("`patch_size`", "[0, 4]", "positive")),
    "patch-negative": ({"patch_size": -4}, ("`patch_size`", "-4", "positive")),
    "hidden-dropout-one": ({"hidden_dropout_prob": 1.0}, ("`hidden_dropout_prob`", "got 1.0", "less than 1")),
    "hidden-dropout-negative": ({"hidden_dropout_prob": -0.1}, ("`hidden_dropout_prob`", "-0.1", "at least 0")),
    "attention-dropout-large": ({"attention_dropout": 1.5}, ("`attention_dropout`", "got 1.5", "less than 1")),
    "attention-dropout-nan": ({"attention_dropout": float("nan")}, ("`attention_dropout`", "nan", "less than 1")),
    "kernel-even": ({"kernel_size": 4}, ("`kernel_size`", "got 4", "odd")),
    "kernel-zero": ({"kernel_size": 0}, ("`kernel_size`", "got 0", "at least 1")),
    "theta-zero": ({"rope_theta": 0.0}, ("`rope_theta`", "got 0.0", "positive")),
    "eps-zero": ({"layer_norm_eps": 0.0}, ("`layer_norm_eps`", "got 0.0", "positive")),
    "initializer-negative": ({"initializer_range": -0.1}, ("`initializer_range`", "got -0.1", "None or at least 0")),
    "activation": ({"hidden_act": "gelo"}, ("`hidden_act`", "'gelo'", "'gelu'", "'relu'")),
    "rope-head-text-1": (
        {"modality": "text", "mixer_types": "rope_attention", "head_dim": 7},
        ("`head_dim`", "got 7", "multiple of 2", "'text'"),
    ),
    "rope-head-image-2": (
        {"mixer_types": "rope_attention", "head_dim": 6},
        ("`head_dim`", "got 6", "multiple of 4", "'image'"),
    ),
    "rope-head-translution": (
        {"mixer_types": "rope_translution", "relative_rank": 2, "head_dim": 10},
        ("`head_dim`", "got 10", "multiple of 4"),
    ),
    **{
        f"{field}-zero": ({field: 0}, (f"`{field}`", "got 0", "at least 1"))
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "num_channels",
            "vocab_size",
            "max_position_embeddings",
        )
    },
    **{
        f"{field}-astronomical": ({field: 10**30 + 1}, (f"`{field}`", "at most 2147483647", f"got {10**30 + 1}"))
        for field in (
            "hidden_size",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "relative_rank",
            "offset_basis",
            "max_relative_distance",
            "kernel_size",
            "num_channels",
            "vocab_size",
            "max_position_embeddings",
            "image_size",
            "patch_size",
        )
    },
    "theta-astronomical": ({"rope_theta": 10**310}, ("`rope_theta`", "finite")),
    "initializer-astronomical": ({"initializer_range": 10**310}, ("`initializer_range`", "finite")),
    "num_hidden_layers-ten-million": (
        {"num_hidden_layers": 10**7},
        ("`num_hidden_layers`", "at most 10000", "10000000"),
    ),
    "num_hidden_layers-astronomical": (
        {"num_hidden_layers": 10**30},
        ("`num_hidden_layers`", "at most 10000", "got 1000"),
    ),
    "acmix-sizes": (
        {"mixer_types": "acmix", "head_dim": 32},
        ("`mixer_types`", "'acmix'", "`num_attention_heads` × `head_dim`", "`hidden_size`", "3 × 32 and 192"),
    ),
    **{
        f"rope-full-{subset}": (
            {"mixer_types": "rope_translution", "relative_projections": subset},
            (
                *("`mixer_types`", "'rope_translution'", "`relative_rank`", "`max_relative_distance`"),
                *("`relative_projections`", repr(subset), "'v'"),
            ),
        )
        for subset in SUBSETS
        if subset != "v"
    },
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(case):
    fields, words = BAD_VALUES[case]
    assert_rejected(words, TranslutionConfig, **fields)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("distance", [None, 0, 3])
@pytest.mark.parametrize("basis", [None, 2])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_rope_translution_combinations(modality, basis, distance, rank, subset):
    fields = {
        "modality": modality,
        "mixer_types": "rope_translution",
        "relative_projections": subset,
        "relative_rank": rank,
        "max_relative_distance": distance,
        "offset_basis": basis,
    }
    if rank is None and distance is None and subset != "v":
        assert_rejected(("'rope_translution'", repr(subset)), TranslutionConfig, **fields)
    else:
        assert TranslutionConfig(**fields).mixer_types == ["rope_translution"] * 6


@pytest.mark.parametrize("modality", ["image", "text"])
def test_head_dim_of_plain_mixers_is_free(modality):
    assert TranslutionConfig(modality=modality, head_dim=7, mixer_types="translution").head_dim == 7


def test_rope_text_needs_two_only():
    assert TranslutionConfig(modality="text", head_dim=6, mixer_types="rope_attention").head_dim == 6


# Wrong types: the field, the value, and the type that is expected.
BAD_TYPES = {
    "modality": (0, "str"),
    "hidden_size": ("192", "int"),
    "num_hidden_layers": (True, "int"),
    "num_attention_heads": (3.0, "int"),
    "head_dim": (None, "int"),
    "mixer_types": (3, "str"),
    "relative_projections": (["k", "v"], "str"),
    "relative_rank": ("8", "int"),
    "offset_basis": (True, "int"),
    "max_relative_distance": (1.5, "int"),
    "far_offsets": (True, "str"),
    "use_absolute_position_embeddings": (1, "bool"),
    "kernel_size": ("3", "int"),
    "rope_theta": (True, "float"),
    "hidden_act": (None, "str"),
    "hidden_dropout_prob": ("0.1", "float"),
    "attention_dropout": (False, "float"),
    "layer_norm_eps": ("1e-5", "float"),
    "image_size": ("224", "int"),
    "patch_size": (True, "int"),
    "num_channels": (False, "int"),
    "vocab_size": (11.0, "int"),
    "tie_word_embeddings": ("yes", "bool"),
    "use_cache": (0, "bool"),
}


@pytest.mark.parametrize("when", ["made", "assigned"])
@pytest.mark.parametrize("field", BAD_TYPES)
def test_bad_type(field, when):
    value, expected = BAD_TYPES[field]
    words = (f"'{field}'", str(value), expected)
    if when == "made":
        assert_rejected(words, TranslutionConfig, **{field: value})
    else:
        assert_rejected(words, setattr, TranslutionConfig(), field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("relative_rank", True), ("image_size", [True, 16]), ("patch_size", ["4", "4"]), ("mixer_types", [1] * 6)],
    ids=str,
)
def test_bad_type_inside(field, value):
    assert_rejected((f"'{field}'", str(value)), TranslutionConfig, **{field: value})

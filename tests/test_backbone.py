"""The trunk for images as a backbone: its feature maps, and Transformers' models that take one."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import assert_rejected, assert_same, few_variants, make_config, make_inputs, make_model
from test_configuration import assert_rejected as assert_config_rejected
from transformers import (
    AutoBackbone,
    AutoModelForSemanticSegmentation,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from translution import TranslutionBackbone, TranslutionConfig, TranslutionForImageClassification, TranslutionModel


STAGES = ["stem", "stage1", "stage2"]


def make_backbone(variant="full-kv", dtype=torch.float64, **fields):
    return TranslutionBackbone(make_config("image", variant, **fields)).to(dtype).eval()


def make_pixels(backbone, batch=2):
    return make_inputs(backbone.config, batch)["pixel_values"].to(backbone.dtype)


# Feature maps


@few_variants
def test_feature_maps(variant):
    """Against the layers' outputs, patch by patch, on a grid of three rows and two columns."""
    layers = make_config(variant=variant).num_hidden_layers
    backbone = make_backbone(variant, out_indices=list(range(layers + 1)))
    received, returned = [], []
    for layer in backbone.model.layers:
        layer.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: returned.append(output))
    maps = backbone(make_pixels(backbone)).feature_maps
    assert len(maps) == layers + 1
    for feature_map, tokens in zip(maps, [received[0], *returned], strict=True):
        assert feature_map.shape == (2, 12, 3, 2)
        tokens = backbone.model.norm(tokens)
        for row in range(3):
            for column in range(2):
                assert_close_in_rounding(feature_map[:, :, row, column], tokens[:, 1 + row * 2 + column])


def test_the_last_stage_is_what_the_trunk_returns():
    backbone = make_backbone()
    pixels = make_pixels(backbone)
    assert (backbone.out_features, backbone.out_indices, backbone.channels) == (["stage2"], [2], [12])
    assert backbone.out_feature_channels == dict.fromkeys(STAGES, 12)
    (feature_map,) = backbone(pixels).feature_maps
    tokens = backbone.model(pixels).last_hidden_state
    assert_close_in_rounding(feature_map.flatten(2), tokens[:, 1:].transpose(1, 2))


@pytest.mark.parametrize("variant", ["full-kv", "local-shared", "hybrid-lor"])
def test_other_resolutions(variant):
    """Without being told, as models with a backbone cannot tell it."""
    backbone = make_backbone(variant)
    pixels = torch.randn(2, 3, 8, 20, dtype=torch.float64)
    (feature_map,) = backbone(pixels).feature_maps
    assert feature_map.shape == (2, 12, 2, 4)
    tokens = backbone.model(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_close_in_rounding(feature_map.flatten(2), tokens[:, 1:].transpose(1, 2))
    words = ("`pixel_values`", "`image_size` [12, 10]", "got [8, 20]")
    assert_rejected(words, backbone, pixels, interpolate_pos_encoding=False)
    assert_rejected(("`pixel_values`", "`patch_size` [4, 5]", "got [8, 21]"), backbone, torch.randn(2, 3, 8, 21))


def test_other_outputs():
    backbone = make_backbone("hybrid-full", out_features=["stem", "stage3"])
    pixels = make_pixels(backbone)
    plain = backbone(pixels)
    assert (plain.hidden_states, plain.attentions) == (None, None)
    output = backbone(pixels, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5
    assert [weights.shape for weights in output.attentions] == [(2, 2, 7, 7)] * 4
    assert_same(output.feature_maps[1], plain.feature_maps[1])
    first, second = backbone(pixels, return_dict=False)[0]
    assert_close_in_rounding(first, plain.feature_maps[0])
    assert_close_in_rounding(second, plain.feature_maps[1])
    backbone.set_attn_implementation("eager")
    assert_same(backbone(pixels).feature_maps[1], plain.feature_maps[1])


def test_a_mask_hides_patches():
    backbone = make_backbone()
    pixels = make_pixels(backbone)
    changed = pixels.clone()
    changed[:, :, 8:, 5:] = torch.randn(2, 3, 4, 5)
    mask = torch.ones(2, 7)
    mask[:, -1] = 0
    one, other = (backbone(image, attention_mask=mask).feature_maps[0].flatten(2) for image in (pixels, changed))
    assert_close_in_rounding(one[:, :, :-1], other[:, :, :-1])
    assert not torch.allclose(one[:, :, -1], other[:, :, -1])


def test_bfloat16():
    backbone = make_backbone(dtype=torch.float32, out_indices=[0, 1, 2], initializer_range=None)
    pixels = make_pixels(backbone)
    expected = backbone(pixels).feature_maps
    for feature_map, exact in zip(backbone.to(torch.bfloat16)(pixels).feature_maps, expected, strict=True):
        assert feature_map.dtype == torch.bfloat16
        # Two layers and the weights themselves are rounded.
        assert_close_in_rounding(feature_map.float(), exact, 16, torch.bfloat16)


def test_gradient_checkpointing():
    backbone = make_backbone("hybrid-full", out_indices=[1, 4]).train()
    pixels = make_pixels(backbone)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.zero_grad()
        sum(feature_map.square().sum() for feature_map in backbone(pixels).feature_maps).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in backbone.named_parameters()})
    assert backbone.model.layers[0].gradient_checkpointing
    assert_same(gradients[1], gradients[0])


# Configuration


def test_stages_by_name_and_by_index():
    config = make_config(out_features=["stem", "stage2"])
    assert (config.stage_names, config.out_indices) == (STAGES, [0, 2])
    assert make_config(out_indices=(0, -1)).out_features == ["stem", "stage2"]
    assert (make_config().out_features, make_config().out_indices) == (None, None)
    config.out_indices = [1]
    assert config.out_features == ["stage1"]
    again = TranslutionConfig.from_dict(config.to_dict())
    assert (again.out_features, again.out_indices, again.to_dict()) == (["stage1"], [1], config.to_dict())
    assert make_config(stage_names=STAGES).stage_names == STAGES


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"out_features": ["stage3"]}, ("out_features", "['stem', 'stage1', 'stage2']", "['stage3']")),
        ({"out_features": ["stage2", "stage1"]}, ("out_features", "order", "['stage2', 'stage1']")),
        ({"out_features": []}, ("`out_features`", "at least one", "['stem', 'stage1', 'stage2']", "got []")),
        ({"out_indices": [3]}, ("`out_indices`", "at least -3", "at most 2", "got 3")),
        ({"out_indices": [-4]}, ("`out_indices`", "at least -3", "at most 2", "got -4")),
        ({"out_indices": [1, 1]}, ("out_indices", "duplicates", "[1, 1]")),
        ({"out_features": ["stem"], "out_indices": [1]}, ("out_features", "out_indices", "same stages")),
        ({"out_features": "stem"}, ("out_features", "stem")),
        ({"stage_names": ["stem"]}, ("`stage_names`", "'stage2'", "`num_hidden_layers` is 2", "got ['stem']")),
        ({"modality": "text", "out_indices": [1]}, ("`out_indices`", "None", "'text'", "got [1]")),
        ({"modality": "text", "out_features": ["stem"]}, ("`out_features`", "None", "'text'", "got ['stem']")),
        ({"classifier_dropout": 1.0}, ("`classifier_dropout`", "less than 1", "got 1.0")),
    ],
    ids=str,
)
def test_bad_config(fields, words):
    assert_config_rejected(words, make_config, **fields)


def test_bad_modality():
    words = ("TranslutionBackbone", "`modality` 'image'", "got 'text'")
    for make in (TranslutionBackbone, AutoBackbone.from_config):
        assert_rejected(words, make, make_config("text"))


def test_bad_inputs():
    backbone = make_backbone()
    assert_rejected(("`pixel_values`", "[batch, channels, height, width]"), backbone, torch.zeros(3, 12, 10))
    assert_rejected(("`pixel_values`", "got None"), backbone, None)
    assert_rejected(("`input_ids`", "'image'"), backbone, make_pixels(backbone), input_ids=torch.ones(2, 3).long())


# Checkpoints


def test_starts_from_a_classifier(tmp_path):
    source = make_model("image", "hybrid-full", torch.float32)
    source.save_pretrained(tmp_path)
    backbone, report = TranslutionBackbone.from_pretrained(
        tmp_path, out_features=["stage1", "stage4"], output_loading_info=True
    )
    assert not report["missing_keys"]
    assert report["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    trunk = source.model.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in backbone.model.state_dict().items())
    backbone.save_pretrained(tmp_path)
    again, report = TranslutionBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.out_indices == [1, 4]
    pixels = make_pixels(backbone)
    for one, other in zip(again(pixels).feature_maps, backbone(pixels).feature_maps, strict=True):
        assert_close_in_rounding(one, other)
    # The trunk alone, and back.
    assert type(TranslutionModel.from_pretrained(tmp_path)) is TranslutionModel


def test_fewer_layers_have_fewer_stages(tmp_path):
    make_model("image", dtype=torch.float32).save_pretrained(tmp_path)
    fields = {"num_hidden_layers": 1, "mixer_types": ["translution"]}
    backbone = TranslutionBackbone.from_pretrained(tmp_path, **fields)
    assert (backbone.stage_names, backbone.out_features) == (["stem", "stage1"], ["stage1"])
    backbone.save_pretrained(tmp_path)
    words = ("out_features", "['stem', 'stage1']")
    with pytest.raises(ValueError, match="out_features") as caught:
        TranslutionBackbone.from_pretrained(tmp_path, out_features=["stage2"])
    assert all(word in str(caught.value) for word in words)


def test_auto_class(hub):
    """`AutoBackbone` loads from the Hub alone: it asks whether there is a repository, even where a folder is named."""
    backbone = make_backbone("hybrid-full", torch.float32, out_indices=[2, 4])
    assert type(AutoBackbone.from_config(backbone.config)) is TranslutionBackbone
    backbone.push_to_hub("user/backbone")
    loaded = AutoBackbone.from_pretrained("user/backbone", out_indices=[1, 4])
    assert type(loaded) is TranslutionBackbone
    assert loaded.out_features == ["stage1", "stage4"]
    pixels = make_pixels(backbone)
    assert_close_in_rounding(loaded(pixels).feature_maps[1], backbone(pixels).feature_maps[1])


SOURCES = {
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"image_size": 8, "mlp_ratio": 2}),
    "vit": (ViTConfig, ViTForImageClassification, {"image_size": [8, 12], "intermediate_size": 24}),
}


@pytest.mark.parametrize("family", SOURCES)
def test_converted_models(family, tmp_path):
    """A converted model gives the feature maps of its source.

    DINOv2 interpolates positions for any image, and needs a square of them; ViT takes a grid that is none as it is.
    """
    config_class, head, fields = SOURCES[family]
    config = config_class(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, **fields)
    source = head(config).double().eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    if family == "dinov2":
        config.out_indices = [0, 1, 2]
        reference = Dinov2Backbone(config).double().eval()
        reference.load_state_dict(source.dinov2.state_dict(), strict=False)
        expected = reference(pixels).feature_maps
    else:
        tokens = source.vit(pixels, output_hidden_states=True).hidden_states
        expected = [source.vit.layernorm(each)[:, 1:].transpose(1, 2).unflatten(2, (2, 3)) for each in tokens]
    TranslutionForImageClassification.from_attention(source, max_relative_distance=1).save_pretrained(tmp_path)
    backbone = TranslutionBackbone.from_pretrained(tmp_path, out_indices=[0, 1, 2], dtype=torch.float64).eval()
    for feature_map, other in zip(backbone(pixels).feature_maps, expected, strict=True):
        assert_close_in_rounding(feature_map, other)


# Models with a backbone


def make_segmenter(**fields):
    config = UperNetConfig(
        backbone_config=make_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], initializer_range=None, **fields),
        hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8, num_labels=3,
    )  # fmt: skip
    return UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize("variant", ["full-kv", "local-shared"])
def test_trains_a_segmenter(variant):
    model = make_segmenter(max_relative_distance=1, far_offsets="shared") if variant != "full-kv" else make_segmenter()
    assert type(model.backbone) is TranslutionBackbone
    pixels, labels = torch.randn(2, 3, 12, 10), torch.randint(3, (2, 12, 10))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    loss = model(pixels, labels=labels).loss
    loss.backward()
    optimizer.step()
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same
    assert model.eval()(torch.randn(1, 3, 16, 15)).logits.shape == (1, 3, 16, 15)


def test_saves_and_loads_a_segmenter(tmp_path):
    model = make_segmenter().eval()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.backbone.out_indices == [1, 2, 3, 4]
    pixels = torch.randn(2, 3, 12, 10)
    assert_close_in_rounding(loaded(pixels).logits, model(pixels).logits)

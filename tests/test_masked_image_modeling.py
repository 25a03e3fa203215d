"""The head that reconstructs masked patches: what it computes, what it refuses, and checkpoints of other heads."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import assert_rejected, assert_same, make_config, make_inputs, make_model
from transformers import (
    AutoModelForMaskedImageModeling,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)

from translution import TranslutionForImageClassification, TranslutionForMaskedImageModeling, TranslutionModel


# Of a grid of three rows and two columns, in two images.
MASKED = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
some_variants = pytest.mark.parametrize("variant", ["full-kv", "full-absolute", "local-shared", "hybrid-all"])


def make_head(variant="full-kv", dtype=torch.float64, **fields):
    return TranslutionForMaskedImageModeling(make_config("image", variant, **fields)).to(dtype).eval()


def make_pixels(model):
    return make_inputs(model.config)["pixel_values"].to(model.dtype)


def pixels_of_patches(masked, patch_size):
    """`[batch, height, width]`: the patches of `[batch, rows, columns]`, pixel by pixel."""
    return masked.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)


# Values


@some_variants
def test_reconstruction(variant):
    """Patch by patch from the last hidden states: a Linear gives the pixels of a patch, row by row, channels last."""
    model = make_head(variant)
    pixels = make_pixels(model)
    output = model(pixels, MASKED)
    tokens = model.model(pixels, bool_masked_pos=MASKED).last_hidden_state
    assert output.reconstruction.shape == pixels.shape
    for image in range(2):
        for row in range(3):
            for column in range(2):
                token = tokens[image, 1 + row * 2 + column]
                patch = (model.decoder.weight @ token + model.decoder.bias).view(4, 5, 3).permute(2, 0, 1)
                part = output.reconstruction[image, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5]
                assert_close_in_rounding(part, patch)


@pytest.mark.parametrize("variant", ["full-kv", "full-absolute"])
def test_the_mask_token_takes_the_place_of_patches_before_positions_are_added(variant):
    model = make_head(variant)
    pixels, embeddings = make_pixels(model), model.model.embeddings
    plain, masked = embeddings(pixels), embeddings(pixels, bool_masked_pos=MASKED)
    positions = torch.zeros(1, 7, 12).double() if variant == "full-kv" else embeddings.position_embeddings
    for image in range(2):
        assert_close_in_rounding(masked[image, 0], plain[image, 0])
        for patch in range(6):
            token = embeddings.mask_token[0, 0] + positions[0, 1 + patch]
            expected = token if MASKED[image, patch] else plain[image, 1 + patch]
            assert_close_in_rounding(masked[image, 1 + patch], expected)


@some_variants
def test_masked_pixels_are_not_seen(variant):
    model = make_head(variant)
    pixels = make_pixels(model)
    hidden = pixels_of_patches(MASKED.view(2, 3, 2), (4, 5))[:, None]
    expected = model(pixels, MASKED)
    output = model(torch.where(hidden, torch.randn(2, 3, 12, 10).double(), pixels), MASKED)
    assert_close_in_rounding(output.reconstruction, expected.reconstruction)
    assert not torch.allclose(output.loss, expected.loss)
    # Those of other patches are.
    seen = model(torch.where(hidden, pixels, pixels + 1 - 2 * pixels.sign()), MASKED).reconstruction
    assert not torch.allclose(seen, expected.reconstruction)


def test_eager_is_the_same():
    model = make_head("hybrid-all")
    pixels = make_pixels(model)
    expected = model(pixels, MASKED).reconstruction
    model.set_attn_implementation("eager")
    assert_same(model(pixels, MASKED).reconstruction, expected)


def test_loss():
    """By hand over the pixels of masked patches alone, and as that of Transformers' ViT."""
    model = make_head()
    pixels = make_pixels(model)
    output = model(pixels, MASKED)
    errors = []
    for image, patch in MASKED.nonzero().tolist():
        rows, columns = slice(patch // 2 * 4, patch // 2 * 4 + 4), slice(patch % 2 * 5, patch % 2 * 5 + 5)
        errors.append((output.reconstruction - pixels)[image, :, rows, columns].abs().flatten())
    assert_close_in_rounding(output.loss, torch.cat(errors).mean())
    assert_close_in_rounding(model(pixels, MASKED.long()).loss, output.loss)
    assert model(pixels, torch.zeros_like(MASKED)).loss == 0
    values, loss = model(pixels, MASKED, return_dict=False)[1::-1]
    assert_close_in_rounding(values, output.reconstruction)
    assert_close_in_rounding(loss, output.loss)


def test_loss_in_half_precision():
    """A sum of errors beyond what half precision holds, 65504."""
    model = make_head("attention", torch.float16)
    pixels = torch.full((2, 3, 12, 10), 1000.0, dtype=torch.float16)
    output = model(pixels, torch.ones_like(MASKED))
    assert output.loss.dtype == torch.float32
    errors = (output.reconstruction.double() - pixels.double()).abs()
    assert errors.sum() > 65504
    # Each error is exact in float32, and the mean of 720 is rounded a few times.
    assert_close_in_rounding(output.loss.double(), errors.mean(), dtype=torch.float32)


@pytest.mark.parametrize("variant", ["full-kv", "full-absolute", "local-shared"])
def test_other_resolutions(variant):
    model = make_head(variant)
    pixels, masked = torch.randn(2, 3, 8, 20, dtype=torch.float64), torch.rand(2, 8) < 0.5
    masked[0, 0] = True
    output = model(pixels, masked, interpolate_pos_encoding=True)
    assert output.reconstruction.shape == pixels.shape
    errors = (output.reconstruction - pixels).abs().movedim(1, -1)
    assert_close_in_rounding(output.loss, errors[pixels_of_patches(masked.view(2, 2, 4), (4, 5))].mean())
    assert_rejected(("`pixel_values`", "`interpolate_pos_encoding=True`", "got [8, 20]"), model, pixels, masked)
    words = ("`bool_masked_pos`", "[batch, patches] [2, 8]", "got shape [2, 6]")
    assert_rejected(words, model, pixels, MASKED, interpolate_pos_encoding=True)


def test_gradients_with_and_without_checkpointing():
    model = make_head("hybrid-full").train()
    pixels = make_pixels(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(pixels, MASKED).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.model.layers[0].gradient_checkpointing
    assert_same(gradients[1], gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_learns():
    model = make_head(dtype=torch.float32, initializer_range=None).train()
    pixels = make_pixels(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = model(pixels, MASKED).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Each image has another pattern, which the visible patches tell apart.
    assert losses[-1] < losses[0] / 2


# Bad input


@pytest.mark.parametrize(
    ("masked", "words"),
    [
        (None, ("must be booleans [batch, patches]", "got None")),
        (MASKED[:, :5], ("[2, 6]", "got shape [2, 5]")),
        (MASKED[:1], ("[2, 6]", "got shape [1, 6]")),
        (MASKED.view(2, 3, 2), ("[2, 6]", "got shape [2, 3, 2]")),
        (MASKED.float(), ("booleans, or integers 0 and 1", "torch.float32")),
        (MASKED.long() - 1, ("booleans, or integers 0 and 1", "got -1")),
        (MASKED.int() + 1, ("booleans, or integers 0 and 1", "got 2")),
    ],
    ids=str,
)
def test_bad_masks(masked, words):
    model = make_head()
    assert_rejected(("`bool_masked_pos`", *words), model, make_pixels(model), masked)


def test_bad_inputs():
    model = make_head()
    assert_rejected(("`pixel_values`", "got None"), model, None, MASKED)
    assert_rejected(("`input_ids`", "'image'"), model, make_pixels(model), MASKED, input_ids=torch.ones(2, 3).long())
    words = ("TranslutionForMaskedImageModeling", "`modality` 'image'", "got 'text'")
    for make in (TranslutionForMaskedImageModeling, AutoModelForMaskedImageModeling.from_config):
        assert_rejected(words, make, make_config("text"))
    words = ("TranslutionModel", "`modality` 'image'", "got 'text'")
    assert_rejected(words, TranslutionModel, make_config("text"), use_mask_token=True)


def test_models_without_a_mask_token():
    words = ("`bool_masked_pos`", "mask token", "`TranslutionForMaskedImageModeling`", "got shape [2, 6]")
    for head in (True, False):
        model = make_model("image", head=head)
        assert model.get_submodule("model.embeddings" if head else "embeddings").mask_token is None
        assert_rejected(words, model, pixel_values=make_pixels(model), bool_masked_pos=MASKED)
    model = make_model("text")
    assert_rejected(("`bool_masked_pos`", "'text'"), model, torch.ones(2, 3).long(), bool_masked_pos=MASKED)


# Checkpoints


NEW = {"model.embeddings.mask_token", "decoder.weight", "decoder.bias"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}


def assert_same_trunk(model, source, without=()):
    trunk, other = model.model.state_dict(), source.model.state_dict()
    assert trunk.keys() - set(without) == other.keys() - set(without)
    assert all(torch.equal(trunk[name], other[name]) for name in trunk.keys() - set(without))


def test_saves_and_loads(tmp_path):
    source = make_head("hybrid-full", torch.float32)
    source.save_pretrained(tmp_path)
    loaded, report = AutoModelForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is TranslutionForMaskedImageModeling
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_trunk(loaded, source)
    pixels = make_pixels(source)
    assert_close_in_rounding(loaded(pixels, MASKED).reconstruction, source(pixels, MASKED).reconstruction)


def test_starts_a_classifier_and_starts_from_one(tmp_path):
    source = make_head("hybrid-full", torch.float32)
    source.save_pretrained(tmp_path)
    classifier, report = TranslutionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (CLASSIFIER, NEW)
    assert_same_trunk(classifier, source, without=["embeddings.mask_token"])
    classifier.save_pretrained(tmp_path)
    again, report = TranslutionForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (NEW, CLASSIFIER)
    assert_same_trunk(again, source, without=["embeddings.mask_token"])
    token = again.model.embeddings.mask_token
    # Twelve values drawn with `initializer_range` 0.3.
    assert 0 < token.abs().max() < 3
    assert again(make_pixels(again), MASKED).loss.isfinite()


SOURCES = {
    "vit": (ViTConfig, ViTForImageClassification, {"image_size": [8, 12], "intermediate_size": 24}),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"image_size": 8, "mlp_ratio": 2}),
    "dinov2 without a token": (
        Dinov2Config,
        Dinov2ForImageClassification,
        {"image_size": 8, "mlp_ratio": 2, "use_mask_token": False},
    ),
}


@pytest.mark.parametrize("family", SOURCES)
def test_converted_models(family, tmp_path):
    """Their trunks mask patches themselves; a token that they do not have is new."""
    config_class, head, fields = SOURCES[family]
    config = config_class(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, **fields)
    TranslutionForImageClassification.from_attention(head(config), max_relative_distance=1).save_pretrained(tmp_path)
    model, report = TranslutionForMaskedImageModeling.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert ("model.trunk.embeddings.mask_token" in report["missing_keys"]) == (family != "dinov2")
    torch.nn.init.normal_(model.model.trunk.embeddings.mask_token)
    size = model.config.image_height_width
    masked = MASKED[:, : size[0] * size[1] // 16]
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    hidden = pixels_of_patches(masked.view(2, size[0] // 4, size[1] // 4), (4, 4))[:, None]
    output = model.eval()(pixels, masked)
    changed = model(torch.where(hidden, torch.randn_like(pixels), pixels), masked)
    assert_close_in_rounding(changed.reconstruction, output.reconstruction)
    assert not torch.allclose(model(pixels, torch.zeros_like(masked)).reconstruction, output.reconstruction)
    assert_rejected(("`bool_masked_pos`", "got shape [2, 3]"), model, pixels, masked[:, :3])
    model.save_pretrained(tmp_path)
    again, report = TranslutionForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_close_in_rounding(again.double()(pixels, masked).reconstruction, output.reconstruction)
    classifier, report = TranslutionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == CLASSIFIER
    if family == "vit":
        words = ("`bool_masked_pos`", "mask token")
        assert_rejected(words, classifier.double(), pixels, bool_masked_pos=masked)


def test_as_vit():
    """The same values as Transformers' `ViTForMaskedImageModeling` of the same weights, on square patches."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=12, patch_size=4
    )
    config.encoder_stride = 4
    source = ViTForMaskedImageModeling(config).double().eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    converted = TranslutionForImageClassification.from_attention(
        ViTForImageClassification(config).double(), max_relative_distance=1, layers=[]
    )
    model = TranslutionForMaskedImageModeling(converted.config).double().eval()
    model.model.trunk.load_state_dict(source.vit.state_dict())
    # `PixelShuffle` takes features in the order channel, row, column.
    weight, bias = source.decoder[0].weight[:, :, 0, 0], source.decoder[0].bias
    model.decoder.weight.data = weight.unflatten(0, (3, 4, 4)).movedim(0, 2).flatten(0, 2)
    model.decoder.bias.data = bias.unflatten(0, (3, 4, 4)).movedim(0, 2).flatten()
    pixels, masked = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.rand(2, 9) < 0.5
    masked[0, 0] = True
    expected, output = source(pixels, bool_masked_pos=masked), model(pixels, masked)
    assert_close_in_rounding(output.reconstruction, expected.reconstruction)
    # Transformers adds 1e-5 to the number of masked pixels, which is 16 at least.
    pixels_masked = 16 * masked.sum()
    assert_close_in_rounding(output.loss * pixels_masked / (pixels_masked + 1e-5), expected.loss)

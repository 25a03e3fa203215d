"""The models as users meet them: shapes, sizes, losses, outputs, clamped distances."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import (
    MIXERS,
    assert_same,
    each_implementation,
    each_modality,
    each_variant,
    few_variants,
    make_config,
    make_inputs,
    make_model,
    num_tokens,
)
from torch.nn import functional as F

from translution import (
    TranslutionBackbone,
    TranslutionForMaskedImageModeling,
    TranslutionForSequenceClassification,
    TranslutionForTokenClassification,
)


# Heads beside those of `small_models.py`: the modality, the name of the output, and its shape for a batch.
OTHER_HEADS = {
    TranslutionForSequenceClassification: ("text", "logits", lambda batch: (batch, 3)),
    TranslutionForTokenClassification: ("text", "logits", lambda batch: (batch, 7, 3)),
    TranslutionForMaskedImageModeling: ("image", "reconstruction", lambda batch: (batch, 3, 12, 10)),
    TranslutionBackbone: ("image", "feature_maps", lambda batch: (batch, 12, 3, 2)),
}


def make_other(head, variant="full-kv"):
    modality, name, shape = OTHER_HEADS[head]
    model = head(make_config(modality, variant, pad_token_id=0)).eval()

    def call(batch=2, **arguments):
        inputs = make_inputs(model.config, batch)
        if head is TranslutionForMaskedImageModeling:
            inputs["bool_masked_pos"] = torch.rand(batch, num_tokens(model.config) - 1) < 0.5
        outputs = model(**inputs, **arguments)
        return outputs, outputs[name][0] if name == "feature_maps" else outputs[name]

    return call, shape


each_other_head = pytest.mark.parametrize("head", OTHER_HEADS, ids=lambda head: head.__name__)


@pytest.mark.parametrize("initializer_range", [None, 0.02], ids=["linear", "normal"])
def test_blank_images_have_no_large_gradients_at_first(initializer_range):
    # A LayerNorm of patches that are all zero would enlarge them by a factor of thousands.
    model = make_model("image", "attention", torch.float32, hidden_size=24, initializer_range=initializer_range)

    def gradient(pixels):
        model.zero_grad()
        model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss.backward()
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])

    pixels = make_inputs(model.config, 2)["pixel_values"].float()
    assert gradient(torch.zeros_like(pixels)) < 10 * gradient(pixels)


# Shapes and sizes


@each_modality
@each_variant
def test_shapes(modality, variant):
    model = make_model(modality, variant, torch.float32)
    inputs = make_inputs(model.config)
    tokens = num_tokens(model.config)
    assert model(**inputs).logits.shape == ((2, 3) if modality == "image" else (2, tokens, 19))
    assert model.model(**inputs).last_hidden_state.shape == (2, tokens, 12)


@each_other_head
@each_variant
def test_shapes_of_other_heads(head, variant):
    call, shape = make_other(head, variant)
    assert call()[1].shape == shape(2)


@pytest.mark.parametrize("fields", [{"image_size": [4, 25]}, {"image_size": [4, 5]}, {"num_channels": 1}], ids=str)
def test_other_grids(fields):
    model = make_model("image", "hybrid-full", torch.float32, **fields)
    assert model(**make_inputs(model.config, batch=1)).logits.shape == (1, 3)


@each_variant
@pytest.mark.parametrize("length", [1, 2, 9])
def test_text_lengths(variant, length):
    model = make_model("text", variant, torch.float32)
    assert model(**make_inputs(model.config, 1, length)).logits.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_head_of_the_hidden_size(mixer):
    fields = {"mixer_types": mixer, "num_attention_heads": 1, "head_dim": 12, "relative_projections": "v"}
    model = make_model("image", dtype=torch.float32, **fields)
    assert isinstance(model.model.layers[0].mixer.o_proj, torch.nn.Identity)
    assert model(**make_inputs(model.config)).logits.shape == (2, 3)


@each_modality
def test_empty_batch(modality):
    model = make_model(modality, "full-kv", torch.float32)
    assert model(**make_inputs(model.config, batch=0)).logits.shape[0] == 0


@each_other_head
def test_empty_batch_of_other_heads(head):
    call, shape = make_other(head)
    assert call(batch=0)[1].shape == shape(0)


@pytest.mark.parametrize("subset", ["qkv", "kv", "v"])
def test_num_parameters_image(subset):
    model = make_model(relative_projections=subset)
    hidden, inner, mlp, pixels = 12, 16, 20, 4 * 5 * 3
    offsets = (2 * 3 - 1) * (2 * 2 - 1) + 3
    mixer = len(subset) * offsets * hidden * inner + (3 - len(subset)) * hidden * inner + inner * hidden + hidden
    layer = 4 * hidden + mixer + hidden * mlp + mlp + mlp * hidden + hidden
    embeddings = 2 * pixels + pixels * hidden + hidden + 2 * hidden + hidden
    assert model.num_parameters() == embeddings + 2 * layer + 2 * hidden + 3 * hidden + 3
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if name.endswith("_bank")}
    assert shapes == {(offsets, hidden, inner)}


def test_num_parameters_text():
    model = make_model("text", "lor-qkv", max_position_embeddings=9)
    hidden, inner, mlp, rank, vocabulary = 12, 16, 20, 6, 19
    mixer = 3 * 9 * rank * rank + 3 * hidden * inner + 3 * hidden * rank + rank * inner + inner * hidden + hidden
    layer = 4 * hidden + mixer + hidden * mlp + mlp + mlp * hidden + hidden
    assert model.num_parameters() == 2 * vocabulary * hidden + 2 * layer + 2 * hidden + 2 * hidden


# Losses


def test_image_loss_single_label():
    model = make_model()
    inputs, labels = make_inputs(model.config), torch.tensor([2, 0])
    output = model(**inputs, labels=labels)
    assert_same(output.loss, F.cross_entropy(output.logits, labels))
    assert model.config.problem_type == "single_label_classification"


def test_image_loss_regression():
    model = make_model(num_labels=1)
    inputs, labels = make_inputs(model.config), torch.randn(2, dtype=torch.float64)
    output = model(**inputs, labels=labels)
    assert_same(output.loss, (output.logits[:, 0] - labels).square().mean())


def test_image_loss_several_labels():
    model = make_model(problem_type="multi_label_classification")
    inputs, labels = make_inputs(model.config), torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    output = model(**inputs, labels=labels)
    assert_same(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@pytest.mark.parametrize("variant", ["full-kv", "hybrid-lor"])
def test_text_loss(variant):
    model = make_model("text", variant, torch.float32)
    ids = make_inputs(model.config)["input_ids"]
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5] = -100
    output = model(ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    terms = [
        -log_probabilities[b, t, ids[b, t + 1]] for b in range(2) for t in range(6) if labels[b, t + 1].item() != -100
    ]
    assert len(terms) == 6 + 6 - 2 - 1
    assert_same(output.loss, torch.stack(terms).mean(), 1e-6)
    # The Trainer's count of items in a batch of several steps.
    assert_same(model(ids, labels=labels, num_items_in_batch=20).loss, torch.stack(terms).sum() / 20, 1e-6)


def test_ignored_labels_are_allowed():
    for modality, shape in (("image", (2,)), ("text", (2, 7))):
        model = make_model(modality)
        labels = torch.zeros(shape, dtype=torch.long)
        labels[0] = -100
        assert model(**make_inputs(model.config), labels=labels).loss.isfinite()


# Outputs


def test_pooling():
    cls, mean = make_model(pooling="cls"), make_model(pooling="mean")
    mean.load_state_dict(cls.state_dict())
    inputs = make_inputs(cls.config)
    tokens = cls.model(**inputs).last_hidden_state
    assert_same(cls(**inputs).logits, cls.classifier(tokens[:, 0]))
    assert_same(mean(**inputs).logits, cls.classifier(tokens.mean(1)))


@each_modality
@few_variants
def test_hidden_states(modality, variant):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    output = model.model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {tuple(h.shape) for h in output.hidden_states} == {(2, num_tokens(model.config), 12)}
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    first = model.model.embed_tokens(inputs["input_ids"]) if modality == "text" else None
    if first is not None:
        assert torch.equal(output.hidden_states[0], first)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == model.config.num_hidden_layers + 1
    assert model(**inputs).hidden_states is None


@each_other_head
@few_variants
def test_hidden_states_and_attentions_of_other_heads(head, variant):
    call, _ = make_other(head, variant)
    outputs, _ = call(output_hidden_states=True, output_attentions=True)
    layers = make_config(variant=variant).num_hidden_layers
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(2, 7, 12)}
    assert {tuple(weights.shape) for weights in outputs.attentions} == {(2, 2, 7, 7)}
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (layers + 1, layers)
    outputs, _ = call()
    assert (outputs.hidden_states, outputs.attentions) == (None, None)


@each_modality
@each_variant
def test_attentions(modality, variant):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    plain = model(**inputs)
    output = model(**inputs, output_attentions=True)
    tokens = num_tokens(model.config)
    assert plain.attentions is None
    attend = [name for name in model.config.mixer_types if name != "convolution"]
    assert len(output.attentions) == len(attend)
    assert_same(output.logits, plain.logits)
    model.set_attn_implementation("eager")
    for weights, eager in zip(output.attentions, model(**inputs, output_attentions=True).attentions, strict=True):
        assert weights.shape == (2, model.config.num_attention_heads, tokens, tokens)
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
        if modality == "text":
            assert weights.triu(1).abs().max() == 0
        assert_close_in_rounding(weights, eager)


@each_modality
def test_output_switches_of_the_config(modality):
    model = make_model(modality, "hybrid-full", output_hidden_states=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    output = model(**make_inputs(model.config))
    assert (len(output.hidden_states), len(output.attentions)) == (5, 4)


@each_modality
def test_return_tuple(modality):
    model = make_model(modality)
    inputs = make_inputs(model.config)
    labels = inputs["input_ids"] if modality == "text" else torch.tensor([0, 1])
    output = model(**inputs, labels=labels)
    loss, logits, *_ = model(**inputs, labels=labels, return_dict=False)
    assert_close_in_rounding(loss, output.loss)
    assert_close_in_rounding(logits, output.logits)
    hidden, *_ = model.model(**inputs, return_dict=False)
    assert_close_in_rounding(hidden, model.model(**inputs).last_hidden_state)


@each_variant
@each_implementation
def test_attentions_of_padded_text(variant, implementation):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for weights in model(**make_inputs(model.config), attention_mask=mask, output_attentions=True).attentions:
        assert weights.triu(1).abs().max() == 0
        assert weights[0, :, 2:, :2].abs().max() == 0
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))


# Clamped distances


def expand_bank(clamped, config):
    """The bank of every offset that does the same as one of clamped offsets."""
    limit = config.max_relative_distance
    if config.modality == "text":
        return clamped[torch.arange(config.max_position_embeddings).clamp(max=limit)]
    height, width = config.grid_height_width
    rows = torch.arange(1 - height, height).clamp(-limit, limit) + limit
    columns = torch.arange(1 - width, width).clamp(-limit, limit) + limit
    grid = (rows[:, None] * (2 * limit + 1) + columns).flatten()
    return torch.cat((clamped[grid], clamped[-3:]))


@each_modality
@pytest.mark.parametrize("variant", ["full-qkv", "lor-qkv"])
@pytest.mark.parametrize("limit", [0, 1, 2, 5])
@each_implementation
def test_max_relative_distance(modality, variant, limit, implementation):
    fields = {"image_size": [16, 15], "max_position_embeddings": 9}
    model = make_model(modality, variant, max_relative_distance=limit, **fields)
    wide = make_model(modality, variant, **fields)
    model.set_attn_implementation(implementation)
    rows = limit + 1 if modality == "text" else (2 * limit + 1) ** 2 + 3
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("_bank"):
            assert tensor.shape[0] == rows
            state[name] = expand_bank(tensor, model.config)
    wide.load_state_dict(state)
    inputs = make_inputs(model.config, length=9)
    assert_same(model(**inputs).logits, wide(**inputs).logits)


@pytest.mark.parametrize("variant", ["full-qkv", "lor-qkv", "hybrid-full"])
@each_implementation
def test_clamped_text_may_be_longer_than_the_bank(variant, implementation):
    model = make_model("text", variant, max_relative_distance=2, max_position_embeddings=5)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config, length=13)["input_ids"]
    whole = model(ids).logits
    assert_same(whole[:, :5], model(ids[:, :5]).logits)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 19
    assert not torch.allclose(model(changed).logits[:, -1], whole[:, -1])

"""The models as users meet them: shapes, losses, masks, precision, saving, generation, training, errors."""

import copy
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from closeness import assert_close_in_rounding
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DynamicCache,
    GPT2Config,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)
from transformers.utils import logging

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification, TranslutionModel
from translution.configuration import configuration_translution
from translution.modeling.models import modeling_translution
from translution.modeling.operators import pair_layout, registration
from translution.modeling.operators.pair_autograd import pack


MIXER_TYPES = configuration_translution.MIXER_TYPES
HEADS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
MIXERS = ["translution", "rope_translution", "attention", "rope_attention"]
VARIANTS = {
    "full-qkv": {"relative_projections": "qkv"},
    "full-qk": {"relative_projections": "qk"},
    "full-kv": {"relative_projections": "kv"},
    "full-v": {"relative_projections": "v"},
    "lor-qkv": {"relative_projections": "qkv", "relative_rank": 3},
    "lor-q": {"relative_projections": "q", "relative_rank": 2},
    "lor-v": {"relative_projections": "v", "relative_rank": 3},
    "full-clamped": {"relative_projections": "qkv", "max_relative_distance": 1},
    "full-absolute": {"relative_projections": "kv", "use_absolute_position_embeddings": True},
    "rope-full-v": {"mixer_types": "rope_translution", "relative_projections": "v"},
    "rope-lor-kv": {"mixer_types": "rope_translution", "relative_projections": "kv", "relative_rank": 2},
    "attention": {"mixer_types": "attention"},
    "attention-absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "rope": {"mixer_types": "rope_attention"},
    "relative-bias": {"mixer_types": "relative_bias_attention"},
    "relative-vector": {"mixer_types": "relative_vector_attention"},
    "convolution": {"mixer_types": "convolution", "pooling": "mean"},
    "acmix": {"mixer_types": "acmix", "num_attention_heads": 3, "head_dim": 4},
    "basis-qkv": {"relative_projections": "qkv", "offset_basis": 3},
    "basis-kv-clamped": {"relative_projections": "kv", "offset_basis": 2, "max_relative_distance": 1},
    "basis-lor-qv": {"relative_projections": "qv", "offset_basis": 2, "relative_rank": 3},
    "hybrid-all": {
        "num_hidden_layers": 8,
        "mixer_types": list(MIXER_TYPES),
        "relative_rank": 2,
        "num_attention_heads": 3,
        "head_dim": 4,
    },
    "hybrid-full": {"num_hidden_layers": 4, "mixer_types": MIXERS, "relative_projections": "v"},
    "hybrid-lor": {
        "num_hidden_layers": 4,
        "mixer_types": MIXERS[::-1],
        "relative_projections": "qkv",
        "relative_rank": 2,
        "use_absolute_position_embeddings": True,
    },
}
FEW = ["full-kv", "lor-qkv", "hybrid-full"]

each_modality = pytest.mark.parametrize("modality", list(HEADS))
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))
few_variants = pytest.mark.parametrize("variant", FEW)
each_implementation = pytest.mark.parametrize("implementation", ["auto", "eager"])


def make_config(modality="image", variant="full-kv", **fields):
    values = {
        "modality": modality,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "intermediate_size": 20,
        # Wide enough for every path to matter in the output.
        "initializer_range": 0.3,
        "image_size": [12, 10],
        "patch_size": [4, 5],
        "num_labels": 3,
        "vocab_size": 19,
        "max_position_embeddings": 9,
    }
    return TranslutionConfig(**{**values, **VARIANTS[variant], **fields})


def make_model(modality="image", variant="full-kv", dtype=torch.float64, head=True, **fields):
    config = make_config(modality, variant, **fields)
    return (HEADS[modality] if head else TranslutionModel)(config).to(dtype).eval()


def make_inputs(config, batch=2, length=7):
    if config.modality == "text":
        return {"input_ids": torch.randint(config.vocab_size, (batch, length))}
    return {"pixel_values": torch.randn(batch, config.num_channels, *config.image_height_width)}


def num_tokens(config, length=7):
    height, width = config.grid_height_width
    return length if config.modality == "text" else 1 + height * width


def gradients(model, inputs):
    """Gradients of a fixed random combination of the logits, by parameter name."""
    model.zero_grad()
    logits = model(**inputs).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weight.to(logits.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(actual, expected, tolerance=1e-10):
    """Dictionaries of tensors, or tensors, are equal to `tolerance` relative to the largest expected value."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        largest = max(tensor.abs().max().item() for tensor in expected.values())
        for name in expected:
            difference = (actual[name] - expected[name]).abs().max().item()
            assert difference <= tolerance * largest, f"{name}: {difference} of {largest}"
    else:
        assert_same({"tensor": actual}, {"tensor": expected}, tolerance)


def assert_rejected(words, make, *args, **kwargs):
    """`make` raises a `ValueError` whose message contains every one of `words`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make(*args, **kwargs)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# Shapes, losses, outputs


@each_modality
@each_variant
def test_shapes(modality, variant):
    model = make_model(modality, variant, torch.float32)
    inputs = make_inputs(model.config)
    tokens = num_tokens(model.config)
    assert model(**inputs).logits.shape == ((2, 3) if modality == "image" else (2, tokens, 19))
    assert model.model(**inputs).last_hidden_state.shape == (2, tokens, 12)


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


def test_pooling():
    cls, mean = make_model(pooling="cls"), make_model(pooling="mean")
    mean.load_state_dict(cls.state_dict())
    inputs = make_inputs(cls.config)
    tokens = cls.model(**inputs).last_hidden_state
    assert_same(cls(**inputs).logits, cls.classifier(tokens[:, 0]))
    assert_same(mean(**inputs).logits, cls.classifier(tokens.mean(1)))


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


# Implementations


@each_modality
@each_variant
def test_eager_equals_auto(modality, variant):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    if modality == "text":
        inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    assert model.config._attn_implementation == "auto"
    logits, grads = model(**inputs).logits, gradients(model, inputs)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert_same(model(**inputs).logits, logits)
    assert_same(gradients(model, inputs), grads)
    model.set_attn_implementation("auto")
    assert model.config._attn_implementation == "auto"
    assert_close_in_rounding(model(**inputs).logits, logits)


@each_modality
def test_grouped_attention_is_the_fused_one(monkeypatch, modality):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model = make_model(modality, "attention", torch.float32).model
    model(**make_inputs(model.config))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("variant", ["attention", "rope", "full-kv"])
def test_implementations_of_transformers(tmp_path, caplog, name, variant):
    """Harnesses pass them to every model; what runs is the default, and a warning says so once."""
    logging.enable_propagation()
    modeling_translution.logger.warning_once.cache_clear()
    model = make_model("text", variant)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name, dtype=torch.float64)
    assert loaded.config._attn_implementation == "auto"
    assert name in caplog.text
    assert "scaled_dot_product_attention" in caplog.text
    inputs = make_inputs(model.config)
    assert_same(loaded(**inputs).logits, model(**inputs).logits)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == "auto"


@pytest.mark.parametrize("name", ["paged|eager", "fastest"])
@pytest.mark.parametrize("when", ["made", "set", "loaded"])
def test_unknown_implementation(tmp_path, name, when):
    words = (name, "'auto'", "'eager'")
    if when == "made":
        assert_rejected(words, AutoModel.from_config, make_config(), attn_implementation=name)
        return
    model = make_model()
    if when == "set":
        assert_rejected(words, model.set_attn_implementation, name)
        assert model.config._attn_implementation == "auto"
    else:
        model.save_pretrained(tmp_path)
        assert_rejected(words, AutoModel.from_pretrained, tmp_path, attn_implementation=name)


@pytest.mark.parametrize("name", ["auto", "eager", "triton"])
def test_implementation_by_argument(tmp_path, name):
    model = AutoModelForCausalLM.from_config(make_config("text"), attn_implementation=name)
    assert model.config._attn_implementation == name
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "auto"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert loaded.config._attn_implementation == name


# Saving and copying


AUTO = {"image": AutoModelForImageClassification, "text": AutoModelForCausalLM}


@each_modality
@each_variant
def test_save_and_load(tmp_path, modality, variant):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    for load in (HEADS[modality].from_pretrained, AUTO[modality].from_pretrained):
        loaded, report = load(tmp_path, output_loading_info=True)
        assert type(loaded) is HEADS[modality]
        assert not any(report.values()), report
        weights = loaded.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert_close_in_rounding(loaded(**inputs).logits, expected)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is TranslutionModel
    assert_close_in_rounding(trunk(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@each_modality
def test_load_in_another_precision(tmp_path, modality):
    model = make_model(modality, "hybrid-lor", torch.float32)
    model.save_pretrained(tmp_path)
    inputs = make_inputs(model.config)
    loaded = AUTO[modality].from_pretrained(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert_same(loaded(**inputs).logits, model.double()(**inputs).logits)


@each_modality
def test_trunk_into_a_head(tmp_path, modality):
    trunk = make_model(modality, "hybrid-full", head=False)
    trunk.save_pretrained(tmp_path)
    model = HEADS[modality].from_pretrained(tmp_path)
    inputs = make_inputs(model.config)
    assert_close_in_rounding(model.model(**inputs).last_hidden_state, trunk(**inputs).last_hidden_state)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


FRESH_PROCESS = """
import sys
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import translution
import unaligned
from closeness import assert_close_in_rounding
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
unaligned.follow_switch()
for task, auto in {"image": AutoModelForImageClassification, "text": AutoModelForCausalLM}.items():
    inputs, logits, hidden = torch.load(f"{folder}/{task}.pt")
    assert_close_in_rounding(auto.from_pretrained(f"{folder}/{task}")(**inputs).logits, logits)
    assert_close_in_rounding(AutoModel.from_pretrained(f"{folder}/{task}")(**inputs).last_hidden_state, hidden)
print("equal")
"""


def test_load_in_a_fresh_process(tmp_path):
    for modality in HEADS:
        model = make_model(modality, "hybrid-lor")
        inputs = make_inputs(model.config)
        model.save_pretrained(tmp_path / modality)
        with torch.no_grad():
            outputs = inputs, model(**inputs).logits, model.model(**inputs).last_hidden_state
        torch.save(outputs, tmp_path / f"{modality}.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), os.path.dirname(__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@each_modality
def test_copy_and_pickle(modality):
    model = make_model(modality, "hybrid-lor")
    inputs = make_inputs(model.config)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "auto"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close_in_rounding(other(**inputs).logits, expected)
        assert other.config.to_dict() == model.config.to_dict()
    torch.nn.init.zeros_(next(twin.parameters()))
    assert_close_in_rounding(model(**inputs).logits, expected)


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


# Training: checkpointing, precision, dropout


@each_modality
@few_variants
@each_implementation
def test_gradient_checkpointing(monkeypatch, modality, variant, implementation):
    model = make_model(modality, variant, attention_dropout=0.2, hidden_dropout_prob=0.2).train()
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model.config)
    calls = []
    for layer in model.model.layers:
        layer.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    expected, plain_calls = gradients(model, inputs), len(calls)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert_same(gradients(model, inputs), expected)
    assert len(calls) == 3 * plain_calls
    model.gradient_checkpointing_disable()
    torch.manual_seed(3)
    assert_same(gradients(model, inputs), expected)
    assert len(calls) == 4 * plain_calls


@each_modality
@pytest.mark.parametrize("frozen", ["banks", "all but banks"])
def test_partly_frozen(modality, frozen):
    model = make_model(modality, "full-qkv")
    inputs = make_inputs(model.config)
    expected = gradients(model, inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_bank") == (frozen != "banks"))
    model.zero_grad()
    logits = model(**inputs).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(trained, {name: expected[name] for name in trained})


@each_modality
@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_model(modality, variant, dtype):
    # A small draw, so that rounding stays small beside the values.
    model = make_model(modality, variant, torch.float32, initializer_range=0.1)
    inputs = make_inputs(model.config)
    if modality == "text":
        inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(**inputs).logits
    model.to(dtype)
    if modality == "image":
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    logits = model(**inputs).logits
    assert logits.dtype == dtype
    real = slice(2, None) if modality == "text" else slice(None)
    assert_same(logits[:, real].float(), expected[:, real], 0.1 if dtype == torch.bfloat16 else 0.02)
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@each_modality
@each_variant
@each_implementation
def test_autocast(modality, variant, implementation):
    model = make_model(modality, variant, torch.float32, initializer_range=0.1).train()
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model.config)
    labels = inputs["input_ids"] if modality == "text" else torch.tensor([0, 1])
    if modality == "text":
        inputs["attention_mask"] = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    expected = model(**inputs, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, labels=labels)
    assert_same(output.loss, expected.loss, 0.05)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    banks = [p.grad for name, p in model.named_parameters() if name.endswith("_bank")]
    assert all(grad.abs().max() > 0 for grad in banks)


@each_modality
@pytest.mark.parametrize("variant", ["full-qkv", "lor-qkv", "hybrid-full", "attention"])
@pytest.mark.parametrize("field", ["attention_dropout", "hidden_dropout_prob"])
@each_implementation
def test_dropout(modality, variant, field, implementation):
    model = make_model(modality, variant, **{field: 0.5})
    without = make_model(modality, variant)
    without.load_state_dict(model.state_dict())
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model.config)

    def run(seed):
        torch.manual_seed(seed)
        return model(**inputs).logits

    assert_close_in_rounding(run(0), run(1))
    assert_same(run(0), without(**inputs).logits)
    model.train()
    assert not torch.allclose(run(0), run(1))
    assert_close_in_rounding(run(0), run(0))
    without.train()
    assert_same(without(**inputs).logits, without.eval()(**inputs).logits)


@each_modality
def test_attention_dropout_scales_what_it_keeps(modality):
    model = make_model(modality, "full-kv", attention_dropout=0.5)
    inputs = make_inputs(model.config)
    plain = model(**inputs, output_attentions=True).attentions[0]
    dropped = model.train()(**inputs, output_attentions=True).attentions[0]
    assert (dropped == 0).sum() > (plain == 0).sum()
    assert_same(dropped[dropped != 0], 2 * plain[dropped != 0])


# Text: causality and padding


def causal_masks(length=7):
    """Masks that a user may give, by name; those of four dimensions allow looking ahead."""
    left, right, hole = (torch.ones(2, length, dtype=torch.long) for _ in range(3))
    left[0, :2], right[0, -2:], hole[0, 2] = 0, 0, 0
    free = torch.ones(2, 1, length, length, dtype=torch.bool)
    blocked = free.clone()
    blocked[0, :, :, 1] = False
    blocked[1, :, :3] = False
    bias = torch.randn(2, 1, length, length, dtype=torch.float64)
    return {
        "none": None,
        "left": left,
        "right": right,
        "hole": hole,
        "bool-free": free,
        "bool-blocked": blocked,
        "float-zero": torch.zeros_like(bias),
        "float-bias": bias,
        "float-blocked": bias.masked_fill(~blocked, torch.finfo(torch.float64).min),
        "float-infinite": bias.masked_fill(~blocked[:1], -math.inf),
    }


@each_variant
@each_implementation
@pytest.mark.parametrize("mask", list(causal_masks()))
def test_no_mixer_sees_the_future(variant, implementation, mask):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config)["input_ids"]
    mask = causal_masks()[mask]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert expected.isfinite().all()
        for t in (1, 4):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 19
            logits = model(changed, attention_mask=mask).logits
            difference = (logits[:, :t] - expected[:, :t]).abs().amax((0, 2))
            assert difference.max() < 1e-12, f"position by position: {difference.tolist()}"
            assert not torch.allclose(logits[:, t], expected[:, t])


@each_variant
def test_masked_tokens_are_not_read(variant):
    model = make_model("text", variant)
    ids = make_inputs(model.config)["input_ids"]
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 19
    flat = torch.ones(2, 7, dtype=torch.long)
    flat[:, 2] = 0
    square = flat[:, None, None].bool().expand(-1, 1, 7, -1)
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~square, -math.inf)
    others = [0, 1, 3, 4, 5, 6]
    position_ids = torch.arange(7).expand(2, -1)
    results = []
    for mask in (flat, square, additive):
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, others]
        again = model(changed, attention_mask=mask, position_ids=position_ids).logits[:, others]
        assert_same(logits, again, 1e-12)
        results.append(logits)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@each_variant
@each_implementation
def test_shorter_text_is_the_prefix(variant, implementation):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config, length=9)["input_ids"]
    whole = model(ids).logits
    for length in (1, 4, 8):
        assert_same(model(ids[:, :length]).logits, whole[:, :length])


@each_variant
@each_implementation
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(variant, implementation, side):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config)["input_ids"]
    padding = (2, 0) if side == "left" else (0, 2)
    mask = F.pad(torch.ones_like(ids), padding)
    padded = model(F.pad(ids, padding, value=5), attention_mask=mask).logits
    assert_same(padded[:, 2:] if side == "left" else padded[:, :-2], model(ids).logits)


@each_variant
def test_padding_gets_no_gradient(variant):
    model = make_model("text", variant)
    ids = torch.tensor([[3, 3, 1, 2, 4, 1], [1, 2, 4, 1, 2, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    # The first real token is the padding's prediction.
    labels[0, 2] = -100
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert model.model.embed_tokens.weight.grad[3].abs().max() < 1e-12
    assert model.model.embed_tokens.weight.grad[1].abs().max() > 0


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


# Text: embeddings, head, generation


@few_variants
def test_inputs_embeds(variant):
    model = make_model("text", variant)
    ids = make_inputs(model.config)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    assert_close_in_rounding(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_position_ids():
    model = make_model("text", "hybrid-lor")
    ids = make_inputs(model.config)["input_ids"]
    positions = torch.arange(7)[None]
    assert_close_in_rounding(model(ids, position_ids=positions).logits, model(ids).logits)
    assert not torch.allclose(model(ids, position_ids=positions.flip(-1)).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_tie_word_embeddings(tmp_path, tied):
    model = make_model("text", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = TranslutionForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    inputs = make_inputs(model.config)
    assert_close_in_rounding(loaded(**inputs).logits, model(**inputs).logits)
    untied = make_model("text", dtype=torch.float32)
    assert untied.num_parameters() - model.num_parameters() == (19 * 12 if tied else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [15, 25])
def test_resize_token_embeddings(tmp_path, tied, size):
    model = make_model("text", tie_word_embeddings=tied)
    ids = torch.randint(15, (2, 7))
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 7, size)
    assert_close_in_rounding(output.logits[..., :15], before[..., :15])
    assert output.loss.isfinite()
    assert_rejected(("`input_ids`", f"got {size}"), model, torch.full((1, 2), size))
    model.save_pretrained(tmp_path)
    assert_close_in_rounding(TranslutionForCausalLM.from_pretrained(tmp_path)(ids).logits, output.logits)


def test_logits_to_keep():
    model = make_model("text")
    ids = make_inputs(model.config)["input_ids"]
    whole = model(ids).logits
    assert_close_in_rounding(model(ids, logits_to_keep=0).logits, whole)
    assert_same(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    chosen = torch.tensor([0, 3])
    assert_same(model(ids, logits_to_keep=chosen).logits, whole[:, chosen])


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("variant", ["full-qkv", "lor-qkv", "rope-lor-kv", "hybrid-full", "attention-absolute"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_generate_greedy(variant, use_cache):
    model = make_model("text", variant)
    ids = make_inputs(model.config, length=3)["input_ids"]
    arguments = {} if use_cache is None else {"use_cache": use_cache}
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, **arguments)
    assert torch.equal(generated, greedy(model, ids, 6))


def test_generate_up_to_the_bank_and_no_further():
    model = make_model("text")
    ids = make_inputs(model.config, length=5)["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 10)
    words = ("`max_position_embeddings` 9", "got 10")
    assert_rejected(words, model.generate, ids, max_new_tokens=6, do_sample=False)
    clamped = make_model("text", "full-clamped")
    assert clamped.generate(ids, max_new_tokens=10, do_sample=False).shape == (2, 15)


def test_generate_sampling():
    model = make_model("text", "hybrid-lor")
    ids = make_inputs(model.config, length=2)["input_ids"]
    arguments = {"max_new_tokens": 7, "do_sample": True, "top_k": 0}
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(ids, **arguments))
    assert samples[0].shape == (2, 9)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    # Sampling the most likely token alone is greedy search.
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=True, top_k=1), greedy(model, ids, 5))


def test_generate_beam_search_is_exhaustive_with_all_beams():
    model = make_model("text", "hybrid-full", vocab_size=6)
    ids = make_inputs(model.config, length=4)["input_ids"]
    generated = model.generate(ids, max_new_tokens=2, do_sample=False, num_beams=6)
    first, second = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    for row, best in zip(ids, generated, strict=True):
        endings = torch.stack((first.flatten(), second.flatten()), dim=1)
        scores = model(torch.cat((row.expand(36, -1), endings), dim=1)).logits.log_softmax(-1)
        likelihood = scores[:, 3:5].gather(-1, endings[..., None]).sum((1, 2))
        assert torch.equal(best[4:], endings[likelihood.argmax()])


@each_variant
def test_generate_left_padded_batch(variant):
    model = make_model("text", variant)
    texts = [torch.randint(19, (1, length)) for length in (1, 3, 4)]
    batch = torch.cat([F.pad(text, (4 - text.shape[1], 0), value=0) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (4 - text.shape[1], 0)) for text in texts])
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, text in zip(generated, texts, strict=True):
        assert torch.equal(row[4:], greedy(model, text, 4)[0, text.shape[1] :])


def test_generate_from_inputs_embeds():
    model = make_model("text", "hybrid-lor")
    ids = make_inputs(model.config, length=3)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, greedy(model, ids, 4)[:, 3:])


def test_generate_stops_at_the_end_token():
    model = make_model("text")
    ids = make_inputs(model.config, batch=1, length=3)["input_ids"]
    whole = greedy(model, ids, 6)[0, 3:].tolist()
    end = whole[2]
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert generated[0, 3:].tolist() == whole[: whole.index(end) + 1]


# Images: masks


@each_variant
@each_implementation
def test_masked_patch_is_not_read(variant, implementation):
    model = make_model("image", variant, head=False)
    model.set_attn_implementation(implementation)
    pixels = make_inputs(model.config)["pixel_values"]
    changed = pixels.clone()
    # Patch 3 of the 3 × 2 grid: row 1, column 1.
    changed[:, :, 4:8, 5:10] = torch.randn(2, 3, 4, 5)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, 4] = 0
    others = [0, 1, 2, 3, 5, 6]
    tokens = model(pixel_values=pixels, attention_mask=mask).last_hidden_state
    again = model(pixel_values=changed, attention_mask=mask).last_hidden_state
    assert_same(again[:, others], tokens[:, others], 1e-12)
    assert not torch.allclose(again[:, 4], tokens[:, 4])
    free = model(pixel_values=pixels).last_hidden_state
    assert not torch.allclose(free[:, others], tokens[:, others])
    nothing_masked = model(pixel_values=pixels, attention_mask=torch.ones_like(mask)).last_hidden_state
    assert_close_in_rounding(nothing_masked, free)
    for weights in model(pixel_values=pixels, attention_mask=mask, output_attentions=True).attentions:
        assert weights[..., 4].abs().max() == 0
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))


@each_variant
@each_implementation
def test_image_masks_of_four_dimensions(variant, implementation):
    model = make_model("image", variant)
    model.set_attn_implementation(implementation)
    inputs = make_inputs(model.config)
    flat = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1]])
    square = flat[:, None, None].bool().expand(-1, 1, 7, -1)
    expected = model(**inputs, attention_mask=flat).logits
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~square, -math.inf)
    assert_same(model(**inputs, attention_mask=additive).logits, expected)
    assert_same(model(**inputs, attention_mask=square).logits, expected)


# Compilation and operators


@each_modality
def test_compile(modality):
    # Every stage of compilation but the code generator, which needs a C++ compiler on the machine.
    model = make_model(modality, "hybrid-lor", torch.float64)
    inputs = make_inputs(model.config)
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected, grads = model(**inputs).logits, gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs).logits, expected)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, inputs).items()}, grads)


LAYOUTS = {
    "image": pair_layout.PairLayout.for_image(2, 3, 2, 3),
    "image-clamped": pair_layout.PairLayout.for_image(2, 3, 2, 3, 1),
    "text": pair_layout.PairLayout.for_text(4, 6),
}


@pytest.mark.parametrize("banks", ["qk", "q", "k"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("operator", ["pair_scores", "pair_scores_backward", "pair_values"])
def test_operators_keep_the_rules_of_torch(operator, layout, banks):
    layout = LAYOUTS[layout]
    packed = pack(layout)
    trained = operator != "pair_scores_backward"

    def tensor(*shape):
        return torch.randn(*shape, requires_grad=trained)

    tokens = layout.num_tokens
    query, key = (tensor(2, tokens, 5 if name in banks else 6) for name in "qk")
    query_bank, key_bank = (tensor(layout.num_offsets, 5, 6) if name in banks else None for name in "qk")
    pairs = tensor(2, 2, tokens, tokens)
    arguments = {
        "pair_scores": (query, key, query_bank, key_bank, 2, packed),
        "pair_scores_backward": (pairs, query, key, query_bank, key_bank, packed, True, True),
        "pair_values": (pairs, tensor(2, tokens, 5), tensor(layout.num_offsets, 5, 6), packed),
    }[operator]
    torch.library.opcheck(registration.operator(operator).default, arguments)


# Pipelines and Trainer


def make_tokenizer():
    words = ["<pad>", "<unk>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "one", "dog", "saw", "far", "away"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.mark.parametrize("variant", ["full-kv", "hybrid-lor"])
def test_text_generation_pipeline(tmp_path, variant):
    tokenizer = make_tokenizer()
    model = make_model("text", variant, vocab_size=len(tokenizer), pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = ["the cat", "one dog sat on"]
    together = generator(texts, batch_size=2, **arguments)
    for text, (answer,) in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = tokenizer.decode(greedy(model, ids, 4)[0, ids.shape[1] :], skip_special_tokens=True)
        assert generator(text, **arguments)[0]["generated_text"] == expected
        assert answer["generated_text"] == expected


@pytest.mark.parametrize("variant", ["full-kv", "hybrid-lor"])
def test_image_classification_pipeline(tmp_path, variant):
    names = {0: "cat", 1: "dog", 2: "mat"}
    model = make_model("image", variant, id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 12, "width": 10})
    processor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(2)]
    # The processor is named: Transformers 5.17 finds it by itself only with torchvision.
    classifier = pipeline(
        "image-classification",
        model=str(tmp_path),
        image_processor=ViTImageProcessor.from_pretrained(tmp_path),
        device="cpu",
    )
    answers = classifier(images, top_k=3)
    logits = model(**processor(images, return_tensors="pt")).logits
    for answer, row in zip(answers, logits, strict=True):
        scores = row.softmax(-1)
        assert [entry["label"] for entry in answer] == [names[i] for i in scores.argsort(descending=True).tolist()]
        assert answer[0]["score"] == pytest.approx(scores.max().item(), rel=1e-5)


def make_trainer(modality, folder):
    torch.manual_seed(0)
    model = make_model(modality, "hybrid-lor", torch.float32, attention_dropout=0.1, hidden_dropout_prob=0.1)
    data = [
        {name: value[0] for name, value in make_inputs(model.config, 1).items()}
        | {"labels": torch.tensor(i % 3) if modality == "image" else torch.randint(19, (7,))}
        for i in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])


@each_modality
def test_trainer_resumes_where_it_stopped(tmp_path, modality):
    trainer = make_trainer(modality, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(not torch.equal(before[name], trained[name]) for name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 4
    resumed = make_trainer(modality, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same({name: p.detach() for name, p in resumed.model.named_parameters()}, trained, 1e-7)


# Bad input: each error names the field, the value and what is allowed.


@pytest.mark.parametrize("head", [True, False], ids=["head", "trunk"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 12, 10), ("`num_channels` 3", "got 1")),
        ((2, 3, 10, 12), ("`image_size` [12, 10]", "got [10, 12]")),
        ((2, 3, 12, 15), ("`image_size` [12, 10]", "got [12, 15]")),
        ((3, 12, 10), ("[batch, channels, height, width]", "got shape [3, 12, 10]")),
        ((1, 2, 3, 12, 10), ("[batch, channels, height, width]", "got shape [1, 2, 3, 12, 10]")),
    ],
    ids=["channels", "transposed", "width", "3-d", "5-d"],
)
def test_bad_pixels(head, shape, words):
    assert_rejected(("`pixel_values`", *words), make_model(head=head), pixel_values=torch.randn(shape))


@pytest.mark.parametrize("variant", ["full-kv", "lor-qkv", "attention", "hybrid-full"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_bad_text_too_long(variant, given):
    model = make_model("text", variant)
    ids = make_inputs(model.config, length=10)["input_ids"]
    inputs = {given: ids if given == "input_ids" else model.get_input_embeddings()(ids)}
    assert_rejected(("`max_position_embeddings` 9", "at most", "got 10"), model, **inputs)


def test_bad_text_too_long_for_absolute_embeddings():
    model = make_model("text", "full-clamped", use_absolute_position_embeddings=True)
    inputs = make_inputs(model.config, length=10)
    assert_rejected(("`max_position_embeddings` 9", "got 10"), model, **inputs)


@pytest.mark.parametrize("token", [-1, -100, 19, 1000])
def test_bad_token(token):
    ids = torch.tensor([[1, 2, token]])
    assert_rejected(("`input_ids`", "at least 0", "`vocab_size` 19", f"got {token}"), make_model("text"), ids)


@pytest.mark.parametrize("position", [-1, 9])
def test_bad_position(position):
    model = make_model("text", "attention-absolute")
    ids, positions = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, position]])
    words = ("`position_ids`", "at least 0", "`max_position_embeddings` 9", f"got {position}")
    assert_rejected(words, model, ids, position_ids=positions)


@pytest.mark.parametrize("shape", [(7,), (2, 7, 1), (2, 0)], ids=str)
def test_bad_input_ids_shape(shape):
    ids = torch.ones(shape, dtype=torch.long)
    assert_rejected(("`input_ids`", "[batch, length]", str(list(shape))), make_model("text"), ids)


@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 13)], ids=str)
def test_bad_inputs_embeds_shape(shape):
    words = ("`inputs_embeds`", "`hidden_size` 12", str(list(shape)))
    assert_rejected(words, make_model("text"), inputs_embeds=torch.randn(shape, dtype=torch.float64))


@each_modality
@pytest.mark.parametrize("shape", [(2, 5), (3, 7), (7,), (2, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("value", [0, 1])
def test_bad_mask_shape(modality, shape, value):
    model = make_model(modality)
    mask = torch.full(shape, value, dtype=torch.long)
    words = ("`attention_mask`", "7", str(list(shape)))
    assert_rejected(words, model, **make_inputs(model.config), attention_mask=mask)


@each_modality
@pytest.mark.parametrize("how", ["class", "auto"])
def test_bad_head(modality, how):
    other = "text" if modality == "image" else "image"
    make = HEADS[modality] if how == "class" else AUTO[modality].from_config
    assert_rejected(("`modality`", repr(modality), repr(other), HEADS[modality].__name__), make, make_config(other))


@each_modality
def test_bad_head_for_a_checkpoint(tmp_path, modality):
    other = "text" if modality == "image" else "image"
    make_model(other).save_pretrained(tmp_path)
    words = ("`modality`", repr(modality), repr(other))
    assert_rejected(words, AUTO[modality].from_pretrained, tmp_path)


@pytest.mark.parametrize("beside", [True, False], ids=["beside-ids", "alone"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "trunk"])
def test_bad_pixels_to_a_text_model(beside, head):
    inputs = {"pixel_values": torch.randn(2, 3, 12, 10)}
    if beside:
        inputs["input_ids"] = torch.ones(2, 3, dtype=torch.long)
    words = ("`pixel_values`", "'text'", "`input_ids`")
    assert_rejected(words, make_model("text", head=head), **inputs)


@pytest.mark.parametrize("beside", [True, False], ids=["beside-pixels", "alone"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "trunk"])
def test_bad_text_to_an_image_model(beside, given, head):
    inputs = {given: torch.ones(2, 3, dtype=torch.long) if given == "input_ids" else torch.randn(2, 3, 12)}
    if beside:
        inputs["pixel_values"] = torch.randn(2, 3, 12, 10)
    assert_rejected((f"`{given}`", "'image'", "`pixel_values`"), make_model(head=head), **inputs)


@pytest.mark.parametrize("head", [True, False], ids=["head", "trunk"])
def test_bad_no_pixels(head):
    assert_rejected(("`pixel_values`", "'image'"), make_model(head=head))


@pytest.mark.parametrize("head", [True, False], ids=["head", "trunk"])
@pytest.mark.parametrize("given", ["both", "neither"])
def test_bad_both_or_neither(head, given):
    model = make_model("text", head=head)
    ids = make_inputs(model.config)["input_ids"]
    inputs = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)} if given == "both" else {}
    assert_rejected(("`input_ids`", "`inputs_embeds`", "one of", f"got {given}"), model, **inputs)


@pytest.mark.parametrize("cache", [DynamicCache, lambda: DynamicCache(config=GPT2Config())], ids=["plain", "other"])
def test_bad_cache(cache):
    model = make_model("text")
    ids = make_inputs(model.config, length=3)["input_ids"]
    words = ("`past_key_values`", "DynamicCache(config=model.config)", "StaticCache", "got DynamicCache")
    assert_rejected(words, model, ids, past_key_values=cache())
    assert_rejected(words, model.generate, ids, past_key_values=cache(), max_new_tokens=2)


def test_bad_cache_for_images():
    model = make_model("image", head=False)
    words = ("`past_key_values`", "'image'", "got DynamicCache", "`pixel_values`")
    assert_rejected(words, model, **make_inputs(model.config), past_key_values=DynamicCache())


LABELS = {
    "image": [
        (torch.tensor([0, 3]), ("`labels`", "`num_labels` 3", "got 3")),
        (torch.tensor([-1, 0]), ("`labels`", "`num_labels` 3", "-100", "got -1")),
        (torch.tensor([0, 1, 2]), ("`labels`", "[batch] [2]", "got shape [3]")),
        (torch.zeros(2, 2), ("`labels`", "[2, 3]", "got shape [2, 2]")),
    ],
    "text": [
        (torch.full((2, 7), 19), ("`labels`", "`vocab_size` 19", "got 19")),
        (torch.full((2, 7), -1), ("`labels`", "`vocab_size` 19", "-100", "got -1")),
        (torch.zeros(2, 6, dtype=torch.long), ("`labels`", "[2, 7]", "got shape [2, 6]")),
        (torch.zeros(2, 7), ("`labels`", "[2, 7]", "torch.float32")),
    ],
}


@pytest.mark.parametrize(("modality", "case"), [(modality, case) for modality in LABELS for case in range(4)])
def test_bad_labels(modality, case):
    labels, words = LABELS[modality][case]
    model = make_model(modality)
    assert_rejected(words, model, **make_inputs(model.config), labels=labels)


def test_ignored_labels_are_allowed():
    for modality, shape in (("image", (2,)), ("text", (2, 7))):
        model = make_model(modality)
        labels = torch.zeros(shape, dtype=torch.long)
        labels[0] = -100
        assert model(**make_inputs(model.config), labels=labels).loss.isfinite()


@pytest.mark.parametrize("kept", [-1, 8, torch.tensor([7]), torch.tensor([-8])])
def test_bad_logits_to_keep(kept):
    model = make_model("text")
    assert_rejected(("`logits_to_keep`", "7", "got"), model, **make_inputs(model.config), logits_to_keep=kept)


@pytest.mark.parametrize("position_ids", [torch.arange(7), torch.zeros(1, 1, 7).long(), torch.zeros(2, 7)])
def test_bad_position_ids_rank(position_ids):
    model = make_model("text", "rope")
    words = ("`position_ids`", "[2, 7]", f"got shape {list(position_ids.shape)}")
    assert_rejected(words, model, **make_inputs(model.config), position_ids=position_ids)


def test_bad_inputs_embeds_type():
    words = ("`inputs_embeds`", "floats", "torch.int64")
    assert_rejected(words, make_model("text"), inputs_embeds=torch.zeros(2, 7, 12, dtype=torch.long))


# What is set on a config after it was checked


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"relative_projections": "xyz"}, ("`relative_projections`", "'xyz'", "'qkv'")),
        ({"num_hidden_layers": 4}, ("`mixer_types`", "`num_hidden_layers` is 4", "got 2 names")),
        ({"num_hidden_layers": 1}, ("`mixer_types`", "`num_hidden_layers` is 1", "got 2 names")),
        ({"relative_rank": 0}, ("`relative_rank`", "got 0", "at least 1")),
        ({"image_size": [13, 10]}, ("`image_size`", "[13, 10]", "`patch_size`")),
    ],
    ids=lambda value: str(value)[:24],
)
def test_overrides_of_from_pretrained_are_checked(override, words, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError) as caught:
        TranslutionForImageClassification.from_pretrained(tmp_path, **override)
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_mixer_name_is_the_default():
    config = make_config(mixer_types="attention")
    config.mixer_types = None
    model = TranslutionForImageClassification(config)
    assert model.config.mixer_types == ["translution"] * 2


def test_one_mixer_name_overrides_all(tmp_path):
    make_model(variant="attention").save_pretrained(tmp_path)
    model = TranslutionForImageClassification.from_pretrained(tmp_path, mixer_types="rope_attention", head_dim=8)
    assert model.config.mixer_types == ["rope_attention"] * 2


@each_modality
@each_variant
def test_finite_masks_hide_as_well(modality, variant):
    """-1e4 and -1e9 are what many write for minus infinity."""
    model = make_model(modality, variant, head=False)
    inputs = make_inputs(model.config)
    tokens = num_tokens(model.config)
    changed = {name: value.clone() for name, value in inputs.items()}
    if modality == "text":
        changed["input_ids"][:, 3] = (changed["input_ids"][:, 3] + 1) % 19
        hidden = 3
    else:
        changed["pixel_values"][:, :, 4:8, 5:10] += 1
        hidden = 4
    others = [i for i in range(tokens) if i != hidden]
    for value in (-1e4, -1e9, -math.inf):
        mask = torch.zeros(2, 1, tokens, tokens, dtype=torch.float64)
        mask[..., hidden] = value
        first = model(**inputs, attention_mask=mask).last_hidden_state
        second = model(**changed, attention_mask=mask).last_hidden_state
        assert_same(second[:, others], first[:, others], 1e-12)
    # A row that hides everything is no reason for NaN.
    mask[:, :, 2] = -math.inf
    assert model(**inputs, attention_mask=mask).last_hidden_state.isfinite().all()


@each_modality
def test_integer_masks_of_four_dimensions_are_refused(modality):
    model = make_model(modality)
    tokens = num_tokens(model.config)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.long)
    words = ("`attention_mask`", "bool", "floating point", "torch.int64")
    assert_rejected(words, model, **make_inputs(model.config), attention_mask=mask)


@each_variant
def test_packed_texts_do_not_see_each_other(variant):
    model = make_model("text", variant).train()
    ids = make_inputs(model.config)["input_ids"]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    packed = model(ids, position_ids=position_ids).logits
    assert_same(packed[:, :3], model(ids[:, :3]).logits, 1e-10)
    assert_same(packed[:, 3:], model(ids[:, 3:]).logits, 1e-10)


def test_bad_position_ids():
    model = make_model("text", "rope")
    words = ("`position_ids`", "[2, 7]", "got shape [1, 2]")
    assert_rejected(words, model, **make_inputs(model.config), position_ids=torch.tensor([[0, 1]]))

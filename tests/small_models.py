"""Small models of every kind, their inputs, and how tests compare what they compute."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification, TranslutionModel
from translution.configuration.configuration_translution import MIXER_TYPES


HEADS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
AUTO = {"image": AutoModelForImageClassification, "text": AutoModelForCausalLM}
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
    "local-shared": {"relative_projections": "kv", "max_relative_distance": 1, "far_offsets": "shared"},
    "local-rotary": {
        "mixer_types": "rope_translution",
        "relative_projections": "qkv",
        "max_relative_distance": 2,
        "far_offsets": "shared",
    },
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

# Fields of a model that is smaller still, whatever its kind.
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}


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


def gradients(model, inputs):
    """Gradients of a fixed random combination of the logits, by parameter name."""
    model.zero_grad()
    logits = model(**inputs).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weight.to(logits.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


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

"""Attention models of Transformers that become Translution models: the same outputs to begin with, and then Translution's."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import convert_attention_to_translution
import numpy as np
import pytest
import torch
from closeness import assert_close_in_rounding
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_remote_code import LOAD_AND_SAVE
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DynamicCache,
    MixtralConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    ViTImageProcessorPil,
)
from triton_devices import DEVICE, EXACT, TOLERANCE
from without_package import without_package

from translution import (
    TranslutionConfig,
    TranslutionForCausalLM,
    TranslutionForImageClassification,
    explain_dispatch,
)
from translution.modeling.mixers.mixer import Mixer
from translution.modeling.models import from_attention
from translution.modeling.operators import local, triton_basis


# Sizes that are odd, and not multiples of each other where they need not be.
ROTARY = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 17,
    "vocab_size": 23,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 15, "n_layer": 2, "n_head": 3, "n_positions": 32, "vocab_size": 23}
GPT2 |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
IMAGE = {
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "num_channels": 2,
    "patch_size": 3,
    "num_labels": 5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
DISTANCE = {"max_relative_distance": 3}
TEXTS = {
    "llama": ("llama", ROTARY, DISTANCE),
    "llama-biases": ("llama", {**ROTARY, "attention_bias": True, "num_key_value_heads": 1}, DISTANCE),
    "llama-tied": ("llama", {**ROTARY, "tie_word_embeddings": True, "num_key_value_heads": 6}, DISTANCE),
    "llama-value": ("llama", ROTARY, {"relative_projections": "v"}),
    "llama-query": ("llama", ROTARY, {"relative_projections": "qv", **DISTANCE}),
    "llama-all-near": ("llama", ROTARY, {"max_relative_distance": 20}),
    "llama-nothing-near": ("llama", ROTARY, {"max_relative_distance": 0}),
    "llama-one-layer": ("llama", ROTARY, {"layers": [1], **DISTANCE}),
    "llama-llama3": ("llama", {**ROTARY, "rope_parameters": LLAMA3}, DISTANCE),
    "llama-yarn": ("llama", {**ROTARY, "rope_parameters": YARN}, DISTANCE),
    "mistral": ("mistral", {**ROTARY, "sliding_window": None}, DISTANCE),
    "qwen2": ("qwen2", {**ROTARY, "hidden_size": 15}, DISTANCE),
    "qwen3": ("qwen3", ROTARY, DISTANCE),
    "qwen3-query": ("qwen3", {**ROTARY, "attention_bias": True}, {"relative_projections": "qkv", **DISTANCE}),
    "qwen3-key": ("qwen3", ROTARY, {"relative_projections": "k", **DISTANCE}),
    "gpt2": ("gpt2", GPT2, {}),
    "gpt2-distance": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, DISTANCE),
}
SHARED = {"max_relative_distance": 1, "far_offsets": "shared"}
IMAGES = {
    "vit": ("vit", {**IMAGE, "image_size": [9, 12]}, {}),
    "vit-square": ("vit", {**IMAGE, "image_size": 9}, {}),
    "vit-shared": ("vit", {**IMAGE, "image_size": [9, 15]}, SHARED),
    "vit-clamped": ("vit", {**IMAGE, "image_size": 15}, {"max_relative_distance": 1, "layers": [0]}),
    "vit-no-biases": ("vit", {**IMAGE, "image_size": 9, "qkv_bias": False}, {"relative_projections": "qkv"}),
    "dinov2": ("dinov2", {**IMAGE, "image_size": 9}, SHARED),
}
# Those whose matrices are not each the trained one: low-rank, and from factors.
FACTORED = {
    "llama-low-rank": ("llama", ROTARY, {"relative_rank": 2}),
    "llama-low-rank-query": (
        "llama",
        {**ROTARY, "attention_bias": True},
        {"relative_rank": 3, "relative_projections": "qkv", **DISTANCE},
    ),
    "qwen3-low-rank": ("qwen3", {**ROTARY, "attention_bias": True}, {"relative_rank": 2, "relative_projections": "q"}),
    "gpt2-low-rank-basis": ("gpt2", GPT2, {"relative_rank": 2, "offset_basis": 3}),
    "llama-value-basis": ("llama", ROTARY, {"offset_basis": 3, "relative_projections": "v"}),
    "qwen2-basis": ("qwen2", {**ROTARY, "hidden_size": 15}, {"offset_basis": 2, **DISTANCE}),
    "gpt2-basis": ("gpt2", GPT2, {"offset_basis": 3, "relative_projections": "qkv"}),
    "vit-low-rank": ("vit", {**IMAGE, "image_size": [9, 12]}, {"relative_rank": 2}),
    "vit-basis": ("vit", {**IMAGE, "image_size": 9}, {"offset_basis": 2}),
}
TEXTS |= {name: case for name, case in FACTORED.items() if not name.startswith("vit")}
IMAGES |= {name: case for name, case in FACTORED.items() if name.startswith("vit")}
CASES = {**TEXTS, **IMAGES}
AUTO = {"text": AutoModelForCausalLM, "image": AutoModelForImageClassification}
HEADS = {"text": TranslutionForCausalLM, "image": TranslutionForImageClassification}


def modality_of(case):
    return "text" if case in TEXTS else "image"


def make_source(case, dtype=torch.float64):
    """A model with random weights, its RMSNorms of the model's own precision (Transformers' compute in float32)."""
    model_type, fields, _ = CASES[case]
    source = AUTO[modality_of(case)].from_config(AutoConfig.for_model(model_type, **fields)).to(dtype).eval()
    for name, module in list(source.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=dtype)
            source.set_submodule(name, norm)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return source


def convert(source, case, **fields):
    # The conversion takes the modules of what it is given.
    return HEADS[modality_of(case)].from_attention(copy.deepcopy(source), **{**CASES[case][2], **fields})


def make_inputs(source, case, length=9):
    if case in TEXTS:
        return {"input_ids": torch.randint(1, 23, (2, length))}
    size = source.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(2, 2, height, width, dtype=source.dtype)}


def loss_of(model, inputs):
    logits = model(**inputs).logits
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def part_from_source(model):
    """Gives every offset a matrix of its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_bank", "_coefficients")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_sources(case):
    source = make_source(case)
    inputs = make_inputs(source, case)
    converted = convert(source, case)
    replaced = CASES[case][2].get("layers", [0, 1])
    served = [line.split() for line in explain_dispatch(converted, **inputs).splitlines()]
    assert [int(words[1]) for words in served if words[2] in ("full", "low_rank", "basis")] == replaced
    for implementation in ("auto", "eager"):
        converted.set_attn_implementation(implementation)
        assert_close_in_rounding(converted(**inputs).logits, source(**inputs).logits, roundings=1000)


def source_gradient(gradients, name, bank):
    """The gradient of the source's weight that a bank was made of, laid out as one matrix of the bank."""
    module, part = name.rsplit(".", 1)
    what = "bias" if "bias" in part else "weight"
    third = "qkv".index(part[0])
    if f"{module}.c_attn.{what}" in gradients:
        return gradients[f"{module}.c_attn.{what}"].chunk(3, dim=-1)[third]
    gradient = gradients[f"{module}.{part[0]}_proj.{what}"]
    return gradient.t() if what == "weight" else gradient


@pytest.mark.parametrize("case", [case for case in CASES if case not in FACTORED])
def test_gradients_sum_to_the_sources(case):
    source = make_source(case)
    inputs = make_inputs(source, case)
    converted = convert(source, case)
    loss_of(source, inputs).backward()
    loss_of(converted, inputs).backward()
    prefix = source.base_model_prefix
    gradients = {name.removeprefix(f"{prefix}."): p.grad for name, p in source.named_parameters()}
    banks = 0
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
    for name, parameter in converted.named_parameters():
        name = name.removeprefix("model.trunk.").replace(".mixer.", ".")
        gradient, expected = parameter.grad, gradients.get(name)
        if name.endswith("_bank"):
            banks += 1
            gradient, expected = gradient.sum(0), source_gradient(gradients, name, gradient)
        elif ".q_proj." in name and expected is None:
            expected = source_gradient(
                gradients, name.replace("q_proj.weight", "q_bank").replace("q_proj.bias", "q_bias"), gradient
            )
            gradient = gradient.t() if gradient.ndim == 2 else gradient
        elif name.startswith("attn.") or ".attn.o_proj.0." in name:
            expected = gradients[name.replace("o_proj.0", "c_proj")]
        if expected is None:
            # Transformers' mask tokens take no part in classification.
            assert gradient is None, name
            continue
        # A key bias without a rotation has no gradient but rounding.
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11 * float(largest))
    assert banks >= len(CASES[case][2].get("relative_projections", "kv"))


@pytest.mark.parametrize("case", FACTORED)
def test_all_that_is_new_is_trained(case):
    """What offsets have of their own from the first step on, the rest as soon as that is no longer zero."""
    source = make_source(case)
    inputs = make_inputs(source, case)
    converted = convert(source, case, freeze="all_but_offsets")
    new = {name: parameter for name, parameter in converted.named_parameters() if parameter.requires_grad}
    of_offsets = {name for name in new if name.endswith(("_bank", "_coefficients"))}
    assert of_offsets
    for step in range(2):
        loss_of(converted, inputs).backward()
        trained = {name for name, parameter in new.items() if parameter.grad.abs().max() > 0}
        if step == 0:
            # Each mixer: values, and one side of the scores.
            assert len(trained & of_offsets) >= 2 * min(len(converted.config.relative_projections), 2)
            with torch.no_grad():
                for parameter in new.values():
                    parameter -= 0.01 * parameter.grad / parameter.grad.abs().max().clamp(min=1e-9)
    assert trained == new.keys()


@pytest.mark.parametrize("case", ["gpt2", "gpt2-distance", "llama-biases", "llama-value", "llama-value-basis"])
def test_a_generated_token_copies_no_bank(case):
    source = make_source(case)
    converted = convert(source, case)
    tokens = make_inputs(source, case)["input_ids"][:1]
    cache = StaticCache(config=converted.config, max_cache_len=9)
    converted(tokens[:, :8], past_key_values=cache)
    tables = (p for name, p in converted.named_parameters() if name.endswith(("v_bank", "v_factors")))
    # What is read of a bank: one matrix for each token at most.
    matrices = next(tables)[:9]
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given, found = (
                [part for part in tree_leaves(parts) if isinstance(part, torch.Tensor)] for parts in (args, result)
            )
            places = {part.untyped_storage().data_ptr() for part in given}
            sizes.extend(part.numel() for part in found if part.untyped_storage().data_ptr() not in places)
            return result

    with torch.no_grad(), Record():
        converted(tokens[:, 8:], past_key_values=cache)
    assert 0 < max(sizes) < matrices.numel()


@pytest.mark.parametrize("case", ["llama-value", "llama-low-rank", "llama-low-rank-query", "llama-nothing-near"])
def test_a_generated_token_copies_no_cached_heads(case):
    source = make_source(case)
    converted = convert(source, case)
    tokens = torch.randint(1, 23, (1, 41))
    cache = DynamicCache(config=converted.config)
    converted(tokens[:, :40], past_key_values=cache)
    shapes = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            parts = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
            shapes.update(tuple(sorted(size for size in part.shape if size > 1)) for part in parts)
            return result

    with torch.no_grad(), Record():
        converted(tokens[:, 40:], past_key_values=cache)
    # Keys of 41 tokens: two heads of four features, and not the six of queries.
    assert (2, 4, 41) in shapes
    assert not {(4, 6, 41), (24, 41)} & shapes


@pytest.mark.parametrize("case", TEXTS)
def test_generates_what_the_source_generates(case):
    source = make_source(case)
    converted = convert(source, case)
    prompts = make_inputs(source, case, length=6)["input_ids"]
    mask = torch.ones_like(prompts)
    # Padded on the left.
    mask[0, :2] = 0
    prompts[0, :2] = 0
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        inputs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
        tokens = [model.generate(prompts, **inputs) for model in (source, converted)]
        assert torch.equal(*tokens), options


@pytest.mark.parametrize("case", TEXTS)
def test_caches_and_paths_agree_when_offsets_differ(case):
    source = make_source(case)
    converted = part_from_source(convert(source, case))
    tokens = make_inputs(source, case, length=11)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    shown = mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    expected = converted.eval()(tokens, use_cache=False, **inputs).logits[shown]
    assert (expected - source(tokens, use_cache=False, **inputs).logits[shown]).abs().max() > 1e-3
    converted.set_attn_implementation("eager")
    assert_close_in_rounding(converted(tokens, use_cache=False, **inputs).logits[shown], expected, roundings=1000)
    converted.set_attn_implementation("auto")
    for cache in (DynamicCache(config=converted.config), StaticCache(config=converted.config, max_cache_len=14)):
        pieces, start = [], 0
        for size in (5, 2, 1, 1, 1, 1):
            part = slice(start, start + size)
            outputs = converted(
                tokens[:, part],
                attention_mask=mask[:, : start + size],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            pieces.append(outputs.logits)
            start += size
        assert_close_in_rounding(torch.cat(pieces, dim=1)[shown], expected, roundings=1000)


LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONG |= {"short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0]}


@pytest.mark.parametrize(
    "scaling", [LINEAR, {**LINEAR, "rope_type": "dynamic"}, LONG], ids=lambda scaling: scaling["rope_type"]
)
def test_rotations_that_change_with_the_length(scaling, monkeypatch):
    """What was cached before a rotation changed stays as it was, in the source as well."""
    fields = {**ROTARY, "max_position_embeddings": 12, "rope_parameters": scaling}
    monkeypatch.setitem(CASES, "llama", ("llama", fields, DISTANCE))
    source = make_source("llama")
    converted = convert(source, "llama")
    for length in (7, 20):
        inputs = make_inputs(source, "llama", length)
        assert_close_in_rounding(converted(**inputs).logits, source(**inputs).logits, roundings=1000)
    prompt = make_inputs(source, "llama", 7)["input_ids"]
    tokens = [model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (source, converted)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("case", IMAGES)
def test_paths_agree_on_images_when_offsets_differ(case):
    source = make_source(case)
    converted = part_from_source(convert(source, case))
    inputs = make_inputs(source, case)
    expected = converted(**inputs).logits
    assert (expected - source(**inputs).logits).abs().max() > 1e-3
    converted.set_attn_implementation("eager")
    assert_close_in_rounding(converted(**inputs).logits, expected, roundings=1000)


@pytest.mark.parametrize("case", ["vit", "vit-shared", "vit-clamped"])
def test_masks_of_images(case):
    source = make_source(case)
    converted = convert(source, case)
    inputs = make_inputs(source, case)
    length = converted.model(**inputs).last_hidden_state.shape[1]
    tokens = torch.ones(2, length, dtype=torch.long)
    tokens[0, 3:6] = tokens[1, -1] = 0
    hidden = torch.rand(2, 1, length, length) < 0.3
    hidden[..., 0] = False
    pairs = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)
    for mask in (tokens, pairs):
        ours, theirs = (model(**inputs, attention_mask=mask).logits for model in (converted, source))
        assert_close_in_rounding(ours, theirs, roundings=1000)
        assert (ours - converted(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["llama", "llama-value", "llama-query", "llama-one-layer"])
def test_caches_keep_heads_grouped(case):
    source = make_source(case)
    converted = convert(source, case)
    tokens = make_inputs(source, case)["input_ids"]
    cache = DynamicCache(config=converted.config)
    for part in (tokens[:, :8], tokens[:, 8:]):
        converted(part, past_key_values=cache)
    for mixer_type, layer in zip(converted.config.mixer_types, cache.layers, strict=True):
        stored = layer.keys.numel() + layer.values.numel()
        # Two heads of four features, for keys and for values; or of values that are relative without a distance, the inputs.
        values = 18 if (mixer_type, case) == ("rope_translution", "llama-value") else 2 * 4
        assert stored == tokens.numel() * (2 * 4 + values)


def test_assists_itself_with_its_first_layers():
    source = make_source("llama")
    inputs = {name: value[:1] for name, value in make_inputs(source, "llama").items() if name == "input_ids"}
    expected = source.generate(**inputs, max_new_tokens=6, do_sample=False)
    converted = convert(source, "llama")
    for options in ({"assistant_early_exit": 1}, {}):
        assert torch.equal(converted.generate(**inputs, max_new_tokens=6, do_sample=False, **options), expected)


GROUPED = ["llama", "llama-query", "qwen3-query", "llama-low-rank-query", "qwen2-basis"]


@pytest.mark.parametrize("case", GROUPED)
def test_keys_reach_local_attention_without_copies_and_gradients_are_the_references(case, monkeypatch):
    source = make_source(case)
    converted = part_from_source(convert(source, case))
    inputs = make_inputs(source, case)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 2:4] = 0
    calls, forward = [], local._forward

    def note(queries, keys, values, far, *rest):
        calls.append([queries[0].shape[-1] / parts[0].shape[-1] for parts in (keys, values)])
        calls[-1] += [far[0].shape[1] / part.shape[1] for part in far[1:]]
        return forward(queries, keys, values, far, *rest)

    monkeypatch.setattr(local, "_forward", note)
    results = []
    for implementation in ("eager", "auto"):
        converted.set_attn_implementation(implementation)
        logits = converted(**inputs, attention_mask=mask).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        results.append([logits, *torch.autograd.grad((logits * weights).sum(), list(converted.parameters()))])
    # Six heads of queries share two of keys and of values, in each of two layers.
    assert calls == 2 * [[3, 3, 3, 3]]
    largest = max(gradient.abs().max() for gradient in results[0][1:])
    assert_close_in_rounding(results[1][0], results[0][0], roundings=1000)
    for expected, actual in zip(results[0][1:], results[1][1:], strict=True):
        # Where keys have biases of their own these have no gradient but rounding.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * float(largest))


@pytest.mark.parametrize("case", ["llama-value", "llama", "llama-value-basis"])
def test_kernels(case, monkeypatch):
    given, attend = [], triton_basis._operator

    def note(*arguments):
        given.append([part.shape[1] for part in arguments[:3]])
        return attend(*arguments)

    monkeypatch.setattr(triton_basis, "_operator", note)
    source = make_source(case, EXACT)
    converted = part_from_source(convert(source, case, **({"max_relative_distance": 1} if case == "llama" else {})))
    converted.to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in make_inputs(source, case, length=3).items()}
    results = []
    for implementation in ("eager", "triton"):
        converted.set_attn_implementation(implementation)
        logits = converted(**inputs).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=EXACT, device=DEVICE).view_as(logits)
        results.append([logits, *torch.autograd.grad((logits * weights).sum(), list(converted.parameters()))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    # Keys and values have the heads of the source: none is repeated before.
    assert given == [[6, 2, 2]] * (2 if case == "llama-value-basis" else 0)


@pytest.mark.parametrize("case", ["vit-square", "vit-clamped", "dinov2"])
def test_images_of_other_sizes(case):
    source = make_source(case)
    converted = convert(source, case)
    images = torch.randn(2, 2, 18, 9, dtype=torch.float64)
    option = {} if case == "dinov2" else {"interpolate_pos_encoding": True}
    expected = source(images, **option).logits
    assert_close_in_rounding(converted(images, interpolate_pos_encoding=True).logits, expected, roundings=1000)
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        converted(images)
    if case != "dinov2":
        converted.model.resize_image([18, 9])
        assert_close_in_rounding(converted(images).logits, expected, roundings=1000)


@pytest.mark.parametrize(
    ("case", "size"), [("vit-square", [18, 9]), ("vit-clamped", [18, 9]), ("vit-basis", [18, 9]), ("dinov2", 18)]
)
def test_resized_for_good(case, size, tmp_path):
    converted = part_from_source(convert(make_source(case), case))
    images = torch.randn(2, 2, *(size if isinstance(size, list) else [size] * 2), dtype=torch.float64)
    expected = converted(images, interpolate_pos_encoding=True).logits
    converted.model.resize_image(size)
    # DINOv2 interpolates in float32.
    dtype = torch.float32 if case == "dinov2" else None
    assert_close_in_rounding(converted(images).logits, expected, roundings=1000, dtype=dtype)
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_close_in_rounding(loaded(images).logits, converted(images).logits)
    if case == "dinov2":
        with pytest.raises(ValueError, match="square"):
            converted.model.resize_image([18, 9])


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-query", "qwen3-key", "gpt2-distance", "vit-shared"])
def test_attention_dropout_takes_a_path_that_is_right(case, monkeypatch):
    source = make_source(case)
    converted = part_from_source(convert(source, case))
    inputs = make_inputs(source, case)
    expected = converted(**inputs).logits
    for module in converted.modules():
        module.training = isinstance(module, Mixer)
        if module.training:
            module.attention_dropout = 0.5
    # The path of dropout is taken, and nothing is dropped.
    monkeypatch.setattr(nn.functional, "dropout", lambda weights, *_: weights)
    assert "local" not in explain_dispatch(converted, **inputs)
    assert_close_in_rounding(converted(**inputs).logits, expected, roundings=1000)


def test_a_bank_that_is_missing_is_drawn(tmp_path):
    converted = convert(make_source("llama", torch.float32), "llama")
    converted.config.initializer_range = 0.25
    converted.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = "model.trunk.layers.1.self_attn.mixer.k_bank"
    weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = TranslutionForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {missing}
    bank = loaded.get_parameter(missing)
    # 576 numbers: the spread of their own is known to 3 %.
    assert 0.2 < bank.std() < 0.3
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in weights.items())


def test_adapters_of_peft(tmp_path):
    source = make_source("llama", torch.float32)
    converted = convert(source, "llama")
    tokens = make_inputs(source, "llama")["input_ids"]
    banks = LoraConfig(target_parameters=["k_bank", "v_bank"], r=2, task_type="CAUSAL_LM")
    model = get_peft_model(converted, banks)
    assert_close_in_rounding(model(tokens).logits, source(tokens).logits, roundings=1000)
    model(tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(("k_bank" in name) or ("v_bank" in name) or ".mixer." in name for name in trained)
    assert any(p.grad.abs().max() > 0 for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.3)
    expected = model(tokens).logits
    assert (expected - source(tokens).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(convert(source, "llama"), tmp_path)
    assert_close_in_rounding(loaded(tokens).logits, expected)
    assert_close_in_rounding(loaded.merge_and_unload()(tokens).logits, expected, roundings=1000)


def test_parts_on_the_disk(tmp_path):
    source = make_source("llama-biases", torch.float32)
    converted = convert(source, "llama-biases").float()
    converted.save_pretrained(tmp_path / "model")
    tokens = make_inputs(source, "llama-biases")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    places = {"model.trunk.embed_tokens": "cpu", "model.trunk.layers.0": "cpu", "model.trunk.layers.1": "disk"}
    places |= {"model.trunk.norm": "disk", "model.trunk.rotary_emb": "cpu", "lm_head": "cpu"}
    apart = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert apart.model.trunk.layers[1].self_attn.mixer.k_bank.device.type == "meta"
    assert_close_in_rounding(apart(tokens).logits, whole(tokens).logits)


def test_reads_the_class_token_beside_the_mean():
    """As DINOv2's classifier does, with a trunk of this package's own."""
    fields = {
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
    }
    config = TranslutionConfig(image_size=8, patch_size=4, num_labels=3, pooling="cls_and_mean", **fields)
    model = TranslutionForImageClassification(config).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = model.model(images).last_hidden_state
    read = torch.cat((tokens[:, 0], tokens[:, 1:].sum(1) / 4), dim=1)
    assert_close_in_rounding(model(images).logits, read @ model.classifier.weight.t() + model.classifier.bias)


def test_packed_texts():
    source = make_source("llama-one-layer")
    converted = convert(source, "llama-one-layer")
    tokens = make_inputs(source, "llama-one-layer")["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    ours, theirs = (model(tokens, position_ids=positions, use_cache=False).logits for model in (converted, source))
    assert_close_in_rounding(ours, theirs, roundings=1000)
    apart = [source(tokens[:, part], use_cache=False).logits for part in (slice(0, 4), slice(4, 9))]
    assert_close_in_rounding(ours, torch.cat(apart, dim=1), roundings=1000)


@pytest.mark.parametrize(
    "case", ["llama-tied", "qwen3", "gpt2", "vit-shared", "llama-low-rank-query", "qwen2-basis", "vit-basis"]
)
def test_saved_and_loaded(case, tmp_path):
    source = make_source(case)
    converted = part_from_source(convert(source, case))
    inputs = make_inputs(source, case)
    # RMSNorms of a saved model are Transformers' own again, which compute in float32.
    fresh = HEADS[modality_of(case)](converted.config).double().eval()
    fresh.load_state_dict(converted.state_dict())
    fresh.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert fresh.state_dict().keys() - stored <= {"lm_head.weight"}
    assert stored <= fresh.state_dict().keys()
    loaded, report = AUTO[modality_of(case)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is HEADS[modality_of(case)]
    ours, theirs = fresh.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    dtype = torch.float32 if "RMSNorm" in str(fresh) else None
    assert_close_in_rounding(loaded(**inputs).logits, fresh(**inputs).logits, dtype=dtype)
    trunk = AutoModel.from_pretrained(tmp_path)
    states = trunk(**inputs).last_hidden_state
    assert_close_in_rounding(states, fresh.model(**inputs).last_hidden_state, dtype=dtype)


@pytest.mark.parametrize("case", ["llama", "gpt2", "vit"])
def test_another_dropout(case):
    source = make_source(case)
    config = convert(source, case).config
    for name in ("attention_dropout", "hidden_dropout_prob"):
        assert getattr(config, name) == getattr(source.config, name, 0.1 if case == "gpt2" else 0.0)
    epsilon = {"llama": "rms_norm_eps", "gpt2": "layer_norm_epsilon", "vit": "layer_norm_eps"}[case]
    assert config.layer_norm_eps == getattr(source.config, epsilon)
    if case == "gpt2":
        # What nobody changes is as in the source, where rates differ.
        config.trunk_config["embd_pdrop"] = 0.75
        trunk = HEADS["text"](config).model.trunk
        assert (trunk.drop.p, trunk.h[0].mlp.dropout.p) == (0.75, 0.1)
    config = config.from_dict(config.to_dict(), attention_dropout=0.25, hidden_dropout_prob=0.5)
    trunk = HEADS[modality_of(case)](config).model.trunk
    rates = [module.p for module in trunk.modules() if isinstance(module, nn.Dropout)]
    assert set(rates) == (set() if case == "llama" else {0.5})
    assert {module.attention_dropout for module in trunk.modules() if isinstance(module, Mixer)} == {0.25}


def test_loads_without_the_package(tmp_path):
    converted = convert(make_source("qwen2"), "qwen2").float()
    tokens = torch.randint(1, 23, (1, 6))
    name = "AutoModelForCausalLM"
    converted.save_pretrained(tmp_path / f"{name}-first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-first")
    save_file({"input": tokens, "output": loaded(tokens).logits.detach()}, tmp_path / f"{name}.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, name],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": without_package(tmp_path / "path"),
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_converts_a_folder_by_command(tmp_path, capsys):
    source = make_source("vit-shared", torch.float32)
    source.save_pretrained(tmp_path / "source")
    ViTImageProcessorPil(size={"height": 9, "width": 15}).save_pretrained(tmp_path / "source")
    origin = {
        "license": "other",
        "license_name": "some-licence",
        "license_link": "LICENSE.txt",
        "base_model": "user/base",
    }
    card = "\n".join(["---", *(f"{name}: {value}" for name, value in origin.items()), "---", "# A model"])
    (tmp_path / "source" / "LICENSE.txt").write_text("You may.", encoding="utf-8")
    (tmp_path / "source" / "README.md").write_text(card, encoding="utf-8")
    output = tmp_path / "converted"
    arguments = ["--model", str(tmp_path / "source"), "--output", str(output), "--layers", "1"]
    arguments += ["--max_relative_distance", "1", "--far_offsets", "shared", "--max_shard_size", "10KB"]
    arguments += ["--relative_rank", "2", "--offset_basis", "3"]
    convert_attention_to_translution.main(arguments)
    assert "TranslutionForImageClassification" in capsys.readouterr().out
    assert len(list(output.glob("*.safetensors"))) > 1
    converted = AutoModelForImageClassification.from_pretrained(output)
    assert converted.config.mixer_types == ["attention", "translution"]
    assert (converted.config.relative_rank, converted.config.offset_basis) == (2, 3)
    inputs = make_inputs(source, "vit-shared")
    assert_close_in_rounding(converted(**inputs).logits, source(**inputs).logits, roundings=1000)
    assert AutoImageProcessor.from_pretrained(output).size["width"] == 15
    data = ModelCard.load(output / "README.md").data.to_dict()
    assert {name: data.get(name) for name in origin} == origin
    assert (output / "LICENSE.txt").read_text(encoding="utf-8") == "You may."
    assert "| `trunk_config` | vit |" in (output / "README.md").read_text(encoding="utf-8")
    # The folder may have been trained further than its base.
    assert "Converted from `source`" in (output / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="--overwrite"):
        convert_attention_to_translution.main(arguments)


def test_converts_a_text_model_with_its_tokenizer(tmp_path):
    source = make_source("llama", torch.bfloat16)
    source.generation_config.max_new_tokens = 7
    source.save_pretrained(tmp_path / "source")
    words = {word: number for number, word in enumerate("abcdefg")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "source")
    output = tmp_path / "converted"
    convert_attention_to_translution.convert(str(tmp_path / "source"), output, max_relative_distance=2)
    converted = AutoModelForCausalLM.from_pretrained(output)
    assert converted.dtype == torch.bfloat16
    assert converted.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output)("c")["input_ids"] == [2]
    banks = {name: p for name, p in converted.named_parameters() if name.endswith("_bank")}
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "source").model
    for name, bank in banks.items():
        path = name.removeprefix("model.trunk.").replace("mixer.", "").replace("_bank", "_proj.weight")
        assert all(torch.equal(matrix, weights.get_parameter(path).t()) for matrix in bank)
    assert len(banks) == 4


def gpt2_files(folder):
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def tokenizer_file(folder):
    Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("write", [gpt2_files, tokenizer_file, None])
def test_a_tokenizer_without_a_config(write, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "converted"
    make_source("gpt2", torch.float32).save_pretrained(source)
    if write is not None:
        write(source)
    convert_attention_to_translution.convert(str(source), output)
    told = "has no tokenizer" in capsys.readouterr().out
    assert told == (write is None)
    assert (output / "tokenizer_config.json").is_file() == (write is not None)
    if write is not None:
        # What the merge makes of the letters.
        assert AutoTokenizer.from_pretrained(output)("abba")["input_ids"] == [2, 1, 0]


def test_an_image_processor_in_the_file_of_a_processor(tmp_path, capsys):
    source = tmp_path / "source"
    make_source("vit-shared", torch.float32).save_pretrained(source)
    convert_attention_to_translution.convert(str(source), tmp_path / "without", max_relative_distance=1)
    assert "has no image processor" in capsys.readouterr().out
    processor = ViTImageProcessorPil(size={"height": 9, "width": 15}).to_dict()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    convert_attention_to_translution.convert(str(source), tmp_path / "with", max_relative_distance=1)
    assert AutoImageProcessor.from_pretrained(tmp_path / "with").size["width"] == 15
    assert not capsys.readouterr().out


# Prints the most memory that converting, saving and loading take besides what was there, as multiples of the new model.
MEASURE_MEMORY = """
import gc, json, re, resource, sys
from pathlib import Path
import convert_attention_to_translution
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def most():
    status = Path("/proc/self/status")
    if status.exists():
        # What Linux says of resources begins with what the calling process had.
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before, taken = most(), []
model = convert_attention_to_translution.convert(
    "source", Path("converted"), max_shard_size="20MB", max_relative_distance=1
)
size = sum(parameter.nbytes for parameter in model.parameters())
taken.append(most() - before)
del model
gc.collect()
model = AutoModelForCausalLM.from_pretrained("converted")
# Files are mapped: all of it is read.
assert all(parameter.sum() != 0 for parameter in model.parameters())
taken.append(most() - before)
print(json.dumps([each / size for each in taken]))
"""


def test_loads_shards_of_a_model_larger_than_the_memory_it_may_take(tmp_path):
    source = make_source("llama", torch.float32)
    inputs = make_inputs(source, "llama")
    converted = part_from_source(convert(source, "llama")).eval()
    expected = converted(**inputs).logits
    converted.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    limits = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": tmp_path / "offload"}
    loaded = TranslutionForCausalLM.from_pretrained(tmp_path / "model", **limits)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_close_in_rounding(loaded(**inputs).logits, expected)


def test_a_model_is_in_memory_once(tmp_path):
    config = AutoConfig.for_model("llama", hidden_size=768, intermediate_size=768, num_hidden_layers=6, vocab_size=8)
    with torch.device("meta"):
        source = AutoModelForCausalLM.from_config(config)
    source.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*source.parameters(), *source.buffers()):
            tensor.fill_(0.5)
    source.save_pretrained(tmp_path / "source", max_shard_size="20MB")
    scripts = Path(convert_attention_to_translution.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(scripts), str(scripts.parent)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) > 5
    # The new model, 128 MB, and what is mapped of the source that became no part of it. The source is 0.8 of the new model, so
    # that a second copy of either is more.
    assert max(json.loads(result.stdout.splitlines()[-1])) < 1.6


@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "gpt2", "vit-shared", "llama-low-rank-query", "gpt2-basis"])
def test_as_near_in_bfloat16_as_the_source(case):
    errors = []
    for _ in range(8):
        source = make_source(case)
        inputs = make_inputs(source, case)
        exact = source(**inputs).logits
        source.to(torch.bfloat16)
        converted = convert(source, case)
        assert converted.dtype == torch.bfloat16
        inputs = {name: value.to(torch.bfloat16) if case in IMAGES else value for name, value in inputs.items()}
        errors.append([(model(**inputs).logits - exact).abs().mean().item() for model in (converted, source)])
    error, expected = torch.tensor(errors).mean(0)
    # Both are rounded, at other places. What belongs to far and to near pairs is rounded apart, so at most twice as often; how
    # often a fused attention rounds depends on the processor.
    assert error < 2 * expected


@pytest.mark.parametrize("case", ["llama-one-layer", "gpt2", "vit-clamped"])
def test_hidden_states_and_weights(case):
    source = make_source(case)
    inputs = make_inputs(source, case)
    converted = convert(source, case)
    source.set_attn_implementation("eager")
    ours, theirs = (
        model(**inputs, output_hidden_states=True, output_attentions=True) for model in (converted, source)
    )
    # Transformers' eager attention has its softmax in float32.
    for name in ("hidden_states", "attentions"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name))
        for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_trains_with_checkpointing_and_resized_embeddings(tmp_path):
    source = make_source("llama-tied")
    converted = convert(source, "llama-tied").train()
    tokens = make_inputs(source, "llama-tied")["input_ids"]
    converted(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in converted.named_parameters()}
    converted.zero_grad()
    converted.gradient_checkpointing_enable()
    converted(tokens, labels=tokens).loss.backward()
    for name, parameter in converted.named_parameters():
        assert_close_in_rounding(parameter.grad, expected[name])
    converted.resize_token_embeddings(29)
    assert converted.lm_head.weight is converted.get_input_embeddings().weight
    converted.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.shape == (2, 9, 29)


REFUSED = {
    "no distance": (AutoConfig.for_model("llama"), {}, "`max_relative_distance`"),
    "experts": (MixtralConfig(), DISTANCE, "'mixtral'.*experts"),
    "distillation token": (AutoConfig.for_model("deit"), DISTANCE, "'deit'.*distillation"),
    "no such family": (AutoConfig.for_model("opt"), DISTANCE, "'llama'.*got 'opt'"),
    "sliding window": (AutoConfig.for_model("mistral", sliding_window=8), DISTANCE, "`sliding_window` is 8"),
    "windows in some layers": (
        AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        DISTANCE,
        "'sliding_attention'",
    ),
    "cross attention": (AutoConfig.for_model("gpt2", add_cross_attention=True), DISTANCE, "`add_cross_attention`"),
    "scores in float32": (
        AutoConfig.for_model("gpt2", reorder_and_upcast_attn=True),
        DISTANCE,
        "`reorder_and_upcast_attn`",
    ),
    "quantised": (
        AutoConfig.for_model("llama", quantization_config={"quant_method": "bitsandbytes"}),
        DISTANCE,
        "`quantization_config`",
    ),
    "an image model": (AutoConfig.for_model("vit"), DISTANCE, "`modality` 'text'.*'vit'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights_are_read(case, tmp_path):
    config, fields, message = REFUSED[case]
    config.save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        TranslutionForCausalLM.from_attention(tmp_path, **fields)


@pytest.mark.parametrize("head", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_refuses_a_distillation_token(head, tmp_path):
    source = head(AutoConfig.for_model("deit", **IMAGE, image_size=9))
    source.save_pretrained(tmp_path)
    for model in (source, tmp_path):
        with pytest.raises(ValueError, match=r"got 'deit': its distillation token .*without distillation.* 'vit'"):
            TranslutionForImageClassification.from_attention(model, **SHARED)


def test_texts_longer_than_those_of_the_source():
    """Rotary positions go on, and so does a bank with a distance; the generated tokens are the source's."""
    source = make_source("llama-biases")
    converted = convert(source, "llama-biases")
    tokens = make_inputs(source, "llama-biases", length=70)["input_ids"]
    assert tokens.shape[1] > converted.config.max_position_embeddings
    assert_close_in_rounding(converted(tokens).logits, source(tokens).logits, roundings=1000)
    prompt = tokens[:, :60]
    found, expected = (model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (converted, source))
    assert found.shape[1] == 68
    assert torch.equal(found, expected)
    parted = part_from_source(converted)
    logits = parted(tokens).logits
    assert (logits - source(tokens).logits).abs().max() > 1e-3
    parted.set_attn_implementation("eager")
    assert_close_in_rounding(parted(tokens).logits, logits, roundings=1000)


@pytest.mark.parametrize("case", ["llama-value", "gpt2-distance"])
def test_refuses_texts_that_are_too_long(case):
    """For a bank without a distance, or for the source's table of positions."""
    converted = convert(make_source(case), case)
    length = converted.config.max_position_embeddings
    tokens = make_inputs(converted, case, length=length + 1)["input_ids"]
    assert converted(tokens[:, :length]).logits.shape[1] == length
    with pytest.raises(ValueError, match=f"at most `max_position_embeddings` {length} tokens, got {length + 1}"):
        converted(tokens)


def test_refuses_fields_that_do_not_fit():
    source = make_source("llama")
    with pytest.raises(StrictDataclassError, match="`max_relative_distance`"):
        TranslutionForCausalLM.from_attention(source)
    with pytest.raises(ValueError, match="`layers` must be integers of at least 0 and less than 2, got 2"):
        TranslutionForCausalLM.from_attention(source, layers=[2], max_relative_distance=1)
    with pytest.raises(StrictDataclassError, match="`relative_projections`"):
        TranslutionForCausalLM.from_attention(source, "kk", max_relative_distance=1)
    for fields, message in (
        ({"mixer_types": "convolution"}, "`mixer_types` must be one of .* got 'convolution'"),
        ({"trunk_config": {"hidden_size": 8}}, "`trunk_config` must have the `model_type`"),
    ):
        fields = {"modality": "text", "trunk_config": source.config.to_dict(), **fields}
        with pytest.raises(StrictDataclassError, match=message):
            TranslutionConfig(**fields)
    with pytest.raises(ValueError, match="must be a LlamaForCausalLM, got a LlamaModel"):
        TranslutionForCausalLM.from_attention(source.model, max_relative_distance=1)
    images = make_source("vit")
    del images.vit.layers[1].attention.q_proj
    with pytest.raises(ValueError, match=r"'vit' must be made as in Transformers .* 'q_proj'"):
        TranslutionForImageClassification.from_attention(images)
    source.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="`device_map` must name one device"):
        TranslutionForCausalLM.from_attention(source, max_relative_distance=1)
    with pytest.raises(ValueError, match="revision"):
        TranslutionForCausalLM.from_attention(source, max_relative_distance=1, revision="main")


def warnings_of_size(caplog):
    return [record.getMessage() for record in caplog.records if record.name == from_attention.__name__]


@pytest.mark.parametrize("added", ["by the model", "by peft"])
def test_refuses_adapters_that_are_not_merged(added):
    source = make_source("llama")
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = None
    if added == "by the model":
        source.add_adapter(lora)
    else:
        adapted = get_peft_model(source, lora)
        with pytest.raises(ValueError, match=r"`model` must be .*got PeftModelForCausalLM: .*merge_and_unload"):
            TranslutionForCausalLM.from_attention(adapted, **DISTANCE)
    tokens = make_inputs(source, "llama")["input_ids"]
    expected = source(tokens).logits
    with pytest.raises(
        ValueError, match=r"no adapters of PEFT, got .*q_proj': merge them first, by `merge_and_unload"
    ):
        TranslutionForCausalLM.from_attention(source, **DISTANCE)
    assert_close_in_rounding(source(tokens).logits, expected)
    if adapted is not None:
        merged = TranslutionForCausalLM.from_attention(adapted.merge_and_unload(), **DISTANCE)
        assert_close_in_rounding(merged(tokens).logits, expected, roundings=1000)


@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)], ids=lambda model: type(model).__name__)
def test_refuses_what_is_no_model(model):
    allowed = r"`model` must be a name on the Hub, a folder, or a `PreTrainedModel` of Transformers, got "
    with pytest.raises(ValueError, match=allowed + type(model).__name__ + r"\."):
        TranslutionForCausalLM.from_attention(model, **DISTANCE)


REFUSED_ARGUMENTS = {
    "attn_implementation": ({"attn_implementation": "fast"}, r"`attn_implementation` must be one of .*got 'fast'"),
    "nothing to train": ({"layers": [], "freeze": "all_but_offsets"}, "`freeze_all_but_offsets` needs a layer"),
    "freeze": ({"freeze": "all"}, "`freeze` must be None or .*got 'all'"),
    "one layer": ({"layers": 1}, r"`layers` must be None or indices of layers, such as \[0, 1\], got 1"),
    "a tensor of one layer": ({"layers": torch.tensor(1)}, r"`layers` must be None or .*got tensor\(1\)"),
    "layers that are no integers": ({"layers": [1.0]}, "`layers` must be integers .*got 1.0"),
    "a mask of layers": ({"layers": torch.tensor([True, False])}, r"`layers` must be integers .*got tensor\(True\)"),
    "layers of a text": ({"layers": "01"}, "`layers` must be integers .*got '0'"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_a_source_works_after_a_refusal(case, tmp_path):
    fields, message = REFUSED_ARGUMENTS[case]
    source = make_source("gpt2")
    inputs = make_inputs(source, "gpt2")
    expected = source(**inputs).logits
    # A folder without weights: arguments are checked before they are read.
    source.config.save_pretrained(tmp_path)
    for model in (source, tmp_path):
        with pytest.raises(ValueError, match=message):
            TranslutionForCausalLM.from_attention(model, **{**DISTANCE, **fields})
    assert_close_in_rounding(source(**inputs).logits, expected)
    assert source.config._attn_implementation == "sdpa"


def test_no_layer_is_replaced_if_one_is_refused():
    source = make_source("vit")
    first, second = (layer.attention for layer in source.vit.layers)
    del second.q_proj
    with pytest.raises(ValueError, match="'q_proj'"):
        TranslutionForImageClassification.from_attention(source)
    assert source.vit.layers[0].attention is first


@pytest.mark.parametrize(
    "layers",
    [np.array([1]), torch.tensor([1]), [np.int64(1)], iter([1])],
    ids=["an array", "a tensor", "a list", "an iterator"],
)
def test_layers_are_any_integers(layers, tmp_path):
    converted = TranslutionForCausalLM.from_attention(make_source("llama"), layers=layers, **DISTANCE)
    assert converted.config.mixer_types == ["rope_attention", "rope_translution"]
    converted.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.mixer_types == converted.config.mixer_types


def test_refuses_weights_that_pytorch_quantised():
    for model_type, name in (("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "lm_head")):
        source = make_source(model_type, torch.float32)
        with warnings.catch_warnings():
            # `torch.ao.quantization` says that it is deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            quantised = torch.ao.quantization.quantize_dynamic(source, {nn.Linear})
        inputs = make_inputs(source, model_type)
        expected = quantised(**inputs).logits
        with pytest.raises(ValueError, match=rf"no quantised weights, .*quantized.*Linear at '{name}'"):
            TranslutionForCausalLM.from_attention(quantised, **DISTANCE)
        assert_close_in_rounding(quantised(**inputs).logits, expected)


def test_warns_of_a_large_model_before_weights_are_read(tmp_path, caplog):
    """GPT-2 as it is: 124 million parameters, and a matrix and a bias of keys and values for each of 1024 offsets."""
    config = AutoConfig.for_model("gpt2")
    config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        TranslutionForCausalLM.from_attention(tmp_path)
    parameters = 124_439_808
    new = parameters + 12 * 2 * 1023 * (768 * 768 + 768)
    (message,) = warnings_of_size(caplog)
    for word in (f"{new:,} parameters", f"its source {parameters:,}", "`max_relative_distance` None", "1,024 offsets"):
        assert word in message


def test_warns_once_of_a_large_model(tmp_path, caplog, monkeypatch):
    source = make_source("gpt2", torch.float32)
    source.save_pretrained(tmp_path)
    TranslutionForCausalLM.from_attention(tmp_path, **DISTANCE)
    assert not warnings_of_size(caplog)
    TranslutionForCausalLM.from_attention(tmp_path)
    assert len(warnings_of_size(caplog)) == 1
    expected = sum(parameter.numel() for parameter in source.parameters())
    converted = TranslutionForCausalLM.from_attention(copy.deepcopy(source))
    large = sum(parameter.numel() for parameter in converted.parameters())
    assert large > 4 * expected
    assert f"{large:,} parameters, and its source {expected:,}" in warnings_of_size(caplog)[1]

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(from_attention, "replace_attention", no_memory)
    with pytest.raises(MemoryError):
        TranslutionForCausalLM.from_attention(source)
    assert len(warnings_of_size(caplog)) == 3

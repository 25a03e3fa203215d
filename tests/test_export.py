"""Exported and compiled models: plain operations, symbolic sizes, and nothing of a trace left behind."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import logging
import pkgutil
from dataclasses import is_dataclass
from functools import _lru_cache_wrapper, lru_cache
from typing import Any

import pytest
import torch
from closeness import assert_close_in_rounding
from torch import Tensor
from torch.export import Dim
from transformers import AutoModel, StaticCache

import translution.modeling
from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification, TranslutionModel
from translution.configuration.configuration_translution import MIXER_TYPES
from translution.modeling.operators import exporting, gathered, reference
from translution.modeling.operators.pair_layout import PairLayout, StepLayout


TINY = {"num_attention_heads": 2, "head_dim": 4, "intermediate_size": 8, "hidden_size": 8}
SIZES = {
    "image": {"image_size": [4, 6], "patch_size": 2, "num_labels": 3},
    "text": {"vocab_size": 11, "max_position_embeddings": 12, "use_cache": False},
}
CLASSES = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
# Every mixer, and every form of Translution, in few models: an export costs more for each model than for each layer.
FORMS: dict[str, dict[str, Any]] = {
    "mixers": {"mixer_types": [name for name in MIXER_TYPES if name != "rope_translution"]},
    "full": {"relative_projections": "qkv"},
    "absolute": {"relative_projections": "q", "use_absolute_position_embeddings": True},
    "lor": {"mixer_types": "rope_translution", "relative_rank": 2, "relative_projections": "qkv"},
    "basis": {"offset_basis": 2, "relative_projections": "qkv"},
    "distance": {"max_relative_distance": 2, "relative_projections": "kv"},
    "local": {"max_relative_distance": 1, "far_offsets": "shared", "relative_projections": "qkv"},
    "local-rotary": {
        "mixer_types": "rope_translution",
        "max_relative_distance": 1,
        "far_offsets": "shared",
        "relative_projections": "kv",
    },
    "distance-lor-basis": {"max_relative_distance": 1, "relative_rank": 2, "offset_basis": 2},
}
FAR = ["distance", "distance-lor-basis", "local-rotary"]
# Sums of float32 in another order: some tens of units of rounding of logits of about 1.
BOUNDS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


each_modality = pytest.mark.parametrize("modality", SIZES)


def make_model(modality: str, **fields: Any) -> TranslutionForCausalLM | TranslutionForImageClassification:
    mixers = fields.get("mixer_types")
    layers = len(mixers) if isinstance(mixers, list) else 1
    fields = {"modality": modality, "num_hidden_layers": layers, **TINY, **SIZES[modality], **fields}
    config = TranslutionConfig(**fields)
    return CLASSES[modality](config).eval()


def make_inputs(modality: str, batch: int = 3, length: int = 7, masked: bool = False) -> dict[str, Tensor]:
    if modality == "image":
        return {"pixel_values": torch.randn(batch, 3, 4, 6)}
    inputs = {"input_ids": torch.randint(11, (batch, length))}
    if masked:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        inputs["attention_mask"][0, :2] = 0
    return inputs


def dynamic(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    return {name: {0: Dim.DYNAMIC} if name == "pixel_values" else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}


@torch.no_grad()
def reference_logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the readable path."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(**inputs).logits
    model.set_attn_implementation(before)
    return logits


# What serves


LAYOUTS = {
    "image": PairLayout.for_image(2, 3, 2, 3),
    "image-distance": PairLayout.for_image(3, 4, 3, 4, 1),
    "image-shared": PairLayout.for_image(3, 4, 3, 4, 1, share_far=True),
    "text": PairLayout.for_text(5, 8),
    "text-distance": PairLayout.for_text(7, 7, 2),
    "text-past": PairLayout.for_text(6, 8, past=4),
    "text-near": PairLayout.for_text(7, 7, 3).near(2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gathered_pairs_equal_the_reference(layout):
    rows, tokens, queries = layout.num_offsets, layout.num_tokens, layout.num_queries

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    plain, inputs, banks = double(2, tokens, 8), double(2, tokens, 5), [double(rows, 5, 8) for _ in range(2)]
    for query_bank, key_bank in ((None, banks[1]), (banks[0], None), banks):
        query = (plain if query_bank is None else inputs)[:, tokens - queries :]
        arguments = (query, plain if key_bank is None else inputs, query_bank, key_bank, 2, layout)
        found, expected = (way.pair_scores(*arguments) for way in (gathered, reference))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        # Rotations of a token are those of all rows of a batch, or of each.
        for shape in ((tokens, 4), (2, 1, tokens, 4)) if layout.band is None else ():
            rotation = (double(*shape), double(*shape))
            found, expected = (way.pair_scores(*arguments, rotation) for way in (gathered, reference))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    arguments = (double(2, 2, queries, tokens), inputs, banks[0], layout)
    found, expected = (way.pair_values(*arguments) for way in (gathered, reference))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", [None, 2])
def test_new_tokens_at_a_position_in_a_tensor(distance):
    """As with a position that is known, for the slots that are filled; the others have no pairs."""
    expected = PairLayout.for_text(6, 9, distance, past=3)
    layout = StepLayout(torch.tensor(3), 8, expected.bank_height, expected.clamp, num_queries=3)
    found, rows = layout.offsets(torch.device("cpu"))[0], expected.offsets()[0]
    assert torch.equal(found[:, :6], rows)
    assert (found[:, 6:] == -1).all()
    if distance is not None:
        assert layout.near(1) == expected.near(1)


# Export


@pytest.mark.parametrize("form", FORMS)
@each_modality
def test_export_serves_other_sizes(modality, form):
    model, inputs = make_model(modality, **FORMS[form]), make_inputs(modality)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic(inputs), strict=False)
    assert "translution" not in program.graph_module.code
    other = make_inputs(modality, batch=2, length=11)
    torch.testing.assert_close(program.module()(**other).logits, reference_logits(model, other), **BOUNDS)


@each_modality
def test_export_of_the_reference_and_with_a_mask(modality):
    model = make_model(modality, **FORMS["mixers"])
    model.set_attn_implementation("eager")
    inputs = make_inputs(modality, masked=True)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic(inputs), strict=False)
    other = make_inputs(modality, batch=2, length=10, masked=True)
    torch.testing.assert_close(program.module()(**other).logits, reference_logits(model, other), **BOUNDS)


@each_modality
def test_strict_export(modality):
    model, inputs = make_model(modality, relative_projections="qkv"), make_inputs(modality)
    program = torch.export.export(model, (), inputs, strict=True)
    assert "translution" not in program.graph_module.code
    torch.testing.assert_close(program.module()(**inputs).logits, reference_logits(model, inputs), **BOUNDS)


def test_export_says_what_it_does(caplog, monkeypatch):
    model, inputs = make_model("image"), make_inputs("image")
    type(exporting.logger).info_once.cache_clear()
    monkeypatch.setattr(exporting.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger=exporting.logger.name):
        for _ in range(2):
            torch.export.export(model, (), inputs, strict=False)
    assert [
        record.getMessage().split(":")[0] for record in caplog.records if record.name == exporting.logger.name
    ] == [
        "Translution is exported as plain operations of PyTorch, which every runtime knows; its own operators, which need less "
        "memory, are left out."
    ]


# An export to ONNX takes seconds whatever its size: all mixers in one, LoR's banks, and full banks with far pairs in another.
ONNX_FORMS: dict[str, dict[str, Any]] = {
    "every-mixer": {"mixer_types": list(MIXER_TYPES), "relative_rank": 2, "relative_projections": "qkv"},
    "full": {"relative_projections": "qkv", "max_relative_distance": 1},
}


@pytest.mark.parametrize("form", ONNX_FORMS)
@each_modality
def test_onnx(modality, form):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install translution[onnx]")
    model = make_model(modality, **ONNX_FORMS[form])
    inputs = make_inputs(modality, masked=form == "every-mixer")
    program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=dynamic(inputs), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    other = make_inputs(modality, batch=2, length=11, masked=form == "every-mixer")
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})
    torch.testing.assert_close(torch.from_numpy(logits), reference_logits(model, other), **BOUNDS)


# What a trace leaves behind


def remembering() -> dict[str, Any]:
    """The functions of the models that keep what they returned, by name."""
    found = {}
    for module in pkgutil.walk_packages(translution.modeling.__path__, "translution.modeling."):
        # What a kernel is launched with is made from tensors that exist, and importing it needs Triton.
        if ".kernels" not in module.name and ".triton_" not in module.name:
            names = vars(importlib.import_module(module.name))
            found |= {f"{module.name}.{name}": f for name, f in names.items() if isinstance(f, _lru_cache_wrapper)}
    return found


def holds_tensor(value: Any) -> bool:
    if isinstance(value, _lru_cache_wrapper):
        return any(holds_tensor(kept) for kept in gc.get_referents(value) if not callable(kept))
    if isinstance(value, dict):
        return any(holds_tensor(part) for pair in value.items() for part in pair)
    if isinstance(value, tuple | list):
        return any(holds_tensor(part) for part in value)
    if is_dataclass(value):
        return holds_tensor(vars(value))
    return isinstance(value, Tensor | torch.SymInt)


def test_nothing_of_a_trace_is_kept():
    few, pixels = {"image_size": [8, 2]}, {"pixel_values": torch.randn(2, 3, 8, 2)}
    learned = ["translution", "relative_bias_attention", "relative_vector_attention"]
    for model, inputs, implementation in (
        (make_model("image", mixer_types=learned, **few), pixels, "auto"),
        (make_model("image", **FORMS["basis"], **few), pixels, "auto"),
        (make_model("image", **few), pixels, "eager"),
        (make_model("text", mixer_types=learned), make_inputs("text", length=9), "auto"),
    ):
        model.set_attn_implementation(implementation)
        torch.export.export(model, (), inputs, strict=False)
        # The first call that is not traced.
        logits = model(**inputs).logits
        assert type(logits) is Tensor
        torch.testing.assert_close(logits, reference_logits(model, inputs), **BOUNDS)
        torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits.sum().backward()
    functions = remembering()
    assert any(function.cache_info().currsize for function in functions.values())
    assert [name for name, function in functions.items() if holds_tensor(function)] == []


def test_a_kept_tensor_would_be_found():
    kept = lru_cache(lambda size: ({"rows": [torch.zeros(size)]},))
    assert not holds_tensor(kept)
    kept(3)
    assert holds_tensor(kept)


# Compile


@pytest.mark.parametrize("form", ["full", "basis", "distance", "local-rotary"])
def test_one_graph_for_every_length(form):
    model = make_model("text", **FORMS[form])
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 7), (2, 11), (4, 5)):
        inputs = make_inputs("text", batch, length)
        torch.testing.assert_close(compiled(**inputs).logits, reference_logits(model, inputs), **BOUNDS)


@pytest.mark.parametrize(
    "fields",
    [{"mixer_types": ["rope_attention", "acmix"]}, FORMS["full"], *(FORMS[name] for name in FAR)],
    ids=["attention", "full", *FAR],
)
def test_several_tokens_into_a_static_cache(fields):
    """A graph cannot look at the cache's position, and so serves them all."""
    model = make_model("text", **fields)
    inputs = make_inputs("text", length=10)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache, found = StaticCache(config=model.config, max_cache_len=12), []
    with torch.no_grad():
        for ids in inputs["input_ids"].split(5, dim=1):
            found.append(compiled(ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), reference_logits(model, inputs), **BOUNDS)


# The first argument of a trunk, and quantised models


def test_the_first_argument_is_the_main_input(tmp_path):
    pixels, ids = make_inputs("image")["pixel_values"], make_inputs("text")["input_ids"]
    for modality, first in (("image", pixels), ("text", ids)):
        make_model(modality).save_pretrained(tmp_path / modality)
        model = AutoModel.from_pretrained(tmp_path / modality)
        by_name = model(**{model.main_input_name: first}).last_hidden_state
        assert_close_in_rounding(model(first).last_hidden_state, by_name)
    model = AutoModel.from_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="`input_ids` does not go with `modality` 'image'"):
        model(input_ids=ids)
    with pytest.raises(TypeError, match="`pixel_values` must be given once"):
        model(pixels, pixel_values=pixels)
    assert list(inspect.signature(TranslutionModel.forward).parameters)[1] == "input_ids"


@each_modality
def test_dynamic_quantization(modality):
    model, inputs = make_model(modality), make_inputs(modality)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    assert isinstance(quantized.model.layers[0].mlp.fc1, torch.ao.nn.quantized.dynamic.Linear)
    # Linears with 8 bits: three of them in a row, each some thousandths off.
    expected = reference_logits(model, inputs)
    assert (quantized(**inputs).logits - expected).norm() < 0.05 * expected.norm()

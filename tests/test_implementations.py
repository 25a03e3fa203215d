"""The implementations that users choose between: equal to one another, compiled, and by name."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import (
    assert_rejected,
    assert_same,
    each_modality,
    each_variant,
    gradients,
    make_config,
    make_inputs,
    make_model,
)
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from translution.modeling.models import modeling_translution
from translution.modeling.operators import pair_layout, registration
from translution.modeling.operators.pair_autograd import pack


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
@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("attention", "all layers run PyTorch's `scaled_dot_product_attention`"),
        ("full-kv", "layers of translution run operators of their own."),
        ("hybrid-full", "layers of rope_translution, translution run operators of their own, the others PyTorch's"),
    ],
)
def test_implementations_of_transformers(tmp_path, caplog, name, variant, words):
    """Harnesses pass them to every model; what runs is the default, and a warning says so once."""
    logging.enable_propagation()
    modeling_translution.logger.warning_once.cache_clear()
    model = make_model("text", variant)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name, dtype=torch.float64)
    assert loaded.config._attn_implementation == "auto"
    assert name in caplog.text
    assert words in caplog.text
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
        "pair_values": (pairs, tensor(2, tokens, 5), tensor(layout.num_offsets, 5, 6), 1, packed),
    }[operator]
    torch.library.opcheck(registration.operator(operator).default, arguments)

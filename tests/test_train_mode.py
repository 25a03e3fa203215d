"""What differs in training: gradient checkpointing, frozen weights, dropout."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import (
    assert_same,
    each_implementation,
    each_modality,
    few_variants,
    gradients,
    make_inputs,
    make_model,
)


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

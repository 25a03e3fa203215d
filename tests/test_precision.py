"""Half precision and autocast against float32."""

import pytest
import torch
from small_models import assert_same, each_implementation, each_modality, each_variant, make_inputs, make_model


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

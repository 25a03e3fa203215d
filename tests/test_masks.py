"""What masks mean, whatever the mixer: which pairs count, and that nothing else does."""

import math

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import (
    assert_rejected,
    assert_same,
    each_implementation,
    each_modality,
    each_variant,
    gradients,
    make_config,
    make_inputs,
    make_model,
    num_tokens,
)
from torch.nn import functional as F
from transformers import DynamicCache

from translution.modeling.mixers.masks import check_mask, find_packed_texts, make_mask
from translution.modeling.operators import pair_layout


def masks_by_hand(mask, batch, heads, tokens, causal):
    """Whether query `i` may use key `j`, and what is added to its score, one pair at a time."""
    visible = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    bias = torch.zeros(visible.shape, dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            for i in range(tokens):
                for j in range(i + 1 if causal else tokens):
                    if mask.ndim == 2:
                        visible[b, head, i, j] = bool(mask[b, j])
                        continue
                    place = [index if size > 1 else 0 for index, size in zip((b, head, i, j), mask.shape, strict=True)]
                    value = mask[tuple(place)]
                    visible[b, head, i, j] = value if mask.dtype == torch.bool else value > -1e3
                    bias[b, head, i, j] = 0 if mask.dtype == torch.bool else value
    return visible, bias


def some_masks(batch, heads, tokens):
    """Masks of every shape, some rows of which hide everything."""
    generator = torch.Generator().manual_seed(3)
    masks = {"tokens": torch.randint(2, (batch, tokens), generator=generator)}
    masks["tokens"][0, :2] = 0
    for shape in (
        (batch, heads, tokens, tokens),
        (1, heads, tokens, tokens),
        (batch, 1, tokens, 1),
        (1, 1, 1, tokens),
        (1, 1, tokens, 1),
        (batch, heads, 1, 1),
    ):
        masks["bool" + str(shape)] = torch.rand(shape, generator=generator) < 0.6
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        for hidden in (-math.inf, -1e4, torch.finfo(torch.float64).min):
            masks[f"{hidden}{shape}"] = bias.masked_fill(torch.rand(shape, generator=generator) < 0.4, hidden)
    return masks


@each_modality
@pytest.mark.parametrize("name", list(some_masks(2, 3, 7)))
def test_masks_mean_what_a_loop_says(modality, name):
    mask = some_masks(2, 3, 7)[name]
    layout = pair_layout.bank_layout(make_config(modality, max_position_embeddings=7))
    assert layout.num_tokens == 7
    check_mask(mask, 2, 3, layout, 7)
    made = make_mask(mask, layout, torch.zeros(2, 7, 1, dtype=torch.float64))
    visible, bias = masks_by_hand(mask, 2, 3, 7, modality == "text")
    assert torch.equal(made.visible.expand_as(visible), visible)
    alone = torch.eye(7, dtype=torch.bool) & ~visible.any(-1, keepdim=True)
    expected = bias.masked_fill(~visible, torch.finfo(torch.float64).min).masked_fill(alone, 0)
    assert torch.equal(made.additive.expand_as(expected), expected)
    assert (made.tokens is not None) == (mask.ndim == 2)


@each_variant
@each_implementation
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 6, 1), torch.bool), ((2, 1, 1, 1), torch.float64)])
def test_a_mask_that_broadcasts_over_keys_stays_causal(variant, implementation, shape, dtype):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config, length=6)["input_ids"]
    mask = torch.ones(shape, dtype=torch.bool) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
    with torch.no_grad():
        assert_same(model(ids, attention_mask=mask).logits, model(ids).logits)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 19
        assert_same(model(changed, attention_mask=mask).logits[:, :-1], model(ids).logits[:, :-1], 1e-12)


@each_modality
def test_heads_of_a_mask_are_checked(modality):
    model = make_model(modality, num_attention_heads=3)
    tokens = num_tokens(model.config)
    mask = torch.ones(2, 2, tokens, tokens, dtype=torch.bool)
    words = ("`attention_mask`", f"[2, 3, {tokens}, {tokens}]", f"got shape [2, 2, {tokens}, {tokens}]")
    assert_rejected(words, model, **make_inputs(model.config), attention_mask=mask)
    by_head = torch.ones(2, 3, tokens, tokens, dtype=torch.bool)
    assert_same(
        model(**make_inputs(model.config), attention_mask=by_head[:, :1]).logits.isfinite().double(),
        torch.ones(model(**make_inputs(model.config)).logits.shape, dtype=torch.float64),
    )


@each_modality
@each_variant
@pytest.mark.parametrize("kind", ["tokens", "-1e9"])
def test_gradients_of_queries_that_see_nothing(modality, variant, kind):
    """The log-sum-exp of a row of equal lowest numbers loses the logarithm of their count, and gradients with it."""
    model = make_model(modality, variant, torch.float32)
    inputs = make_inputs(model.config)
    tokens = num_tokens(model.config)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0] = 0
    if kind != "tokens":
        square = mask.bool()[:, None, None].expand(-1, 1, tokens, -1)
        mask = torch.zeros(square.shape).masked_fill(~square, -1e9)
    found = gradients(model, {**inputs, "attention_mask": mask})
    exact = make_model(modality, variant)
    exact.load_state_dict(model.state_dict())
    exact.set_attn_implementation("eager")
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    expected = gradients(exact, {**wide, "attention_mask": mask.double() if mask.is_floating_point() else mask})
    # Single precision: a few hundred roundings of the largest gradient.
    assert_same({name: value.double() for name, value in found.items()}, expected, 1e-4)


@each_modality
@each_variant
@pytest.mark.parametrize("value", [2, 255, -1, math.nan])
def test_any_number_but_zero_shows_a_token(modality, variant, value):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    mask = torch.ones(2, num_tokens(model.config))
    mask[0, :2], mask[1, 3] = 0, 0
    expected = model(**inputs, attention_mask=mask.long()).logits
    assert_same(model(**inputs, attention_mask=mask.masked_fill(mask == 1, value)).logits, expected)


@pytest.mark.parametrize("variant", ["full-kv", "attention", "convolution", "acmix"])
def test_a_trace_holds_for_other_masks(variant):
    """Whether a mask hides anything is no constant of a trace, though it may be looked at otherwise."""
    model = make_model("text", variant, use_cache=False).requires_grad_(False)
    ids = make_inputs(model.config)["input_ids"]

    def run(ids, mask):
        return model(ids, attention_mask=mask).logits

    traced = torch.jit.trace(run, (ids, torch.ones_like(ids)), check_trace=False)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    assert_same(traced(ids, mask), run(ids, mask))


@each_variant
@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padded_text_does_not_depend_on_the_cache(variant, side):
    model = make_model("text", variant)
    ids = make_inputs(model.config)["input_ids"]
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :3] = 0
    elif side == "right":
        mask[0, -3:] = 0
    else:
        mask[0, 2] = 0
    with torch.no_grad():
        cached = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        plain = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    assert cached.past_key_values is not None
    assert plain.past_key_values is None
    assert_same(cached.logits, plain.logits)
    assert_same(cached.loss, plain.loss)


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


# Packed texts

PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])


@each_variant
@each_implementation
def test_packed_texts_are_apart_in_evaluation_too(variant, implementation):
    model = make_model("text", variant)
    model.set_attn_implementation(implementation)
    ids = make_inputs(model.config)["input_ids"]
    with torch.no_grad():
        packed = model(ids, position_ids=PACKED)
        assert packed.past_key_values is None
        assert_same(packed.logits[:1, :3], model(ids[:1, :3]).logits)
        assert_same(packed.logits[:1, 3:], model(ids[:1, 3:]).logits)
        assert_same(packed.logits[1:], model(ids[1:]).logits)
        assert_same(model.train()(ids, position_ids=PACKED).logits, packed.logits)


@each_variant
def test_packed_texts_do_not_see_each_other(variant):
    model = make_model("text", variant).train()
    ids = make_inputs(model.config)["input_ids"]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    packed = model(ids, position_ids=position_ids).logits
    assert_same(packed[:, :3], model(ids[:, :3]).logits, 1e-10)
    assert_same(packed[:, 3:], model(ids[:, 3:]).logits, 1e-10)


@each_variant
@each_implementation
def test_packed_texts_may_be_longer_together_than_the_bank(variant, implementation):
    model = make_model("text", variant, max_position_embeddings=8)
    model.set_attn_implementation(implementation)
    ids = torch.randint(19, (1, 14))
    position_ids = torch.cat((torch.arange(6), torch.arange(8)))[None]
    logits = model(ids, position_ids=position_ids).logits
    assert_same(logits[:, :6], model(ids[:, :6]).logits)
    assert_same(logits[:, 6:], model(ids[:, 6:]).logits)
    model.zero_grad()
    logits.square().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sum(model(ids[:, part]).logits.square().sum() for part in (slice(6), slice(6, None))).backward()
    assert_same(packed, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_a_packed_text_must_fit_the_bank_by_itself():
    model = make_model("text", max_position_embeddings=8)
    position_ids = torch.cat((torch.arange(3), torch.arange(9)))[None]
    words = ("`max_position_embeddings` 8", "got 9")
    assert_rejected(words, model, torch.randint(19, (1, 12)), position_ids=position_ids)


def test_packed_texts_cannot_be_continued():
    model = make_model("text")
    cache = DynamicCache(config=model.config)
    words = ("`position_ids`", "`past_key_values` must be None")
    assert_rejected(words, model, torch.randint(19, (2, 7)), position_ids=PACKED, past_key_values=cache)


def test_find_packed_texts():
    assert find_packed_texts(PACKED[1:]) is None
    assert find_packed_texts(PACKED[1:] + 5) is None
    texts, longest = find_packed_texts(PACKED)
    assert (texts[0].tolist(), longest) == ([0, 0, 0, 1, 1, 1, 1], 7)
    texts, longest = find_packed_texts(F.pad(PACKED[:1], (0, 2)))
    assert (texts[0].tolist(), longest) == ([0, 0, 0, 1, 1, 1, 1, 2, 3], 4)

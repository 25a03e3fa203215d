"""Text models: causality and padding, embeddings and head, generation."""

import math

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import (
    assert_rejected,
    assert_same,
    each_implementation,
    each_variant,
    few_variants,
    greedy,
    make_inputs,
    make_model,
)
from torch.nn import functional as F

from translution import TranslutionForCausalLM


# Causality and padding


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


# Embeddings and head


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


# Generation


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

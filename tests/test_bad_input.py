"""Bad input: each error names the field, the value and what is allowed."""

import pytest
import torch
from small_models import AUTO, HEADS, assert_rejected, each_modality, make_config, make_inputs, make_model
from transformers import DynamicCache, GPT2Config


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
        (torch.zeros(2, 1, 3), ("`labels`", "[2, 3]", "got shape [2, 1, 3]")),
        (torch.zeros(3, 2), ("`labels`", "[2, 3]", "got shape [3, 2]")),
        (torch.zeros(2, dtype=torch.int32), ("`labels`", "int64 [batch] [2]", "torch.int32")),
    ],
    "text": [
        (torch.full((2, 7), 19), ("`labels`", "`vocab_size` 19", "got 19")),
        (torch.full((2, 7), -1), ("`labels`", "`vocab_size` 19", "-100", "got -1")),
        (torch.zeros(2, 6, dtype=torch.long), ("`labels`", "[2, 7]", "got shape [2, 6]")),
        (torch.zeros(2, 7), ("`labels`", "[2, 7]", "torch.float32")),
    ],
}


@pytest.mark.parametrize(
    ("modality", "case"), [(modality, case) for modality in LABELS for case in range(len(LABELS[modality]))]
)
def test_bad_labels(modality, case):
    labels, words = LABELS[modality][case]
    model = make_model(modality)
    assert_rejected(words, model, **make_inputs(model.config), labels=labels)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("labels", [torch.zeros(2, 1, 3), torch.zeros(6), torch.zeros(2, 3, dtype=torch.long)])
def test_bad_labels_of_several_numbers(problem_type, labels):
    model = make_model("image")
    model.config.problem_type = problem_type
    words = ("`labels`", "floats", "[2, 3]", f"got shape {list(labels.shape)} and {labels.dtype}")
    assert_rejected(words, model, **make_inputs(model.config), labels=labels)


@pytest.mark.parametrize(
    "kept", [-1, 8, True, None, 1.5, torch.tensor([7]), torch.tensor([-8]), torch.ones(7).bool(), torch.tensor([[1]])]
)
def test_bad_logits_to_keep(kept):
    model = make_model("text")
    assert_rejected(("`logits_to_keep`", "7", "got"), model, **make_inputs(model.config), logits_to_keep=kept)


def test_what_is_named_is_what_was_given():
    model = make_model("text")
    kept = torch.tensor([-7, -9])
    assert_rejected(("at least -7", "got -9"), model, **make_inputs(model.config), logits_to_keep=kept)
    ids = make_inputs(model.config)["input_ids"]
    for dtype in (torch.float32, torch.bool):
        assert_rejected(("`input_ids`", "integers", str(dtype)), model, input_ids=ids.to(dtype))


@pytest.mark.parametrize(
    "position_ids", [torch.arange(7), torch.zeros(1, 1, 7).long(), torch.zeros(2, 7), torch.zeros(2, 7).bool()]
)
def test_bad_position_ids_rank(position_ids):
    model = make_model("text", "rope")
    words = ("`position_ids`", "[2, 7]", f"got shape {list(position_ids.shape)}")
    assert_rejected(words, model, **make_inputs(model.config), position_ids=position_ids)


def test_bad_inputs_embeds_type():
    words = ("`inputs_embeds`", "floats", "torch.int64")
    assert_rejected(words, make_model("text"), inputs_embeds=torch.zeros(2, 7, 12, dtype=torch.long))


def test_bad_position_ids():
    model = make_model("text", "rope")
    words = ("`position_ids`", "[2, 7]", "got shape [1, 2]")
    assert_rejected(words, model, **make_inputs(model.config), position_ids=torch.tensor([[0, 1]]))

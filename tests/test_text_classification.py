"""Heads that classify texts, or each of their tokens."""

import pytest
import torch
from closeness import assert_close_in_rounding
from small_models import assert_rejected, assert_same, few_variants, make_config, make_model, make_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from translution import (
    TranslutionForCausalLM,
    TranslutionForSequenceClassification,
    TranslutionForTokenClassification,
)


HEADS = {"sequence": TranslutionForSequenceClassification, "token": TranslutionForTokenClassification}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
NEW = {"sequence": {"score.weight"}, "token": {"score.weight", "score.bias"}}
LENGTHS = [7, 4, 1]
PAD = 0

each_head = pytest.mark.parametrize("head", HEADS)
each_side = pytest.mark.parametrize("side", ["left", "right"])


def make_head(head, variant="full-kv", dtype=torch.float64, **fields):
    config = make_config("text", variant, **{"pad_token_id": PAD, **fields})
    return HEADS[head](config).to(dtype).eval()


def make_texts():
    return [torch.randint(1, 19, (length,)) for length in LENGTHS]


def pad(texts, side):
    """Ids and mask of a batch."""
    ids = torch.full((len(texts), max(LENGTHS)), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(len(text)) if side == "right" else slice(-len(text), None)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


# Logits


@few_variants
@each_side
def test_sequence_logits(variant, side):
    model = make_head("sequence", variant)
    texts = make_texts()
    ids, mask = pad(texts, side)
    last = torch.cat([model.model(text[None]).last_hidden_state[:, -1] for text in texts])
    logits = model(ids, attention_mask=mask).logits
    assert_close_in_rounding(logits, last @ model.score.weight.T)
    assert_close_in_rounding(logits, torch.cat([model(text[None]).logits for text in texts]))


@few_variants
@each_side
def test_token_logits(variant, side):
    model = make_head("token", variant)
    texts = make_texts()
    ids, mask = pad(texts, side)
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (3, 7, 3)
    expected = torch.cat([model.model(text[None]).last_hidden_state[0] for text in texts])
    expected = expected @ model.score.weight.T + model.score.bias
    order = mask.bool()
    assert_close_in_rounding(logits[order], expected)


@each_side
def test_the_mask_says_what_is_padding(side):
    """Not the pad token, which may end a text as well, and which embeddings do not have."""
    texts = [torch.cat((text[:-1], torch.tensor([PAD]))) for text in make_texts()]
    ids, mask = pad(texts, side)
    model = make_head("sequence")
    expected = torch.cat([model(text[None], attention_mask=torch.ones(1, len(text))).logits for text in texts])
    last = model.model(texts[0][None]).last_hidden_state[:, -1]
    assert_close_in_rounding(expected[:1], last @ model.score.weight.T)
    embedded = model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embedded}):
        for kind in (mask, mask.bool(), mask.float()):
            assert_close_in_rounding(model(**inputs, attention_mask=kind).logits, expected)
    model.config.pad_token_id = None
    assert_close_in_rounding(model(ids, attention_mask=mask).logits, expected)


def test_without_a_mask():
    """Padding on the right is not seen by the tokens before it; the pad token tells it."""
    model = make_head("sequence")
    texts = make_texts()
    ids, mask = pad(texts, "right")
    expected = model(ids, attention_mask=mask).logits
    assert_close_in_rounding(model(ids).logits, expected)
    # A mask of pairs does not say which tokens are padding.
    pairs = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    assert_close_in_rounding(model(ids, attention_mask=pairs).logits, expected)
    embedded = model.get_input_embeddings()(texts[0][None])
    assert_close_in_rounding(model(inputs_embeds=embedded).logits, expected[:1])
    model.config.pad_token_id = None
    assert_close_in_rounding(model(texts[0][None]).logits, expected[:1])
    assert_rejected(("`attention_mask`", "`pad_token_id`", "3 texts", "got neither"), model, ids)
    assert model(ids[:0]).logits.shape == (0, 3)


@each_side
def test_continues_a_cache(side):
    model = make_head("sequence", "hybrid-full")
    ids, mask = pad(make_texts(), side)
    whole = model(ids, attention_mask=mask)
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    rest = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    ends_later = mask[:, 4:].any(dim=1)
    assert ends_later.any()
    assert_close_in_rounding(rest.logits[ends_later], whole.logits[ends_later])


def test_llama_with_the_same_weights(tmp_path):
    """A converted model gives the logits of Transformers' own classifier."""
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=19, max_position_embeddings=16, num_labels=3, pad_token_id=PAD,
    )  # fmt: skip
    reference = LlamaForSequenceClassification(config).double().eval()
    source = LlamaForCausalLM(config).double()
    source.model.load_state_dict(reference.model.state_dict())
    TranslutionForCausalLM.from_attention(source, max_relative_distance=2).save_pretrained(tmp_path)
    model = TranslutionForSequenceClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.float64).eval()
    model.score.load_state_dict(reference.score.state_dict())
    for side in ("left", "right"):
        ids, mask = pad(make_texts(), side)
        logits = reference(ids, attention_mask=mask).logits
        # Transformers' rotary positions are computed in float32.
        assert_close_in_rounding(model(ids, attention_mask=mask).logits, logits, 64, torch.float32)


# Losses and training


def test_sequence_losses():
    ids, mask = pad(make_texts(), "right")
    model = make_head("sequence")
    labels = torch.tensor([2, 0, -100])
    output = model(ids, attention_mask=mask, labels=labels)
    assert_same(output.loss, F.cross_entropy(output.logits[:2], labels[:2]))
    model = make_head("sequence", num_labels=1)
    labels = torch.randn(3, dtype=torch.float64)
    output = model(ids, attention_mask=mask, labels=labels)
    assert_same(output.loss, (output.logits[:, 0] - labels).square().mean())
    model = make_head("sequence", problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    output = model(ids, attention_mask=mask, labels=labels)
    assert_same(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


def test_token_loss():
    ids, mask = pad(make_texts(), "right")
    model = make_head("token", dtype=torch.float32)
    labels = torch.randint(3, ids.shape).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    terms = [
        -output.logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(3) for t in range(7) if mask[b, t].item()
    ]
    assert len(terms) == sum(LENGTHS)
    assert_same(output.loss, torch.stack(terms).mean(), 1e-6)


def test_dropout_before_the_head_of_tokens():
    assert make_head("token").dropout.p == 0
    assert make_head("token", hidden_dropout_prob=0.25).dropout.p == 0.25
    assert make_head("token", hidden_dropout_prob=0.25, classifier_dropout=0.0).dropout.p == 0
    model = make_head("token", classifier_dropout=0.5)
    ids, _ = pad(make_texts(), "right")
    hidden = model.model(ids).last_hidden_state
    seen = []
    model.score.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(ids)
    kept = seen[0] != 0
    assert 0 < kept.sum() < kept.numel()
    assert_close_in_rounding(seen[0][kept], 2 * hidden[kept])


def test_a_token_head_fills_no_cache():
    model = make_head("token")
    seen = []
    model.model.register_forward_hook(lambda _, args, kwargs, output: seen.append(output), with_kwargs=True)
    model(make_texts()[0][None])
    assert seen[0].past_key_values is None


@each_head
def test_gradient_checkpointing(head):
    model = make_head(head, "hybrid-full").train()
    ids, mask = pad(make_texts(), "left")
    labels = torch.tensor([0, 1, 2]) if head == "sequence" else torch.randint(3, ids.shape)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.model.layers[0].gradient_checkpointing
    assert_same(gradients[1], gradients[0])


@each_head
def test_accumulated_gradients_are_those_of_a_large_batch(head, tmp_path):
    start = make_head(head, dtype=torch.float32, hidden_dropout_prob=0.0)
    data = [
        {"input_ids": torch.randint(1, 19, (5,)), "attention_mask": torch.ones(5, dtype=torch.long)} for _ in range(4)
    ]
    for i, example in enumerate(data):
        example["labels"] = torch.tensor(i % 3) if head == "sequence" else torch.randint(3, (5,))
    changes = []
    for batch in (4, 1):
        model = make_head(head, dtype=torch.float32)
        model.load_state_dict(start.state_dict())
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        changes.append({name: p.detach() - start.get_parameter(name).detach() for name, p in model.named_parameters()})
    # A sum of four means instead of one mean of four differs by rounding in float32.
    assert_same(changes[1], changes[0], 1e-4)


# Checkpoints


def test_starts_from_a_language_model(tmp_path):
    source = make_model("text", "hybrid-lor", torch.float32)
    source.save_pretrained(tmp_path)
    for head, make in (*AUTO.items(), *HEADS.items()):
        model, report = make.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is HEADS[head]
        assert report["missing_keys"] == NEW[head]
        assert report["unexpected_keys"] == {"head_norm.weight", "head_norm.bias", "lm_head.weight"}
        trunk = source.model.state_dict()
        assert all(torch.equal(tensor, trunk[name]) for name, tensor in model.model.state_dict().items())
        assert model.score.weight.isfinite().all()


@each_head
def test_save_and_load(head, tmp_path):
    model = make_head(head, "hybrid-full", torch.float32, id2label={0: "a", 1: "b", 2: "c"}, classifier_dropout=0.5)
    model.save_pretrained(tmp_path)
    loaded, report = AUTO[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is HEADS[head]
    assert (loaded.config.id2label[2], loaded.config.classifier_dropout) == ("c", 0.5)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    ids, mask = pad(make_texts(), "left")
    assert_close_in_rounding(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@each_head
def test_bfloat16(head):
    model = make_head(head, dtype=torch.float32, initializer_range=None)
    ids, mask = pad(make_texts(), "right")
    expected = model(ids, attention_mask=mask).logits[mask.bool() if head == "token" else slice(None)]
    logits = model.to(torch.bfloat16)(ids, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    logits = logits[mask.bool() if head == "token" else slice(None)].float()
    # Two layers and the weights themselves are rounded.
    assert_close_in_rounding(logits, expected, 16, torch.bfloat16)


def test_pipelines(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    names = {0: "cat", 1: "dog", 2: "mat"}
    fields = {"vocab_size": len(tokenizer), "id2label": names, "label2id": {v: k for k, v in names.items()}}
    texts = ["the cat", "one dog sat on a mat", "far"]
    for head, task in (("sequence", "text-classification"), ("token", "token-classification")):
        model = make_head(head, dtype=torch.float32, **fields)
        model.save_pretrained(tmp_path / head)
        tokenizer.save_pretrained(tmp_path / head)
        answers = pipeline(task, model=str(tmp_path / head), device="cpu")(texts, batch_size=3)
        for text, answer in zip(texts, answers, strict=True):
            logits = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits.flatten(0, -2)
            found = [answer["label"]] if head == "sequence" else [entry["entity"] for entry in answer]
            assert found == [names[i] for i in logits.argmax(-1).tolist()]


# Bad input


@each_head
def test_bad_modality(head):
    words = (HEADS[head].__name__, "`modality` 'text'", "got 'image'")
    for make in (HEADS[head], AUTO[head].from_config):
        assert_rejected(words, make, make_config("image"))


@each_head
def test_bad_num_labels(head):
    assert_rejected((HEADS[head].__name__, "`num_labels`", "at least 1", "got 0"), make_head, head, num_labels=0)


LABELS = {
    "sequence": [
        (torch.tensor([0, 3, 1]), ("`num_labels` 3", "got 3")),
        (torch.zeros(2, dtype=torch.long), ("[batch] [3]", "got shape [2]")),
        (torch.zeros(3, 2), ("[3, 3]", "got shape [3, 2]")),
    ],
    "token": [
        (torch.full((3, 7), 3), ("`num_labels` 3", "got 3")),
        (torch.full((3, 7), -1), ("`num_labels` 3", "-100", "got -1")),
        (torch.zeros(3, dtype=torch.long), ("[3, 7]", "got shape [3]")),
        (torch.zeros(3, 7), ("[3, 7]", "torch.float32")),
    ],
}


@pytest.mark.parametrize(("head", "case"), [(head, case) for head in LABELS for case in range(len(LABELS[head]))])
def test_bad_labels(head, case):
    labels, words = LABELS[head][case]
    ids, mask = pad(make_texts(), "right")
    model = make_head(head)
    assert_rejected(("`labels`", *words), model, ids, attention_mask=mask, labels=labels)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    assert_rejected(("`labels`", *words), model, **inputs, labels=labels)


@each_head
def test_bad_inputs(head):
    model = make_head(head)
    labels = torch.zeros(1, dtype=torch.long)
    assert_rejected(("`input_ids`", "`inputs_embeds`", "got neither"), model, labels=labels)
    ids = torch.ones(1, 3, dtype=torch.long)
    both = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}
    assert_rejected(("`input_ids`", "`inputs_embeds`", "got both"), model, **both)
    assert_rejected(("`pixel_values`", "'text'"), model, ids, pixel_values=torch.zeros(1, 3, 12, 10))

"""What depends on the offset is trained apart from the rest: alone, or pulled towards what all offsets share."""

from __future__ import annotations

import distributed_worker as worker
import pytest
import torch
from closeness import assert_close_in_rounding
from training.arguments import ModelArguments
from training.trainer import ScriptTrainingArguments, WholeCheckpointTrainer
from training.weights import load_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from translution import TranslutionForCausalLM, TranslutionForImageClassification


SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SHARED = {"max_relative_distance": 1, "far_offsets": "shared"}
LAYERS = "model.trunk.layers.1."


def convert(modality, **options):
    if modality == "text":
        source = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=256, max_position_embeddings=17))
        return TranslutionForCausalLM.from_attention(source, max_relative_distance=2, layers=[1], **options)
    source = ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4, num_labels=10))
    return TranslutionForImageClassification.from_attention(source, layers=[1], **SHARED, **options)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed(before, model):
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def trainer_for(model, modality, folder, **arguments):
    arguments = {"max_steps": 1, "learning_rate": 0.01, "report_to": "none", "use_cpu": True, **arguments}
    arguments |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    training = ScriptTrainingArguments(output_dir=str(folder), do_eval=False, save_strategy="no", **arguments)
    return WholeCheckpointTrainer(model, training, train_dataset=worker.samples_for(modality, 4))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_only_offsets_are_trained(modality, checkpointing, tmp_path):
    model = convert(modality, freeze="all_but_offsets")
    attention = "self_attn" if modality == "text" else "attention"
    banks = {f"{LAYERS}{attention}.mixer.{name}" for name in ("k_bank", "v_bank")}
    if modality == "image":
        banks |= {f"{LAYERS}{attention}.mixer.{name}" for name in ("k_bias_bank", "v_bias_bank")}
    before = weights_of(model)
    trainer_for(model, modality, tmp_path, gradient_checkpointing=checkpointing).train()
    assert changed(before, model) == banks


def test_freezes_what_was_loaded(tmp_path):
    convert("text", freeze="all_but_offsets").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.freeze_all_but_offsets()
    before = weights_of(model)
    tokens = torch.randint(0, 256, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert changed(before, model) == {f"{LAYERS}self_attn.mixer.{name}" for name in ("k_bank", "v_bank")}


PARTS = {
    "lor": {"k_bank", "q_bank", "v_bank", "q_down.weight", "k_down.weight", "v_down.weight", "v_up.weight"},
    "basis": {"k_coefficients", "k_factors", "v_coefficients", "v_factors"},
    "relative-bias": {"relative_bias"},
    "relative-vectors": {"relative_key", "relative_value"},
}


@pytest.mark.parametrize("variant", PARTS)
def test_what_belongs_to_offsets(variant):
    model = worker.model_for("image", **worker.VARIANTS[variant])
    model.freeze_all_but_offsets()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in PARTS[variant]}


def test_a_new_head_is_trained_with_the_offsets(tmp_path):
    convert("image").save_pretrained(tmp_path)
    options = {"model_name_or_path": str(tmp_path), "freeze": "all_but_offsets", "ignore_mismatched_sizes": True}
    model = load_checkpoint(AutoModelForImageClassification, ModelArguments(**options), num_labels=3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.endswith("_bank")} == {"classifier.weight", "classifier.bias"}
    assert len(trained) == 6


def test_refuses_what_cannot_be_frozen(tmp_path):
    with pytest.raises(ValueError, match="`freeze` must be None or one of 'all_but_offsets', got 'offsets'"):
        convert("text", freeze="offsets")
    with pytest.raises(ValueError, match="`freeze` must be None or one of 'all_but_offsets', got offsets"):
        ModelArguments(model_name_or_path=str(tmp_path), freeze="offsets")
    with pytest.raises(ValueError, match="`freeze` needs a trained model, `model_name_or_path`"):
        ModelArguments(freeze="all_but_offsets")
    with pytest.raises(ValueError, match=r"layer with parameters of offsets, got `mixer_types` \['attention'"):
        worker.model_for("text", mixer_types="attention").freeze_all_but_offsets()


@pytest.mark.parametrize("variant", ["full", "basis", "bounded"])
def test_decay_is_the_gradient_of_a_penalty(variant):
    """Of what rows of a bank differ from their mean, added to the loss; exactly so for gradient descent."""
    rate, rows = 0.7, ("_bank", "_coefficients")
    found = []
    for decoupled in (True, False):
        model = worker.model_for("text", **worker.VARIANTS[variant]).double()
        batch = next(worker.batches("text", 4, epochs=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if decoupled:
            model.decay_offsets(optimizer, rate)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(**batch).loss
            if not decoupled:
                for name, table in model.named_parameters():
                    if name.endswith(rows):
                        mean = sum(table) / len(table)
                        loss = loss + rate / 2 * sum((row - mean).square().sum() for row in table)
            loss.backward()
            optimizer.step()
        found.append(weights_of(model))
    for name, weight in found[0].items():
        # The loss is computed in float32, so its gradient is rounded apart from that of the penalty.
        assert_close_in_rounding(weight, found[1][name], dtype=torch.float32)


def test_decay_by_the_trainer(tmp_path):
    """One step more: AdamW's own is the same, since its gradient was computed before."""
    torch.manual_seed(0)
    start = convert("text")
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            if name.endswith("_bank"):
                parameter.add_(torch.randn_like(parameter))
    start.save_pretrained(tmp_path / "start")
    before, found = weights_of(start), []
    for rate in (0.0, 3.0):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        trainer = trainer_for(model, "text", tmp_path, offset_decay=rate)
        # The Trainer asks for an optimizer once more, and the decay is registered once.
        trainer.create_optimizer()
        trainer.train()
        found.append(weights_of(model))
    decayed = 0
    for name, weight in before.items():
        expected = found[0][name]
        if name.endswith("_bank"):
            expected = expected - 0.01 * 3.0 * (weight - weight.mean(0))
            decayed += 1
        assert_close_in_rounding(found[1][name], expected)
    assert decayed == 2


def test_decay_can_be_ended_and_skips_what_has_no_gradient():
    model = worker.model_for("text", **worker.FULL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model.decay_offsets(optimizer, 1.0)
    before = weights_of(model)
    optimizer.step()
    assert not changed(before, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert len(changed(before, model)) == 6
    handle.remove()
    before = weights_of(model)
    optimizer.step()
    assert not changed(before, model)


def test_refuses_what_cannot_decay(tmp_path):
    model = worker.model_for("text", **worker.FULL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rate in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="`rate` must be a finite number of at least 0, got"):
            model.decay_offsets(optimizer, rate)
    with pytest.raises(ValueError, match="`optimizer` must train parameters with one row per offset"):
        model.decay_offsets(torch.optim.SGD(model.lm_head.parameters(), lr=0.1), 1.0)
    # As the first version of FSDP leaves them.
    mixer = model.model.layers[0].mixer
    mixer.k_bank = torch.nn.Parameter(mixer.k_bank.detach().flatten())
    mixer.k_bank.grad = torch.zeros_like(mixer.k_bank)
    optimizer = torch.optim.SGD([mixer.k_bank], lr=0.1)
    model.decay_offsets(optimizer, 1.0)
    with pytest.raises(ValueError, match=r"whole tables of 17 rows, got one of shape \[4352\]"):
        optimizer.step()
    with pytest.raises(ValueError, match="`offset_decay` must be a number of at least 0, got -1"):
        ScriptTrainingArguments(output_dir=str(tmp_path), offset_decay=-1.0)

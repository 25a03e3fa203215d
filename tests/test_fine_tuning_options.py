"""Options of the training scripts for fine-tuning: what is frozen, rates by layer, and the average of the weights."""

import json
import re

import distributed_worker as worker
import pytest
import torch
from closeness import assert_close_in_rounding
from safetensors.torch import load_file
from small_models import make_tokenizer
from training.arguments import ModelArguments
from training.checkpoints import UNAVERAGED, newest_checkpoint, why_incomplete
from training.fine_tuning import decay_learning_rates, freeze, parameter_depths
from training.hub import additions
from training.trainer import ScriptTrainingArguments, WholeCheckpointTrainer
from training.weights import load_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from translution import TranslutionForCausalLM, TranslutionForImageClassification


SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE, TEXT = {"image_size": 8, "patch_size": 4}, {"vocab_size": 32, "max_position_embeddings": 8}
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=32)
SOURCES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, **TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZE, **IMAGE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE, **IMAGE)),
}


def model_of(kind):
    """A model of two layers, made new or converted."""
    if kind in ("image", "text"):
        return worker.model_for(kind, use_absolute_position_embeddings=True, **worker.FULL)
    head = TranslutionForImageClassification if kind in ("vit", "dinov2") else TranslutionForCausalLM
    return head.from_attention(SOURCES[kind](), max_relative_distance=1)


def depth_of(name):
    """By the names that the families have: 0 for the embedding, 1 and 2 for the layers, and 3 for the rest."""
    layer = re.search(r"\.(?:layers?|h)\.(\d)\.", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if re.search(r"embed|\.wte\.|\.wpe\.", name) else 3


@pytest.mark.parametrize("kind", ["image", "text", *SOURCES])
def test_how_deep_parameters_are(kind):
    model = model_of(kind)
    depths, count = parameter_depths(model)
    assert count == 2
    expected = {name: depth_of(name) for name, _ in model.named_parameters()}
    assert {name: depths[id(parameter)] for name, parameter in model.named_parameters()} == expected
    assert set(expected.values()) == {0, 1, 2, 3}


def trained(model, fresh=(), **options):
    """The names of the parameters that are trained."""
    freeze(model.requires_grad_(True), ModelArguments(model_name_or_path="user/name", **options), fresh)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", ["image", "llama", "vit"])
def test_what_is_frozen(kind):
    model = model_of(kind)
    names = {name for name, _ in model.named_parameters()}
    banks = {name for name in names if name.endswith("_bank")}
    for layers in (0, 1, 2):
        assert trained(model, freeze_layers=layers) == {name for name in names if depth_of(name) > layers}
    assert trained(model, freeze_pattern=r"_bank$") == names - banks
    # What any of them freezes is frozen.
    options = {"freeze": "all_but_offsets", "freeze_layers": 1, "freeze_pattern": r"\bk_"}
    left = {name for name in banks if depth_of(name) == 2 and ".k_" not in name}
    assert left
    assert trained(model, **options) == left


def test_a_new_head_is_frozen_by_its_name_alone(tmp_path):
    model_of("image").save_pretrained(tmp_path)
    args = ModelArguments(
        model_name_or_path=str(tmp_path), ignore_mismatched_sizes=True, freeze_layers=2, freeze_pattern="norm"
    )
    model = load_checkpoint(AutoModelForImageClassification, args, id2label=dict(enumerate("abc")))
    head = {"classifier.weight", "classifier.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == head
    # Its weights would stay random otherwise.
    assert trained(model, head, freeze="all_but_offsets", freeze_pattern="layers") == head
    assert not head & trained(model, head, freeze_pattern="^classifier")


def test_a_tied_head_has_both_names():
    model = worker.model_for("text", tie_word_embeddings=True, **worker.FULL)
    for pattern in ("^lm_head", "embed_tokens"):
        assert "model.embed_tokens.weight" not in trained(model, freeze_pattern=pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_layers": 3}, "`freeze_layers` must be an integer from 0 to 2, got 3"),
        ({"freeze_layers": -1}, "`freeze_layers` must be an integer from 0 to 2, got -1"),
        (
            {"freeze_pattern": "bonk"},
            "`freeze_pattern` must match names of parameters, such as '.*', and 'bonk' matches",
        ),
        ({"freeze_pattern": "."}, r"`freeze_pattern` must leave parameters to train, and '\.' matches all"),
        ({"freeze_pattern": "(a"}, r"`freeze_pattern` must be a regular expression, got '\(a': .* position 0"),
        (
            {"freeze_layers": 2, "freeze_pattern": "norm|classifier"},
            r"At least one .* together `freeze_layers` 2, `freeze_pattern` 'norm\|classifier' freeze all",
        ),
    ],
)
def test_what_cannot_be_frozen(options, message):
    with pytest.raises(ValueError, match=message):
        trained(model_of("image"), **options)


@pytest.mark.parametrize("options", [{"freeze_layers": 0}, {"freeze_pattern": "_bank$"}])
def test_freezing_needs_a_trained_model(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` needs a trained model, `model_name_or_path`"):
        ModelArguments(**options)


def trainer_for(model, folder, count=4, **arguments):
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.05, "weight_decay": 0.3, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    training = ScriptTrainingArguments(output_dir=str(folder), do_eval=False, **{**settings, **arguments})
    samples = worker.samples_for("text", count)
    return WholeCheckpointTrainer(model, training, train_dataset=samples, eval_dataset=samples[:4])


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_rates_fall_from_the_head_to_the_embedding(tmp_path):
    """A step of gradient descent, with the decay of offsets, is as long as the rate says."""
    factor, found = 0.75, []
    start = weights_of(worker.model_for("text", **worker.FULL).double())
    for decay in (1.0, factor):
        model = worker.model_for("text", **worker.FULL).double()
        # Weight decay would come after that of offsets, and the two together are not linear in the rate.
        options = {"optim": "sgd", "weight_decay": 0.0, "offset_decay": 0.5, "lr_scheduler_type": "constant"}
        trainer = trainer_for(model, tmp_path, layer_lr_decay=decay, **options)
        trainer.train()
        found.append(weights_of(model))
    plain, decayed = found
    for name, before in start.items():
        expected = before + (plain[name] - before) * factor ** (3 - depth_of(name))
        assert_close_in_rounding(decayed[name], expected)
        assert not torch.equal(plain[name], before), name


def test_groups_keep_their_weight_decay_and_follow_the_schedule(tmp_path):
    model = worker.model_for("text", **worker.FULL)
    trainer = trainer_for(model, tmp_path, layer_lr_decay=0.5, max_steps=4, lr_scheduler_type="linear")
    kept = trainer.get_decay_parameter_names(model)
    trainer.train()
    groups, names = trainer.optimizer.param_groups, {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["initial_lr"]) for g in groups for p in g["params"]}
    rates = {depth: 0.05 * 0.5 ** (3 - depth) for depth in range(4)}
    assert found == {name: (0.3 if name in kept else 0.0, rates[depth_of(name)]) for name in names.values()}
    # What is logged is the rate of the head.
    assert groups[0]["initial_lr"] == 0.05
    trainer = trainer_for(model, tmp_path, layer_lr_decay=0.5, max_steps=4, lr_scheduler_type="linear")
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.75 * group["initial_lr"], rel=1e-12)


def test_rates_need_the_parameters_of_the_model(tmp_path):
    model, other = (worker.model_for("text", **worker.FULL) for _ in range(2))
    with pytest.raises(ValueError, match="`layer_lr_decay` needs the parameters of the model"):
        decay_learning_rates(torch.optim.SGD(other.parameters(), lr=1.0), model, 0.5)
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"`layer_lr_decay` must be more than 0 and at most 1, got {factor}"):
            ScriptTrainingArguments(output_dir=str(tmp_path), layer_lr_decay=factor)


class Record(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self, model):
        self.model, self.weights = model, []

    def on_optimizer_step(self, *_, **__):
        self.weights.append(weights_of(self.model))


def averaging(folder, **arguments):
    """Four steps, a checkpoint after each second. Returns the trainer and the weights after each step."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.6, "logging_strategy": "no"}
    model = worker.model_for("text", **worker.FULL)
    trainer = trainer_for(model, folder, 16, **{**settings, **arguments})
    record = Record(model)
    trainer.add_callback(record)
    return trainer, record.weights


def test_the_average_of_the_weights(tmp_path):
    trainer, weights = averaging(tmp_path / "whole", eval_strategy="steps", eval_steps=2)
    trainer.train()
    average = {name: weight.double() for name, weight in weights[0].items()}
    for after in weights[1:]:
        average = {name: 0.6 * mean + 0.4 * after[name].double() for name, mean in average.items()}
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    saved, unaveraged = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / UNAVERAGED)
    for name, weight in weights[-1].items():
        assert torch.equal(unaveraged[name], weight)
        # Each of three updates rounds.
        torch.testing.assert_close(saved[name].double(), average[name], rtol=0, atol=3 * 2**-24 * weight.abs().max())
        assert not torch.equal(saved[name], weight), name
    # Evaluations are those of the average, and the model is trained on with its own weights.
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = trainer_for(model, tmp_path / "plain").evaluate()["eval_loss"]
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(plain, rel=64 * torch.finfo(torch.float32).eps)
    assert all(torch.equal(p, weights[-1][name]) for name, p in trainer.model.named_parameters())
    trainer.save_model(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == saved.keys()
    assert all(torch.equal(w, saved[n]) for n, w in load_file(tmp_path / "model" / "model.safetensors").items())

    # A run that goes on has the same average, and without the option the weights to train on.
    second = tmp_path / "whole" / "checkpoint-2"
    resumed, later = averaging(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(second))
    again = load_file(tmp_path / "resumed" / "checkpoint-4" / "model.safetensors")
    assert len(later) == 2
    assert all(torch.equal(weight, again[name]) for name, weight in saved.items())
    without, later = averaging(tmp_path / "without", ema_decay=None, save_strategy="no")
    without.train(resume_from_checkpoint=str(second))
    assert all(torch.equal(weight, later[-1][name]) for name, weight in weights[-1].items())

    # What only a resumed run needs is not pushed, and must be whole.
    assert UNAVERAGED not in {operation.path_in_repo for operation in additions(checkpoint, "user/name")}
    whole = (checkpoint / UNAVERAGED).read_bytes()
    (checkpoint / UNAVERAGED).write_bytes(whole[: len(whole) // 2])
    assert f"{UNAVERAGED} is damaged" in why_incomplete(checkpoint)
    assert newest_checkpoint(tmp_path / "whole") == second


def test_the_best_average_is_the_model_and_the_card_says_so(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from run_image_classification import main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16"
    # The loss falls, and is said to get worse thereby: the first evaluation stays the best one.
    options = f"""--dataset_name digits --config_overrides {model} --image_size 8 --patch_size 4 --max_steps 2
        --max_train_samples 16 --max_eval_samples 8 --per_device_train_batch_size 4 --learning_rate 0.01
        --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --load_best_model_at_end true
        --metric_for_best_model loss --greater_is_better true --ema_decay 0.75 --disable_tqdm true --use_cpu true"""
    main([*options.split(), "--output_dir", str(tmp_path / "run")])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    best = tmp_path / "run" / f"checkpoint-{state['best_global_step']}"
    assert state["best_global_step"] == 1
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    assert metrics["loss"] == pytest.approx(state["best_metric"], rel=64 * torch.finfo(torch.float32).eps)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "exponential moving average of those that were trained, with a decay of 0.75." in card


@pytest.mark.parametrize("kind", ["text", "gpt2"])
def test_blocks_longer_than_the_positions_of_the_model(kind, tmp_path):
    """With a distance they are taken, and what comes first does not depend on what follows; a table of positions ends."""
    pytest.importorskip("datasets")
    from run_clm import load_model
    from training.text_blocks import BlockArguments

    model = worker.model_for(kind, max_relative_distance=2) if kind == "text" else model_of(kind)
    model.eval()
    model.save_pretrained(tmp_path)
    limit = model.config.max_position_embeddings
    args, block = ModelArguments(model_name_or_path=str(tmp_path)), BlockArguments(block_size=2 * limit)
    if kind == "gpt2":
        with pytest.raises(ValueError, match=r"got 16: .* its table of absolute positions ends there"):
            load_model(args, block, make_tokenizer())
        return
    longer = load_model(args, block, make_tokenizer()).eval()
    ids = torch.randint(model.config.vocab_size, (1, 2 * limit))
    with torch.no_grad():
        assert_close_in_rounding(longer(ids).logits[:, :limit], model(ids[:, :limit]).logits)


@pytest.mark.parametrize(("name", "flag"), [("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")])
def test_where_there_is_no_average(name, flag, tmp_path, monkeypatch):
    create = WholeCheckpointTrainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        setattr(self, flag, True)

    model = worker.model_for("text", **worker.FULL)
    monkeypatch.setattr(WholeCheckpointTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=f"`ema_decay` must be None with {name}, .* got 0.9"):
        trainer_for(model, tmp_path, ema_decay=0.9)
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"`ema_decay` must be None, or more than 0 and less than 1, got {decay}"):
            ScriptTrainingArguments(output_dir=str(tmp_path), ema_decay=decay)

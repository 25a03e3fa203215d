"""Two processes do what one does: the same losses and final weights, however batches or the heads of a model are shared.

One launch of `distributed_worker.py` runs every case in two processes over gloo, through the launch file that the
documentation names; each test runs one case in this process and compares.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from common.training_memory import bytes_alone, bytes_fully_sharded, bytes_tensor_parallel
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, GPT2Config, GPT2LMHeadModel

from translution import TranslutionForCausalLM
from translution.modeling.mixers.tensor_parallel import check_heads


LAUNCH_FILES = Path(__file__).resolve().parent.parent / "scripts" / "accelerate"
FULL = worker.FULL
DONE = "done"


@dataclass
class Shared:
    """What two processes left behind."""

    folder: Path

    def __getitem__(self, case):
        return load_file(self.folder / f"{case}.safetensors")


def launch(folder):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(LAUNCH_FILES / "two_cpu_processes.yaml"), worker.__file__, str(folder)]
    # A launch of its own, whatever launched the tests.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # Transformers shares a model among the accelerators that it sees.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=worker.LIFETIME + 60, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (folder / DONE).touch()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Tests that run side by side wait for one launch; their folders have a common parent.
        folder = folder.parent
    folder /= "two-processes"
    with FileLock(folder.with_suffix(".lock")):
        folder.mkdir(exist_ok=True)
        if not (folder / DONE).exists():
            launch(folder)
    return Shared(folder)


@pytest.fixture(autouse=True, scope="module")
def one_process():
    """Accelerate remembers one state per process; it is on the CPU, and there is one of it."""
    assert PartialState(cpu=True).num_processes == 1


def train_alone(modality, count, epochs, frozen=False, **fields):
    """The same training in one process: whole batches, their mean loss. Returns the model and the loss of each step."""
    model = worker.model_for(modality, **fields).double()
    if frozen:
        worker.freeze_banks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=worker.LEARNING_RATE)
    curve = []
    for batch in worker.batches(modality, count, epochs):
        logits, wanted = worker.predictions(model(**{**batch, "labels": None}).logits, batch["labels"])
        loss = cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), worker.MAX_GRAD_NORM)
        optimizer.step()
        curve.append(loss.detach())
    return model, torch.stack(curve)


def largest_difference(state, found):
    assert set(state) <= set(found)
    return max((state[name] - found[name]).abs().max().item() for name in state)


def assert_same(found, losses, model, atol):
    assert found["losses"].shape == losses.shape
    state = {"losses": losses, **model.state_dict()}
    torch.testing.assert_close({name: found[name] for name in state}, state, rtol=0, atol=atol)


def assert_trained(model, modality, **fields):
    """Equal weights say nothing of a model that was not trained."""
    before = worker.model_for(modality, **fields).to(next(model.parameters()).dtype)
    for (name, first), last in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(first, last), name


@pytest.mark.parametrize(
    ("case", "modality", "count", "epochs", "fields"),
    [
        # The last batch is of 1: one process has nothing to do in it.
        ("ddp-image", "image", 25, 3, FULL),
        ("ddp-text", "text", 29, 3, FULL),
        ("fsdp-image", "image", 25, 3, FULL),
        ("fsdp-text", "text", 29, 3, {"tie_word_embeddings": True, **FULL}),
        ("fsdp-basis", "text", 16, 2, worker.VARIANTS["lor-basis"]),
    ],
)
def test_sharing_batches_changes_nothing(shared, case, modality, count, epochs, fields):
    model, losses = train_alone(modality, count, epochs, **fields)
    assert_same(shared[case], losses, model, atol=1e-12)
    assert_trained(model, modality, **fields)


def test_frozen_banks_are_shared(shared):
    model, losses = train_alone("image", 25, 3, frozen=True, **FULL)
    assert_same(shared["ddp-frozen"], losses, model, atol=1e-12)
    before = worker.model_for("image", **FULL).double().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith("_bank"), name


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("variant", worker.VARIANTS)
def test_every_variant_is_shared(shared, modality, variant):
    """DDP that does not look for unused parameters: every parameter of every mixer takes part in every step."""
    fields = worker.VARIANTS[variant]
    model, losses = train_alone(modality, 16, 1, **fields)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_same(shared[f"step-{modality}-{variant}"], losses, model, atol=1e-12)


@pytest.mark.parametrize("case", ["fsdp-image", "fsdp-text", "fsdp-basis"])
def test_fsdp_shards_the_rows_of_banks(shared, case):
    found = shared[case]
    rows = {name.removeprefix("rows of "): value for name, value in found.items() if name.startswith("rows of ")}
    assert rows
    for name, (first, second) in rows.items():
        assert first + second == found[name].shape[0]
        assert first == -(-found[name].shape[0] // 2)


@pytest.mark.parametrize("case", ["fsdp-image", "fsdp-text", "fsdp-basis"])
def test_what_fsdp_gathers_loads(shared, case):
    auto = AutoModelForImageClassification if case == "fsdp-image" else AutoModelForCausalLM
    folder = shared.folder / case
    assert {path.suffix for path in folder.iterdir()} == {".json", ".py", ".safetensors"}  # weights, config and code
    model, loading = auto.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == [type(model).__name__]
    assert largest_difference(model.state_dict(), shared[case]) == 0
    if case == "fsdp-text":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def assert_equal_runs(found, expected, atol=1e-12, rtol=0):
    assert set(found) == set(expected)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def test_trainer_repeats_samples_to_fill_the_last_batch(shared, tmp_path):
    """By default what is missing in the last batch is taken from the beginning; see `scripts/accelerate/README.md`."""
    samples, held_out = worker.image_samples(29), worker.image_samples(13)
    run = worker.trainer(tmp_path, worker.model_for("image", **FULL), samples + samples[:3], held_out=held_out)
    assert_equal_runs(shared["trainer-image"], worker.train_and_evaluate(run))
    assert_trained(run.model, "image", **FULL)


def test_trainer_evaluates_every_sample_once(shared):
    accuracy, samples = shared["trainer-image"]["metrics"].tolist()
    assert samples == 13
    model = worker.model_for("image", **FULL).double()
    model.load_state_dict({name: shared["trainer-image"][name] for name in model.state_dict()})
    batch = worker.stack(worker.image_samples(13))
    found = model.eval()(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert accuracy == pytest.approx(found.double().mean().item())


def test_trainer_without_repeats_is_exact(shared, tmp_path):
    """Padding whose labels are ignored, and a loss that counts labels over all processes."""
    run = worker.trainer(tmp_path, worker.model_for("image", **FULL), worker.image_samples(29))
    assert_equal_runs(shared["trainer-image-exact"], worker.train_and_evaluate(run))


def test_trainer_draws_the_same_batches(shared, tmp_path):
    samples = worker.image_samples(29)
    run = worker.trainer(tmp_path, worker.model_for("image", **FULL), samples, **worker.SHUFFLED)
    assert_equal_runs(shared["trainer-image-shuffled"], worker.train_and_evaluate(run))


def test_trainer_weighs_tokens_not_processes(shared, tmp_path):
    """Transformers computes the loss of a text in float32 whatever the model's type."""
    run = worker.trainer(tmp_path, worker.model_for("text", **FULL), worker.text_samples(29))
    assert_equal_runs(shared["trainer-text"], worker.train_and_evaluate(run), atol=1e-6, rtol=1e-6)
    assert_trained(run.model, "text", **FULL)


def test_trainer_accumulates_and_checkpoints(shared, tmp_path):
    """Two processes, half a share at a time, activations computed twice: the weights of whole batches."""
    run = worker.trainer(tmp_path, worker.model_for("text", **FULL), worker.text_samples(32))
    found = shared["trainer-text-halves"]
    found["losses"] = found["losses"].view(-1, 2).sum(dim=1)
    assert_equal_runs(found, worker.train_and_evaluate(run), atol=1e-6, rtol=1e-6)


def test_accelerate_accumulates(shared):
    assert_equal_runs(shared["accelerate"], worker.run_accelerate(32, 2, accumulation=1))


def test_accelerate_in_bfloat16(shared):
    """Half precision is in the products, not in the weights; two processes round as one does, but for sums of gradients."""
    found, exact = shared["accelerate-bf16"], shared["accelerate"]
    before = worker.model_for("image", **FULL).state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not torch.equal(found["losses"], exact["losses"].float())
    torch.testing.assert_close(found["losses"], exact["losses"].float(), rtol=torch.finfo(torch.bfloat16).eps, atol=0)

    def update(state):
        return torch.cat([(state[name].double() - before[name].double()).flatten() for name in before])

    assert torch.cosine_similarity(update(found), update(exact), dim=0) > 0.99


# Tensor parallelism


def run_alone(modality, masked, fields):
    """What `worker.run_tensor_parallel` does, in one process; everything but shares."""
    model = worker.model_for(modality, **fields).double()
    result = worker.logits_and_gradients(model, modality, masked)
    with torch.no_grad():
        if modality == "text":
            for cache in ("dynamic", "static"):
                result.update(worker.generated(model, cache))
        if "relative_projections" in fields:
            model.set_attn_implementation("eager")
            result.update(worker.probabilities(model, modality))
    return result


@pytest.mark.parametrize("case", worker.TENSOR_PARALLEL)
def test_processes_share_heads(shared, case):
    """Logits, gradients, generated tokens with a cache and attention weights are those of one process, up to rounding."""
    expected, found = run_alone(*worker.TENSOR_PARALLEL[case]), shared[f"heads-{case}"]
    # Some gradients are sums of large terms that cancel, so that rounding is measured by the largest of them all.
    scale = max(value.abs().max() for name, value in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        if name.endswith("tokens"):
            assert torch.equal(found[name], value)
            continue
        # Sums over features and tokens, at most a few hundred terms, in another order: errors grow with the root of it.
        unit = torch.finfo(torch.float64).eps * (scale if name.startswith("gradient") else value.abs().max())
        assert (found[name] - value).abs().max() <= 64 * unit, name
        assert value.any()


def test_each_process_has_the_parameters_of_its_heads(shared):
    """Of every kind of parameter the local shape: 2 heads of 8 features, rank 4, so that the first has 8 of 16, 4 of 8."""
    offsets, distances = 7 * 7 + 3, worker.TEXT["max_position_embeddings"]
    expected = {
        "image-full": {"q_bank": (offsets, 16, 8), "o_proj.weight": (16, 8), "o_proj.bias": (16,)},
        "text-full": {"q_proj.weight": (8, 16), "v_bank": (distances, 16, 8)},
        "image-local": {"k_bank": (3 * 3 + 1 + 3, 16, 8)},
        "image-lor": {"q_bank": (offsets, 8, 4), "q_down.weight": (8, 16), "v_up.weight": (8, 8)},
        # The query's features are used head by head, those of keys and values all of them by each head's bank.
        "text-lor": {"q_down.weight": (4, 16), "k_down.weight": (8, 16), "k_proj.weight": (8, 16)},
        "image-basis": {"k_factors": (3, 16, 8), "k_coefficients": (offsets, 3)},
        "image-bias": {"relative_bias": (offsets, 1), "v_proj.weight": (8, 16)},
        "text-vectors": {"relative_key": (distances, 8)},
        "image-convolution": {"window_weight": (9, 16, 8), "class_proj.weight": (8, 16)},
    }
    for case, shapes in expected.items():
        for name, shape in shapes.items():
            assert tuple(shared[f"heads-{case}"][f"share of model.layers.1.mixer.{name}"]) == shape, (case, name)
    beside = shared["heads-text-full"]
    assert tuple(beside["share of model.embed_tokens.weight"]) == (128, 16)
    assert tuple(beside["share of model.layers.0.mlp.fc1.weight"]) == (16, 16)
    assert tuple(beside["share of model.layers.0.mlp.fc2.weight"]) == (16, 16)
    # ACmix is no `DTensor` at all.
    layers = {name[9:].rpartition(".mixer.")[0] for name in shared["heads-text-acmix"] if name.startswith("share of ")}
    assert "model.layers.0" in layers
    assert "model.layers.1" not in layers


@pytest.mark.parametrize("case", worker.TENSOR_PARALLEL)
def test_memory_is_that_of_a_process(shared, case):
    """What the table of docs/training.md is computed by, without a second process, counts what each of two really has."""
    modality, _, fields = worker.TENSOR_PARALLEL[case]
    found, whole = shared[f"heads-{case}"], worker.model_for(modality, **fields)
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    own = {name: int(found.get(f"share of {name}", torch.tensor(size)).prod()) for name, size in sizes.items()}
    assert bytes_tensor_parallel(whole.config, 2) == (4 * 4 + 2) * sum(own.values())
    assert bytes_alone(whole) == (4 * 4 + 2) * sum(sizes.values())


def test_memory_of_fsdp_is_that_of_a_process(shared):
    """The rows that a process really has of banks, half the rows of the rest, and a layer that is whole for a while."""
    whole, found = worker.model_for("image", **FULL), shared["fsdp-image"]
    own = 0
    for name, parameter in whole.named_parameters():
        rows = found.get(f"rows of {name}", torch.tensor([(len(parameter) + 1) // 2]))
        own += int(rows[0]) * parameter[0].numel()
    layer = sum(parameter.numel() for parameter in whole.model.layers[0].parameters())
    assert bytes_fully_sharded(whole, 2) == 4 * 4 * own + (2 + 2) * layer


def test_models_with_shared_heads_are_saved_whole(shared):
    modality, _, fields = worker.TENSOR_PARALLEL["text-full"]
    source = worker.model_for(modality, **fields).double()
    loaded = AutoModelForCausalLM.from_pretrained(shared.folder / "heads-text-full" / "saved", dtype=torch.float64)
    assert largest_difference(source.state_dict(), loaded.state_dict()) == 0
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "distributed_config" not in loaded.config.to_dict()


def test_heads_that_processes_cannot_share_are_refused(shared):
    message = bytes(shared["heads-refused"]["message"].tolist()).decode()
    assert "`tp_size` must divide `num_attention_heads` 3, got 2" in message


def test_converted_models_do_not_share_heads():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=32)
    model = TranslutionForCausalLM.from_attention(GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match=r"`tp_size` must be 1 .*`trunk_config`.*got 2"):
        check_heads(model, 2)


# Launch files


@pytest.mark.parametrize("path", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_say_what_accelerate_knows(path):
    """Accelerate takes an unknown word within `fsdp_config` or `deepspeed_config` without a murmur."""
    parser = launch_command_parser()
    known = vars(parser.parse_args(["script.py"]))
    args, config, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    for block in (config.fsdp_config, config.deepspeed_config):
        assert set(block or {}) <= set(known)
    assert (args.use_fsdp, args.use_deepspeed) == (path.stem == "fsdp2", path.stem.startswith("deepspeed"))
    assert args.multi_gpu == (path.stem in ("ddp", "two_cpu_processes"))
    assert args.mixed_precision == ("no" if path.stem == "two_cpu_processes" else "bf16")
    assert (args.num_processes == 1) == (path.stem == "one_gpu")


def test_fsdp2_file_wraps_the_layers(monkeypatch):
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(LAUNCH_FILES / "fsdp2.yaml"), "script.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    model = worker.model_for("text", **FULL)
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if policy(module)] == list(model.model.layers)


def test_readme_lists_the_launch_files():
    text = (LAUNCH_FILES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[`(\w+\.yaml)`\]", text)) == {path.name for path in LAUNCH_FILES.glob("*.yaml")}

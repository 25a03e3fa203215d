"""Only tensors are written and read, and a checkpoint that is not whole says what is wrong with it."""

import json
import os
import shutil
import sys
from pathlib import Path

import predict
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training.checkpoints import share_code
from training.trainer import WholeCheckpointTrainer
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8, "intermediate_size": 8}
BANK = "model.layers.0.mixer.k_bank"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def model():
    config = TranslutionConfig(image_size=8, patch_size=4, num_labels=3, **TINY)
    return TranslutionForImageClassification(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def report(caplog):
    """What Transformers warns of, which has a handler of its own."""
    logger = logging.get_logger("transformers")
    level = logger.level
    # Programs that other tests call in this process have made it quieter.
    logger.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def load(folder, **options):
    return TranslutionForImageClassification.from_pretrained(folder, **options)


def change(folder, **tensors):
    """Replaces tensors of a saved model; None takes one away."""
    path = folder / "model.safetensors"
    changed = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, {"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def trainer(model, output_dir, **options):
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": one, "labels": index % 3} for index, one in enumerate(pixels)]
    arguments = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    arguments |= {"disable_tqdm": True, "dataloader_pin_memory": False, **options}
    return WholeCheckpointTrainer(model, TrainingArguments(str(output_dir), **arguments), train_dataset=data)


def test_saved_weights_are_safetensors(model, tmp_path):
    for name, size in (("whole", "1GB"), ("sharded", "2KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        files = list((tmp_path / name).iterdir())
        assert {path.suffix for path in files} == {".safetensors", ".json", ".py"}
        saved = {}
        for path in (tmp_path / name).glob("*.safetensors"):
            with safe_open(path, framework="pt") as tensors:
                saved |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        assert saved.keys() == model.state_dict().keys()
        loaded = load(tmp_path / name).state_dict()
        assert all(
            torch.equal(tensor, saved[key]) and torch.equal(tensor, loaded[key])
            for key, tensor in model.state_dict().items()
        )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2


def test_a_missing_and_an_extra_tensor_are_reported(folder, report):
    change(folder, **{BANK: None, "model.odd": torch.ones(2)})
    _, found = load(folder, output_loading_info=True)
    assert (found["missing_keys"], found["unexpected_keys"]) == ({BANK}, {"model.odd"})
    lines = report.text.splitlines()
    assert any(BANK in line and "MISSING" in line for line in lines)
    assert any("model.odd" in line and "UNEXPECTED" in line for line in lines)
    # Predictions of weights that are drawn at random are worth nothing.
    with pytest.raises(ValueError, match=f"do not fit its config: {BANK} is missing; model.odd is unknown"):
        predict.load(str(folder))


def test_a_misshapen_tensor_is_named_with_both_shapes(folder, report):
    change(folder, **{BANK: torch.ones(2, 8, 8)})
    with pytest.raises(RuntimeError, match="size"):
        load(folder)
    shapes = r"torch.Size([2, 8, 8]) vs model:torch.Size([12, 8, 8])"
    assert any(BANK in line and shapes in line for line in report.text.splitlines())
    with pytest.raises(ValueError, match=rf"{BANK} must have the shape \[12, 8, 8\], got \[2, 8, 8\]"):
        predict.load(str(folder))


def test_a_trunk_takes_a_new_head(model, folder, tmp_path):
    change(folder, **{"classifier.weight": None, "classifier.bias": None})
    tuned, found = load(folder, num_labels=5, output_loading_info=True)
    assert found["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert tuned.classifier.weight.shape == (5, 8)
    assert torch.equal(tuned.state_dict()[BANK], model.state_dict()[BANK])


@pytest.mark.parametrize("content", ["short", b"", b"12345678 is no header"], ids=["truncated", "empty", "garbage"])
def test_damaged_weights_are_named(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20] if content == "short" else content)
    with pytest.raises(OSError, match=r"model.safetensors of .*model must be whole, but cannot be read: Error while"):
        load(folder)


def test_a_missing_and_a_damaged_shard_and_index_are_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(OSError, match=f"^{shard.name} of .* must be whole"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(OSError, match=r"^model.safetensors.index.json of .* must be whole"):
        load(tmp_path)


INDEX = {"metadata": {"total_size": 1}, "weight_map": {"classifier.bias": "NAME"}}


def planted_index(folder, index, name="model.safetensors.index.json", outside="model.safetensors"):
    """A folder whose only weights are an index, the file that it may name being beside the folder."""
    (folder / "model.safetensors").rename(folder.parent / outside)
    (folder / name).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "`metadata` of INDEX must be an object, got none"),
        ([], r"INDEX must hold a JSON object with `metadata` and `weight_map`, got list \[\]"),
        ({"weight_map": INDEX["weight_map"]}, "`metadata` of INDEX must be an object, got none"),
        ({"metadata": 5, "weight_map": {}}, "`metadata` of INDEX must be an object, got int 5"),
        ({"metadata": {}}, "`weight_map` of INDEX must be an object of tensor names to file names, got none"),
        ({"metadata": {}, "weight_map": ["x"]}, "`weight_map` of INDEX must be an object of .*, got list"),
        ({"metadata": {}, "weight_map": {}}, "`weight_map` of INDEX must name at least one tensor"),
        ({"metadata": {}, "weight_map": {"a": 1}}, "`weight_map` of INDEX must name files .* got 1 for 'a'"),
    ],
)
def test_an_index_that_is_json_and_no_index(folder, index, message):
    planted_index(folder, index)
    where = str(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=message.replace("INDEX", where)):
        load(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/passwd", "model.safetensors.index.json"),
        ("../model.safetensors", "model.safetensors.index.json"),
        ("ABSOLUTE", "model.safetensors.index.json"),
        ("shards/../../model.safetensors", "model.safetensors.index.json"),
        (r"C:\model.safetensors", "model.safetensors.index.json"),
        (r"..\model.safetensors", "model.safetensors.index.json"),
        ("../model.safetensors", "model.safetensors.index.fp16.json"),
        ("../weights.bin", "pytorch_model.bin.index.json"),
        ("shard.bin", "model.safetensors.index.json"),
    ],
)
def test_an_index_names_no_file_elsewhere(folder, name, kind, monkeypatch):
    name = name.replace("ABSOLUTE", str(folder.parent / "model.safetensors"))
    index = {"metadata": {}, "weight_map": {"classifier.bias": name}}
    planted_index(folder, index, kind, "weights.bin" if name.endswith("weights.bin") else "model.safetensors")
    opened = []
    monkeypatch.setattr(
        sys.modules["transformers.modeling_utils"], "safe_open", lambda *args, **_: opened.append(args)
    )
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args))
    with pytest.raises(ValueError, match=r"`weight_map` of .* must name files in its own folder") as caught:
        load(folder, variant="fp16" if "fp16" in kind else None)
    assert repr(name) in str(caught.value)
    assert not opened


def test_an_index_that_the_config_names_is_checked_too(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(config))
    elsewhere = {BANK: str(folder.parent / "model.safetensors")}
    (folder / "other.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": elsewhere}))
    opened = []
    monkeypatch.setattr(
        sys.modules["transformers.modeling_utils"], "safe_open", lambda *args, **_: opened.append(args)
    )
    with pytest.raises(ValueError, match=r"`weight_map` of .*other.* must name files in its own folder"):
        load(folder)
    assert not opened


def test_shards_may_lie_in_a_folder_of_their_own(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (tmp_path / "shards").mkdir()
    for name in set(index["weight_map"].values()):
        (tmp_path / name).rename(tmp_path / "shards" / name)
    index["weight_map"] = {tensor: f"shards/{name}" for tensor, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    assert torch.equal(load(tmp_path).state_dict()[BANK], model.state_dict()[BANK])


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8", "float8_e4m3fn"])
def test_weights_that_are_no_floating_point_numbers(model, folder, dtype, tmp_path):
    change(folder, **{BANK: model.state_dict()[BANK].to(getattr(torch, dtype))})
    words = rf"{BANK} of .*model.safetensors must be stored as one of float64, .* got the dtype"
    with pytest.raises(ValueError, match=words):
        load(folder)
    # A pickle of tensors is checked as well.
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{BANK} of .*pytorch_model.bin must be stored as .* got the dtype {dtype}"):
        load(folder)


def test_a_trunk_of_integers_is_refused_and_what_is_unknown_is_not(model, folder):
    change(folder, odd=torch.arange(3))
    _, found = load(folder, output_loading_info=True)
    assert found["unexpected_keys"] == {"odd"}
    model.model.save_pretrained(folder)
    bank = BANK.removeprefix("model.")
    change(folder, **{bank: model.state_dict()[BANK].to(torch.int32)})
    with pytest.raises(ValueError, match=f"^{bank} of .* got the dtype I32"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_floating_point_numbers_load(model, folder, dtype):
    change(folder, **{BANK: model.state_dict()[BANK].to(getattr(torch, dtype))})
    expected = model.state_dict()[BANK].to(getattr(torch, dtype)).float()
    assert torch.equal(load(folder, dtype="float32").state_dict()[BANK], expected)


def test_quantised_weights_may_be_integers(model, folder, monkeypatch):
    change(folder, **{BANK: model.state_dict()[BANK].to(torch.int8)})
    reached = []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: reached.append(args))
    arguments = (model, None, [str(folder / "model.safetensors")], None)
    with pytest.raises(ValueError, match="got the dtype I8"):
        model._load_pretrained_model(*arguments)
    # What a quantiser makes of them is its own affair.
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    model._load_pretrained_model(*arguments)
    assert reached == [arguments]


@pytest.mark.parametrize("content", [b"", b"garbage", "short"], ids=["empty", "garbage", "truncated"])
def test_damaged_pickles_are_named(model, folder, content):
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    assert torch.equal(load(folder).state_dict()[BANK], model.state_dict()[BANK])
    path.write_bytes(path.read_bytes()[:-50] if content == "short" else content)
    with pytest.raises(OSError, match=r"^pytorch_model.bin of .* must hold tensors by name, but cannot be read"):
        load(folder)


def test_no_weights_are_an_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        load(folder)


def test_a_config_of_the_future_is_told(folder, report):
    load(folder)
    assert "does not know" not in report.text
    change_config(folder, gate_banks=True, transformers_version="99.0")
    assert load(folder).config.gate_banks is True
    assert "does not know, and leaves unused: gate_banks. It was written by Transformers 99.0" in report.text
    assert f"here is {transformers.__version__}" in report.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mixer_types", ["warp"], "`mixer_types` must be one of 'translution', .*got 'warp'"),
        ("relative_projections", "z", "`relative_projections` must be one of 'qkv', .*got 'z'"),
        ("hidden_size", "big", "'hidden_size' expected int, got str .value: 'big'"),
        ("offset_basis", -1, "`offset_basis` must be .*at least 1 .*got -1"),
    ],
)
def test_a_value_of_the_future_is_refused(folder, field, value, message):
    change_config(folder, **{field: value})
    with pytest.raises(StrictDataclassError, match=message):
        load(folder)


def test_pickled_weights_run_no_code(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "planted")}, folder / "pytorch_model.bin")
    # The test would tell: where it is unpickled, the code runs.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    (tmp_path / "planted").rmdir()
    with pytest.raises(
        OSError, match=r"^pytorch_model.bin of .* or not without running code: Weights only load failed"
    ):
        load(folder)
    assert not (tmp_path / "planted").exists()


def test_a_training_that_goes_on_runs_no_code(model, tmp_path):
    trainer(model, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    pickled = sorted(path.name for path in checkpoint.iterdir() if path.suffix in PICKLES)
    # States of a training, and no weights; arguments are JSON.
    assert pickled == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    assert (checkpoint / "model.safetensors").is_file()
    for name in pickled:
        planted = tmp_path / name / "checkpoint-1"
        shutil.copytree(checkpoint, planted)
        torch.save({"state": Planted(tmp_path / "planted")}, planted / name)
        with pytest.raises(Exception, match="Weights only load failed"):
            trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(planted))
        assert not (tmp_path / "planted").exists()
    torch.save(Planted(tmp_path / "planted"), checkpoint / "training_args.bin")
    trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "planted").exists()


def test_text_is_refused_in_the_same_way(tmp_path):
    config = TranslutionConfig(modality="text", vocab_size=11, max_position_embeddings=4, **TINY)
    TranslutionForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match=r"^model.safetensors of .* must be whole"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_code_of_checkpoints_is_on_the_disk_once(tmp_path, monkeypatch, links):
    def no_links(*paths):
        raise OSError("no hard links here")

    first, second, saved = (tmp_path / name for name in ("checkpoint-1", "checkpoint-2", "saved"))
    for folder, other in ((first, "old"), (second, "new"), (saved, "new")):
        folder.mkdir()
        (folder / "same.py").write_text("same")
        (folder / "other.py").write_text(other)
        (folder / "alone.txt").write_text("text")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    share_code(saved, tmp_path)
    assert (saved / "same.py").samefile(first / "same.py") == links
    assert (saved / "other.py").samefile(second / "other.py") == links
    assert not (saved / "alone.txt").samefile(first / "alone.txt")
    assert {path.name: path.read_text() for path in saved.iterdir()} == {
        "same.py": "same",
        "other.py": "new",
        "alone.txt": "text",
    }


def test_code_that_is_written_again_is_that_of_one_folder(tmp_path):
    config = TranslutionConfig(**TINY)
    first, second = tmp_path / "first", tmp_path / "second"
    config.save_pretrained(first)
    second.mkdir()
    code = first / "modeling_translution.py"
    code.write_text("of an older version")
    os.link(code, second / code.name)
    config.save_pretrained(second)
    assert code.read_text() == "of an older version"

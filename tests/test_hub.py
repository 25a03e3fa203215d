"""Sharing on the Hub: the real client against a stand-in on loopback."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import hub_server
import push_to_hub
import pytest
import torch
from closeness import assert_close_in_rounding
from common.command import run_command
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from small_models import TINY
from training.tokenizer import train_tokenizer
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers import ViTImageProcessorPil as ImageProcessor
from without_package import without_package

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


NAME = f"{hub_server.USER}/words"
RUN = {
    "task": "text-generation",
    "dataset": {"id": None, "name": "words", "train_split": "train", "eval_split": "10% held out"},
    "metrics": {"perplexity": 12.5},
    "license": "apache-2.0",
}


def make_model(seed: int = 0) -> TranslutionForCausalLM:
    torch.manual_seed(seed)
    config = TranslutionConfig(modality="text", vocab_size=260, max_position_embeddings=16, pad_token_id=0, **TINY)
    return TranslutionForCausalLM(config).double().eval()


def save_run(folder: Path, seed: int = 0) -> TranslutionForCausalLM:
    """What a training script leaves: model, tokenizer, figures, card, and what a resumed run needs."""
    model = make_model(seed)
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    train_tokenizer(["the cat sat on the mat"], 260, 16).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "README.md").write_text("the folder's own card")
    (folder / "eval_results.json").write_text("{}")
    (folder / "LICENSE").write_text("You may.")
    # A stock Trainer leaves pickles beside the weights; they stay at home.
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", "arguments.json"):
        (folder / name).write_text("private")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("deeper")
    return model


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def push(run: Path, *options: str):
    push_to_hub.main([str(run), "--repo_id", NAME, *options])


def push_as_a_command(run: Path, *options: str):
    arguments = [str(run), "--repo_id", NAME, *options]
    run_command(push_to_hub.main, arguments, push_to_hub.explain, push_to_hub.REFUSALS)


def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(6)[None]).logits


def assert_same_model(found, expected):
    """The same weights, and the same logits but for rounding."""
    weights = found.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())
    assert_close_in_rounding(logits(found), logits(expected))


def test_push_list_and_load_by_name(hub, run, capsys):
    before = contents(run)
    push(run)
    assert capsys.readouterr().out.strip().startswith(f"{hub.endpoint}/{NAME}/commit/")
    assert contents(run) == before
    files = set(HfApi().list_repo_files(NAME))
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "run.json", "README.md"}
    assert wanted | {"modeling_translution.py", "eval_results.json", "LICENSE"} <= files
    assert not any(
        name.startswith(("training_args", "optimizer", "rng_state", "trainer_state", "checkpoint", "arg"))
        for name in files
    )
    assert_same_model(AutoModelForCausalLM.from_pretrained(NAME), make_model())
    assert (
        AutoTokenizer.from_pretrained(NAME)("the cat").input_ids
        == AutoTokenizer.from_pretrained(run)("the cat").input_ids
    )
    (written,) = pipeline("text-generation", NAME)("the", max_new_tokens=3)
    assert written["generated_text"].startswith("the")
    card = ModelCard.load(NAME)
    assert f'from_pretrained("{NAME}")' in card.content
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == 12.5


def test_nothing_changed_is_no_new_commit(hub, run):
    push(run)
    commits = len(hub.repositories[NAME].commits)
    (run / "eval_results.json").write_text('{"new": 1}')
    push(run)
    assert len(hub.repositories[NAME].commits) == commits + 1


def test_branches_revisions_and_pull_requests(hub, run, tmp_path):
    push(run)
    first = HfApi().model_info(NAME).sha
    second = tmp_path / "second"
    save_run(second, seed=1)
    push(second, "--revision", "better")
    third = tmp_path / "third"
    save_run(third, seed=2)
    push(third, "--create_pr")
    push(third, "--create_pr", "--revision", "newer")
    for revision, seed in ((None, 0), ("main", 0), (first, 0), ("better", 1), ("refs/pr/1", 2), ("refs/pr/2", 2)):
        model = AutoModelForCausalLM.from_pretrained(NAME, revision=revision or "main")
        assert_same_model(model, make_model(seed))
    # A pull request leaves what it is made against as it is.
    assert hub.repositories[NAME].refs["newer"] == first
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(NAME, revision="nowhere")


def test_old_weights_do_not_outlive_a_push(hub, run, tmp_path):
    """One file, then shards, then one file: what is loaded is what was pushed last."""
    shards, single = tmp_path / "shards", tmp_path / "single"
    save_run(single, seed=2)
    save_run(shards, seed=1)
    (shards / "model.safetensors").unlink()
    make_model(1).save_pretrained(shards, max_shard_size="5kB")
    parts = {path.name for path in shards.glob("model[.-]*")}
    assert len(parts) > 2
    push(run)
    api = HfApi()
    for path in ("theirs.safetensors", "old/model.safetensors", "pytorch_model.bin", "adapter_config.json"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=path, repo_id=NAME)
    kept = {"theirs.safetensors", "old/model.safetensors"}
    push(run, "--revision", "other")
    push(shards, "--create_pr")
    for folder, seed, wanted in ((shards, 1, parts), (single, 2, {"model.safetensors"})):
        push(folder)
        assert_same_model(AutoModelForCausalLM.from_pretrained(NAME), make_model(seed))
        found = set(hub.repositories[NAME].files())
        assert {name for name in found if name.startswith(("model.", "model-", "pytorch", "adapter"))} == wanted
        assert kept <= found
    for revision, seed in (("other", 0), ("refs/pr/1", 1)):
        model = AutoModelForCausalLM.from_pretrained(NAME, revision=revision)
        assert_same_model(model, make_model(seed))


def test_private(hub, run, monkeypatch):
    push(run, "--private")
    assert hub.repositories[NAME].private
    assert_same_model(AutoModelForCausalLM.from_pretrained(NAME), make_model())
    push(run)
    assert hub.repositories[NAME].private
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyElse")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(NAME)


LOAD = """
import sys, torch, transformers
import unaligned
unaligned.follow_switch()
from closeness import assert_close_in_rounding
from safetensors.torch import load_file
try:
    import translution
except ImportError:
    pass
else:
    raise SystemExit("the package is here")
expected = load_file("expected.safetensors")["logits"]
for name in sys.argv[1:]:
    name, revision = name.split("@")
    model = transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
    assert_close_in_rounding(model.eval()(torch.arange(6)[None]).logits, expected)
    assert model.generate(torch.arange(3)[None], max_new_tokens=2, pad_token_id=0).shape == (1, 5)
"""


def test_every_way_to_push_carries_the_code(hub, run, tmp_path):
    """Loaded in one process without the package."""
    model = make_model()
    push(run)
    push(run, "--revision", "branch")
    model.push_to_hub(f"{hub_server.USER}/by-model")
    AutoTokenizer.from_pretrained(run).push_to_hub(f"{hub_server.USER}/by-model")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=f"{hub_server.USER}/by-save")
    arguments = TrainingArguments(
        str(tmp_path / "trained"),
        hub_model_id=f"{hub_server.USER}/by-trainer",
        push_to_hub=True,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, arguments, processing_class=AutoTokenizer.from_pretrained(run)).push_to_hub()
    names = [
        f"{NAME}@main",
        f"{NAME}@branch",
        *(f"{hub_server.USER}/by-{way}@main" for way in ("model", "save", "trainer")),
    ]
    save_file({"logits": logits(model).detach()}, tmp_path / "expected.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": without_package(tmp_path / "path"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for name, repository in hub.repositories.items():
        assert "modeling_translution.py" in repository.files(), name
        assert not any(hub_server.TOKEN.encode() in data for data in repository.files().values()), name


def fails(run: Path, capsys, *options: str) -> str:
    """The error of a push, which leaves the folder as it was, and tells nobody the token."""
    before = contents(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        push_as_a_command(run, *options)
    printed = capsys.readouterr()
    assert exit_.value.code == 1
    assert "error: " in printed.err
    assert os.environ.get("HF_TOKEN", hub_server.TOKEN) not in printed.out + printed.err
    assert contents(run) == before
    return printed.err


def test_wrong_token(hub, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_thisOneIsWrong")
    assert "does not accept the token" in fails(run, capsys)
    assert not hub.repositories


def test_no_token(hub, run, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "hf auth login" in fails(run, capsys)


def test_somebody_elses_namespace(hub, run, capsys):
    assert "may not write there" in fails(run, capsys, "--repo_id", "somebody/words")


def test_unreachable(hub, run, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    hub_server.point_to(closed, monkeypatch)
    assert "cannot be reached" in fails(run, capsys)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("conflict", "push again"),
        ("full", "no space left"),
        ("busy", "the Hub answered 429: try again later"),
        ("refused", "the Hub answered 400: it refuses what it was sent"),
    ],
)
def test_the_hub_refuses(hub, run, capsys, fault, words, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults = {fault}
    printed = fails(run, capsys)
    assert words in printed
    assert fault != "refused" or "later" not in printed
    assert not hub.repositories[NAME].files()
    hub.faults = set()
    push(run)
    assert "model.safetensors" in hub.repositories[NAME].files()


def test_what_somebody_else_pushes_meanwhile_is_kept(hub, run, capsys, monkeypatch):
    push(run)
    repository = hub.repositories[NAME]
    upload = HfApi.preupload_lfs_files

    def slow(*args, **kwargs):
        upload(*args, **kwargs)
        repository.commit("main", {**repository.files(), "theirs.txt": b"theirs"}, repository.refs["main"])

    (run / "eval_results.json").write_text('{"ours": 1}')
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "preupload_lfs_files", slow)
        assert "push again" in fails(run, capsys)
    assert repository.files()["eval_results.json"] == b"{}"
    push(run)
    assert repository.files()["eval_results.json"] == b'{"ours": 1}'
    assert repository.files()["theirs.txt"] == b"theirs"


def test_a_broken_hub_and_a_broken_card(hub, run, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (run / "run.json").write_text("{")
    assert "run.json is no JSON" in fails(run, capsys)
    assert not hub.repositories
    (run / "run.json").write_text(json.dumps(RUN))
    hub.faults = {"broken"}
    assert "the Hub answered 500" in fails(run, capsys)


def test_an_image_model_and_its_processor(hub, tmp_path):
    torch.manual_seed(0)
    model = TranslutionForImageClassification(
        TranslutionConfig(image_size=8, patch_size=4, num_labels=3, **TINY)
    ).eval()
    model.save_pretrained(tmp_path / "run")
    ImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "run")
    push(tmp_path / "run")
    found = pipeline("image-classification", NAME)(Image.new("RGB", (11, 9), "red"), top_k=3)
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "run")(
        Image.new("RGB", (11, 9), "red"), return_tensors="pt"
    )
    expected = model(**inputs).logits.softmax(-1).sort(descending=True).values[0]
    torch.testing.assert_close(torch.tensor([one["score"] for one in found]), expected)


def test_a_disk_full_while_loading(hub, run, monkeypatch, tmp_path):
    push(run)
    write = Path.open

    def full(path, mode="r", *args, **kwargs):
        if "w" in mode or "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left"):
            AutoModelForCausalLM.from_pretrained(NAME)
    # Nothing half loaded is taken for whole.
    assert_same_model(AutoModelForCausalLM.from_pretrained(NAME), make_model())


def test_a_saved_login_is_enough(hub, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(hub_server.TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    push(run)
    assert "model.safetensors" in hub.repositories[NAME].files()


def test_what_is_no_whole_run_is_not_pushed(hub, run, capsys, tmp_path):
    assert "is no folder" in fails_for(tmp_path / "nowhere", capsys)
    (run / "pytorch_model.bin").write_text("pickle")
    assert "pytorch_model.bin" in fails(run, capsys)
    (run / "pytorch_model.bin").unlink()
    (run / "model.safetensors").unlink()
    assert "has no model.safetensors" in fails(run, capsys)
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": files}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "model-00001-of-00002.safetensors").write_text("here")
    assert "has no model-00002-of-00002.safetensors" in fails(run, capsys)
    (run / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json is damaged" in fails(run, capsys)
    assert not hub.repositories


@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_weights_are_not_pushed(hub, run, capsys, sharded):
    if sharded:
        (run / "model.safetensors").unlink()
        make_model().save_pretrained(run, max_shard_size="5kB")
    path = sorted(run.glob("model*.safetensors"))[-1]
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"", whole + b"more"):
        path.write_bytes(content)
        assert f"{path} is damaged" in fails(run, capsys)
    assert not hub.repositories
    path.write_bytes(whole)
    push(run)


def fails_for(folder: Path, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        push_as_a_command(folder)
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_the_stand_in_is_no_yes_man(hub):
    """What the other tests rely on."""
    api = HfApi()
    api.create_repo(NAME, private=True)
    with pytest.raises(HfHubHTTPError):
        api.create_repo(NAME)
    with pytest.raises(HfHubHTTPError):
        api.create_branch(NAME, branch="main")
    with pytest.raises(HfHubHTTPError):
        api.model_info(NAME, revision="nowhere")
    with pytest.raises(HfHubHTTPError):
        HfApi(token="hf_wrong").whoami()
    assert api.whoami()["name"] == hub_server.USER

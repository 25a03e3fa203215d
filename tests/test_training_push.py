"""What the training scripts push to the Hub, at their checkpoints and in the end: a model, and nothing else."""

import importlib
import json
from pathlib import Path

import hub_server
import pytest


pytest.importorskip("datasets")

NAME = f"{hub_server.USER}/digits"
TINY = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16"
COMMON = f"""--dataset_name digits --image_size 8 --patch_size 4 --max_train_samples 16 --max_eval_samples 8 --max_steps 2
    --config_overrides {TINY}
    --per_device_train_batch_size 4 --save_strategy steps --save_steps 1 --disable_tqdm true --use_cpu true
    --push_to_hub true --hub_model_id {NAME}""".split()
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def run(tmp_path):
    def run(*options):
        folder = tmp_path / "run"
        main = importlib.import_module("run_image_classification").main
        main([*COMMON, "--output_dir", str(folder), *options])
        return folder

    return run


def assert_only_a_model(files):
    assert set(files) >= MODEL
    private = {"training_args.bin", "training_args.json", "arguments.json", "trainer_state.json"}
    assert not set(files) & private
    # The only picture is that of the last evaluation.
    files = set(files) - {"confusion.png"}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".py", ".md"}
    assert not [name for name in files if "/" in name]


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_model_is_pushed_and_nothing_else(hub, run, strategy):
    folder = run("--hub_strategy", strategy)
    commits = [files for files in hub.repositories[NAME].commits.values() if files]
    assert len(commits) == (3 if strategy == "every_save" else 1)
    for files in commits:
        assert_only_a_model(files)
    last = hub.repositories[NAME].files()
    assert last["confusion.png"] == (folder / "confusion.png").read_bytes()
    assert last["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads(last["run.json"])["metrics"] == json.loads((folder / "run.json").read_text())["metrics"]
    assert NAME in last["README.md"].decode()
    assert not list(folder.rglob("training_args.bin"))


def test_a_hub_that_is_down_does_not_end_a_training(hub, run, caplog):
    hub.faults = {"conflict"}
    with pytest.raises(Exception, match="412"):
        run()
    assert "checkpoint-1 was not pushed: somebody else has changed the repository" in caplog.text
    hub.faults = set()
    folder = run()
    assert hub.repositories[NAME].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_checkpoints_are_not_pushed(hub, run):
    with pytest.raises(ValueError, match=r"`hub_strategy` must be 'end' or 'every_save', .* got 'all_checkpoints'"):
        run("--hub_strategy", "all_checkpoints")
    assert not hub.repositories

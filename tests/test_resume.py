"""A run that is killed again and again ends with exactly the weights and figures of one that was left alone.

Bit for bit, on any processor: each run trains in one thread of a process of the same kind, and what it resumes from is
copied into memory that PyTorch aligns as it does that of a new model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.checkpoints import UNAVERAGED


pytest.importorskip("datasets")
pytest.importorskip("kornia")

WORKER = Path(__file__).parent / "resume_worker.py"
KILLED = -9
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork")


def worker(kind, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["whole"] == report["finished"] == 0, done.stderr[-3000:]
    assert report["killed"][:-3] == [KILLED] * len(report["killed"][:-3]), done.stderr[-3000:]
    # The last ones are killed at random moments, and may come to their end before.
    assert set(report["killed"][-3:]) <= {KILLED, 0}
    assert KILLED in report["killed"][-3:]
    assert report["last save"] == KILLED, done.stderr[-3000:]
    return report


def figures(folder):
    timing = ("runtime", "per_second", "total_flos", "train_loss")
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [
        {name: value for name, value in entry.items() if not name.endswith(timing)} for entry in state["log_history"]
    ]
    # The summary of a run is about what it did since it was resumed.
    steps = [entry for entry in history if set(entry) != {"epoch", "step"}]
    return (
        steps,
        state["best_metric"],
        state["best_global_step"],
        json.loads((folder / "run.json").read_text())["metrics"],
    )


def assert_same(folder, *more):
    for name in ("model.safetensors", "checkpoint-20/model.safetensors", *more):
        assert (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes()
    assert figures(folder / "whole") == figures(folder / "killed")


def test_image_training_goes_on_where_it_was_killed(tmp_path):
    report = worker("image", tmp_path)
    # Before the first checkpoint, in the second one, and before the third one got its name.
    assert report["checkpoints"][:3] == [[], ["checkpoint-4"], ["checkpoint-4", "checkpoint-8"]]
    # The models are averages of weights here, and lie beside those.
    assert_same(tmp_path, f"checkpoint-20/{UNAVERAGED}")


def test_text_training_goes_on_where_it_was_killed(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        (texts / f"{index}.txt").write_text(" ".join(f"{index * step % 97} and" for step in range(60)))
    report = worker("text", tmp_path)
    assert report["checkpoints"][:3] == [[], [], ["checkpoint-4"]]
    first, last = report["blocks"][0], report["blocks"][-1]
    # Three parts were tokenised before the kill; nobody tokenises them again.
    assert len(first) == 3
    assert all(last[name] == moment for name, moment in first.items())
    assert_same(tmp_path)

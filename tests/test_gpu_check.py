"""`scripts/gpu_check.py` as far as it runs without a GPU."""

import csv
import importlib

import pytest
import torch


pytest.importorskip("triton")


@pytest.fixture
def gpu_check():
    """`scripts/gpu_check.py`."""
    return importlib.import_module("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for the interpreter")
def test_dry_run_writes_a_row_for_every_part(gpu_check, tmp_path):
    path = tmp_path / "gpu.csv"
    assert gpu_check.main(["--dry_run", "--output", str(path)]) == 0
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    parts = {"check", "rate", "mixer", "gathering", "basis", "local", "training", "digits"}
    assert {row["part"] for row in rows} == parts
    assert all(row["commit"] and row["torch"] == torch.__version__ and row["gpu"] == "none" for row in rows)
    assert all(row["ok"] == "True" and float(row["error"]) < 0.01 for row in rows if row["part"] == "check")


def test_nothing_is_timed_after_a_wrong_result(gpu_check, tmp_path, monkeypatch, capsys):
    # Whatever is computed: the check itself runs above.
    monkeypatch.setattr(gpu_check, "results", lambda *inputs: {"output": torch.full((2,), torch.nan)})
    monkeypatch.setattr(gpu_check, "DTYPES", {"float32": torch.float32, "float16": torch.float32})
    monkeypatch.setattr(gpu_check, "matrix_rate", lambda bench: pytest.fail("timed"))
    assert gpu_check.main(["--dry_run", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert "nothing is timed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_check, capsys):
    run_command = importlib.import_module("common.command").run_command
    with pytest.raises(SystemExit) as exit_:
        run_command(gpu_check.main, [])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no GPU")

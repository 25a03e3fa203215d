"""Scripts as a user calls them: what is wrong is one line and a status of 1 or 2, and no traceback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.command import ArgumentParser, run_command

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8, "intermediate_size": 8}
# Script, arguments, status, and words of its last line.
CALLS = [
    ("predict", ["nowhere", "x"], 1, "error: there is no folder 'nowhere', and it is no name of a repository"),
    ("look", ["nowhere", "--output", "x.png"], 1, "error: there is no folder 'nowhere'"),
    ("run_clm", ["--train_file", "nowhere.txt", "--output_dir", "out"], 1, "there is no nowhere.txt"),
    ("run_image_classification", ["--train_dir", "nowhere", "--output_dir", "out"], 1, "`train_dir` must be a folder"),
    ("push_to_hub", ["nowhere", "--repo_id", "a/b"], 1, "error: nowhere is no folder"),
    ("convert_original_to_hf", ["--checkpoint", "nowhere", "--output", "out"], 1, "'nowhere'"),
    ("convert_attention_to_translution", ["--model", "nowhere", "--output", "out"], 1, "no folder 'nowhere'"),
    ("quantize", ["nowhere", "--output", "out"], 1, "error: there is no folder 'nowhere'"),
    ("sweep", ["nowhere.yaml", "--output_dir", "out"], 1, "error: There is no recipe nowhere.yaml"),
    ("model_card", ["nowhere"], 1, "run.json is missing"),
    ("benchmark", ["--repeats", "0"], 2, "--repeats must be at least 1, got 0"),
    ("gpu_check", ["--minutes", "soon"], 2, "invalid float value: 'soon'"),
]


@pytest.mark.parametrize(("script", "arguments", "status", "words"), CALLS, ids=[call[0] for call in CALLS])
def test_wrong_usage_is_one_line(script, arguments, status, words, tmp_path, monkeypatch, capsys):
    main = __import__(script).main
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_command(main, arguments)
    assert exit_.value.code == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    # Before it, and that of `argparse` alone, there is how the script is called.
    assert status == 2 or len(lines) == 1


def test_a_script_that_is_called_exits_so(tmp_path):
    """All scripts end in the same way, which is tried in a process of its own."""
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and path.stem not in ("demo", "study"):
            assert text.rstrip().splitlines()[-1].startswith("    run_command(main"), path.name
    code = "from common.command import run_command\ndef main(arguments): open(arguments[0])\nrun_command(main, ['nowhere'])"
    options = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(SCRIPTS)},
        "capture_output": True,
        "text": True,
    }
    done = subprocess.run([sys.executable, "-c", code], check=False, **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: [Errno 2] No such file or directory: 'nowhere'\n"
    shown = subprocess.run([sys.executable, "-X", "dev", "-W", "ignore", "-c", code], check=False, **options)
    assert shown.stderr.startswith("Traceback")


def test_no_token_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def refuse(arguments):
        raise ValueError("`name` must be short,\n got hf_secret.")

    with pytest.raises(SystemExit):
        run_command(refuse, [])
    assert capsys.readouterr().err == "error: `name` must be short, got ….\n"
    parser = ArgumentParser()
    for left in (["--token", "hf_other"], ["--token=hf_other"], ["hf_other"]):
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(left)
        assert exit_.value.code == 2
        assert "hf_other" not in capsys.readouterr().err


def test_a_fault_of_the_code_keeps_its_traceback():
    def broken(arguments):
        return [][1]

    with pytest.raises(IndexError):
        run_command(broken, [])


def image_model(folder: Path, num_labels: int = 3) -> Path:
    config = TranslutionConfig(image_size=8, patch_size=4, num_labels=num_labels, **TINY)
    TranslutionForImageClassification(config).save_pretrained(folder)
    return folder


def last_line(script: str, arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_command(__import__(script).main, arguments)
    assert exit_.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def data(monkeypatch, tmp_path):
    """Options of the training scripts that need nothing from elsewhere."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    small = ["--max_train_samples", "4", "--max_eval_samples", "2", "--use_cpu", "true"]
    return ["--dataset_name", "digits", *small, "--output_dir", str(tmp_path / "run")]


def test_another_number_of_classes_says_what_to_do(tmp_path, data, capsys):
    model = image_model(tmp_path / "model")
    line = last_line("run_image_classification", [*data, "--model_name_or_path", str(model)], capsys)
    assert "classifier.weight must have the shape [10, 8], got [3, 8]" in line
    assert line.endswith("`--ignore_mismatched_sizes` starts these anew.")


@pytest.mark.parametrize("script", ["run_image_classification", "run_clm"])
def test_a_model_that_is_not_there_is_a_folder_that_is_not_there(script, tmp_path, data, capsys):
    line = last_line(script, [*data, "--model_name_or_path", "nowhere"], capsys)
    assert line.startswith("error: `model_name_or_path`: there is no folder 'nowhere'")


def test_a_folder_without_what_makes_inputs(tmp_path, data, capsys):
    """The error is about the folder and its file; Transformers' own is about the Hub."""
    model = image_model(tmp_path / "model", 10)
    line = last_line("run_image_classification", [*data, "--model_name_or_path", str(model)], capsys)
    assert line.startswith(f"error: the folder {model} has no image processor: there is no preprocessor_config.json")
    config = TranslutionConfig(modality="text", vocab_size=260, max_position_embeddings=24, **TINY)
    TranslutionForCausalLM(config).save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    arguments = ["--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "run")]
    line = last_line("run_clm", [*arguments, "--model_name_or_path", str(tmp_path / "words")], capsys)
    assert line.startswith(
        f"error: the folder {tmp_path / 'words'} has no tokenizer: there is no tokenizer_config.json"
    )


@pytest.mark.parametrize("script", ["predict", "run_image_classification"])
def test_a_pickle_that_cannot_be_read(script, tmp_path, data, capsys):
    model = image_model(tmp_path / "model", 10)
    (model / "model.safetensors").unlink()
    torch.save({"weight": os.getcwd}, model / "pytorch_model.bin")
    arguments = [str(model), "x"] if script == "predict" else [*data, "--model_name_or_path", str(model)]
    line = last_line(script, arguments, capsys)
    assert line.startswith(f"error: pytorch_model.bin of {model} must hold tensors by name, but cannot be read")


def test_a_service_that_is_not_installed(data, monkeypatch, capsys):
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setattr(integrations, "is_wandb_available", lambda: False)
    sizes = ["--image_size", "16", "--patch_size", "8", "--config_overrides", json.dumps(TINY)]
    assert "wandb" in last_line("run_image_classification", [*data, *sizes, "--report_to", "wandb"], capsys)


def test_overrides_that_are_no_json(data, capsys):
    line = last_line("run_image_classification", [*data, "--config_overrides", "{hidden_size: 8}"], capsys)
    assert line.startswith("error: `config_overrides` that begin with '{' must be a JSON object: ")


def test_a_config_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    config, output = str(tmp_path / "config.json"), str(tmp_path / "out")
    line = last_line("convert_original_to_hf", ["--checkpoint", "x", "--output", output, "--config", config], capsys)
    assert line.startswith(f"error: `config` must be a JSON file, {config} is none: ")


def test_a_prompt_is_text(tmp_path, monkeypatch, capsys):
    from training.tokenizer import train_tokenizer

    config = TranslutionConfig(modality="text", vocab_size=260, max_position_embeddings=24, pad_token_id=0, **TINY)
    TranslutionForCausalLM(config).save_pretrained(tmp_path)
    train_tokenizer(["the cat sat on the mat"], 260, 12).save_pretrained(tmp_path)
    line = last_line("predict", [str(tmp_path), "caf\udce9"], capsys)
    assert line.startswith("error: a prompt must be text in UTF-8: ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    line = last_line("predict", [str(tmp_path), "-"], capsys)
    assert line.startswith("error: standard input must be text in UTF-8: ")

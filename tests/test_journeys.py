"""`docs/journeys.md` at small size: its commands in their order, as they are typed there, and its Python."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_docs
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import translution  # noqa: F401 (registers the Auto classes)


datasets = pytest.importorskip("datasets")

PAGE = test_docs.PAGES["docs/journeys.md"]
TINY = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16"
TRAINING = f"--config_overrides {TINY} --save_strategy no --disable_tqdm true --use_cpu true".split()
# What makes a command of the page a short one.
SHORT = {
    "run_image_classification": [*TRAINING, "--max_steps", "40", "--learning_rate", "0.01"],
    "run_clm": [
        *TRAINING,
        "--max_steps",
        "40",
        "--learning_rate",
        "0.02",
        "--vocab_size",
        "300",
        "--block_size",
        "64",
    ],
}


@pytest.fixture
def journey(tmp_path, monkeypatch):
    """Runs what a section of the page says in a new folder: a generator of each command, and of its Python block at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(heading: str) -> Iterator[str]:
        text = test_docs.read(PAGE)
        start = text[: text.index(f"\n## {heading}\n")].count("\n") + 1
        end = start + text.split(f"\n## {heading}\n")[1].split("\n## ")[0].count("\n") + 1
        for line, (program, script, *arguments) in test_docs.commands(PAGE):
            if start < line <= end:
                assert program == "python"
                name = Path(script).stem
                importlib.import_module(name).main([*arguments, *SHORT.get(name, [])])
                yield name
        (code,) = (code for line, code, _ in test_docs.blocks(PAGE, "python") if start < line <= end)
        exec(compile(code, PAGE.name, "exec"), {})
        yield "python"

    return run


def test_from_pictures_to_onnx(journey, capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install translution[onnx]")
    # Bright above and dark below, or the other way round: neither sort of picture is as large as the model's input.
    random = np.random.default_rng(0)
    for name, turn in (("day", 1), ("night", -1)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 60, (20, 18 + index, 3)) + 180 * np.repeat([1, 0], 10)[::turn, None, None]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{index}.png")
    Image.open(tmp_path / "pictures" / "night" / "3.png").save("new.png")
    done = []
    for name in journey("From pictures to ONNX"):
        done.append(name)
        printed = capsys.readouterr().out
        if name == "predict":
            # The picture, then the likelier class.
            assert printed.split()[0] == "new.png"
            assert printed.split()[2] == "night"
    assert done == ["run_image_classification", "predict", "export", "python"]
    assert printed.split() == ["night"]
    # The page's own reading of a picture gives the processor's pixels, and the file the model's logits.
    import onnxruntime

    classifier = pipeline("image-classification", "runs/pictures")
    pixels = classifier.image_processor(Image.open("new.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = classifier.model(pixels).logits
    (logits,) = onnxruntime.InferenceSession("pictures.onnx").run(None, {"pixel_values": pixels.numpy()})
    # As `export.py` allows.
    assert (torch.from_numpy(logits) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_from_texts_to_a_quantised_generator(journey, capsys, tmp_path):
    pytest.importorskip("torchao", reason="pip install translution[quantize]")
    (tmp_path / "texts").mkdir()
    for index in range(12):
        (tmp_path / "texts" / f"{index}.txt").write_text("Once upon a time there was a cat. " * 20)
    done, printed = [], {}
    for name in journey("From texts to a quantised generator"):
        done.append(name)
        printed[name] = capsys.readouterr().out
    assert done == ["run_clm", "quantize", "predict", "python"]
    # The command and the pipeline go on alike, and with what was trained on.
    assert printed["predict"] == printed["python"]
    assert printed["predict"].startswith("Once upon a time there was a cat. Once upon")
    # Its weights are integers, and say what those of the model say that it was made from.
    small, whole = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("runs/texts-int8", "runs/texts"))
    assert small.model.layers[0].mixer.k_bank.qdata.dtype == torch.int8
    tokens = AutoTokenizer.from_pretrained("runs/texts-int8")("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found, expected = (model(tokens).logits for model in (small, whole))
    assert (found - expected).norm() <= expected.norm() / 20

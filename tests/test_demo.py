"""The demo runs, its files load, and its data are what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import torch
from digits_processor import digits_processor
from huggingface_hub import ModelCard
from PIL import Image
from studies.examples import cut, text_batches, token_blocks
from training.digits import DigitCanvases, digits_split
from training.standard_library import read_texts, split_files, standard_library_files
from training.tokenizer import END_OF_TEXT, train_tokenizer
from transformers import pipeline

import translution  # noqa: F401 (registers the Auto classes)


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def digits():
    return digits_split()


def canvases(digits, placement, seed=0, epoch=0):
    places = DigitCanvases(digits[0], placement, seed)
    places.set_epoch(epoch)
    return torch.stack([places.canvas(index) for index in range(200)])


def test_demo_writes_what_it_says(tmp_path):
    folder = tmp_path / "demo"
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--quick", "--output_dir", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "| local Translution |" in run.stdout

    report = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    # Local Translution is compared with attention of as many parameters.
    for part in ("images", "text"):
        rival, local = report[part]["models"][:2]
        assert (rival["model"], local["model"]) == ("attention, rotary", "local Translution")
        assert rival["parameters"] == pytest.approx(local["parameters"], rel=0.01)
    assert all(
        set(row["accuracy"]) == {"static → static", "static → dynamic", "dynamic → dynamic"}
        for row in report["images"]["models"]
    )
    assert all(row["perplexity"] > 1 for row in report["text"]["models"])
    assert report["fresh_process"]["images"]["predictions"] == report["images"]["predictions"]
    assert {"command", "seed", "machine", "seconds"} <= set(report)
    assert {"commit", "device", "threads", "torch", "transformers", "python", "gpu"} <= set(report["machine"])
    with Image.open(folder / "demo.png") as picture:
        assert picture.width > 1000

    found = pipeline("image-classification", model=str(folder / "image-model"), device="cpu")(Image.new("L", (16, 16)))
    assert found[0]["label"] in list("0123456789")
    generator = pipeline("text-generation", model=str(folder / "text-model"), device="cpu")
    assert generator("def ", max_new_tokens=2)[0]["generated_text"].startswith("def ")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]

    # The cards tell what the demo found, and by which command.
    for model, metric, value in (
        ("image-model", "accuracy", report["images"]["accuracy"] / 100),
        ("text-model", "perplexity", report["text"]["perplexity"]),
    ):
        card = ModelCard.load(folder / model / "README.md")
        (result,) = card.data.eval_results
        assert (result.metric_type, result.metric_value) == (metric, value)
        assert card.data.datasets is None
        assert "python scripts/demo.py --quick --output_dir demo" in card.text
        assert str(tmp_path) not in card.text
        assert json.loads((folder / model / "run.json").read_text(encoding="utf-8"))["metrics"] == {metric: value}


def test_failure_keeps_old_output(tmp_path):
    folder = tmp_path / "demo"
    with demo.replaced_when_done(folder) as new:
        (new / demo.REPORT).write_text("old")

    def fail():
        with demo.replaced_when_done(folder) as new:
            (new / demo.REPORT).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (folder / demo.REPORT).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]

    with demo.replaced_when_done(folder) as new:
        (new / demo.REPORT).write_text("new")
    assert (folder / demo.REPORT).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an earlier output"), demo.replaced_when_done(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_static_digits_are_in_the_middle(digits):
    drawn = canvases(digits, "static")
    assert torch.equal(drawn[:, 4:12, 4:12], digits[0].images[:200])
    drawn[:, 4:12, 4:12] = 0
    assert not drawn.any()


def test_dynamic_digits_are_whole_and_anywhere(digits):
    places = DigitCanvases(digits[0], "dynamic")
    assert {tuple(corner) for corner in places.corners.tolist()} == {(x, y) for x in range(9) for y in range(9)}
    for index in range(50):
        top, left = places.corners[index]
        canvas = places.canvas(index)
        assert torch.equal(canvas[top : top + 8, left : left + 8], digits[0].images[index])
        assert canvas.sum() == digits[0].images[index].sum()


def test_places_depend_on_seed_and_epoch_alone(digits):
    drawn = canvases(digits, "dynamic", seed=1, epoch=2)
    assert torch.equal(drawn, canvases(digits, "dynamic", seed=1, epoch=2))
    assert not torch.equal(drawn, canvases(digits, "dynamic", seed=1, epoch=3))
    assert not torch.equal(drawn, canvases(digits, "dynamic", seed=2, epoch=2))
    with pytest.raises(ValueError, match="placement"):
        DigitCanvases(digits[0], "moving")


def test_held_out_digits_are_no_training_digits(digits):
    train, test = digits
    assert len(train) + len(test) == 1797
    assert torch.equal(test.images, digits_split()[1].images)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert test.labels.unique().tolist() == list(range(10))


def test_processor_makes_the_inputs_of_training(digits):
    places = DigitCanvases(digits[1].first(4), "dynamic")
    inputs = digits_processor()(images=places.pictures(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs, torch.stack([places[index]["pixel_values"] for index in range(4)]))
    assert inputs.shape == (4, 3, 16, 16)


def test_held_out_files_are_no_training_files():
    files = standard_library_files()
    train, held_out = split_files(files)
    assert sorted(train + held_out) == files
    assert not {path.read_bytes() for path in train} & {path.read_bytes() for path in held_out}
    assert 0.03 < len(held_out) / len(files) < 0.3
    assert split_files(reversed(files))[1] == held_out[::-1]


def test_tokens_give_back_the_text():
    texts = list(read_texts(standard_library_files()[:2]))
    tokenizer = train_tokenizer(texts, 400, 16)
    again = train_tokenizer(texts, 400, 16)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert len(tokenizer) == 400
    unseen = "def größe(x):\n\treturn  x ** 2 # 平方\n"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen

    blocks = token_blocks(texts, tokenizer, 16)
    text = tokenizer.decode(blocks.flatten())
    assert (texts[0] + END_OF_TEXT + texts[1]).startswith(text)
    (batch,) = text_batches(blocks, 0, 1, 2)
    assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(batch["input_ids"], batch["labels"])
    with pytest.raises(ValueError, match="needs 16 tokens"):
        cut(torch.arange(15), 16)

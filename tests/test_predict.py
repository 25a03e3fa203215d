"""`scripts/predict.py` against the model asked directly."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import predict
import pytest
import torch
from common.command import run_command
from PIL import EpsImagePlugin, Image
from training.tokenizer import train_tokenizer
from transformers import ViTImageProcessorPil as ImageProcessor

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}
NAMES = ["cat", "dog", "zebra [x]"]


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = TranslutionForImageClassification(TranslutionConfig(image_size=8, patch_size=4, **labels, **TINY)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    # In float64 no rounding reaches what is printed.
    model.double()
    processor = ImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(tmp_path / "classifier")
    processor.save_pretrained(tmp_path / "classifier")
    return model, processor, str(tmp_path / "classifier")


@pytest.fixture
def writer(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"], 260, 12)
    config = TranslutionConfig(modality="text", vocab_size=260, max_position_embeddings=24, pad_token_id=0, **TINY)
    model = TranslutionForCausalLM(config).double().eval()
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    return model, tokenizer, str(tmp_path / "writer")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_classes_and_probabilities(classifier, mode, tmp_path, capsys):
    model, processor, folder = classifier
    pixels = torch.randint(0, 255, (9, 11, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(pixels.numpy()).convert(mode)
    picture.save(tmp_path / "picture.png")
    inputs = processor(picture.convert("RGB"), return_tensors="pt")
    probabilities = model(**inputs).logits.softmax(-1)[0]
    order = probabilities.argsort(descending=True)[:2]
    predict.main([folder, str(tmp_path / "picture.png"), "--top_k", "2"])
    lines = [f"  {probabilities[i].item():7.2%}  {NAMES[i]}" for i in order]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "picture.png"), *lines]


def test_grey_of_16_bits(classifier, tmp_path, capsys):
    folder, pixels = classifier[2], np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8)
    found = []
    for values in (pixels, pixels.astype(np.uint16) * 257):
        Image.fromarray(values).save(tmp_path / "picture.png")
        predict.main([folder, str(tmp_path / "picture.png")])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_postscript_is_no_picture(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("another program was run"))
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    printed = fails(capsys, classifier[2], str(path))
    assert printed == f"error: {str(path)!r} is no picture of the formats PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM\n"


def test_several_pictures_and_standard_input(classifier, tmp_path, capsys, monkeypatch):
    _, _, folder = classifier
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    predict.main([folder, str(tmp_path / "red.png"), str(tmp_path / "blue.png")])
    both = capsys.readouterr().out.splitlines()
    assert len(both) == 2 * (1 + len(NAMES))
    stdin = type("Stdin", (), {"buffer": io.BytesIO((tmp_path / "blue.png").read_bytes())})
    monkeypatch.setattr(sys, "stdin", stdin)
    predict.main([folder, "-"])
    assert capsys.readouterr().out.splitlines()[1:] == both[5:]


def test_text_goes_on_as_the_model_alone_would(writer, capsys, monkeypatch):
    model, tokenizer, folder = writer
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[0] -= 10  # the end of the text, which would not be shown
    model.save_pretrained(folder)
    for _ in range(4):  # greedy, without `generate` and without a cache
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    predict.main([folder, "the cat", "--max_new_tokens", "4"])
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    predict.main([folder, "-", "--max_new_tokens", "4"])
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"


def test_a_seed_repeats_the_choice(writer, capsys):
    _, _, folder = writer
    outputs = []
    for seed in (1, 1, 2, 3, 4):
        options = ["--temperature", "2", "--seed", str(seed), "--max_new_tokens", "8"]
        predict.main([folder, "the", *options])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) > 1


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run_command(predict.main, arguments)
    assert error.value.code in (1, 2)
    return capsys.readouterr().err


def test_errors_say_what_is_wrong(classifier, writer, tmp_path, capsys):
    classifier, writer = classifier[2], writer[2]
    (tmp_path / "note.png").write_text("no picture")
    assert "note.png' is no picture of the formats" in fails(capsys, classifier, str(tmp_path / "note.png"))
    assert "there is no picture 'a cat'" in fails(capsys, classifier, "a cat")
    Image.effect_noise((40, 40), 50).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    assert "short.png' cannot be read: " in fails(capsys, classifier, str(tmp_path / "short.png"))
    assert f"there is none in {classifier!r}" in fails(capsys, classifier, classifier)
    assert "whole.png' is a picture; the model goes on with text" in fails(capsys, writer, str(tmp_path / "whole.png"))
    assert "`top_k` must be at least 1, got 0" in fails(capsys, classifier, "x", "--top_k", "0")
    assert "`batch_size` must be at least 1, got 0" in fails(capsys, classifier, "x", "--batch_size", "0")
    assert "`top_p` must be greater than 0 and at most 1, got 2.0" in fails(capsys, writer, "x", "--top_p", "2")
    assert "`temperature` must be at least 0, got -1.0" in fails(capsys, writer, "x", "--temperature", "-1")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in fails(capsys, str(empty), "x")
    (Path(classifier) / "preprocessor_config.json").unlink()
    assert fails(capsys, classifier, str(tmp_path / "whole.png")) == (
        f"error: the folder {classifier} has no image processor: there is no preprocessor_config.json or "
        "processor_config.json\n"
    )
    for tokenizer_file in Path(writer).glob("tokenizer*"):
        tokenizer_file.unlink()
    assert fails(capsys, writer, "the").startswith(
        f"error: the folder {writer} has no tokenizer: there is no tokenizer_config.json or tokenizer.json or "
    )


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("config.json", {"mixer_types": "nope"}, "the config of FOLDER is damaged: `mixer_types` must be one of"),
        ("config.json", {"hidden_size": "x"}, "the config of FOLDER is damaged: Field 'hidden_size' expected int"),
        ("config.json", {"id2label": 5}, "the config of FOLDER is damaged: "),
        ("config.json", {"architectures": 3}, "`architectures` of FOLDER must be one of"),
        ("config.json", None, "the config of FOLDER is damaged: "),
        ("preprocessor_config.json", [1], "the image processor of FOLDER is damaged: "),
    ],
)
def test_a_damaged_config(classifier, file, value, words, capsys):
    path = Path(classifier[2]) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **value} if isinstance(value, dict) else value))
    printed = fails(capsys, classifier[2], "picture.png")
    assert printed.startswith("error: " + words.replace("FOLDER", classifier[2]))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "runs/a/b", "runs/digits/", "my run", ""])
def test_a_folder_that_is_not_there(name, capsys):
    assert f"there is no folder {name!r}, and it is no name of a repository" in fails(capsys, name, "picture.png")


def test_a_picture_that_pillow_chokes_on(classifier, tmp_path, capsys):
    """Not every decoder's error is an OSError."""
    Image.effect_noise((40, 40), 50).save(tmp_path / "picture.png")
    content = bytearray((tmp_path / "picture.png").read_bytes())
    content[20] ^= 1  # the height, so that the checksum is wrong
    (tmp_path / "picture.png").write_bytes(content)
    assert f"{str(tmp_path / 'picture.png')!r} " in fails(capsys, classifier[2], str(tmp_path / "picture.png"))


@pytest.fixture
def folder_of_pictures(tmp_path):
    """Five pictures, and what is none."""
    folder = tmp_path / "pictures"
    for index, name in enumerate(("b.png", "a/2.PNG", "a/1.png", "a/b/c.png", "z.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")
    for name in ("notes.txt", "a/._1.png", "__MACOSX/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no picture")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_a_folder_becomes_rows(classifier, folder_of_pictures, batch_size, capsys):
    model, processor, saved = classifier
    names = [str(folder_of_pictures / name) for name in ("a/1.png", "a/2.PNG", "a/b/c.png", "b.png", "z.png")]
    outputs = [folder_of_pictures / "rows.json", folder_of_pictures / "rows.csv"]
    options = ["--top_k", "2", "--batch_size", str(batch_size), "--json", str(outputs[0]), "--csv", str(outputs[1])]
    predict.main([saved, str(folder_of_pictures), names[0], *options])
    assert capsys.readouterr().out == ""
    rows = json.loads(outputs[0].read_text(encoding="utf-8"))
    assert [row["file"] for row in rows] == [name for name in (*names, names[0]) for _ in range(2)]
    for name, first, second in zip((*names, names[0]), rows[::2], rows[1::2], strict=True):
        with Image.open(name) as picture:
            probabilities = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
        order = probabilities.argsort(descending=True)
        assert [first["label"], second["label"]] == [NAMES[i] for i in order[:2]]
        # Processors work in float32, whatever the number of pictures, and the model in float64.
        assert [first["probability"], second["probability"]] == pytest.approx(
            probabilities[order[:2]].tolist(), abs=1e-6
        )
    with outputs[1].open(newline="", encoding="utf-8") as file:
        assert [{**row, "probability": float(row["probability"])} for row in csv.DictReader(file)] == rows


def test_rows_of_text_on_standard_output(writer, capsys):
    options = ["the cat", 'a "mat",\nthe', "--max_new_tokens", "4"]
    predict.main([writer[2], *options])
    printed = capsys.readouterr().out
    predict.main([writer[2], *options, "--json", "-"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == options[:2]
    assert "".join(row["prompt"] + row["continuation"] + "\n" for row in rows) == printed
    predict.main([writer[2], *options, "--csv", "-"])
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline=""))) == rows


def test_a_failed_run_leaves_the_rows_of_the_last_one(classifier, folder_of_pictures, tmp_path, capsys, monkeypatch):
    target = tmp_path / "rows" / "rows.csv"
    target.parent.mkdir()
    arguments = [classifier[2], str(folder_of_pictures), "--csv", str(target)]
    predict.main(arguments)
    before = target.read_bytes()
    (folder_of_pictures / "z.png").write_text("no picture")
    assert "z.png' is no picture" in fails(capsys, *arguments, "--batch_size", "2")
    (folder_of_pictures / "z.png").unlink()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in fails(capsys, *arguments)
    assert {path: path.read_bytes() for path in target.parent.iterdir()} == {target: before}


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load", lambda *_: pytest.fail("a model was loaded"))
    picture = tmp_path / "a.png"
    picture.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(picture)
    for options, words in (
        (["--json", str(tmp_path)], f"`json` must be a file, or - for standard output, got {tmp_path}"),
        (["--csv", str(tmp_path / "no" / "x.csv")], f"`csv` must be in a folder that is there, got {tmp_path}"),
        (["--json", "-", "--csv", "-"], "`json` and `csv` must be two outputs, got - for both"),
        (
            [str(picture), "--csv", str(picture)],
            "`csv` must be another file than the inputs, which it would replace, got ",
        ),
        ([str(tmp_path), "--json", str(tmp_path / "link.png")], "`json` must be another file than the inputs, "),
    ):
        assert words in fails(capsys, "model", "x", *options)


def test_a_name_that_is_not_utf8(classifier, folder_of_pictures, tmp_path, capsys, monkeypatch):
    # Given by name and read elsewhere: not every file system takes such names.
    odd, target = "caf\udce9.png", tmp_path / "rows.json"
    read = predict.read_picture
    monkeypatch.setattr(
        predict, "read_picture", lambda path: read(folder_of_pictures / "z.png" if path == odd else path)
    )
    folder = str(folder_of_pictures / "a" / "b")
    predict.main([classifier[2], folder, odd, "--top_k", "1", "--json", str(target)])
    found = [Path(row["file"]).name for row in json.loads(target.read_text(encoding="utf-8"))]
    assert found == ["c.png", "caf\\udce9.png"]

"""Pictures on a larger canvas: where they lie, when they move, and what the training script makes of the options."""

import csv
import importlib
import json
import shlex
from pathlib import Path

import numpy as np
import predict
import pytest
import torch
from common.canvas import Canvas
from PIL import Image
from torch.utils.data import DataLoader
from training.digits import digits_split
from transformers import AutoImageProcessor, ViTImageProcessorPil


datasets = pytest.importorskip("datasets")
augmentation = importlib.import_module("training.augmentation")
script = importlib.import_module("run_image_classification")
SIZE = 13
SMALL = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16"


def digits(count=12):
    """Pictures of 8 × 8 pixels, none of them black, as a data set has them."""
    images = digits_split()[0].images[:count] // 2 + 100
    return [{"image": Image.fromarray(image.numpy()), "label": index % 3} for index, image in enumerate(images)]


def transform(placement, size=SIZE, **options):
    # Pixels are 0 to 1, so that what is empty is 0.
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, do_convert_rgb=True, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    return augmentation.ImageTransform(
        processor, augmentation.AugmentationArguments(**options), Canvas(size, placement)
    )


def samples(placement, rows, seed=None, epoch=0):
    data = augmentation.ImageSamples(rows, transform(placement), seed)
    data.set_epoch(epoch)
    return data


def corners(data):
    """Row and column of each picture's top left corner; the canvas has nothing but the picture."""
    found = []
    for row, item in zip(data.data, data, strict=True):
        pixels = item["pixel_values"]
        assert pixels.shape == (3, SIZE, SIZE)
        filled = pixels[0].nonzero()
        top, left = filled.min(0).values.tolist()
        picture = torch.from_numpy(np.array(row["image"])).float() / 255
        height, width = picture.shape
        # Both are the same bytes over 255, divided once in each.
        torch.testing.assert_close(pixels[:, top : top + height, left : left + width], picture.expand(3, -1, -1))
        assert len(filled) == picture.numel()
        found.append((top, left))
    return found


@pytest.mark.parametrize("seed", [None, 3])
def test_static_pictures_are_in_the_middle(seed):
    assert corners(samples("static", digits(), seed)) == [(2, 2)] * 12


def test_oblong_pictures_are_placed_by_each_side():
    row = {"image": Image.new("L", (4, 11), 200), "label": 0}
    assert corners(samples("static", [row])) == [(1, 4)]
    found = {Canvas(SIZE, "dynamic").place(row["image"], np.random.default_rng(n)).getbbox()[:2] for n in range(400)}
    assert found == {(left, top) for left in range(10) for top in range(3)}


def test_dynamic_pictures_move_between_epochs_and_not_between_runs():
    rows = digits()
    first = corners(samples("dynamic", rows, seed=3))
    assert first == corners(samples("dynamic", rows, seed=3))
    assert len(set(first)) > 6
    for other in (samples("dynamic", rows, seed=3, epoch=1), samples("dynamic", rows, seed=4)):
        assert sum(a == b for a, b in zip(first, corners(other), strict=True)) < 6


def test_every_place_is_reached():
    rows = digits(1) * 600
    counts = np.unique(corners(samples("dynamic", rows, seed=0)), axis=0, return_counts=True)[1]
    # 36 places with 600 / 36 = 16.7 pictures each, on average.
    assert len(counts) == 36
    assert counts.max() < 4 * 16.7


def test_loading_processes_do_not_matter():
    data = samples("dynamic", digits(), seed=3, epoch=2)
    alone = torch.stack([item["pixel_values"] for item in data])
    loader = DataLoader(data, 4, collate_fn=augmentation.ImageBatch(3, data.transform.args), num_workers=2)
    # A pixel in another place differs by at least 100 / 255.
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in loader]), alone)


def test_places_of_evaluation_are_fixed():
    rows = digits()
    places = corners(samples("dynamic", rows))
    assert len(set(places)) > 6
    assert corners(samples("dynamic", rows, epoch=1)) == places
    # Nor do the order and the way of reading matter.
    assert corners(samples("dynamic", rows[::-1])) == places[::-1]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    streamed = [item["pixel_values"] for item in augmentation.ImageStream(stream, transform("dynamic"))]
    assert [tuple(pixels[0].nonzero().min(0).values.tolist()) for pixels in streamed] == places


def test_a_place_does_not_depend_on_the_augmentation():
    pictures = digits()
    flipped = augmentation.ImageSamples(pictures, transform("dynamic", flip_probability=1.0), seed=3)
    for item, plain in zip(flipped, samples("dynamic", pictures, seed=3), strict=True):
        torch.testing.assert_close(item["pixel_values"], plain["pixel_values"].flip(-1))


@pytest.mark.parametrize("placement", ["static", "dynamic"])
@pytest.mark.parametrize(("width", "height"), [(14, 8), (8, 14)])
def test_a_larger_picture_is_an_error(placement, width, height):
    row = {"image": Image.new("L", (width, height)), "label": 0}
    words = rf"picture without a name cannot be used: `canvas_size` must be .* got 13 × 13 .* picture of {height} × {width}\."
    with pytest.raises(ValueError, match=words):
        samples(placement, [row])[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"canvas_size": 0}, "`canvas_size` must be an integer of at least 1, got 0"),
        ({"canvas_size": 8, "placement": "middle"}, "`placement` must be one of static, dynamic, got middle"),
        ({"placement": "dynamic"}, "`placement` needs `canvas_size`, .*got 'dynamic'"),
        ({"canvas_size": 8, "image_size": 16}, "`image_size` must be `canvas_size`, 8, got 16"),
    ],
)
def test_options_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        script.ImageArguments(**fields)


@pytest.mark.parametrize(("width", "height"), [(8, 8), (4, 11), (13, 13), (14, 8), (1, 20)])
def test_a_processor_keeps_a_canvas(width, height, tmp_path):
    """Saved and loaded it is the same canvas; by itself the processor puts a picture in the middle, and keeps its size."""
    canvas = Canvas(SIZE, "dynamic")
    processor = ViTImageProcessorPil(size={"height": 5, "width": 5}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assert Canvas.of(processor) is None
    canvas.keep_in(processor)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert Canvas.of(loaded) == canvas
    picture = Image.new("RGB", (width, height), (200, 200, 200))
    pixels = np.asarray(loaded(images=picture)["pixel_values"][0])
    assert pixels.shape == (3, SIZE, SIZE)
    rows, columns = (np.flatnonzero(pixels[0].any(axis)) for axis in (1, 0))
    for filled, size in ((rows, height), (columns, width)):
        assert len(filled) == min(size, SIZE)
        # Where there is no middle, one side has a pixel more.
        assert abs(filled[0] - (SIZE - 1 - filled[-1])) <= 1
    Canvas.remove_from(loaded)
    assert Canvas.of(loaded) is None
    resized = np.asarray(loaded(images=picture)["pixel_values"][0])
    np.testing.assert_allclose(resized, np.full_like(resized, 200 / 255), rtol=1e-6)


@pytest.fixture
def digit_pictures(tmp_path, monkeypatch):
    """A folder of digits of three classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for index, row in enumerate(digits(24)):
        path = tmp_path / "pictures" / f"class {row['label']}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return tmp_path / "pictures"


SHORT = ["--config_overrides", SMALL, "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]


def accuracy_and_loss(rows):
    """Of predictions of all classes of pictures, each in a folder of the name of its class."""
    likeliest, losses = {}, {}
    for row in rows:
        path = Path(row["file"])
        likeliest.setdefault(path, row["label"] == path.parent.name)
        if row["label"] == path.parent.name:
            losses[path] = -np.log(row["probability"])
    assert likeliest.keys() == losses.keys()
    return np.mean(list(likeliest.values())), np.mean(list(losses.values()))


@pytest.mark.parametrize("placement", ["static", "dynamic"])
def test_the_command_at_the_end_gives_what_was_evaluated(placement, digit_pictures, tmp_path, monkeypatch, capsys):
    """Of pictures that are smaller than the canvas; those of predictions are placed as those of the evaluation."""
    monkeypatch.chdir(tmp_path)
    canvas = ["--canvas_size", "16", "--patch_size", "4", "--placement", placement, "--learning_rate", "0.01"]
    data = ["--train_dir", "pictures", "--validation_dir", "pictures", "--test_dir", "pictures"]
    script.main([*SHORT, *canvas, *data, "--max_steps", "20", "--output_dir", "runs/one"])
    command = shlex.split(capsys.readouterr().out.split("To use it:\n")[1].splitlines()[0])
    assert command == ["python", "scripts/predict.py", "runs/one", "picture.png"]
    results = json.loads(Path("runs/one/eval_results.json").read_text())

    def check(rows):
        accuracy, loss = accuracy_and_loss(rows)
        assert accuracy == results["eval_accuracy"]
        # In float32, from the same pixels in batches of other sizes.
        assert loss == pytest.approx(results["eval_loss"], rel=1e-5)

    predict.main([*command[2:-1], "pictures", "--top_k", "3", "--batch_size", "5", "--json", "rows.json"])
    rows = json.loads(Path("rows.json").read_text())
    check(rows)
    # `--test_dir` and an evaluation of the saved model alone say the same.
    likeliest = {row["file"]: row for row in reversed(rows)}
    for again in ([], ["--do_train", "false", "--validation_dir", "pictures", "--output_dir", "runs/one"]):
        if again:
            script.main([*again, "--test_dir", "pictures", "--use_cpu", "true", "--disable_tqdm", "true"])
            results = json.loads(Path("runs/one/evaluation_results.json").read_text())
            check(rows)
        with open("runs/one/predictions.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                assert row["label"] == likeliest[row["file"]]["label"]
                assert float(row["probability"]) == pytest.approx(likeliest[row["file"]]["probability"], rel=1e-5)
        Path("runs/one/predictions.csv").unlink()
    # Whole canvases stay as they are, and what is larger is refused.
    Image.new("RGB", (17, 16)).save("large.png")
    words = (
        r"the picture 'large.png' cannot be used: `canvas_size` must be .* got 16 × 16 pixels for a picture of 16 × 17"
    )
    with pytest.raises(ValueError, match=words):
        predict.main(["runs/one", "large.png"])


def test_a_model_is_trained_further_on_its_canvas(digit_pictures, tmp_path):
    """Unless it is told another size: then it has another canvas, or none, and so has its processor."""
    data = ["--train_dir", str(digit_pictures), "--max_steps", "1"]
    first = [*SHORT, *data, "--canvas_size", "16", "--patch_size", "8", "--placement", "dynamic"]
    script.main([*first, "--output_dir", str(tmp_path / "first")])
    for options, canvas, size in (
        ([], Canvas(16, "dynamic"), 16),
        (["--canvas_size", "24"], Canvas(24, "static"), 24),
        (["--image_size", "8"], None, 8),
    ):
        tuned = ["--model_name_or_path", str(tmp_path / "first"), "--output_dir", str(tmp_path / "tuned"), *options]
        script.main([*SHORT[2:], *data, *tuned, "--overwrite_output_dir", "true"])
        processor = AutoImageProcessor.from_pretrained(tmp_path / "tuned")
        assert Canvas.of(processor) == canvas
        assert processor.do_resize == (canvas is None)
        assert processor(images=Image.new("RGB", (8, 8)))["pixel_values"][0].shape == (3, size, size)
        predict.main([str(tmp_path / "tuned"), str(digit_pictures)])


def test_a_run_on_a_canvas(digit_pictures, tmp_path):
    """The model and its processor are as large as the canvas, and the static model is evaluated on dynamic pictures."""
    options = ["--train_dir", digit_pictures, "--canvas_size", "16", "--patch_size", "8", "--max_steps", "2", *SHORT]

    def run(name, *arguments):
        script.main([*map(str, options), "--output_dir", str(tmp_path / name), *map(str, arguments)])
        return tmp_path / name

    def read(path):
        return json.loads(path.read_text(encoding="utf-8"))

    static = run("static")
    assert read(static / "config.json")["image_size"] == 16
    assert read(static / "preprocessor_config.json")["size"] == {"height": 16, "width": 16}
    evaluated = {}
    for placement in ("static", "dynamic"):
        again = ["--placement", placement, "--do_train", "false", "--resume_from_checkpoint", static]
        evaluated[placement] = read(run(placement + " again", *again) / "evaluation_results.json")["eval_loss"]
    # In float32, once more from the same weights.
    trained = read(static / "run.json")["metrics"]["loss"]
    assert evaluated["static"] == pytest.approx(trained, rel=64 * torch.finfo(torch.float32).eps)
    assert abs(evaluated["dynamic"] - trained) > 1e-4
    # Alone it takes the canvas that it was trained on.
    alone = ["--do_train", "false", "--validation_dir", str(tmp_path / "pictures"), "--output_dir", str(static)]
    losses = []
    for canvas in ([], ["--canvas_size", "16"]):
        script.main([*alone, *canvas, "--use_cpu", "true", "--disable_tqdm", "true"])
        losses.append(read(static / "evaluation_results.json")["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=64 * torch.finfo(torch.float32).eps)
    with pytest.raises(ValueError, match=r"`canvas_size` must be .* got 7 × 7 pixels for a picture of 8 × 8"):
        run("small", "--canvas_size", "7", "--patch_size", "7")

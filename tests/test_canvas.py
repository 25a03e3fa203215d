"""Pictures on a larger canvas: where they lie, when they move, and what the training script makes of the options."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training.canvas import Canvas
from training.digits import digits_split
from transformers import ViTImageProcessorPil


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


def test_a_run_on_a_canvas(tmp_path, monkeypatch, capsys):
    """The model and its processor are as large as the canvas, and the static model is evaluated on dynamic pictures."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for index, row in enumerate(digits(24)):
        path = tmp_path / "pictures" / f"class {row['label']}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    options = ["--train_dir", tmp_path / "pictures", "--canvas_size", "16", "--patch_size", "8", "--max_steps", "2"]
    options += ["--config_overrides", SMALL, "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]

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

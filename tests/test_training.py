"""The training scripts: recipes and options, pictures and text of many kinds, errors, and what a run leaves behind.

A run that was stopped and went on is compared bit for bit with one that was left alone: both train in this process, with
the same threads, in memory that PyTorch aligns alike.
"""

import contextlib
import csv
import importlib
import json
import re
import shlex
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import pipeline

import translution


datasets = pytest.importorskip("datasets")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
MODEL = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16"
COMMON = f"""--config_overrides {MODEL} --max_steps 2 --per_device_train_batch_size 4 --save_strategy no
    --disable_tqdm true --use_cpu true""".split()
# Of a loss in float32 that is computed twice from the same weights.
ROUNDING = 64 * torch.finfo(torch.float32).eps
SMALL_IMAGES = [*COMMON, "--image_size", "8", "--patch_size", "4"]
SMALL_TEXT = [*COMMON, "--vocab_size", "300", "--block_size", "16", "--tokenization_shards", "2"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Imports a script by name; nothing it prepares stays behind."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield importlib.import_module


@pytest.fixture
def images(scripts, tmp_path):
    def run(*arguments, name="run"):
        scripts("run_image_classification").main([*SMALL_IMAGES, "--output_dir", str(tmp_path / name), *arguments])
        return tmp_path / name

    return run


@pytest.fixture
def text(scripts, tmp_path):
    def run(*arguments, name="run"):
        scripts("run_clm").main([*SMALL_TEXT, "--output_dir", str(tmp_path / name), *arguments])
        return tmp_path / name

    return run


@pytest.fixture
def pictures(tmp_path):
    """A folder of PNGs of many modes and sizes. One class is called like a split."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("cat", "train", "zebra [x]")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for index, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "LA", "RGB", "L", "RGB", "RGB")):
            pixels = random.integers(0, 80, (5 + index, 12, 3), dtype=np.uint8) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(" ".join(f"{index * step % 17} and" for step in range(40)))
    return folder


def read(folder, name="run.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def assert_card(folder, run):
    """The Hub client's parser reads the card, finds the run's figures in it, and writes the same again."""
    card = ModelCard.load(folder / "README.md")
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == run["metrics"]
    assert card.data.pipeline_tag == run["task"]
    assert "None" not in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood(scripts, recipe, tmp_path):
    arguments = scripts("training.arguments")
    training = scripts("training.trainer").ScriptTrainingArguments
    text = recipe.stem in ("stdlib", "openwebtext")
    if text:
        own = (scripts("training.text_data").TextDataArguments, scripts("training.text_blocks").BlockArguments)
    else:
        image = scripts("run_image_classification").ImageArguments
        own = (
            scripts("training.image_data").ImageDataArguments,
            image,
            scripts("training.augmentation").AugmentationArguments,
        )
    classes = (arguments.ModelArguments, arguments.RunArguments, training, *own)
    options = ["--output_dir", str(tmp_path), "--config_overrides", "relative_rank=4", "--weight_decay", "0.25"]
    model, _, parsed, data, *others = arguments.parse_arguments(classes, [str(recipe), *options], "")
    assert parsed.weight_decay == 0.25
    assert isinstance(parsed.learning_rate, float)
    assert parsed.learning_rate < 0.01
    assert data.dataset_name
    asked = {} if text else {"image_size": others[0].image_size, "patch_size": others[0].patch_size}
    config = arguments.new_config(model, {"modality": "text" if text else "image"}, asked)
    assert config.relative_rank == 4
    if recipe.stem == "imagenet":
        assert (config.hidden_size, config.image_size, config.patch_size) == (192, 224, 56)
        assert (parsed.learning_rate, parsed.num_train_epochs, parsed.lr_scheduler_type) == (3e-4, 300, "cosine")
    if recipe.stem == "mnist":
        assert (config.image_size, others[0].canvas_size, others[0].placement) == (84, 84, "static")


def test_overrides_are_typed(scripts):
    read_overrides = scripts("training.arguments").read_overrides
    found = read_overrides(
        "hidden_size=48, relative_rank=null,layer_norm_eps=1e-6,mixer_types=attention,use_cache=false"
    )
    assert found == {
        "hidden_size": 48,
        "relative_rank": None,
        "layer_norm_eps": 1e-6,
        "mixer_types": "attention",
        "use_cache": False,
    }
    assert read_overrides('{"image_size": [8, 16]}') == {"image_size": [8, 16]}


def test_a_folder_of_pictures_becomes_a_classifier(images, pictures):
    folder = images("--train_dir", str(pictures), "--crop_scale", "0.5", "--label_smoothing_factor", "0.1")
    assert read(folder, "config.json")["id2label"] == {"0": "cat", "1": "train", "2": "zebra [x]"}
    found = pipeline("image-classification", model=str(folder), device="cpu")(str(pictures / "cat" / "3.png"))
    assert {item["label"] for item in found} == {"cat", "train", "zebra [x]"}
    run = read(folder)
    assert run["task"] == "image-classification"
    assert set(run["metrics"]) == {"loss", "accuracy", "macro_f1"}
    kinds = {
        result.metric_name: result.metric_type for result in ModelCard.load(folder / "README.md").data.eval_results
    }
    assert kinds == {"loss": "loss", "accuracy": "accuracy", "macro_f1": "f1"}
    assert run["hyperparameters"]["max_steps"] == 2
    assert run["seconds"] > 0
    assert_card(folder, run)
    assert not list(folder.rglob("*.bin"))


def test_the_last_evaluation_draws(scripts, images, pictures, monkeypatch):
    """And no other: the matrix is of the model that is saved, and its figures are those of `run.json`."""
    metrics, drawn = scripts("training.metrics"), []
    draw = metrics.confusion_matrix
    monkeypatch.setattr(metrics, "confusion_matrix", lambda *args: drawn.append(args) or draw(*args))
    folder = images("--train_dir", str(pictures), "--eval_strategy", "steps", "--eval_steps", "1")
    evaluations = [one for one in read(folder, "trainer_state.json")["log_history"] if "eval_loss" in one]
    assert [one["step"] for one in evaluations] == [1, 2]
    assert all({"eval_accuracy", "eval_macro_f1"} <= one.keys() for one in evaluations)
    ((labels, guesses, names),) = drawn
    assert names == ["cat", "train", "zebra [x]"]
    found = read(folder)["metrics"]
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, guesses), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-12)
    with Image.open(folder / "confusion.png") as picture:
        assert picture.format == "PNG"


def test_a_run_says_what_it_does(scripts, images, text, pictures, texts, capsys):
    arguments = ["--train_dir", str(pictures), "--save_strategy", "steps", "--save_steps", "1"]
    folder = images(*arguments, "--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "accuracy")
    said = capsys.readouterr().out
    model = translution.TranslutionForImageClassification.from_pretrained(folder)
    # 3 classes of 10 pictures, a tenth of them held out.
    assert "Training on 27 pictures of 3 classes, evaluating on 3." in said
    assert f"TranslutionForImageClassification: {model.num_parameters():,} parameters, " in said
    assert "Resuming" not in said
    state, accuracy = read(folder, "trainer_state.json"), read(folder)["metrics"]["accuracy"]
    assert re.search(
        rf"^Trained for 2 steps in 0:00:\d\d, [\d,]+ pictures a second without evaluations and saving: accuracy {accuracy:.4g}, macro_f1 .*, loss ",
        said,
        re.M,
    )
    assert f"Best accuracy: {state['best_metric']:.4g} at step {state['best_global_step']}." in said
    # A run of two steps has a curve, too.
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]

    # The command that is shown works.
    command = shlex.split(said.split("To use it:\n")[1].splitlines()[0])
    assert command[:2] == ["python", "scripts/predict.py"]
    scripts("predict").main([command[2], str(pictures / "cat" / "3.png")])
    assert "cat" in capsys.readouterr().out

    shutil.rmtree(folder / "checkpoint-2")
    images(*arguments, "--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "accuracy")
    said = capsys.readouterr().out
    assert f"Resuming from {folder / 'checkpoint-1'}, step 1." in said
    # Its time is not known.
    assert re.search(r"^Trained for 2 steps: accuracy ", said, re.M)

    text("--train_dir", str(texts), name="text")
    said = capsys.readouterr().out
    assert re.search(r"^Training on \d+ blocks of 16 tokens, evaluating on \d+\.$", said, re.M)
    assert re.search(
        r"^Trained for 2 steps in 0:00:\d\d, [\d,]+ tokens a second without evaluations and saving: accuracy .*, perplexity ",
        said,
        re.M,
    )


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_speed_is_that_of_training_steps(
    scripts, images, text, pictures, texts, monkeypatch, capsys, kind, accumulated
):
    """By a clock that goes 3 seconds in a batch, and long in whatever is no training."""
    trainer, now, batches = scripts("training.trainer").WholeCheckpointTrainer, [1e6], []

    def takes(seconds, name, record=None):
        method = getattr(trainer, name)

        def slow(self, *args, **kwargs):
            now[0] += seconds
            if record is not None:
                record.append(len(args[1]["labels"]))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(trainer, name, slow)

    takes(3, "training_step", batches)
    takes(1000, "evaluation_loop")
    takes(5000, "save_model")
    monkeypatch.setattr("time.time", lambda: now[0])
    run, data = (images, pictures) if kind == "image" else (text, texts)
    # Two epochs, whose last batches are not full.
    options = (
        "--max_steps -1 --num_train_epochs 2 --per_device_train_batch_size 8 --save_strategy steps --save_steps 2"
    )
    options += " --eval_strategy steps --eval_steps 1 --eval_on_start true"
    run("--train_dir", str(data), *options.split(), "--gradient_accumulation_steps", str(accumulated))
    said = capsys.readouterr().out
    assert len(batches) > 4
    samples = int(re.search(r"Training on (\d+) ", said)[1])
    assert sum(batches) == 2 * samples
    assert samples % 8
    speed = sum(batches) * (1 if kind == "image" else 16) / (3 * len(batches))
    unit = "pictures" if kind == "image" else "tokens"
    assert f", {speed:,.0f} {unit} a second without evaluations and saving" in said


def test_an_evaluation_says_what_it_does(scripts, images, text, pictures, texts, tmp_path, capsys):
    folder, words = images("--train_dir", str(pictures)), text("--train_dir", str(texts), name="words")
    of_images = (scripts("run_image_classification").main, translution.TranslutionForImageClassification, folder)
    of_text = (scripts("run_clm").main, translution.TranslutionForCausalLM, words)
    for (main, head, trained), data, unit, figures, asked in (
        (
            of_images,
            pictures,
            r"30 pictures of 3 classes",
            "accuracy .*, macro_f1 .*, loss",
            str(pictures / "cat" / "3.png"),
        ),
        (of_text, texts, r"\d+ blocks of 16 tokens", "accuracy .*, perplexity .*, loss", "3 and"),
    ):
        fresh = ["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / f"{trained.name}, fresh")]
        for options in (["--output_dir", str(trained)], fresh):
            capsys.readouterr()
            main([*ALONE, "--validation_dir", str(data), *options])
            said = capsys.readouterr().out
            assert re.search(rf"^Evaluating on {unit}\.$", said, re.M)
            parameters = head.from_pretrained(trained).num_parameters()
            assert re.search(rf"^{head.__name__}: {parameters:,} parameters\.$", said, re.M)
            file = Path(options[-1]) / "evaluation_results.json"
            (last,) = re.findall(rf"^Evaluated: ({figures} .*); more in {re.escape(str(file))}\.$", said, re.M)
            for figure in last.split(", "):
                name, value = figure.split()
                assert value == f"{read(file.parent, file.name)[f'eval_{name}']:.4g}"
            assert f"The model is in {trained}. To use it:\n" in said
            # The command that is shown works.
            command = shlex.split(said.split("To use it:\n")[1].splitlines()[0])
            assert command[:2] == ["python", "scripts/predict.py"]
            scripts("predict").main([command[2], asked, "--max_new_tokens", "4"])


def test_a_model_on_the_hub_is_said_to_be_there(scripts):
    said = scripts("training.messages").describe_use("text-generation", "user/name", "v1")
    where, command = said.splitlines()
    assert where == "The model is user/name on the Hub. To use it:"
    words = ["python", "scripts/predict.py", "user/name", "--revision", "v1", "Once upon a time"]
    assert shlex.split(command) == words


def test_held_out_pictures_are_always_the_same(scripts, pictures):
    load = scripts("training.image_data")
    args = load.ImageDataArguments(train_dir=str(pictures), validation_share=0.2)
    (train, first), (_, second) = load.load_images(args, True), load.load_images(args, True)
    assert (len(train), len(first)) == (24, 6)
    # As many of each class.
    assert sorted(first["label"]) == [0, 0, 1, 1, 2, 2]
    assert [image.tobytes() for image in first["image"]] == [image.tobytes() for image in second["image"]]


def test_streamed_pictures_and_a_folder_to_evaluate(images, pictures):
    arguments = ["--train_dir", str(pictures), "--validation_dir", str(pictures), "--streaming", "true"]
    # More steps than one epoch has.
    folder = images(*arguments, "--max_steps", "9", "--shuffle_buffer", "10", "--mixup_alpha", "1.0")
    assert read(folder, "trainer_state.json")["global_step"] == 9
    assert read(folder)["metrics"]["accuracy"] >= 0


def test_a_checkpoint_gets_a_new_head_and_keeps_its_origin(images, pictures):
    first = images("--train_dir", str(pictures))
    origin = {"license": "other", "license_name": "some-licence", "license_link": "LICENSE", "base_model": "user/base"}
    ModelCard(f"---\n{ModelCardData(**origin)}\n---\n# A model\n").save(first / "README.md")
    (first / "LICENSE").write_text("You may.")
    scratch = SMALL_IMAGES.index("--config_overrides")
    options = ["--dataset_name", "digits", "--max_train_samples", "8", "--max_eval_samples", "4"]
    main = importlib.import_module("run_image_classification").main
    common = [*SMALL_IMAGES[:scratch], *SMALL_IMAGES[scratch + 2 :], "--model_name_or_path", str(first), *options]
    second = first.parent / "second"
    main([*common, "--output_dir", str(second), "--ignore_mismatched_sizes", "true", "--learning_rate", "0"])
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert after["classifier.weight"].shape == (10, 8)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("classifier"))
    assert (second / "LICENSE").read_text() == "You may."
    card = ModelCard.load(second / "README.md").data.to_dict()
    for found in (read(second), card):
        assert {name: found.get(name) for name in origin} == origin


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        ("source", [], {"license": "other", "license_name": "some-licence", "base_model": "user/base"}),
        ("source", ["--license", "mit"], {"license": "mit", "base_model": "user/base"}),
        ("bare", ["--license", "mit"], {"license": "mit"}),
        ("bare", [], {}),
        ("user/name", ["--license", "mit"], {"license": "mit", "base_model": "user/name"}),
        (None, [], {}),
    ],
)
def test_where_a_model_is_from(scripts, model, options, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("source", "bare"):
        (tmp_path / name).mkdir()
    card = "---\nlicense: other\nlicense_name: some-licence\nbase_model: user/base\ntags: [mine]\n---\n# A model\n"
    (tmp_path / "source" / "README.md").write_text(card)
    run, data = scripts("training.run"), scripts("training.data_arguments")
    arguments = ["--output_dir", "out", "--dataset_name", "digits", "--use_cpu", "true", *options]
    arguments += [] if model is None else ["--model_name_or_path", model]
    parsed = run.Run.parse("run_clm.py", "text-generation", data.DataArguments, (), arguments, "")
    fields = ("base_model", "license", "license_name", "license_link")
    assert parsed.origin() == {name: found.get(name) for name in fields}


def test_a_folder_of_text_becomes_a_generator(text, texts):
    (texts / "empty.txt").write_text("")
    folder = text("--train_dir", str(texts))
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert len(generator("3 and", max_new_tokens=4)[0]["generated_text"]) > 4
    assert read(folder)["metrics"]["perplexity"] > 1
    assert_card(folder, read(folder))
    assert read(folder, "config.json")["max_position_embeddings"] == 16


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_text(scripts, text, tmp_path, kind, streaming):
    rows = datasets.Dataset.from_dict({"content": [f"{number} and {number * 7}" for number in range(60)]})
    path = str(tmp_path / f"data.{kind}")
    if kind == "txt":
        Path(path).write_text("\n".join(rows["content"]))
    else:
        getattr(rows, f"to_{kind}")(path)
    column = "text" if kind == "txt" else "content"
    options = ["--streaming", "true", "--validation_file", path] if streaming else []
    folder = text("--train_file", path, "--text_column", column, "--sample_by", "line", *options)
    assert read(folder)["metrics"]["perplexity"] > 1


def test_one_document_is_split_by_blocks(text, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abc " * 400)
    folder = text("--train_file", str(path), "--validation_share", "0.25")
    assert read(folder)["metrics"]["perplexity"] > 1


def test_no_token_of_a_text_is_lost(scripts):
    blocks = scripts("training.text_blocks")
    tokenizer = scripts("training.tokenizer").train_tokenizer(["some text"], 257, 16)
    packed = blocks.Packer(tokenizer, 8)({"text": ["some text", "", None, "more"]})["input_ids"]
    assert [len(block) for block in packed[:-1]] == [8] * (len(packed) - 1)
    ids = [token for block in packed for token in block]
    assert tokenizer.decode(ids) == "some text<|endoftext|>more<|endoftext|>"
    batch = blocks.BlockBatch(tokenizer, 8)([{"input_ids": block} for block in packed])
    assert batch["labels"][batch["labels"] >= 0].tolist() == ids
    assert batch["input_ids"].shape == (len(packed), 8)


def test_a_finished_run_stays_as_it_is_and_damaged_checkpoints_are_left_out(scripts, images, pictures):
    arguments = ["--train_dir", str(pictures), "--save_strategy", "steps", "--save_steps", "1"]
    folder = images(*arguments)
    weights = (folder / "model.safetensors").read_bytes()
    checkpoints = scripts("training.checkpoints")
    assert checkpoints.newest_checkpoint(folder).name == "checkpoint-2"
    for name, reason in (
        ("model.safetensors", "damaged"),
        ("optimizer.pt", "damaged"),
        ("scheduler.pt", "damaged"),
        ("rng_state.pth", "damaged"),
        ("trainer_state.json", "damaged"),
    ):
        whole = (folder / "checkpoint-2" / name).read_bytes()
        (folder / "checkpoint-2" / name).write_bytes(whole[: len(whole) // 2])
        assert reason in checkpoints.why_incomplete(folder / "checkpoint-2")
        assert checkpoints.newest_checkpoint(folder).name == "checkpoint-1"
        (folder / "checkpoint-2" / name).unlink()
        assert checkpoints.why_incomplete(folder / "checkpoint-2").startswith("there is no ")
        (folder / "checkpoint-2" / name).write_bytes(whole)
    (folder / "checkpoint-2" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` .* cannot be continued: there is no model"):
        images(*arguments, "--resume_from_checkpoint", str(folder / "checkpoint-2"))
    images(*arguments)
    assert (folder / "model.safetensors").read_bytes() == weights


class StoppedError(BaseException):
    """Ends a run where a signal would: nothing handles it."""


@contextlib.contextmanager
def stopped_at(owner, name):
    """Where a function is called, the run ends instead."""

    def stop(*_, **__):
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(StoppedError):
            yield


def states(folder):
    """The weights and the steps that a run left."""
    return (folder / "model.safetensors").read_bytes(), read(folder, "trainer_state.json")["global_step"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_takes_no_further_step(scripts, images, pictures):
    # At the end of other schedules the rate is 0, and a further step would change nothing.
    arguments = ["--train_dir", str(pictures), "--lr_scheduler_type", "constant", "--save_strategy", "steps"]
    arguments += ["--save_steps", "1", "--max_train_samples", "12"]
    whole = images(*arguments, name="whole")
    before, metrics = states(whole), read(whole)["metrics"]
    code = [folder / "modeling_translution.py" for folder in (whole, *whole.glob("checkpoint-*"))]
    assert len(code) > 2
    assert all(path.samefile(code[0]) for path in code)
    with stopped_at(scripts("training.trainer").WholeCheckpointTrainer, "save_state"):
        images(*arguments, name="stopped")
    trained = read(whole)
    for name in ("whole", "stopped"):
        folder = images(*arguments, name=name)
        assert (states(folder), read(folder)["metrics"]) == (before, metrics)
    # What is said of the training stays, too.
    assert trained["seconds"] > 0
    assert {name: value for name, value in read(whole).items() if name != "metrics"} == {
        name: value for name, value in trained.items() if name != "metrics"
    }
    # Training longer is no change of what is trained.
    assert states(images(*arguments, "--max_steps", "3", name="stopped"))[1] == 3
    assert states(images(*arguments, "--max_steps", "-1", "--num_train_epochs", "2", name="whole"))[1] == 6
    before = states(whole)
    assert states(images(*arguments, "--max_steps", "-1", "--num_train_epochs", "2", name="whole")) == before


@pytest.mark.parametrize("best", ["true", "false"])
def test_a_run_that_was_stopped_early_is_finished(scripts, images, pictures, best):
    # The loss falls, and is said to get worse thereby: the first evaluation stays the best one.
    arguments = ["--train_dir", str(pictures), "--max_steps", "20", "--learning_rate", "0.001"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    arguments += ["--save_total_limit", "2"]
    arguments += ["--metric_for_best_model", "loss", "--greater_is_better", "true", "--load_best_model_at_end", best]
    patient = [*arguments, "--early_stopping_patience", "2"]
    whole = states(images(*patient, name="whole"))
    assert whole[1] == 6
    with stopped_at(scripts("training.trainer").WholeCheckpointTrainer, "save_state"):
        images(*patient)
    for name in ("whole", "run", "run"):
        assert states(images(*patient, name=name)) == whole
    # Who is more patient now gets more steps.
    assert states(images(*arguments, "--early_stopping_patience", "4"))[1] == 10


@pytest.mark.parametrize(
    "options",
    [
        ["--max_steps", "3"],
        ["--overwrite_output_dir", "true", "--config_overrides", f"{MODEL},hidden_act=relu"],
    ],
    ids=["longer", "another model"],
)
def test_a_run_killed_in_its_last_save_leaves_no_mixture(scripts, images, pictures, options):
    checkpoints = scripts("training.output_folder")
    arguments = ["--train_dir", str(pictures), "--learning_rate", "0.01"]
    images(*arguments)
    whole = images(*arguments, *options, name="whole")
    move = checkpoints.os.replace

    @contextlib.contextmanager
    def killed_after(count):
        left = [count]

        def limited(source, target):
            left[0] -= Path(source).parent.name == checkpoints.FINAL_MODEL
            if left[0] < 0:
                raise StoppedError
            move(source, target)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StoppedError):
            patch.setattr(checkpoints.os, "replace", limited)
            yield

    with killed_after(0):
        images(*arguments, *options)
    saved = whole.parent / "run"
    names = [path.name for path in (saved / checkpoints.FINAL_MODEL).iterdir()]
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} < set(names)
    for count in range(len(names)):
        folder = whole.parent / f"killed-{count}"
        shutil.copytree(saved, folder)
        with killed_after(count):
            checkpoints.finish_saving(folder)
        # There are no weights to load, and no card, until the new ones are there.
        assert not {"model.safetensors", "run.json", "README.md"} & {path.name for path in folder.iterdir()}
        checkpoints.finish_saving(folder)
        for name in names:
            # The folder's name is among the arguments.
            expected = saved / checkpoints.FINAL_MODEL if name == "training_args.json" else whole
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
        assert not (folder / checkpoints.FINAL_MODEL).exists()
    images(*arguments, *options[-2:])
    assert states(saved) == states(whole)
    assert read(saved)["metrics"] == read(whole)["metrics"]


def test_evaluation_alone_changes_nothing(images, pictures, monkeypatch):
    # Which an option of the last calls sets.
    monkeypatch.setenv("HF_TOKEN", "")
    arguments = [
        "--train_dir",
        str(pictures),
        "--learning_rate",
        "0.01",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    folder = images(*arguments)
    before, found = contents(folder), folder / "evaluation_results.json"
    images(*arguments, "--do_train", "false")
    loss = pytest.approx(read(folder)["metrics"]["loss"], rel=ROUNDING)
    assert read(folder, found.name)["eval_loss"] == loss
    found.unlink()
    (folder / "evaluation_confusion.png").unlink()
    assert contents(folder) == before
    # Without a model it is the newest checkpoint.
    (folder / "model.safetensors").unlink()
    images(*arguments, "--do_train", "false")
    assert read(folder, found.name)["eval_loss"] == loss
    images(*arguments, "--do_train", "false", "--resume_from_checkpoint", str(folder / "checkpoint-1"))
    assert read(folder, found.name)["eval_loss"] != loss
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(
        FileNotFoundError, match=r"`do_train` false .* neither model nor checkpoint: give .*model_name"
    ):
        images(*arguments, "--do_train", "false", name="nothing")
    for option in ("overwrite_output_dir", "push_to_hub"):
        with pytest.raises(ValueError, match=f"`{option}` must be false where nothing is trained"):
            images(*arguments, "--do_train", "false", f"--{option}", "true", "--hub_token", "none")


ALONE = ["--do_train", "false", "--disable_tqdm", "true", "--use_cpu", "true"]


def test_pictures_to_classify(scripts, images, pictures, tmp_path):
    arguments = ["--train_dir", str(pictures), "--learning_rate", "0.01"]
    new = tmp_path / "new"
    new.mkdir()
    for index, path in enumerate(sorted(pictures.glob("*/*.png"))[::5]):
        shutil.copy(path, new / f"{index}.png")
    folder = images(*arguments, "--test_dir", str(new))
    paths = sorted(map(str, new.glob("*.png")))
    expected = pipeline("image-classification", model=str(folder), device="cpu")(paths, top_k=1)
    predictions = folder / "predictions.csv"

    def check():
        with predictions.open(newline="", encoding="utf-8") as file:
            rows = {row["file"]: row for row in csv.DictReader(file)}
        assert sorted(rows) == paths
        for path, (one,) in zip(paths, expected, strict=True):
            assert rows[path]["label"] == one["label"]
            assert float(rows[path]["probability"]) == pytest.approx(one["score"], rel=ROUNDING)
        predictions.unlink()

    check()
    before = contents(folder)
    # Without data that have classes, and with those of the training.
    alone = [*ALONE, "--do_eval", "false", "--do_predict", "true", "--test_dir", str(new)]
    scripts("run_image_classification").main([*alone, "--output_dir", str(folder)])
    check()
    images(*arguments, "--do_train", "false", "--do_eval", "false", "--test_dir", str(new))
    check()
    assert contents(folder) == before
    for options, word in (
        (
            ["--early_stopping_patience", "2", "--metric_for_best_model", "loss", "--eval_strategy", "no"],
            "`eval_strategy` must be 'steps' or 'epoch' for `early_stopping_patience`, got 'no'",
        ),
        (["--preset", "distant"], "`preset` must be None or one of 'local', got 'distant'"),
        (["--do_predict", "true"], "`do_predict` needs a folder of pictures, `test_dir`, got None"),
        (["--test_dir", str(tmp_path / "nowhere")], "`test_dir` must be a folder, got .*nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            images(*arguments, *options, name="other")
    with pytest.raises(ValueError, match=r"texts are continued by scripts/predict\.py"):
        scripts("run_clm").main(
            ["--dataset_name", "stdlib", "--do_predict", "true", "--output_dir", str(tmp_path / "x")]
        )


def test_pictures_to_evaluate_alone(scripts, images, pictures, tmp_path):
    folder = images("--train_dir", str(pictures), "--learning_rate", "0.01")
    before, other = contents(folder), tmp_path / "other"
    # Among themselves the classes have other numbers than in the model.
    for name in ("cat", "zebra [x]"):
        shutil.copytree(pictures / name, other / name)
    paths = sorted(map(str, other.glob("*/*.png")))
    found = pipeline("image-classification", model=str(folder), device="cpu")(paths, top_k=3)
    names, scores = (
        [Path(path).parent.name for path in paths],
        [{i["label"]: i["score"] for i in row} for row in found],
    )
    guesses = [max(row, key=row.get) for row in scores]
    loss = -np.mean([np.log(row[name]) for row, name in zip(scores, names, strict=True)])
    main = scripts("run_image_classification").main
    options = [*ALONE, "--validation_dir", str(other)]
    fresh = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "fresh")]
    for more in (["--output_dir", str(folder)], fresh, [*fresh, "--streaming", "true"]):
        main([*options, *more])
        target = Path(more[-1]) if "--streaming" not in more else tmp_path / "fresh"
        figures = read(target, "evaluation_results.json")
        assert figures["eval_loss"] == pytest.approx(loss, rel=ROUNDING)
        assert figures["eval_accuracy"] == pytest.approx(accuracy_score(names, guesses), abs=1e-12)
        assert figures["eval_macro_f1"] == pytest.approx(f1_score(names, guesses, average="macro"), abs=1e-12)
        with Image.open(target / "evaluation_confusion.png") as picture:
            assert picture.format == "PNG"
        for name in ("evaluation_results.json", "evaluation_confusion.png"):
            (target / name).unlink()
    assert contents(folder) == before
    # What is given must still be the model's.
    with pytest.raises(ValueError, match="`patch_size` must be 4 as before, got 2"):
        main([*options, "--output_dir", str(folder), "--patch_size", "2"])
    with pytest.raises(ValueError, match="`config_overrides` shapes a new model"):
        main([*options, *fresh, "--config_overrides", MODEL])
    with pytest.raises(FileNotFoundError, match="neither model nor checkpoint"):
        main([*options, "--output_dir", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="Exactly one of `dataset_name`, `validation_dir` must be given, got none"):
        main([*ALONE, *fresh])
    (other / "cat").rename(other / "lion")
    with pytest.raises(ValueError, match=r"must have classes of the model, cat, train, zebra \[x\]; got lion\."):
        main([*options, *fresh])


def test_text_to_evaluate_alone(scripts, text, texts, tmp_path):
    folder, other = text("--train_dir", str(texts)), tmp_path / "other"
    other.mkdir()
    rows = datasets.Dataset.from_dict({"text": ["9 and 3 and 7 " * 9]})
    (other / "one.txt").write_text(rows["text"][0])
    rows.to_parquet(str(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"))
    saved = pipeline("text-generation", model=str(folder), device="cpu")
    ids = [*saved.tokenizer(rows["text"][0]).input_ids, saved.tokenizer.eos_token_id]
    losses = []
    for start in range(0, len(ids), 16):
        block = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            logits = saved.model(block).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="none").tolist()
    main, fresh = scripts("run_clm").main, tmp_path / "fresh"
    for data in (
        ["--validation_dir", str(other)],
        ["--validation_file", str(other / "one.txt")],
        # There is no split to train on.
        ["--dataset_name", str(tmp_path / "hub"), "--validation_split", "test"],
    ):
        for target, model in ((folder, []), (fresh, ["--model_name_or_path", str(folder)])):
            main([*ALONE, *data, *model, "--output_dir", str(target)])
            figure = read(target, "evaluation_results.json")["eval_perplexity"]
            assert np.log(figure) == pytest.approx(np.mean(losses), rel=ROUNDING)
            (target / "evaluation_results.json").unlink()
    with pytest.raises(ValueError, match="`validation_split` must be one of test, got 'dev'"):
        main([*ALONE, *data[:-1], "dev", "--output_dir", str(folder)])


def test_a_command_that_trained_evaluates(images):
    """With a split by name, and a new model, which a run without training data refuses."""
    arguments = ["--dataset_name", "digits", "--validation_split", "test", "--max_train_samples", "16"]
    arguments += ["--max_eval_samples", "8"]
    folder = images(*arguments)
    images(*arguments, "--do_train", "false")
    loss = read(folder, "evaluation_results.json")["eval_loss"]
    assert loss == pytest.approx(read(folder)["metrics"]["loss"], rel=ROUNDING)


def test_what_is_trained_stays_what_it_is_said_to_be(images, pictures, monkeypatch):
    digits = ["--dataset_name", "digits", "--max_train_samples", "16", "--max_eval_samples", "8"]
    folder = images(*digits)
    before = contents(folder)
    for option, old, new in (
        ("dataset_config_name", "None", "'dynamic'"),
        ("max_train_samples", "16", "12"),
        ("patch_size", "4", "2"),
        ("flip_probability", "0.0", "0.5"),
    ):
        message = rf"`{option}` must be {old} as before, got {new}\. Give another `--output_dir`, or `--overwrite"
        for more in ([], ["--do_train", "false"]):
            with pytest.raises(ValueError, match=message):
                images(*digits, f"--{option}", new.strip("'"), *more)
    assert contents(folder) == before
    images(*digits, "--max_eval_samples", "4", "--logging_steps", "1", "--num_proc", "1", "--learning_rate", "0.1")
    images(*digits, "--dataset_config_name", "dynamic", "--overwrite_output_dir", "true")
    assert read(folder)["dataset"]["config"] == "dynamic"
    # Where nothing is trained yet, one may correct oneself; and a folder may be written in two ways.
    with pytest.raises(StrictDataclassError, match="must be a multiple"):
        images("--train_dir", str(pictures), "--patch_size", "3", name="second")
    images("--train_dir", str(pictures), name="second")
    monkeypatch.chdir(pictures.parent)
    images("--train_dir", pictures.name, name="second")


def test_a_tokenizer_of_other_text_is_not_kept(scripts, text, texts):
    with stopped_at(scripts("run_clm"), "load_model"):
        text("--train_dir", str(texts))
    before = (texts.parent / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    (texts.parent / "other.txt").write_text("something else\n" * 99)
    other = ["--train_file", str(texts.parent / "other.txt"), "--sample_by", "line"]
    assert (text(*other) / "tokenizer" / "tokenizer.json").read_bytes() != before


def test_figures_of_a_run(scripts, text, texts):
    folder = text("--train_dir", str(texts), "--run_name", "a b; c", "--co2_grams", "1.5")
    run = read(folder)
    text("--train_dir", str(texts), "--do_train", "false")
    found = read(folder, "evaluation_results.json")["eval_perplexity"]
    assert found == pytest.approx(run["metrics"]["perplexity"], rel=ROUNDING)
    assert shlex.split(run["command"])[-4:] == ["--run_name", "a b; c", "--co2_grams", "1.5"]
    assert run["co2_grams"] == ModelCard.load(folder / "README.md").data.co2_eq_emissions["emissions"] == 1.5
    for share, told in ((0.1, "10%"), (0.07, "7%"), (0.0005, "0.05%")):
        data = scripts("training.text_data").TextDataArguments(validation_share=share)
        assert scripts("training.run").evaluation_split(data) == f"{told} held out"
    with pytest.raises(ValueError, match=r"`co2_grams` must be a number of at least 0, got -1.0"):
        text("--train_dir", str(texts), "--co2_grams", "-1")


def test_a_folder_of_something_else_is_refused(images, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no checkpoint: give another folder, or `--overwrite_output_dir`"):
        images("--train_dir", str(pictures))
    images("--train_dir", str(pictures), "--overwrite_output_dir", "true")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    for name in ("old/events.out.tfevents.1.host", "other/events.out.tfevents.2.host", "other/notes.txt"):
        (tmp_path / "run" / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "runs" / name).touch()
    # The demo's models are runs, too.
    (tmp_path / "run" / "arguments.json").unlink()
    images("--train_dir", str(pictures), "--overwrite_output_dir", "true")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    # Curves of an earlier run would be drawn into those of this one.
    assert [path.name for path in (tmp_path / "run" / "runs").rglob("*")] == ["other", "notes.txt"]


OTHERS = (
    "predictions.csv",
    "README.md",
    "model.safetensors",
    "tokenizer/words.txt",
    "runs/mine/events.out.tfevents.1",
)


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_no_run_left_are_not_overwritten(images, pictures, tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "run")
    lost = name.split("/")[0] if name.startswith("tokenizer") else name
    with pytest.raises(
        FileExistsError, match=rf"`overwrite_output_dir` .*`output_dir` .*run, of which {lost} would be lost"
    ):
        images("--train_dir", str(pictures), "--overwrite_output_dir", "true")
    assert contents(tmp_path / "run") == before


def test_what_a_run_reads_is_not_overwritten(images, text, pictures, texts, tmp_path, monkeypatch):
    """An option may be written in many ways, and name a checkpoint, a tokenizer or data of the folder."""
    monkeypatch.chdir(tmp_path)
    folder = images("--train_dir", str(pictures), "--save_strategy", "steps", "--save_steps", "2")
    words = text("--train_dir", str(texts), name="words")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    shutil.copytree(pictures, folder / "data")
    (words / "a.txt").write_text("one and two")
    before = contents(folder), contents(words)
    bare = [option for option in COMMON if option not in ("--config_overrides", MODEL)]
    classify, write = importlib.import_module("run_image_classification").main, importlib.import_module("run_clm").main
    for main, name, value, *options in (
        (classify, "model_name_or_path", str(folder), "--train_dir", str(pictures), "--output_dir", str(folder)),
        (classify, "model_name_or_path", "./run", "--train_dir", str(pictures), "--output_dir", "link"),
        (classify, "model_name_or_path", "link/checkpoint-2", "--train_dir", str(pictures), "--output_dir", "run/"),
        (classify, "train_dir", "run/data", "--output_dir", str(folder)),
        (classify, "test_dir", "link/data", "--train_dir", str(pictures), "--output_dir", "run"),
        (write, "model_name_or_path", "words", "--train_dir", str(texts), "--output_dir", str(words)),
        (write, "tokenizer_name", "words/tokenizer", "--train_dir", str(texts), "--output_dir", "run/../words"),
        (write, "validation_file", "words/a.txt", "--train_dir", str(texts), "--output_dir", str(words)),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must lie outside `output_dir` .* got {value}: give another"):
            main([*bare, f"--{name}", value, *options, "--overwrite_output_dir", "true"])
        assert (contents(folder), contents(words)) == before
    # Without weights a tokenizer of other options is deleted, too.
    (words / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`tokenizer_name` must lie outside `output_dir`"):
        text("--train_dir", str(texts), "--tokenizer_name", "words/tokenizer", name="words")
    assert (words / "tokenizer").is_dir()
    # Data of the package, whatever the folder is called; and another folder.
    images("--dataset_name", "digits", "--max_train_samples", "16", "--max_eval_samples", "8", name="digits")
    images("--dataset_name", "digits", "--max_train_samples", "16", "--overwrite_output_dir", "true", name="digits")


def test_figures_go_with_the_model(images, pictures):
    arguments = ["--train_dir", str(pictures)]
    folder = images(*arguments)
    images(*arguments, "--do_train", "false", "--test_dir", str(pictures))
    figures = {"predictions.csv", "evaluation_results.json", "evaluation_confusion.png"}
    figures |= {"eval_results.json", "confusion.png"}
    assert figures <= {path.name for path in folder.iterdir()}
    (folder / "notes.json").touch()
    images(*arguments, "--do_eval", "false", "--overwrite_output_dir", "true")
    left = {path.name for path in folder.iterdir()}
    assert not figures & left
    assert {"notes.json", "model.safetensors", "train_results.json"} <= left
    assert not [name for name in read(folder, "all_results.json") if name.startswith("eval_")]


def test_tokens_are_written_nowhere(images, pictures, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "")
    folder = images("--train_dir", str(pictures), "--token", "hf_secret", "--hub_token=hf_secret")
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert "hf_secret" not in "".join(capfd.readouterr())
    assert "--token" not in read(folder)["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Exactly one of `dataset_name`, `train_dir` must be given, got none"),
        (["--train_dir", "nowhere"], "`train_dir` must be a folder, got nowhere"),
        (
            ["--dataset_name", "digits", "--validation_dir", "ONE"],
            "`validation_dir` must not be given beside `dataset_name` 'digits', .* a recipe with one",
        ),
        (["--train_dir", "EMPTY"], "`train_dir` must hold pictures, .*there is none in"),
        (["--train_dir", "ONE"], "`label` must have at least 2 classes, got \\['only'\\]"),
        (["--dataset_name", "digits", "--train_split", "all"], "`train_split` must be one of train, test, got 'all'"),
        (["--dataset_name", "digits", "--validation_split", "x"], "`validation_split` must be one of .*got 'x'"),
        (["--dataset_name", "digits", "--label_column", "x"], "`label_column` must be one of .*image, label, got x"),
        (["--dataset_name", "digits", "--config_overrides", "size=3"], "`config_overrides` must name .*got 'size'"),
        (["--dataset_name", "digits", "--model_size", "huge"], "`size` must be one of .*got 'huge'"),
        (["--dataset_name", "digits", "--patch_size", "3"], "`image_size` must be a multiple of `patch_size` 3"),
        (["--dataset_name", "digits", "--validation_share", "1"], "`validation_share` must be .*got 1"),
        (["--dataset_name", "digits", "--streaming", "true", "--max_steps", "-1"], "`max_steps` must be at least 1"),
        (["--dataset_name", "digits", "--early_stopping_patience", "2"], "`metric_for_best_model` must be given"),
        (
            ["--dataset_name", "digits", "--resume_from_checkpoint", "nowhere"],
            "`resume_from_checkpoint` must be a folder",
        ),
    ],
)
def test_errors_of_pictures(images, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "only").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "one" / "only" / "a.png")
    places = {"EMPTY": str(tmp_path / "empty"), "ONE": str(tmp_path / "one")}
    with pytest.raises((ValueError, FileNotFoundError, StrictDataclassError), match=message):
        images(*(places.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "nowhere.txt"], "`train_file` must name files, there is no nowhere.txt"),
        (["--train_file", "EMPTY"], "must hold text, got empty documents only"),
        (["--dataset_name", "stdlib", "--text_column", "x"], "`text_column` must be one of the columns text, got x"),
        (
            [
                "--dataset_name",
                "stdlib",
                "--config_overrides",
                "max_position_embeddings=8",
                "--max_train_samples",
                "1",
            ],
            "`block_size` must be at most `max_position_embeddings` 8, got 16: .* without `max_relative_distance` it knows no",
        ),
        (
            [
                "--dataset_name",
                "stdlib",
                "--config_overrides",
                "max_position_embeddings=8,max_relative_distance=2,use_absolute_position_embeddings=true",
                "--max_train_samples",
                "1",
            ],
            "`max_position_embeddings` 8, got 16: .* its table of absolute positions ends there. Give a smaller",
        ),
        (
            ["--dataset_name", "stdlib", "--validation_file", "EMPTY"],
            "`validation_file` must not be given beside `dataset_name` 'stdlib', whose `validation_split` is evaluated",
        ),
        (
            ["--train_file", "EMPTY", "--validation_file", "EMPTY", "--validation_dir", "texts"],
            "At most one of `validation_dir`, `validation_file` must be given, got validation_dir, validation_file",
        ),
        (["--dataset_name", "stdlib", "--label_smoothing_factor", "0.1"], "`label_smoothing_factor` must be 0"),
        (["--dataset_name", "stdlib", "--sample_by", "word"], "`sample_by` must be one of .*got 'word'"),
    ],
)
def test_errors_of_text(text, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text(*(str(tmp_path / "empty.txt") if argument == "EMPTY" else argument for argument in arguments))


def test_errors_of_recipes(scripts, tmp_path):
    arguments = scripts("training.arguments")
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        arguments.parse_arguments((arguments.RunArguments,), [str(recipe)], "")
    recipe.write_text("lerning_rate: 3")
    with pytest.raises(ValueError, match="lerning_rate is not among them"):
        arguments.parse_arguments((arguments.RunArguments,), [str(recipe)], "")
    recipe.write_text("- 3")
    with pytest.raises(ValueError, match=r"must be a mapping .* got list"):
        arguments.parse_arguments((arguments.RunArguments,), [str(recipe)], "")
    recipe.write_text("learning_rate: 3\ntoken: [hf_secret\nseed: 1\n")
    with pytest.raises(ValueError, match=r"must be YAML, .*recipe.yaml is not in line 3") as caught:
        arguments.parse_arguments((arguments.RunArguments,), [str(recipe)], "")
    assert "hf_secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--hf_token", "hf_secret"], "--hf_token is"),
        (["--hf_token=hf_secret"], "--hf_token is"),
        (["--license", "mit", "hf_secret"], "a value without an option is"),
    ],
)
def test_an_unknown_option_is_named_without_its_value(scripts, given, named):
    arguments = scripts("training.arguments")
    with pytest.raises(ValueError, match=f"--help lists; {named} not among them") as caught:
        arguments.parse_arguments((arguments.RunArguments,), given, "")
    assert "hf_secret" not in "".join(traceback.format_exception(caught.value))

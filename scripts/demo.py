"""Trains Translution and attention on real data, saves the best, and uses them from a fresh process.

    python scripts/demo.py --output_dir runs/demo

Pictures: handwritten digits in the middle of a canvas ("static") or anywhere on it ("dynamic"). Text: the source text of
Python's standard library. Models of one comparison have the same width and are trained alike; only the mixer differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import numpy as np
import sklearn
import torch
import transformers
from common.saved_files import RUN
from studies.token_blocks import TokenBlocks, token_blocks
from torch import Tensor
from tqdm.auto import tqdm
from training.digits import CANVAS_SIZE, NUM_CHANNELS, DigitCanvases, digits_processor, digits_split
from training.model_card import write_model_card
from training.standard_library import read_texts, split_files, standard_library_files
from training.tokenizer import train_tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

import translution
from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


# A backend that needs no screen.
matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Settings:
    """How much to train, and how; the same for all models of a comparison."""

    image_epochs: int = 10
    image_batch: int = 64
    # Half and twice as much were tried for attention as well: rotary gained at most 4 points, absolute none.
    image_learning_rate: float = 2e-3
    train_digits: int | None = None
    test_digits: int | None = None
    text_steps: int = 600
    text_batch: int = 16
    text_learning_rate: float = 6e-3
    text_length: int = 64
    vocab_size: int = 1024
    train_files: int | None = None
    held_out_files: int | None = None
    held_out_blocks: int = 512
    weight_decay: float = 0.05
    warmup_steps: int = 20


QUICK = Settings(
    image_epochs=1,
    train_digits=64,
    test_digits=40,
    text_steps=2,
    vocab_size=300,
    train_files=2,
    held_out_files=1,
    held_out_blocks=8,
)

IMAGE_FIELDS = {
    "modality": "image",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "head_dim": 16,
    "intermediate_size": 192,
    "image_size": CANVAS_SIZE,
    "patch_size": 4,
    "num_channels": NUM_CHANNELS,
    "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}
IMAGE_MODELS = {
    "attention, absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "attention, rotary": {"mixer_types": "rope_attention"},
    "LoR-Translution": {"relative_projections": "kv", "relative_rank": 8},
    "Translution": {"relative_projections": "kv"},
}
FULL_TRANSLUTION = "Translution"
# Name of a comparison: the placement to train on, and the one to test on.
COMPARISONS = {
    "static → static": ("static", "static"),
    "static → dynamic": ("static", "dynamic"),
    "dynamic → dynamic": ("dynamic", "dynamic"),
}

TEXT_FIELDS = {
    "modality": "text",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
}
TEXT_MODELS = {
    "attention, rotary": {"mixer_types": "rope_attention"},
    "Translution": {"relative_projections": "kv"},
}
PROMPT = "def "

IMAGE_CHECKPOINT, TEXT_CHECKPOINT = "image-model", "text-model"
FRESH_RESULTS = "fresh_process.json"
REPORT, PICTURE = "demo.json", "demo.png"


# Training


class ProgressBar(TrainerCallback):
    """One bar per model; also tells the data set that an epoch begins."""

    def __init__(self, title: str, data: Any):
        self.title = title
        self.data = data

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", dynamic_ncols=True)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(round(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def train(
    model: PreTrainedModel, data: Any, title: str, folder: Path, seed: int, settings: Settings, **arguments
) -> float:
    """Trains a model, moves it to the CPU, and returns the seconds that training took."""
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=data,
        callbacks=[ProgressBar(title, data)],
    )
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    # What is compared with the fresh process is computed on the CPU in both.
    model.to("cpu").eval()
    return seconds


def count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Pictures


@torch.no_grad()
def classify(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The likeliest class of each of `[N, channels, height, width]`."""
    return torch.cat([model(pixel_values=batch).logits.argmax(dim=-1) for batch in pixel_values.split(64)])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return 100 * (predictions == labels).float().mean().item()


def digit_tests(seed: int, settings: Settings) -> dict[str, DigitCanvases]:
    """The held-out digits in both placements. Their random places never change."""
    _, test = digits_split()
    # A seed of its own: no epoch of any training places digits by it.
    return {
        name: DigitCanvases(test.first(settings.test_digits), name, seed=-1 - seed) for name in ("static", "dynamic")
    }


def all_pixels(canvases: DigitCanvases) -> Tensor:
    return torch.stack([canvases[index]["pixel_values"] for index in range(len(canvases))])


def train_image_models(folder: Path, seed: int, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains each model on static and on dynamic digits; returns the table's rows, and the models of the dynamic ones."""
    digits, _ = digits_split()
    digits = digits.first(settings.train_digits)
    tests = digit_tests(seed, settings)
    rows, dynamic_models = [], {}
    for name, fields in IMAGE_MODELS.items():
        row = {"model": name, "seconds": {}, "accuracy": {}}
        for placement in ("static", "dynamic"):
            set_seed(seed)
            model = TranslutionForImageClassification(TranslutionConfig(**IMAGE_FIELDS, **fields))
            row["parameters"] = count_parameters(model)
            row["seconds"][placement] = train(
                model,
                DigitCanvases(digits, placement, seed),
                f"{name}, {placement}",
                folder,
                seed,
                settings,
                num_train_epochs=settings.image_epochs,
                per_device_train_batch_size=settings.image_batch,
                learning_rate=settings.image_learning_rate,
            )
            for comparison, (trained_on, tested_on) in COMPARISONS.items():
                if trained_on == placement:
                    predictions = classify(model, all_pixels(tests[tested_on]))
                    row["accuracy"][comparison] = accuracy(predictions, tests[tested_on].digits.labels)
        rows.append(row)
        dynamic_models[name] = model
    return rows, dynamic_models


def run_images(folder: Path, seed: int, settings: Settings) -> dict[str, Any]:
    """The pictures' part: trains, saves the best model on dynamic digits, draws; returns the figures."""
    header("Pictures: handwritten digits on a 16 × 16 canvas")
    rows, models = train_image_models(folder, seed, settings)
    scores = {row["model"]: row["accuracy"]["dynamic → dynamic"] for row in rows}
    best = max(scores, key=scores.get)
    attention = max(score for name, score in scores.items() if name.startswith("attention"))
    model, test = models[best], digit_tests(seed, settings)["dynamic"]
    model.save_pretrained(folder / IMAGE_CHECKPOINT)
    digits_processor().save_pretrained(folder / IMAGE_CHECKPOINT)
    predictions = classify(model, all_pixels(test))
    draw(folder / PICTURE, rows, test, predictions, models[FULL_TRANSLUTION])
    return {
        "models": rows,
        "best": best,
        "points_above_attention": max(score for score in scores.values()) - attention,
        "train_digits": len(digits_split()[0].first(settings.train_digits)),
        "test_digits": len(test),
        "predictions": predictions.tolist(),
        "accuracy": scores[best],
    }


def check_images(folder: Path, seed: int, settings: Settings) -> dict[str, Any]:
    """What a fresh process makes of the saved classifier: from pictures, with the Auto classes and a pipeline."""
    test = digit_tests(seed, settings)["dynamic"]
    pictures = test.pictures()
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    predictions = classify(model.eval(), processor(images=pictures, return_tensors="pt")["pixel_values"])
    classifier = pipeline("image-classification", model=str(folder), device="cpu")
    labels = [found[0]["label"] for found in classifier(pictures, top_k=1)]
    return {
        "predictions": predictions.tolist(),
        "pipeline_predictions": [int(label) for label in labels],
        "accuracy": accuracy(predictions, test.digits.labels),
    }


# Text


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: TokenBlocks) -> float:
    """Of one token after the other, the first of a block excepted."""
    losses = []
    for batch in blocks.blocks.split(32):
        losses.append(model(input_ids=batch, labels=batch).loss.double() * len(batch))
    return math.exp(sum(losses).item() / len(blocks))


def held_out_blocks(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> TokenBlocks:
    """Blocks of the files that nothing is trained on, spread evenly over them."""
    _, files = split_files(standard_library_files())
    data = token_blocks(read_texts(files[: settings.held_out_files]), tokenizer, settings.text_length)
    data.blocks = data.blocks[:: max(1, len(data) // settings.held_out_blocks)][: settings.held_out_blocks]
    return data


def write_sample(model: Any, tokenizer: Any, seed: int, settings: Settings) -> str:
    """A text that a model (or the checkpoint in a folder) continues from `PROMPT`, up to the block length."""
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    room = settings.text_length - len(generator.tokenizer(PROMPT)["input_ids"])
    set_seed(seed)
    return generator(PROMPT, max_new_tokens=room, do_sample=True, temperature=0.7, top_k=50)[0]["generated_text"]


def run_text(folder: Path, seed: int, settings: Settings) -> dict[str, Any]:
    """The text's part: trains a tokenizer and the models, saves the best; returns the figures."""
    header("Text: the source text of Python's standard library")
    files, _ = split_files(standard_library_files())
    texts = list(read_texts(files[: settings.train_files]))
    tokenizer = train_tokenizer(texts, settings.vocab_size, settings.text_length)
    data, held_out = token_blocks(texts, tokenizer, settings.text_length), held_out_blocks(tokenizer, settings)
    rows, models = [], {}
    for name, fields in TEXT_MODELS.items():
        set_seed(seed)
        tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        tokens |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
        config = TranslutionConfig(**TEXT_FIELDS, **tokens, max_position_embeddings=settings.text_length, **fields)
        models[name] = TranslutionForCausalLM(config)
        seconds = train(
            models[name],
            data,
            name,
            folder,
            seed,
            settings,
            max_steps=settings.text_steps,
            per_device_train_batch_size=settings.text_batch,
            learning_rate=settings.text_learning_rate,
        )
        row = {"model": name, "parameters": count_parameters(models[name]), "seconds": seconds}
        rows.append({**row, "perplexity": perplexity(models[name], held_out)})
    best = min(rows, key=lambda row: row["perplexity"])
    models[best["model"]].save_pretrained(folder / TEXT_CHECKPOINT)
    tokenizer.save_pretrained(folder / TEXT_CHECKPOINT)
    return {
        "models": rows,
        "best": best["model"],
        "train_blocks": len(data),
        "held_out_blocks": len(held_out),
        "perplexity": best["perplexity"],
        "sample": write_sample(models[best["model"]], tokenizer, seed, settings),
    }


def check_text(folder: Path, seed: int, settings: Settings) -> dict[str, Any]:
    """What a fresh process makes of the saved language model: with the Auto classes and a pipeline."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "perplexity": perplexity(model.eval(), held_out_blocks(tokenizer, settings)),
        "sample": write_sample(str(folder), None, seed, settings),
    }


# The cards


def image_run(report: dict[str, Any]) -> dict[str, Any]:
    """What the card of the saved classifier tells of its training."""
    images, settings = report["images"], report["settings"]
    best = next(row for row in images["models"] if row["model"] == images["best"])
    return {
        "task": "image-classification",
        "dataset": {
            "name": f"scikit-learn's handwritten digits, anywhere on a canvas of {CANVAS_SIZE} × {CANVAS_SIZE}",
            "train_split": f"{images['train_digits']} digits",
            "eval_split": f"{images['test_digits']} held-out digits",
        },
        "metrics": {"accuracy": images["accuracy"] / 100},
        "hyperparameters": {
            "num_train_epochs": settings["image_epochs"],
            "per_device_train_batch_size": settings["image_batch"],
            "learning_rate": settings["image_learning_rate"],
            **shared_hyperparameters(report),
        },
        "seconds": best["seconds"]["dynamic"],
        **run_circumstances(report),
    }


def text_run(report: dict[str, Any]) -> dict[str, Any]:
    """What the card of the saved language model tells of its training."""
    text, settings = report["text"], report["settings"]
    best = next(row for row in text["models"] if row["model"] == text["best"])
    return {
        "task": "text-generation",
        "dataset": {
            "name": f"source text of Python's standard library, blocks of {settings['text_length']} tokens",
            "train_split": f"{text['train_blocks']} blocks",
            "eval_split": f"{text['held_out_blocks']} blocks of held-out files",
        },
        "metrics": {"perplexity": text["perplexity"]},
        "hyperparameters": {
            "max_steps": settings["text_steps"],
            "per_device_train_batch_size": settings["text_batch"],
            "learning_rate": settings["text_learning_rate"],
            **shared_hyperparameters(report),
        },
        "seconds": best["seconds"],
        **run_circumstances(report),
    }


def shared_hyperparameters(report: dict[str, Any]) -> dict[str, Any]:
    settings = report["settings"]
    return {
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings["warmup_steps"],
        "weight_decay": settings["weight_decay"],
        "seed": report["seed"],
    }


def run_circumstances(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "hardware": report["accelerator"] or report["cpu"],
        "versions": report["versions"],
        "commit": report["commit"],
        "command": report["command"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def leave_card(checkpoint: Path, run: dict[str, Any]):
    """Writes `run.json` and the model card beside a saved model."""
    (checkpoint / RUN).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_model_card(checkpoint)


# The fresh process


def use_checkpoints(folder: Path, seed: int, settings: Settings):
    """Runs in a fresh process: loads what was saved, uses it, and writes down what came out."""
    results = {}
    if (folder / IMAGE_CHECKPOINT).exists():
        results["images"] = check_images(folder / IMAGE_CHECKPOINT, seed, settings)
    if (folder / TEXT_CHECKPOINT).exists():
        results["text"] = check_text(folder / TEXT_CHECKPOINT, seed, settings)
    (folder / FRESH_RESULTS).write_text(json.dumps(results), encoding="utf-8")


def compare_with_fresh_process(folder: Path, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Has a fresh process use the checkpoints, and makes sure that it finds what this one found; returns what it found.

    Raises:
        RuntimeError: if it does not.
    """
    header("The same from a fresh process")
    command = [sys.executable, str(Path(__file__).resolve()), "--use_checkpoints", "--output_dir", str(folder)]
    command += ["--seed", str(args.seed)] + ["--quick"] * args.quick
    subprocess.run(command, check=True)
    fresh = json.loads((folder / FRESH_RESULTS).read_text(encoding="utf-8"))
    (folder / FRESH_RESULTS).unlink()
    if "images" in report:
        here, there = report["images"], fresh["images"]
        require_equal("predictions", here["predictions"], there["predictions"])
        require_equal("predictions of the pipeline", here["predictions"], there["pipeline_predictions"])
        require_equal("accuracy", here["accuracy"], there["accuracy"])
        print(f"{here['best']}: {len(here['predictions'])} predictions equal, accuracy {there['accuracy']:.1f} %")
    if "text" in report:
        here, there = report["text"], fresh["text"]
        require_equal("perplexity", round(here["perplexity"], 4), round(there["perplexity"], 4))
        require_equal("generated text", here["sample"], there["sample"])
        print(f"{here['best']}: generated text equal, perplexity {there['perplexity']:.2f}")
    return fresh


def require_equal(what: str, here: Any, there: Any):
    if here != there:
        raise RuntimeError(f"The {what} of the training process and of a fresh one differ: {here} and {there}.")


# Results


def draw(
    path: Path, rows: list[dict[str, Any]], test: DigitCanvases, predictions: Tensor, full_model: PreTrainedModel
):
    """Sample canvases with predictions, accuracies, and the size of each offset's matrix."""
    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.5, 0.95))

    left.suptitle("What the best model says")
    for index, axes in enumerate(left.subplots(3, 4).flat):
        axes.imshow(test.picture(index), cmap="gray_r")
        says, is_right = predictions[index].item(), predictions[index] == test.digits.labels[index]
        axes.set_title(f"{says}" if is_right else f"{says}, not {test.digits.labels[index]}", fontsize=9)
        axes.title.set_color("black" if is_right else "crimson")
        axes.set(xticks=[], yticks=[])

    axes = middle.subplots()
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        heights = [row["accuracy"][name] for name in COMPARISONS]
        places = np.arange(len(COMPARISONS)) + (number - (len(rows) - 1) / 2) * width
        bars = axes.bar(places, heights, width, label=row["model"])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(COMPARISONS)), COMPARISONS)
    axes.set(ylim=(0, 118), ylabel="accuracy, %", title="Trained → tested: digits in the middle, or anywhere")
    axes.legend(ncols=2, fontsize=8, loc="upper center")

    axes = right.subplots()
    height, grid_width = full_model.config.grid_height_width
    bank = full_model.model.layers[0].mixer.v_bank.detach()
    norms = bank[: (2 * height - 1) * (2 * grid_width - 1)].norm(dim=(1, 2)).view(2 * height - 1, 2 * grid_width - 1)
    extent = (0.5 - grid_width, grid_width - 0.5, height - 0.5, 0.5 - height)
    right.colorbar(axes.imshow(norms, cmap="viridis", extent=extent), ax=axes, shrink=0.7)
    axes.set(xlabel="columns", ylabel="rows", title="Norm of each offset's\nvalue matrix, layer 1")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, if it is one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def circumstances(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What someone needs to know to get the same figures."""
    packages = (translution, torch, transformers, accelerate, sklearn, np)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "command": f"python scripts/demo.py {' '.join(args.arguments)}".strip(),
        "commit": commit(),
        "seed": args.seed,
        "settings": asdict(settings),
        "image_fields": IMAGE_FIELDS,
        "text_fields": TEXT_FIELDS,
        "versions": {"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in packages},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": str(accelerator) if accelerator else None,
    }


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table: the first column is text, the others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)] + rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image_table(images: dict[str, Any]) -> str:
    rows = [
        [row["model"], f"{row['parameters']:,}", f"{sum(row['seconds'].values()):.0f}"]
        + [f"{row['accuracy'][name]:.1f} %" for name in COMPARISONS]
        for row in images["models"]
    ]
    return table(["model", "parameters", "seconds", *COMPARISONS], rows)


def text_table(text: dict[str, Any]) -> str:
    rows = [
        [row["model"], f"{row['parameters']:,}", f"{row['seconds']:.0f}", f"{row['perplexity']:.1f}"]
        for row in text["models"]
    ]
    return table(["model", "parameters", "seconds", "perplexity"], rows)


def header(text: str):
    print(f"\n== {text}", flush=True)


def print_report(report: dict[str, Any], folder: Path):
    """Tables to paste, and where the files are."""
    header("Results")
    if "images" in report:
        images = report["images"]
        print(f"\nAccuracy on {images['test_digits']} held-out digits (trained → tested)\n\n{image_table(images)}")
        print(
            f"\nOn dynamic digits the best model, {images['best']}, is {images['points_above_attention']:.1f} points above "
            "the better attention of the same width."
        )
    if "text" in report:
        text = report["text"]
        print(f"\nPerplexity on held-out files\n\n{text_table(text)}\n\nThe best one goes on from {PROMPT!r}:\n")
        print("\n".join("    " + line for line in text["sample"].splitlines()))
    print(f"\n{report['seconds']:.0f} seconds in all. Written to {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"    {path.name}{'/' if path.is_dir() else ''}")


@contextlib.contextmanager
def replaced_when_done(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once all is well; until then the old one stays as it is.

    Raises:
        FileExistsError: if `folder` holds something else than an earlier output of this script.
    """
    if folder.exists() and not (folder / REPORT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an earlier output of this script: give another `--output_dir`.")
    partial, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="replaced by a run that succeeds")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of training, and places of digits")
    parser.add_argument("--skip_images", action="store_true", help="text only")
    parser.add_argument("--skip_text", action="store_true", help="pictures only")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    parser.add_argument("--use_checkpoints", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.skip_images and args.skip_text:
        parser.error("--skip_images and --skip_text leave nothing to do")
    args.output_dir = args.output_dir.resolve()
    args.arguments = arguments
    return args


def main(arguments: list[str]):
    args = parse_arguments(arguments)
    settings = QUICK if args.quick else Settings()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.use_checkpoints:
        use_checkpoints(args.output_dir, args.seed, settings)
        return
    start = time.perf_counter()
    with replaced_when_done(args.output_dir) as folder:
        report = circumstances(args, settings)
        if not args.skip_images:
            report["images"] = run_images(folder, args.seed, settings)
            leave_card(folder / IMAGE_CHECKPOINT, image_run(report))
        if not args.skip_text:
            report["text"] = run_text(folder, args.seed, settings)
            leave_card(folder / TEXT_CHECKPOINT, text_run(report))
        report["fresh_process"] = compare_with_fresh_process(folder, args, report)
        report["seconds"] = time.perf_counter() - start
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_report(report, args.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])

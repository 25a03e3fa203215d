"""Trains Translution and attention on real data with the training scripts, and uses the best models from a fresh process.

    python scripts/demo.py --output_dir runs/demo

Images: handwritten digits in the middle of a canvas ("static") or anywhere on it ("dynamic"). Text: the source text of
Python's standard library. Models of one comparison have the same width and are trained alike, by the recipes `digits.yaml`
and `stdlib.yaml`; only the mixer differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import run_clm
import run_image_classification
import torch
import transformers
from common.atomic_folder import written_whole
from common.command import ArgumentParser, run_command
from common.hardware import hardware
from common.saved_files import RUN
from common.tables import markdown
from datasets import Dataset
from training.digits import PLACEMENTS
from training.image_data import digits_dataset
from training.model_card import write_model_card
from training.output_folder import LEFT_BEHIND, RUN_ARGUMENTS
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel, pipeline, set_seed


# A backend that needs no screen.
matplotlib.use("Agg")
from matplotlib import pyplot as plt


RECIPES = Path(__file__).parent / "recipes"
# Models of the same width: their names, and what their configs add to the recipe's.
IMAGE_MODELS = {
    "attention, absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "attention, rotary": {"mixer_types": "rope_attention"},
    "LoR-Translution": {"relative_projections": "kv", "relative_rank": 8},
    "Translution": {"relative_projections": "kv"},
}
TEXT_MODELS = {name: IMAGE_MODELS[name] for name in ("attention, rotary", "Translution")}
FULL_TRANSLUTION = "Translution"
# The placement to train on, and the one to test on.
DYNAMIC = "dynamic → dynamic"
COMPARISONS = ("static → static", "static → dynamic", DYNAMIC)
PROMPT = "def "
# With `--quick`.
QUICK_TEST_IMAGES = 40
QUICK_IMAGES = f"--num_train_epochs 1 --max_train_samples 64 --max_eval_samples {QUICK_TEST_IMAGES}".split()
QUICK_TEXT = ["--max_steps", "2", "--vocab_size", "300", "--max_train_samples", "2", "--max_eval_samples", "1"]

IMAGE_CHECKPOINT, TEXT_CHECKPOINT = "image-model", "text-model"
REPORT, PICTURE, FRESH_RESULTS = "demo.json", "demo.png", "fresh_process.json"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train(main: Callable[[Sequence[str]], None], title: str, folder: Path, fields: dict[str, Any], *options: str):
    """Runs a training script with a recipe and config fields of a model, and returns the run's `run.json`."""
    print(title, flush=True)
    overrides = ["--config_overrides", json.dumps(fields)]
    # One evaluation, at the end, and no checkpoints.
    rare = ["--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "no", "--report_to", "none"]
    with contextlib.redirect_stdout(io.StringIO()):
        main([*options, *overrides, *rare, "--output_dir", str(folder)])
    return read_json(folder / RUN)


def evaluate(main: Callable[[Sequence[str]], None], folder: Path, *options: str) -> dict[str, float]:
    """Has a training script evaluate a model, and returns the metrics."""
    with contextlib.redirect_stdout(io.StringIO()):
        main([*options, "--do_train", "false", "--output_dir", str(folder)])
    return read_json(folder / "evaluation_results.json")


def header(text: str):
    print(f"\n== {text}", flush=True)


# Images


def digits_recipe(args: argparse.Namespace, placement: str) -> list[str]:
    options = [str(RECIPES / "digits.yaml"), "--dataset_config_name", placement, "--seed", str(args.seed)]
    return options + (QUICK_IMAGES if args.quick else [])


def test_images(args: argparse.Namespace) -> Dataset:
    """The held-out digits anywhere on the canvas, always at the same places."""
    data = digits_dataset("dynamic")["test"]
    return data.select(range(QUICK_TEST_IMAGES)) if args.quick else data


def run_images(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the classifiers, keeps the best one on dynamic digits, draws, and returns the figures."""
    header("Images: handwritten digits on a 16 × 16 canvas")
    runs, main = folder / "runs", run_image_classification.main
    rows = []
    for name, fields in IMAGE_MODELS.items():
        row = {"model": name, "seconds": {}, "accuracy": {}}
        for placement in PLACEMENTS:
            trained = runs / f"{name}, {placement}"
            run = train(main, f"{name}, {placement}", trained, fields, *digits_recipe(args, placement))
            row["seconds"][placement] = run["seconds"]
            row["accuracy"][f"{placement} → {placement}"] = 100 * run["metrics"]["accuracy"]
        # The model of the static run, on the data of the dynamic one.
        options = [*digits_recipe(args, "dynamic"), "--config_overrides", json.dumps(fields)]
        options += ["--resume_from_checkpoint", str(runs / f"{name}, static")]
        moved = evaluate(main, runs / f"{name}, evaluated", *options)
        row["accuracy"]["static → dynamic"] = 100 * moved["eval_accuracy"]
        row["parameters"] = AutoModelForImageClassification.from_pretrained(trained).num_parameters()
        rows.append(row)
    scores = {row["model"]: row["accuracy"][DYNAMIC] for row in rows}
    best = max(scores, key=scores.get)
    full_model = AutoModelForImageClassification.from_pretrained(runs / f"{FULL_TRANSLUTION}, dynamic")
    keep(runs / f"{best}, dynamic", folder / IMAGE_CHECKPOINT, args, {"accuracy": scores[best] / 100})
    test = test_images(args)
    predictions = classify(folder / IMAGE_CHECKPOINT, test)
    draw(folder / PICTURE, rows, test, predictions, full_model)
    return {
        "models": rows,
        "best": best,
        "points_above_attention": scores[best]
        - max(score for name, score in scores.items() if name.startswith("attention")),
        "test_digits": len(test),
        "predictions": predictions,
        "accuracy": scores[best],
    }


def classify(model: Path, data: Dataset) -> list[int]:
    """The most likely class of each image."""
    classifier = pipeline("image-classification", model=str(model), device="cpu")
    return [int(found[0]["label"]) for found in classifier(list(data["image"]), top_k=1)]


# Text


def text_recipe(args: argparse.Namespace, folder: Path) -> list[str]:
    options = [str(RECIPES / "stdlib.yaml"), "--cache_dir", str(folder / "cache"), "--seed", str(args.seed)]
    return options + (QUICK_TEXT if args.quick else [])


def run_text(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the language models, keeps the best one, and returns the figures."""
    header("Text: the source text of Python's standard library")
    rows = []
    for name, fields in TEXT_MODELS.items():
        trained = folder / "runs" / name
        run = train(run_clm.main, name, trained, fields, *text_recipe(args, folder))
        parameters = AutoModelForCausalLM.from_pretrained(trained).num_parameters()
        row = {"model": name, "parameters": parameters, "seconds": run["seconds"]}
        rows.append({**row, "perplexity": run["metrics"]["perplexity"]})
    best = min(rows, key=lambda row: row["perplexity"])
    metrics = {"perplexity": best["perplexity"]}
    keep(folder / "runs" / best["model"], folder / TEXT_CHECKPOINT, args, metrics)
    return {
        "models": rows,
        "best": best["model"],
        **metrics,
        "sample": write_sample(folder / TEXT_CHECKPOINT, args.seed),
    }


def write_sample(model: Path, seed: int) -> str:
    """A continuation of `PROMPT`, as long as the model's context."""
    generator = pipeline("text-generation", model=str(model), device="cpu")
    room = generator.model.config.max_position_embeddings - len(generator.tokenizer(PROMPT)["input_ids"])
    set_seed(seed)
    return generator(PROMPT, max_new_tokens=room, do_sample=True, temperature=0.7, top_k=50)[0]["generated_text"]


# What stays


def command(args: argparse.Namespace) -> str:
    return shlex.join(["python", "scripts/demo.py", *args.arguments])


def keep(run: Path, target: Path, args: argparse.Namespace, metrics: dict[str, float]) -> None:
    """Moves a run to its place, with a card of the demo's command and of the metrics that the demo shows."""
    run.rename(target)
    # Nobody resumes this run.
    (target / RUN_ARGUMENTS).unlink()
    shutil.rmtree(target / LEFT_BEHIND, ignore_errors=True)
    write_json(target / RUN, read_json(target / RUN) | {"metrics": metrics, "command": command(args)})
    write_model_card(target)


def use_checkpoints(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Results of the models that were kept, by the Auto classes and pipelines."""
    results = {}
    if (folder / IMAGE_CHECKPOINT).exists():
        results["images"] = {"predictions": classify(folder / IMAGE_CHECKPOINT, test_images(args))}
    if (folder / TEXT_CHECKPOINT).exists():
        results["text"] = {"sample": write_sample(folder / TEXT_CHECKPOINT, args.seed)}
        model = folder / TEXT_CHECKPOINT
        options = ["--model_name_or_path", str(model), "--dataset_name", "stdlib", "--seed", str(args.seed)]
        options += ["--max_eval_samples", "1" if args.quick else "8", "--cache_dir", str(folder / "cache")]
        metrics = evaluate(run_clm.main, folder / "runs" / "fresh", *options, "--report_to", "none")
        results["text"]["perplexity"] = metrics["eval_perplexity"]
    return results


def compare_with_fresh_process(folder: Path, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Has a fresh process use the saved models, checks its results against this process's, and returns them.

    Raises:
        RuntimeError: if they differ.
    """
    header("The same from a fresh process")
    options = ["--use_checkpoints", "--output_dir", str(folder), "--seed", str(args.seed)] + ["--quick"] * args.quick
    subprocess.run([sys.executable, str(Path(__file__).resolve()), *options], check=True)
    fresh = read_json(folder / FRESH_RESULTS)
    (folder / FRESH_RESULTS).unlink()
    if "images" in report:
        here, there = report["images"], fresh["images"]
        labels = test_images(args)["label"]
        there["accuracy"] = 100 * float(np.mean(np.equal(there["predictions"], labels)))
        require_agreement("predictions", here["predictions"] == there["predictions"])
        # Rounding depends on batch size and device, and may decide between two classes of one image.
        require_agreement("accuracies", abs(here["accuracy"] - there["accuracy"]) < 101 / len(labels))
        print(f"{here['best']}: {len(labels)} predictions equal, accuracy {there['accuracy']:.1f} %")
    if "text" in report:
        here, there = report["text"], fresh["text"]
        require_agreement("perplexities", math.isclose(here["perplexity"], there["perplexity"], rel_tol=1e-4))
        require_agreement("generated texts", here["sample"] == there["sample"])
        print(f"{here['best']}: generated text equal, perplexity {there['perplexity']:.2f}")
    return fresh


def require_agreement(what: str, agree: bool):
    if not agree:
        raise RuntimeError(f"The {what} of the training process and of a fresh one differ.")


def draw(path: Path, rows: list[dict[str, Any]], test: Dataset, predictions: list[int], full_model: PreTrainedModel):
    """Test images with predictions, accuracies, and the norm of each offset's matrix."""
    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.5, 0.95))

    left.suptitle("Predictions of the best model")
    for axes, row, prediction in zip(left.subplots(3, 4).flat, test, predictions, strict=False):
        axes.imshow(row["image"], cmap="gray_r")
        is_right = prediction == row["label"]
        axes.set_title(f"{prediction}" if is_right else f"{prediction}, not {row['label']}", fontsize=9)
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


def image_table(images: dict[str, Any]) -> str:
    rows = [
        [row["model"], f"{row['parameters']:,}", f"{sum(row['seconds'].values()):.0f}"]
        + [f"{row['accuracy'][name]:.1f} %" for name in COMPARISONS]
        for row in images["models"]
    ]
    return markdown(["model", "parameters", "seconds", *COMPARISONS], rows)


def text_table(text: dict[str, Any]) -> str:
    rows = [
        [row["model"], f"{row['parameters']:,}", f"{row['seconds']:.0f}", f"{row['perplexity']:.1f}"]
        for row in text["models"]
    ]
    return markdown(["model", "parameters", "seconds", "perplexity"], rows)


def print_report(report: dict[str, Any], folder: Path):
    """Prints the tables, and where the files are."""
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
        print(f"\nPerplexity on held-out files\n\n{text_table(text)}\n\nThe best one continues {PROMPT!r}:\n")
        print("\n".join("    " + line for line in text["sample"].splitlines()))
    print(f"\n{report['seconds']:.0f} seconds in all. Written to {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"    {path.name}{'/' if path.is_dir() else ''}")


@contextlib.contextmanager
def replaced_when_done(folder: Path) -> Iterator[Path]:
    """A new folder that replaces `folder` at the end; if anything fails, `folder` stays as it is.

    Raises:
        FileExistsError: if `folder` holds something other than an earlier output of this script.
    """
    if folder.exists() and not (folder / REPORT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an earlier output of this script: give another `--output_dir`.")
    with written_whole(folder) as new:
        yield new


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="replaced by a run that succeeds")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and of the order of training")
    parser.add_argument("--skip_images", action="store_true", help="text only")
    parser.add_argument("--skip_text", action="store_true", help="images only")
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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.use_checkpoints:
        write_json(args.output_dir / FRESH_RESULTS, use_checkpoints(args.output_dir, args))
        return
    start, machine = time.perf_counter(), hardware()
    with replaced_when_done(args.output_dir) as folder:
        report = {
            "command": command(args),
            "commit": machine["commit"],
            "seed": args.seed,
            "versions": {name: machine[name] for name in ("python", "torch", "transformers")},
            "cpu": machine["device"],
            "threads": machine["threads"],
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
        if not args.skip_images:
            report["images"] = run_images(folder, args)
        if not args.skip_text:
            report["text"] = run_text(folder, args)
        report["fresh_process"] = compare_with_fresh_process(folder, args, report)
        shutil.rmtree(folder / "runs")
        shutil.rmtree(folder / "cache", ignore_errors=True)
        report["seconds"] = time.perf_counter() - start
        write_json(folder / REPORT, report)
    print_report(report, args.output_dir)


if __name__ == "__main__":
    run_command(main)

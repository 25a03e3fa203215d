"""Trains Translution and attention on real data with the training scripts, and uses the best models from a fresh process.

    python scripts/demo.py --output_dir runs/demo

Images: handwritten digits in the middle of a canvas ("static") or anywhere on it ("dynamic"). Text: the source text of
Python's standard library. Local Translution is compared with rotary attention that is widened to as many parameters. All are
trained alike, by the recipes `digits.yaml` and `stdlib.yaml`; each has a learning rate that did well when the study tuned it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import run_clm
import run_image_classification
import torch
import transformers
from common.atomic_folder import written_whole
from common.canvas import PLACEMENTS
from common.command import ArgumentParser, run_command
from common.hardware import hardware
from common.saved_files import RUN, read_json, write_json
from datasets import Dataset
from studies.demo_report import draw, print_report
from studies.settings import DYNAMIC, SETTINGS
from studies.variants import STUDIES, model_fields
from training.image_data import digits_dataset
from training.model_card import write_model_card
from training.output_folder import LEFT_BEHIND, RUN_ARGUMENTS
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, pipeline, set_seed


RECIPES = Path(__file__).parent / "recipes"
# Models of each task by name: a variant of the study, and a learning rate that did well when that was tuned.
MODELS = {
    "images": {
        "attention, rotary": ("attention, rotary, as local kv, D 1, shared", 0.001),
        "local Translution": ("local kv, D 1, shared", 0.002),
        "Translution": ("full kv", 0.004),
    },
    "text": {
        "attention, rotary": ("attention, rotary, as local kv, D 3, rotary", 0.006),
        "local Translution": ("local kv, D 3, rotary", 0.006),
    },
}
SIZES = ("hidden_size", "head_dim", "intermediate_size")
FULL_TRANSLUTION, LOCAL = "Translution", "local Translution"
PROMPT = "def "
RECIPE = {"images": "digits.yaml", "text": "stdlib.yaml"}
# With `--quick`.
QUICK_TEST_IMAGES, QUICK_VOCABULARY = 40, 300
QUICK = {
    "images": f"--num_train_epochs 1 --max_train_samples 64 --max_eval_samples {QUICK_TEST_IMAGES}",
    "text": f"--max_steps 2 --vocab_size {QUICK_VOCABULARY} --max_train_samples 2 --max_eval_samples 1",
}
# One evaluation, at the end, and no checkpoints.
ONCE = ["--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "no"]

IMAGE_CHECKPOINT, TEXT_CHECKPOINT = "image-model", "text-model"
REPORT, PICTURE = "demo.json", "demo.png"


def options_of(task: str, model: str, args: argparse.Namespace) -> list[str]:
    """Options of a training script: the task's recipe, the config fields of a model of the study, and its learning rate."""
    variant, learning_rate = MODELS[task][model]
    found = next(one for variants in STUDIES.values() for one in variants[task] if one.name == variant)
    vocabulary = QUICK_VOCABULARY if args.quick else SETTINGS.vocab_size
    fields = model_fields(task, found, SETTINGS.text_lengths[0], vocabulary)
    own = json.dumps({name: fields[name] for name in (*SIZES, *found.fields)})
    options = ["--config_overrides", own, "--learning_rate", str(learning_rate), "--seed", str(args.seed)]
    return [str(RECIPES / RECIPE[task]), *options, *QUICK[task].split() * args.quick]


def call(main: Callable[[Sequence[str]], None], folder: Path, *options: str) -> dict[str, Any]:
    """Calls a training script without what it prints; returns `run.json`, or the metrics where nothing is trained."""
    with contextlib.redirect_stdout(io.StringIO()):
        main([*options, *ONCE, "--report_to", "none", "--output_dir", str(folder)])
    return read_json(folder / ("evaluation_results.json" if "--do_train" in options else RUN))


def keep(run: Path, target: Path, args: argparse.Namespace, metrics: dict[str, float]) -> None:
    """Moves a run to its place, with a card of the demo's command and of the metrics that the demo shows."""
    run.rename(target)
    # Nobody resumes this run.
    (target / RUN_ARGUMENTS).unlink()
    shutil.rmtree(target / LEFT_BEHIND, ignore_errors=True)
    write_json(target / RUN, read_json(target / RUN) | {"metrics": metrics, "command": args.command})
    write_model_card(target)


# Images


def run_images(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the classifiers, keeps the best one on dynamic digits, draws, and returns the figures."""
    print("\n== Images: handwritten digits on a 16 × 16 canvas", flush=True)
    runs, main = folder / "runs", run_image_classification.main
    rows, models = [], {}
    for name in MODELS["images"]:
        row = {"model": name, "seconds": {}, "accuracy": {}}
        for placement in PLACEMENTS:
            print(f"{name}, {placement}", flush=True)
            options = [*options_of("images", name, args), "--dataset_config_name", placement]
            run = call(main, runs / f"{name}, {placement}", *options)
            row["seconds"][placement] = run["seconds"]
            row["accuracy"][f"{placement} → {placement}"] = 100 * run["metrics"]["accuracy"]
        # The model of the static run, on the data of the dynamic one, which came last.
        options += ["--resume_from_checkpoint", str(runs / f"{name}, static"), "--do_train", "false"]
        row["accuracy"]["static → dynamic"] = 100 * call(main, runs / f"{name}, evaluated", *options)["eval_accuracy"]
        models[name] = AutoModelForImageClassification.from_pretrained(runs / f"{name}, dynamic")
        rows.append({**row, "parameters": models[name].num_parameters()})
    scores = {row["model"]: row["accuracy"][DYNAMIC] for row in rows}
    best = max(scores, key=scores.get)
    keep(runs / f"{best}, dynamic", folder / IMAGE_CHECKPOINT, args, {"accuracy": scores[best] / 100})
    test = test_images(args)
    predictions = classify(folder, args)["predictions"]
    draw(folder / PICTURE, rows, test, predictions, models[FULL_TRANSLUTION])
    return {
        "models": rows,
        "best": best,
        "points_above_attention": scores[LOCAL] - max(scores[name] for name in scores if name.startswith("attention")),
        "test_digits": len(test),
        "predictions": predictions,
        "accuracy": scores[best],
    }


def test_images(args: argparse.Namespace) -> Dataset:
    """The held-out digits anywhere on the canvas, always at the same places."""
    data = digits_dataset("dynamic")["test"]
    return data.select(range(QUICK_TEST_IMAGES)) if args.quick else data


def classify(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The most likely class of each test image by the model that was kept, and the accuracy in per cent."""
    test = test_images(args)
    classifier = pipeline("image-classification", model=str(folder / IMAGE_CHECKPOINT), device="cpu")
    predictions = [int(found[0]["label"]) for found in classifier(list(test["image"]), top_k=1)]
    return {"predictions": predictions, "accuracy": 100 * float(np.mean(np.equal(predictions, test["label"])))}


# Text


def run_text(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the language models, keeps the best one, and returns the figures."""
    print("\n== Text: the source text of Python's standard library", flush=True)
    rows, cache = [], ["--cache_dir", str(folder / "cache")]
    for name in MODELS["text"]:
        print(name, flush=True)
        run = call(run_clm.main, folder / "runs" / name, *options_of("text", name, args), *cache)
        parameters = AutoModelForCausalLM.from_pretrained(folder / "runs" / name).num_parameters()
        row = {"model": name, "parameters": parameters, "seconds": run["seconds"]}
        rows.append({**row, "perplexity": run["metrics"]["perplexity"]})
    best = min(rows, key=lambda row: row["perplexity"])
    metrics = {"perplexity": best["perplexity"]}
    keep(folder / "runs" / best["model"], folder / TEXT_CHECKPOINT, args, metrics)
    return {"models": rows, "best": best["model"], **metrics, "sample": write_sample(folder, args)}


def write_sample(folder: Path, args: argparse.Namespace) -> str:
    """A continuation of `PROMPT` by the model that was kept, as long as its context."""
    generator = pipeline("text-generation", model=str(folder / TEXT_CHECKPOINT), device="cpu")
    room = generator.model.config.max_position_embeddings - len(generator.tokenizer(PROMPT)["input_ids"])
    set_seed(args.seed)
    return generator(PROMPT, max_new_tokens=room, do_sample=True, temperature=0.7, top_k=50)[0]["generated_text"]


# The fresh process


def be_quiet() -> None:
    """Leaves out what Transformers and Datasets print."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def use_checkpoints(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Results of the models that were kept, by the Auto classes and pipelines."""
    options = f"--dataset_name stdlib --do_train false --max_eval_samples {1 if args.quick else 8} --seed {args.seed}"
    paths = ["--model_name_or_path", str(folder / TEXT_CHECKPOINT), "--cache_dir", str(folder / "cache")]
    metrics = call(run_clm.main, folder / "runs" / "fresh", *options.split(), *paths)
    text = {"sample": write_sample(folder, args), "perplexity": metrics["eval_perplexity"]}
    return {"images": classify(folder, args), "text": text}


def compare_with_fresh_process(folder: Path, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Has a fresh process use the saved models, checks its results against this process's, and returns them.

    Raises:
        RuntimeError: if they differ.
    """
    print("\n== The same from a fresh process", flush=True)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=be_quiet) as pool:
        fresh = pool.submit(use_checkpoints, folder, args).result()
    images, text = report["images"], report["text"]
    # Rounding depends on batch size and device, and may decide between two classes of one image.
    allowed = {"accuracy": 101 / images["test_digits"], "perplexity": 1e-4 * text["perplexity"]}
    for name, there in (fresh["images"] | fresh["text"]).items():
        here = (images | text)[name]
        if here != there and not (name in allowed and abs(here - there) < allowed[name]):
            raise RuntimeError(f"`{name}` of the training process and of a fresh one differ: {here}, {there}.")
    accuracy, perplexity = fresh["images"]["accuracy"], fresh["text"]["perplexity"]
    print(f"{images['best']}: {images['test_digits']} predictions equal, accuracy {accuracy:.1f} %")
    print(f"{text['best']}: generated text equal, perplexity {perplexity:.2f}")
    return fresh


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


def main(arguments: list[str]):
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="replaced by a run that succeeds")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and of the order of training")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    args = parser.parse_args(arguments)
    args.output_dir = args.output_dir.resolve()
    args.command = shlex.join(["python", "scripts/demo.py", *arguments])
    be_quiet()
    start = time.perf_counter()
    with replaced_when_done(args.output_dir) as folder:
        report = {
            "command": args.command,
            "seed": args.seed,
            "machine": hardware() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
            "images": run_images(folder, args),
            "text": run_text(folder, args),
        }
        report["fresh_process"] = compare_with_fresh_process(folder, args, report)
        shutil.rmtree(folder / "runs")
        shutil.rmtree(folder / "cache", ignore_errors=True)
        report["seconds"] = time.perf_counter() - start
        write_json(folder / REPORT, report)
    print_report(report, PROMPT, args.output_dir)


if __name__ == "__main__":
    run_command(main)

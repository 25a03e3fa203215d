"""What a training script says of a run: what is trained or evaluated on what and from where, and at the end what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.saved_files import read_json
from transformers import Trainer

from training.checkpoints import TRAINER_STATE


# What a sample is, and how a model is used, by the task's pipeline.
SAMPLES = {"image-classification": "pictures", "text-generation": "blocks"}
INPUTS = {"image-classification": "picture.png", "text-generation": "'Once upon a time'"}
UNPAUSED = "without evaluations and saving"
# The figures that are named at the end, where a task has them.
FIGURES = ("accuracy", "macro_f1", "perplexity", "loss")


def describe_start(trainer: Trainer, task: str, checkpoint: str | None) -> str:
    """The data, the model, and the checkpoint that a training resumes from."""
    model, args = trainer.model, trainer.args
    unit = SAMPLES[task]
    if task == "text-generation":
        unit += f" of {trainer.data_collator.length} tokens"
    else:
        unit += f" of {model.config.num_labels} classes"
    parameters = f"{type(model).__name__}: {model.num_parameters():,} parameters"
    if not args.do_train:
        return f"Evaluating on {count_samples(trainer.eval_dataset)} {unit}.\n{parameters}."
    data = f"Training on {count_samples(trainer.train_dataset)} {unit}"
    if args.do_eval and trainer.eval_dataset is not None:
        data += f", evaluating on {count_samples(trainer.eval_dataset)}"
    lines = [f"{data}.", f"{parameters}, {model.num_parameters(only_trainable=True):,} of them trained."]
    if checkpoint is not None:
        step = read_json(Path(checkpoint) / TRAINER_STATE)["global_step"]
        lines.append(f"Resuming from {checkpoint}, step {step:,}.")
    return "\n".join(lines)


def count_samples(data: Any) -> str:
    """The number of samples, or that it is a stream, which has none."""
    return f"{len(data):,}" if hasattr(data, "__len__") else "a stream of"


def describe_end(
    trainer: Trainer, task: str, folder: Path, metrics: Mapping[str, float], seconds: float | None, speed: float | None
) -> str:
    """The figures of a run, where its model lies, and the command that uses it.

    Args:
        metrics: of the evaluation, with the prefix `eval_`.
        seconds: of the training; None for a resumed run.
        speed: samples per second, `UNPAUSED`; None for a resumed run.
    """
    state = trainer.state
    trained = f"Trained for {state.global_step:,} steps"
    if seconds is not None:
        trained += f" in {timedelta(seconds=round(seconds))}"
    if speed is not None and task == "text-generation":
        trained += f", {speed * trainer.data_collator.length:,.0f} tokens a second {UNPAUSED}"
    elif speed is not None:
        trained += f", {speed:,.0f} pictures a second {UNPAUSED}"
    figures = list_figures(metrics)
    lines = [f"{trained}{': ' if figures else ''}{figures}."]
    if state.best_metric is not None:
        name = trainer.args.metric_for_best_model.removeprefix("eval_")
        lines.append(f"Best {name}: {state.best_metric:.4g} at step {state.best_global_step:,}.")
    return "\n".join([*lines, describe_use(task, str(folder))])


def describe_evaluation(
    task: str, model: str, revision: str | None, metrics: Mapping[str, float], figures_file: Path
) -> str:
    """The figures of an evaluation without training and their file, where the model lies, and the command that uses it.

    Args:
        task: name of the pipeline.
        model: folder, or name on the Hub.
        revision: on the Hub.
        metrics: with the prefix `eval_`.
        figures_file: what has all of them.
    """
    return f"Evaluated: {list_figures(metrics)}; more in {figures_file}.\n{describe_use(task, model, revision)}"


def list_figures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {metrics[f'eval_{name}']:.4g}" for name in FIGURES if f"eval_{name}" in metrics)


def describe_use(task: str, model: str, revision: str | None = None) -> str:
    """Where a model lies, a folder or a name on the Hub, and the command that uses it."""
    command = ["python", "scripts/predict.py", model, *(["--revision", revision] if revision else [])]
    place = f"in {model}" if Path(model).is_dir() else f"{model} on the Hub"
    return f"The model is {place}. To use it:\n    {shlex.join(command)} {INPUTS[task]}"

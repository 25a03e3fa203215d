"""What both training scripts do once they have a model and data: train, evaluate, and write down what came of it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from arguments import ModelArguments, RunArguments, hyperparameters, without_tokens
from checkpoints import WholeCheckpointTrainer, claim_output_dir
from load_data import DIGITS, STANDARD_LIBRARY, DataArguments
from measuring import hardware
from torch import Tensor
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import translution


RUN = "run.json"


@dataclass
class ScriptTrainingArguments(TrainingArguments):
    """Transformers' arguments; defaults differ where a run should train, evaluate, and resume, if nothing is said."""

    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate, at the end or more often."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The scripts' own batches need all columns."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether a resumed run remembers how long it has waited for an improvement."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Whether batches lie in pinned memory."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False


class EpochCallback(TrainerCallback):
    """Tells the training data that an epoch begins. Accelerate does not, where there are several processes."""

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        # A resumed run begins in the middle of an epoch.
        self.data.set_epoch(int(state.epoch or 0))


class ImageTrainer(WholeCheckpointTrainer):
    """Mixed labels are probabilities `[N, K]`; the model's own loss is about class indices."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs.get("labels")
        if labels is None or labels.ndim == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(pixel_values=inputs["pixel_values"])
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss


@dataclass
class Run:
    """One call of a training script.

    Args:
        script: its name.
        task: name of the pipeline that uses the model.
        arguments: its command line.
        model, data, training, run: the parsed arguments that every script has.
        others: the parsed arguments of this script alone.
    """

    script: str
    task: str
    arguments: list[str]
    model: ModelArguments
    data: DataArguments
    training: ScriptTrainingArguments
    run: RunArguments
    others: tuple[Any, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def command(self) -> str:
        return shlex.join(["python", f"scripts/{self.script}", *without_tokens(self.arguments)])

    def start(self) -> str | None:
        """Checks what can be checked before there are data; says which checkpoint to go on from.

        Raises:
            ValueError: for arguments that contradict each other; further ones as `claim_output_dir`.
        """
        training = self.training
        if self.data.streaming and training.do_train and training.max_steps <= 0:
            raise ValueError(f"`max_steps` must be at least 1 for `streaming`, got {training.max_steps}.")
        if self.run.early_stopping_patience is not None and training.metric_for_best_model is None:
            raise ValueError(
                "`metric_for_best_model` must be given for `early_stopping_patience`, for example 'loss', got None."
            )
        if training.push_to_hub and training.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"`hub_strategy` must be 'end' or 'every_save', checkpoints stay here, got {training.hub_strategy.value!r}."
            )
        checkpoint = claim_output_dir(
            self.folder,
            training.resume_from_checkpoint,
            self.run.overwrite_output_dir,
            {"command": self.command, **self.hyperparameters()},
        )
        PartialState().wait_for_everyone()
        transformers.set_seed(training.seed)
        return None if checkpoint is None else str(checkpoint)

    def hyperparameters(self) -> dict[str, Any]:
        return hyperparameters(self.training, self.model, self.data, *self.others)

    def finish(self, trainer: Trainer, checkpoint: str | None):
        """Trains, evaluates, saves the model, its figures, `run.json` and its card; pushes them if asked to."""
        training = self.training
        if hasattr(trainer.train_dataset, "set_epoch"):
            trainer.add_callback(EpochCallback(trainer.train_dataset))
        if self.run.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.run.early_stopping_patience))
        start, seconds, metrics = time.perf_counter(), None, {}
        if training.do_train:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
            # A resumed run does not know how long the earlier ones took.
            seconds = time.perf_counter() - start if checkpoint is None else None
            save(trainer, "train", metrics)
            trainer.save_state()
        metrics = {}
        if training.do_eval and trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
            save(trainer, "eval", metrics)
        trainer.save_model()
        if trainer.is_world_process_zero():
            self.write(metrics, seconds)
        PartialState().wait_for_everyone()
        if training.push_to_hub:
            trainer.push_to_hub()

    def write(self, metrics: dict[str, float], seconds: float | None):
        """`run.json`, and the model card that is made of it."""
        # Imported here: it is needed once, at the end.
        from model_card import write_model_card

        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        timing = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        machine, data = hardware(), self.data
        base = self.model.model_name_or_path
        report = {
            "task": self.task,
            "dataset": {
                "id": hub_dataset(data),
                "name": data.dataset_name or Path(data.train_dir or data.train_file[0]).name,
                "config": data.dataset_config_name,
                "revision": data.dataset_revision,
                "train_split": data.train_split,
                "eval_split": evaluation_split(data),
            },
            "metrics": {name: value for name, value in figures.items() if name not in timing},
            "hyperparameters": self.hyperparameters(),
            "hardware": device_name(str(machine["device"])),
            "num_processes": self.training.world_size,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "translution": translution.__version__,
            },
            "commit": None if machine["commit"] == "unknown" else machine["commit"],
            "seconds": seconds,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "co2_grams": self.run.co2_grams,
            "license": self.run.license,
            "base_model": None if base is None or Path(base).exists() else base,
            "command": self.command,
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        partial = self.folder / f".{RUN}"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.folder / RUN)
        write_model_card(self.folder)


def save(trainer: Trainer, split: str, metrics: dict[str, float]):
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def hub_dataset(data: DataArguments) -> str | None:
    """The name of the dataset on the Hub, if that is where it is from."""
    name = data.dataset_name
    return None if name in (None, DIGITS, STANDARD_LIBRARY) or Path(name).exists() else name


def evaluation_split(data: DataArguments) -> str:
    # Of large data a small share is enough.
    return data.validation_split or f"{100 * data.validation_share:.4g}% held out"


def device_name(cpu: str) -> str:
    """What the run computed on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu

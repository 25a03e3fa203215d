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
from arguments import ModelArguments, RunArguments, hyperparameters, lasting, without_tokens
from checkpoints import (
    TRAINER_STATE,
    WholeCheckpointTrainer,
    claim_output_dir,
    finish_saving,
    has_weights,
    load_weights,
    newest_checkpoint,
    refuse_changes,
)
from load_data import DIGITS, STANDARD_LIBRARY, DataArguments
from measuring import hardware
from saved_files import RUN, misshapen
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import translution


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


class PatienceCallback(TrainerCallback):
    """A resumed run remembers how long it has waited; how long it shall wait is said anew."""

    def __init__(self, trainer: Trainer, patience: int):
        self.trainer = trainer
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.patience


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
        """Checks what can be checked before there are data; says where the weights are to go on from, or to evaluate.

        Raises:
            ValueError: for arguments that contradict each other; further ones as `claim_output_dir`.
            FileNotFoundError: if there is nothing to evaluate.
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
        if training.do_train:
            source = claim_output_dir(
                self.folder,
                training.resume_from_checkpoint,
                self.run.overwrite_output_dir,
                {"command": self.command, **self.hyperparameters()},
                lasting(self.model, self.data, *self.others),
            )
            PartialState().wait_for_everyone()
        else:
            source = self.find_weights()
        transformers.set_seed(training.seed)
        return None if source is None else str(source)

    def find_weights(self) -> Path | None:
        """The folder of the weights to evaluate: saved ones, or else a checkpoint's. None where `model_name_or_path` is meant."""
        training = self.training
        for name, given in (
            ("overwrite_output_dir", self.run.overwrite_output_dir),
            ("push_to_hub", training.push_to_hub),
        ):
            if given:
                raise ValueError(f"`{name}` must be false where nothing is trained, `do_train` false.")
        asked = training.resume_from_checkpoint
        if asked is not None:
            if not has_weights(Path(asked)):
                raise FileNotFoundError(f"`resume_from_checkpoint` must be a folder with weights, got {asked}.")
            return Path(asked)
        if PartialState().is_main_process:
            finish_saving(self.folder)
        PartialState().wait_for_everyone()
        refuse_changes(self.folder, lasting(self.model, self.data, *self.others))
        found = self.folder if has_weights(self.folder) else newest_checkpoint(self.folder)
        if found is None and self.model.model_name_or_path is None:
            raise FileNotFoundError(
                f"`do_train` false evaluates what was trained, `output_dir` {self.folder} has neither model nor checkpoint: "
                "give that of a run, or `--model_name_or_path`."
            )
        return found

    def hyperparameters(self) -> dict[str, Any]:
        return hyperparameters(self.training, self.model, self.data, *self.others)

    def finish(self, trainer: Trainer, checkpoint: str | None):
        """Trains, evaluates, saves the model, its figures, `run.json` and its card; pushes them if asked to.

        Without training nothing is saved but the figures, in a file of their own.
        """
        training = self.training
        if not training.do_train:
            if checkpoint is not None:
                load_weights(trainer.model, Path(checkpoint))
            if training.do_eval and trainer.eval_dataset is not None:
                save(trainer, "evaluation", trainer.evaluate(), combined=False)
            return
        if hasattr(trainer.train_dataset, "set_epoch"):
            trainer.add_callback(EpochCallback(trainer.train_dataset))
        if self.run.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.run.early_stopping_patience))
            trainer.add_callback(PatienceCallback(trainer, self.run.early_stopping_patience))
        start, seconds = time.perf_counter(), None
        if checkpoint is not None and self.is_finished(trainer, Path(checkpoint)):
            # The Trainer would take another step.
            self.restore(trainer, Path(checkpoint))
        else:
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

    def is_finished(self, trainer: Trainer, checkpoint: Path) -> bool:
        """Whether the training that wrote a checkpoint came to its end there, or was stopped early."""
        training, patience = self.training, self.run.early_stopping_patience
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            # Their models are made where training begins.
            return False
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        if patience is not None and training.restore_callback_states_from_checkpoint:
            waited = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
            if waited.get("early_stopping_patience_counter", 0) >= patience:
                return True
        if training.max_steps > 0:
            return state.global_step >= training.max_steps
        return state.epoch is not None and state.epoch >= training.num_train_epochs

    def restore(self, trainer: Trainer, checkpoint: Path):
        """Leaves the trainer as a training does that ends at a checkpoint."""
        trainer.state = state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
        takes_best = self.training.load_best_model_at_end and has_weights(best)
        load_weights(trainer.model, best if takes_best else checkpoint)

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


def load_checkpoint(auto_class: Any, args: ModelArguments, **fields: Any) -> PreTrainedModel:
    """The model to train that `model_name_or_path` names, in float32.

    Args:
        auto_class: of its task.
        args: where it is, and whether tensors of another shape start anew.
        fields: of its config.

    Raises:
        ValueError: if a tensor has another shape than the config's; further ones as `from_pretrained`.
    """
    name = args.model_name_or_path
    # Which tensors they are tells the report alone.
    model, report = auto_class.from_pretrained(
        name,
        revision=args.model_revision or "main",
        trust_remote_code=args.trust_remote_code,
        dtype="float32",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **fields,
    )
    problems = misshapen(report)
    if problems and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"The weights of {name} do not fit: {'; '.join(problems)}. `--ignore_mismatched_sizes` starts these anew."
        )
    return model


def save(trainer: Trainer, split: str, metrics: dict[str, float], combined: bool = True):
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics, combined)


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

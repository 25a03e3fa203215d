"""One call of a training script: train, evaluate, and write down the results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common.hardware import hardware
from common.saved_files import CARD, EVALUATION, RUN, copy_licenses, read_json, write_json
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerState, set_seed

import translution
from training.arguments import (
    ModelArguments,
    RunArguments,
    hyperparameters,
    lasting,
    new_model_options,
    parse_arguments,
    sources,
    without_tokens,
)
from training.checkpoints import TRAINER_STATE, newest_checkpoint
from training.data_arguments import DIGITS, STANDARD_LIBRARY, DataArguments
from training.messages import describe_end, describe_evaluation, describe_start
from training.model_card import LICENSE, ORIGIN, origin_of, write_model_card
from training.output_folder import claim_output_dir, finish_saving, refuse_changes
from training.trainer import EpochCallback, PatienceCallback, ScriptTrainingArguments, WholeCheckpointTrainer
from training.weights import has_weights, load_weights


# What `run.json` says of a training, and does not change when nothing is left to train.
OF_TRAINING = ("hardware", "num_processes", "versions", "commit", "seconds", "date")

Metrics = Callable[[EvalPrediction], dict[str, float]]


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

    def __post_init__(self):
        # Decided once: `validation_split` is filled in when the data are loaded. A command that trained on a dataset, with its
        # new model, evaluates that as well.
        makes_model = self.data.dataset_name is not None and new_model_options(self.model)
        self.only_evaluates = not (self.training.do_train or self.data.has_training_data or makes_model)

    @classmethod
    def parse(
        cls,
        script: str,
        task: str,
        data: type[DataArguments],
        others: Sequence[type],
        arguments: Sequence[str],
        description: str,
    ) -> Run:
        """The run of a command line, see `parse_arguments`; `data` and `others` are a script's own classes."""
        classes = (ModelArguments, data, ScriptTrainingArguments, RunArguments, *others)
        model, of_data, training, run, *rest = parse_arguments(classes, arguments, description)
        return cls(script, task, list(arguments), model, of_data, training, run, tuple(rest))

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def command(self) -> str:
        return shlex.join(["python", f"scripts/{self.script}", *without_tokens(self.arguments)])

    def start(self) -> str | None:
        """Checks the arguments, and returns the folder of the weights to resume from or to evaluate.

        A run without training data, `only_evaluates`, has a saved model alone to go by: `model_name_or_path` becomes that folder.

        Raises:
            ValueError: for arguments that contradict each other; further ones as `claim_output_dir`.
            FileNotFoundError: if there is nothing to evaluate.
        """
        training = self.training
        if self.data.streaming and training.do_train and training.max_steps <= 0:
            raise ValueError(f"`max_steps` must be at least 1 for `streaming`, got {training.max_steps}.")
        if training.do_predict and getattr(self.data, "test_dir", None) is None:
            raise ValueError(
                "`do_predict` needs a folder of pictures, `test_dir`, got None; texts are continued by scripts/predict.py."
            )
        if self.run.early_stopping_patience is not None and training.metric_for_best_model is None:
            raise ValueError(
                "`metric_for_best_model` must be given for `early_stopping_patience`, for example 'loss', got None."
            )
        if self.run.early_stopping_patience is not None and training.do_train and training.eval_strategy == "no":
            raise ValueError("`eval_strategy` must be 'steps' or 'epoch' for `early_stopping_patience`, got 'no'.")
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
                # Bundled data are no folders.
                [
                    (name, source)
                    for name, source in sources(self.model, self.data, *self.others)
                    if name != "dataset_name" or source not in (DIGITS, STANDARD_LIBRARY)
                ],
            )
            PartialState().wait_for_everyone()
        else:
            source = self.find_weights()
            if self.only_evaluates and source is not None:
                self.model, source = replace(self.model, model_name_or_path=str(source)), None
        set_seed(training.seed)
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
        if self.only_evaluates:
            # On data of another kind; what is not given is the model's.
            refuse_changes(self.folder, lasting(self.model, *self.others, given=True))
        else:
            refuse_changes(self.folder, lasting(self.model, self.data, *self.others))
        found = self.folder if has_weights(self.folder) else newest_checkpoint(self.folder)
        if found is None and self.model.model_name_or_path is None:
            raise FileNotFoundError(
                f"`do_train` false evaluates what was trained, `output_dir` {self.folder} has neither model nor checkpoint: "
                "give that of a run, or `--model_name_or_path`."
            )
        return found

    def evaluated(self, checkpoint: str | None) -> str:
        """The model that is evaluated where nothing is trained, a folder or a name on the Hub; `checkpoint` is that of `start`."""
        return checkpoint or self.model.model_name_or_path

    def hyperparameters(self) -> dict[str, Any]:
        return hyperparameters(self.training, self.model, self.data, *self.others)

    def finish(self, trainer: WholeCheckpointTrainer, checkpoint: str | None, last_metrics: Metrics | None = None):
        """Trains, evaluates, and saves the model, metrics, `run.json` and the card; pushes them if asked to.

        Without training only metrics are saved, in a file of their own.

        Args:
            trainer: of the model and the data.
            checkpoint: folder of the weights to resume from or to evaluate.
            last_metrics: those of the evaluation of the model that is saved, or evaluated alone; None for the trainer's own.
        """
        training = self.training
        if not training.do_train:
            if checkpoint is not None:
                load_weights(trainer.model, Path(checkpoint))
            if training.do_eval and trainer.eval_dataset is not None:
                say(trainer, describe_start(trainer, self.task, checkpoint))
                metrics = evaluate(trainer, last_metrics)
                save(trainer, "evaluation", metrics, combined=False)
                model, revision = self.evaluated(checkpoint), self.model.model_revision
                say(trainer, describe_evaluation(self.task, model, revision, metrics, self.folder / EVALUATION))
            return
        if hasattr(trainer.train_dataset, "set_epoch"):
            trainer.add_callback(EpochCallback(trainer.train_dataset))
        if self.run.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.run.early_stopping_patience))
            trainer.add_callback(PatienceCallback(trainer, self.run.early_stopping_patience))
        say(trainer, describe_start(trainer, self.task, checkpoint))
        start, seconds, speed, record = time.perf_counter(), None, None, {}
        if checkpoint is not None and self.is_finished(trainer, Path(checkpoint)):
            # `Trainer.train` would take another step.
            self.restore(trainer, Path(checkpoint))
            # It was trained then, and by that code.
            if (self.folder / RUN).is_file():
                record = {name: value for name, value in read_json(self.folder / RUN).items() if name in OF_TRAINING}
        else:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
            if checkpoint is None:
                # Unknown for a resumed run.
                seconds = time.perf_counter() - start
                speed = trainer.samples_per_second(metrics["train_runtime"])
            save(trainer, "train", metrics)
        trainer.save_state()
        metrics = {}
        if training.do_eval and trainer.eval_dataset is not None:
            metrics = evaluate(trainer, last_metrics)
            save(trainer, "eval", metrics)
        trainer.save_model()
        if trainer.is_world_process_zero():
            self.write(metrics, seconds, record)
        PartialState().wait_for_everyone()
        if training.push_to_hub:
            trainer.push_to_hub()
        say(trainer, describe_end(trainer, self.task, self.folder, metrics, seconds, speed))

    def is_finished(self, trainer: Trainer, checkpoint: Path) -> bool:
        """Whether training was complete at a checkpoint, or was stopped early there."""
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
        """Puts the trainer in the state at the end of the training that wrote a checkpoint."""
        trainer.state = state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
        takes_best = self.training.load_best_model_at_end and has_weights(best)
        load_weights(trainer.model, best if takes_best else checkpoint)

    def origin(self) -> dict[str, Any]:
        """The base model and the licence, for the card: a name on the Hub, or what the card of a local folder says."""
        base = self.model.model_name_or_path
        found = {"base_model": base}
        if base is not None and Path(base).exists():
            # A folder's name is no name on the Hub, and what it holds may be from there.
            found = origin_of(Path(base) / CARD)
        if self.run.license is not None:
            # Name and link are those of the other licence.
            found = {**found, **dict.fromkeys(LICENSE), "license": self.run.license}
        return {name: found.get(name) for name in ORIGIN}

    def write(self, metrics: dict[str, float], seconds: float | None, record: dict[str, Any]):
        """Writes `run.json` and the model card; `record` is what an earlier `run.json` says of the training."""
        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        timing = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        machine, data = hardware(), self.data
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
                **{name: machine[name] for name in ("python", "torch", "transformers")},
                "translution": translution.__version__,
            },
            "commit": None if machine["commit"] == "unknown" else machine["commit"],
            "seconds": seconds,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "co2_grams": self.run.co2_grams,
            **self.origin(),
            "command": self.command,
            **record,
        }
        write_json(self.folder / RUN, report)
        write_model_card(self.folder)
        if self.model.model_name_or_path is not None and self.run.license is None:
            copy_licenses(Path(self.model.model_name_or_path), self.folder)


def evaluate(trainer: Trainer, metrics: Metrics | None) -> dict[str, float]:
    """`Trainer.evaluate` with other metrics than those of evaluations in between, if there are any."""
    if metrics is not None:
        trainer.compute_metrics = metrics
    return trainer.evaluate()


def say(trainer: Trainer, text: str) -> None:
    """Prints once, whatever the number of processes."""
    if trainer.is_world_process_zero():
        print(text, flush=True)


def save(trainer: Trainer, split: str, metrics: dict[str, float], combined: bool = True):
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics, combined)


def hub_dataset(data: DataArguments) -> str | None:
    """The name of the dataset on the Hub, if that is where it is from."""
    name = data.dataset_name
    return None if name in (None, DIGITS, STANDARD_LIBRARY) or Path(name).exists() else name


def evaluation_split(data: DataArguments) -> str:
    # A share below one per cent is common for large data.
    return data.validation_split or f"{100 * data.validation_share:.4g}% held out"


def device_name(cpu: str) -> str:
    """The device that the run used."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu

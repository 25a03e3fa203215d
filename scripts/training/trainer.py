"""The Trainer of the training scripts: complete checkpoints, soft labels, callbacks, and its arguments."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, find_batch_size
from common.atomic_folder import written_whole
from common.command import require
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from training.averaging import WeightAverage, restore_weights, save_weights
from training.checkpoints import TRAINER_STATE, UNAVERAGED, share_code
from training.fine_tuning import decay_learning_rates
from training.hub import explain, push
from training.output_folder import FINAL_MODEL, finish_saving


logger = logging.getLogger(__name__)

TRAINER_ARGUMENTS, PICKLED_ARGUMENTS = "training_args.json", "training_args.bin"


class SpeedCallback(TrainerCallback):
    """Counts the samples of training steps, and the seconds of evaluations and checkpoints between them, in this process.

    Both start anew where a training does, as after a batch that did not fit into memory.
    """

    def __init__(self):
        self.samples, self.paused = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.samples, self.paused = 0, 0.0

    @contextlib.contextmanager
    def pause(self, device: torch.device) -> Iterator[None]:
        if device.type != "cpu":
            # Steps that are still to be computed there are no part of the pause.
            torch.accelerator.synchronize(device)
        # The clock that the Trainer measures the whole training by.
        start = time.time()
        yield
        self.paused += time.time() - start


class WholeCheckpointTrainer(Trainer):
    """Writes checkpoints beside their place and renames them once they are complete and on the disk.

    A run can therefore be killed at any moment, and its newest checkpoint is complete. Several processes need a shared
    folder. Arguments are saved as JSON without tokens, not as the pickle `training_args.bin`. Pushes are those of
    `push_to_hub.py`: a model, and nothing that only a resumed run needs.

    With `ema_decay` evaluations use the average of the weights, and so do all saved models, those of checkpoints too; what is
    trained lies beside them there.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any):
        try:
            with contextlib.nullcontext() if args.do_train else _as_if_not_quantised(model):
                super().__init__(model, args, **kwargs)
        except RuntimeError as error:
            # `report_to` names a package that is not installed.
            raise ValueError(str(error)) from error
        self.speed = SpeedCallback()
        self.add_callback(self.speed)
        # Plain `TrainingArguments` have none.
        self.ema_decay = getattr(self.args, "ema_decay", None)
        self.average: WeightAverage | None = None
        if self.ema_decay is not None:
            for name, enabled in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
                if enabled:
                    raise ValueError(
                        f"`ema_decay` must be None with {name}, whose processes have parts of the weights, got "
                        f"{self.ema_decay}."
                    )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        # Plain `TrainingArguments` have none.
        rate, factor = getattr(self.args, "offset_decay", 0), getattr(self.args, "layer_lr_decay", 1)
        if is_new and factor != 1:
            decay_learning_rates(optimizer, self.accelerator.unwrap_model(self.model), factor)
        if is_new and rate:
            self.accelerator.unwrap_model(self.model).decay_offsets(optimizer, rate)
        if is_new and self.ema_decay is not None:
            # Not called for a step that mixed precision leaves out.
            optimizer.register_step_post_hook(self._update_average)
        return optimizer

    def _update_average(self, *_: Any) -> None:
        if self.average is None:
            self.average = WeightAverage(self.accelerator.unwrap_model(self.model), self.ema_decay)
        self.average.update()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model has the average for weights, where there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        trained = Path(resume_from_checkpoint) / UNAVERAGED
        if trained.is_file():
            model = self.model if model is None else model
            if self.ema_decay is not None:
                self.average = WeightAverage(model, self.ema_decay, resumes=True)
            restore_weights(model, trained)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # The weights of a checkpoint are its average.
        self.average = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.speed.samples += find_batch_size(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def samples_per_second(self, runtime: float) -> float | None:
        """Samples of all processes in a second of the last training, without the time of its evaluations and checkpoints.

        Args:
            runtime: the `train_runtime` of its metrics, which has that time.
        """
        seconds = runtime - self.speed.paused
        # A share of the processes where several have the same samples.
        batch = self._train_batch_size * self.args.gradient_accumulation_steps
        replicas = self.get_total_train_batch_size(self.args) // batch
        return self.speed.samples * replicas / seconds if seconds > 0 else None

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # In a training alone.
        with self.speed.pause(self.args.device):
            return super()._evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any):
        with self.speed.pause(self.args.device):
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any):
        folder, pushes = Path(self.args.output_dir), self.args.push_to_hub
        name = f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.exists():
            self.state.best_model_checkpoint = str(best)
        with self._shared(folder / name) as partial:
            # The Trainer saves to the partial folder, and does not push it.
            self.args.output_dir, self.args.push_to_hub = str(partial), False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir, self.args.push_to_hub = str(folder), pushes
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                inner = partial / name
                if self.average is not None:
                    save_weights(self.accelerator.unwrap_model(self.model), inner / UNAVERAGED)
                self.state.save_to_json(str(inner / TRAINER_STATE))
                for path in list(inner.iterdir()):
                    path.rename(partial / path.name)
                inner.rmdir()
                share_code(partial, folder)
        # No process continues before the checkpoint is in its place.
        self.accelerator.wait_for_everyone()
        if pushes and self.args.hub_strategy != "end" and self.is_world_process_zero():
            try:
                self._push(str(folder / name), f"Training in progress, step {self.state.global_step}")
            except Exception as error:
                # The next checkpoint, or the final model, is pushed anyway.
                logger.warning("%s was not pushed: %s", folder / name, explain(error))
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Pushes the output folder as `push_to_hub.py` does, and returns the URL of the commit."""
        return self._push(self.args.output_dir, commit_message) if self.is_world_process_zero() else None

    def _push(self, folder: str, message: str) -> str:
        if self.hub_model_id is None:
            self.init_hf_repo()
        args = self.args
        api = HfApi(token=args.hub_token)
        return push(
            Path(folder), self.hub_model_id, args.hub_private_repo, args.hub_revision, message=message, api=api
        )

    @contextlib.contextmanager
    def _shared(self, target: Path) -> Iterator[Path]:
        """`written_whole` for all processes. At the end the arguments are saved as JSON instead of a pickle."""
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(written_whole(target)) if self.args.should_save else None
            yield Path(broadcast_object_list([str(partial)])[0]) if self.args.world_size > 1 else partial
            if self.args.should_save:
                (partial / PICKLED_ARGUMENTS).unlink(missing_ok=True)
                (partial / TRAINER_ARGUMENTS).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves model and processor beside their place first, then moves the files, see `finish_saving`."""
        if _internal_call:
            with self._averaged():
                super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        with self._averaged(), self._shared(folder / FINAL_MODEL) as partial:
            super().save_model(str(partial), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                share_code(partial, folder)
        if self.args.should_save:
            finish_saving(folder)


@contextlib.contextmanager
def _as_if_not_quantised(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer refuses quantised models when it is made, for they cannot be trained; evaluation is like that of any model."""
    quantised = getattr(model, "is_quantized", False)
    if not quantised:
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantised


class ImageTrainer(WholeCheckpointTrainer):
    """Also takes labels as probabilities `[N, K]`, from mixup and CutMix; the model's own loss takes class indices."""

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
class ScriptTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults: a run trains, evaluates and resumes."""

    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate, at least at the end."})
    logging_steps: float = field(
        default=0.05,
        metadata={
            "help": "Steps between logged losses; below 1 a share of all steps, so that short runs have a curve."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The scripts' own batches need all columns."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether a resumed run keeps its count of evaluations without improvement."}
    )
    offset_decay: float = field(
        default=0.0,
        metadata={
            "help": "As `weight_decay`, towards the mean over all offsets: of what has one row for each offset."
        },
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate from one layer to the one before it: the head has `learning_rate`, the last "
            "layer this share of it, the embedding the least."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the weights, such as 0.999, which is evaluated and saved in "
            "place of the weights of the last step. If not given there is none."
        },
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Whether to pin the memory of batches."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False
        require(self, "offset_decay", lambda rate: 0 <= rate < math.inf, "a number of at least 0")
        require(self, "layer_lr_decay", lambda factor: 0 < factor <= 1, "more than 0 and at most 1")
        require(self, "ema_decay", lambda decay: 0 < decay < 1, "None, or more than 0 and less than 1")


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training data. With several processes, Accelerate does not."""

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        # A resumed run starts in the middle of an epoch.
        self.data.set_epoch(int(state.epoch or 0))


class PatienceCallback(TrainerCallback):
    """Sets the patience of a resumed run from its arguments; the checkpoint restores only the count."""

    def __init__(self, trainer: Trainer, patience: int):
        self.trainer = trainer
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.patience

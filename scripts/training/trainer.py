"""The Trainer of the training scripts: complete checkpoints, soft labels, callbacks, and its arguments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from training.atomic_folder import written_whole
from training.checkpoints import TRAINER_STATE
from training.output_folder import FINAL_MODEL, finish_saving


logger = logging.getLogger(__name__)

TRAINER_ARGUMENTS, PICKLED_ARGUMENTS = "training_args.json", "training_args.bin"


class WholeCheckpointTrainer(Trainer):
    """`Trainer` writes a checkpoint in place; here it appears, in one rename, when it is complete and on the disk.

    So a run may be killed at any moment and the newest checkpoint is good. Several processes need a folder that they all
    see. In place of the pickled `training_args.bin`, arguments are saved as JSON, without tokens. What is pushed is what
    `push_to_hub.py` pushes: a model, and nothing of what a run needs to go on.
    """

    # Where a checkpoint is being written, while it is.
    _partial: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        try:
            super().__init__(*args, **kwargs)
        except RuntimeError as error:
            # Of `report_to`, if what it names is not installed.
            raise ValueError(str(error)) from error

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any):
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.exists():
            self.state.best_model_checkpoint = str(best)
        with self._shared(folder / name) as partial:
            self._partial = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._partial = None
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                inner = partial / name
                self.state.save_to_json(str(inner / TRAINER_STATE))
                for path in list(inner.iterdir()):
                    path.rename(partial / path.name)
                inner.rmdir()
        # Nobody goes on before the checkpoint is in its place.
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # While it is being written there is nothing to push yet.
        if self._partial is not None or not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        # Imported here, and below: few runs push.
        from push_to_hub import explain

        try:
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except Exception as error:
            # The next checkpoint, or the model, is pushed anyway.
            logger.warning("%s was not pushed: %s", checkpoint_folder, explain(error))

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Pushes what `push_to_hub.py` pushes of the output folder; gives the address of the commit."""
        return self._push(self.args.output_dir, commit_message) if self.is_world_process_zero() else None

    def _push(self, folder: str, message: str) -> str:
        from push_to_hub import push

        if self.hub_model_id is None:
            self.init_hf_repo()
        args = self.args
        api = HfApi(token=args.hub_token)
        return push(
            Path(folder), self.hub_model_id, args.hub_private_repo, args.hub_revision, message=message, api=api
        )

    @contextlib.contextmanager
    def _shared(self, target: Path) -> Iterator[Path]:
        """`written_whole` of the one process that saves; the others learn its folder."""
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(written_whole(target)) if self.args.should_save else None
            yield Path(broadcast_object_list([str(partial)])[0]) if self.args.world_size > 1 else partial

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves model and processor: first all of them to one side, then each to its place, see `finish_saving`."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        with self._shared(folder / FINAL_MODEL) as partial:
            super().save_model(str(partial), _internal_call=True)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_saving(folder)

    def create_model_card(self, *args: Any, **kwargs: Any):
        """The scripts write a card of their own."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            (folder / TRAINER_ARGUMENTS).write_text(self.args.to_json_string() + "\n", encoding="utf-8")


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

"""Checkpoints that are whole or not there: a Trainer that saves to one side, and the search for the newest whole one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from saved_files import CARD, RUN, WEIGHTS, WEIGHTS_INDEX, check_readable, shards
from saving import written_whole
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints


logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE, TRAINER_ARGUMENTS, PICKLED_ARGUMENTS = "trainer_state.json", "training_args.json", "training_args.bin"
# A run that was killed before its first checkpoint is known by this file.
RUN_ARGUMENTS = "arguments.json"
# Where it says what a later call may not change.
LASTING = "model_and_data"
# What a run leaves besides checkpoints, and a later one would go on with.
LEFT_BEHIND = "tokenizer"
# Where the model is saved before its files get into their places.
FINAL_MODEL = "final-model"
WEIGHTS_FILE = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


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


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*WEIGHTS, WEIGHTS_INDEX))


def load_weights(model: PreTrainedModel, folder: Path):
    """Gives a model the weights that are saved in a folder.

    Raises:
        ValueError: if some are missing; further ones as `from_pretrained` and `load_state_dict`.
    """
    saved, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"The weights in {folder} must be all, {', '.join(sorted(report['missing_keys']))} is missing."
        )
    model.load_state_dict(saved.state_dict())


def finish_saving(folder: Path):
    """Moves a saved model from `FINAL_MODEL` to its place, or goes on with it where a process was killed.

    Old weights go first and new ones come last: nobody can load weights with the config of others.
    """
    final = folder / FINAL_MODEL
    if not final.is_dir():
        return
    paths = sorted(final.iterdir(), key=lambda path: (bool(WEIGHTS_FILE.fullmatch(path.name)), path.name))
    if paths and not WEIGHTS_FILE.fullmatch(paths[0].name):
        delete_model(folder)
    for path in paths:
        os.replace(path, folder / path.name)
    final.rmdir()


def delete_model(folder: Path):
    """Deletes weights, and what tells of them; other files stay."""
    for path in folder.iterdir():
        if path.is_file() and WEIGHTS_FILE.fullmatch(path.name):
            path.unlink()
    if (folder / RUN).is_file():
        (folder / CARD).unlink(missing_ok=True)
        (folder / RUN).unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of most steps that is whole; those that are not are skipped with a warning."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    steps = {int(match[1]): path for match, path in found if match and path.is_dir()}
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return steps[step]
        logger.warning("%s is left out: %s", steps[step], reason)
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What keeps training from going on from a checkpoint, or None."""
    state = checkpoint / TRAINER_STATE
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except OSError:
        return f"there is no {TRAINER_STATE}"
    except (ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE} is damaged"
    if checkpoint.name != f"checkpoint-{step}":
        return f"{TRAINER_STATE} is of step {step}"
    # The sharded formats of FSDP and DeepSpeed have no safetensors and check themselves.
    sharded = any(path.is_dir() for path in checkpoint.iterdir())
    try:
        if (checkpoint / WEIGHTS_INDEX).is_file():
            names = shards(checkpoint)
        else:
            names = [name for name in WEIGHTS if (checkpoint / name).is_file()]
        if not names and not sharded:
            return f"there is no {WEIGHTS[0]}"
        for name in names:
            check_readable(checkpoint / name)
    except ValueError as error:
        return str(error)
    if not (sharded or (checkpoint / "scheduler.pt").is_file()):
        # The Trainer would go on with a new optimizer, too.
        return "there is no scheduler.pt"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "there is no rng_state.pth"
    for path in checkpoint.glob("*.pt*"):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is damaged"
    if not sharded and not (checkpoint / "optimizer.pt").is_file():
        return "there is no optimizer.pt (`save_only_model`?)"
    return None


def claim_output_dir(
    folder: Path, resume: str | None, overwrite: bool, arguments: dict[str, Any], lasting: dict[str, Any]
) -> Path | None:
    """Says from which checkpoint to go on, and refuses a folder that holds something else.

    Args:
        folder: what a run writes to; made if it is not there.
        resume: a checkpoint that the user asks for.
        overwrite: whether to delete the checkpoints, the tokenizer and the model of an earlier run.
        arguments: what to leave behind, so that the folder is known as a run's.
        lasting: those that a run which goes on may not change.

    Raises:
        FileExistsError: if `folder` is no folder, or has files and none of them is a run's.
        FileNotFoundError: if `resume` is no folder.
        ValueError: if `resume` is no whole checkpoint, or contradicts `overwrite`; or for another value in `lasting`.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`output_dir` must be a folder, got the file {folder}.")
    checkpoint = None if overwrite else newest_checkpoint(folder)
    if resume is not None:
        if overwrite:
            raise ValueError(f"`overwrite_output_dir` starts anew, and `resume_from_checkpoint` {resume} goes on.")
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"`resume_from_checkpoint` must be a folder, got {resume}.")
        reason = why_incomplete(Path(resume))
        if reason is not None:
            raise ValueError(f"`resume_from_checkpoint` {resume} cannot be continued: {reason}.")
        checkpoint = Path(resume)
    known = (folder / RUN_ARGUMENTS).is_file() or checkpoint is not None
    if folder.is_dir() and any(folder.iterdir()) and not known and not overwrite:
        raise FileExistsError(
            f"`output_dir` {folder} has files and no checkpoint: give another folder, or `--overwrite_output_dir`."
        )
    if not overwrite:
        refuse_changes(folder, lasting)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            delete_run(folder)
        finish_saving(folder)
        if changes(folder, lasting):
            # Nothing is trained yet, or it would be refused; the tokenizer may be that of other data.
            shutil.rmtree(folder / LEFT_BEHIND, ignore_errors=True)
        text = json.dumps({**arguments, LASTING: lasting}, indent=2, ensure_ascii=False, default=str)
        partial = folder / f".{RUN_ARGUMENTS}"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, folder / RUN_ARGUMENTS)
    return checkpoint


def delete_run(folder: Path):
    for path in folder.iterdir():
        if path.is_dir() and (CHECKPOINT.fullmatch(path.name) or path.name in (LEFT_BEHIND, FINAL_MODEL)):
            shutil.rmtree(path)
    delete_model(folder)


def changes(folder: Path, lasting: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options by name that an earlier call had other values of, each with that and the present one."""
    try:
        earlier = json.loads((folder / RUN_ARGUMENTS).read_text(encoding="utf-8"))[LASTING]
    except (OSError, ValueError, KeyError):
        return {}
    pairs = {name: (earlier[name], value) for name, value in lasting.items() if name in earlier}
    return {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    """Makes paths that are written in several ways equal."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) else value


def refuse_changes(folder: Path, lasting: dict[str, Any]):
    """What is trained stays what `arguments.json`, `run.json` and the card say that it is.

    Raises:
        ValueError: if a folder has weights that were trained with other options.
    """
    told = [
        f"`{name}` must be {old!r} as before, got {new!r}" for name, (old, new) in changes(folder, lasting).items()
    ]
    if told and (has_weights(folder) or has_weights(folder / FINAL_MODEL) or newest_checkpoint(folder)):
        raise ValueError(
            f"{folder} holds what was trained otherwise: {'; '.join(told)}. Give another `--output_dir`, or "
            "`--overwrite_output_dir` to start anew."
        )

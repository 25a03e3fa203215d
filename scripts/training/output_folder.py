"""The folder a run writes to: whether a run may use it, what it keeps of an earlier run, and its final model."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.saved_files import (
    CARD,
    CONFUSION,
    EVALUATION,
    EVALUATION_CONFUSION,
    PREDICTIONS,
    RUN,
    read_json,
    write_json,
)

from training.checkpoints import CHECKPOINT, TRAINER_STATE, newest_checkpoint, why_incomplete
from training.weights import has_weights


# Identifies the folder of a run that was killed before its first checkpoint.
RUN_ARGUMENTS = "arguments.json"
# Its key for the options that a resumed run must not change.
LASTING = "model_and_data"
# Besides checkpoints, what a resumed run uses again.
LEFT_BEHIND = "tokenizer"
# What a run says of its model: figures of the training and of evaluations, which of another model would be wrong.
RESULTS = (
    *(f"{split}_results.json" for split in ("train", "eval", "all")),
    TRAINER_STATE,
    CONFUSION,
    EVALUATION,
    EVALUATION_CONFUSION,
    PREDICTIONS,
)
# How many files an error names.
TOLD = 5
# Where the Trainer writes events for TensorBoard, in a folder for each call.
EVENTS = "runs"
# Where the model is saved before its files are moved.
FINAL_MODEL = "final-model"
WEIGHTS_FILE = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def claim_output_dir(
    folder: Path,
    resume: str | None,
    overwrite: bool,
    arguments: dict[str, Any],
    lasting: dict[str, Any],
    sources: Sequence[tuple[str, str]] = (),
) -> Path | None:
    """Returns the checkpoint to resume from, and refuses a folder that holds something else.

    Args:
        folder: what a run writes to; made if it is not there.
        resume: a checkpoint that the user asks for.
        overwrite: whether to delete the checkpoints, the tokenizer, the model, its figures and the events for TensorBoard of an
            earlier run.
        arguments: what to leave behind, so that the folder is known as a run's.
        lasting: those that a resumed run must not change.
        sources: options that may name a file or folder that the run reads, and their values.

    Raises:
        FileExistsError: if `folder` is no folder, has files and none of them is a run's, or has files that `overwrite` would
            delete and that no run left.
        FileNotFoundError: if `resume` is no folder.
        ValueError: if `resume` is no whole checkpoint, or contradicts `overwrite`; for another value in `lasting`; or if one of
            `sources` lies in a folder whose earlier run is deleted.
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
    if overwrite:
        refuse_others_files(folder)
    else:
        refuse_changes(folder, lasting)
    if overwrite or changes(folder, lasting):
        refuse_sources(folder, sources)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            delete_run(folder)
        finish_saving(folder)
        if changes(folder, lasting):
            # Nothing is trained yet, or it would be refused; the tokenizer may be that of other data.
            shutil.rmtree(folder / LEFT_BEHIND, ignore_errors=True)
        write_json(folder / RUN_ARGUMENTS, {**arguments, LASTING: lasting})
    return checkpoint


def refuse_others_files(folder: Path):
    """Refuses to delete or replace, for their names, files that are no run's.

    Raises:
        FileExistsError: if there are any in a folder that no run wrote to.
    """
    # Left by every training; the Trainer's own scripts leave checkpoints alone.
    is_run = (folder / RUN_ARGUMENTS).is_file() or (folder / RUN).is_file() or newest_checkpoint(folder) is not None
    if is_run or not folder.is_dir():
        return
    card = folder / CARD
    found = sorted(str(path.relative_to(folder)) for path in [*files_of_run(folder), *[card] * card.exists()])
    if found:
        raise FileExistsError(
            f"`overwrite_output_dir` replaces an earlier training, and none left the files of `output_dir` {folder}, of which "
            f"{', '.join(found[:TOLD])}{' and others' if len(found) > TOLD else ''} would be lost: give another folder, or move them."
        )


def refuse_sources(folder: Path, sources: Iterable[tuple[str, str]]):
    """Refuses to read from a folder what is deleted there before it is read.

    Raises:
        ValueError: if one of `sources` lies in `folder`, or is it.
    """
    for name, source in sources:
        # However it is written, and through links.
        if os.path.exists(source) and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`{name}` must lie outside `output_dir` {folder}, whose earlier run is deleted first, got {source}: give "
                "another `--output_dir`."
            )


def files_of_run(folder: Path) -> list[Path]:
    """What `delete_run` deletes, by the names that a run gives: files, and folders with all that is in them."""
    # What the run reported to TensorBoard would be drawn into the curves of the new one.
    found = list((folder / EVENTS).glob("*/events.out.tfevents.*"))
    for path in folder.iterdir():
        if path.is_dir():
            is_of_run = CHECKPOINT.fullmatch(path.name) or path.name in (LEFT_BEHIND, FINAL_MODEL)
        else:
            is_of_run = WEIGHTS_FILE.fullmatch(path.name) or path.name in RESULTS
        if is_of_run:
            found.append(path)
    return found


def delete_run(folder: Path):
    for path in files_of_run(folder):
        if path.is_dir():
            shutil.rmtree(path)
            continue
        path.unlink()
        if path.parent != folder:
            with contextlib.suppress(OSError):
                # A folder with other files stays.
                path.parent.rmdir()
    delete_model(folder)


def lasting_options(folder: Path) -> dict[str, Any]:
    """The options of a run that do not change, by name; empty where no run left them."""
    try:
        return read_json(folder / RUN_ARGUMENTS)[LASTING]
    except (OSError, ValueError, KeyError):
        return {}


def changes(folder: Path, lasting: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options by name whose value differs from that of an earlier call, with both values."""
    earlier = lasting_options(folder)
    pairs = {name: (earlier[name], value) for name, value in lasting.items() if name in earlier}
    return {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    """Normalizes paths."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) else value


def refuse_changes(folder: Path, lasting: dict[str, Any]):
    """Refuses to resume with other options than `arguments.json`, `run.json` and the card record.

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


def finish_saving(folder: Path):
    """Moves a saved model from `FINAL_MODEL` to its place, or completes a move that was interrupted.

    Old weights are deleted first and new ones moved last, so that weights never lie beside another model's config.
    """
    final = folder / FINAL_MODEL
    if not final.is_dir():
        return
    paths = sorted(final.iterdir(), key=lambda path: (bool(WEIGHTS_FILE.fullmatch(path.name)), path.name))
    if paths and not WEIGHTS_FILE.fullmatch(paths[0].name):
        delete_model(folder)
    for path in paths:
        target = folder / path.name
        if target.exists() and target.samefile(path):
            # Hard links of one file: renaming leaves both.
            path.unlink()
        else:
            os.replace(path, target)
    final.rmdir()


def delete_model(folder: Path):
    """Deletes the weights, `run.json` and the card; other files stay."""
    for path in folder.iterdir():
        if path.is_file() and WEIGHTS_FILE.fullmatch(path.name):
            path.unlink()
    if (folder / RUN).is_file():
        (folder / CARD).unlink(missing_ok=True)
        (folder / RUN).unlink()

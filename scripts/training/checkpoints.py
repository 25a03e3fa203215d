"""The search for the newest complete checkpoint, and code that checkpoints share."""

from __future__ import annotations

import contextlib
import filecmp
import logging
import os
import re
import zipfile
from pathlib import Path

from common.saved_files import WEIGHTS, WEIGHTS_INDEX, check_readable, read_json, shards


logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE = "trainer_state.json"
# The weights to train on from, in a checkpoint whose model is their average.
UNAVERAGED = "unaveraged.safetensors"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are skipped with a warning."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    steps = {int(match[1]): path for match, path in found if match and path.is_dir()}
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return steps[step]
        logger.warning("%s is left out: %s", steps[step], reason)
    return None


def share_code(folder: Path, run: Path) -> None:
    """Has the code that a saved model brings on the disk once for all checkpoints of a run, by hard links.

    Each folder still has all files, and keeps them when the others are deleted, moved or written anew.

    Args:
        folder: a model that has just been saved.
        run: the folder with the checkpoints.
    """
    for path in folder.glob("*.py"):
        for other in sorted(run.glob(f"checkpoint-*/{path.name}")):
            if path.samefile(other):
                break
            if filecmp.cmp(path, other, shallow=False):
                link = path.with_suffix(".link")
                # Not every file system has them: then it stays a copy.
                with contextlib.suppress(OSError):
                    os.link(other, link)
                    link.replace(path)
                break


def why_incomplete(checkpoint: Path) -> str | None:
    """Why training cannot be resumed from a checkpoint, or None if it can."""
    state = checkpoint / TRAINER_STATE
    try:
        step = read_json(state)["global_step"]
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
        if (checkpoint / UNAVERAGED).is_file():
            names.append(UNAVERAGED)
        for name in names:
            check_readable(checkpoint / name)
    except ValueError as error:
        return str(error)
    if not (sharded or (checkpoint / "scheduler.pt").is_file()):
        # Without it the Trainer would silently continue with a new optimizer.
        return "there is no scheduler.pt"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "there is no rng_state.pth"
    for path in checkpoint.glob("*.pt*"):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is damaged"
    if not sharded and not (checkpoint / "optimizer.pt").is_file():
        return "there is no optimizer.pt (`save_only_model`?)"
    return None

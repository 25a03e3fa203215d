"""Folders that are complete or missing, however the process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that replaces it at the end, once all files are on the disk.

    An exception leaves `target` as it was. A process killed at any moment leaves the old folder or the new one, whole, under
    its name; or, between two renames, the old one under another name, which `recover` and the next call put back. Only one
    process may write a target at a time.

    Raises:
        FileExistsError: if `target` is a file.
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} must be a folder, got a file.")
    recover(target)
    new, old = _beside(target)
    new.mkdir(parents=True)
    try:
        yield new
        _flush(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
        _flush_entry(target.parent)
    except BaseException:
        recover(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path, overwrite: bool):
    """Refuses an output directory that is in use, and with `overwrite` one that holds something else than a model.

    Raises:
        ValueError: for such a directory.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"`output` must be a directory, got the file {str(output)!r}.")
    if any(output.iterdir()) and not (overwrite and (output / "config.json").is_file()):
        allowed = "one that holds a `config.json`" if overwrite else "--overwrite to replace a model that is there"
        raise ValueError(f"`output` must be a new or empty directory, or {allowed}; got {str(output)!r}.")


def recover(target: Path) -> None:
    """Puts back a folder that a killed process had moved aside, and deletes its other leftovers."""
    target = Path(target).absolute()
    new, old = _beside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    # Not named like a checkpoint, so that they are not taken for one.
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _flush(folder: Path) -> None:
    """Waits until all files of a folder, and their names, are on the disk."""
    for path in folder.rglob("*"):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    # Only POSIX can open a folder.
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

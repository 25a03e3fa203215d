"""The source text of Python's standard library: text that needs no network."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


HELD_OUT_SHARE = 8


def standard_library_files() -> list[Path]:
    """The public top-level modules of Python's standard library that are written in Python, by name.

    Raises:
        FileNotFoundError: where Python was installed without its source text.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .py files: this Python comes without the text of its library.")
    return files


def split_files(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out: a file's name decides, so that other Python versions split alike."""
    train, held_out = [], []
    for path in files:
        (train if zlib.crc32(path.name.encode()) % HELD_OUT_SHARE else held_out).append(path)
    return train, held_out


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """The text of each file."""
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")

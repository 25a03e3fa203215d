"""A study's CSV: rows are appended one by one, and complete rows survive a killed process."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from studies.settings import COMPARISONS


FIELDS = [
    "stage", "task", "variant", "family", "length", "seed", "setting", "parameters", "forward_flops", "train_seconds", "cpu_seconds",
    *COMPARISONS, "perplexity", "steps", "epochs", "batch", "learning_rate", "threads", "processes", "device", "python",
    "torch", "transformers", "commit", "date",
]  # fmt: skip


def repair(path: Path):
    """Drops an incomplete last line, which a killed process leaves."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def read_rows(path: Path, fields: list[str] = FIELDS) -> list[dict[str, str]]:
    """All complete rows.

    Raises:
        ValueError: for a file with other columns.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if rows.fieldnames is not None and list(rows.fieldnames) != fields:
        raise ValueError(f"{path} has other columns than this study: give another `--output`.")
    return list(rows)


def append_row(path: Path, row: dict[str, Any], fields: list[str] = FIELDS):
    """Appends a row, and returns once it is on the disk. Only one process may write to a file."""
    repair(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())

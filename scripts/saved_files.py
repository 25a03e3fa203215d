"""What a saved run consists of: names of its files, and whether its weights can be read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open


RUN, CARD = "run.json", "README.md"
WEIGHTS, WEIGHTS_INDEX = ("model.safetensors", "adapter_model.safetensors"), "model.safetensors.index.json"


def shards(folder: Path) -> list[str]:
    """The files of weights that the index of a folder names.

    Raises:
        ValueError: if the index is damaged.
    """
    try:
        return sorted(set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / WEIGHTS_INDEX} is damaged") from error


def check_readable(weights: Path) -> None:
    """Reads the head of a file of weights alone, and compares it with the file's length.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged: {error}") from error

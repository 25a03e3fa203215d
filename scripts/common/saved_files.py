"""Files of a saved run: their names, whether weights can be read, and whether they fit the config."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from translution.modeling.models.weight_files import read_index


RUN, CARD = "run.json", "README.md"
# The confusion matrix of the last evaluation of a training, and the classes of `test_dir`.
CONFUSION, PREDICTIONS = "confusion.png", "predictions.csv"
# Of an evaluation without training, beside what the training left: the figures, as the Trainer calls them, and its own matrix.
EVALUATION, EVALUATION_CONFUSION = "evaluation_results.json", "evaluation_confusion.png"
# Texts of licences, to which the card may link.
LICENSES = "LICENSE*"
WEIGHTS, WEIGHTS_INDEX = ("model.safetensors", "adapter_model.safetensors"), "model.safetensors.index.json"


def read_json(path: Path) -> Any:
    """What a file of JSON holds; errors as `open` and `json.loads`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is whole or as it was before."""
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def as_json(value: Any) -> str:
    """A value as JSON; of what JSON does not know, the text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `as_json` by `write_whole`."""
    write_whole(path, as_json(value).encode())


def copy_licenses(source: Path, target: Path) -> None:
    """Copies the texts of licences from one folder, if it is there, to another; those that the other has stay."""
    for text in source.glob(LICENSES):
        if text.is_file() and not (target / text.name).exists():
            shutil.copyfile(text, target / text.name)


def shards(folder: Path) -> list[str]:
    """The files of weights that the index of a folder names.

    Raises:
        ValueError: if the index is damaged.
    """
    try:
        return sorted(set(read_index(folder / WEIGHTS_INDEX).values()))
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_INDEX} is damaged: {error}") from error


def check_readable(weights: Path) -> None:
    """Checks the header of a file of weights, and the file's length.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged: {error}") from error


def is_repo_id(text: str | None) -> bool:
    """Whether a repository of the Hub may be called so, such as `user/name` or `imagenet-1k`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def check_model_name(name: str) -> None:
    """Checks that a name is that of a folder, or a possible name on the Hub, such as `user/name`.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if os.path.isdir(name) or ("/" in name and is_repo_id(name)):
        return
    raise FileNotFoundError(f"there is no folder {name!r}, and it is no name of a repository, such as user/name")


def misshapen(report: dict[str, Any]) -> list[str]:
    """The tensors of a report of `from_pretrained` that do not fit the config, each with both shapes."""
    return [
        f"{key} must have the shape {list(expected)}, got {list(saved)}"
        for key, saved, expected in sorted(report["mismatched_keys"])
    ]

"""Checks of files of weights before Transformers reads them: their index, and the dtypes of their tensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)


# What weights may be stored as, in the words of PyTorch and of safetensors; others would be cast without a word.
FLOATING_DTYPES = ("float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16")


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by the tensor's name, of an index of shards.

    Raises:
        OSError: if the index cannot be read.
        ValueError: if it is no JSON, has other fields than an index has, or names a file outside its folder.
    """
    index = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError(f"{path} must hold a JSON object with `metadata` and `weight_map`, got {_kind(index)}.")
    for field, allowed in (("metadata", "an object"), ("weight_map", "an object of tensor names to file names")):
        if not isinstance(index.get(field), dict):
            raise ValueError(f"`{field}` of {path} must be {allowed}, got {_kind(index.get(field))}.")
    files = index["weight_map"]
    if not files:
        raise ValueError(f"`weight_map` of {path} must name at least one tensor, got an empty object.")
    ending = ".safetensors" if ".safetensors." in path.name else ".bin"
    for tensor, name in files.items():
        if not isinstance(name, str) or not name.endswith(ending) or _leaves_folder(name):
            raise ValueError(
                f"`weight_map` of {path} must name files in its own folder that end in {ending!r}, got {name!r} for "
                f"{tensor!r}."
            )
    return files


def _kind(value: Any) -> str:
    return "none" if value is None else f"{type(value).__name__} {value!r:.40}"


def _leaves_folder(name: str) -> bool:
    # A path of either system, as a checkpoint goes from one to the other.
    return any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def check_index(name: Any, variant: str | None = None, use_safetensors: bool | None = None, **where: Any) -> None:
    """Checks the index that `from_pretrained` would read, if a checkpoint is in several files.

    Args:
        name: a folder, or a model on the Hub, of which only files that were downloaded before are looked at.
        variant, use_safetensors: of `from_pretrained`.
        where: `subfolder`, and for the Hub `revision` and `cache_dir`.

    Raises:
        OSError: if the index is not JSON.
        ValueError: as `read_index`.
    """
    explicit = _explicit_index(_find(name, CONFIG_NAME, **where))
    if explicit is not None:
        _check_index(_find(name, explicit, **where))
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if use_safetensors is (whole == WEIGHTS_NAME):
            continue
        # Transformers takes the first of these that is there.
        for file in (whole, index):
            stem, dot, ending = file.rpartition(".")
            path = _find(name, file if variant is None else f"{stem}.{variant}{dot}{ending}", **where)
            if path is None:
                continue
            if file == index:
                _check_index(path)
            return


def _check_index(path: Path | None) -> None:
    if path is None:
        return
    try:
        read_index(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise unreadable(path, error) from error


def _explicit_index(config: Path | None) -> str | None:
    """The index that a config names itself, by a field of Transformers."""
    try:
        name = None if config is None else json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    except (ValueError, AttributeError):
        # Transformers says what is wrong with a config.
        return None
    return name if isinstance(name, str) and name.endswith(".index.json") else None


def _find(name: Any, file: str, subfolder: str = "", **where: Any) -> Path | None:
    folder = Path(str(name))
    if folder.is_dir():
        path = folder / subfolder / file
        return path if path.is_file() else None
    found = cached_file(
        str(name),
        file,
        subfolder=subfolder,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return None if found is None else Path(found)


def unreadable(path: Path, error: Exception) -> OSError:
    """The error of a file that is damaged."""
    return OSError(
        f"{path.name} of {path.parent} must be whole, but cannot be read: {error}. Copy or download it again."
    )


def check_dtypes(files: Iterable[str | Path], model: nn.Module, prefix: str) -> None:
    """Makes sure that weights are stored as floating point numbers. Of tensors only names and dtypes are read.

    Args:
        files: of a checkpoint, safetensors or pickles of tensors.
        model: whose weights are meant. What it does not have, or has as integers, may be anything.
        prefix: of the trunk's names, which a checkpoint of the trunk alone leaves out.

    Raises:
        OSError: if a file is missing or damaged, or a pickle holds something else than tensors.
        ValueError: if a weight has another dtype.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path in map(Path, files):
        for name, dtype in _dtypes(path).items():
            ours = floating & {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}
            if ours and dtype not in FLOATING_DTYPES:
                allowed = ", ".join(FLOATING_DTYPES[:4])
                raise ValueError(f"{name} of {path} must be stored as one of {allowed}, got the dtype {dtype}.")


def _dtypes(path: Path) -> dict[str, str]:
    """The dtype of every tensor in a file, by the tensor's name."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise unreadable(path, error) from error
    if path.suffix != ".bin":
        return {}
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        # A damaged file makes the unpickler raise anything; its advice to run the code that is in it is left out.
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{path.name} of {path.parent} must hold tensors by name, but cannot be read, or not without running code: "
            f"{reason}. Save the weights as safetensors."
        ) from error

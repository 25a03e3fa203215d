"""The names under which PyTorch knows this package's operators: one set of them for each version of the code.

A checkpoint that carries the code may bring another copy of it into a process. PyTorch has one table of operators, so a copy
whose operators had the names of the first one's would run those, or take them from under the first copy's feet. The namespace
therefore says which code it belongs to: identical copies share their operators, and different ones have their own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .flops import count_flops


# A checkpoint's copy lies in one folder, beside the configuration's files, without the layer for other networks and quantization. No operator
# depends on those.
FLAT_NAME = "operators_registration"
NOT_OF_MODELS = ("__init__", "configuration_translution", "configuration_remote_code", "layer", "quantization")
# Imports within the package, and what `remote_code.py` makes of them there.
_IMPORT = re.compile(r"^[ \t]*from \.[\w.]* import (?:\([^)]*\)|[^\n]*)$", flags=re.MULTILINE)
_ADDED = re.compile(r"^if False:\n(?:    from \.\w+ import \*  # noqa: F403\n)+", flags=re.MULTILINE)
_FOLDERS = "models|mixers|operators|kernels"


@lru_cache(maxsize=1)
def namespace() -> str:
    """Namespace of the operators of this copy of the code, `translution_` and a hash of its source."""
    file = Path(__file__)
    sources = file.parent.glob("*.py") if file.stem == FLAT_NAME else file.parents[1].rglob("*.py")
    return f"translution_{_digest(sources, __name__)}"


def _digest(sources: Iterable[Path], module: str) -> str:
    digests = sorted(
        hashlib.sha256(_own_text(source).encode()).hexdigest()
        for source in sources
        if source.stem not in NOT_OF_MODELS
    )
    # In an archive, or of compiled files, there is no source; but a process has one copy of each module.
    return hashlib.sha256("".join(digests or [module]).encode()).hexdigest()[:16]


def _own_text(source: Path) -> str:
    """The text of a file without empty lines, and with imports that do not say in which folder a module lies."""
    text = _IMPORT.sub(_without_folders, _ADDED.sub("", source.read_text(encoding="utf-8")))
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _without_folders(statement: re.Match[str]) -> str:
    text = re.sub(r"[\s()]+", " ", statement.group()).strip(" ,")
    text = re.sub(rf"from \.+(?:\w+\.)*(?:(?:{_FOLDERS})_)?(\w*) import", r"from \1 import", text)
    text = re.sub(rf"from (?:{_FOLDERS})? import", "import", text)
    return re.sub(rf"\b(?:{_FOLDERS})_(\w+) as \1\b", r"\1", text)


def operator(name: str) -> Any:
    """A registered operator of this copy of the code."""
    return getattr(getattr(torch.ops, namespace()), name)


def is_registered(name: str) -> bool:
    """Whether PyTorch knows an operator of this copy of the code, or of an identical one."""
    return hasattr(getattr(torch.ops, namespace()), name)


def define(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function, which changes none of its arguments, the operator of this name."""
    return torch.library.custom_op(f"{namespace()}::{name}", mutates_args=())


def register_once(names: tuple[str, ...], register: Callable[[], None]) -> tuple[Any, ...]:
    """The operators of these names, which `register` defines unless an identical copy of the code has done so."""
    if not all(is_registered(name) for name in names):
        register()
        for name in names:
            count_flops(name, operator(name))
    return tuple(operator(name) for name in names)


__all__ = ["define", "is_registered", "namespace", "operator", "register_once"]

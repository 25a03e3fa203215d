"""The names under which PyTorch knows this package's operators: one set of them for each version of the code.

A checkpoint that carries the code may bring another copy of it into a process. PyTorch has one table of operators, so a copy
whose operators had the names of the first one's would run those, or take them from under the first copy's feet. The namespace
therefore says which code it belongs to: identical copies share their operators, and different ones have their own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


# A checkpoint's copy has the configuration's files beside those of the models. No operator depends on them.
NOT_OF_MODELS = ("__init__.py", "configuration_translution.py", "self_contained.py")
# What it adds for Transformers, which has to see which files to copy.
_ADDED = re.compile(r"    from \.\w+ import \*  # noqa: F403")


@lru_cache(maxsize=1)
def namespace() -> str:
    """Namespace of the operators of this copy of the code, `translution_` and a hash of its source."""
    return f"translution_{_digest(Path(__file__).parent, __name__)}"


def _digest(folder: Path, module: str) -> str:
    digest = hashlib.sha256()
    sources = sorted(path for path in folder.glob("*.py") if path.name not in NOT_OF_MODELS)
    for source in sources:
        digest.update(f"{source.name}\n{_own_text(source)}\n".encode())
    if not sources:
        # An archive, or compiled files alone: a process has one copy of each module.
        digest.update(module.encode())
    return digest.hexdigest()[:16]


def _own_text(source: Path) -> str:
    """The text of a file as `self_contained.py` leaves it beside all others: modules without their folders, no empty lines."""
    lines = (line.rstrip() for line in source.read_text(encoding="utf-8").splitlines())
    lines = (re.sub(r"^(\s*from )\.+(?:\w+\.)*(\w+ import)", r"\1.\2", line) for line in lines)
    return "\n".join(line for line in lines if line and line != "if False:" and not _ADDED.fullmatch(line))


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
    return tuple(operator(name) for name in names)


__all__ = ["define", "is_registered", "namespace", "operator", "register_once"]

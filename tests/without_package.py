"""Processes that find what the tests share, but not the package."""

import os
from pathlib import Path


# An editable install finds the package by an import hook, another one by its folder.
WITHOUT_PACKAGE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""
SHADOW = "raise ImportError('the package is not here')\n"


def without_package(folder: Path) -> str:
    """Makes a folder; returns a `PYTHONPATH` with which a process finds what the tests share, but not the package."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT_PACKAGE)
    (folder / "translution.py").write_text(SHADOW)
    return os.pathsep.join((str(folder), str(Path(__file__).parent)))

"""Copies this package's code into a checkpoint, so that it loads with `trust_remote_code=True` where the package is not installed.

Transformers can do so for models of a single folder only. Here the files that a model imports, from whichever folder, are found
by following imports, and are written side by side, their imports rewritten.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


CONFIGURATION, MODELING = "configuration_translution", "modeling_translution"
# Modules beside `modeling_translution.py` with classes that users load.
OTHER_HEADS = ("backbone", "masked_image_modeling", "text_classification")
# For each Auto class the module and the class that it loads, beside those of every modality.
HEADS = {
    "image": {
        "AutoModelForImageClassification": (MODELING, "TranslutionForImageClassification"),
        "AutoModelForMaskedImageModeling": ("masked_image_modeling", "TranslutionForMaskedImageModeling"),
        "AutoBackbone": ("backbone", "TranslutionBackbone"),
    },
    "text": {
        "AutoModelForCausalLM": (MODELING, "TranslutionForCausalLM"),
        "AutoModelForSequenceClassification": ("text_classification", "TranslutionForSequenceClassification"),
        "AutoModelForTokenClassification": ("text_classification", "TranslutionForTokenClassification"),
    },
}
MODELS = Path(__file__).parents[1] / "modeling" / "models"


def auto_map(modality: str) -> dict[str, str]:
    """Which class of which file each Auto class loads, for a checkpoint's `config.json`."""
    heads = {
        auto_class: f"{_flat_name(MODELS / module)}.{name}" for auto_class, (module, name) in HEADS[modality].items()
    }
    return {
        "AutoConfig": f"{CONFIGURATION}.TranslutionConfig",
        "AutoModel": f"{MODELING}.TranslutionModel",
        **heads,
    }


def own_auto_map(saved: dict[str, str], folder: Path) -> dict[str, str]:
    """The `auto_map` of a model that came with its code, without the repository it came from where `folder` has the code."""
    names = {key: name.rpartition("--")[2] for key, name in saved.items()}
    return {
        key: name if (folder / f"{name.partition('.')[0]}.py").is_file() else saved[key] for key, name in names.items()
    }


def copy_code(folder: Path) -> list[Path]:
    """Writes the code of configuration and models to `folder`, all files side by side; returns them.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if two modules would have the same name there.
    """
    copies = {}
    for source in _imported_files([MODELS / f"{name}.py" for name in (MODELING, *OTHER_HEADS)]):
        copy = folder / f"{_flat_name(source)}.py"
        if copy in copies:
            raise ValueError(f"two modules would be named {copy.name}; side by side only one has room.")
        copies[copy] = _side_by_side(source)
    for copy, text in copies.items():
        # It may be the same file as in another checkpoint, a hard link, which keeps its code.
        copy.unlink(missing_ok=True)
        copy.write_text(text, encoding="utf-8")
    return list(copies)


def _flat_name(source: Path) -> str:
    """Name of a module where all lie in one folder: after its own, except for those that users name."""
    return source.stem if source.stem in (CONFIGURATION, MODELING) else f"{source.parent.name}_{source.stem}"


def _relative_imports(source: Path, text: str) -> Iterator[tuple[ast.ImportFrom, Path, dict[str, Path]]]:
    """Each import within the package, anywhere in a file: the module or folder it names, and modules it takes from a folder."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = source.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            module = target.with_suffix(".py")
            if module.is_file():
                yield node, module, {}
            else:
                yield node, target, {alias.name: target / f"{alias.name}.py" for alias in node.names}


def _imported_files(first: list[Path]) -> list[Path]:
    """Files, and all those of the package that they import, directly or not."""
    found = list(first)
    for source in found:
        for _, target, modules in _relative_imports(source, source.read_text(encoding="utf-8")):
            found += [file for file in modules.values() or [target] if file not in found]
    return found


def _side_by_side(source: Path) -> str:
    """The text of a module for a folder that has all others beside it."""
    text = source.read_text(encoding="utf-8")
    lines, whole = text.splitlines(), set()
    for node, target, modules in _relative_imports(source, text):
        line = lines[node.lineno - 1]
        if not modules:
            lines[node.lineno - 1] = re.sub(r"from\s+\.+[\w.]+", f"from .{_flat_name(target)}", line, count=1)
            continue
        names = {name: _flat_name(file) for name, file in modules.items()}
        whole.update(names.values())
        indent = " " * node.col_offset
        imports = ", ".join(f"{flat} as {name}" for name, flat in names.items())
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}from . import {imports}"] + [""] * (
            node.end_lineno - node.lineno
        )
    if source.stem == MODELING:
        # So that a model with any head is saved again with the code of all heads.
        whole.update(_flat_name(MODELS / name) for name in OTHER_HEADS)
    if whole:
        # Transformers looks for what it has to download with a regular expression, which sees no modules that are
        # imported as a whole.
        lines += ["", "", "if False:"] + [f"    from .{name} import *  # noqa: F403" for name in sorted(whole)]
    return "\n".join(lines) + "\n"

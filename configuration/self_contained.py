"""Copies this package's code into a checkpoint, so that it loads with `trust_remote_code=True` where the package is not installed.

Transformers can do so for models of a single folder only. Here the files that a model imports, from whichever folder, are found
by following imports, and are written side by side, their imports rewritten.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


HEADS = {
    "image": ("AutoModelForImageClassification", "TranslutionForImageClassification"),
    "text": ("AutoModelForCausalLM", "TranslutionForCausalLM"),
}
CONFIGURATION, MODELING = "configuration_translution", "modeling_translution"


def auto_map(modality: str) -> dict[str, str]:
    """Which class of which file each Auto class loads, for a checkpoint's `config.json`."""
    auto_class, model_class = HEADS[modality]
    return {
        "AutoConfig": f"{CONFIGURATION}.TranslutionConfig",
        "AutoModel": f"{MODELING}.TranslutionModel",
        auto_class: f"{MODELING}.{model_class}",
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
        ValueError: if two modules have the same name.
    """
    copies = {}
    for source in _imported_files(Path(__file__).parents[1] / "modeling" / f"{MODELING}.py"):
        copy = folder / source.name
        if copy in copies:
            raise ValueError(f"two modules are named {source.name}; side by side only one has room.")
        copies[copy] = _side_by_side(source)
    for copy, text in copies.items():
        copy.write_text(text, encoding="utf-8")
    return list(copies)


def _relative_imports(tree: ast.Module) -> Iterator[tuple[ast.ImportFrom, list[str]]]:
    """Each import within the package, anywhere in a file, and the dotted modules that it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node, [node.module] if node.module else [alias.name for alias in node.names]


def _imported_files(first: Path) -> list[Path]:
    """A file, and all those of the package that it imports, directly or not."""
    found = [first]
    for path in found:
        for node, modules in _relative_imports(ast.parse(path.read_text(encoding="utf-8"))):
            for module in modules:
                file = path.parents[node.level - 1].joinpath(*module.split(".")).with_suffix(".py")
                if file not in found:
                    found.append(file)
    return found


def _side_by_side(source: Path) -> str:
    """The text of a module for a folder that has all others beside it."""
    text = source.read_text(encoding="utf-8")
    lines, unnamed = text.splitlines(), set()
    for node, modules in _relative_imports(ast.parse(text)):
        if node.module:
            name = modules[0].rpartition(".")[2]
            lines[node.lineno - 1] = re.sub(r"from\s+\.+[\w.]+", f"from .{name}", lines[node.lineno - 1], count=1)
        else:
            unnamed.update(modules)
    if unnamed:
        # Transformers looks for what it has to download with a regular expression, which sees no modules that are
        # imported as a whole.
        lines += ["", "", "if False:"] + [f"    from .{name} import *  # noqa: F403" for name in sorted(unnamed)]
    return "\n".join(lines) + "\n"

"""The file of a sweep: a training script, a recipe, and the rows of a table, each with options of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common.command import EXPECTED
from common.saved_files import EVALUATION, RUN
from common.training_hours import estimate_hours
from training.arguments import read_overrides, read_recipe
from training.run import Run


SCRIPTS = ("run_image_classification", "run_clm")
KEYS = ("script", "recipe", "options", "seeds", "train_samples", "rows")
# Options that the sweep decides.
DECIDED = ("output_dir", "seed", "do_train", "resume_from_checkpoint")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: in the table, and of its folder.
        seeds: one run for each.
        options: of the training script, those of the recipe among them, and those of the row that is evaluated.
        evaluates: the row whose models are evaluated with these options; None if the row trains its own.
    """

    name: str
    seeds: list[int]
    options: dict[str, Any]
    evaluates: str | None = None

    @property
    def trained_seeds(self) -> list[int]:
        """The seeds of the models that the row trains."""
        return self.seeds if self.evaluates is None else []

    def folder(self, output: Path, seed: int) -> Path:
        return output / self.name / f"seed-{seed}"

    def trained(self, output: Path, seed: int) -> Path:
        """The folder of the model."""
        return output / (self.evaluates or self.name) / f"seed-{seed}"

    def result(self, output: Path, seed: int) -> Path:
        """The file that a run writes last."""
        return self.folder(output, seed) / (RUN if self.evaluates is None else EVALUATION)

    def arguments(self, output: Path, seed: int) -> list[str]:
        """The command line of the training script for a seed."""
        options = {**self.options, "output_dir": str(self.folder(output, seed)), "seed": seed}
        if self.evaluates is not None:
            options |= {"do_train": False, "resume_from_checkpoint": str(self.trained(output, seed))}
        words = []
        for name, value in options.items():
            if value is None:
                # As if it were not given.
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(one if isinstance(one, str) else json.dumps(one) for one in values)]
        return words


@dataclass(frozen=True)
class Sweep:
    """What a file holds.

    Args:
        script: the training script.
        rows: of the table.
        train_samples: images or blocks of text of the training data; None where that is not known.
    """

    script: ModuleType
    rows: list[Row]
    train_samples: int | None

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep of a file; the options of every row are tried.

        Raises:
            FileNotFoundError: if the file or its recipe is not there.
            ValueError: for a key, script, row or option that is unknown, or has a value that is not allowed.
        """
        found = read_recipe(path)
        require_names("A key of a sweep", found, KEYS)
        require_names("`script`", [found.get("script")], SCRIPTS)
        if not isinstance(found.get("rows"), dict) or not found["rows"]:
            raise ValueError(f"`rows` must be a mapping of names to options, got {found.get('rows')!r}.")
        samples = found.get("train_samples")
        if samples is not None and (type(samples) is not int or samples < 1):
            raise ValueError(f"`train_samples` must be an integer of at least 1, got {samples!r}.")
        common = read_recipe(path.parent / str(found["recipe"])) if "recipe" in found else {}
        common = merge_options(common, found.get("options", {}))
        sweep = cls(importlib.import_module(found["script"]), [], samples)
        for name, own in found["rows"].items():
            with naming(name):
                evaluated = own.get("evaluates") if isinstance(own, dict) else None
                shared = next((row.options for row in sweep.rows if row.name == evaluated), common)
                row = read_row(name, own, shared, found.get("seeds", [0]))
                if row.evaluates is not None:
                    trained = [other.name for other in sweep.rows if set(row.seeds) <= set(other.trained_seeds)]
                    require_names("`evaluates`, a row before it that trains its seeds,", [row.evaluates], trained)
                sweep.parse(row)
            sweep.rows.append(row)
        return sweep

    def parse(self, row: Row) -> Run:
        """The run of a row's first seed, not started; its config is tried as well.

        Raises:
            ValueError: for options that the script refuses; further ones as the script.
        """
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                run = self.script.parse(row.arguments(Path("runs"), row.seeds[0]))
        except SystemExit:
            # `argparse` says what is wrong and exits.
            raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from None
        self.script.model_config(run.model, run.others[0])
        return run

    def hours(self, row: Row) -> float:
        """Estimated hours on one H100 of all runs of a row, see `estimate_hours`.

        Raises:
            ValueError: if the number of samples is unknown.
        """
        if row.evaluates is not None:
            return 0.0
        run = self.parse(row)
        training = run.training
        if training.max_steps > 0:
            samples = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
        elif self.train_samples is not None:
            samples = training.num_train_epochs * self.train_samples
        else:
            raise ValueError("`train_samples` must be in the file for an estimate without `max_steps`, got None.")
        return len(row.seeds) * estimate_hours(self.script.model_config(run.model, run.others[0]), samples)


def read_row(name: Any, own: Any, common: dict[str, Any], seeds: Any) -> Row:
    """A row of a file; errors as `Sweep.read`."""
    if not isinstance(name, str) or name.startswith(".") or "/" in name or not name:
        raise ValueError(f"The name of a row must be that of a folder, without '/' or a dot in front, got {name!r}.")
    options = merge_options(common, own)
    seeds = options.pop("seeds", seeds)
    evaluates = options.pop("evaluates", None)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"`seeds` must be a list of integers of at least 0, got {seeds!r}.")
    for key in options.keys() & set(DECIDED):
        raise ValueError(f"`{key}` must be left to the sweep, got {options[key]!r}.")
    return Row(name, seeds, options, evaluates)


def merge_options(common: dict[str, Any], own: Any) -> dict[str, Any]:
    """Options, the later ones taking precedence; `config_overrides` field by field, as in the training scripts.

    Raises:
        ValueError: if `own` is no mapping, or for an unknown field.
    """
    if not isinstance(own, dict):
        raise ValueError(f"Options must be a mapping of names to values, got {own!r}.")
    fields = {**read_overrides(common.get("config_overrides")), **read_overrides(own.get("config_overrides"))}
    return {**common, **own, **({"config_overrides": fields} if fields else {})}


def require_names(what: str, names: Sequence[Any], allowed: Sequence[str]) -> None:
    """Raises a `ValueError` for a name that is not allowed."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {name!r}.")


@contextlib.contextmanager
def naming(row: Any) -> Iterator[None]:
    """Names the row in errors of its options."""
    try:
        yield
    except EXPECTED as error:
        raise ValueError(f"The row {row!r}: {error}") from error

"""Options of the training scripts, from the command line and from a recipe, and the config of a new model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from common.command import require, require_least, unknown_options
from common.saved_files import check_model_name
from transformers import HfArgumentParser, TrainingArguments

from translution import TranslutionConfig
from translution.modeling.models.from_attention import FREEZE


RECIPE_ENDINGS = (".yaml", ".yml", ".json")
# Fields that a script sets itself, from its task or its data.
DECIDED_FIELDS = ("modality",)
TOKEN_OPTIONS = ("token", "hub_token")
# Options that do not change what is trained: a run may be resumed with other values.
PASSING_FIELDS = (
    *TOKEN_OPTIONS,
    "trust_remote_code",
    "ignore_mismatched_sizes",
    "cache_dir",
    "num_proc",
    "test_dir",
    "validation_dir",
    "validation_file",
    "validation_split",
    "max_eval_samples",
)

# Options that may name a file or folder that a run reads.
SOURCE_FIELDS = (
    "model_name_or_path",
    "tokenizer_name",
    "dataset_name",
    "train_dir",
    "train_file",
    "validation_dir",
    "validation_file",
    "test_dir",
)


@dataclass
class ModelArguments:
    """Which model to train: a new one by size, or a checkpoint."""

    model_size: str | None = field(
        default=None, metadata={"help": "Size of a new model: tiny (the default), mini, small, base or large."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "'local' for a new model of local Translution; None for the full one."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Config fields of a new model, 'hidden_size=48,relative_rank=8' or a JSON object. Those of the command "
            "line come after those of a recipe."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune: a folder, or a name on the Hub."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the checkpoint."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code from the checkpoint."})
    token: str | None = field(
        default=None, metadata={"help": "Token for the Hub. Neither printed nor saved. HF_TOKEN works as well."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Whether to initialize tensors whose shape differs, such as a new head."}
    )

    freeze: str | None = field(
        default=None,
        metadata={
            "help": "'all_but_offsets' trains only what depends on the offset, and what starts anew; needs "
            "`model_name_or_path`."
        },
    )
    freeze_layers: int | None = field(
        default=None,
        metadata={"help": "Do not train the embedding and so many of the first layers; 0 for the embedding alone."},
    )
    freeze_pattern: str | None = field(
        default=None,
        metadata={"help": "Do not train parameters in whose name this regular expression is found, such as '_bank$'."},
    )

    def __post_init__(self):
        require(self, "freeze", lambda value: value in FREEZE, f"None or one of {', '.join(map(repr, FREEZE))}")
        if self.freeze_pattern is not None:
            try:
                re.compile(self.freeze_pattern)
            except re.error as error:
                raise ValueError(
                    f"`freeze_pattern` must be a regular expression, got {self.freeze_pattern!r}: {error}."
                ) from None
        for name in self.freezing():
            if self.model_name_or_path is None:
                raise ValueError(
                    f"`{name}` needs a trained model, `model_name_or_path`; got {getattr(self, name)!r} without."
                )
        if self.model_name_or_path is not None:
            try:
                check_model_name(self.model_name_or_path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"`model_name_or_path`: {error}.") from None

    def freezing(self) -> list[str]:
        """The given options that leave parameters as they are."""
        return [name for name in ("freeze", "freeze_layers", "freeze_pattern") if getattr(self, name) is not None]


@dataclass
class RunArguments:
    """Options that `TrainingArguments` does not have."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without improvement of `metric_for_best_model`."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete model, checkpoints, figures and TensorBoard events in the output folder, and start over."
        },
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the model, for its card."})
    co2_grams: float | None = field(
        default=None, metadata={"help": "Emissions of the training, in grams of CO2, for its card."}
    )

    def __post_init__(self):
        require_least(self, early_stopping_patience=1)
        require(self, "co2_grams", lambda grams: 0 <= grams < math.inf, "a number of at least 0")


def parse_arguments(classes: Sequence[type], arguments: Sequence[str], description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from `[recipe] [--name value …]`. The command line takes precedence.

    Raises:
        FileNotFoundError: for a recipe that is not there.
        ValueError: for a recipe that is no mapping, and for a name that no dataclass has. Their values, which may be
            tokens, are not repeated.
    """
    recipe, rest = {}, list(arguments)
    if rest and rest[0].endswith(RECIPE_ENDINGS):
        recipe = read_recipe(Path(rest.pop(0)))
    parser = HfArgumentParser(
        classes, description=description, usage="%(prog)s [recipe.yaml] [--name value ...]", allow_abbrev=False
    )
    names = {item.name for cls in classes for item in dataclasses.fields(cls) if item.init}
    unknown = sorted(map(str, set(recipe) - names))
    if unknown:
        raise ValueError(f"A recipe may set the options that --help lists; {', '.join(unknown)} is not among them.")
    overrides = recipe.pop("config_overrides", None)
    parser.set_defaults(**recipe)
    *parsed, left = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if left:
        raise ValueError(unknown_options(left))
    for part in parsed:
        if isinstance(part, ModelArguments):
            merged = {**read_overrides(overrides), **read_overrides(part.config_overrides)}
            part.config_overrides = json.dumps(merged, sort_keys=True) if merged else None
        hide_tokens(part)
    return tuple(parsed)


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's options by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, or holds no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    try:
        # JSON is YAML, and YAML's errors have line numbers.
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        # The error itself quotes the text, which may contain a token.
        raise ValueError(f"A recipe must be YAML, {path} is not{where}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"A recipe must be a mapping of options to values, got {type(recipe).__name__} in {path}.")
    return recipe


def read_overrides(overrides: str | dict[str, Any] | None) -> dict[str, Any]:
    """`"a=1,b=x"`, a JSON object, or a mapping, as a mapping. Values that are not JSON are strings.

    Raises:
        ValueError: for a piece without "=", and for a field that the config does not have.
    """
    if overrides is None:
        return {}
    if isinstance(overrides, str) and overrides.lstrip().startswith("{"):
        try:
            overrides = json.loads(overrides)
        except ValueError as error:
            raise ValueError(f"`config_overrides` that begin with '{{' must be a JSON object: {error}.") from None
    if isinstance(overrides, str):
        pairs = [piece.partition("=") for piece in overrides.split(",") if piece.strip()]
        wrong = [name for name, equals, _ in pairs if not equals]
        if wrong:
            raise ValueError(
                f"`config_overrides` must be 'field=value,field=value' or a JSON object, got {wrong[0]!r}."
            )
        overrides = {name.strip(): _value(text.strip()) for name, _, text in pairs}
    allowed = sorted(
        name for name in TranslutionConfig.__annotations__ if not name.startswith("_") and name not in DECIDED_FIELDS
    )
    for name in overrides:
        if name not in allowed:
            raise ValueError(f"`config_overrides` must name fields among {', '.join(allowed)}, got {name!r}.")
    return overrides


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def new_config(model: ModelArguments, decided: dict[str, Any], asked: dict[str, Any]) -> TranslutionConfig:
    """The config of a new model.

    Args:
        model: size and overrides.
        decided: fields that the task and the data decide.
        asked: fields with an option of their own; None where the option was not given.
    """
    overrides = read_overrides(model.config_overrides)
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in asked.keys() & overrides.keys():
        if asked[name] != overrides[name]:
            raise ValueError(f"`{name}` {asked[name]} contradicts `config_overrides`, where it is {overrides[name]}.")
    return TranslutionConfig.from_size(model.model_size or "tiny", model.preset, **{**decided, **overrides, **asked})


def new_model_options(model: ModelArguments) -> list[str]:
    """The given options that only a new model takes."""
    return [name for name in ("model_size", "preset", "config_overrides") if getattr(model, name) is not None]


def refuse_new_model_options(model: ModelArguments):
    """Refuses options that only a new model takes: a checkpoint has its config already.

    Raises:
        ValueError: if there are options that only a new model takes.
    """
    for name in new_model_options(model):
        raise ValueError(f"`{name}` shapes a new model; `model_name_or_path` {model.model_name_or_path} has a shape.")


def hide_tokens(arguments: Any):
    """Moves the Hub's token from the arguments, which are printed and saved, to `HF_TOKEN`."""
    for name in TOKEN_OPTIONS:
        token = getattr(arguments, name, None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
            setattr(arguments, name, None)


def without_tokens(arguments: Iterable[str]) -> list[str]:
    """The command line without tokens, to be saved."""
    kept, arguments = [], iter(arguments)
    options = {f"--{name}" for name in TOKEN_OPTIONS}
    options |= {option.replace("_", "-") for option in options}
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in options:
            kept.append(argument)
        elif not equals:
            next(arguments, None)
    return kept


def default_of(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def lasting(*parts: Any, given: bool = False) -> dict[str, Any]:
    """The options that a resumed run must not change, by name, as they are read back from JSON.

    With `given` those that have another value than their default.
    """
    values = {
        item.name: getattr(part, item.name)
        for part in parts
        for item in dataclasses.fields(part)
        if item.name not in PASSING_FIELDS and not (given and getattr(part, item.name) == default_of(item))
    }
    return json.loads(json.dumps(values, default=str))


def sources(*parts: Any) -> list[tuple[str, str]]:
    """The given options of `SOURCE_FIELDS`, each with one of its values."""
    values = [(name, getattr(part, name, None)) for part in parts for name in SOURCE_FIELDS]
    return [(name, one) for name, value in values for one in (value if isinstance(value, list) else [value]) if one]


def hyperparameters(training: TrainingArguments, *others: Any) -> dict[str, Any]:
    """Everything that was set to another value than its default, without tokens and paths of this machine."""
    places = {
        "output_dir",
        "cache_dir",
        "logging_dir",
        "run_name",
        "hub_model_id",
        "accelerator_config",
        *TOKEN_OPTIONS,
    }
    values = {}
    for part in (*others, training):
        for item in dataclasses.fields(part):
            default = default_of(item)
            value = getattr(part, item.name, None)
            # Some defaults are filled in later: None becomes False, or an empty list.
            if item.init and item.name not in places and value != default and (value or default):
                values[item.name] = value if isinstance(value, int | float | str | list | dict) else str(value)
    return values

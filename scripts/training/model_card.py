"""The model card of a saved run, written from the files of the run: `config.json` and `run.json`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from common.saved_files import CARD, RUN, is_repo_id, read_json
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from translution import TranslutionConfig


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE, CITATION = ROOT / "model_cards" / "template.md", ROOT / "CITATION.cff"
TASKS = {"image-classification": "AutoModelForImageClassification", "text-generation": "AutoModelForCausalLM"}
# Types of metrics on the Hub; those of other metrics are their names.
METRIC_TYPES = {"top_5_accuracy": "accuracy", "macro_f1": "f1"}
# What `run.json` says of trainings with the same options and other seeds: those `seeds`, and of each of the `metrics` the mean,
# standard deviation and interval.
OVER_SEEDS = "over_seeds"
# Fields of a card's metadata, the same in `run.json`: the Hub wants the last two beside the licence `other`.
LICENSE = ("license", "license_name", "license_link")
ORIGIN = ("base_model", *LICENSE)
# Config fields in the card's table.
FIELDS = (
    "modality",
    "mixer_types",
    "relative_projections",
    "relative_rank",
    "offset_basis",
    "max_relative_distance",
    "far_offsets",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "use_absolute_position_embeddings",
)
IMAGE_FIELDS, TEXT_FIELDS = ("image_size", "patch_size", "pooling"), ("vocab_size", "max_position_embeddings")


def write_model_card(directory: Path, name: str | None = None) -> Path:
    """Writes `README.md` beside a saved model, and returns its path; arguments and errors as `model_card`."""
    path = Path(directory) / CARD
    model_card(directory, name).save(path)
    return path


def model_card(directory: Path, name: str | None = None) -> ModelCard:
    """The card of a saved model.

    Args:
        directory: with `config.json` and `run.json`, which names the task; whatever else it does not tell, or
            tells as null, is left out.
        name: what the model is loaded by: its repository's name, by default the folder's.

    Raises:
        FileNotFoundError: if `config.json` or `run.json` is missing.
        ValueError: if `run.json` is no JSON object, or its `task` is none of `TASKS`.
    """
    directory = Path(directory)
    run = _without_places(_without_null(_read(directory / RUN)))
    if run.get("task") not in TASKS:
        raise ValueError(f"`task` of {directory / RUN} must be one of {', '.join(TASKS)}, got {run.get('task')!r}.")
    config = TranslutionConfig.from_dict(_read(directory / "config.json"))
    name = name or run.get("name") or directory.resolve().name
    return ModelCard.from_template(
        card_data=_metadata(name, run),
        template_path=str(TEMPLATE),
        name=" ".join(name.split()),
        # A string of Python, whatever quotes are in it.
        quoted_name=json.dumps(name, ensure_ascii=False),
        run=run,
        variant=describe(config),
        auto_class=TASKS[run["task"]],
        fields={field: _plain(getattr(config, field)) for field in _told(config)}
        | ({} if config.trunk_config is None else {"trunk_config": config.trunk_config["model_type"]}),
        citation=bibtex(),
    )


def _without_places(run: dict[str, Any]) -> dict[str, Any]:
    """The command and the settings of a run with the last part of each path that is of one machine alone."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        is_place = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))
        return Path(value).name if is_place else value

    def short_word(word: str) -> str:
        option, equals, value = word.partition("=")
        return f"{option}={short(value)}" if equals and option.startswith("--") else short(word)

    found = dict(run)
    if isinstance(run.get("command"), str):
        found["command"] = shlex.join(map(short_word, shlex.split(run["command"])))
    if isinstance(run.get("hyperparameters"), dict):
        found["hyperparameters"] = {name: short(value) for name, value in run["hyperparameters"].items()}
    return found


def origin_of(card: str | Path | None) -> dict[str, Any]:
    """What a card says of where its model is from: those fields of `ORIGIN` that it has, none without a card.

    A card that cannot be read is named in one printed line: it is no reason to lose a model that is trained.
    """
    if card is None or not Path(card).is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        print(
            f"{card} cannot be read, base model and licence are left out: {' '.join(str(error).split())}", flush=True
        )
        return {}
    return {name: data[name] for name in ORIGIN if name in data}


def bibtex() -> str:
    """The paper's entry of `CITATION.cff`."""
    paper = yaml.safe_load(CITATION.read_text(encoding="utf-8"))["references"][0]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    key = f"{paper['authors'][0]['family-names']}{paper['year']}{paper['title'].split(':')[0]}".lower()
    lines = [f"  title = {{{paper['title']}}}", f"  author = {{{authors}}}", f"  year = {{{paper['year']}}}"]
    return ",\n".join([f"@article{{{key}", *lines, f"  url = {{{paper['url']}}}"]) + "\n}"


def describe(config: TranslutionConfig) -> str:
    """The kind of model in words, such as `"LoR-Translution (rank 8) of keys and values"`."""
    names = [_describe_mixer(config, name) for name in dict.fromkeys(config.mixer_types)]
    return names[0] if len(names) == 1 else f"a hybrid of {', '.join(names[:-1])} and {names[-1]}"


def _describe_mixer(config: TranslutionConfig, mixer: str) -> str:
    if mixer.removeprefix("rope_") != "translution":
        return mixer.replace("rope_", "rotary ").replace("_", " ").replace("acmix", "ACmix")
    kind = "Translution" if config.relative_rank is None else f"LoR-Translution (rank {config.relative_rank})"
    if config.offset_basis is not None:
        kind = f"basis {kind} ({config.offset_basis} matrices)"
    if config.max_relative_distance is not None:
        kind = f"local {kind}"
    words = [{"q": "queries", "k": "keys", "v": "values"}[letter] for letter in config.relative_projections]
    relative = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{'rotary ' if mixer.startswith('rope_') else ''}{kind} of {relative}"


def _metadata(name: str, run: dict[str, Any]) -> ModelCardData:
    """What the Hub reads: YAML at the head of the card."""
    data, metrics = run.get("dataset") or {}, run.get("metrics") or {}
    dataset_id = data.get("id") if is_repo_id(data.get("id")) else None
    results = [
        EvalResult(
            task_type=run["task"],
            # The Hub requires a type even for data that are not on it.
            dataset_type=dataset_id or _slug(data["name"]),
            dataset_name=data["name"],
            dataset_config=data.get("config"),
            dataset_split=data.get("eval_split"),
            dataset_revision=data.get("revision"),
            metric_type=METRIC_TYPES.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if data.get("name")
    ]
    grams = run.get("co2_grams")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=run["task"],
        **{name: run.get(name) for name in ORIGIN},
        # Only names on the Hub: a folder's name may be that of another dataset there.
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(METRIC_TYPES.get(metric, metric) for metric in metrics)) or None,
        tags=["translution"],
        # The Hub's client wants a name for a model with results, and no name for one without.
        model_name=name if results else None,
        eval_results=results or None,
        co2_eq_emissions=None if grams is None else {"emissions": grams},
    )


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value


def _slug(name: str) -> str:
    # The Hub takes ASCII alone.
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.").lower() or "data"


def _told(config: TranslutionConfig) -> list[str]:
    fields = FIELDS + (IMAGE_FIELDS if config.modality == "image" else TEXT_FIELDS)
    # Without a distance no offset is far.
    hidden = {"far_offsets"} if config.max_relative_distance is None else set()
    return [field for field in fields if field not in hidden and getattr(config, field) is not None]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 else ", ".join(map(str, value))
    return value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the card is written from it.")
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}.")
    return found

"""Saved models with a head, and what makes their inputs, loaded by name; what does not fit is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import cached_file

import translution  # noqa: F401 (registers the Auto classes)
from common.saved_files import check_model_name, misshapen


AUTO_CLASSES = {
    "TranslutionForImageClassification": AutoModelForImageClassification,
    "TranslutionForCausalLM": AutoModelForCausalLM,
}
# By the modality what makes inputs of data, and the files that it is loaded from, each of which may be the only one.
PREPROCESSORS = {
    "image": ("image processor", ("preprocessor_config.json", "processor_config.json")),
    "text": ("tokenizer", ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")),
}


def load_model(name: str, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """An image classifier or causal language model.

    Args:
        name: a folder, or a name on the Hub.
        revision: of the model on the Hub.
        options: of `from_pretrained`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is no Translution model with a head, its config is damaged, or its weights are not those of its config.
    """
    check_model_name(name)
    try:
        with damage(f"the config of {name}"):
            config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise OSError(f"there is no folder {name!r}, and as a name on the Hub it does not load: {error}") from error
    found = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    if found not in AUTO_CLASSES:
        raise ValueError(f"`architectures` of {name} must be one of {', '.join(AUTO_CLASSES)}, got {found}.")
    # Misshapen tensors are found with the others below, in one error.
    model, report = AUTO_CLASSES[found].from_pretrained(
        name, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    require_whole(name, report)
    return model


def find_file(name: str, file: str, revision: str | None = None) -> str | None:
    """The path of a file of a model, a folder or a name on the Hub; None if the model does not have it."""
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def has_preprocessor(name: str, modality: str, revision: str | None = None) -> bool:
    """Whether a model, a folder or a name on the Hub, has its image processor or tokenizer."""
    return any(find_file(name, file, revision) is not None for file in PREPROCESSORS[modality][1])


def require_preprocessor(name: str, modality: str, revision: str | None = None) -> None:
    """Raises a `FileNotFoundError` that names the files, for a model without its image processor or tokenizer.

    Transformers would take the folder for a name on the Hub, or load a tokenizer without words.
    """
    if not has_preprocessor(name, modality, revision):
        what, files = PREPROCESSORS[modality]
        where = f"the folder {name}" if os.path.isdir(name) else name
        raise FileNotFoundError(f"{where} has no {what}: there is no {' or '.join(files)}")


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """Names the damaged file: Transformers raises errors of any kind for a wrong value in it."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        # The config's own errors are wrapped.
        raise ValueError(f"{what} is damaged: {error.__cause__ or error}") from error


def require_whole(name: str, report: dict[str, Any]):
    """Refuses missing and unknown weights, for which Transformers only warns."""
    problems = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    problems += [f"{key} is unknown" for key in sorted(report["unexpected_keys"])]
    problems += misshapen(report)
    if problems:
        raise ValueError(f"the weights of {name} do not fit its config: {'; '.join(problems)}")

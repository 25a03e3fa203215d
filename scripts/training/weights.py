"""Weights of saved models: whether they are there, and loading them into a model to train or to evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.saved_files import WEIGHTS, WEIGHTS_INDEX, misshapen
from transformers import PreTrainedModel

from training.arguments import ModelArguments
from training.fine_tuning import freeze


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*WEIGHTS, WEIGHTS_INDEX))


def load_weights(model: PreTrainedModel, folder: Path):
    """Loads the weights in a folder into a model.

    Raises:
        ValueError: if some are missing, or they are those of a model of another shape; further ones as `from_pretrained`.
    """
    saved, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"The weights in {folder} must be all, {', '.join(sorted(report['missing_keys']))} is missing."
        )
    weights, own = ({name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (saved, model))
    if weights != own:
        name = sorted(name for name, _ in weights.items() ^ own.items())[0]
        raise ValueError(
            f"The weights in {folder} are those of another model than the options describe: {name} has the shape "
            f"{weights.get(name)} there, and would have {own.get(name)}. `--model_name_or_path {folder}` takes the shape from there."
        )
    model.load_state_dict(saved.state_dict())


def load_checkpoint(auto_class: Any, args: ModelArguments, trains: bool = True, **fields: Any) -> PreTrainedModel:
    """The model to train or to evaluate that `model_name_or_path` names, in float32 where it is not quantised.

    Args:
        auto_class: of its task.
        args: where it is, and whether tensors of another shape start anew.
        trains: whether it is to be trained.
        fields: of its config.

    Raises:
        ValueError: if a tensor has another shape than the config's, or a quantised model is to be trained; further ones as
            `freeze` and `from_pretrained`.
    """
    name = args.model_name_or_path
    # Only the loading report names the tensors that do not fit.
    model, report = auto_class.from_pretrained(
        name,
        revision=args.model_revision or "main",
        trust_remote_code=args.trust_remote_code,
        dtype="float32",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **fields,
    )
    if trains and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"`model_name_or_path` must be a model in floating point numbers, {name} is quantised, and its integers cannot be "
            "trained: train the model that it was made from, and quantise the result by scripts/quantize.py; or evaluate this one "
            "with `--do_train false`."
        )
    problems = misshapen(report)
    if problems and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"The weights of {name} do not fit: {'; '.join(problems)}. `--ignore_mismatched_sizes` starts these anew."
        )
    freeze(model, args, [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    return model

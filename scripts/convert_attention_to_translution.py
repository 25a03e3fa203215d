#!/usr/bin/env python
"""Makes a Translution model with the same outputs out of a trained attention model of Transformers.

    python scripts/convert_attention_to_translution.py --model user/name --output DIR --max_relative_distance 3
    python scripts/convert_attention_to_translution.py --model FOLDER --output DIR --layers 0 1 --far_offsets shared

The model's trunk stays, and its attention is replaced. Tokenizer or image processor, generation config, the card's base model
and licence, and the licence's text in a folder are copied.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from common.atomic_folder import check_output, written_whole
from common.command import ArgumentParser, require_least, run_command
from common.saved_files import CARD, RUN, check_model_name, copy_licenses, write_json
from common.saved_models import PREPROCESSORS, find_file, has_preprocessor
from training.model_card import LICENSE, origin_of, write_model_card
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from translution import TranslutionForCausalLM, TranslutionForImageClassification
from translution.configuration.configuration_translution import FAR_OFFSETS, RELATIVE_PROJECTIONS
from translution.modeling.models.trunks import family_of


MODELS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
TASKS = {"image": "image-classification", "text": "text-generation"}
PROCESSORS = {"image": AutoImageProcessor, "text": AutoTokenizer}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def convert(
    model: str,
    output: Path,
    revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    command: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Converts a model and saves it with all that belongs to it.

    Args:
        model: a folder, or a name on the Hub.
        output: the folder to write.
        revision: of the model on the Hub.
        dtype: one of `DTYPES`; `"auto"` is that of the checkpoint.
        max_shard_size: largest file of weights.
        overwrite: whether to replace a model that is there.
        command: the command line, for the card.
        options: of `from_attention`.

    Returns:
        The converted model.

    Raises:
        ValueError: for a model that is not supported, or a folder that is in use.
        OSError: if the model cannot be read.
    """
    output = output.resolve()
    check_output(output, overwrite)
    check_model_name(model)
    where = {} if revision is None else {"revision": revision}
    modality = family_of(AutoConfig.from_pretrained(model, **where).model_type).modality
    processor = load_processor(model, modality, **where)
    converted = MODELS[modality].from_attention(model, dtype=dtype, **options, **where)
    with written_whole(output) as folder:
        converted.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        copy_licenses(Path(model), folder)
        write_json(folder / RUN, run_of(model, modality, command, **where))
        write_model_card(folder, output.name)
    return converted


def load_processor(model: str, modality: str, **where: Any) -> PreTrainedTokenizerBase | BaseImageProcessor | None:
    """The tokenizer or image processor of a model; without one, None and a printed line."""
    # Asked first: of a model type that has one class of tokenizers, an empty tokenizer would be loaded.
    if has_preprocessor(model, modality, **where):
        return PROCESSORS[modality].from_pretrained(model, **where)
    name, files = PREPROCESSORS[modality]
    print(f"{model} has no {name}, the converted model has none either: there is no {' or '.join(files)}", flush=True)
    return None


def run_of(model: str, modality: str, command: str | None, **where: Any) -> dict[str, Any]:
    """What the card of the converted model says of where it is from."""
    data = origin_of(find_file(model, CARD, **where))
    # A folder's name is no name on the Hub, and what it holds may be from there.
    base = data.get("base_model") if Path(model).is_dir() else model
    return {
        "task": TASKS[modality],
        # A folder may hold what was trained further from its base.
        "converted_from": Path(model).name if Path(model).is_dir() else model,
        "base_model": base,
        **{name: data.get(name) for name in LICENSE},
        "command": command,
        "date": date.today().isoformat(),
    }


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        description="Convert an attention model of Transformers to Translution, with the same outputs."
    )
    parser.add_argument("--model", required=True, help="folder, or name on the Hub, of the attention model")
    parser.add_argument("--output", type=Path, required=True, help="directory of the converted model, new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the whole directory of an earlier model")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--relative_projections", choices=RELATIVE_PROJECTIONS, default="kv", help="what depends on the offset (kv)"
    )
    parser.add_argument(
        "--max_relative_distance", type=int, metavar="D", help="offsets beyond share a matrix; rotary models need it"
    )
    parser.add_argument(
        "--far_offsets", choices=FAR_OFFSETS, default="clamped", help="images: what offsets beyond share (clamped)"
    )
    parser.add_argument(
        "--relative_rank", type=int, metavar="R", help="low-rank Translution, features per head (full)"
    )
    parser.add_argument("--offset_basis", type=int, metavar="N", help="matrices that all offsets share (each its own)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="layers that become Translution (all)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (that of the checkpoint)")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights (5GB)")
    return parser


def main(argv: Sequence[str]):
    arguments = build_parser().parse_args(argv)
    require_least(arguments, max_relative_distance=0, relative_rank=1, offset_basis=1)
    command = shlex.join(["python", "scripts/convert_attention_to_translution.py", *argv])
    model = convert(**vars(arguments), command=command)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters saved to {arguments.output.resolve()}")


if __name__ == "__main__":
    run_command(main)

"""Looks at a saved model: the matrices of its offsets, and the attention of one token to a picture or a text.

    python scripts/look.py runs/digits
    python scripts/look.py runs/digits picture.png --output digits.png --json digits.json
    python scripts/look.py runs/stdlib "def main(self):" --output stdlib.png

The model is a folder, or a name on the Hub. Shown are, for each layer, the Frobenius norm of each offset's matrix, with near
offsets, what far pairs share, and the class token apart; and how far the matrices of near offsets are from the one that far
pairs share, or else from the mean over all offsets. Of LoR-Translution that is the relative part alone, the product of its
factors. Layers of other mixers, such as attention, have no matrices and are left out; a model without any needs a picture or a
text. Attention is that of `output_attentions` by the reference implementation. Layers and tokens are counted from 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from common.command import ArgumentParser, require, require_least, run_command
from common.offset_matrices import FAR, NEAR, describe_banks
from common.saved_files import as_json, write_whole
from common.saved_models import load_model
from common.tables import markdown
from predict import check_outputs, load_picture, read_prompt, with_preprocessor
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging


FIGURES = (".png", ".pdf", ".svg")
# Mixers without attention weights.
WITHOUT_ATTENTION = ("convolution",)


@torch.no_grad()
def attention_of_token(model: PreTrainedModel, inputs: Mapping[str, Tensor], token: int) -> dict[str, Any]:
    """The attention that one token pays to all, for JSON.

    Args:
        model: with `attn_implementation` "eager".
        inputs: of one picture or text.
        token: its place, the class token of an image being 0; negative from the end.

    Returns:
        `token`, and `layers`, a list of `layer` and `weights`, `[heads][tokens]`. Layers of convolution have none.

    Raises:
        ValueError: if there is no such token.
    """
    options = {"use_cache": False} if model.config.modality == "text" else {}
    weights = model(**inputs, **options, output_attentions=True).attentions
    layers = [index for index, name in enumerate(model.config.mixer_types) if name not in WITHOUT_ATTENTION]
    if not layers:
        raise ValueError(f"Attention needs a layer with attention, got `mixer_types` {model.config.mixer_types}.")
    count = weights[0].shape[-1]
    if not -count <= token < count:
        raise ValueError(
            f"`token` must be at least {-count} and less than {count}, the number of tokens, got {token}."
        )
    return {
        "token": token % count,
        "layers": [
            {"layer": layer, "weights": one[0, :, token].tolist()} for layer, one in zip(layers, weights, strict=True)
        ],
    }


def describe(model: PreTrainedModel, near: int | None = None) -> dict[str, Any]:
    """`modality`, `mixer_types`, and `banks`, a list of `describe_bank`; `near` is `NEAR` if it is not given."""
    config = model.config
    banks = describe_banks(model, NEAR[config.modality] if near is None else near)
    return {"modality": config.modality, "mixer_types": list(config.mixer_types), "banks": list(banks)}


def read_input(model: PreTrainedModel, text: str, options: argparse.Namespace) -> tuple[dict[str, Tensor], list[str]]:
    """Model inputs of a picture or a text, and the tokens of a text.

    Raises:
        FileNotFoundError: if an image model is given something else than a picture's file.
        ValueError: if a text model is given a picture.
    """
    # Before anything else is loaded.
    found = load_picture(text) if model.config.modality == "image" else read_prompt(text)
    made = with_preprocessor(model, options.model, options.revision)
    if model.config.modality == "image":
        pixels = made.image_processor(found, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(model.dtype)}, []
    ids = made.tokenizer(found, return_tensors="pt")["input_ids"]
    return {"input_ids": ids}, [made.tokenizer.decode([token]) for token in ids[0].tolist()]


def summary(report: dict[str, Any]) -> str:
    """What is printed: a row for each bank, and what has none."""
    lines, cells = [], []
    for bank in report["banks"]:
        norms = {str(one["offset"]): one["norm"] for one in bank["norms"]}
        distances = [one["relative_distance"] for one in bank["near"] if one["relative_distance"] is not None]
        largest = [one["singular_values"][0] for one in bank["near"]]
        cells.append(
            [
                str(bank["layer"]),
                bank["projection"],
                f"{len(norms)} × {' × '.join(map(str, bank['shape']))}",
                f"{min(norms.values()):.3g} to {max(norms.values()):.3g}",
                f"{norms[FAR]:.3g}" if FAR in norms else "–",
                bank["reference"],
                f"{min(distances):.3g} to {max(distances):.3g}" if distances else "–",
                f"{max(largest):.3g}" if largest else "–",
            ]
        )
    if cells:
        columns = ["layer", "projection", "matrices", "norms", "far norm", "compared with"]
        lines.append(markdown([*columns, "near distance", "largest singular value"], cells, texts=2))
    having = {bank["layer"] for bank in report["banks"]}
    without = [f"{i} ({name})" for i, name in enumerate(report["mixer_types"]) if i not in having]
    if without:
        lines.append(f"Layers without a matrix for each offset: {', '.join(without)}.")
    return "\n".join(lines)


def main(arguments: Sequence[str]):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("input", nargs="?", help="a picture or a text to show attention over; - is standard input")
    parser.add_argument(
        "--output",
        help=f"figure to write or replace, {', '.join(FIGURES)}; without `json`, by default the model's name and -look.png",
    )
    parser.add_argument("--json", help="file to write the numbers to as JSON; - is standard output")
    parser.add_argument(
        "--token",
        type=int,
        help="token whose attention is shown; 0 is the class token of an image, by default, and -1 the last of a text",
    )
    parser.add_argument(
        "--near", type=int, help="largest offset that is near: rows and columns, by default 1, or tokens, by default 3"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    if options.output is None and options.json is None:
        options.output = f"{Path(options.model).resolve().name}-look.png"
    if options.token is not None and options.input is None:
        parser.error(f"`token` needs a picture or a text, got {options.token} without")
    require_least(options, near=0)
    require(options, "output", lambda path: Path(path).suffix in FIGURES, f"a file named …{', …'.join(FIGURES)}")
    check_outputs(options, [] if options.input is None else [options.input], ("output", "json"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model(options.model, options.revision, attn_implementation="eager").eval()
    report = {"model": options.model, **describe(model, options.near)}
    if not report["banks"] and options.input is None:
        raise ValueError(
            f"{options.model} has no layer with a matrix for each offset, `mixer_types` {model.config.mixer_types}: give a "
            "picture or a text to see its attention."
        )
    inputs = None
    if options.input is not None:
        inputs, tokens = read_input(model, options.input, options)
        default = 0 if model.config.modality == "image" else -1
        token = default if options.token is None else options.token
        report["attention"] = {**({"tokens": tokens} if tokens else {}), **attention_of_token(model, inputs, token)}
    if options.output is not None:
        # Numbers alone need no matplotlib.
        from common.offset_figures import draw_report

        output, content = Path(options.output), BytesIO()
        pixels = None if inputs is None else inputs.get("pixel_values")
        draw_report(model.config, report, pixels).savefig(content, format=output.suffix[1:], dpi=100)
        write_whole(output, content.getvalue())
        if options.json != "-":
            print(f"{output}: the figure")
    if options.json == "-":
        print(as_json(report), end="")
        return
    if options.json is not None:
        write_whole(Path(options.json), as_json(report).encode())
    print(summary(report))


if __name__ == "__main__":
    run_command(main)

"""Stores the weights of a saved model in 8 bits, or measures what that costs.

    python scripts/quantize.py runs/texts --output runs/texts-int8
    python scripts/quantize.py runs/digits runs/stdlib --measure quantization.csv

The quantised model, with its processor or tokenizer, is loaded like any other; that needs torchao, of the extra `quantize`.
`--measure` takes models that were trained by the recipes `digits.yaml` and `stdlib.yaml`, evaluates them on the data they
were not trained on in float32, bfloat16 and int8, and writes accuracy or perplexity and the bytes of weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common.atomic_folder import check_output, written_whole
from common.command import ArgumentParser, run_command
from common.hardware import hardware
from common.saved_files import copy_licenses
from common.saved_models import load_model
from common.tables import write_csv
from convert_attention_to_translution import load_processor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from translution import quantize_int8


FIELDS = ["data", "weights", "metric", "value", "samples", "weight_bytes", "threads", "device", "python", "torch", "transformers",
          "torchao", "commit"]  # fmt: skip
# What weights are stored as.
KINDS: dict[str, tuple[torch.dtype, Callable[[PreTrainedModel], Any]]] = {
    "float32": (torch.float32, lambda model: model),
    "bfloat16": (torch.bfloat16, lambda model: model),
    "int8": (torch.float32, quantize_int8),
}
BATCH = 64
# Of the standard library, as `max_eval_samples` of its recipe.
DOCUMENTS = 8


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers: of a quantised one those of its integers and scales."""

    def size(tensor: Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(map(size, (*model.parameters(), *model.buffers())))


def quantize(name: str, output: Path, revision: str | None = None, overwrite: bool = False) -> tuple[int, int]:
    """Writes a quantised model, with its processor or tokenizer, to a folder.

    Returns:
        The bytes of weights before and after.

    Raises:
        ImportError, ValueError: as `quantize_int8` and `load_model`; and for a folder that is in use.
        OSError: if the model cannot be read.
    """
    output = output.resolve()
    check_output(output, overwrite)
    model = load_model(name, revision)
    before = weight_bytes(model)
    processor = load_processor(name, model.config.modality, **({} if revision is None else {"revision": revision}))
    quantize_int8(model)
    with written_whole(output) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        copy_licenses(Path(name), folder)
    return before, weight_bytes(model)


def accuracy(model: PreTrainedModel, processor: Any) -> tuple[str, float, int]:
    """Of the recipe's digits that were not trained on, in percent, and their number."""
    from training.image_data import digits_dataset

    data = digits_dataset("dynamic")["test"]
    pixels = processor([image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
    logits = torch.cat([model(batch.to(model.dtype)).logits for batch in pixels.split(BATCH)])
    right = logits.argmax(dim=-1) == torch.tensor(data["label"])
    return "accuracy, %", 100 * right.double().mean().item(), len(data)


def perplexity(model: PreTrainedModel, tokenizer: Any) -> tuple[str, float, int]:
    """Of the recipe's documents that were not trained on, and the number of tokens predicted."""
    from training.text_blocks import Packer
    from training.text_data import standard_library_dataset

    texts = standard_library_dataset()["test"][:DOCUMENTS]
    blocks = [block for block in Packer(tokenizer, tokenizer.model_max_length)(texts)["input_ids"] if len(block) > 1]
    loss, count = 0.0, 0
    for start in range(0, len(blocks), BATCH):
        batch = [torch.tensor(block) for block in blocks[start : start + BATCH]]
        # Padding is on the right, so that no token sees it, and is no target.
        labels = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        logits = model(labels.clamp(min=0), use_cache=False).logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += sum(len(block) - 1 for block in batch)
    return "perplexity", math.exp(loss / count), count


# By the modality: the name of the data, and what is measured on them.
MEASURES = {"image": ("digits", accuracy), "text": ("standard library", perplexity)}


@torch.no_grad()
def measure(name: str, revision: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows with `FIELDS` of a model that a recipe trained, one for each of `KINDS`; errors as `quantize`.

    What a model computes has the dtype of its weights; with int8 it is float32.
    """
    for kind, (dtype, change) in KINDS.items():
        model = change(load_model(name, revision, dtype=dtype)).eval()
        modality = model.config.modality
        data, figure = MEASURES[modality]
        metric, value, samples = figure(model, load_processor(name, modality))
        figures = {"metric": metric, "value": f"{value:.4f}", "samples": samples, "weight_bytes": weight_bytes(model)}
        yield {"data": data, "weights": kind, **figures, **hardware(), "torchao": version("torchao")}


def main(arguments: Sequence[str]):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="folder of a saved model, or its name on the Hub")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="directory of the quantised model, new or empty")
    target.add_argument("--measure", type=Path, metavar="CSV", help="evaluate instead, and write the figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace the whole directory of an earlier model")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.measure is not None:
        rows = []
        for name in options.model:
            for row in measure(name, options.revision):
                rows.append(row)
                print(
                    f"{row['data']}, {row['weights']}: {row['metric']} {row['value']}, {row['weight_bytes']:,} bytes"
                )
        write_csv(options.measure, FIELDS, rows)
        return
    if len(options.model) > 1:
        parser.error(f"`output` takes one model, got {len(options.model)}")
    before, after = quantize(options.model[0], options.output, options.revision, options.overwrite)
    print(f"{options.output}: {before:,} bytes of weights before, {after:,} after")


if __name__ == "__main__":
    run_command(main)

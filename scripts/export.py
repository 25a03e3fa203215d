"""Exports a saved model to one file that runs without this package, and checks the file against the model.

    python scripts/export.py runs/digits --format onnx
    python scripts/export.py runs/stdlib --format exported_program --output stdlib.pt2
    python scripts/export.py user/name --format torchscript

The file takes images as `pixel_values`, or texts as `input_ids`, of any batch size and length, and computes
logits in float32. It is written only if they are the model's for inputs of other sizes than it was exported with.
It takes no mask: texts of a batch have one length, or are padded on the right, where no token sees the padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from logging import ERROR, getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.measuring import spread, time_in_turn
from common.command import ArgumentParser, require, run_command
from common.saved_models import load_model
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.utils import logging

from translution import TranslutionConfig


# The largest error of a logit, relative to the largest logit: float32 sums in another order.
BOUND = 1e-5
REPEATS = 20
# Of texts for the checks, beside the distances on both sides, where the model does not take that many tokens.
LENGTH = 64


class Logits(nn.Module):
    """A model from its main input to its logits: one tensor each, which every runtime knows."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if model.config.modality == "text" else {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(**{self.model.main_input_name: inputs}, **self.options).logits


def write_onnx(model: Logits, inputs: Tensor, path: Path) -> None:
    # It warns of operators of torchvision, which no model here has.
    getLogger("torch.onnx").setLevel(ERROR)
    names = {"input_names": [model.model.main_input_name], "output_names": ["logits"]}
    shapes = (dynamic_sizes(inputs),)
    # Weights of more than 2 GB go to another file all the same.
    torch.onnx.export(
        model, (inputs,), path, dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False, **names
    )


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def write_exported_program(model: Logits, inputs: Tensor, path: Path) -> None:
    program = torch.export.export(model, (inputs,), dynamic_shapes=(dynamic_sizes(inputs),), strict=False)
    torch.export.save(program, path)


def read_exported_program(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def write_torchscript(model: Logits, inputs: Tensor, path: Path) -> None:
    # The script's own check is on inputs of other sizes.
    torch.jit.trace(model, (inputs,), check_trace=False).save(path)


def read_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.jit.load(path)


class Format(NamedTuple):
    """How to write and read a kind of file.

    Attributes:
        suffix: of the file.
        write: takes a model, inputs to follow through it, and the file.
        read: takes the file, and returns a function from inputs to logits.
        usage: lines of Python that compute `logits`, with places for the `file` and the `input`.
        packages: what it needs, all in the extra of the format's name.
    """

    suffix: str
    write: Callable[[Logits, Tensor, Path], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    usage: tuple[str, ...]
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format(
        ".onnx",
        write_onnx,
        read_onnx,
        (
            "import onnxruntime",
            "session = onnxruntime.InferenceSession({file!r})",
            "(logits,) = session.run(None, {{{input!r}: {input}}})",
        ),
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "exported_program": Format(
        ".pt2",
        write_exported_program,
        read_exported_program,
        ("import torch", "logits = torch.export.load({file!r}).module()({input})"),
    ),
    "torchscript": Format(
        ".pt", write_torchscript, read_torchscript, ("import torch", "logits = torch.jit.load({file!r})({input})")
    ),
}


def require_packages(name: str) -> None:
    """Raises an `ImportError` that names the extra of a format, if something of it is missing."""
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"`format` {name!r} needs {', '.join(missing)}, of the extra {name}: pip install '.[{name}]'"
        )


def dynamic_sizes(inputs: Tensor) -> dict[int, Dim]:
    """The batch size, and the length of texts, `[batch, length]`."""
    return {0: Dim.DYNAMIC} if inputs.ndim > 2 else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def make_inputs(config: TranslutionConfig) -> list[Tensor]:
    """Three random inputs of different sizes, float32 `[batch, channels, height, width]` or int64 `[batch, length]`.

    The first is to export with: its sizes are at least 2, as `torch.export` takes a size of 1 for a constant.

    Raises:
        ValueError: if there are too few positions for three lengths.
    """
    generator = torch.Generator().manual_seed(0)
    batches = (2, 3, 1)
    if config.modality == "image":
        sizes = (config.num_channels, *config.image_height_width)
        return [torch.randn(batch, *sizes, generator=generator) for batch in batches]
    longest = longest_tried(config)
    if longest < 3:
        raise ValueError(f"`max_position_embeddings` must be at least 3, got {config.max_position_embeddings}.")
    middle = max(2, longest // 2)
    lengths = (middle, max(1, middle // 4), longest)
    return [
        torch.randint(config.vocab_size, (batch, length), generator=generator)
        for batch, length in zip(batches, lengths, strict=True)
    ]


def longest_tried(config: TranslutionConfig) -> int:
    """Tokens of the longest text of the checks: more than twice the largest distance, so that there are pairs beyond it."""
    length = LENGTH + 2 * (config.max_relative_distance or 0)
    return length if config.longest_text is None else min(config.longest_text, length)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Of logits of one shape, relative to the largest; NaN if one of them is."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def compare(
    model: Logits, run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]
) -> tuple[float, tuple[float, float]]:
    """The largest error of `run` on several inputs, and the median milliseconds of both on the last of them."""
    error = torch.tensor([largest_error(run(each), model(each)) for each in inputs]).max().item()
    runs = {"model": lambda: model(inputs[-1]), "file": lambda: run(inputs[-1])}
    times = time_in_turn(runs, dict.fromkeys(runs, REPEATS))
    return error, (spread(times["model"])["median_ms"], spread(times["file"])["median_ms"])


@torch.no_grad()
def export(model: PreTrainedModel, name: str, output: Path) -> tuple[float, tuple[float, float]]:
    """Writes a model to a file, which is whole and checked, or as it was before.

    Args:
        model: float32, on the CPU.
        name: one of `FORMATS`.
        output: the file. Weights of ONNX beyond 2 GB are written beside it.

    Returns:
        The largest error of a logit relative to the largest logit, and the median milliseconds that the model and the file
        take for a batch of one.

    Raises:
        ValueError: if the error is larger than `BOUND`.
    """
    logits = Logits(model.requires_grad_(False)).eval()
    traced, *others = make_inputs(model.config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        # Of the same name, by which a file of ONNX finds its weights.
        path = Path(folder) / output.name
        with warnings.catch_warnings():
            # What a trace keeps of its input's sizes is found below.
            warnings.simplefilter("ignore")
            FORMATS[name].write(logits, traced, path)
            error, times = compare(logits, FORMATS[name].read(path), others)
        if not error <= BOUND:
            raise ValueError(
                f"{output} is not written: its logits must be within {BOUND:.0e} of the model's, relative to the largest, "
                f"got {error:.1e}."
            )
        # The file itself last, once what it needs is there.
        for written in sorted(Path(folder).iterdir(), key=lambda each: each == path):
            written.replace(output.with_name(written.name))
    return error, times


def describe_input(config: TranslutionConfig) -> str:
    if config.modality == "text":
        most = "of any length" if config.longest_text is None else f"of at most {config.longest_text} tokens"
        return f"int64 [batch, length], {most} (tried up to {longest_tried(config)})"
    sizes = ", ".join(str(size) for size in (config.num_channels, *config.image_height_width))
    return f"float32 [batch, {sizes}], as the image processor makes them"


def main(arguments: Sequence[str]):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    suffixes = ", ".join(f"{one.suffix} ({name})" for name, one in FORMATS.items())
    parser.add_argument(
        "--output", type=Path, help=f"file to write or replace, by default the model's name and {suffixes}"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    suffix = FORMATS[options.format].suffix
    require(options, "output", lambda path: path.suffix == suffix and not path.is_dir(), f"a file named …{suffix}")
    require_packages(options.format)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model(options.model, options.revision, dtype=torch.float32)
    output = options.output or Path(Path(options.model).resolve().name + suffix)
    error, (model_time, file_time) = export(model, options.format, output)
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, logits within {error:.1e} of the model's (allowed {BOUND:.0e})"
    )
    if options.format == "onnx" and getattr(model, "is_quantized", False):
        print(
            "the weights of 8 bits are float32 in this file, which is as large as that of the model before they were rounded"
        )
    print(f"batch of one: {model_time:.2f} ms by the model, {file_time:.2f} ms by the file")
    name = model.main_input_name
    print(f"to run it, with `{name}` of {describe_input(model.config)}:")
    if model.config.modality == "text":
        print("it takes no mask: give texts of one length, or pad them on the right and leave out the logits there")
    for line in FORMATS[options.format].usage:
        print("    " + line.format(file=str(output), input=name))


if __name__ == "__main__":
    run_command(main)

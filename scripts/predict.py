"""Predictions of a saved model: classes of pictures, or continuations of texts.

    python scripts/predict.py runs/digits picture.png another.jpg
    python scripts/predict.py runs/digits pictures --csv classes.csv
    python scripts/predict.py runs/stdlib "def main("
    echo "import os" | python scripts/predict.py user/name -

The model is a folder, or a name on the Hub. Of a folder all pictures in it and below it are classified. `--json` and
`--csv` write rows instead of printing: for pictures file, label and probability, a row for each class; for texts prompt
and continuation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.canvas import Canvas
from common.command import ArgumentParser, run_command
from common.pictures import FORMATS, PICTURE_ENDINGS, open_picture, pictures_below, read_picture
from common.saved_files import as_json, write_whole
from common.saved_models import PREPROCESSORS, damage, load_model, require_preprocessor
from common.tables import as_csv
from PIL import Image, UnidentifiedImageError
from transformers import Pipeline, PreTrainedModel, pipeline, set_seed
from transformers.utils import logging


# Of the pipeline.
TASKS = {"image": "image-classification", "text": "text-generation"}
# Columns of the rows, by the task.
FIELDS = {"image-classification": ("file", "label", "probability"), "text-generation": ("prompt", "continuation")}


def load(name: str, revision: str | None = None) -> Pipeline:
    """The pipeline of a saved model, with its own processor or tokenizer.

    Raises:
        OSError: if there is no such model, or its processor or tokenizer is missing.
        ValueError: if it is no Translution model with a head, its config or what makes its inputs is damaged, or its weights are
            not those of its config.
    """
    return with_preprocessor(load_model(name, revision), name, revision)


def with_preprocessor(model: PreTrainedModel, name: str, revision: str | None = None) -> Pipeline:
    """The pipeline of a model that is loaded, and of the processor or tokenizer that is saved with it; errors as `load`."""
    modality = model.config.modality
    require_preprocessor(name, modality, revision)
    preprocessor, _ = PREPROCESSORS[modality]
    with damage(f"the {preprocessor} of {name}"):
        return pipeline(TASKS[modality], model, revision=revision, **{preprocessor.replace(" ", "_"): name})


def classify(
    classifier: Pipeline, pictures: Sequence[str], top_k: int, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """For each picture a row for each of its most likely classes, best first, with `FIELDS`.

    A model that was trained on a canvas sees the picture on it, where an evaluation places it.

    Raises:
        FileNotFoundError: if a picture is missing.
        ValueError: if a file is no picture, or it is larger than the canvas.
    """
    canvas = Canvas.of(classifier.image_processor)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        found = classifier([load_picture(path, canvas) for path in batch], top_k=top_k, batch_size=batch_size)
        for path, classes in zip(batch, found, strict=True):
            # The name of a file need not be UTF-8, which everything here is written in.
            name = path.encode(errors="backslashreplace").decode()
            yield [{"file": name, "label": one["label"], "probability": one["score"]} for one in classes]


def expand(inputs: Sequence[str]) -> list[str]:
    """Pictures, and instead of each folder those in it and below it.

    Raises:
        ValueError: if there is none in a folder.
    """
    pictures = []
    for path in inputs:
        found = list(map(str, pictures_below(Path(path)))) if os.path.isdir(path) else [path]
        if not found:
            raise ValueError(f"a folder must hold pictures, {', '.join(PICTURE_ENDINGS)}; there is none in {path!r}")
        pictures += found
    return pictures


def load_picture(path: str, canvas: Canvas | None = None) -> Image.Image:
    """The picture of a file, or of standard input for `-`, on a canvas if there is one; errors as `classify`."""
    try:
        picture = read_picture(sys.stdin.buffer if path == "-" else path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no picture {path!r}; the model classifies pictures, and is not asked in words"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path!r} is no picture of the formats {', '.join(FORMATS)}") from None
    # A damaged file, of which Pillow raises whatever its decoders do.
    except Exception as error:
        raise ValueError(f"the picture {path!r} cannot be read: {error}") from error
    try:
        return picture if canvas is None else canvas.place(picture)
    except ValueError as error:
        raise ValueError(f"the picture {path!r} cannot be used: {error}") from error


def is_picture(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with open_picture(path):
            return True
    except OSError:
        return False


def read_prompt(prompt: str) -> str:
    """A prompt, or standard input for `-`.

    Raises:
        ValueError: if it is the name of a picture, or no text in UTF-8.
    """
    if is_picture(prompt):
        raise ValueError(f"{prompt!r} is a picture; the model goes on with text, and sees nothing")
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        name = "standard input" if prompt == "-" else "a prompt"
        raise ValueError(f"{name} must be text in UTF-8: {error}") from None
    return text


def go_on(generator: Pipeline, prompts: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """For each prompt a row with `FIELDS`; errors as `read_prompt`."""
    if options.seed is not None:
        set_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
    for prompt in prompts:
        text = read_prompt(prompt)
        (result,) = generator(
            text,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            return_full_text=False,
            **sampling,
        )
        yield {"prompt": text, "continuation": result["generated_text"]}


def check_outputs(options: argparse.Namespace, inputs: Sequence[str], names: tuple[str, str] = ("json", "csv")):
    """Refuses what cannot be written, before the work is done.

    Args:
        options: have the outputs, or None for what is not asked for.
        inputs: files, folders of pictures, and texts.
        names: of both outputs.

    Raises:
        ValueError: if an output is no file, its folder is missing, or it is that of the other or an input.
    """
    first, second = (getattr(options, name) for name in names)
    for name, target in zip(names, (first, second), strict=True):
        if target not in (None, "-"):
            path = Path(target)
            if path.exists() and not path.is_file():
                raise ValueError(f"`{name}` must be a file, or - for standard output, got {target}")
            if not path.parent.is_dir():
                raise ValueError(f"`{name}` must be in a folder that is there, got {target}")
            if path.exists() and any(map(path.samefile, files_of(inputs))):
                raise ValueError(
                    f"`{name}` must be another file than the inputs, which it would replace, got {target}"
                )
    if first is not None and first == second:
        raise ValueError(f"`{names[0]}` and `{names[1]}` must be two outputs, got {first} for both")


def files_of(inputs: Sequence[str]) -> Iterator[Path]:
    """The files among inputs, and the pictures in folders among them."""
    for one in inputs:
        if os.path.isdir(one):
            yield from pictures_below(Path(one))
        elif os.path.isfile(one):
            yield Path(one)


def write(options: argparse.Namespace, fields: Sequence[str], rows: list[dict[str, Any]]):
    """Writes the rows as JSON and as CSV, where they are asked for."""
    for target, text in ((options.json, as_json(rows)), (options.csv, as_csv(fields, rows))):
        if target == "-":
            sys.stdout.write(text)
        elif target is not None:
            write_whole(Path(target), text.encode())


def main(arguments: Sequence[str]):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", help="pictures, folders of pictures, or prompts; - is standard input")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--top_k", type=int, default=5, help="number of classes to show")
    parser.add_argument("--batch_size", type=int, default=16, help="number of pictures to classify at a time")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="number of tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy decoding")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass for nucleus sampling")
    parser.add_argument("--seed", type=int, help="seed for sampling")
    parser.add_argument("--json", help="file to write the rows to as JSON; - is standard output")
    parser.add_argument("--csv", help="file to write the rows to as CSV; - is standard output")
    options = parser.parse_args(arguments)
    for name, least in (("top_k", 1), ("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if getattr(options, name) < least:
            parser.error(f"`{name}` must be at least {least}, got {getattr(options, name)}")
    if not 0 < options.top_p <= 1:
        parser.error(f"`top_p` must be greater than 0 and at most 1, got {options.top_p}")
    check_outputs(options, options.inputs)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(options.model, options.revision)
    prints, rows = options.json is None and options.csv is None, []
    if model.task == "text-generation":
        for row in go_on(model, options.inputs, options):
            rows.append(row)
            if prints:
                print(row["prompt"] + row["continuation"])
    else:
        for classes in classify(model, expand(options.inputs), options.top_k, options.batch_size):
            rows += classes
            if prints:
                print(classes[0]["file"])
                for row in classes:
                    print(f"  {row['probability']:7.2%}  {row['label']}")
    write(options, FIELDS[model.task], rows)


if __name__ == "__main__":
    run_command(main)

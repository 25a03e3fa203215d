"""Predictions of a saved model: classes of pictures, or continuations of texts.

    python scripts/predict.py runs/digits picture.png another.jpg
    python scripts/predict.py runs/stdlib "def main("
    echo "import os" | python scripts/predict.py user/name -

The model is a folder, or a name on the Hub.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from common.command import ArgumentParser, run_command
from common.pictures import FORMATS, open_picture, read_picture
from common.saved_models import damage, load_model
from PIL import UnidentifiedImageError
from transformers import Pipeline, pipeline, set_seed
from transformers.utils import logging


# Task of the pipeline, and preprocessor.
TASKS = {"image": ("image-classification", "image_processor"), "text": ("text-generation", "tokenizer")}


def load(name: str, revision: str | None = None) -> Pipeline:
    """The pipeline of a saved model, with its own processor or tokenizer.

    Raises:
        OSError: if there is no such model, or its processor or tokenizer is missing.
        ValueError: if it is no Translution model with a head, its config or what makes its inputs is damaged, or its weights are
            not those of its config.
    """
    model = load_model(name, revision)
    task, preprocessor = TASKS[model.config.modality]
    with damage(f"the {preprocessor.replace('_', ' ')} of {name}"):
        return pipeline(task, model, revision=revision, **{preprocessor: name})


def classify(classifier: Pipeline, pictures: Sequence[str], top_k: int) -> Iterator[tuple[str, list[dict]]]:
    """Each picture with its most likely classes and their probabilities.

    Raises:
        FileNotFoundError: if a picture is missing.
        ValueError: if a file is no picture.
    """
    for path in pictures:
        try:
            picture = read_picture(sys.stdin.buffer if path == "-" else path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no picture {path!r}; the model classifies pictures, and is not asked in words"
            ) from None
        except UnidentifiedImageError:
            raise ValueError(f"{path!r} is no picture of the formats {', '.join(FORMATS)}") from None
        # A folder, or a damaged file, of which Pillow raises whatever its decoders do.
        except Exception as error:
            raise ValueError(f"the picture {path!r} cannot be read: {error}") from error
        yield path, classifier(picture, top_k=top_k)


def is_picture(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with open_picture(path):
            return True
    except OSError:
        return False


def read_prompt(prompt: str) -> str:
    """A prompt, or standard input for `-`. Text that is not UTF-8 is refused."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        name = "standard input" if prompt == "-" else "a prompt"
        raise ValueError(f"{name} must be text in UTF-8: {error}") from None
    return text


def go_on(generator: Pipeline, prompts: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """Each prompt with the model's continuation.

    Raises:
        ValueError: if a prompt is the name of a picture, or no text in UTF-8.
    """
    if options.seed is not None:
        set_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
    for prompt in prompts:
        if is_picture(prompt):
            raise ValueError(f"{prompt!r} is a picture; the model goes on with text, and sees nothing")
        (result,) = generator(
            read_prompt(prompt), max_new_tokens=options.max_new_tokens, do_sample=options.temperature > 0, **sampling
        )
        yield result["generated_text"]


def main(arguments: Sequence[str]):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", help="pictures or prompts; - is standard input")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--top_k", type=int, default=5, help="number of classes to show")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="number of tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy decoding")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass for nucleus sampling")
    parser.add_argument("--seed", type=int, help="seed for sampling")
    options = parser.parse_args(arguments)
    for name, least in (("top_k", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if getattr(options, name) < least:
            parser.error(f"`{name}` must be at least {least}, got {getattr(options, name)}")
    if not 0 < options.top_p <= 1:
        parser.error(f"`top_p` must be greater than 0 and at most 1, got {options.top_p}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(options.model, options.revision)
    if model.task == "text-generation":
        for text in go_on(model, options.inputs, options):
            print(text)
        return
    for path, classes in classify(model, options.inputs, options.top_k):
        print(path)
        for one in classes:
            print(f"  {one['score']:7.2%}  {one['label']}")


if __name__ == "__main__":
    run_command(main)

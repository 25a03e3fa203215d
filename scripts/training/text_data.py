"""Loads text to train on and to evaluate on: from the Hub, from files, or Python's standard library."""

from __future__ import annotations

import glob
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict

from training import loading
from training.data_arguments import STANDARD_LIBRARY, TextDataArguments
from training.standard_library import read_texts, split_files, standard_library_files
from training.text_files import require_texts


# Builders of `datasets` by file name extension.
TEXT_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# Allowed types of a text column.
TEXTS = (datasets.Value("string"), datasets.Value("large_string"), datasets.Value("null"))
# Rows of each file of a stream that are checked before training.
STREAM_ROWS = 100


def standard_library_dataset() -> DatasetDict:
    """The text of Python's standard library, one document a module."""
    names = ("train", "test")
    parts = zip(names, split_files(standard_library_files()), strict=True)
    return DatasetDict({name: Dataset.from_dict({"text": list(read_texts(files))}) for name, files in parts})


def load_texts(
    args: TextDataArguments, evaluates: bool, trains: bool = True
) -> tuple[loading.AnyDataset | None, loading.AnyDataset | None]:
    """Documents with the column `text`: to train on, None without `trains`, and to evaluate on.

    The second is None where there is no evaluation, and where one document is all there is.

    Raises:
        FileNotFoundError: for a file or folder that is not there.
        ValueError: if there are no data, no text, no such split or column, or a file that is damaged, not in UTF-8 or has
            something else than text in its column. What is wrong with the later rows of a stream is found where they are read.
    """
    choices = ("train_dir", "train_file") if trains else ("validation_dir", "validation_file")
    loading.require_one(args, ("dataset_name", *choices))
    if args.dataset_name is None:
        sources = {
            "train": args.train_file or (_texts(args.train_dir, "train_dir") if args.train_dir else None),
            "validation": args.validation_file
            or (_texts(args.validation_dir, "validation_dir") if args.validation_dir else None),
        }
        sources = {split: files for split, files in sources.items() if files}
        builder = _text_builder(sources)
        options = _builder_options(builder, args)
        data_files = {split: [glob.escape(name) for name in files] for split, files in sources.items()}
        files = list(chain.from_iterable(sources.values()))
        if args.streaming or builder == "csv":
            # Errors in later rows of a stream are raised when they are read. Of CSV, fields that are too many, where a text has
            # a comma and no quotes, are dropped without an error.
            require_texts(files, builder, args.text_column, rows=STREAM_ROWS if args.streaming else None)
        try:
            splits = loading.load_splits(builder, args, data_files=data_files, **options)
        # `StopIteration`: `datasets` infers columns from the first row, and a file may be empty.
        except (ValueError, StopIteration) as error:
            require_texts(files, builder, args.text_column)
            raise ValueError(f"{', '.join(files)} cannot be read: {error}") from error
        if builder != "text" and not args.streaming and not all(_holds_text(data, args) for data in splits.values()):
            require_texts(files, builder, args.text_column)
    elif args.dataset_name == STANDARD_LIBRARY:
        splits = loading.as_streams(standard_library_dataset(), args)
    else:
        splits = loading.load_from_hub(args)
    train, evaluation = loading.choose_splits(splits, args, evaluates, trains)
    pair = []
    for data in (train, evaluation):
        if data is not None:
            loading.find_column(data, args.text_column, "text_column", datasets.Value, ())
            kind = (data.features or {}).get(args.text_column, TEXTS[0])
            if kind not in TEXTS:
                raise ValueError(f"`text_column` must be a column of text, got {kind} in {args.text_column!r}.")
            data = data.select_columns(args.text_column)
            data = data if args.text_column == "text" else data.rename_column(args.text_column, "text")
        pair.append(data)
    train, evaluation = pair
    if evaluation is None and evaluates and (args.streaming or len(train) > 1):
        train, evaluation = loading.hold_out(train, args)
    return loading.first_samples(train, evaluation, args)


def _builder_options(builder: str, args: TextDataArguments) -> dict[str, Any]:
    """What a builder of `datasets` is told beside the files."""
    if builder == "text":
        return {"sample_by": args.sample_by}
    if builder == "csv":
        # Of the text column alone, as it is: "NA" and "5" are text as well.
        features = datasets.Features({args.text_column: datasets.Value("string")})
        return {"usecols": [args.text_column], "features": features, "keep_default_na": False}
    return {}


def _holds_text(data: Dataset, args: TextDataArguments) -> bool:
    """Whether there is a text in every row. JSON that leaves it out becomes null, and what is not in UTF-8 stays as it is."""
    if data.features.get(args.text_column) not in TEXTS:
        return False
    texts = data.data.column(args.text_column)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return texts.null_count == 0


def _texts(folder: str, option: str) -> list[str]:
    paths = (path for path in loading.require_folder(folder, option).rglob("*") if path.is_file())
    files = sorted(str(path) for path in paths if path.suffix.lower() in TEXT_BUILDERS)
    if not files:
        raise ValueError(f"`{option}` must hold text, {', '.join(TEXT_BUILDERS)}; there is none in {folder}.")
    return files


def _text_builder(sources: dict[str, list[str]]) -> str:
    """The builder that reads all files."""
    builders = {}
    for split, files in sources.items():
        for name in files:
            path = Path(name)
            if not path.is_file():
                raise FileNotFoundError(f"`{split}_file` must name files, there is no {name}.")
            if path.suffix.lower() not in TEXT_BUILDERS:
                raise ValueError(f"`{split}_file` must end in one of {', '.join(TEXT_BUILDERS)}, got {name}.")
            builders[TEXT_BUILDERS[path.suffix.lower()]] = name
    if len(builders) > 1:
        raise ValueError(
            f"The files must be of one kind, text, JSON, CSV or Parquet, got {', '.join(builders.values())}."
        )
    return next(iter(builders))

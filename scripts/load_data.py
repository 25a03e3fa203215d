"""Data sets for training: from the Hub, from a folder of pictures, from text files, or the two that come along.

Everything here is a `datasets` data set, with a split to train on and, where there is one, a split to evaluate on.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from data import SPLIT_SEED, DigitCanvases, digits_split, read_texts, split_files, standard_library_files
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetsError
from pictures import PICTURE_ENDINGS
from text_files import require_texts
from torch.utils.data import get_worker_info


DIGITS, STANDARD_LIBRARY = "digits", "stdlib"
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
# Ending of a file, and the builder of `datasets` that reads it.
TEXT_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
# What a column of text may be.
TEXTS = (datasets.Value("string"), datasets.Value("large_string"), datasets.Value("null"))
# Rows at the beginning of each file of a stream that are looked at before training.
STREAM_ROWS = 100
SAMPLE_BY = ("document", "paragraph", "line")

AnyDataset = Dataset | IterableDataset


@dataclass
class DataArguments:
    """Where the data come from."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Name on the Hub, or of a data set that comes along."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs `max_steps`."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Samples of a stream that are shuffled at a time."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of the data to train on."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of the data to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": f"Split to evaluate on; if not given, the first of {', '.join(EVALUATION_SPLITS)}."},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share that is held out, always the same one, where the data have one split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first ones."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first ones."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data are kept."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` must be at least 0 and less than 1, got {self.validation_share}.")
        for name in ("shuffle_buffer", "max_train_samples", "max_eval_samples", "num_proc"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {getattr(self, name)}.")


@dataclass
class ImageDataArguments(DataArguments):
    """Pictures: `dataset_name` (a name on the Hub, or "digits"), or `train_dir` with one folder of pictures for each class."""

    image_column: str | None = field(default=None, metadata={"help": "Column of the pictures; found if there is one."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes; found if there is one."})


@dataclass
class TextDataArguments(DataArguments):
    """Text: `dataset_name` (a name on the Hub, or "stdlib"), `train_file`, or `train_dir`."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text, JSON lines or Parquet files to train on.", "nargs": "+"}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same, to evaluate on.", "nargs": "+"}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    sample_by: str = field(
        default="document", metadata={"help": "What a text file consists of: one document, paragraphs, or lines."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_by not in SAMPLE_BY:
            raise ValueError(f"`sample_by` must be one of {', '.join(SAMPLE_BY)}, got {self.sample_by!r}.")


def digits_dataset(placement: str = "static") -> DatasetDict:
    """Scikit-learn's digits on a canvas, see `DigitCanvases`, as `image` and `label`.

    Random places are drawn once: a training that wants new ones for each epoch asks for an augmentation.
    """
    features = datasets.Features(
        {"image": datasets.Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    splits = {}
    for seed, (name, digits) in enumerate(zip(("train", "test"), digits_split(), strict=True)):
        canvases = DigitCanvases(digits, placement, seed)
        columns = {"image": canvases.pictures(), "label": digits.labels.tolist()}
        splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def standard_library_dataset() -> DatasetDict:
    """The text of Python's standard library, one document a module."""
    names = ("train", "test")
    parts = zip(names, split_files(standard_library_files()), strict=True)
    return DatasetDict({name: Dataset.from_dict({"text": list(read_texts(files))}) for name, files in parts})


def endless(data: Any) -> Iterator[Any]:
    """A stream's epochs one after the other, each shuffled anew.

    So the position in the stream, which a resumed run skips to, says everything. A loading process whose part is empty, as
    there are fewer files than processes, gives nothing.

    Raises:
        ValueError: if the stream is empty.
    """
    epoch, count = 0, 0
    while True:
        data.set_epoch(epoch)
        for row in data:
            count += 1
            yield row
        if count == 0:
            _require_other_parts(data)
            return
        epoch += 1


def _require_other_parts(data: Any):
    """Makes sure that a stream of which this process sees nothing has rows for another one."""
    worker = get_worker_info()
    if worker is not None:
        # One process looks for all; a single part is always the first one's.
        parts = data.num_shards if worker.id == 0 else 0
        if worker.id > 0 or any(True for index in range(parts) for _ in data.shard(parts, index)):
            return
    raise ValueError("The stream to train on is empty.")


def load_images(args: ImageDataArguments, evaluates: bool) -> tuple[AnyDataset, AnyDataset | None]:
    """Pictures with the columns `image` and `label`, a `ClassLabel`: to train on, and to evaluate on.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: if there are no data, no pictures, no such split or column, fewer than two classes, or pictures that are
            not in the folder of a class.
    """
    if args.dataset_name is None:
        _require_one(args, ("dataset_name", "train_dir"))
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        data_files = {split: _pictures(folder, split) for split, folder in folders.items() if folder is not None}
        # A folder with a single class would otherwise lose its label, and with it the error below.
        drop_labels = None if _has_metadata(folders.values()) else False
        splits = _load("imagefolder", args, data_files=data_files, drop_labels=drop_labels)
    elif args.dataset_name == DIGITS:
        _require_one(args, ("dataset_name", "train_dir"))
        splits = _streamed(digits_dataset(args.dataset_config_name or "static"), args)
    else:
        _require_one(args, ("dataset_name", "train_dir"))
        splits = _load(args.dataset_name, args, name=args.dataset_config_name, revision=args.dataset_revision)
    train, evaluation = _choose(splits, args, evaluates)
    image = _column(train, args.image_column, "image_column", datasets.Image, ("image", "img"))
    label = _column(train, args.label_column, "label_column", ClassLabel, ("label", "labels", "fine_label"))
    pair = [None if data is None else _as_image_and_label(data, image, label) for data in (train, evaluation)]
    train, evaluation = _with_class_names(*pair, label)
    names = train.features["label"].names
    if len(names) < 2:
        raise ValueError(f"`{label}` must have at least 2 classes, got {names}.")
    if evaluation is None and evaluates:
        train, evaluation = _hold_out(train, args, stratify_by_column="label")
    return _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples)


def load_texts(args: TextDataArguments, evaluates: bool) -> tuple[AnyDataset, AnyDataset | None]:
    """Documents with the column `text`: to train on, and to evaluate on.

    The second is None where there is no evaluation, and where one document is all there is.

    Raises:
        FileNotFoundError: for a file or folder that is not there.
        ValueError: if there are no data, no text, no such split or column, or a file that is damaged, not in UTF-8 or has
            something else than text in its column. What is wrong with the later rows of a stream is found where they are read.
    """
    choices = ("dataset_name", "train_dir", "train_file")
    _require_one(args, choices)
    if args.dataset_name is None:
        sources = {
            "train": args.train_file or _texts(args.train_dir, "train_dir"),
            "validation": args.validation_file
            or (_texts(args.validation_dir, "validation_dir") if args.validation_dir else None),
        }
        sources = {split: files for split, files in sources.items() if files}
        builder = _text_builder(sources)
        options = {"sample_by": args.sample_by} if builder == "text" else {}
        data_files = {split: [glob.escape(name) for name in files] for split, files in sources.items()}
        files = list(chain.from_iterable(sources.values()))
        if args.streaming:
            # What comes later is found where it is read.
            require_texts(files, builder, args.text_column, rows=STREAM_ROWS)
        try:
            splits = _load(builder, args, data_files=data_files, **options)
        # An empty file ends the search for columns.
        except (ValueError, StopIteration) as error:
            require_texts(files, builder, args.text_column)
            raise ValueError(f"{', '.join(files)} cannot be read: {error}") from error
        if builder != "text" and not args.streaming and not all(_holds_text(data, args) for data in splits.values()):
            require_texts(files, builder, args.text_column)
    elif args.dataset_name == STANDARD_LIBRARY:
        splits = _streamed(standard_library_dataset(), args)
    else:
        splits = _load(args.dataset_name, args, name=args.dataset_config_name, revision=args.dataset_revision)
    train, evaluation = _choose(splits, args, evaluates)
    pair = []
    for data in (train, evaluation):
        if data is not None:
            _column(data, args.text_column, "text_column", datasets.Value, ())
            kind = (data.features or {}).get(args.text_column, TEXTS[0])
            if kind not in TEXTS:
                raise ValueError(f"`text_column` must be a column of text, got {kind} in {args.text_column!r}.")
            data = data.select_columns(args.text_column)
            data = data if args.text_column == "text" else data.rename_column(args.text_column, "text")
        pair.append(data)
    train, evaluation = pair
    if evaluation is None and evaluates and (args.streaming or len(train) > 1):
        train, evaluation = _hold_out(train, args)
    return _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples)


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


def _require_one(args: DataArguments, choices: tuple[str, ...]):
    given = [name for name in choices if getattr(args, name)]
    if len(given) != 1:
        raise ValueError(
            f"Exactly one of {', '.join(f'`{name}`' for name in choices)} must be given, got {', '.join(given) or 'none'}."
        )


def _folder(folder: str, option: str) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`{option}` must be a folder, got {folder}.")
    return Path(folder)


def _pictures(folder: str, split: str) -> list[str]:
    option = f"{split}_dir"
    files = (path for path in _folder(folder, option).rglob("*") if path.is_file())
    pictures = [path.relative_to(folder) for path in files if path.suffix.lower() in PICTURE_ENDINGS]
    if not pictures:
        raise ValueError(f"`{option}` must hold pictures, {', '.join(PICTURE_ENDINGS)}; there is none in {folder}.")
    if not _has_metadata([folder]):
        for path in sorted(pictures):
            # `datasets` takes the name of the innermost folder for the class. It passes over hidden files and `__MACOSX`.
            hidden = path.name.startswith(".") or any(part.startswith((".", "__")) for part in path.parts[:-1])
            if len(path.parts) != 2 and not hidden:
                raise ValueError(
                    f"`{option}` must have one folder for each class, and its pictures right in it, got {Path(folder) / path}."
                )
    # The pattern keeps `datasets` from reading splits out of the classes' names.
    return [f"{glob.escape(str(Path(folder)))}/**"]


def _has_metadata(folders: Iterable[str | None]) -> bool:
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    return any(path.name in names for folder in folders if folder for path in Path(folder).rglob("metadata.*"))


def _texts(folder: str, option: str) -> list[str]:
    paths = (path for path in _folder(folder, option).rglob("*") if path.is_file())
    files = sorted(str(path) for path in paths if path.suffix.lower() in TEXT_BUILDERS)
    if not files:
        raise ValueError(f"`{option}` must hold text, {', '.join(TEXT_BUILDERS)}; there is none in {folder}.")
    return files


def _text_builder(sources: dict[str, list[str]]) -> str:
    """The one builder that reads all files."""
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
        raise ValueError(f"The files must be of one kind, text, JSON or Parquet, got {', '.join(builders.values())}.")
    return next(iter(builders))


def _load(path: str, args: DataArguments, **options: object) -> DatasetDict | IterableDatasetDict:
    try:
        return datasets.load_dataset(
            path,
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            num_proc=None if args.streaming else args.num_proc,
            **{name: value for name, value in options.items() if value is not None},
        )
    except OSError:
        raise
    except DatasetsError as error:
        # It says that something went wrong, and its cause says what.
        raise ValueError(f"The data cannot be read: {error.__cause__ or error}") from error


def _streamed(splits: DatasetDict, args: DataArguments) -> DatasetDict | IterableDatasetDict:
    if not args.streaming:
        return splits
    return IterableDatasetDict({name: data.to_iterable_dataset() for name, data in splits.items()})


def _choose(
    splits: DatasetDict | IterableDatasetDict, args: DataArguments, evaluates: bool
) -> tuple[AnyDataset, AnyDataset | None]:
    for option in ("train_split", "validation_split"):
        name = getattr(args, option)
        if name is not None and name not in splits:
            raise ValueError(f"`{option}` must be one of {', '.join(splits)}, got {name!r}.")
    if not evaluates:
        return splits[args.train_split], None
    if args.validation_split is None:
        others = [name for name in EVALUATION_SPLITS if name in splits and name != args.train_split]
        args.validation_split = others[0] if others else None
    return splits[args.train_split], splits[args.validation_split] if args.validation_split else None


def _column(data: AnyDataset, name: str | None, option: str, kind: type, usual: tuple[str, ...]) -> str:
    columns = data.features or {}
    if name is None:
        of_kind = [column for column, feature in columns.items() if isinstance(feature, kind)]
        found = [column for column in usual if column in columns]
        name = of_kind[0] if len(of_kind) == 1 else (found or [None])[0]
    if name is None or (columns and name not in columns):
        raise ValueError(f"`{option}` must be one of the columns {', '.join(columns)}, got {name}.")
    return name


def _as_image_and_label(data: AnyDataset, image: str, label: str) -> AnyDataset:
    data = data.select_columns([image, label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return data.rename_columns(renamed) if renamed else data


def _with_class_names(
    train: AnyDataset, evaluation: AnyDataset | None, label: str
) -> tuple[AnyDataset, AnyDataset | None]:
    """Labels that are words or bare numbers become classes, numbered in their order."""
    if isinstance(train.features["label"], ClassLabel):
        return train, evaluation
    if isinstance(train, IterableDataset):
        raise ValueError(
            f"`label_column` must be a ClassLabel in a stream, got {train.features['label']} in {label!r}."
        )
    train = train.class_encode_column("label")
    if evaluation is not None:
        unknown = set(map(str, evaluation.unique("label"))) - set(train.features["label"].names)
        if unknown:
            raise ValueError(
                f"`{label}` must have the classes of the training split, got {', '.join(sorted(unknown))}."
            )
        feature = train.features["label"]
        evaluation = evaluation.map(lambda row: {"label": feature.str2int(str(row["label"]))}).cast_column(
            "label", feature
        )
    return train, evaluation


def _hold_out(data: AnyDataset, args: DataArguments, stratify_by_column: str | None = None) -> tuple[Dataset, Dataset]:
    if args.validation_share == 0:
        raise ValueError("`validation_share` must be more than 0 to evaluate data that have one split, got 0.")
    if isinstance(data, IterableDataset):
        raise ValueError(
            "`validation_split`, `validation_file` or `validation_dir` must be given to evaluate a stream."
        )
    if stratify_by_column is not None:
        classes = data.features[stratify_by_column].num_classes
        held_out = round(len(data) * args.validation_share)
        # Where some class would have no picture on either side, chance decides.
        counts = [data[stratify_by_column].count(label) for label in range(classes)]
        if min(counts) < 2 or min(held_out, len(data) - held_out) < classes:
            stratify_by_column = None
    parts = data.train_test_split(args.validation_share, seed=SPLIT_SEED, stratify_by_column=stratify_by_column)
    return parts["train"], parts["test"]


def _first(data: AnyDataset | None, count: int | None) -> AnyDataset | None:
    if data is None or count is None:
        return data
    return data.take(count) if isinstance(data, IterableDataset) else data.select(range(min(count, len(data))))

"""What loading images and loading text share: splits, columns, held-out samples."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetsError

from training.data_arguments import EVALUATION_SPLITS, DataArguments
from training.digits import SPLIT_SEED


AnyDataset = Dataset | IterableDataset


def require_one(args: DataArguments, choices: tuple[str, ...]):
    """Checks that the data come from one place.

    Raises:
        ValueError: if none or several of `choices` are given, or what to evaluate on has two places.
    """
    evaluated = [name for name in ("validation_dir", "validation_file") if getattr(args, name, None)]
    if len(evaluated) > 1:
        raise ValueError(
            f"At most one of `validation_dir`, `validation_file` must be given, got {', '.join(evaluated)}."
        )
    given = [name for name in choices if getattr(args, name)]
    if given == ["dataset_name"] and evaluated:
        raise ValueError(
            f"`{evaluated[0]}` must not be given beside `dataset_name` {args.dataset_name!r}, whose `validation_split` is "
            "evaluated. To evaluate a trained model on other data, give `--do_train false` and no dataset, nor a recipe with one."
        )
    if len(given) != 1:
        raise ValueError(
            f"Exactly one of {', '.join(f'`{name}`' for name in choices)} must be given, got {', '.join(given) or 'none'}."
        )


def require_folder(folder: str, option: str) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`{option}` must be a folder, got {folder}.")
    return Path(folder)


def load_splits(path: str, args: DataArguments, **options: object) -> DatasetDict | IterableDatasetDict:
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
        # Only its cause says what went wrong.
        raise ValueError(f"The data cannot be read: {error.__cause__ or error}") from error


def load_from_hub(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    return load_splits(args.dataset_name, args, name=args.dataset_config_name, revision=args.dataset_revision)


def as_streams(splits: DatasetDict, args: DataArguments) -> DatasetDict | IterableDatasetDict:
    if not args.streaming:
        return splits
    return IterableDatasetDict({name: data.to_iterable_dataset() for name, data in splits.items()})


def choose_splits(
    splits: DatasetDict | IterableDatasetDict, args: DataArguments, evaluates: bool, trains: bool
) -> tuple[AnyDataset | None, AnyDataset | None]:
    for option in ("train_split", "validation_split") if trains else ("validation_split",):
        name = getattr(args, option)
        if name is not None and name not in splits:
            raise ValueError(f"`{option}` must be one of {', '.join(splits)}, got {name!r}.")
    train = splits[args.train_split] if trains else None
    if trains and not evaluates:
        return train, None
    if args.validation_split is None:
        others = [name for name in EVALUATION_SPLITS if name in splits and name != args.train_split]
        args.validation_split = others[0] if others else None
    return train, splits[args.validation_split] if args.validation_split else None


def find_column(data: AnyDataset, name: str | None, option: str, kind: type, usual: tuple[str, ...]) -> str:
    columns = data.features or {}
    if name is None:
        of_kind = [column for column, feature in columns.items() if isinstance(feature, kind)]
        found = [column for column in usual if column in columns]
        name = of_kind[0] if len(of_kind) == 1 else (found or [None])[0]
    if name is None or (columns and name not in columns):
        raise ValueError(f"`{option}` must be one of the columns {', '.join(columns)}, got {name}.")
    return name


def hold_out(data: AnyDataset, args: DataArguments, stratify_by_column: str | None = None) -> tuple[Dataset, Dataset]:
    if args.validation_share == 0:
        raise ValueError("`validation_share` must be more than 0 to evaluate data that have one split, got 0.")
    if isinstance(data, IterableDataset):
        raise ValueError(
            "`validation_split`, `validation_file` or `validation_dir` must be given to evaluate a stream."
        )
    if stratify_by_column is not None:
        classes = data.features[stratify_by_column].num_classes
        held_out = round(len(data) * args.validation_share)
        # Not stratified if a class would be missing on one side.
        counts = [data[stratify_by_column].count(label) for label in range(classes)]
        if min(counts) < 2 or min(held_out, len(data) - held_out) < classes:
            stratify_by_column = None
    parts = data.train_test_split(args.validation_share, seed=SPLIT_SEED, stratify_by_column=stratify_by_column)
    return parts["train"], parts["test"]


def first_samples(
    train: AnyDataset | None, evaluation: AnyDataset | None, args: DataArguments
) -> tuple[AnyDataset | None, AnyDataset | None]:
    def first(data: AnyDataset | None, count: int | None) -> AnyDataset | None:
        if data is None or count is None:
            return data
        return data.take(count) if isinstance(data, IterableDataset) else data.select(range(min(count, len(data))))

    return first(train, args.max_train_samples), first(evaluation, args.max_eval_samples)

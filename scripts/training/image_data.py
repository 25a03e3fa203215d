"""Loads images to train on and to evaluate on: from the Hub, from folders, or the bundled digits."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import datasets
from common.pictures import PICTURE_ENDINGS, pictures_below
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset

from training import loading
from training.data_arguments import DIGITS, ImageDataArguments
from training.digits import DigitCanvases, digits_split


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


def load_images(
    args: ImageDataArguments, evaluates: bool, trains: bool = True
) -> tuple[loading.AnyDataset | None, loading.AnyDataset | None]:
    """Pictures with the columns `image` and `label`, a `ClassLabel`: to train on, None without `trains`, and to evaluate on.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: if there are no data, no pictures, no such split or column, fewer than two classes to train on, or pictures
            that are not in the folder of a class.
    """
    loading.require_one(args, ("dataset_name", "train_dir" if trains else "validation_dir"))
    if args.dataset_name is None:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        data_files = {split: _pictures(folder, split) for split, folder in folders.items() if folder is not None}
        # A folder with a single class would otherwise lose its label, and with it the error below.
        drop_labels = None if _has_metadata(folders.values()) else False
        splits = loading.load_splits("imagefolder", args, data_files=data_files, drop_labels=drop_labels)
    elif args.dataset_name == DIGITS:
        splits = loading.as_streams(digits_dataset(args.dataset_config_name or "static"), args)
    else:
        splits = loading.load_from_hub(args)
    train, evaluation = loading.choose_splits(splits, args, evaluates, trains)
    first = train if trains else evaluation
    image = loading.find_column(first, args.image_column, "image_column", datasets.Image, ("image", "img"))
    label = loading.find_column(
        first, args.label_column, "label_column", ClassLabel, ("label", "labels", "fine_label")
    )
    train, evaluation = (
        None if data is None else _as_image_and_label(data, image, label) for data in (train, evaluation)
    )
    if not trains:
        return loading.first_samples(None, _with_class_label(evaluation, label), args)
    train = _with_class_label(train, label)
    names = train.features["label"].names
    if evaluation is not None:
        evaluation = with_classes(_with_class_label(evaluation, label), names, "training split")
    if len(names) < 2:
        raise ValueError(f"`{label}` must have at least 2 classes, got {names}.")
    if evaluation is None and evaluates:
        train, evaluation = loading.hold_out(train, args, stratify_by_column="label")
    return loading.first_samples(train, evaluation, args)


def _pictures(folder: str, split: str) -> list[str]:
    option = f"{split}_dir"
    pictures = pictures_below(loading.require_folder(folder, option))
    if not pictures:
        raise ValueError(f"`{option}` must hold pictures, {', '.join(PICTURE_ENDINGS)}; there is none in {folder}.")
    if not _has_metadata([folder]):
        for path in pictures:
            # `datasets` takes the name of the innermost folder for the class. It passes over hidden files, too.
            if path.parent.parent != Path(folder):
                raise ValueError(
                    f"`{option}` must have one folder for each class, and its pictures right in it, got {path}."
                )
    # The pattern keeps `datasets` from reading splits out of the classes' names.
    return [f"{glob.escape(str(Path(folder)))}/**"]


def _has_metadata(folders: Iterable[str | None]) -> bool:
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    return any(path.name in names for folder in folders if folder for path in Path(folder).rglob("metadata.*"))


def _as_image_and_label(data: loading.AnyDataset, image: str, label: str) -> loading.AnyDataset:
    data = data.select_columns([image, label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return data.rename_columns(renamed) if renamed else data


def _with_class_label(data: loading.AnyDataset, label: str) -> loading.AnyDataset:
    """Encodes labels that are strings or plain integers as classes, in sorted order."""
    if isinstance(data.features["label"], ClassLabel):
        return data
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"`label_column` must be a ClassLabel in a stream, got {data.features['label']} in {label!r}."
        )
    return data.class_encode_column("label")


def with_classes(data: loading.AnyDataset, names: list[str], whose: str) -> loading.AnyDataset:
    """Pictures whose `label`, a `ClassLabel`, counts the classes as `names` does.

    Args:
        data: the pictures.
        names: all classes.
        whose: what has them, for the error.

    Raises:
        ValueError: for a class that is not among them.
    """
    own = data.features["label"].names
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise ValueError(
            f"The pictures to evaluate must have classes of the {whose}, {', '.join(names)}; got {', '.join(unknown)}."
        )
    if own == names:
        return data
    features = datasets.Features({**data.features, "label": ClassLabel(names=names)})
    places = {index: names.index(name) for index, name in enumerate(own)}
    # Of a picture without a class the label is -1, and stays so.
    return data.map(lambda label: {"label": places.get(label, label)}, input_columns="label", features=features)

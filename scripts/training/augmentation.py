"""Augmentation of pictures, without torchvision: crop, flip, RandAugment, and mixup or CutMix of a batch.

Random numbers depend only on the seed, the epoch and the sample: the number of data loading workers does not matter,
and a resumed run sees the same samples as an uninterrupted one. Legend: `N` pictures, `K` classes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from common.canvas import Canvas
from common.command import require
from common.pictures import as_rgb, read_picture
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import BaseImageProcessor

from training.streams import endless


# The usual ratios of width to height of a random crop.
CROP_RATIOS = (3 / 4, 4 / 3)
CROP_TRIES = 10


@dataclass
class AugmentationArguments:
    """Augmentation of the pictures in training; none by default."""

    crop_scale: float | None = field(
        default=None, metadata={"help": "Minimum share of the area that a random crop keeps; 0.08 is common."}
    )
    flip_probability: float = field(default=0.0, metadata={"help": "Probability of a horizontal flip; 0.5 is common."})
    rand_augment_ops: int = field(
        default=0, metadata={"help": "Number of RandAugment operations; 2 is common, 0 is none."}
    )
    rand_augment_magnitude: float = field(
        default=9.0, metadata={"help": "Magnitude of RandAugment, more than 0 and less than 30."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0.2 or 0.8 is common, 0 is none."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Alpha of CutMix; 1 is common, 0 is none."})

    def __post_init__(self):
        require(self, "crop_scale", lambda share: 0 < share <= 1, "more than 0 and at most 1")
        require(self, "flip_probability", lambda chance: 0 <= chance <= 1, "at least 0 and at most 1")
        # There are 15 operations, and none is drawn twice.
        require(self, "rand_augment_ops", lambda count: 0 <= count <= 15, "at least 0 and at most 15")
        require(self, "rand_augment_magnitude", lambda size: 0 < size < 30, "more than 0 and less than 30")
        for name in ("mixup_alpha", "cutmix_alpha"):
            require(self, name, lambda alpha: 0 <= alpha < math.inf, "at least 0 and finite")


def seed_of(*parts: object) -> int:
    """One number for several: neighbouring seeds, epochs and samples must not share what they draw."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def crop_box(width: int, height: int, least: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of a picture, at least `least` of its area."""
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(least, 1)
        ratio = math.exp(random.uniform(*map(math.log, CROP_RATIOS)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # A very long picture: all of it.
    return 0, 0, width, height


def rand_augment(picture: Image.Image, operations: int, magnitude: float, seed: int) -> Image.Image:
    """Kornia's RandAugment of an RGB picture. Its draws come from PyTorch's generator, which is left as it was."""
    # Imported here: training without it needs no Kornia.
    from kornia.augmentation.auto import RandAugment

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    before = torch.get_rng_state()
    # Not `torch.manual_seed`, which seeds the accelerator's generator too.
    torch.default_generator.manual_seed(seed)
    try:
        pixels = RandAugment(operations, magnitude)(pixels[None])[0]
    finally:
        torch.set_rng_state(before)
    return Image.fromarray(pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


class ImageTransform:
    """Turns an RGB picture into `pixel_values`, augmented if there is a seed.

    Args:
        processor: resizes, rescales and normalises.
        args: what to do in training.
        canvas: what pictures are placed on before everything else; without a seed where the picture alone says.
    """

    def __init__(self, processor: BaseImageProcessor, args: AugmentationArguments, canvas: Canvas | None = None):
        self.processor = processor
        self.args = args
        self.canvas = canvas

    def __call__(self, picture: Image.Image, seed: int | None = None) -> Tensor:
        """`[3, height, width]`, float.

        Raises:
            ValueError: if the picture is larger than the canvas.
        """
        if self.canvas is not None:
            # Other numbers than those of the augmentation.
            random = None if seed is None else np.random.default_rng(seed_of("place", seed))
            picture = self.canvas.place(picture, random)
        if seed is not None:
            picture = self.augment(picture, seed)
        return torch.as_tensor(np.asarray(self.processor(images=picture)["pixel_values"][0]))

    def augment(self, picture: Image.Image, seed: int) -> Image.Image:
        """A picture of the processor's size."""
        args, random = self.args, np.random.default_rng(seed)
        size = (self.processor.size["width"], self.processor.size["height"])
        box = None if args.crop_scale is None else crop_box(*picture.size, args.crop_scale, random)
        if box is not None or picture.size != size:
            # Kornia's crop does not smooth what it shrinks; Pillow's resize does.
            picture = picture.resize(size, self.processor.resample, box=box)
        if random.random() < args.flip_probability:
            picture = ImageOps.mirror(picture)
        if args.rand_augment_ops:
            picture = rand_augment(picture, args.rand_augment_ops, args.rand_augment_magnitude, seed)
        return picture


class ImageSamples(Dataset):
    """Model inputs of a data set with `image` and `label`; augmented if there is a seed."""

    def __init__(self, data: Any, transform: ImageTransform, seed: int | None = None):
        self.data = undecoded(data)
        self.transform = transform
        self.seed = seed
        # Shared with data loading workers, which may outlive an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int):
        """Every epoch has its own random numbers."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = None if self.seed is None else seed_of(self.seed, int(self.epoch), index)
        return sample(self.data[index], self.transform, seed)


class ImageStream(IterableDataset):
    """Model inputs of a stream; with a seed, for training, its augmented epochs follow each other without end."""

    def __init__(self, data: Any, transform: ImageTransform, seed: int | None = None):
        self.data = undecoded(data)
        self.transform = transform
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.seed is None:
            yield from (sample(row, self.transform, None) for row in self.data)
            return
        worker = get_worker_info()
        for index, row in enumerate(endless(self.data)):
            yield sample(row, self.transform, seed_of(self.seed, worker.id if worker else 0, index))


def undecoded(data: Any) -> Any:
    """Leaves decoding to `sample`, whose errors name the file."""
    if isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return data.cast_column("image", datasets.Image(decode=False))
    return data


def sample(row: dict[str, Any], transform: ImageTransform, seed: int | None) -> dict[str, Any]:
    """Model inputs of a row; its picture may have any mode.

    Raises:
        ValueError: for a picture that cannot be read or used, with its file's name.
    """
    image = row["image"]
    name = (image["path"] if isinstance(image, dict) else None) or "without a name"
    try:
        picture = read_picture(_content(image)) if isinstance(image, dict) else as_rgb(image)
    # Pillow's decoders raise errors of any kind for damaged files.
    except Exception as error:
        raise ValueError(f"The picture {name} cannot be read: {error}.") from error
    try:
        pixel_values = transform(picture, seed)
    except ValueError as error:
        raise ValueError(f"The picture {name} cannot be used: {error}") from error
    inputs = {"pixel_values": pixel_values, "labels": row["label"]}
    return inputs if seed is None else inputs | {"seed": seed}


def _content(image: dict[str, Any]) -> BytesIO:
    """The file of a picture that `datasets` has left as it is; it may be one of the Hub."""
    if image["bytes"] is not None:
        return BytesIO(image["bytes"])
    with xopen(image["path"], "rb") as file:
        return BytesIO(file.read())


class ImageBatch:
    """Collates samples, and mixes those of training by mixup or CutMix (half the batches each, where both are asked for).

    Mixup (Zhang et al. 2018) blends a batch with itself in another order, CutMix (Yun et al. 2019) pastes a rectangle. Kornia has
    both, but draws the share of mixup uniformly, not from a Beta distribution as the papers do.

    Labels are `[N]` class indices, or, mixed, the probabilities `[N, K]`.
    """

    def __init__(self, num_labels: int, args: AugmentationArguments):
        self.num_labels = num_labels
        self.args = args

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.stack([item["pixel_values"] for item in samples])
        labels = torch.tensor([item["labels"] for item in samples])
        mixes = [name for name in ("mixup", "cutmix") if getattr(self.args, f"{name}_alpha")]
        if mixes and "seed" in samples[0]:
            random = np.random.default_rng(seed_of(*(item["seed"] for item in samples)))
            mix = mixes[random.integers(len(mixes))]
            pixels, labels = getattr(self, mix)(pixels, F.one_hot(labels, self.num_labels).float(), random)
        return {"pixel_values": pixels, "labels": labels}

    def mixup(self, pixels: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        share, order = random.beta(self.args.mixup_alpha, self.args.mixup_alpha), random.permutation(len(pixels))
        return pixels * share + pixels[order] * (1 - share), labels * share + labels[order] * (1 - share)

    def cutmix(self, pixels: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        share, order = random.beta(self.args.cutmix_alpha, self.args.cutmix_alpha), random.permutation(len(pixels))
        height, width = pixels.shape[-2:]
        half_height, half_width = (side * math.sqrt(1 - share) / 2 for side in (height, width))
        row, column = random.uniform(0, height), random.uniform(0, width)
        # The middle lies anywhere in the picture, so the edge may cut the rectangle short.
        rows = slice(max(0, round(row - half_height)), min(height, round(row + half_height)))
        columns = slice(max(0, round(column - half_width)), min(width, round(column + half_width)))
        pasted = pixels.clone()
        pasted[..., rows, columns] = pixels[order][..., rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        return pasted, labels * share + labels[order] * (1 - share)

"""Scikit-learn's handwritten digits, which need no network, on a larger canvas.

Legend: `N` images.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import torch
from common.canvas import Canvas
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset


DIGIT_SIZE = 8
CANVAS_SIZE = 16
# Image pipelines convert every picture to RGB before the processor, so their models have three channels.
NUM_CHANNELS = 3
PIXEL_MEAN = PIXEL_STD = 0.5
# Of the split only: another seed for the places does not change it.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `images` `[N, 8, 8]` of bytes (0 is the background), `labels` `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Digits:
        """The first `count` digits, or all of them."""
        return Digits(self.images[:count], self.labels[:count])


@cache
def digits_split(test_share: float = 0.25) -> tuple[Digits, Digits]:
    """Digits to train on and digits held out, with the same mixture of classes; always the same ones.

    They are read once: nobody may write to them.
    """
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=test_share, random_state=SPLIT_SEED, stratify=data.target
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


class DigitCanvases(Dataset):
    """Digits on an empty 16 × 16 canvas: in the middle ("static"), or each at a random place ("dynamic").

    Places depend on `seed` and the epoch alone: `set_epoch` draws new ones, the order of access and the number of
    loading processes do not matter.

    Args:
        digits: what to place.
        placement: see `Canvas`.
        seed: of the random places.
    """

    def __init__(self, digits: Digits, placement: str, seed: int = 0):
        self.digits = digits
        self.placing = Canvas(CANVAS_SIZE, placement)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        """Draws the places of an epoch; static digits stay in the middle."""
        room, _ = self.placing.room(DIGIT_SIZE, DIGIT_SIZE)
        if self.placing.placement == "static":
            self.corners = torch.full((len(self.digits), 2), room // 2)
            return
        # Neighbouring seeds must not share epochs.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
        self.corners = torch.randint(0, room + 1, (len(self.digits), 2), generator=generator)

    def __len__(self) -> int:
        return len(self.digits)

    def canvas(self, index: int) -> Tensor:
        """`[16, 16]`, bytes."""
        top, left = self.corners[index].tolist()
        canvas = torch.zeros(CANVAS_SIZE, CANVAS_SIZE, dtype=torch.uint8)
        canvas[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = self.digits.images[index]
        return canvas

    def pictures(self) -> list[Image.Image]:
        """All canvases as greyscale pictures."""
        return [Image.fromarray(self.canvas(index).numpy()) for index in range(len(self))]

    def pixel_values(self) -> Tensor:
        """Model inputs of all canvases, `[N, 3, 16, 16]`."""
        return torch.stack([self[index]["pixel_values"] for index in range(len(self))])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # The arithmetic of an image processor, without converting to pictures and back at every step.
        pixels = (self.canvas(index).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        return {"pixel_values": pixels.expand(NUM_CHANNELS, -1, -1), "labels": self.digits.labels[index]}

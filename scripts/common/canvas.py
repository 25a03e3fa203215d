"""Pictures on a larger, empty canvas: in the middle, or each at a random place; in training, evaluation and prediction."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from common.command import require, require_least


PLACEMENTS = ("static", "dynamic")


@dataclass(frozen=True)
class Canvas:
    """An empty, black square, and where pictures lie on it.

    Args:
        canvas_size: its height and width in pixels.
        placement: "static", in the middle (half a pixel towards the top left where there is none), or "dynamic", each at a
            random place, all places where it is whole being as likely.

    Raises:
        ValueError: for a value that is not allowed.
    """

    canvas_size: int
    placement: str = PLACEMENTS[0]

    def __post_init__(self):
        require_least(self, canvas_size=1)
        require(self, "placement", lambda name: name in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}")

    @classmethod
    def of(cls, processor: BaseImageProcessor) -> Canvas | None:
        """The canvas that `keep_in` left in an image processor, if any; errors as the class."""
        size, placement = (getattr(processor, field.name, None) for field in dataclasses.fields(cls))
        return None if size is None else cls(size, PLACEMENTS[0] if placement is None else placement)

    def keep_in(self, processor: BaseImageProcessor) -> None:
        """Has an image processor take pictures of any size to the canvas, and save it.

        The processor itself, as in a pipeline of Transformers, pads a picture on all sides or cuts its middle out. The exact
        place is for those that ask for `of`.
        """
        size = {"height": self.canvas_size, "width": self.canvas_size}
        processor.size, processor.crop_size = size, dict(size)
        processor.do_resize, processor.do_center_crop = False, True
        processor.canvas_size, processor.placement = self.canvas_size, self.placement

    @classmethod
    def remove_from(cls, processor: BaseImageProcessor) -> None:
        """Has an image processor that keeps a canvas resize pictures instead."""
        if cls.of(processor) is not None:
            del processor.canvas_size, processor.placement
            processor.do_resize, processor.do_center_crop = True, False

    def room(self, width: int, height: int) -> tuple[int, int]:
        """How many columns and rows a picture of that size leaves free.

        Raises:
            ValueError: if it is larger than the canvas.
        """
        if max(width, height) > self.canvas_size:
            size = self.canvas_size
            raise ValueError(
                f"`canvas_size` must be at least the height and width of every picture, got {size} × {size} pixels for a "
                f"picture of {height} × {width}."
            )
        return self.canvas_size - width, self.canvas_size - height

    def place(self, picture: Image.Image, random: np.random.Generator | None = None) -> Image.Image:
        """A canvas with a picture on it, of the picture's mode.

        Args:
            picture: at most as large as the canvas.
            random: draws the place. Without it the place depends on the pixels alone: neither the order of pictures, nor
                how they are divided among processes, nor the seed of a training changes it.

        Raises:
            ValueError: as `room`.
        """
        room = self.room(*picture.size)
        if random is None:
            random = np.random.default_rng(zlib.crc32(picture.tobytes()))
        if self.placement == "static":
            left, top = (free // 2 for free in room)
        else:
            left, top = (int(random.integers(free + 1)) for free in room)
        canvas = Image.new(picture.mode, (self.canvas_size, self.canvas_size))
        canvas.paste(picture, (left, top))
        return canvas

"""Pictures on a larger, empty canvas: in the middle, or each at a random place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common.command import require, require_least
from PIL import Image


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

    def place(self, picture: Image.Image, random: np.random.Generator) -> Image.Image:
        """A canvas with a picture on it, of the picture's mode; `random` draws the place. Errors as `room`."""
        room = self.room(*picture.size)
        if self.placement == "static":
            left, top = (free // 2 for free in room)
        else:
            left, top = (int(random.integers(free + 1)) for free in room)
        canvas = Image.new(picture.mode, (self.canvas_size, self.canvas_size))
        canvas.paste(picture, (left, top))
        return canvas

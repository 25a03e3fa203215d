"""Pictures of every mode as RGB, alike in training and prediction."""

from __future__ import annotations

import numpy as np
from PIL import Image


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB of 8 bits.

    Grey of 16 bits is scaled: Pillow alone makes all of it white that is more than 255. Older Pillow opens it as mode `I`, of 32
    bits, and there pixels of at most 255 are taken for 8 bits, as Pillow does.

    Raises:
        ValueError: for pixels beyond 16 bits.
    """
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
        least, most = pixels.min(), pixels.max()
        if least < 0 or most > 65535:
            raise ValueError(
                f"pixels of mode {picture.mode} must be at least 0 and at most 65535, got {least} to {most}"
            )
        if picture.mode != "I" or most > 255:
            pixels = pixels >> 8
        picture = Image.fromarray(pixels.astype(np.uint8))
    return picture.convert("RGB")

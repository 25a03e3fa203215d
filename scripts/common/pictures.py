"""Reading pictures, in training and in prediction: supported formats, and conversion of every mode to RGB."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


# File name extensions by Pillow's name of a format. Pillow reads many more, some by running other programs, such as
# Ghostscript for PostScript under any file name.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
PICTURE_ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, by their endings, sorted; hidden ones and `__MACOSX` are left out."""

    def is_hidden(path: Path) -> bool:
        *folders, name = path.relative_to(folder).parts
        return name.startswith(".") or any(part.startswith((".", "__")) for part in folders)

    files = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
    return sorted(path for path in files if not is_hidden(path))


def open_picture(file: str | BinaryIO) -> Image.Image:
    """`Image.open` of the supported formats only, whatever the file name.

    Raises:
        PIL.UnidentifiedImageError: for other formats; further ones as `Image.open`.
    """
    return Image.open(file, formats=list(FORMATS))


def read_picture(file: str | BinaryIO) -> Image.Image:
    """The picture of a file as RGB of 8 bits, the way up that its camera says; errors as `open_picture` and `as_rgb`."""
    with open_picture(file) as picture:
        return as_rgb(ImageOps.exif_transpose(picture))


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB of 8 bits.

    Grey of 16 bits is scaled: Pillow alone makes all of it white that is more than 255. Older Pillow opens it as mode `I`, of 32
    bits, and there pixels of at most 255 are taken for 8 bits, as Pillow does. Grey of floating point numbers is from 0, black, to
    1, white: Pillow alone makes all of it black.

    Raises:
        ValueError: for pixels beyond 16 bits, and for floating point numbers that are not from 0 to 1.
    """
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
        least, most = pixels.min(), pixels.max()
        white = 1 if picture.mode == "F" else 65535
        # Written so that NaN fails as well.
        if not (least >= 0 and most <= white):
            raise ValueError(
                f"pixels of mode {picture.mode} must be at least 0 and at most {white}, got {least} to {most}"
            )
        if picture.mode == "F":
            pixels = (pixels * 255).round()
        elif picture.mode != "I" or most > 255:
            pixels = pixels >> 8
        picture = Image.fromarray(pixels.astype(np.uint8))
    return picture.convert("RGB")

"""The image processor of models of digits."""

from training.digits import CANVAS_SIZE, NUM_CHANNELS, PIXEL_MEAN, PIXEL_STD
from transformers import ViTImageProcessorPil


def digits_processor():
    """Converts pictures to model inputs, resized to the canvas."""
    return ViTImageProcessorPil(
        size={"height": CANVAS_SIZE, "width": CANVAS_SIZE},
        do_resize=True,
        do_convert_rgb=True,
        image_mean=[PIXEL_MEAN] * NUM_CHANNELS,
        image_std=[PIXEL_STD] * NUM_CHANNELS,
    )

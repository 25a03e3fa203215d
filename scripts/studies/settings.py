"""What all models of the study share: their size, and how much they are trained and measured."""

from __future__ import annotations

from dataclasses import dataclass

from training.digits import CANVAS_SIZE, NUM_CHANNELS


@dataclass(frozen=True)
class Settings:
    """How much to train and to measure, alike for all models. None stands for all there is."""

    image_epochs: int = 10
    image_batch: int = 64
    train_digits: int | None = None
    test_digits: int | None = None
    text_steps: int = 300
    # Blocks of the first length; a step has as many tokens at the other lengths.
    text_batch: int = 32
    # Learning rates are tuned at the first length.
    text_lengths: tuple[int, ...] = (64, 128)
    vocab_size: int = 1024
    train_files: int | None = None
    held_out_files: int | None = None
    # Of the first length.
    held_out_blocks: int = 512
    weight_decay: float = 0.05
    warmup_steps: int = 20


SETTINGS = Settings()
# From low to high. Where one at the edge is best, tuning goes on beyond it.
LEARNING_RATES = {"images": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "text": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}
# How many rates tuning tries at most beyond each edge, each twice as far as the last.
RATES_BEYOND = 3

IMAGE_FIELDS = {
    "modality": "image",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "head_dim": 16,
    "intermediate_size": 192,
    "image_size": CANVAS_SIZE,
    "patch_size": 4,
    "num_channels": NUM_CHANNELS,
    "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}
TEXT_FIELDS = {
    "modality": "text",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
}

# Name of a comparison: the placement to train on, and the one to test on.
COMPARISONS = {
    "static → static": ("static", "static"),
    "static → dynamic": ("static", "dynamic"),
    "dynamic → dynamic": ("dynamic", "dynamic"),
}
DYNAMIC = "dynamic → dynamic"

"""Real data that needs no network: scikit-learn's handwritten digits, and the source text of Python's standard library.

Legend: `N` pictures or blocks, `L` tokens of a block.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil


DIGIT_SIZE = 8
CANVAS_SIZE = 16
# Image pipelines turn every picture into RGB before a processor sees it, so a model for them has three channels.
NUM_CHANNELS = 3
PLACEMENTS = ("static", "dynamic")
PIXEL_MEAN = PIXEL_STD = 0.5
# Drawing positions and splitting digits are separate: a new seed for the one leaves the other alone.
SPLIT_SEED = 0

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 8


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


def digits_split(test_share: float = 0.25) -> tuple[Digits, Digits]:
    """Digits to train on and digits held out, with the same mixture of classes; always the same ones."""
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
        placement: one of `PLACEMENTS`.
        seed: of the random places.
    """

    def __init__(self, digits: Digits, placement: str, seed: int = 0):
        if placement not in PLACEMENTS:
            raise ValueError(f"`placement` must be one of {PLACEMENTS}, got {placement!r}.")
        self.digits = digits
        self.placement = placement
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        """Draws the places of an epoch; static digits stay in the middle."""
        room = CANVAS_SIZE - DIGIT_SIZE
        if self.placement == "static":
            self.corners = torch.full((len(self.digits), 2), room // 2)
            return
        # Two numbers to one seed: neighbouring seeds must not share their epochs.
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

    def picture(self, index: int) -> Image.Image:
        """The canvas as a greyscale picture."""
        return Image.fromarray(self.canvas(index).numpy())

    def pictures(self) -> list[Image.Image]:
        """All canvases as greyscale pictures."""
        return [self.picture(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # The same arithmetic as `digits_processor`, without a detour over pictures for every step of training.
        pixels = (self.canvas(index).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        return {"pixel_values": pixels.expand(NUM_CHANNELS, -1, -1), "labels": self.digits.labels[index]}


def digits_processor() -> ViTImageProcessorPil:
    """What makes model inputs of pictures; it shrinks or enlarges those of another size to the canvas."""
    return ViTImageProcessorPil(
        size={"height": CANVAS_SIZE, "width": CANVAS_SIZE},
        do_resize=True,
        do_convert_rgb=True,
        image_mean=[PIXEL_MEAN] * NUM_CHANNELS,
        image_std=[PIXEL_STD] * NUM_CHANNELS,
    )


def standard_library_files() -> list[Path]:
    """The public top-level modules of Python's standard library that are written in Python, by name.

    Raises:
        FileNotFoundError: where Python was installed without its source text.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .py files: this Python comes without the text of its library.")
    return files


def split_files(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out: a file's name decides, so that other Python versions split alike."""
    train, held_out = [], []
    for path in files:
        (train if zlib.crc32(path.name.encode()) % HELD_OUT_SHARE else held_out).append(path)
    return train, held_out


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """The text of each file."""
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be written in it, and comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, seen or not: there is no unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


class TokenBlocks(Dataset):
    """Blocks of `length` tokens, `[N, L]`, for a causal model: `labels` are the tokens themselves."""

    def __init__(self, tokens: Tensor, length: int):
        count = len(tokens) // length
        if count == 0:
            raise ValueError(f"A block needs {length} tokens, there are {len(tokens)} in all.")
        self.blocks = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def token_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int) -> TokenBlocks:
    """The texts one after the other, with an end-of-text token after each, cut into blocks."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))
    ids = [token for encoding in encodings for token in (*encoding.ids, tokenizer.eos_token_id)]
    return TokenBlocks(torch.tensor(ids), length)

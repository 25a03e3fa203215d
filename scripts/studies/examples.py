"""What the study trains and measures on: digits on canvases, and blocks of the standard library's source text.

Legend: `N` images or blocks, `L` tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from training.digits import DigitCanvases, Digits, digits_split
from training.standard_library import read_texts, split_files, standard_library_files
from training.tokenizer import train_tokenizer
from transformers import PreTrainedTokenizerFast

from studies.settings import Settings


# One in so many of the training digits, and of the held-out text's blocks, is reserved for tuning.
TUNING_SHARE = 5


def image_batches(canvases: DigitCanvases, seed: int, steps: int, batch: int) -> Iterator[dict[str, Tensor]]:
    """New places and a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for epoch in range(steps):
        canvases.set_epoch(epoch)
        pixels = canvases.pixel_values()
        for chosen in torch.randperm(len(canvases), generator=generator).split(batch)[: steps - done]:
            yield {"pixel_values": pixels[chosen], "labels": canvases.digits.labels[chosen]}
            done += 1
        if done == steps:
            return


def digits_of(stage: str, settings: Settings) -> tuple[Digits, Digits]:
    """Digits to train on, and those to measure with."""
    train_digits, test_digits = digits_split()
    train_digits = train_digits.first(settings.train_digits)
    if stage == "test":
        return train_digits, test_digits.first(settings.test_digits)
    count = len(train_digits) // TUNING_SHARE
    return train_digits.first(-count), Digits(train_digits.images[-count:], train_digits.labels[-count:])


@lru_cache(maxsize=2)
def text_tokens(settings: Settings) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and tokens of held-out files."""
    train_paths, held_out_paths = split_files(standard_library_files())
    texts = list(read_texts(train_paths[: settings.train_files]))
    longest = max(settings.text_lengths)
    tokenizer = train_tokenizer(texts, settings.vocab_size, longest)
    held_out = read_texts(held_out_paths[: settings.held_out_files])
    return tuple(token_blocks(part, tokenizer, longest).flatten() for part in (texts, held_out))


def held_out_blocks(tokens: Tensor, length: int, stage: str, settings: Settings) -> Tensor:
    """Blocks spread evenly over the held-out files. All lengths measure on the same text, tuning on another part of it."""
    longest = max(settings.text_lengths)
    blocks = cut(tokens, longest)
    is_test = torch.arange(len(blocks)) % TUNING_SHARE != 0
    blocks = blocks[is_test if stage == "test" else ~is_test]
    count = max(1, settings.held_out_blocks * settings.text_lengths[0] // longest)
    chosen = blocks[:: max(1, len(blocks) // count)][:count]
    return cut(chosen.flatten(), length)


def text_batches(blocks: Tensor, seed: int, steps: int, batch: int) -> Iterator[dict[str, Tensor]]:
    """Blocks `[N, L]` in a new order every time all have been seen, for a causal model: `labels` are the tokens themselves."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat((order, torch.randperm(len(blocks), generator=generator)))
        chosen, order = blocks[order[:batch]], order[batch:]
        yield {"input_ids": chosen, "labels": chosen}


def cut(tokens: Tensor, length: int) -> Tensor:
    """Blocks of `length` tokens, `[N, L]`.

    Raises:
        ValueError: if there are too few for one.
    """
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"A block needs {length} tokens, there are {len(tokens)} in all.")
    return tokens[: count * length].view(count, length)


def token_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """The texts one after the other, with an end-of-text token after each, cut into blocks `[N, L]`."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))
    ids = [token for encoding in encodings for token in (*encoding.ids, tokenizer.eos_token_id)]
    return cut(torch.tensor(ids), length)

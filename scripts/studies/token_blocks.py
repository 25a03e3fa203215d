"""Blocks of tokens in memory.

Legend: `N` blocks, `L` tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast


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

"""From documents to blocks of tokens: a tokenization that resumes where it was stopped, and batches.

Legend: `N` blocks, `L` tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from common.command import require_least
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase

from training.loading import AnyDataset
from training.metrics import IGNORED
from training.streams import endless


# Documents that are put together and cut at a time; only the last block of them may be short.
PACKED_DOCUMENTS = 1000


@dataclass
class BlockArguments:
    """How text becomes blocks of tokens."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or name on the Hub. If not given: that of the checkpoint, or a new one, trained on the data."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of a tokenizer that is trained."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of a block; if not given, the model's `max_position_embeddings`."}
    )
    tokenization_shards: int = field(
        default=16,
        metadata={
            "help": "Number of parts that are cached one by one: a run that is stopped resumes after the last one."
        },
    )

    def __post_init__(self):
        # All bytes, and the end-of-text token.
        require_least(self, vocab_size=257, block_size=2, tokenization_shards=1)


class Packer:
    """Puts documents together, an end-of-text token after each, and cuts them into blocks. No token is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer = tokenizer
        self.length = length

    def __call__(self, documents: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        """`{"text": …}` to `{"input_ids": …}`; the last block may be short."""
        texts = [text for text in documents["text"] if text]
        if not texts:
            return {"input_ids": []}
        # Documents longer than the model's context are cut below.
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for document in encoded for token in (*document, self.tokenizer.eos_token_id)]
        return {"input_ids": [ids[start : start + self.length] for start in range(0, len(ids), self.length)]}

    def key(self) -> str:
        """What blocks depend on beside the documents."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        text = f"{self.length} {self.tokenizer.eos_token_id} {PACKED_DOCUMENTS} {vocabulary}"
        return hashlib.sha256(text.encode()).hexdigest()


def blocks(
    data: AnyDataset, packer: Packer, shards: int, num_proc: int | None = None, cache_dir: str | None = None
) -> AnyDataset:
    """The blocks of a dataset, one per row.

    They are cached part by part, keyed by documents, tokenizer and length: a run that is stopped resumes with the next
    part.

    Raises:
        ValueError: if there is no text.
    """
    # Explicit, because an empty part has no columns to infer.
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    options = {"batched": True, "batch_size": PACKED_DOCUMENTS, "remove_columns": ["text"], "features": features}
    if isinstance(data, IterableDataset):
        return data.map(packer, **options)
    shards = max(1, min(shards, len(data)))
    key = hashlib.sha256(f"{data._fingerprint} {shards} {packer.key()}".encode()).hexdigest()[:32]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "translution-blocks" / key
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(shards):
        part = data.shard(shards, index, contiguous=True)
        parts.append(
            part.map(
                packer,
                num_proc=num_proc,
                cache_file_name=str(folder / f"{index:05d}-of-{shards:05d}.arrow"),
                load_from_cache_file=True,
                new_fingerprint=f"{key}-{index}",
                desc=f"Tokenising, part {index + 1} of {shards}",
                **options,
            )
        )
    packed = datasets.concatenate_datasets(parts)
    if len(packed) == 0:
        raise ValueError("The data must hold text, got empty documents only.")
    return packed


def hold_out_blocks(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The first blocks to train on and the last ones to evaluate on: for data of a single document.

    Raises:
        ValueError: if there is no block for one of them.
    """
    count = round(len(data) * share)
    if not 0 < count < len(data):
        raise ValueError(
            f"`validation_share` must leave at least 1 block on each side, got {share} of {len(data)} blocks in one document."
        )
    return data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))


class BlockStream(TorchIterableDataset):
    """A stream of blocks without end, to train on."""

    def __init__(self, data: IterableDataset):
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return endless(self.data)


class BlockBatch:
    """Collates blocks to `input_ids` and `labels`, `[N, L]`; short blocks are padded, with ignored labels.

    No mask is needed: padding comes last, and attention is causal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.filling = tokenizer.eos_token_id
        self.length = length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        shape = (len(samples), self.length)
        input_ids, labels = torch.full(shape, self.filling), torch.full(shape, IGNORED)
        for row, item in enumerate(samples):
            ids = torch.as_tensor(item["input_ids"])
            input_ids[row, : len(ids)] = labels[row, : len(ids)] = ids
        return {"input_ids": input_ids, "labels": labels}

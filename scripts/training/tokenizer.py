"""The tokenizer of a language model: loaded, or trained on the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from common.atomic_folder import written_whole
from common.saved_models import require_preprocessor
from datasets import IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.arguments import ModelArguments
from training.loading import AnyDataset
from training.text_blocks import BlockArguments


END_OF_TEXT = "<|endoftext|>"
# Of a stream, a tokenizer is trained on the first ones.
TOKENIZER_DOCUMENTS = 10_000


def load_tokenizer(
    args: BlockArguments, model: ModelArguments, data: AnyDataset, folder: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer by name, of the checkpoint, or a new one, which is kept in `folder` for a resumed run.

    Raises:
        ValueError: for a tokenizer without an end-of-text token, and where there is no text to train one on.
    """
    name = args.tokenizer_name or model.model_name_or_path
    if name is not None:
        revision = model.model_revision if args.tokenizer_name is None else None
        if args.tokenizer_name is None:
            require_preprocessor(name, "text", revision)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=model.trust_remote_code
        )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"`tokenizer_name` must have an end-of-text token, {name} has none.")
        return tokenizer
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    documents = data.take(TOKENIZER_DOCUMENTS) if isinstance(data, IterableDataset) else data
    texts = [row["text"] for row in documents if row["text"]]
    if not texts:
        raise ValueError("The data to train on must hold text, got empty documents only.")
    tokenizer = train_tokenizer(texts, args.vocab_size, args.block_size or 256)
    with written_whole(folder) as partial:
        tokenizer.save_pretrained(partial)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, so that there is no unknown token.
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

"""Trains a causal language model, new or from a checkpoint.

    python scripts/run_clm.py scripts/recipes/stdlib.yaml --output_dir runs/stdlib
    python scripts/run_clm.py --train_dir texts --block_size 128 --output_dir runs/texts

Text is `.txt`, `.md`, `.py`, JSON lines, CSV or Parquet. Rerun the command to resume from the last complete checkpoint, or
from the last tokenized part of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.command import run_command
from datasets import IterableDataset
from training.arguments import ModelArguments, new_config, refuse_new_model_options
from training.data_arguments import TextDataArguments
from training.metrics import text_metrics, token_losses
from training.output_folder import LEFT_BEHIND
from training.run import Run
from training.text_blocks import BlockArguments, BlockBatch, BlockStream, Packer, blocks, hold_out_blocks
from training.text_data import load_texts
from training.tokenizer import load_tokenizer
from training.trainer import WholeCheckpointTrainer
from training.weights import load_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from translution import TranslutionConfig, TranslutionForCausalLM


def parse(arguments: Sequence[str]) -> Run:
    """The run of a command line; errors as `parse_arguments`."""
    description = __doc__.splitlines()[0]
    return Run.parse("run_clm.py", "text-generation", TextDataArguments, [BlockArguments], arguments, description)


def model_config(args: ModelArguments, block: BlockArguments, **of_tokenizer: Any) -> TranslutionConfig:
    """The config of a new model, with the fields that the tokenizer decides; errors as `new_config`."""
    decided = {"modality": "text", **of_tokenizer}
    if block.block_size is not None:
        decided["max_position_embeddings"] = block.block_size
    return new_config(args, decided, {})


def load_model(
    args: ModelArguments, block: BlockArguments, tokenizer: PreTrainedTokenizerBase, trains: bool = True
) -> PreTrainedModel:
    """A model of the tokenizer's vocabulary whose positions a block fits in, to train or only to evaluate.

    Raises:
        ValueError: for options that contradict each other, the config, or the checkpoint.
    """
    if args.model_name_or_path is None:
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = TranslutionForCausalLM(model_config(args, block, vocab_size=len(tokenizer), **tokens))
    else:
        refuse_new_model_options(args)
        model = load_checkpoint(AutoModelForCausalLM, args, trains)
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"`vocab_size` must be at least the tokenizer's {len(tokenizer)}, got {config.vocab_size}.")
    if config.longest_text is not None and (block.block_size or 0) > config.longest_text:
        reason = (
            "its table of absolute positions ends there"
            if config.use_absolute_position_embeddings
            else "without `max_relative_distance` it knows no longer distance"
        )
        raise ValueError(
            f"`block_size` must be at most `max_position_embeddings` {config.max_position_embeddings}, got "
            f"{block.block_size}: a model takes longer texts only with `max_relative_distance` and without "
            f"`use_absolute_position_embeddings`, and of this one {reason}. Give a smaller `block_size`, or another model."
        )
    return model


def main(arguments: Sequence[str]):
    run = parse(arguments)
    data_args, training, (block_args,) = run.data, run.training, run.others
    if training.label_smoothing_factor:
        # The Trainer shifts labels only for the model classes of Transformers.
        raise ValueError(f"`label_smoothing_factor` must be 0 for text, got {training.label_smoothing_factor}.")
    with training.main_process_first(desc="reading the text"):
        train, evaluation = load_texts(data_args, training.do_eval, not run.only_evaluates)
    checkpoint = run.start()
    with training.main_process_first(desc="training the tokenizer"):
        tokenizer = load_tokenizer(block_args, run.model, train, run.folder / LEFT_BEHIND)
    model = load_model(run.model, block_args, tokenizer, training.do_train)
    length = block_args.block_size or model.config.max_position_embeddings
    tokenizer.model_max_length = length
    packer = Packer(tokenizer, length)
    with training.main_process_first(desc="tokenising"):
        train, evaluation = (
            None
            if data is None
            else blocks(data, packer, block_args.tokenization_shards, data_args.num_proc, data_args.cache_dir)
            for data in (train, evaluation)
        )
    if isinstance(train, IterableDataset):
        train = BlockStream(train.shuffle(seed=training.seed, buffer_size=data_args.shuffle_buffer))
    elif training.do_eval and evaluation is None:
        train, evaluation = hold_out_blocks(train, data_args.validation_share)
    trainer = WholeCheckpointTrainer(
        model,
        training,
        data_collator=BlockBatch(tokenizer, length),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=text_metrics,
        preprocess_logits_for_metrics=token_losses,
    )
    run.finish(trainer, checkpoint)


if __name__ == "__main__":
    run_command(main)

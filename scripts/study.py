"""Compares every mixer fairly: at the same width, and attention widened to the same number of parameters.

    python scripts/study.py --processes 2        # one row per run, appended to scripts/results/study.csv; can be stopped
    python scripts/study.py --report             # picture and tables of the rows that are there

Images: handwritten digits in the middle of a canvas ("static") or anywhere on it ("dynamic"). Text: the source text of
Python's standard library, in two lengths.

All models of a task are trained alike, and those of one seed see the same examples in the same order. The learning rate alone
is each model's own: one that suits a narrow model of one kind makes a wide one of another kind look bad, so all are tuned
alike first, on examples that are neither trained on nor tested on, with seeds of their own. Then runs go seed by seed, so that
the rows of an unfinished study are a fair comparison too.

A row is one run: of images a training on static and one on dynamic digits (the latter alone to tune), of text one training.
`train_seconds` and `cpu_seconds` sum over the trainings of a row, `forward_flops` are those of one image or block of text.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common.hardware import hardware
from demo import COMPARISONS, IMAGE_FIELDS, TEXT_FIELDS, Settings, accuracy, all_pixels, classify, perplexity, table
from studies.token_blocks import TokenBlocks, token_blocks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from training.digits import PLACEMENTS, DigitCanvases, Digits, digits_split
from training.standard_library import read_texts, split_files, standard_library_files
from training.tokenizer import train_tokenizer
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.pair_layout import PairLayout


# A backend that needs no screen.
matplotlib.use("Agg")
from matplotlib import pyplot as plt


# Larger than the demo's: the study has more time.
SETTINGS = replace(Settings(), image_epochs=10, text_steps=300, text_batch=32)
# Every length has as many tokens in a step; learning rates are tuned at the first.
TEXT_LENGTHS = (64, 128)
# Wide enough that few models find their own at an edge; the report counts how many chose each.
LEARNING_RATES = {"images": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "text": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}
FIRST_TUNING_SEED = 100
# One in so many of the training digits, and of the held-out text's blocks, is there to tune on.
TUNING_SHARE = 5
MAX_GRADIENT_NORM = 1.0

DYNAMIC = "dynamic → dynamic"

FIELDS = [
    "stage", "task", "variant", "family", "length", "seed", "setting", "parameters", "forward_flops", "train_seconds", "cpu_seconds",
    *COMPARISONS, "perplexity", "steps", "epochs", "batch", "learning_rate", "threads", "processes", "device", "python",
    "torch", "transformers", "commit", "date",
]  # fmt: skip
KEY = ("stage", "task", "variant", "length", "seed", "setting", "steps", "batch", "learning_rate")


# What is compared


@dataclass(frozen=True, eq=False)
class Variant:
    """A model of the comparison.

    Args:
        name, family: its row, and what it is drawn alike with.
        fields: what its config has beside the fields that all models of the task share.
        widened_to: the variant whose number of parameters it is widened to.
    """

    name: str
    family: str
    fields: dict[str, Any]
    widened_to: str | None = None


ATTENTION = {
    "absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "rotary": {"mixer_types": "rope_attention"},
    "relative bias": {"mixer_types": "relative_bias_attention"},
}
RANK = {"relative_rank": 8}
LOR_KV, FULL_KV, BASIS_KV = "LoR kv", "full kv", "basis 8 kv"


def attention(kind: str, **fields: Any) -> Variant:
    return Variant(f"attention, {kind}", "attention", fields or ATTENTION[kind])


def translution(name: str, family: str, projections: str, **fields: Any) -> Variant:
    return Variant(name, family, {"relative_projections": projections, **fields})


def widened(kind: str, target: str) -> Variant:
    return Variant(f"attention, {kind}, as {target}", "attention, widened", ATTENTION[kind], target)


IMAGE_VARIANTS = [
    attention("no position", mixer_types="attention"),
    attention("absolute"),
    attention("rotary"),
    attention("relative bias"),
    attention("relative vector", mixer_types="relative_vector_attention"),
    # Its class token sees no patch, so that nothing but the mean tells the head of the picture.
    Variant("convolution", "convolution", {"mixer_types": "convolution", "pooling": "mean"}),
    Variant("ACmix", "ACmix", {"mixer_types": "acmix"}),
    *(translution(f"full {names}", "full", names) for names in ("qkv", "kv", "qv", "qk", "k", "v")),
    *(translution(f"LoR {names}", "LoR", names, **RANK) for names in ("qkv", "kv")),
    translution("rotary LoR kv", "LoR", "kv", mixer_types="rope_translution", **RANK),
    translution(BASIS_KV, "basis", "kv", offset_basis=8),
    translution("basis 16 kv", "basis", "kv", offset_basis=16),
    translution("basis 8 LoR kv", "basis", "kv", offset_basis=8, **RANK),
    translution("full kv, then rotary", "hybrid", "kv", mixer_types=["translution"] + ["rope_attention"] * 2),
    *(widened(kind, target) for target in (FULL_KV, LOR_KV, BASIS_KV) for kind in ATTENTION),
    # Whichever Translution turns out best needs a rotary rival of its size.
    *(widened("rotary", target) for target in ("full qkv", "full v", "LoR qkv", "basis 16 kv", "full kv, then rotary")),
]  # fmt: skip
TEXT_VARIANTS = [
    *(attention(kind) for kind in ATTENTION),
    translution(FULL_KV, "full", "kv"),
    translution(LOR_KV, "LoR", "kv", **RANK),
    translution(BASIS_KV, "basis", "kv", offset_basis=8),
    *(widened(kind, target) for target in (FULL_KV, LOR_KV, BASIS_KV) for kind in ("rotary", "relative bias")),
]
VARIANTS = {"images": IMAGE_VARIANTS, "text": TEXT_VARIANTS}


def task_fields(task: str, length: int | None, vocab_size: int) -> dict[str, Any]:
    """What the configs of all models of a task share."""
    if task == "images":
        return dict(IMAGE_FIELDS)
    return {**TEXT_FIELDS, "vocab_size": vocab_size, "max_position_embeddings": length}


def model_fields(
    task: str, variant: Variant, length: int | None = None, vocab_size: int = SETTINGS.vocab_size
) -> dict:
    """All fields of a variant's config."""
    fields = {**task_fields(task, length, vocab_size), **variant.fields}
    if variant.widened_to is None:
        return fields
    target = next(other for other in VARIANTS[task] if other.name == variant.widened_to)
    return widen(fields, count_parameters(model_fields(task, target, length, vocab_size)))


def build(fields: dict[str, Any]) -> PreTrainedModel:
    model = TranslutionForImageClassification if fields["modality"] == "image" else TranslutionForCausalLM
    return model(TranslutionConfig(**fields))


def count_parameters(fields: dict[str, Any]) -> int:
    """Without the memory of the model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(fields).parameters())


def widen(fields: dict[str, Any], target: int) -> dict[str, Any]:
    """The fields of a model of the same depth and number of heads, and as near to `target` parameters as can be.

    The hidden size grows in steps that keep the head size a multiple of 4, with an MLP as many times as wide as before; then
    the MLP makes up the rest.
    """
    heads, width = fields["num_attention_heads"], fields["hidden_size"]

    def resized(hidden: int, intermediate: int) -> dict[str, Any]:
        return {**fields, "hidden_size": hidden, "head_dim": hidden // heads, "intermediate_size": intermediate}

    def same_shape(hidden: int) -> dict[str, Any]:
        return resized(hidden, hidden * fields["intermediate_size"] // width)

    def error(hidden: int) -> int:
        return abs(count_parameters(same_shape(hidden)) - target)

    hidden = 4 * heads
    while error(hidden + 4 * heads) < error(hidden):
        hidden += 4 * heads
    one, two = (count_parameters(resized(hidden, intermediate)) for intermediate in (1, 2))
    return resized(hidden, max(1, 1 + round((target - one) / (two - one))))


# Cost


def pair_scores_flops(
    query: Any, key: Any, query_bank: Any, key_bank: Any, num_heads: int, layout: list, **_: Any
) -> int:
    """Of every pair: a vector times its matrix for each side that has a bank, and the inner product."""
    features = query[-1] if query_bank is None else query_bank[-1]
    products = sum(bank[-2] * bank[-1] for bank in (query_bank, key_bank) if bank is not None)
    return 2 * query[0] * num_pairs(layout) * (products + features)


def pair_values_flops(probabilities: Any, value: Any, value_bank: Any, layout: list, **_: Any) -> int:
    """Of every pair: a vector times its matrix, and the weighted sum."""
    return 2 * value[0] * num_pairs(layout) * (value_bank[-2] * value_bank[-1] + value_bank[-1])


def streamed_attention_flops(
    query: Any, key: Any, value: Any, query_bank: Any, key_bank: Any, value_bank: Any, *rest: Any, **_: Any
) -> int:
    """As scores and values together. Pairs beyond a text's distance have no matrix of their own."""
    layout = rest[5]
    features = value[-1] if value_bank is None else value_bank[-1]
    matrices = sum(bank[-2] * bank[-1] for bank in (query_bank, key_bank, value_bank) if bank is not None)
    every = near = num_pairs(layout)
    if layout[-1] >= 0:
        near -= num_pairs([max(layout[0] - layout[-1], 0), *layout[1:]])
    return 2 * query[0] * (near * matrices + every * 2 * features)


def basis_scores_flops(query: Any, keys: Any, weights: Any, **_: Any) -> int:
    """Of every pair, head and factor: the inner product."""
    return 2 * keys[0] * keys[1] * weights[0] * weights[1] * weights[2] * keys[-1]


def basis_values_flops(probabilities: Any, keys: Any, weights: Any, **_: Any) -> int:
    """Of every pair, head and factor: the weighted sum."""
    return basis_scores_flops(probabilities, keys, weights)


def num_pairs(layout: list[int]) -> int:
    """Pairs of a layout as the operators take it: text has those that do not look ahead."""
    height, width, class_token, causal, *_ = layout
    tokens = PairLayout(height, width, bool(class_token), bool(causal), height, width).num_tokens
    return tokens * (tokens + 1) // 2 if causal else tokens**2


def forward_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Operations of matrix products and convolutions in a forward pass: a multiplication and an addition are two.

    The counter sees into everything but Translution's own operators, for which it gets a formula, and fused attention, which
    is therefore taken apart.
    """
    formulas = {
        torch.ops.translution.pair_scores: pair_scores_flops,
        torch.ops.translution.pair_values: pair_values_flops,
        torch.ops.translution.streamed_attention: streamed_attention_flops,
        torch.ops.translution.basis_scores: basis_scores_flops,
        torch.ops.translution.basis_values: basis_values_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()


# Training


@dataclass(frozen=True)
class Run:
    """One row to be: a variant of a task with a seed; `length` is that of a block of text, `stage` "tuning" or "test"."""

    task: str
    variant: Variant
    seed: int
    learning_rate: float
    settings: Settings
    length: int | None = None
    stage: str = "test"

    def fields(self) -> dict[str, Any]:
        return model_fields(self.task, self.variant, self.length, self.settings.vocab_size)

    @property
    def title(self) -> str:
        task = self.task if self.length is None else f"{self.task} {self.length}"
        return f"{self.stage}, {task}, seed {self.seed}: {self.variant.name}, learning rate {self.learning_rate:g}"

    @property
    def steps(self) -> int:
        """As many to tune as to test, although fewer digits are left then."""
        if self.task == "text":
            return self.settings.text_steps
        digits = len(digits_split()[0].first(self.settings.train_digits))
        return self.settings.image_epochs * -(-digits // self.settings.image_batch)

    @property
    def batch(self) -> int:
        if self.task == "images":
            return self.settings.image_batch
        return max(1, self.settings.text_batch * TEXT_LENGTHS[0] // self.length)

    def identity(self) -> dict[str, Any]:
        """The columns that are known before the run; those of `KEY` tell whether it is done."""
        return {
            "stage": self.stage,
            "task": self.task,
            "variant": self.variant.name,
            "family": self.variant.family,
            "length": "" if self.length is None else self.length,
            "seed": self.seed,
            "setting": self._setting(),
            "steps": self.steps,
            "epochs": self.settings.image_epochs if self.task == "images" else "",
            "batch": self.batch,
            "learning_rate": f"{self.learning_rate:g}",
        }

    def _setting(self) -> str:
        """A short name of all that shapes the result beside the columns that a row has anyway."""
        names = ["weight_decay", "warmup_steps"]
        own = ["train_digits", "test_digits"]
        if self.task == "text":
            own = ["vocab_size", "train_files", "held_out_files", "held_out_blocks"]
        values = {name: getattr(self.settings, name) for name in names + own}
        text = json.dumps([values, self.fields()], sort_keys=True, default=str)
        return f"{zlib.crc32(text.encode()):08x}"


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def plan_tuning(tasks: Iterable[str], seeds: int, settings: Settings) -> list[Run]:
    """The runs that find every variant's learning rate."""
    length = {"images": None, "text": TEXT_LENGTHS[0]}
    return [
        Run(task, variant, seed, rate, settings, length[task], "tuning")
        for task in tasks
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
        for variant in VARIANTS[task]
        for rate in LEARNING_RATES[task]
    ]


def best_learning_rates(runs: list[Run], rows: list[dict[str, str]]) -> dict[tuple[str, str], float]:
    """Of each task's variants, by name, as far as their tuning is done."""
    found = {key_of(row): row for row in rows}
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        row = found.get(key_of(run.identity()))
        loss = float("nan") if row is None else float(row["perplexity"] or -float(row[DYNAMIC]))
        losses.setdefault((run.task, run.variant.name), {}).setdefault(run.learning_rate, []).append(loss)
    means = {name: {rate: statistics.mean(each) for rate, each in rates.items()} for name, rates in losses.items()}
    return {
        name: min(rates, key=rates.get) for name, rates in means.items() if not any(map(math.isnan, rates.values()))
    }


def plan(
    image_seeds: int, text_seeds: int, settings: Settings, learning_rates: dict[tuple[str, str], float]
) -> list[Run]:
    """The runs of all variants whose learning rate is known, seed by seed."""
    runs = []
    for seed in range(max(image_seeds, text_seeds)):
        cases = [("images", None)] if seed < image_seeds else []
        cases += [("text", length) for length in TEXT_LENGTHS] if seed < text_seeds else []
        for task, length in cases:
            for variant in VARIANTS[task]:
                if (rate := learning_rates.get((task, variant.name))) is not None:
                    runs.append(Run(task, variant, seed, rate, settings, length))
    return runs


def train(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], steps: int, learning_rate: float, settings: Settings
) -> tuple[float, float]:
    """Trains a model as `Trainer` would in the demo, without its overhead; returns seconds, and seconds of the processor."""
    # As usual, what multiplies nothing (biases, LayerNorms, scalars) does not decay.
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, steps)
    start, processor_start = time.perf_counter(), time.process_time()
    model.train()
    for inputs in batches:
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start, time.process_time() - processor_start


def image_batches(canvases: DigitCanvases, seed: int, steps: int, batch: int) -> Iterator[dict[str, Tensor]]:
    """New places and a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for epoch in range(steps):
        canvases.set_epoch(epoch)
        pixels = all_pixels(canvases)
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


def run_images(run: Run) -> dict[str, Any]:
    """Trains on static (not to tune) and on dynamic digits; returns the measured columns."""
    digits, held_out = digits_of(run.stage, run.settings)
    # A seed of its own: no epoch of any training places digits by it.
    tests = {placement: DigitCanvases(held_out, placement, seed=-1 - run.seed) for placement in PLACEMENTS}
    row = {"train_seconds": 0.0, "cpu_seconds": 0.0}
    for placement in PLACEMENTS if run.stage == "test" else ("dynamic",):
        set_seed(run.seed)
        model = build(run.fields())
        batches = image_batches(DigitCanvases(digits, placement, run.seed), run.seed, run.steps, run.batch)
        seconds, cpu_seconds = train(model, batches, run.steps, run.learning_rate, run.settings)
        row["train_seconds"] += seconds
        row["cpu_seconds"] += cpu_seconds
        for comparison, (trained_on, tested_on) in COMPARISONS.items():
            if trained_on == placement:
                row[comparison] = accuracy(classify(model, all_pixels(tests[tested_on])), held_out.labels)
    pixels = tests["static"][0]["pixel_values"].unsqueeze(0)
    return {
        **row,
        "parameters": model.num_parameters(),
        "forward_flops": forward_flops(model, {"pixel_values": pixels}),
    }


@lru_cache(maxsize=2)
def text_tokens(vocab_size: int, train_files: int | None, held_out_files: int | None) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and tokens of files that nothing is trained on."""
    train_paths, held_out_paths = split_files(standard_library_files())
    texts = list(read_texts(train_paths[:train_files]))
    longest = max(TEXT_LENGTHS)
    tokenizer = train_tokenizer(texts, vocab_size, longest)
    held_out = read_texts(held_out_paths[:held_out_files])
    return tuple(token_blocks(part, tokenizer, longest).blocks.flatten() for part in (texts, held_out))


def held_out_blocks(tokens: Tensor, length: int, stage: str, settings: Settings) -> TokenBlocks:
    """Blocks spread evenly over the held-out files; every length reads the same text, and tuning another one."""
    longest = max(TEXT_LENGTHS)
    blocks = TokenBlocks(tokens, longest).blocks
    is_test = torch.arange(len(blocks)) % TUNING_SHARE != 0
    blocks = blocks[is_test if stage == "test" else ~is_test]
    count = max(1, settings.held_out_blocks * settings.text_length // longest)
    chosen = blocks[:: max(1, len(blocks) // count)][:count]
    return TokenBlocks(chosen.flatten(), length)


def text_batches(blocks: TokenBlocks, seed: int, steps: int, batch: int) -> Iterator[dict[str, Tensor]]:
    """Blocks in a new order every time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat((order, torch.randperm(len(blocks), generator=generator)))
        chosen, order = blocks.blocks[order[:batch]], order[batch:]
        yield {"input_ids": chosen, "labels": chosen}


def run_text(run: Run) -> dict[str, Any]:
    """Trains a language model; returns the measured columns."""
    settings = run.settings
    tokens, held_out = text_tokens(settings.vocab_size, settings.train_files, settings.held_out_files)
    set_seed(run.seed)
    model = build(run.fields())
    batches = text_batches(TokenBlocks(tokens, run.length), run.seed, run.steps, run.batch)
    seconds, cpu_seconds = train(model, batches, run.steps, run.learning_rate, settings)
    return {
        "train_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "perplexity": perplexity(model, held_out_blocks(held_out, run.length, run.stage, settings)),
        "parameters": model.num_parameters(),
        "forward_flops": forward_flops(model, {"input_ids": tokens[None, : run.length]}),
    }


TASKS = {"images": run_images, "text": run_text}
circumstances: dict[str, Any] = {}


def prepare(threads: int, processes: int):
    """What each process does once."""
    torch.set_num_threads(threads)
    circumstances.update(hardware(), processes=processes)


def execute(run: Run) -> dict[str, Any]:
    """The row of a run."""
    row = {**run.identity(), **TASKS[run.task](run), **circumstances}
    return {**row, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def execute_all(
    runs: list[Run], threads: int, processes: int, has_time: Callable[[], bool]
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Rows as they are done; none is begun any more once there is no time left."""
    if processes == 1:
        prepare(threads, processes)
        for run in runs:
            if not has_time():
                return
            yield run, execute(run)
        return
    context = get_context("spawn")  # a fork of a process whose threads have worked may hang
    with ProcessPoolExecutor(processes, context, initializer=prepare, initargs=(threads, processes)) as pool:
        waiting, working = iter(runs), {}
        while True:
            while len(working) < processes and has_time() and (run := next(waiting, None)) is not None:
                working[pool.submit(execute, run)] = run
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                yield working.pop(future), future.result()


# The rows


def repair(path: Path):
    """Drops a last line that was not written to its end, by a process that was killed."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that are whole.

    Raises:
        ValueError: for a file with other columns.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if rows.fieldnames is not None and list(rows.fieldnames) != FIELDS:
        raise ValueError(f"{path} has other columns than this study: give another `--output`.")
    return list(rows)


def append_row(path: Path, row: dict[str, Any]):
    """Adds a row, and returns when it is on the disk. One process may write to a file."""
    repair(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def do_missing(runs: list[Run], path: Path, threads: int, processes: int, has_time: Callable[[], bool]):
    """Does what is not done yet, one row after the other."""
    finished = {key_of(row) for row in read_rows(path)}
    missing = [run for run in runs if key_of(run.identity()) not in finished]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", dynamic_ncols=True) as bar:
        for run, row in execute_all(missing, threads, processes, has_time):
            append_row(path, row)
            figure = f"perplexity {row['perplexity']:.1f}" if run.task == "text" else f"{row[DYNAMIC]:.1f} %"
            bar.write(f"{run.title}: {figure}, {row['parameters']:,} parameters, {row['train_seconds']:.0f} s")
            bar.update()


def plan_tests(args: argparse.Namespace, settings: Settings) -> list[Run]:
    """The runs of all variants that are tuned."""
    tuning = plan_tuning(args.tasks, args.tuning_seeds, settings)
    return plan(args.seeds, args.text_seeds, settings, best_learning_rates(tuning, read_rows(args.output)))


def run_study(args: argparse.Namespace, settings: Settings):
    """Tunes, then tests; what is in the CSV already is not done again."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def has_time() -> bool:
        return args.limit_minutes is None or time.perf_counter() - start < 60 * args.limit_minutes

    do_missing(
        plan_tuning(args.tasks, args.tuning_seeds, settings), args.output, args.threads, args.processes, has_time
    )
    # A part of the variants would be no comparison.
    if has_time():
        do_missing(plan_tests(args, settings), args.output, args.threads, args.processes, has_time)


# The report

RESULTS = Path(__file__).parent / "results" / "study.csv"
README = Path(__file__).parent.parent / "README.md"
README_MARKS = ("<!-- scripts/study.py writes from here -->", "<!-- to here -->")

STYLES = {
    "attention, no position": {"fmt": "v", "color": "silver"},
    "attention, absolute": {"fmt": "s:", "color": "silver"},
    "attention, rotary": {"fmt": "s-", "color": "black"},
    "attention, relative bias": {"fmt": "D--", "color": "gray"},
    "attention, relative vector": {"fmt": "^", "color": "gray"},
    "convolution": {"fmt": "o", "color": "tab:olive"},
    "ACmix": {"fmt": "o", "color": "tab:brown"},
    "full": {"fmt": "o", "color": "tab:blue"},
    "LoR": {"fmt": "o", "color": "tab:orange"},
    "basis": {"fmt": "o", "color": "tab:red"},
    "hybrid": {"fmt": "o", "color": "tab:purple"},
}
# The Translution variants, any of which may be the best.
TRANSLUTION = ("full", "LoR", "basis", "hybrid")


@dataclass(frozen=True)
class Spread:
    """Values of one figure over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.sd:.1f}"

    def overlaps(self, other: Spread) -> bool:
        """Whether the ranges from the least to the greatest value meet."""
        return min(self.values) <= max(other.values) and min(other.values) <= max(self.values)


@dataclass(frozen=True)
class Group:
    """The rows of a variant, one per seed."""

    variant: Variant
    rows: tuple[dict[str, str], ...]

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def parameters(self) -> int:
        return int(self.rows[0]["parameters"])

    def spread(self, column: str) -> Spread:
        return Spread(tuple(float(row[column]) for row in self.rows))

    def seconds(self) -> float:
        """Of one training, on one processor; unlike the time on the clock they do not depend on what ran beside it."""
        trainings = 2 if self.rows[0]["task"] == "images" else 1
        return statistics.median(float(row["cpu_seconds"]) / trainings for row in self.rows)


@dataclass(frozen=True)
class Comparison:
    """All variants on one task: the `groups` by name, the column that is compared, and whether more of it is better."""

    title: str
    groups: dict[str, Group]
    column: str
    sign: int

    def spread(self, name: str) -> Spread:
        return self.groups[name].spread(self.column)

    def gain(self, name: str, over: str) -> float:
        """By how much a variant is better than another: points of accuracy, or per cent of perplexity."""
        one, other = self.spread(name).mean, self.spread(over).mean
        return one - other if self.sign > 0 else 100 * (other - one) / other

    def gain_text(self, name: str, over: str) -> str:
        unit = "points" if self.sign > 0 else "% of perplexity"
        overlap = "overlap" if self.spread(name).overlaps(self.spread(over)) else "do not overlap"
        return f"{self.gain(name, over):+.1f} {unit}, and the spreads (least to greatest) {overlap}"

    def has(self, *names: str) -> bool:
        return all(name in self.groups for name in names)


def comparisons(rows: list[dict[str, str]], runs: list[Run]) -> list[Comparison]:
    """Sorts the rows of planned runs; rows of other settings are left out."""
    found = {key_of(row): row for row in rows}
    groups: dict[tuple[str, int | None], dict[str, list]] = {}
    for run in runs:
        row = found.get(key_of(run.identity()))
        if row is not None:
            of_task = groups.setdefault((run.task, run.length), {})
            of_task.setdefault(run.variant.name, [run.variant]).append(row)
    result = []
    for (task, length), of_task in sorted(groups.items(), key=str):
        named = {name: Group(variant, tuple(rows)) for name, (variant, *rows) in of_task.items()}
        if task == "images":
            result.append(Comparison("Digits anywhere on a canvas", named, DYNAMIC, 1))
        else:
            result.append(Comparison(f"Text, blocks of {length} tokens", named, "perplexity", -1))
    return sorted(result, key=lambda one: (-one.sign, len(one.title), one.title))


def number_of_seeds(comparison: Comparison) -> str:
    counts = sorted({len(group.rows) for group in comparison.groups.values()})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def results_table(comparison: Comparison) -> str:
    columns = list(COMPARISONS) if comparison.sign > 0 else ["perplexity"]
    unit = "MFLOPs per image" if comparison.sign > 0 else "MFLOPs per block"
    lines = []
    for group in comparison.groups.values():
        figures = [group.rows[0]["learning_rate"], *(str(group.spread(column)) for column in columns)]
        flops = int(group.rows[0]["forward_flops"]) / 1e6
        lines.append([group.name, f"{group.parameters:,}", f"{flops:.1f}", f"{group.seconds():.1f}", *figures])
    return table(["mixer", "parameters", unit, "processor seconds to train", "learning rate", *columns], lines)


def rivals(comparison: Comparison, name: str, kind: str = "rotary", tolerance: float = 0.03) -> list[str]:
    """Widened attention with as many parameters as a variant, the nearest first."""
    size = comparison.groups[name].parameters
    errors = {
        other.name: abs(other.parameters / size - 1)
        for other in comparison.groups.values()
        if other.variant.widened_to is not None and other.name.startswith(f"attention, {kind},")
    }
    return sorted((rival for rival, error in errors.items() if error <= tolerance), key=errors.get)


def translutions(comparison: Comparison) -> list[str]:
    return [group.name for group in comparison.groups.values() if group.variant.family in TRANSLUTION]


def rivals_table(comparison: Comparison) -> str:
    """Each Translution against widened attention of its number of parameters."""
    lines = []
    for name in translutions(comparison):
        for kind in ATTENTION:
            for rival in rivals(comparison, name, kind)[:1]:
                one, other = comparison.spread(name), comparison.spread(rival)
                overlap = "overlap" if one.overlaps(other) else "apart"
                size, rival_size = (f"{comparison.groups[each].parameters:,}" for each in (name, rival))
                gain = f"{comparison.gain(name, rival):+.1f}{'' if comparison.sign > 0 else ' %'}"
                lines.append([name, size, str(one), kind, rival_size, str(other), gain, overlap])
    columns = ["Translution", "parameters", comparison.column, "attention", "parameters", comparison.column, "gain"]
    return table([*columns, "spreads (least to greatest)"], lines) if lines else ""


def summary_table(comparison: Comparison) -> str:
    """The README's: every mixer at the same width, and rotary attention of as many parameters beside the Translutions."""
    lines = []
    for group in comparison.groups.values():
        if group.variant.widened_to is None:
            line = [group.name, f"{group.parameters:,}", f"{group.seconds():.0f}", str(comparison.spread(group.name))]
            rival = rivals(comparison, group.name)[:1] if group.name in translutions(comparison) else []
            for name in rival:
                one, other = comparison.spread(group.name), comparison.spread(name)
                unit = " points" if comparison.sign > 0 else " %"
                overlap = "overlap" if one.overlaps(other) else "apart"
                line += [str(other), f"{comparison.gain(group.name, name):+.1f}{unit}, {overlap}"]
            lines.append(line + [""] * (6 - len(line)))
    columns = [
        "mixer",
        "parameters",
        "seconds",
        comparison.column,
        "rotary attention, as many parameters",
        "gain, spreads",
    ]
    return table(columns, lines)


def put_into(page: Path, found: list[Comparison]) -> None:
    """Writes the tables between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split(README_MARKS[0])
    _, after = rest.split(README_MARKS[1])
    parts = [README_MARKS[0]]
    for comparison in found:
        parts += [f"{comparison.title}, {number_of_seeds(comparison)}:", summary_table(comparison)]
    page.write_text(before + "\n\n".join([*parts, README_MARKS[1]]) + after, encoding="utf-8")


def ordering(comparison: Comparison, names: list[str]) -> str:
    """Whether each variant is better than the one before it."""
    figures = " < ".join(f"{name} ({comparison.spread(name)})" for name in names)
    pairs = list(pairwise(names))
    wrong = [f"{name} is not better than {worse}" for worse, name in pairs if comparison.gain(name, worse) <= 0]
    close = [
        f"{worse} and {name}" for worse, name in pairs if comparison.spread(name).overlaps(comparison.spread(worse))
    ]
    if wrong:
        verdict = f"does not hold: {', '.join(wrong)}"
    elif close:
        verdict = f"holds for the means, but spreads (least to greatest) overlap: {'; '.join(close)}"
    else:
        verdict = "holds, and no spreads (least to greatest) overlap"
    return f"{comparison.title}, from worse to better: {figures}: {verdict}."


def pareto_front(comparison: Comparison) -> list[str]:
    """Variants that none with as few parameters equals, the smallest first."""
    front: list[str] = []
    for group in sorted(comparison.groups.values(), key=lambda group: group.parameters):
        if not front or comparison.sign * (comparison.spread(group.name).mean - comparison.spread(front[-1]).mean) > 0:
            front.append(group.name)
    return front


def ordering_findings(comparison: Comparison) -> Iterator[str]:
    for kind in ATTENTION:
        names = [f"attention, {kind}", LOR_KV, FULL_KV]
        if comparison.has(*names):
            yield "The paper's ordering, attention < LoR < full. " + ordering(comparison, names)


def projection_findings(comparison: Comparison) -> Iterator[str]:
    for family in ("full", "LoR"):
        kv, qkv = f"{family} kv", f"{family} qkv"
        if comparison.has(kv, qkv):
            sd = max(comparison.spread(kv).sd, comparison.spread(qkv).sd)
            good = comparison.gain(kv, qkv) >= -sd
            share = comparison.groups[kv].parameters / comparison.groups[qkv].parameters
            yield (
                f"kv as good as qkv, {family}: {'yes' if good else 'no'} (asked is at most one standard deviation less). "
                f"{kv} has {comparison.spread(kv)} with {100 * share:.0f} % of the parameters, {qkv} "
                f"{comparison.spread(qkv)}: {comparison.gain_text(kv, qkv)}."
            )


def basis_findings(comparison: Comparison) -> Iterator[str]:
    front = pareto_front(comparison)
    sizes = "; ".join(f"{name} ({comparison.groups[name].parameters:,}, {comparison.spread(name)})" for name in front)
    yield f"{comparison.title}, best for their parameters (no smaller model is as good on average): {sizes}."
    bases = [group.name for group in comparison.groups.values() if group.variant.family == "basis"]
    inside = [name for name in bases if name in front]
    if bases:
        yield f"{comparison.title}, of {len(bases)} with a basis these are among them: {', '.join(inside) or 'none'}."
    for name in bases:
        for other in (FULL_KV, LOR_KV):
            if comparison.has(other):
                share = 100 * comparison.groups[name].parameters / comparison.groups[other].parameters
                yield (
                    f"{comparison.title}, {name} against {other}: {share:.0f} % of the parameters, "
                    f"{comparison.gain_text(name, other)}."
                )


def rival_findings(comparison: Comparison) -> Iterator[str]:
    candidates = [name for name in translutions(comparison) if rivals(comparison, name)]
    if not candidates:
        return
    best = max(candidates, key=lambda name: comparison.sign * comparison.spread(name).mean)
    rival = rivals(comparison, best)[0]
    if comparison.sign > 0:
        shown = comparison.gain(best, rival) >= 5 and not comparison.spread(best).overlaps(comparison.spread(rival))
        goal = f" At least 5 points without overlap: {'yes' if shown else 'no'}."
    else:
        goal = ""
    yield (
        f"{comparison.title}, the best Translution against rotary attention of equal parameters: {best} "
        f"({comparison.groups[best].parameters:,}) has {comparison.spread(best)}, {rival} "
        f"({comparison.groups[rival].parameters:,}) {comparison.spread(rival)}: {comparison.gain_text(best, rival)}.{goal}"
    )


def tuning_findings(comparison: Comparison) -> Iterator[str]:
    groups = comparison.groups.values()
    rates = sorted(LEARNING_RATES[next(iter(groups)).rows[0]["task"]])
    chosen = [float(group.rows[0]["learning_rate"]) for group in groups]
    counts = ", ".join(f"{rate:g} for {chosen.count(rate)}" for rate in rates)
    yield f"{comparison.title}, learning rates that tuning chose for the {len(chosen)} models: {counts}."


FINDINGS = (ordering_findings, projection_findings, basis_findings, rival_findings, tuning_findings)


def report_text(found: list[Comparison]) -> str:
    """The README's tables and what follows from them."""
    rows = [row for comparison in found for group in comparison.groups.values() for row in group.rows]
    hours = sum(float(row["train_seconds"]) for row in rows) / 3600
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    machines = ", ".join(sorted({f"{row['device']}, threads of a run: {row['threads']}" for row in rows}))
    parts = [
        "<!-- Written by `python scripts/study.py --report`. -->",
        f"{len(rows)} runs, {hours:.1f} hours of training beside the tuning; {machines}; commit {commits}. Mean ± standard deviation over seeds.",
    ]
    for comparison in found:
        row = next(iter(comparison.groups.values())).rows[0]
        measure = "accuracy, %, trained → tested" if comparison.sign > 0 else "perplexity of held-out files"
        parts += [
            f"### {comparison.title}",
            f"{measure}; {number_of_seeds(comparison)}; {row['steps']} steps of {row['batch']}.",
            results_table(comparison),
        ]
        if equal := rivals_table(comparison):
            parts += [f"Equal parameters, {comparison.column}:", equal]
    parts += ["### Findings"]
    findings = [text for finding in FINDINGS for comparison in found for text in finding(comparison)]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in findings)]) + "\n"


def series(comparison: Comparison) -> dict[str, list[Group]]:
    """What is drawn alike: each kind of attention from narrow to wide, and the families of the others."""
    found: dict[str, list[Group]] = {}
    for group in sorted(comparison.groups.values(), key=lambda group: group.parameters):
        name = group.name.split(", as ")[0] if group.variant.family.startswith("attention") else group.variant.family
        found.setdefault(name, []).append(group)
    return found


def draw(found: list[Comparison], path: Path):
    """What each variant reaches with its parameters."""
    figure, all_axes = plt.subplots(1, len(found), figsize=(7 * len(found), 6), layout="constrained", squeeze=False)
    for comparison, axes in zip(found, all_axes.flat, strict=True):
        for name, groups in series(comparison).items():
            spreads = [group.spread(comparison.column) for group in groups]
            axes.errorbar(
                [group.parameters for group in groups],
                [spread.mean for spread in spreads],
                [spread.sd for spread in spreads],
                capsize=2,
                label=name,
                **STYLES[name],
            )
            if name.startswith("attention"):
                continue
            for group, spread in zip(groups, spreads, strict=True):
                place, color = (group.parameters, spread.mean), STYLES[name]["color"]
                axes.annotate(group.name, place, (4, 3), textcoords="offset points", fontsize=7, color=color)
        axes.set_xscale("log")
        measure = f"accuracy, %, {DYNAMIC}" if comparison.sign > 0 else "perplexity of held-out files"
        axes.set(
            xlabel="parameters", ylabel=measure, title=f"{comparison.title} ({number_of_seeds(comparison)}, ± sd)"
        )
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(runs: list[Run], path: Path) -> str:
    """Writes picture and tables beside the CSV, and the README's tables from the CSV of the project; returns the tables.

    Raises:
        ValueError: if it has no row of the runs.
    """
    found = comparisons(read_rows(path), runs)
    if not found:
        raise ValueError(f"{path} has no rows of these settings yet.")
    text = report_text(found)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if path == RESULTS:
        put_into(README, found)
    draw(found, path.with_suffix(".png"))
    return text


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument("--report", action="store_true", help="train nothing; write picture and tables beside the CSV")
    parser.add_argument("--only", choices=TASKS, help="one of the tasks")
    parser.add_argument("--seeds", type=int, default=5, help="of images")
    parser.add_argument("--text_seeds", type=int, default=3)
    parser.add_argument("--tuning_seeds", type=int, default=1, help="to choose each model's learning rate with")
    parser.add_argument("--epochs", type=int, default=SETTINGS.image_epochs, help="of images")
    parser.add_argument("--text_steps", type=int, default=SETTINGS.text_steps)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit_minutes", type=float, help="begin no run after this time")
    args = parser.parse_args(arguments)
    args.tasks = [args.only] if args.only else list(TASKS)
    return args


def main(arguments: list[str]):
    args = parse_arguments(arguments)
    settings = replace(SETTINGS, image_epochs=args.epochs, text_steps=args.text_steps)
    if not args.report:
        run_study(args, settings)
    if not (runs := plan_tests(args, settings)):
        print(f"{args.output} has nothing to report yet: the learning rates are not tuned.")
        return
    print(write_report(runs, args.output))


if __name__ == "__main__":
    main(sys.argv[1:])

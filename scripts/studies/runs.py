"""The runs of the study: which there are, what each trains, and what it measures."""

from __future__ import annotations

import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from typing import Any

import torch
from common.canvas import PLACEMENTS
from common.hardware import hardware
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training.digits import DigitCanvases, digits_split
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

from studies.examples import cut, digits_of, held_out_blocks, image_batches, text_batches, text_tokens
from studies.settings import COMPARISONS, DYNAMIC, LEARNING_RATES, RATES_BEYOND, Settings
from studies.variants import VARIANTS, Variant, build, model_fields


FIRST_TUNING_SEED = 100
MAX_GRADIENT_NORM = 1.0
# The columns that tell one run from another.
KEY = ("stage", "task", "variant", "length", "seed", "setting", "steps", "batch", "learning_rate")


@dataclass(frozen=True)
class Run:
    """One future row: a variant of a task with a seed. `length` is that of a block of text, `stage` is "tuning" or "test"."""

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
        """The same number for tuning and for testing, although tuning has fewer digits."""
        if self.task == "text":
            return self.settings.text_steps
        digits = len(digits_split()[0].first(self.settings.train_digits))
        return self.settings.image_epochs * -(-digits // self.settings.image_batch)

    @property
    def batch(self) -> int:
        if self.task == "images":
            return self.settings.image_batch
        return max(1, self.settings.text_batch * self.settings.text_lengths[0] // self.length)

    def identity(self) -> dict[str, Any]:
        """The columns that are known before the run; those of `KEY` identify it."""
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
        """A hash of what determines the result and has no column of its own."""
        names = ["weight_decay", "warmup_steps"]
        own = ["train_digits", "test_digits"]
        if self.task == "text":
            own = ["vocab_size", "train_files", "held_out_files", "held_out_blocks"]
        values = {name: getattr(self.settings, name) for name in names + own}
        text = json.dumps([values, self.fields()], sort_keys=True, default=str)
        return f"{zlib.crc32(text.encode()):08x}"


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def plan_tuning(
    tasks: Iterable[str],
    seeds: int,
    settings: Settings,
    variants: dict[str, list[Variant]] = VARIANTS,
    rows: Iterable[dict[str, str]] = (),
) -> list[Run]:
    """The runs that tune every variant's learning rate, as far as the rows so far tell.

    A variant whose best rate is the lowest or the highest of all it has tried is given one more beyond it. So the runs are
    complete once all have a row and planning anew adds none.
    """
    found = {key_of(row): row for row in rows}
    length = {"images": None, "text": settings.text_lengths[0]}

    def runs_of(task: str, variant: Variant) -> list[Run]:
        def runs_at(rates: Iterable[float]) -> list[Run]:
            every_seed = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
            return [
                Run(task, variant, seed, rate, settings, length[task], "tuning")
                for seed in every_seed
                for rate in rates
            ]

        rates = list(LEARNING_RATES[task])
        lowest, highest = rates[0] / 2**RATES_BEYOND, rates[-1] * 2**RATES_BEYOND
        while (losses := mean_losses(runs_at(rates), found)) and not any(map(math.isnan, losses.values())):
            best = min(losses, key=losses.get)
            if best == rates[0] > lowest:
                rates.insert(0, best / 2)
            elif best == rates[-1] < highest:
                rates.append(2 * best)
            else:
                break
        return runs_at(rates)

    planned = [run for task in tasks for variant in variants[task] for run in runs_of(task, variant)]
    return sorted(planned, key=lambda run: (list(TASKS).index(run.task), run.seed))


def mean_losses(runs: Iterable[Run], found: dict[tuple[str, ...], dict[str, str]]) -> dict[float, float]:
    """What tuning lowers, by learning rate: the mean over the seeds, and NaN where one of them has no row yet."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        row = found.get(key_of(run.identity()))
        loss = math.nan
        if row is not None:
            loss = float(row["perplexity"] or -float(row[DYNAMIC]))
            # A training that diverged is done, and worse than all others.
            loss = math.inf if math.isnan(loss) else loss
        losses.setdefault(run.learning_rate, []).append(loss)
    return {rate: statistics.mean(each) for rate, each in losses.items()}


def best_learning_rates(runs: list[Run], rows: Iterable[dict[str, str]]) -> dict[tuple[str, str], float]:
    """The best learning rate by task and variant, for variants with a row of each of `LEARNING_RATES` and tuning seed."""
    found = {key_of(row): row for row in rows}
    by_variant: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_variant.setdefault((run.task, run.variant.name), []).append(run)
    best = {}
    for (task, name), own in by_variant.items():
        losses = mean_losses(own, found)
        if not any(math.isnan(losses[rate]) for rate in LEARNING_RATES[task]):
            complete = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
            best[task, name] = min(complete, key=complete.get)
    return best


def plan(
    image_seeds: int,
    text_seeds: int,
    settings: Settings,
    learning_rates: dict[tuple[str, str], float],
    variants: dict[str, list[Variant]] = VARIANTS,
) -> list[Run]:
    """The runs of all variants whose learning rate is known, seed by seed."""
    runs = []
    for seed in range(max(image_seeds, text_seeds)):
        cases = [("images", None)] if seed < image_seeds else []
        cases += [("text", length) for length in settings.text_lengths] if seed < text_seeds else []
        for task, length in cases:
            for variant in variants[task]:
                if (rate := learning_rates.get((task, variant.name))) is not None:
                    runs.append(Run(task, variant, seed, rate, settings, length))
    return runs


def train(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], steps: int, learning_rate: float, settings: Settings
) -> tuple[float, float]:
    """Trains as `Trainer` does, without its overhead, which would count as a model's cost; returns wall-clock and CPU seconds."""
    # Vectors, which most biases and all norms are, have no weight decay.
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


@torch.no_grad()
def classify(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The likeliest class of each of `[N, channels, height, width]`."""
    return torch.cat([model(pixel_values=batch).logits.argmax(dim=-1) for batch in pixel_values.split(64)])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percentage of right predictions."""
    return 100 * (predictions == labels).float().mean().item()


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Tensor) -> float:
    """Perplexity of the tokens of all blocks but the first ones of each, which have no context."""
    losses = []
    for batch in blocks.split(32):
        losses.append(model(input_ids=batch, labels=batch).loss.double() * len(batch))
    # PyTorch's, which is infinite where Python's raises an error.
    return (sum(losses) / len(blocks)).exp().item()


def forward_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Operations of matrix products and convolutions in a forward pass: a multiplication and an addition are two.

    The counter does not know every fused attention of PyTorch, which the math backend replaces.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()


def run_images(run: Run) -> dict[str, Any]:
    """Trains on static (not to tune) and on dynamic digits; returns the measured columns."""
    digits, held_out = digits_of(run.stage, run.settings)
    # No epoch of any training places digits by this seed.
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
                row[comparison] = accuracy(classify(model, tests[tested_on].pixel_values()), held_out.labels)
    pixels = tests["static"][0]["pixel_values"].unsqueeze(0)
    return {
        **row,
        "parameters": model.num_parameters(),
        "forward_flops": forward_flops(model, {"pixel_values": pixels}),
    }


def run_text(run: Run) -> dict[str, Any]:
    """Trains a language model; returns the measured columns."""
    settings = run.settings
    tokens, held_out = text_tokens(settings)
    set_seed(run.seed)
    model = build(run.fields())
    batches = text_batches(cut(tokens, run.length), run.seed, run.steps, run.batch)
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
    """Initializes a process."""
    torch.set_num_threads(threads)
    circumstances.update(hardware(), processes=processes)


def execute(run: Run) -> dict[str, Any]:
    """The row of a run."""
    return stamped({**run.identity(), **TASKS[run.task](run)})


def stamped(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the circumstances of the process, and the date."""
    return {**row, **circumstances, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def execute_all(
    runs: list[Any],
    threads: int,
    processes: int,
    has_time: Callable[[], bool],
    execute: Callable[[Any], Any] = execute,
) -> Iterator[tuple[Any, Any]]:
    """Each run with what `execute` makes of it, as they are completed. No run is started once there is no time left."""
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

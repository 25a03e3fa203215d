"""The runs of the study of `from_attention`: a trained attention model that goes on as it is, or as Translution.

All models of one seed start from one trained model and see the same examples in the same order. Attention goes on for as many steps as
Translution, and for as many as take as long.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from training.digits import DigitCanvases
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification, set_seed

from studies.examples import cut, digits_of, held_out_blocks, image_batches, text_batches, text_tokens
from studies.rows import read_rows
from studies.runs import FIRST_TUNING_SEED, accuracy, classify, perplexity, stamped, train
from studies.settings import IMAGE_FIELDS, TEXT_FIELDS, Settings
from translution import TranslutionForCausalLM, TranslutionForImageClassification


# The columns that are known before a run, and those that are numbers.
KEY = ["task", "stage", "seed", "model", "source_steps", "source_learning_rate", "steps", "batch", "learning_rate"]
NUMBERS = ["seed", "source_steps", "source_learning_rate", "steps", "batch", "learning_rate"]
NUMBERS += ["parameters", "source_result", "result", "cpu_seconds"]
FIELDS = [
    *KEY, "parameters", "source_result", "result", "cpu_seconds", "threads", "processes", "device", "python", "torch", "transformers",
    "commit", "date",
]  # fmt: skip
ATTENTION, LONGER, TRANSLUTION = "attention", "attention, equal seconds", "Translution"
# Wide enough that no model chooses one at the edge.
LEARNING_RATES = {
    "images": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "text": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
}
BLOCK = 128
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Budget:
    """For how many steps, and how, a source is trained, and for how many more its models are."""

    source_steps: int
    source_learning_rate: float
    steps: int
    batch: int


BUDGETS = {"images": Budget(330, 1e-3, 330, 64), "text": Budget(400, 6e-3, 200, 16)}


class Images:
    """A ViT, trained on digits in the middle of a canvas, then on digits anywhere: accuracy on the latter, in per cent."""

    head = TranslutionForImageClassification
    conversion = {"relative_projections": "kv", "max_relative_distance": 1, "far_offsets": "shared"}
    higher_is_better = True

    def __init__(self, stage: str, settings: Settings):
        self.digits, self.held_out = digits_of(stage, settings)

    def source(self) -> PreTrainedModel:
        shared = {name: IMAGE_FIELDS[name] for name in (*SHAPE, "image_size", "patch_size", "num_channels")}
        return ViTForImageClassification(ViTConfig(**shared, num_labels=10))

    def batches(self, seed: int, steps: int, batch: int, further: bool) -> Iterator[dict[str, Tensor]]:
        canvases = DigitCanvases(self.digits, "dynamic" if further else "static", seed)
        return image_batches(canvases, seed, steps, batch)

    def result(self, model: PreTrainedModel, seed: int) -> float:
        canvases = DigitCanvases(self.held_out, "dynamic", seed=-1 - seed)
        return accuracy(classify(model, canvases.pixel_values()), self.held_out.labels)


class Text:
    """A Llama, trained on the standard library's text, then for some more steps: perplexity of held-out files."""

    head = TranslutionForCausalLM
    conversion = {"relative_projections": "kv", "max_relative_distance": 3}
    higher_is_better = False

    def __init__(self, stage: str, settings: Settings):
        tokens, held_out = text_tokens(settings)
        self.blocks, self.held_out = cut(tokens, BLOCK), held_out_blocks(held_out, BLOCK, stage, settings)
        self.vocab_size = settings.vocab_size

    def source(self) -> PreTrainedModel:
        shared = {name: TEXT_FIELDS[name] for name in SHAPE}
        return LlamaForCausalLM(LlamaConfig(**shared, vocab_size=self.vocab_size, max_position_embeddings=BLOCK))

    def batches(self, seed: int, steps: int, batch: int, further: bool) -> Iterator[dict[str, Tensor]]:
        # In another order, or the blocks of the first steps would come twice.
        return text_batches(self.blocks, seed + 1000 * further, steps, batch)

    def result(self, model: PreTrainedModel, seed: int) -> float:
        return perplexity(model, self.held_out)


TASKS = {"images": Images, "text": Text}


@dataclass(frozen=True)
class Further:
    """One model's training from the source on."""

    model: str
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Job:
    """All trainings that start from one source, which is trained once for them; a row each."""

    task: str
    stage: str
    seed: int
    runs: tuple[Further, ...]
    settings: Settings
    budget: Budget

    @property
    def title(self) -> str:
        return f"{self.stage}, {self.task}, seed {self.seed}, {len(self.runs)} models"

    def identity(self, run: Further) -> dict[str, Any]:
        """The columns of `KEY`."""
        known = {**vars(self.budget), **vars(run), **vars(self)}
        return {name: known[name] for name in KEY}


def execute(job: Job) -> list[dict[str, Any]]:
    """The rows of a job."""
    task, budget = TASKS[job.task](job.stage, job.settings), job.budget
    set_seed(job.seed)
    source = task.source()
    batches = task.batches(job.seed, budget.source_steps, budget.batch, further=False)
    train(source, batches, budget.source_steps, budget.source_learning_rate, job.settings)
    source_result = task.result(source, job.seed)
    rows = []
    for run in job.runs:
        set_seed(job.seed)
        model = copy.deepcopy(source)
        if run.model == TRANSLUTION:
            model = task.head.from_attention(model, **task.conversion)
        batches = task.batches(job.seed, run.steps, budget.batch, further=True)
        _, seconds = train(model, batches, run.steps, run.learning_rate, job.settings)
        measured = {"source_result": source_result, "result": task.result(model, job.seed), "cpu_seconds": seconds}
        rows.append(stamped({**job.identity(run), **measured, "parameters": model.num_parameters()}))
    return rows


def frame_of(path: Path) -> pd.DataFrame:
    """The rows of a CSV with numbers as numbers."""
    frame = pd.DataFrame(read_rows(path, FIELDS), columns=FIELDS)
    frame[NUMBERS] = frame[NUMBERS].apply(pd.to_numeric)
    return frame


class Plan:
    """The runs of a task: which there are depends on the rows of those before."""

    def __init__(self, task: str, seeds: int, tuning_seeds: int, settings: Settings, budget: Budget, path: Path):
        self.task, self.settings, self.budget, self.path = task, settings, budget, path
        self.seeds = {"tuning": range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds), "test": range(seeds)}

    def rows(self, stage: str) -> pd.DataFrame:
        """The rows there are, of this budget and these seeds."""
        frame = frame_of(self.path)
        mine = (frame["task"] == self.task) & (frame["stage"] == stage) & frame["seed"].isin(self.seeds[stage])
        for name in ("source_steps", "source_learning_rate", "batch"):
            mine &= frame[name] == getattr(self.budget, name)
        return frame[mine]

    def _missing(self, stage: str, runs: Iterable[Further]) -> list[Job]:
        finished = set(
            self.rows(stage)[["seed", "model", "steps", "learning_rate"]].itertuples(index=False, name=None)
        )
        jobs = [Job(self.task, stage, seed, tuple(runs), self.settings, self.budget) for seed in self.seeds[stage]]
        left = [
            replace(job, runs=tuple(run for run in job.runs if (job.seed, *vars(run).values()) not in finished))
            for job in jobs
        ]
        return [job for job in left if job.runs]

    def tuning(self) -> list[Job]:
        """What is missing of the tuning of the two models that train for as many steps."""
        rates = LEARNING_RATES[self.task]
        models = (ATTENTION, TRANSLUTION)
        return self._missing("tuning", [Further(name, self.budget.steps, rate) for name in models for rate in rates])

    def tuning_of_longer(self) -> list[Job]:
        """What is missing of the tuning of attention that trains for as many seconds."""
        return self._missing(
            "tuning", [Further(LONGER, self.equal_seconds(), rate) for rate in LEARNING_RATES[self.task]]
        )

    def tests(self) -> list[Job]:
        """What is missing of the test runs."""
        return self._missing("test", self.best())

    def equal_seconds(self) -> int:
        """For how many steps attention trains in Translution's processor time, by the medians of the tuning; in tens."""
        rows = self.rows("tuning")
        seconds = rows[rows["model"] != LONGER].groupby("model")["cpu_seconds"].median()
        return 10 * round(self.budget.steps * seconds[TRANSLUTION] / seconds[ATTENTION] / 10)

    def best(self) -> list[Further]:
        """Each model with its steps and the learning rate that is best in the mean of the tuning seeds."""
        rows, sign = self.rows("tuning"), 1 if TASKS[self.task].higher_is_better else -1
        found = []
        for name in (ATTENTION, LONGER, TRANSLUTION):
            steps = self.equal_seconds() if name == LONGER else self.budget.steps
            own = rows[(rows["model"] == name) & (rows["steps"] == steps)]
            found.append(Further(name, steps, float((sign * own.groupby("learning_rate")["result"].mean()).idxmax())))
        return found


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draws each seed's source and the models that start from it, from the rows of the tests."""
    labels = ["source", ATTENTION, LONGER.replace(", ", ",\n"), TRANSLUTION]
    tasks = [name for name in TASKS if name in set(frame["task"])]
    figure = Figure(figsize=(6 * len(tasks), 4.5), layout="constrained")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False).flat, strict=True):
        for seed, group in frame[frame["task"] == task].groupby("seed"):
            results = group.set_index("model")["result"]
            values = [
                group["source_result"].iloc[0],
                *(results.get(name) for name in (ATTENTION, LONGER, TRANSLUTION)),
            ]
            axes.plot(labels, values, "o-", label=f"seed {seed}", alpha=0.7)
        measure = "accuracy on digits anywhere, %" if TASKS[task].higher_is_better else "perplexity of held-out files"
        axes.set(title=task, ylabel=measure)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)

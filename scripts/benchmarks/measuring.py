"""What every benchmark shares: time, memory, and how far a result is from the truth."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


# Columns of the results. Times are in milliseconds, memory in MiB above where the process stood; `times_…` are quotients of
# medians of one run: of the row named and this one, or of this one and its floor.
FIELDS = [
    "suite", "case", "implementation", "passes", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "repeats",
    "peak_mib", "times_floor", "times_attention", "times_bound", "times_gather", "times_published", "tokens_per_second",
    "cache_bytes_per_token", "times_no_cache", "times_gpt2", "parameters", "times_rotary", "times_rotary_memory", "error", "dtype", "threads", "device", "torch", "transformers",
    "python", "commit",
]  # fmt: skip
FORWARD, BOTH = "forward", "forward+backward"


def peak_memory(run: Callable[[], object]) -> float | None:
    """Peak of the process above where it stood before `run`, in MiB; `None` where the system does not tell."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        return None

    def field(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier runs freed must not hide what this one takes
    clear.write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    run()
    return field("VmHWM") - before


def time_in_turn(
    runs: dict[str, Callable[[], object]], repeats: dict[str, int], warm_up: Iterable[str] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turn, so that a drift of the machine meets all of them.

    Before, each of `warm_up`, by default all of them, runs once.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs if warm_up is None else warm_up:
        runs[name]()
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn < repeats[name]:
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def spread(times: list[float]) -> dict[str, float | int]:
    """The columns that a list of times fills."""
    lower, _, upper = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": statistics.median(times),
        "lower_quartile_ms": lower,
        "upper_quartile_ms": upper,
        "repeats": len(times),
    }


def measure(
    case: str, passes: str, runs: dict[str, Callable[[], object]], repeats: dict[str, int]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The columns that all suites share, by the name of a run, and the median times. What measures memory warms up."""
    memory = {name: peak_memory(run) for name, run in runs.items()}
    times = time_in_turn(runs, repeats, warm_up=())
    rows = {
        name: {"case": case, "implementation": name, "passes": passes, **spread(each), "peak_mib": memory[name]}
        for name, each in times.items()
    }
    return rows, {name: row["median_ms"] for name, row in rows.items()}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """`|value - expected| / |expected|`, in float64."""
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def worst_error(values: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error of several results, and NaN where one of them is."""
    errors = [relative_error(value, truth) for value, truth in zip(values, expected, strict=True)]
    return torch.tensor(errors, dtype=torch.float64).max().item()


def stop_if_wrong(name: str, error: float, threshold: float = 1e-4) -> None:
    """Ends the program where a result is further from the truth than rounding explains: nothing wrong is timed."""
    if not error < threshold:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}, allowed {threshold:.0e}. Nothing timed.")


def step(run: Callable[[], Tensor], inputs: Iterable[Tensor], backward: bool) -> Callable[[], Any]:
    """`run` without gradients, or with those of the sum of its output by `inputs`."""
    inputs = list(inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> tuple[Tensor, ...]:
        output = run()
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    return both if backward else forward


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Forward and backward. As optimizers do, each step makes its gradients anew."""
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()

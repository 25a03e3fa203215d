"""Rows that are written as they are measured, and times of a GPU's own clock."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import spread, time_in_turn
from common.hardware import hardware
from common.tables import write_csv

from gpu.cases import DTYPES
from gpu.recording import first_line


try:
    import triton
except ImportError:
    triton = None

FIELDS = [
    "part", "case", "implementation", "kernel", "place", "passes", "dtype", "tile", "ok", "error", "error_plain", "median_ms", "lower_quartile_ms",
    "upper_quartile_ms", "repeats", "useful_gflop", "executed_gflop", "mbytes", "tflops", "gbytes_per_second", "share", "times_rival", "rival",
    "peak_gib", "images_per_second", "accuracy", "registers", "spills", "shared", "blocks", "note", "gpu", "triton", "cuda", "torch",
    "transformers", "python", "commit",
]  # fmt: skip
# Larger than the L2 cache of any GPU that the kernels run on.
FLUSHED_BYTES = 1 << 28


class OutOfTimeError(Exception):
    """A part's time is over."""


class BrokenDeviceError(Exception):
    """The device answers no more: what comes next in this process would fail too."""


class Bench:
    """Where to run, how long, and where rows go.

    Args:
        device: a GPU, or the CPU of a dry run.
        output: the CSV. Rows that are there stay, but for those of parts that run again.
        part: the part that runs.
        seconds: how long it may take.
        only: the cases to take, those whose name has this in it.
    """

    def __init__(self, device: torch.device, output: Path, part: str, seconds: float, only: str = ""):
        self.device, self.output, self.part, self.only = device, output, part, only
        self.dry = device.type == "cpu"
        self.deadline = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.peak: float | None = None
        gpu = "none" if self.dry else torch.cuda.get_device_name(device)
        versions = {"triton": None if triton is None else triton.__version__, "cuda": torch.version.cuda, "gpu": gpu}
        self.common = {**hardware(), **versions}
        write_csv(output, FIELDS, [row for row in read_rows(output) if row.get("part") != part])
        self._flushed = torch.empty(64 if self.dry else FLUSHED_BYTES, dtype=torch.int8, device=device)

    @property
    def half_name(self) -> str:
        """The type to time in. Triton's interpreter cannot multiply bfloat16."""
        return "float16" if self.dry else "bfloat16"

    @property
    def half(self) -> torch.dtype:
        return DTYPES[self.half_name]

    def row(self, **values: Any) -> None:
        """Writes a row to the file, at once."""
        values = {"part": self.part, **values}
        self.rows.append(values)
        with self.output.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n").writerow(self.common | values)
            file.flush()
            os.fsync(file.fileno())
        print(" ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()), flush=True)  # fmt: skip

    @contextmanager
    def guarded(self, **values: Any) -> Iterator[None]:
        """What fails within is a row, and what comes after it goes on.

        Raises:
            OutOfTimeError: where the part's time is over.
            BrokenDeviceError: where the device answers no more.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        try:
            yield
            if not self.dry:
                torch.cuda.synchronize()
        except (OutOfTimeError, BrokenDeviceError):
            raise
        except Exception as error:
            self.row(**values, ok=False, note=first_line(error))
            if not self.dry:
                self._go_on(error)

    def _go_on(self, error: Exception) -> None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise BrokenDeviceError(first_line(error)) from error

    def cases(self, cases: Sequence[Any]) -> list[Any]:
        """Those that are asked for."""
        return [case for case in cases if self.only in case.name]

    def time(self, run: Callable[[], object], repeats: int = 15) -> dict[str, Any]:
        """The columns of times after two runs to warm up, and the peak of memory above the start in GiB.

        Each run starts with nothing of its input in the L2 cache, and is timed by events on the device.
        """
        if self.dry:
            return spread(time_in_turn({"": run}, {"": 1}, warm_up=())[""])
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            self._flushed.zero_()
            start.record()
            run()
            stop.record()
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        return {**spread([start.elapsed_time(stop) for start, stop in pairs]), "peak_gib": peak}

    def rates(self, timing: dict[str, Any], operations: float | None, executed: float | None = None) -> dict[str, Any]:
        """The columns of operations: how many, useful and executed, and those useful of a second beside the product's."""
        columns: dict[str, Any] = {"executed_gflop": None if executed is None else executed / 1e9}
        if operations:
            tflops = operations / timing["median_ms"] / 1e9
            columns |= {"useful_gflop": operations / 1e9, "tflops": tflops, "share": tflops / self.product_rate()}
        return columns

    def product_rate(self) -> float:
        """TFLOP/s of a large product, measured once in each process, as a row of the part that asks first."""
        if self.peak is None:
            size = 64 if self.dry else 8192
            left, right = torch.randn(2, size, size, device=self.device, dtype=self.half)
            timing = self.time(lambda: left @ right)
            self.peak = 2 * size**3 / timing["median_ms"] / 1e9
            self.row(case=f"{size}³ product", dtype=self.half_name, tflops=self.peak, **timing)
        return self.peak


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file. A row that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]

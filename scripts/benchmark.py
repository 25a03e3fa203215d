"""Benchmarks that verify before they time, and time baselines in the same run.

    python scripts/benchmark.py                             # every suite
    python scripts/benchmark.py --suite operator --repeats 9 --output results.csv
    python scripts/benchmark.py --picture lengths.png --output results.csv      # draws rows of a CSV, times nothing

Suites:
    operator    full Translution alone, against gathering a matrix per pair and the bare matrix products
    layer       a layer of every mixer, from the demo's size to "base"
    training    forward and backward of whole models
    length      a layer over texts of growing length, with and without a distance
    generation  tokens a second with and without a cache, against a GPT-2 of Transformers
    local       local Translution against rotary attention of as many parameters: training steps, memory and generation

Every row of the CSV carries the median and quartiles in milliseconds, the peak memory above the start in MiB, and hardware,
threads, versions and commit. Times of different rows are comparable within one run alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.generation import generation_suite
from benchmarks.length import LENGTHS, draw, length_suite
from benchmarks.local import local_suite
from benchmarks.measuring import FIELDS
from benchmarks.models import layer_suite, training_suite
from benchmarks.operator import operator_suite
from common.command import ArgumentParser, run_command
from common.hardware import hardware
from common.tables import write_csv


SUITES = {
    "operator": operator_suite,
    "layer": layer_suite,
    "training": training_suite,
    "length": length_suite,
    "generation": generation_suite,
    "local": local_suite,
}


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of the suite length")
    parser.add_argument("--patience", type=float, default=15, help="seconds a step of the suite length may take")
    parser.add_argument("--memory", type=float, default=6000, help="MiB a mixer of the suite length may need")
    parser.add_argument("--output", type=Path, default=None, help="CSV to write")
    parser.add_argument(
        "--picture", type=Path, default=None, help="only draw the results of the suite `length` in the CSV"
    )
    options = parser.parse_args(arguments)
    for name, values in (
        ("repeats", [options.repeats]),
        ("threads", [options.threads]),
        ("lengths", options.lengths),
    ):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    if options.picture is not None:
        if options.output is None or not options.output.is_file():
            parser.error(f"--output must be a CSV with results to draw, got {options.output}")
        draw(options.output, options.picture)
        return
    torch.set_num_threads(options.threads)
    facts = hardware()
    rows = []
    for suite in options.suite:
        for row in SUITES[suite](options):
            rows.append({"suite": suite, "dtype": "float32", **row, **facts})
            print_row(rows[-1])
            if options.output is not None:
                # After every row, so that a run that is stopped keeps its results.
                write_csv(options.output, FIELDS, map(rounded, rows))


def rounded(row: dict) -> dict:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}


def print_row(row: dict) -> None:
    parts = [f"{row['case']:36} {row['passes']:17} {row['implementation']:20} {row['median_ms']:10.2f} ms"]
    for field, words in (
        ("times_floor", "× floor"),
        ("times_attention", "× attention"),
        ("times_rotary", "× rotary attention"),
        ("times_rotary_memory", "× its memory"),
        ("times_bound", "× bound"),
        ("times_gather", "× gather's speed"),
        ("times_published", "× gather-matmul's"),
        ("tokens_per_second", "tokens/s"),
        ("times_no_cache", "× without"),
        ("times_gpt2", "× GPT-2's speed"),
        ("cache_bytes_per_token", "B/token"),
        ("peak_mib", "MiB"),
    ):
        if row.get(field) is not None:
            parts.append(f"{row[field]:7.2f} {words}")
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    run_command(main)

"""Trains all models of a table one after the other, and collects their figures.

    python scripts/sweep.py scripts/recipes/sweeps/mnist.yaml --output_dir runs/mnist-table
    python scripts/sweep.py scripts/recipes/sweeps/mnist.yaml --only "static, full" "dynamic, full" --output_dir runs/two
    python scripts/sweep.py scripts/recipes/sweeps/imagenet.yaml --estimate

Rerun the command to resume: finished runs are skipped, an unfinished one goes on from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.command import ArgumentParser, run_command
from common.intervals import interval_words, student_interval
from common.saved_files import RUN, read_json, write_json
from common.tables import markdown, write_csv
from common.training_hours import PEAK, SHARE, TRANSLUTION_SHARE
from common.training_memory import unallocated
from studies.sweep_file import Row, Sweep, require_names
from training.model_card import OVER_SEEDS, write_model_card
from transformers import AutoConfig

import translution  # noqa: F401 (registers the Auto classes)


TABLE, OPTIONS = "table.csv", "options.json"
FIRST, LAST = ("name", "parameters", "seeds"), ("seconds", "commit")
SPREAD, INTERVAL = "_std", "_interval"


def run_row(sweep: Sweep, row: Row, output: Path) -> None:
    """Does what is missing of a row.

    Raises:
        ValueError: if its folder has runs with other options.
    """
    record = output / row.name / OPTIONS
    # As they are read back.
    options = json.loads(json.dumps({**row.options, "evaluates": row.evaluates}))
    before = read_json(record) if record.is_file() else options
    for name in sorted(options.keys() | before.keys()):
        if options.get(name) != before.get(name):
            raise ValueError(
                f"The row {row.name!r}: `{name}` must be {before.get(name)!r} as before, got {options.get(name)!r}. Give "
                f"another `--output_dir`, or delete {record.parent}."
            )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, options)
    for seed in row.seeds:
        if not row.result(output, seed).is_file():
            print(f"\n== {row.name}, seed {seed}", flush=True)
            sweep.script.main(row.arguments(output, seed))
            # A model and its trainer refer to each other, and would keep their memory.
            gc.collect()


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % interval of a figure; one seed has only a mean."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "interval": student_interval(values)}


def tell_cards(row: Row, output: Path) -> None:
    """Writes the figures over all seeds of a finished row to `run.json` and the card of each of its models."""
    if len(row.trained_seeds) < 2:
        return
    folders = [row.trained(output, seed) for seed in row.seeds]
    runs = [read_json(folder / RUN) for folder in folders]
    figures = {name: over_seeds([run["metrics"][name] for run in runs]) for name in runs[0]["metrics"]}
    # As they are read back.
    told = json.loads(json.dumps({"seeds": row.seeds, "metrics": figures}))
    for folder, run in zip(folders, runs, strict=True):
        # A card that says so stays as it is.
        if run.get(OVER_SEEDS) != told:
            write_json(folder / RUN, {**run, OVER_SEEDS: told})
            write_model_card(folder)


def collect(row: Row, output: Path) -> dict[str, Any] | None:
    """The figures of a row's finished runs: means, sample standard deviations and 95 % intervals; None if there are no runs."""
    seeds = [seed for seed in row.seeds if row.result(output, seed).is_file()]
    if not seeds:
        return None
    folders = [row.trained(output, seed) for seed in seeds]
    runs = [read_json(folder / RUN) for folder in folders]
    metrics = [run["metrics"] for run in runs]
    if row.evaluates is not None:
        found = [read_json(row.result(output, seed)) for seed in seeds]
        metrics = [{name: one[f"eval_{name}"] for name in metrics[0]} for one in found]
    # Unknown for a resumed run, and none of a row that trains nothing.
    seconds = [run["seconds"] if row.evaluates is None else None for run in runs]
    figures = {
        "name": row.name,
        "parameters": unallocated(AutoConfig.from_pretrained(folders[0])).num_parameters(),
        "seeds": len(seeds),
        "seconds": None if None in seconds else statistics.fmean(seconds),
        "commit": " ".join(sorted({str(run["commit"]) for run in runs})),
    }
    for name in metrics[0]:
        found = over_seeds([one[name] for one in metrics])
        figures |= {name: found["mean"], name + SPREAD: found["std"], name + INTERVAL: found["interval"]}
    return figures


def write_table(rows: Sequence[Row], output: Path) -> str:
    """Writes the figures of finished runs as CSV, and returns them as Markdown."""
    found = [figures for row in rows if (figures := collect(row, output)) is not None]
    columns = [name for name in dict.fromkeys(name for one in found for name in one) if name not in FIRST + LAST]
    # With the shortest decimals that name the floats.
    written = [
        {name: interval_words(value, "") if name.endswith(INTERVAL) else value for name, value in one.items()}
        for one in found
    ]
    write_csv(output / TABLE, [*FIRST, *columns, *LAST], written)
    shown = [*FIRST, *(name for name in columns if not name.endswith(SPREAD)), *LAST]
    return markdown(shown, ([cell(one, name) for name in shown] for one in found))


def cell(figures: dict[str, Any], name: str) -> str:
    """A figure of the Markdown table, with its standard deviation if there is one; or a figure's interval."""
    value, std = figures.get(name), figures.get(name + SPREAD)
    if name.endswith(INTERVAL) and name in figures:
        return interval_words(value, ".4g")
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
    return text if std is None else f"{text} ± {std:.2g}"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="YAML file of the table's rows")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs and of the table")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows, by name; all of them if not given")
    parser.add_argument(
        "--estimate", action="store_true", help="print estimated hours on one H100 or H200, and train nothing"
    )
    args = parser.parse_args(arguments)
    if args.output_dir is None and not args.estimate:
        parser.error("--output_dir must be given, unless with --estimate")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    sweep = Sweep.read(args.sweep)
    require_names("`--only`", args.only or [], [row.name for row in sweep.rows])
    rows = [row for row in sweep.rows if args.only is None or row.name in args.only]
    if args.estimate:
        hours = [(row.name, str(len(row.seeds)), f"{sweep.hours(row):.2g}") for row in rows]
        print(markdown(["name", "runs", "hours"], hours))
        print(
            f"Estimated, not measured: counted operations at {SHARE:.0%} of the {PEAK / 1e12:.0f} TFLOP/s of an H100 or H200 in bfloat16 "
            f"(`--bf16 true`), and {TRANSLUTION_SHARE:.0%} for Translution's own operators. A lower bound: reading data, for one, is left out."
        )
        return
    for row in rows:
        run_row(sweep, row, args.output_dir)
        tell_cards(row, args.output_dir)
        table = write_table(sweep.rows, args.output_dir)
    print(f"\n{table}")


if __name__ == "__main__":
    run_command(main)

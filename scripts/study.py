"""Compares all mixers: at the same width, and with attention widened to the same number of parameters.

    python scripts/study.py --processes 2        # appends a row per run to scripts/results/study.csv; resumes if stopped
    python scripts/study.py --study local --processes 2      # local Translution and its rivals, in a CSV of its own
    python scripts/study.py --report             # tables and figure of the rows so far

Images: handwritten digits in the middle of a canvas ("static") or anywhere on it ("dynamic"). Text: the source text of
Python's standard library, in two block lengths.

All models of a task are trained alike; those of one seed see the same examples in the same order. Only the learning rate is
each model's own: a rate that suits a narrow model of one kind puts a wide one of another kind at a disadvantage. All are
tuned the same way first, with other seeds, on examples that are used for neither training nor testing; where the lowest or the
highest rate is the best, tuning goes on beyond it. Runs go seed by seed, so that an unfinished study is a fair comparison too.

A row is one run: for images a training on static and one on dynamic digits (only the latter for tuning), for text one training.
`train_seconds` and `cpu_seconds` are sums over the trainings of a row, `forward_flops` those of one image or block of text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.command import ArgumentParser, require_least, run_command
from studies.report import comparisons, draw, report, write_between_markers
from studies.rows import append_row, read_rows
from studies.runs import TASKS, Run, best_learning_rates, execute_all, key_of, plan, plan_tuning
from studies.settings import DYNAMIC, SETTINGS, Settings
from studies.variants import STUDIES, Variant
from tqdm.auto import tqdm


RESULTS = Path(__file__).parent / "results" / "study.csv"
LOCAL_RESULTS = RESULTS.with_name("local_study.csv")
DOCS = Path(__file__).parents[1] / "docs"
# Where the tables of each study go.
PAGES = {RESULTS: DOCS / "study.md", LOCAL_RESULTS: DOCS / "local.md"}


def do_missing(runs: list[Run], path: Path, threads: int, processes: int, has_time: Callable[[], bool]):
    """Executes the runs that have no row yet."""
    finished = {key_of(row) for row in read_rows(path)}
    missing = [run for run in runs if key_of(run.identity()) not in finished]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", dynamic_ncols=True) as bar:
        for run, row in execute_all(missing, threads, processes, has_time):
            append_row(path, row)
            figure = f"perplexity {row['perplexity']:.1f}" if run.task == "text" else f"{row[DYNAMIC]:.1f} %"
            bar.write(f"{run.title}: {figure}, {row['parameters']:,} parameters, {row['train_seconds']:.0f} s")
            bar.update()


def chosen_variants(args: argparse.Namespace) -> dict[str, list[Variant]]:
    """The variants of the study by task; where some are named, those alone."""
    variants = STUDIES[args.study]
    if not args.variants:
        return variants
    return {task: [one for one in variants[task] if one.name in args.variants] for task in variants}


def plan_tests(args: argparse.Namespace, settings: Settings) -> list[Run]:
    """The test runs of all variants whose tuning is complete."""
    variants, rows = chosen_variants(args), read_rows(args.output)
    tuning = plan_tuning(args.tasks, args.tuning_seeds, settings, variants, rows)
    return plan(args.seeds, args.text_seeds, settings, best_learning_rates(tuning, rows), variants)


def run_study(args: argparse.Namespace, settings: Settings):
    """Tunes, then tests; runs that have a row in the CSV are skipped."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def has_time() -> bool:
        return args.limit_minutes is None or time.perf_counter() - start < 60 * args.limit_minutes

    def tuning() -> list[Run]:
        return plan_tuning(args.tasks, args.tuning_seeds, settings, chosen_variants(args), read_rows(args.output))

    planned: list[Run] = []
    while has_time() and (now := tuning()) != planned:
        planned = now
        do_missing(planned, args.output, args.threads, args.processes, has_time)
    # Tests of the variants that happen to be tuned would be no comparison.
    if has_time():
        do_missing(plan_tests(args, settings), args.output, args.threads, args.processes, has_time)


def write_report(runs: list[Run], path: Path) -> str:
    """Draws the figure beside the CSV, writes the tables, and returns them.

    Tables go into the page that `PAGES` names, those of another CSV into a Markdown file beside it.

    Raises:
        ValueError: if the CSV has no row of the runs.
    """
    found = comparisons(read_rows(path), runs)
    if not found:
        raise ValueError(f"{path} has no rows of these settings yet.")
    text = report(found)
    if path in PAGES:
        write_between_markers(PAGES[path], text)
    else:
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(found, path.with_suffix(".png"))
    return text


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--study", choices=STUDIES, default="mixers", help="which models")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some models, by name; all of them if not given")
    parser.add_argument(
        "--output", type=Path, help=f"CSV with the rows; {RESULTS.name} or {LOCAL_RESULTS.name} if not given"
    )
    parser.add_argument("--report", action="store_true", help="only write tables and figure")
    parser.add_argument("--only", choices=TASKS, help="one of the tasks")
    parser.add_argument("--seeds", type=int, default=5, help="seeds for images; 0 leaves them out")
    parser.add_argument("--text_seeds", type=int, default=3, help="seeds for text; 0 leaves it out")
    parser.add_argument("--tuning_seeds", type=int, default=1, help="seeds to tune each learning rate with")
    parser.add_argument("--epochs", type=int, default=SETTINGS.image_epochs, help="epochs for images")
    parser.add_argument("--text_steps", type=int, default=SETTINGS.text_steps, help="steps for text")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit_minutes", type=float, help="start no run after this time")
    args = parser.parse_args(arguments)
    known = {one.name for variants in STUDIES[args.study].values() for one in variants}
    if unknown := sorted(set(args.variants or ()) - known):
        parser.error(
            f"--variants must be of {', '.join(map(repr, sorted(known)))}; got {', '.join(map(repr, unknown))}"
        )
    if args.output is None:
        args.output = LOCAL_RESULTS if args.study == "local" else RESULTS
    require_least(args, seeds=0, text_seeds=0, tuning_seeds=1, epochs=1, text_steps=1, threads=1, processes=1)
    seeds = {"images": args.seeds, "text": args.text_seeds}
    args.tasks = [task for task in TASKS if seeds[task] and args.only in (None, task)]
    chosen = chosen_variants(args)
    if not any(chosen[task] for task in args.tasks):
        parser.error(
            f"`--variants`, `--only`, `--seeds` and `--text_seeds` must leave something to train; of "
            f"{', '.join(args.tasks) or 'no task'} they leave no model."
        )
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
    run_command(main)

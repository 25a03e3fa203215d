"""Trained attention models that are trained further, as they are and as Translution.

    python scripts/from_attention_study.py --processes 2      # a row per run in scripts/results/from_attention.csv; resumes if stopped
    python docs/tables.py                                     # the table of docs/from_attention.md

Images: a ViT of Transformers, trained on handwritten digits in the middle of a canvas, then on digits anywhere. Text: a Llama, trained
on the source text of Python's standard library, then for some more steps. Each model's learning rate is tuned with other seeds, on
examples that are used for neither training nor testing; the figure beside the CSV has a line per seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common.command import ArgumentParser, run_command
from studies import from_attention
from studies.from_attention import BUDGETS, TASKS, Plan, draw, frame_of
from studies.rows import append_row
from studies.runs import execute_all
from studies.settings import SETTINGS
from tqdm.auto import tqdm


RESULTS = Path(__file__).parent / "results" / "from_attention.csv"


def run_study(plans: list[Plan], args: argparse.Namespace) -> None:
    """Tunes, then tests; runs that have a row in the CSV are skipped."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def has_time() -> bool:
        return args.limit_minutes is None or time.perf_counter() - start < 60 * args.limit_minutes

    for stage in (Plan.tuning, Plan.tuning_of_longer, Plan.tests):
        jobs = [job for plan in plans for job in stage(plan)]
        with tqdm(total=len(jobs), unit="job", dynamic_ncols=True) as bar:
            for job, rows in execute_all(jobs, args.threads, args.processes, has_time, from_attention.execute):
                for row in rows:
                    append_row(args.output, row, from_attention.FIELDS)
                    bar.write(f"{job.title}: {row['model']}, rate {row['learning_rate']:g}: {row['result']:.1f}")
                bar.update()
        # Models that happen to be tuned would be no comparison.
        if any(stage(plan) for plan in plans):
            return


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV with the rows")
    parser.add_argument("--only", choices=TASKS, help="one of the tasks")
    parser.add_argument("--seeds", type=int, default=5, help="seeds to test with")
    parser.add_argument("--tuning_seeds", type=int, default=2, help="seeds to tune each learning rate with")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time")
    parser.add_argument("--limit_minutes", type=float, help="start no job after this time")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    tasks = [args.only] if args.only else list(TASKS)
    plans = [Plan(task, args.seeds, args.tuning_seeds, SETTINGS, BUDGETS[task], args.output) for task in tasks]
    run_study(plans, args)
    rows = frame_of(args.output)
    tests = rows[rows["stage"] == "test"]
    if tests.empty:
        print(f"{args.output} has nothing to draw yet: the learning rates are not tuned.")
        return
    draw(tests, args.output.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)

"""Checks the CUDA kernels on the GPU that is there, times them, tunes them and trains with them: one CSV, written row by row.

    python scripts/gpu_check.py                        # all parts, in the order of their value: scripts/results/gpu.csv
    python scripts/gpu_check.py --part smoke time      # some
    TRITON_INTERPRET=1 python scripts/gpu_check.py --dry_run --output dry.csv   # tiny, on a CPU: does the script run?
    python scripts/gpu_check.py --precompile kernels         # on a machine without a GPU: compiles what the parts launch
    python scripts/gpu_check.py --compiled kernels.tar.xz    # on the GPU's: loads that
    python scripts/gpu_check.py --predict                    # without a GPU: scripts/results/gpu_kernels.csv

Parts: `rates` of products and copies; `smoke`, a dozen checks against float64; `time`, mixers and kernels against their rivals; `sweep`,
tiles, the best of which go to `modeling/kernels/tuned.json`; `train`, whole steps; `verify`, other types, streams, graphs, compilation and
large sizes; `scale`, two processes. Each runs in a process of its own, which is stopped when its time is over.

What fails is a row with the first line of its error, and what comes after it goes on. A case whose results are wrong is not timed: errors
are those of outputs and of all gradients, and at most twice those of plain PyTorch in the same type.

`useful_gflop` counts the operations of the definition (`operators/flops.py`), `executed_gflop` those of matrix products that kernels
execute, with what they compute again; `share` is of the rate that an 8192³ product of the same run reaches in bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from common.command import ArgumentParser, run_command


RESULTS = Path(__file__).parent / "results"
# Seconds that a process may take to start and to end, beyond those of its part.
GRACE = 60


def make_parser() -> ArgumentParser:
    from gpu.parts import PARTS

    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "gpu.csv", help="rows of parts that do not run again are kept"
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="begin no part, or compile no more, after this time"
    )
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU, with Triton's interpreter")
    parser.add_argument("--compiled", type=Path, help="kernels that `--precompile` made, its folder or its archive")
    parser.add_argument(
        "--precompile",
        type=Path,
        help="compile into this folder and an archive of it, without a GPU, and do nothing else",
    )
    parser.add_argument(
        "--predict",
        action="store_true",
        help="write what each kernel takes and how long it should, without a GPU, and do nothing else",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    return parser


def main(arguments: list[str]) -> int:
    try:
        import triton
    except ImportError as error:
        raise ImportError("there is no Triton: install `triton`, which PyTorch for CUDA brings along.") from error
    args = make_parser().parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.precompile is not None or args.predict:
        if interpreted:
            raise ValueError("`--precompile` and `--predict` need Triton's compiler: unset TRITON_INTERPRET.")
        return predict(args) if args.predict else precompile(args, triton.__version__)
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("there is no GPU; `--dry_run` with TRITON_INTERPRET=1 tries the script on a CPU.")
    if args.dry_run and not interpreted:
        raise ValueError("`--dry_run` needs Triton's interpreter: set TRITON_INTERPRET=1.")
    if args.compiled is not None:
        args.compiled = use_compiled(args.compiled, triton.__version__)
    if args.dry_run or len(args.part) == 1:
        return max(run_part(args, part) for part in args.part)
    return run_apart(args, arguments)


def run_part(args, part: str) -> int:
    """Runs a part; 1 if one of its checks failed."""
    from gpu.bench import Bench, BrokenDeviceError, OutOfTimeError
    from gpu.parts import PARTS
    from gpu.recording import first_line

    run, seconds = PARTS[part]
    bench = Bench(torch.device("cpu" if args.dry_run else "cuda"), args.output, part, seconds, args.case)
    start = time.monotonic()
    torch.manual_seed(0)
    try:
        run(bench)
        note = "done"
    except OutOfTimeError:
        note = f"out of time after {seconds:.0f} s"
    except BrokenDeviceError as error:
        note = f"the device answers no more: {error}"
    except Exception as error:
        note = first_line(error)
    bench.row(case="end of the part", ok=note == "done", note=f"{note}, {time.monotonic() - start:.0f} s")
    failed = sum(row.get("ok") is False for row in bench.rows)
    print(f"{part}: {len(bench.rows)} rows in {args.output}, {failed} of them failures")
    return int(failed > 0)


def run_apart(args, arguments: list[str]) -> int:
    """Runs each part in a process of its own: a kernel that breaks the device's context, or hangs, costs one part."""
    from gpu.parts import PARTS

    deadline, status = time.monotonic() + 60 * args.minutes, 0
    common = ["--output", str(args.output), "--case", args.case]
    common += [] if args.compiled is None else ["--compiled", str(args.compiled)]
    for part in args.part:
        if time.monotonic() > deadline:
            print(f"{part}: not begun, out of time")
            status = 1
            continue
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, *common]
        try:
            status |= subprocess.run(command, timeout=PARTS[part][1] + GRACE, check=False).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, out of time")
            status = 1
    return int(status)


def precompile(args, version: str) -> int:
    """Compiles what the parts launch, and notes what each kernel takes of a GPU."""
    from common.tables import write_csv
    from gpu.recording import pack, precompile, wanted_launches

    args.precompile.mkdir(parents=True, exist_ok=True)
    (args.precompile / "triton.json").write_text(json.dumps({"triton": version}), encoding="utf-8")
    start, rows = time.monotonic(), []
    for row in precompile(wanted_launches(args.case), args.precompile, args.processes):
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if time.monotonic() > start + 60 * args.minutes:
            print("out of time: what is left is compiled where it is launched")
            break
    fields = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(args.precompile / "kernels.csv", fields, rows)
    failed = sum("note" in row for row in rows)
    print(f"{len(rows)} kernels in {pack(args.precompile)}, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed == len(rows))


def predict(args) -> int:
    """Writes the model of each kernel; rows of cases that are not asked for stay."""
    from common.tables import write_csv
    from gpu.bench import read_rows
    from gpu.model import FIELDS, predictions

    path = RESULTS / "gpu_kernels.csv"
    rows = [row for row in read_rows(path) if args.case not in row["case"]]
    for row in predictions(args.case):
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write_csv(path, FIELDS, rows)
    return 0


def use_compiled(folder: Path, version: str) -> Path:
    """Has Triton load what another machine compiled, from the folder that is returned.

    Raises:
        OSError: if it is not what `--precompile` made.
        ValueError: if another version of Triton made it.
    """
    from gpu.recording import relocate, stable_keys, unpack

    if folder.is_file():
        folder = unpack(folder)
    made = json.loads((folder / "triton.json").read_text(encoding="utf-8"))["triton"]
    if made != version:
        raise ValueError(f"`--compiled` must be made with Triton {version}, got {made}.")
    relocate(folder)
    stable_keys()
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    return folder


if __name__ == "__main__":
    run_command(main)

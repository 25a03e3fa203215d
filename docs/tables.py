"""Writes the tables of README.md and docs from the CSVs in scripts/results; that of memory from the configs.

    python docs/tables.py

A page has a pair of markers around each table, `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a key of `TABLES`.
The study's own tables, between other markers in docs/study.md, are written by `python scripts/study.py --epochs 15 --report`.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import pandas as pd  # noqa: E402
from common.intervals import interval_words  # noqa: E402
from common.tables import markdown  # noqa: E402
from common.training_memory import (  # noqa: E402
    bytes_alone,
    bytes_fully_sharded,
    bytes_tensor_parallel,
    bytes_zero2,
    bytes_zero3,
    unallocated,
)
from studies.from_attention import ATTENTION, LONGER, TASKS, TRANSLUTION, frame_of  # noqa: E402
from studies.report import LEAST_SIZE, MOST_SIZE, paired_gain  # noqa: E402

from translution import TranslutionConfig  # noqa: E402
from translution.configuration.configuration_translution import SIZES  # noqa: E402


RESULTS = ROOT / "scripts" / "results"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "benchmarks.md",
            "deployment.md",
            "from_attention.md",
            "gpu.md",
            "local.md",
            "study.md",
            "training.md",
        )
    ),
)
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PASSES = {"forward": "forward", "forward+backward": "forward + backward"}

Row = dict[str, str]


@cache
def rows_of(path: Path) -> list[Row]:
    """All rows of a CSV, read once: a table asks for them again and again."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(name: str, **columns: str) -> list[Row]:
    """The rows of a CSV in scripts/results that have the given values in the given columns."""
    rows = rows_of(RESULTS / f"{name}.csv")
    return [row for row in rows if all(row[key] == value for key, value in columns.items())]


def only(rows: list[Row], **columns: str) -> Row:
    """The one row with the given values.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    if len(found) != 1:
        raise ValueError(f"One row must have {columns}, got {len(found)}.")
    return found[0]


def number(text: str, digits: int = 0) -> str:
    return f"{float(text):,.{digits}f}"


def milliseconds(row: Row) -> str:
    """A time with at least two significant digits."""
    value = float(row["median_ms"])
    return f"{value:,.{1 if value < 20 else 0}f}"


def mebibytes(row: Row) -> str:
    return number(row["peak_mib"])


# The study


def tuned_rows(task: str, length: str = "", study: str = "study", **columns: str) -> dict[str, list[Row]]:
    """The rows of each variant of a study that were trained with the learning rate that tuning chose.

    Learning rates are tuned at the first length of text, and serve the others too.
    """
    rows = pd.DataFrame(read_rows(study, task=task, **columns))
    column, sign = ("dynamic → dynamic", 1) if task == "images" else ("perplexity", -1)
    tuning = rows[rows["stage"] == "tuning"]
    # The mean over the seeds that tuned.
    means = sign * tuning[column].astype(float).groupby([tuning["variant"], tuning["learning_rate"]]).mean()
    best = {variant: each.idxmax()[1] for variant, each in means.groupby(level="variant")}
    tests = rows[(rows["stage"] == "test") & (rows["length"] == length)]
    chosen = tests[tests["learning_rate"] == tests["variant"].map(best)]
    return {variant: group.to_dict("records") for variant, group in chosen.groupby("variant", sort=False)}


def spread(rows: list[Row], column: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [float(row[column]) for row in rows]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def widened(groups: dict[str, list[Row]], name: str, tolerance: float = 0.03) -> list[Row] | None:
    """The rows of rotary attention that is widened to as many parameters as a variant, if the study has one."""
    size = int(groups[name][0]["parameters"])
    errors = {
        other: abs(int(rows[0]["parameters"]) / size - 1)
        for other, rows in groups.items()
        if other.startswith("attention, rotary, as ")
    }
    best = min(errors, key=errors.get)
    return groups[best] if errors[best] <= tolerance else None


def results_table() -> str:
    """README's: what each mixer costs, and what it reaches, beside rotary attention of as many parameters."""
    layers = {row["implementation"]: row for row in layer_rows("forward+backward")}
    tasks = ((tuned_rows("images"), "dynamic → dynamic"), (tuned_rows("text", "128"), "perplexity"))
    lines = []
    for name, (variant, layer) in {
        "attention, rotary": ("attention, rotary", "rotary attention"),
        "attention, relative bias": ("attention, relative bias", "relative bias"),
        "convolution": ("convolution", "convolution"),
        "ACmix": ("ACmix", "ACmix"),
        "basis 8, kv": ("basis 8 kv", "basis 8, kv"),
        "LoR 8, kv": ("LoR kv", "LoR 8, kv"),
        "full, kv": ("full kv", "full, kv"),
    }.items():
        cells = [name, f"{number(layers[layer]['times_attention'], 1)} ×"]
        for groups, column in tasks:
            if variant not in groups:
                cells += ["–"] * 3
                continue
            rival = None if variant.startswith("attention") else widened(groups, variant)
            size = f"{int(groups[variant][0]['parameters']) / 1e3:,.0f} k"
            cells += [size, spread(groups[variant], column), "–" if rival is None else spread(rival, column)]
        lines.append(cells)
    columns = ["mixer", "time of a layer"]
    columns += ["digits: parameters", "accuracy, %", "rotary of equal size"]
    columns += ["text: parameters", "perplexity", "rotary of equal size"]
    return markdown(columns, lines)


# Local models that are compared at several numbers of steps, with the words for them.
BUDGET_MODELS = {
    "images": {
        "every layer": "local kv, D 1, shared",
        "first layer": "local kv, D 1, shared, first layer",
        "first layer, narrow MLP": "local kv, D 1, shared, first layer, narrow MLP, as local kv, D 1, shared",
        "every layer, wide": "local kv, D 1, shared, wide",
        "first layer, wide": "local kv, D 1, shared, first layer, wide",
        "first layer, wide, narrow MLP": "local kv, D 1, shared, first layer, narrow MLP, as local kv, D 1, shared, wide",
    },
    "text": {
        "every layer": "local kv, D 3, rotary",
        "first layer": "local kv, D 3, rotary, first layer",
        "first layer, narrow MLP": "local kv, D 3, rotary, first layer, narrow MLP, as local kv, D 3, rotary",
        "every layer, wide": "local kv, D 3, rotary, wide",
        "first layer, wide": "local kv, D 3, rotary, first layer, wide",
        "first layer, wide, narrow MLP": "local kv, D 3, rotary, first layer, narrow MLP, as local kv, D 3, rotary, wide",
    },
}


def budgets_table() -> str:
    """Local Translution against rotary attention of equal parameters: for as many steps, as many processor seconds, and more steps."""
    lines = []
    for task, length in (("images", ""), ("text", "64"), ("text", "128")):
        column, unit = ("dynamic → dynamic", "") if task == "images" else ("perplexity", " %")
        best = partial(max if task == "images" else min, key=partial(mean_of, column=column))
        for words, local in BUDGET_MODELS[task].items():
            ours = by_steps(task, length, local)
            theirs = [
                (steps, rows)
                for rival in rivals_of(task, length, local)
                for steps, rows in by_steps(task, length, rival).items()
            ]
            if not ours or not theirs:
                continue
            first = min(ours)
            budgets = [("equal steps", ours[first], [rows for steps, rows in theirs if steps == first])]
            longer = [rows for steps, rows in theirs if steps > first]
            if longer:
                budgets.append(("equal seconds", ours[first], as_long(longer, trained(ours[first]))))
            budgets += [
                ("equal steps, more", ours[more], [rows for steps, rows in theirs if steps == more])
                for more in sorted(ours)[1:]
            ]
            for budget, group, rivals in budgets:
                if not rivals:
                    continue
                groups = [group, best(rivals)]
                results = [pd.Series({row["seed"]: float(row[column]) for row in rows}) for rows in groups]
                gain, interval = paired_gain(*results, task == "images")
                cells = [f"{rows[0]['steps']} steps, {trained(rows):.0f} s: {spread(rows, column)}" for rows in groups]
                gains = [f"{gain:+.1f}{unit}", interval_words(interval, "+.1f", unit)]
                lines.append([f"{task} {length}".strip(), words, budget, *cells, *gains])
    columns = ["task", "local in", "budget", "local", "rotary attention", "gain", "95 % interval"]
    return markdown(columns, lines, texts=3)


def as_long(runs: list[list[Row]], seconds: float) -> list[list[Row]]:
    """Those that trained for at most a tenth more processor seconds; where all took longer, the shortest."""
    return [rows for rows in runs if trained(rows) <= 1.1 * seconds] or [min(runs, key=trained)]


def rivals_of(task: str, length: str, variant: str) -> list[str]:
    """Widened rotary attention of as many parameters as a variant, or somewhat fewer, in all its shapes."""
    sizes = {
        row["variant"]: int(row["parameters"])
        for row in read_rows("local_study", stage="test", task=task, length=length)
        if row["variant"] == variant or row["variant"].startswith("attention, rotary, ")
    }
    own = sizes.pop(variant, 0)
    return [name for name, size in sizes.items() if LEAST_SIZE * own <= size <= MOST_SIZE * own]


def by_steps(task: str, length: str, variant: str) -> dict[int, list[Row]]:
    """The tests of a variant of the study of local Translution, by the number of steps."""
    rows = read_rows("local_study", stage="test", task=task, length=length, variant=variant)
    found = {}
    for steps in sorted({int(row["steps"]) for row in rows}):
        groups = tuned_rows(task, length, "local_study", variant=variant, steps=str(steps))
        # None where tests of the rate that tuning chose are still to come.
        if variant in groups:
            found[steps] = groups[variant]
    return found


def mean_of(rows: list[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)


def trained(rows: list[Row]) -> float:
    """Processor seconds of one training, by the fastest step of all runs of the model: what else a machine does slows others down."""
    one = rows[0]
    runs = read_rows("local_study", task=one["task"], length=one["length"], variant=one["variant"])
    # A test of images has two trainings.
    steps = (int(run["steps"]) * (2 if (run["task"], run["stage"]) == ("images", "test") else 1) for run in runs)
    return int(one["steps"]) * min(float(run["cpu_seconds"]) / count for run, count in zip(runs, steps, strict=True))


def from_attention_table() -> str:
    """Trained attention models that went on as Translution, against the same going on as they are."""
    frame = frame_of(RESULTS / "from_attention.csv")
    lines = []
    for task, rows in frame[frame["stage"] == "test"].groupby("task"):
        groups = {name: group.set_index("seed") for name, group in rows.groupby("model")}
        unit = "" if TASKS[task].higher_is_better else " %"
        ours = groups[TRANSLUTION]
        for budget, rival in {"equal steps": groups[ATTENTION], "equal seconds": groups[LONGER]}.items():
            gain, interval = paired_gain(ours["result"], rival["result"], TASKS[task].higher_is_better)
            cells = [
                f"{group['steps'].iloc[0]} steps, {group['cpu_seconds'].median():.0f} s: "
                f"{group['result'].mean():.1f} ± {group['result'].std():.1f}"
                for group in (ours, rival)
            ]
            source = f"{ours['source_result'].mean():.1f}"
            lines.append([task, budget, source, *cells, f"{gain:+.1f}{unit}", interval_words(interval, "+.1f", unit)])
    columns = ["task", "budget", "before", "as Translution", "as attention", "gain", "95 % interval"]
    return markdown(columns, lines, texts=2)


def second_rate_table(rate: str = "0.002") -> str:
    """Variants of images that were tested at another learning rate than the one that tuning chose."""
    lines = []
    for variant, rows in tuned_rows("images").items():
        others = read_rows("study", stage="test", task="images", variant=variant, learning_rate=rate)
        if others and others[0]["learning_rate"] != rows[0]["learning_rate"]:
            figures = [spread(group, "dynamic → dynamic") for group in (rows, others)]
            lines.append([variant, rows[0]["learning_rate"], figures[0], figures[1]])
    return markdown(["mixer", "tuned rate", "accuracy, %", f"accuracy at {rate}, %"], lines)


# The benchmarks


def gathering_table() -> str:
    rows = read_rows("cpu", suite="operator", case="image 7x7, C 192, B 8, qkv", dtype="float32")
    names = {
        "grouped": "this package",
        "reference": 'this package, `attn_implementation="eager"`',
        "gather": "one matrix gathered per pair, `einsum`",
        "gather-matmul": "one matrix gathered per pair and image (published code)",
    }
    lines = []
    for name, words in names.items():
        cells = [words]
        for passes in PASSES:
            row, ours = (only(rows, implementation=one, passes=passes) for one in (name, "grouped"))
            ratio = float(row["median_ms"]) / float(ours["median_ms"])
            cells += [f"{milliseconds(row)} ms ({number(str(ratio), 1)} ×)"]
        lines.append([*cells, f"{mebibytes(row)} MiB"])
    return markdown(["", *PASSES.values(), "peak memory"], lines)


def operator_table() -> str:
    rows, lines = read_rows("cpu", suite="operator"), []
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        group = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        for passes, words in PASSES.items():
            cells = [
                f"{case}, {dtype}",
                words,
                f"{milliseconds(only(group, implementation='floor', passes=passes))} ms",
            ]
            for name in ("grouped", "streamed"):
                row = only(group, implementation=name, passes=passes)
                cells += [f"{milliseconds(row)} ms ({number(row['times_floor'], 2)} ×)", f"{mebibytes(row)} MiB"]
            lines.append(cells)
    columns = ["case", "passes", "bare products", "grouped", "peak memory", "streamed", "peak memory"]
    return markdown(columns, lines, texts=2)


def layer_rows(passes: str, case: str = "tiny, 14x14, C 192, B 8") -> list[Row]:
    rows = read_rows("cpu", suite="layer", case=case, passes=passes)
    return [row for row in rows if not row["implementation"].endswith(", floor")]


def with_ratio(row: Row) -> str:
    return f"{milliseconds(row)} ms ({number(row['times_attention'], 1)} ×)"


def layer_table() -> str:
    both = layer_rows("forward+backward")
    lines = [
        [row["implementation"], with_ratio(row), with_ratio(after), f"{mebibytes(after)} MiB"]
        for row in layer_rows("forward")
        for after in [only(both, implementation=row["implementation"])]
    ]
    return markdown(["layer", *PASSES.values(), "peak memory"], lines)


def training_table() -> str:
    lines = [
        [row["implementation"], with_ratio(row), f"{mebibytes(row)} MiB"] for row in read_rows("cpu", suite="training")
    ]
    return markdown(["model", "forward + backward", "peak memory"], lines)


def length_table() -> str:
    rows = read_rows("cpu", suite="length")
    names = ("attention", "LoR 8", "basis 8", "full", "full, D 32")
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        length = int(re.search(r"L (\d+)", case)[1])
        if length < 256:
            continue
        cells = [f"{length:,}"]
        for name in names:
            found = [row for row in rows if row["case"] == case and row["implementation"] == name]
            cells.append(" / ".join(milliseconds(row) for row in found) or "–")
        cells.append(" / ".join(f"{number(row['times_floor'], 2)} ×" for row in found))
        lines.append(cells)
    return markdown(["tokens", *names, "D 32 over its floor"], lines, texts=0)


def generation_table() -> str:
    rows = read_rows("generation_cpu")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = {
        "full": "full, kv",
        "lor": "LoR 8, kv",
        "basis": "basis 8, kv",
        "full-D32": "full, kv, distance 32",
        "attention": "rotary attention",
        "gpt2": "GPT-2 of Transformers",
    }

    def cells(name: str) -> Iterator[str]:
        for case in cases:
            row = only(rows, case=case, implementation=name)
            yield f"{number(row['tokens_per_second'])} ({number(row['times_no_cache'], 1)} ×)"

    def bytes_per_token(name: str) -> str:
        found = {float(only(rows, case=case, implementation=name)["cache_bytes_per_token"]) / 1e3 for case in cases}
        return " to ".join(f"{value:.1f} kB" for value in sorted(found))

    columns = [re.sub(r"tiny-prompt(\d+)-new\d+-B(\d+)", r"prompt \1, batch \2", case) for case in cases]
    lines = [[words, bytes_per_token(name), *cells(name)] for name, words in names.items()]
    return markdown(["model", "cache per token", *columns], lines)


def local_table() -> str:
    """Local Translution beside rotary attention of as many parameters, in the same run."""
    rows = read_rows("local_cpu")
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        ours, rival = (only(group, implementation=name) for name in ("local", "rotary attention"))
        memory = "–"
        if ours["peak_mib"]:
            memory = f"{mebibytes(ours)} / {mebibytes(rival)} MiB ({number(ours['times_rotary_memory'], 2)} ×)"
        sizes = " / ".join(f"{int(row['parameters']) / 1e6:.2f}" for row in (ours, rival))
        lines.append(
            [
                case,
                sizes,
                *(f"{milliseconds(row)} ms" for row in (ours, rival)),
                f"{number(ours['times_rotary'], 2)} ×",
                memory,
            ]
        )
    columns = ["case", "parameters, M", "local", "rotary attention", "time", "peak memory"]
    return markdown(columns, lines)


# Training


# How processes divide a model.
WAYS = ("FSDP2", "heads shared", "ZeRO-2", "ZeRO-3")
# What tests ran with two processes on a CPU, as small models: mixers of the table, by how processes divide them.
RUN_BY_TWO = {"FSDP2": ("full, kv",), "heads shared": ("local", "LoR 8, kv", "full, kv")}


def memory_table() -> str:
    """What parameters take of each GPU in training, by size, mixer and number of GPUs."""
    # Those of the CSV, by their names there; the rest was not run.
    run = {row["implementation"] for row in read_rows("cpu", suite="training")}
    run |= {row["implementation"] for row in read_rows("local_cpu") if row["case"].startswith("tiny image")}
    mixers = {
        "attention": {"mixer_types": "attention"},
        "local": {"preset": "local"},
        "LoR 8, kv": {"relative_rank": 8},
        "full, kv": {},
    }
    lines = []
    for size in SIZES:
        for mixer, fields in mixers.items():
            config = TranslutionConfig.from_size(size, num_labels=1000, **fields)
            model = unallocated(config)
            cells = [f"{model.num_parameters() / 1e6:,.1f} M", gigabytes(bytes_alone(model))]
            for gpus in (2, 8):
                sizes = {"FSDP2": bytes_fully_sharded(model, gpus)}
                if config.num_attention_heads % gpus == 0:
                    sizes["heads shared"] = bytes_tensor_parallel(config, gpus)
                sizes |= {"ZeRO-2": bytes_zero2(model, gpus), "ZeRO-3": bytes_zero3(model, gpus)}
                for way in WAYS:
                    double = " ‡" if gpus == 2 and way in sizes and mixer in RUN_BY_TWO.get(way, ()) else ""
                    cells.append(f"{gigabytes(sizes[way])}{double}" if way in sizes else "–")
            mark = " †" if size == "tiny" and mixer in run else ""
            lines.append([size, f"{mixer}{mark}", *cells])
    columns = ["size", "mixer", "parameters", "1 GPU"]
    columns += [f"{gpus} GPUs, {way}" for gpus in (2, 8) for way in WAYS]
    return markdown(columns, lines, texts=2)


def gigabytes(size: int) -> str:
    return number(str(size / 1e9), 2 if size < 10e9 else 0)


# Weights in fewer bits


def quantization_table() -> str:
    rows = read_rows("quantization")
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        whole = only(rows, data=data, weights="float32")
        for row in (row for row in rows if row["data"] == data):
            share = float(row["weight_bytes"]) / float(whole["weight_bytes"])
            figures = [number(row["value"], 2), number(row["weight_bytes"]), f"{share:.0%}"]
            lines.append([data, row["metric"], row["weights"], *figures])
    return markdown(["data", "figure", "weights", "value", "bytes", "of float32"], lines, texts=3)


def quantization_origin() -> str:
    (torchao,) = {row["torchao"] for row in read_rows("quantization")}
    return f"{origin('quantization')[:-1]}; torchao {torchao}."


# GPU


def kernel_table() -> str:
    """What each kernel takes of an H100 or H200, the least time it should take, and what it took on a GPU."""
    path = RESULTS / "gpu.csv"
    measured = read_rows("gpu", part="time", implementation="kernel") if path.exists() else []
    lines = []
    for row in read_rows("gpu_kernels"):
        wanted = {name: row[name] for name in ("case", "kernel", "place")}
        times = [one["median_ms"] for one in measured if wanted.items() <= one.items() and one["median_ms"]]
        tile = ", ".join(str(value) for value in json.loads(row["tile"]).values())
        operations, predicted = (row[name] for name in ("executed_gflop", "predicted_ms"))
        lines.append(
            [
                row["case"],
                f"`{row['kernel']}`",
                tile,
                *(row[name] for name in ("registers", "spills")),
                number(str(int(row["shared"]) / 1024)),
                row["blocks"],
                row["launches"],
                number(row["programs"]),
                number(operations) if operations and float(operations) else "–",
                number(row["mbytes"]),
                number(predicted, 3) if predicted else "–",
                number(times[0], 3) if times else "",
            ]
        )
    columns = [
        "case",
        "kernel",
        "tile",
        "registers",
        "spills",
        "shared, KiB",
        "blocks",
        "launches",
        "programs",
        "Gflop",
        "MB",
    ]
    return markdown([*columns, "predicted, ms", "measured, ms"], lines, texts=3)


def kernel_origin() -> str:
    rows = read_rows("gpu_kernels")
    parts = [" and ".join(sorted({row[column] for row in rows})) for column in ("triton", "torch", "commit")]
    return "Compiled for sm_90 with Triton {}; PyTorch {}; commit {}.".format(*parts)


def origin(name: str) -> str:
    """Machine, versions and commits of a CSV."""
    rows = read_rows(name)
    parts = [
        sorted({row[column] for row in rows}) for column in ("device", "threads", "torch", "transformers", "commit")
    ]
    device, threads, torch, transformers, commits = (" and ".join(part) for part in parts)
    return f"{device}, {threads} threads; PyTorch {torch}, Transformers {transformers}; commit {commits}."


TABLES = {
    "results": results_table,
    "memory": memory_table,
    "second learning rate": second_rate_table,
    "budgets": budgets_table,
    "from attention": from_attention_table,
    "origin of from_attention.csv": lambda: origin("from_attention"),
    "gathering": gathering_table,
    "operator": operator_table,
    "layer": layer_table,
    "training": training_table,
    "length": length_table,
    "generation": generation_table,
    "local": local_table,
    "origin of local_cpu.csv": lambda: origin("local_cpu"),
    "quantization": quantization_table,
    "origin of quantization.csv": quantization_origin,
    "kernels": kernel_table,
    "origin of gpu_kernels.csv": kernel_origin,
    "origin of cpu.csv": lambda: origin("cpu"),
    "origin of generation_cpu.csv": lambda: origin("generation_cpu"),
}


def rewritten(page: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: if a marker names no table.
    """

    def fill(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"A marker must name one of {', '.join(TABLES)}, got {match[2]!r}.")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, page)


def main() -> None:
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

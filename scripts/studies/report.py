"""Tables and a figure of the study's rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from common.intervals import interval_words, student_interval
from common.tables import markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from studies.runs import Run, key_of
from studies.settings import COMPARISONS, DYNAMIC
from studies.variants import ATTENTION


MARKERS = ("<!-- scripts/study.py writes from here -->", "<!-- to here -->")
NUMBERS = ["parameters", "forward_flops", "train_seconds", "cpu_seconds", *COMPARISONS, "perplexity"]
TRANSLUTION = ("full", "LoR", "basis", "hybrid", "local")
# Sizes of rivals over a model's: somewhat smaller ones count as well, as more parameters are not always better.
LEAST_SIZE, MOST_SIZE = 0.85, 1.03

STYLES = {
    "attention, no position": {"fmt": "v", "color": "silver"},
    "attention, absolute": {"fmt": "s:", "color": "silver"},
    "attention, rotary": {"fmt": "s-", "color": "black"},
    "attention, rotary, narrow MLP": {"fmt": "x", "color": "black"},
    "attention, relative bias": {"fmt": "D--", "color": "gray"},
    "attention, relative vector": {"fmt": "^", "color": "gray"},
}
COLOURS = {"convolution": "olive", "ACmix": "brown", "full": "blue", "LoR": "orange", "basis": "red", "hybrid": "purple", "local": "green"}  # fmt: skip
STYLES |= {name: {"fmt": "o", "color": f"tab:{colour}"} for name, colour in COLOURS.items()}


@dataclass(frozen=True)
class Comparison:
    """All models of one task.

    Args:
        title: of its tables.
        rows: one per variant and seed.
        column: what is compared.
        higher_is_better: whether it is an accuracy, and no perplexity.
    """

    title: str
    rows: pd.DataFrame
    column: str
    higher_is_better: bool

    @property
    def seeds(self) -> str:
        counts = self.rows.groupby("variant").size()
        return f"{counts.min()} seeds" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()} seeds"

    @property
    def measure(self) -> str:
        return "accuracy, %, trained → tested" if self.higher_is_better else "perplexity of held-out files"

    @property
    def models(self) -> pd.DataFrame:
        """By variant: what does not depend on the seed, the processor seconds of one training, and the mean, standard
        deviation, minimum and maximum of `column`."""
        groups = self.rows.groupby("variant", sort=False)
        fixed = ["family", "widened_to", "parameters", "forward_flops", "learning_rate"]
        # Of one core; unlike wall-clock time they do not depend on what runs beside it. A row of images has two trainings.
        seconds = groups["cpu_seconds"].median() / (2 if self.higher_is_better else 1)
        results = groups[self.column].agg(["mean", "std", "min", "max"]).fillna({"std": 0.0})
        return groups[fixed].first().join(seconds).join(results)

    def spreads(self, column: str) -> pd.Series:
        """Mean ± standard deviation by variant."""
        statistics = self.rows.groupby("variant", sort=False)[column].agg(["mean", "std"]).fillna({"std": 0.0})
        return statistics.apply(lambda row: f"{row['mean']:.1f} ± {row['std']:.1f}", axis=1)


def comparisons(rows: list[dict[str, str]], runs: list[Run]) -> list[Comparison]:
    """The rows of planned runs by task; rows of other settings are left out."""
    found = {key_of(row): row for row in rows}
    done = [(run, found.get(key_of(run.identity()))) for run in runs]
    frame = pd.DataFrame([{**row, "widened_to": run.variant.widened_to} for run, row in done if row is not None])
    if frame.empty:
        return []
    frame[NUMBERS] = frame[NUMBERS].apply(pd.to_numeric)
    return [
        Comparison("Digits anywhere on a canvas", part, DYNAMIC, True)
        if task == "images"
        else Comparison(f"Text, blocks of {length} tokens", part, "perplexity", False)
        for (task, length), part in frame.groupby(["task", "length"], sort=False)
    ]


def results_table(comparison: Comparison) -> pd.DataFrame:
    """Size, cost and results of every model."""
    models = comparison.models
    columns = list(COMPARISONS) if comparison.higher_is_better else ["perplexity"]
    return pd.DataFrame(
        {
            "mixer": models.index,
            "parameters": models["parameters"].map("{:,}".format),
            f"MFLOPs per {'image' if comparison.higher_is_better else 'block'}": models["forward_flops"]
            .div(1e6)
            .map("{:.1f}".format),
            "CPU seconds to train": models["cpu_seconds"].map("{:.1f}".format),
            "learning rate": models["learning_rate"],
            **{column: comparison.spreads(column) for column in columns},
        }
    )


def equal_size(models: pd.DataFrame, name: str, kind: str, higher_is_better: bool) -> str | None:
    """The best widened attention of a kind among those of about as many parameters as a model, or somewhat fewer."""
    is_kind = models["widened_to"].notna() & models.index.str.startswith(f"attention, {kind},")
    sizes = models["parameters"][is_kind] / models["parameters"][name]
    means = models["mean"][sizes.index[sizes.between(LEAST_SIZE, MOST_SIZE)]]
    if means.empty:
        return None
    return means.idxmax() if higher_is_better else means.idxmin()


def equal_size_table(comparison: Comparison) -> pd.DataFrame:
    """Every Translution against widened attention of the same number of parameters."""
    models, spreads, column = comparison.models, comparison.spreads(comparison.column), comparison.column
    lines = []
    for name in models.index[models["family"].isin(TRANSLUTION)]:
        for kind in ATTENTION:
            rival = equal_size(models, name, kind, comparison.higher_is_better)
            if rival is None:
                continue
            one, other = models.loc[name], models.loc[rival]
            by_seed = comparison.rows.set_index("seed").groupby("variant")[comparison.column]
            results = (by_seed.get_group(model) for model in (name, rival))
            gain, interval = paired_gain(*results, comparison.higher_is_better)
            unit = "" if comparison.higher_is_better else " %"
            sizes = [f"{model['parameters']:,}" for model in (one, other)]
            gains = [f"{gain:+.1f}{unit}", interval_words(interval, "+.1f", unit)]
            lines.append([name, sizes[0], spreads[name], kind, sizes[1], spreads[rival], *gains])
    columns = ["model", "parameters", column, "attention", "parameters", column, "gain", "95 % interval"]
    return pd.DataFrame(lines, columns=columns)


def paired_gain(one: pd.Series, other: pd.Series, higher_is_better: bool) -> tuple[float, tuple[float, float] | None]:
    """By how much a model is better than another, with the same examples in the same order: mean and 95 % interval over seeds.

    Args:
        one, other: results by seed.
        higher_is_better: then in points, otherwise in per cent of the other's. The interval is that of `student_interval`.
    """
    gains = (one - other if higher_is_better else 100 * (1 - one / other)).dropna()
    return gains.mean(), student_interval(gains.tolist())


def as_markdown(table: pd.DataFrame) -> str:
    return markdown(table.columns, table.itertuples(index=False))


def report(found: list[Comparison]) -> str:
    """All tables with their captions."""
    rows = pd.concat([comparison.rows for comparison in found])
    machines = ", ".join(sorted(rows["device"].unique()))
    parts = [
        f"{len(rows)} runs, {rows['train_seconds'].sum() / 3600:.1f} hours of training without the tuning; {machines}, "
        f"threads per run: {', '.join(sorted(rows['threads'].unique()))}; commit "
        f"{', '.join(sorted(rows['commit'].unique()))}. Mean ± standard deviation over seeds."
    ]
    for comparison in found:
        first = comparison.rows.iloc[0]
        parts += [
            f"### {comparison.title}",
            f"{comparison.measure}; {comparison.seeds}; {first['steps']} steps of {first['batch']}.",
            as_markdown(results_table(comparison)),
        ]
        equal = equal_size_table(comparison)
        if len(equal):
            parts += [f"Equal parameters, {comparison.column}:", as_markdown(equal)]
    return "\n\n".join(parts) + "\n"


def write_between_markers(page: Path, text: str) -> None:
    """Replaces what a page has between `MARKERS`.

    Raises:
        ValueError: if it does not have both markers once.
    """
    content = page.read_text(encoding="utf-8")
    if any(content.count(marker) != 1 for marker in MARKERS):
        raise ValueError(f"{page} must have the markers {' and '.join(MARKERS)} once.")
    before, rest = content.split(MARKERS[0])
    page.write_text(f"{before}{MARKERS[0]}\n\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}", encoding="utf-8")


def series(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame]]:
    """The models that are drawn alike: each kind of attention from narrow to wide, and the families of the others."""
    models = comparison.models.sort_values("parameters")
    is_attention = models["family"].str.startswith("attention")
    names = models.index.str.split(", as ").str[0].to_series(index=models.index)
    yield from models.groupby(names.where(is_attention, models["family"]), sort=False)


# Columns of `Comparison.models` that results are drawn over, with the words for them.
COSTS = {"parameters": "parameters", "cpu_seconds": "processor seconds to train"}


def draw(found: list[Comparison], path: Path) -> None:
    """Draws results over numbers of parameters, and below over the processor seconds of a training."""
    figure = Figure(figsize=(7 * len(found), 6 * len(COSTS)), layout="constrained")
    grid = figure.subplots(len(COSTS), len(found), squeeze=False)
    for cost, row in zip(COSTS, grid, strict=True):
        for comparison, axes in zip(found, row, strict=True):
            draw_over(cost, comparison, axes)
    figure.savefig(path, dpi=120)


def draw_over(cost: str, comparison: Comparison, axes: Axes) -> None:
    """Draws the results of a task over one of `COSTS`."""
    for name, models in series(comparison):
        style = STYLES[name]
        axes.errorbar(models[cost], models["mean"], models["std"], capsize=2, label=name, **style)
        if not name.startswith("attention"):
            for label, x, y in models[[cost, "mean"]].itertuples():
                place = {"xytext": (4, 3), "textcoords": "offset points"}
                axes.annotate(label.split(", as ")[0], (x, y), fontsize=7, color=style["color"], **place)
    measure = f"accuracy, %, {DYNAMIC}" if comparison.higher_is_better else comparison.measure
    title = f"{comparison.title} ({comparison.seeds}, ± sd)"
    axes.set(xscale="log", xlabel=COSTS[cost], ylabel=measure, title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2)  # labels stand to the right of their points
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)

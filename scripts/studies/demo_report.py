"""The demo's tables and figure, of the rows in its report: one per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from common.offset_figures import draw_grid
from common.offset_matrices import bank_matrices, offset_norms
from common.tables import markdown
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from studies.settings import COMPARISONS


def print_report(report: dict[str, Any], prompt: str, folder: Path) -> None:
    """Prints the tables: size, seconds of training, and accuracies or perplexity; the sample; and where the files are."""
    images, text = report["images"], report["text"]
    print(f"\n== Results\n\nAccuracy on {images['test_digits']} held-out digits (trained → tested)\n", flush=True)
    cells = [
        [row["model"], f"{row['parameters']:,}", f"{sum(row['seconds'].values()):.0f}"]
        + [f"{row['accuracy'][name]:.1f} %" for name in COMPARISONS]
        for row in images["models"]
    ]
    print(markdown(["model", "parameters", "seconds", *COMPARISONS], cells))
    print(
        f"\nOn dynamic digits local Translution is {images['points_above_attention']:.1f} points above rotary attention of as "
        f"many parameters. The best model is {images['best']}."
    )
    print("\nPerplexity on held-out files\n")
    cells = [
        [row["model"], f"{row['parameters']:,}", f"{row['seconds']:.0f}", f"{row['perplexity']:.1f}"]
        for row in text["models"]
    ]
    print(markdown(["model", "parameters", "seconds", "perplexity"], cells))
    print(f"\nThe best one continues {prompt!r}:\n")
    print("\n".join(f"    {line}" for line in text["sample"].splitlines()))
    print(f"\n{report['seconds']:.0f} seconds in all. Written to {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"    {path.name}{'/' if path.is_dir() else ''}")


def draw(
    path: Path, rows: list[dict[str, Any]], test: Dataset, predictions: list[int], model: PreTrainedModel
) -> None:
    """Draws test images with predictions, the accuracies of all models, and the norm of each offset's matrix of one of them."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.5, 0.95))
    left.suptitle("Predictions of the best model")
    for axes, row, prediction in zip(left.subplots(3, 4).flat, test, predictions, strict=False):
        is_right = prediction == row["label"]
        axes.imshow(row["image"], cmap="gray_r")
        axes.set_title(
            f"{prediction}" if is_right else f"{prediction}, not {row['label']}",
            fontsize=9,
            color="black" if is_right else "crimson",
        )
        axes.set(xticks=[], yticks=[])

    axes = middle.subplots()
    accuracies = pd.DataFrame({row["model"]: row["accuracy"] for row in rows}).loc[list(COMPARISONS)]
    for bars in accuracies.plot.bar(ax=axes, width=0.8, rot=0).containers:
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(ylim=(0, 118), ylabel="accuracy, %", title="Trained → tested: digits in the middle, or anywhere")
    axes.legend(ncols=2, fontsize=8, loc="upper center")

    axes = right.subplots()
    mixer = model.model.layers[0].mixer
    norms = offset_norms(bank_matrices(mixer, "v"))
    right.colorbar(draw_grid(axes, norms, mixer.bank_layout), ax=axes, shrink=0.7)
    axes.set_title("Norm of each offset's\nvalue matrix, layer 1")
    figure.savefig(path, dpi=120)

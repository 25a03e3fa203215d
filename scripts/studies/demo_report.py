"""The demo's tables and figure, of the rows in its report: one per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from common.tables import markdown
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from studies.settings import COMPARISONS


def image_table(rows: list[dict[str, Any]]) -> str:
    """Size, seconds of both trainings, and accuracies."""
    cells = [
        [row["model"], f"{row['parameters']:,}", f"{sum(row['seconds'].values()):.0f}"]
        + [f"{row['accuracy'][name]:.1f} %" for name in COMPARISONS]
        for row in rows
    ]
    return markdown(["model", "parameters", "seconds", *COMPARISONS], cells)


def text_table(rows: list[dict[str, Any]]) -> str:
    """Size, seconds of training, and perplexity."""
    cells = [
        [row["model"], f"{row['parameters']:,}", f"{row['seconds']:.0f}", f"{row['perplexity']:.1f}"] for row in rows
    ]
    return markdown(["model", "parameters", "seconds", "perplexity"], cells)


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
    height, width = model.config.grid_height_width
    bank = model.model.layers[0].mixer.v_bank.detach()[: (2 * height - 1) * (2 * width - 1)]
    norms = bank.norm(dim=(1, 2)).view(2 * height - 1, 2 * width - 1)
    extent = (0.5 - width, width - 0.5, height - 0.5, 0.5 - height)
    right.colorbar(axes.imshow(norms, cmap="viridis", extent=extent), ax=axes, shrink=0.7)
    axes.set(xlabel="columns", ylabel="rows", title="Norm of each offset's\nvalue matrix, layer 1")
    figure.savefig(path, dpi=120)

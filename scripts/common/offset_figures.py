"""Figures of the matrices of offsets, and of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from common.offset_matrices import CLASS_OFFSETS, FAR
from translution import TranslutionConfig
from translution.modeling.operators.pair_layout import PairLayout, bank_layout


COLUMNS = 6
# Inches: a panel, the widest figure, and a token.
PANEL, WIDEST, TOKEN = 2.3, 40.0, 0.17
PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
# Arrows go where the offset goes: from the key's token to the query's, in image banks of queries the other way.
SHORT = dict(zip((FAR, *CLASS_OFFSETS), ("far", "c→c", "p→c", "c→p"), strict=True))


def draw_report(config: TranslutionConfig, report: dict[str, Any], pixel_values: Tensor | None = None) -> Figure:
    """The figure of a model: norms, differences, and attention where the report has it.

    Args:
        config: of the model.
        report: what `scripts/look.py` writes as JSON.
        pixel_values: what an image model sees, `[1, channels, height, width]`, where there is attention.
    """
    is_image, attention = config.modality == "image", report.get("attention")
    by_projection: dict[str, list[dict[str, Any]]] = {}
    for bank in report["banks"]:
        by_projection.setdefault(bank["projection"], []).append(bank)
    heights, width = [], COLUMNS * PANEL
    for banks in by_projection.values():
        heights += [_rows(banks) if is_image else 1.6, 1.4]
    if attention is not None:
        heights.append(_rows(attention["layers"]) if is_image else 0.6 + len(attention["layers"]) / 8)
        width = max(width, min(WIDEST, TOKEN * len(attention.get("tokens", ()))))
    figure = Figure(figsize=(width, 1.15 * PANEL * sum(heights) + 0.4), layout="constrained")
    # The name is no formula.
    figure.suptitle(report["model"], parse_math=False)
    parts = iter(np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights)))
    for projection, banks in by_projection.items():
        part = next(parts)
        ends = "from query to key" if is_image and projection == "q" else "from key to query"
        part.suptitle(f"Norm of each offset's {PROJECTIONS[projection]} matrix, {ends}", fontsize=10)
        if is_image:
            draw_image_norms(part, banks, bank_layout(config))
        else:
            draw_text_norms(part.subplots(), banks)
        part = next(parts)
        part.suptitle(f"Near offsets' {PROJECTIONS[projection]} matrices", fontsize=10)
        draw_differences(part, banks)
    if attention is not None:
        part = next(parts)
        part.suptitle(f"Attention of token {attention['token']}, averaged over heads", fontsize=10)
        if is_image:
            sides = zip(pixel_values.shape[2:], config.patch_height_width, strict=True)
            grid = tuple(side // patch for side, patch in sides)
            draw_image_attention(part, attention, pixels_of(pixel_values), grid)
        else:
            draw_text_attention(part.subplots(), attention)
    return figure


def _rows(panels: Sequence[Any]) -> int:
    return math.ceil(len(panels) / COLUMNS)


def draw_grid(axes: Axes, norms: Tensor, layout: PairLayout, **options: Any) -> AxesImage:
    """Draws the norms of the offsets of an image, `[O]`, over rows and columns; far ones and the class token are left out."""
    rows, columns = layout.max_row_distance, layout.max_column_distance
    grid = norms[: (2 * rows + 1) * (2 * columns + 1)].view(2 * rows + 1, 2 * columns + 1)
    extent = (-columns - 0.5, columns + 0.5, rows + 0.5, -rows - 0.5)
    axes.set(xlabel="columns", ylabel="rows")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return axes.imshow(grid.numpy(), cmap="viridis", extent=extent, **options)


def draw_image_norms(figure: SubFigure, banks: Sequence[dict[str, Any]], layout: PairLayout) -> None:
    """Draws a panel for each layer: the grid, with a frame around near offsets, and beside it far pairs and the class token."""
    norms = np.array([[one["norm"] for one in bank["norms"]] for bank in banks])
    scale = {"vmin": norms.min(), "vmax": norms.max()}
    labels = [one["offset"] for one in banks[0]["norms"]]
    others = [row for row, label in enumerate(labels) if isinstance(label, str)]
    panels = figure.subplots(_rows(banks), min(len(banks), COLUMNS), squeeze=False).ravel()
    for axes in panels[len(banks) :]:
        axes.set_axis_off()
    for axes, bank, values in zip(panels, banks, norms, strict=False):
        image = draw_grid(axes, torch.from_numpy(values), layout, **scale)
        axes.set_title(f"layer {bank['layer']}", fontsize=9)
        if bank["near"]:
            reach = np.abs([one["offset"] for one in bank["near"]]).max(axis=0)
            corner, sides = (-reach[1] - 0.5, -reach[0] - 0.5), (2 * reach[1] + 1, 2 * reach[0] + 1)
            axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="crimson"))
        beside = axes.inset_axes([1.08, 0, 0.14, 1])
        beside.imshow(values[others][:, None], cmap="viridis", aspect="auto", **scale)
        beside.set(xticks=[], yticks=range(len(others)))
        beside.yaxis.tick_right()
        beside.set_yticklabels([SHORT[labels[row]] for row in others], fontsize=7)
    figure.colorbar(image, ax=panels.tolist(), shrink=0.8)


def draw_text_norms(axes: Axes, banks: Sequence[dict[str, Any]]) -> None:
    """Draws a line over the distance for each layer, with near distances shaded and a cross at what far pairs share."""
    for index, bank in enumerate(banks):
        norms = [one["norm"] for one in bank["norms"]]
        color = f"C{index % 10}"
        axes.plot(norms, marker="." if len(norms) < 40 else None, color=color, label=f"layer {bank['layer']}")
        if bank["norms"][-1]["offset"] == FAR:
            axes.plot(len(norms) - 1, norms[-1], marker="x", markersize=9, color=color)
    near = [one["offset"] for one in banks[0]["near"]]
    if near:
        axes.axvspan(-0.5, max(near) + 0.5, color="crimson", alpha=0.1)
    if banks[0]["norms"][-1]["offset"] == FAR:
        last = len(banks[0]["norms"]) - 1
        axes.set_xticks(range(last + 1), [*map(str, range(last)), f"≥ {last}"])
    axes.set(xlabel="distance", ylabel="norm")
    axes.legend(fontsize=7, ncols=math.ceil(len(banks) / 8))


def draw_differences(figure: SubFigure, banks: Sequence[dict[str, Any]]) -> None:
    """Draws, over the layers, how far each near matrix is from what others share, and the largest part of that."""
    left, right = figure.subplots(1, 2)
    of = "matrix of far pairs" if banks[0]["reference"] == FAR else "mean over offsets"
    left.set(title=f"distance from the {of}, relative to its norm", xlabel="layer")
    right.set(title="largest singular value of that difference", xlabel="layer")
    layers = [bank["layer"] for bank in banks]
    for place, first in enumerate(banks[0]["near"]):
        ones = [bank["near"][place] for bank in banks]
        distances = [math.nan if one["relative_distance"] is None else one["relative_distance"] for one in ones]
        label = str(tuple(first["offset"])) if isinstance(first["offset"], list) else str(first["offset"])
        left.plot(layers, distances, marker=".", label=label)
        right.plot(layers, [one["singular_values"][0] for one in ones], marker=".")
    for axes in (left, right):
        axes.set_xticks(layers)
        axes.title.set_fontsize(9)
        axes.set_ylim(0, axes.get_ylim()[1])
    if banks[0]["near"]:
        left.legend(title="offset", fontsize=7, title_fontsize=7, ncols=3)


def draw_image_attention(
    figure: SubFigure, attention: dict[str, Any], pixels: np.ndarray, grid: tuple[int, int]
) -> None:
    """Draws a panel for each layer: the picture, and over it the attention of a token to patches, averaged over heads.

    Args:
        attention: see `look.attention_of_token`.
        pixels: what the model sees, `[height, width, channels]`, 0 to 1.
        grid: height and width in patches.
    """
    layers = attention["layers"]
    panels = figure.subplots(_rows(layers), min(len(layers), COLUMNS), squeeze=False).ravel()
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for axes in panels:
        axes.set_axis_off()
    for axes, one in zip(panels, layers, strict=False):
        weights = np.mean(one["weights"], axis=0)
        axes.imshow(pixels, cmap="gray", extent=extent)
        image = axes.imshow(weights[1:].reshape(grid), cmap="inferno", alpha=0.6, extent=extent, vmin=0)
        figure.colorbar(image, ax=axes, shrink=0.6)
        axes.set_title(f"layer {one['layer']}, class token {weights[0]:.2f}", fontsize=8)
        if attention["token"] > 0:
            row, column = divmod(attention["token"] - 1, grid[1])
            tall, wide = height / grid[0], width / grid[1]
            corner = (column * wide - 0.5, row * tall - 0.5)
            axes.add_patch(Rectangle(corner, wide, tall, fill=False, edgecolor="cyan"))


def draw_text_attention(axes: Axes, attention: dict[str, Any]) -> None:
    """Draws a row for each layer and a column for each token: the attention of one token, averaged over heads."""
    layers, tokens = attention["layers"], attention["tokens"]
    weights = np.stack([np.mean(one["weights"], axis=0) for one in layers])
    image = axes.imshow(weights, cmap="viridis", aspect="auto", vmin=0)
    axes.figure.colorbar(image, ax=axes)
    axes.set_yticks(range(len(layers)), [f"layer {one['layer']}" for one in layers])
    axes.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], rotation=90, fontsize=7)
    for label in axes.get_xticklabels():
        # A dollar sign is one.
        label.set_parse_math(False)
    axes.axvline(attention["token"], color="crimson", linestyle=":")


def pixels_of(pixel_values: Tensor) -> np.ndarray:
    """A picture as the model sees it, `[height, width, channels]`, scaled to 0 to 1; from `[1, channels, height, width]`."""
    pixels = pixel_values[0].float()
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    # Of another number of channels, the grey.
    pixels = pixels if len(pixels) == 3 else pixels.mean(dim=0, keepdim=True)
    return pixels.permute(1, 2, 0).numpy()

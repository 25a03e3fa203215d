"""Text of growing length: time and memory of attention, LoR, basis, full, and full Translution with a distance.

Mixers of one layer, C 192, three heads, keys and values relative, one text. The floor of a distance `D` is its `L·(D + 1)`
projections as bare matrix products, and PyTorch's own causal attention of that length. A mixer stops growing where a step takes
longer than `--patience` seconds or its memory would pass `--memory` MiB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.measuring import BOTH, FORWARD, measure, step, stop_if_wrong
from benchmarks.models import make_mixer, mix, path_error
from benchmarks.operator import products_of
from translution import TranslutionConfig
from translution.modeling.operators.pair_layout import PairLayout


VERIFIED_LENGTH = 96
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DISTANCE, HIDDEN, HEADS = 32, 192, 3
VARIANTS = {
    "attention": {"mixer_types": "attention"},
    "LoR 8": {"relative_rank": 8},
    "basis 8": {"offset_basis": 8},
    "full": {},
    f"full, D {DISTANCE}": {"max_relative_distance": DISTANCE},
}
DISTANT = f"full, D {DISTANCE}"


def make(name: str, length: int) -> tuple[nn.Module, PairLayout]:
    config = TranslutionConfig(
        modality="text",
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        max_position_embeddings=length,
        relative_projections="kv",
        **VARIANTS[name],
    )
    return make_mixer(config), PairLayout.for_text(length, length, config.max_relative_distance)


def verify(name: str, length: int) -> float:
    """Error of output and gradients against the readable path, both in float64."""
    mixer, layout = make(name, length)
    return path_error(mixer, 1, layout)


def floors(mixer: nn.Module, length: int, backward: bool) -> dict[str, object]:
    """The two floors of a distance, to be timed one after the other."""
    counts = [length - distance for distance in range(DISTANCE + 1)]
    project = products_of(counts, 1, [mixer.k_bank, mixer.v_bank])
    heads = [torch.randn(1, HEADS, length, HIDDEN // HEADS, requires_grad=True) for _ in range(3)]
    attend = step(lambda: nn.functional.scaled_dot_product_attention(*heads, is_causal=True), heads, backward)
    return {"floor: projections": partial(project, backward), "floor: attention": attend}


def needs_mib(name: str, length: int) -> float:
    """Least memory of a mixer's bank and its gradient, and of what its operators make of pairs."""
    parts = {
        "attention": 0,
        "LoR 8": 2 * 2 * length * (8 * HEADS) ** 2 + 6 * HEADS * length**2,
        "basis 8": (6 * HEADS + 4 * 8) * length**2,
        "full": 2 * 2 * length * HIDDEN**2,
        DISTANT: 0,
    }
    return parts[name] * 4 / 2**20


def length_suite(options: argparse.Namespace) -> Iterator[dict]:
    errors = {}
    for name in VARIANTS:
        errors[name] = verify(name, VERIFIED_LENGTH)
        stop_if_wrong(name, errors[name], 1e-9)
    growing = dict.fromkeys(VARIANTS, True)
    for length in options.lengths:
        tokens = torch.randn(1, length, HIDDEN, requires_grad=True)
        mixers = {
            name: make(name, length) for name in VARIANTS if growing[name] and needs_mib(name, length) < options.memory
        }
        for backward in (False, True):
            runs = {
                name: step(partial(mix, mixer, tokens, layout), [tokens, *mixer.parameters()], backward)
                for name, (mixer, layout) in mixers.items()
                if growing[name]
            }
            if DISTANT in runs and length > DISTANCE:
                runs |= floors(mixers[DISTANT][0], length, backward)
            if not runs:
                return
            counts = {}
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                counts[name] = (
                    options.repeats if seconds < 1 else max(1, min(options.repeats, int(options.patience / seconds)))
                )
                if seconds > options.patience:
                    growing[name] = False
            case = f"text, L {length}, C {HIDDEN}, B 1, kv"
            rows, medians = measure(case, BOTH if backward else FORWARD, runs, counts)
            floor = sum(value for name, value in medians.items() if name.startswith("floor"))
            for name, row in rows.items():
                yield {
                    **row,
                    "times_attention": medians[name] / medians["attention"] if "attention" in medians else None,
                    "times_floor": medians[name] / floor if name == DISTANT and floor else None,
                    "error": errors.get(name),
                }
        del mixers, runs


def draw(results: Path, picture: Path) -> None:
    """Time and memory of a forward and backward pass over the length, from the rows of a CSV."""
    import pandas as pd
    from matplotlib.figure import Figure

    rows = pd.read_csv(results)
    rows = rows[(rows["suite"] == "length") & (rows["passes"] == BOTH)]
    rows.index = rows["case"].str.extract(r"L (\d+)", expand=False).astype(int)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in VARIANTS:
        ours = rows[rows["implementation"] == name]
        if len(ours):
            axes[0].plot(ours["median_ms"], marker="o", label=name)
            axes[1].plot(ours["peak_mib"], marker="o", label=name)
    for axis, title in zip(axes, ("milliseconds", "peak MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"forward and backward, {title}")
        axis.set_xticks(LENGTHS, map(str, LENGTHS), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=120)

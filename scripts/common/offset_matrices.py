"""The matrices that Translution has for each offset: their norms, and how far those of near offsets are from what others share.

Legend: `O` offsets, `C` hidden size, `C'` features of all heads, `R` those of the relative part of LoR-Translution.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators.basis import OffsetBasis
from translution.modeling.operators.heads import repeat_features
from translution.modeling.operators.pair_layout import PairLayout
from translution.modeling.operators.quantized import dense


# Of offsets that are no place in a grid: the one that all far pairs share, and those of the class token, in the bank's order.
FAR = "far"
CLASS_OFFSETS = ("class to class", "class from patch", "patch from class")
# Up to which offsets are near where nothing else is said: rows and columns, or tokens.
NEAR = {"image": 1, "text": 3}
# Of a matrix, the largest first.
SINGULAR_VALUES = 4


def bank_matrices(mixer: TranslutionMixer, projection: str) -> Tensor:
    """What a relative projection of a token is multiplied by for each offset, without biases, in the bank's order.

    Full Translution: the bank itself, `[O, C, C']`. A basis: the bank that it mixes. LoR-Translution: its relative part alone, as
    the product of its factors, `U W[o]` `[O, C, R]` for queries and keys and `U W[o] Uo` `[O, C, C']` for values; what is dense is
    the same for all offsets.

    Args:
        mixer: one with that projection.
        projection: one letter of `mixer.relative`.
    """

    def read(name: str) -> Tensor:
        weight = attrgetter(name)(mixer)
        return dense(weight, weight.dtype).detach()

    if mixer.offset_basis is None:
        bank = read(f"{projection}_bank")
    else:
        bank = OffsetBasis(read(f"{projection}_coefficients"), read(f"{projection}_factors")).bank()
    if mixer.factors_have_biases:
        bank = bank[:, :-1]
    if mixer.low_rank:
        bank = read(f"{projection}_down.weight").T @ bank
        if projection == "v":
            bank = repeat_features(bank, mixer.num_heads, mixer.groups) @ read("v_up.weight").T
    return bank


def offset_norms(matrices: Tensor) -> Tensor:
    """The Frobenius norm of each of `[O, …]` matrices, `[O]`, float64."""
    # One after the other: a bank in float64 may not fit.
    return torch.stack([matrix.double().norm() for matrix in matrices])


def offset_labels(layout: PairLayout) -> list[int | list[int] | str]:
    """What each row of a bank is for: a distance, `[rows, columns]`, `FAR`, or one of `CLASS_OFFSETS`.

    Offsets go from the key's token to the query's. Image banks of queries have them the other way, `o(j, i)`.
    """
    if layout.causal:
        distances: list[int | list[int] | str] = list(range(layout.bank_height))
        return [*distances[:-1], FAR] if layout.clamp else distances
    rows, columns = layout.max_row_distance, layout.max_column_distance
    labels: list[int | list[int] | str] = [
        [row, column] for row in range(-rows, rows + 1) for column in range(-columns, columns + 1)
    ]
    if layout.share_far:
        labels.append(FAR)
    return labels + list(CLASS_OFFSETS) * layout.class_token


def far_row(layout: PairLayout) -> int | None:
    """The row of a bank that all far pairs share; none where offsets are clamped axis by axis, or all told apart."""
    labels = offset_labels(layout)
    return labels.index(FAR) if FAR in labels else None


def near_rows(layout: PairLayout, near: int) -> list[int]:
    """Rows of the offsets that are at most `near` and have a matrix of their own, which clamped ones at the edge have not."""
    shared_edges = layout.clamp and not layout.share_far and not layout.causal
    least = near if not shared_edges else min(near, layout.max_row_distance - 1)
    return [
        row
        for row, label in enumerate(offset_labels(layout))
        if not isinstance(label, str) and max(map(abs, label if isinstance(label, list) else [label])) <= least
    ]


def describe_bank(mixer: TranslutionMixer, projection: str, near: int) -> dict[str, Any]:
    """The figures of one bank, for JSON.

    Norms are Frobenius norms. Near offsets are compared with the matrix of far pairs where they share one, and else with the
    mean over all offsets, towards which `decay_offsets` pulls.

    Returns:
        `layer`, counted from 0, `projection`, the `shape` of a matrix, `max_relative_distance`; `norms`, a list with the `offset`
        and the `norm` of each matrix; `reference`, "far" or "mean", with its `reference_norm` and its largest
        `reference_singular_values`; and `near`, a list with, of each near offset, its `relative_distance` `‖W[o] − S‖ / ‖S‖` (None
        where `S` is zero) and the largest `singular_values` of `W[o] − S`.
    """
    layout, matrices = mixer.bank_layout, bank_matrices(mixer, projection)
    labels, far = offset_labels(layout), far_row(mixer.bank_layout)
    shared = matrices.mean(dim=0, dtype=torch.float64) if far is None else matrices[far].double()
    size = shared.norm().item()
    compared = []
    for row in near_rows(layout, near):
        values = torch.linalg.svdvals(matrices[row].double() - shared)
        distance = values.norm().item()
        compared.append(
            {
                "offset": labels[row],
                "relative_distance": distance / size if size else None,
                "singular_values": values[:SINGULAR_VALUES].tolist(),
            }
        )
    norms = zip(labels, offset_norms(matrices).tolist(), strict=True)
    return {
        "layer": mixer.layer_idx,
        "projection": projection,
        "shape": list(matrices.shape[1:]),
        "max_relative_distance": mixer.config.max_relative_distance,
        "norms": [{"offset": label, "norm": norm} for label, norm in norms],
        "reference": "mean" if far is None else FAR,
        "reference_norm": size,
        "reference_singular_values": torch.linalg.svdvals(shared)[:SINGULAR_VALUES].tolist(),
        "near": compared,
    }


def describe_banks(model: nn.Module, near: int) -> Iterator[dict[str, Any]]:
    """`describe_bank` of each relative projection of each layer of Translution."""
    for mixer in model.modules():
        if isinstance(mixer, TranslutionMixer):
            for projection in mixer.relative:
                yield describe_bank(mixer, projection, near)

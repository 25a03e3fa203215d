"""Floating point operations of a forward pass, with formulas for Translution's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from translution.modeling.operators import registration
from translution.modeling.operators.pair_layout import PairLayout


def pair_scores_flops(
    query: Any, key: Any, query_bank: Any, key_bank: Any, num_heads: int, layout: list, **_: Any
) -> int:
    """Of every pair: a vector times its matrix for each side that has a bank, and the inner product."""
    features = query[-1] if query_bank is None else query_bank[-1]
    products = sum(bank[-2] * bank[-1] for bank in (query_bank, key_bank) if bank is not None)
    return 2 * query[0] * num_pairs(layout) * (products + features)


def pair_values_flops(probabilities: Any, value: Any, value_bank: Any, layout: list, **_: Any) -> int:
    """Of every pair: a vector times its matrix, and the weighted sum."""
    return 2 * value[0] * num_pairs(layout) * (value_bank[-2] * value_bank[-1] + value_bank[-1])


def streamed_attention_flops(
    query: Any, key: Any, value: Any, query_bank: Any, key_bank: Any, value_bank: Any, *rest: Any, **_: Any
) -> int:
    """As scores and values together. Pairs beyond a text's distance have no matrix of their own."""
    layout = rest[5]
    features = value[-1] if value_bank is None else value_bank[-1]
    matrices = sum(bank[-2] * bank[-1] for bank in (query_bank, key_bank, value_bank) if bank is not None)
    every = near = num_pairs(layout)
    if layout[-1] >= 0:
        near -= num_pairs([max(layout[0] - layout[-1], 0), *layout[1:]])
    return 2 * query[0] * (near * matrices + every * 2 * features)


def basis_scores_flops(query: Any, keys: Any, weights: Any, **_: Any) -> int:
    """Of every pair, head and factor: the inner product."""
    return 2 * keys[0] * keys[1] * weights[0] * weights[1] * weights[2] * keys[-1]


def basis_values_flops(probabilities: Any, keys: Any, weights: Any, **_: Any) -> int:
    """Of every pair, head and factor: the weighted sum."""
    return basis_scores_flops(probabilities, keys, weights)


def num_pairs(layout: list[int]) -> int:
    """Pairs of a layout as the operators take it: text has those that do not look ahead."""
    height, width, class_token, causal, *_ = layout
    tokens = PairLayout(height, width, bool(class_token), bool(causal), height, width).num_tokens
    return tokens * (tokens + 1) // 2 if causal else tokens**2


def forward_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Operations of matrix products and convolutions in a forward pass: a multiplication and an addition are two.

    The counter knows neither Translution's own operators, which get formulas, nor every fused attention, which the math
    backend replaces.
    """
    formulas = {
        registration.operator("pair_scores"): pair_scores_flops,
        registration.operator("pair_values"): pair_values_flops,
        registration.operator("streamed_attention"): streamed_attention_flops,
        registration.operator("basis_scores"): basis_scores_flops,
        registration.operator("basis_values"): basis_values_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()

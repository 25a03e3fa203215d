"""Wraps three functions over pairs as two differentiable custom operators of PyTorch.

A way to compute the pairs, be it grouped matrix products or CUDA kernels, brings `scores`, `scores_backward` and `values`; their
derivatives do not depend on it. Scores are the derivative of the trilinear form `T(s, q, k) = Σ_ij s_ij <q_ij, k_ij>` by `s`,
values its derivative by a plain `q`. Only the backward pass of the scores is written by hand; that of the values is
composed of the other two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from .pair_layout import PairLayout
from .registration import define, register_once


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def register_pair_operators(
    prefix: str,
    scores: Callable[..., Tensor],
    scores_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    values: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Registers `{prefix}pair_scores`, `…pair_scores_backward` and `…pair_values` with PyTorch, see `registration.py`.

    Args:
        prefix: of the operators' names.
        scores: `(query, key, query_bank, key_bank, num_heads, layout)` to `[B, A, queries, L]`, float64 for float64 inputs
            and float32 otherwise. Keys may have fewer heads than queries, see `heads.py`.
        scores_backward: `(gradient, query, key, query_bank, key_bank, layout, need_query, need_key)` to the gradients of
            query, query bank, key and key bank; an empty tensor for each that is not needed or does not exist.
        values: `(probabilities, value, value_bank, layout, groups)` to `[B, queries, A·e]` of the tokens' type; each head of the
            bank serves `groups` heads, one after the other.

    Returns:
        `pair_scores` and `pair_values`, with the signatures of `reference.py`.
    """
    names = tuple(f"{prefix}{name}" for name in ("pair_scores", "pair_scores_backward", "pair_values"))
    scores_operator, _, values_operator = register_once(
        names, lambda: _register(names, scores, scores_backward, values)
    )

    def pair_scores(
        query: Tensor,
        key: Tensor,
        query_bank: Tensor | None,
        key_bank: Tensor | None,
        num_heads: int,
        layout: PairLayout,
    ) -> Tensor:
        return scores_operator(query, key, query_bank, key_bank, num_heads, pack(layout))

    def pair_values(
        probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout, groups: int = 1
    ) -> Tensor:
        return values_operator(probabilities, value, value_bank, groups, pack(layout))

    return pair_scores, pair_values


def _register(
    names: tuple[str, ...],
    scores: Callable[..., Tensor],
    scores_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    values: Callable[..., Tensor],
) -> None:
    @define(names[0])
    def scores_operator(
        query: Tensor,
        key: Tensor,
        query_bank: Tensor | None,
        key_bank: Tensor | None,
        num_heads: int,
        layout: list[int],
    ) -> Tensor:
        return scores(query, key, query_bank, key_bank, num_heads, unpack(layout))

    @scores_operator.register_fake
    def _(query, key, query_bank, key_bank, num_heads, layout):
        shape = (query.shape[0], num_heads, query.shape[1], key.shape[1])
        return query.new_empty(shape, dtype=accumulation_dtype(query.dtype))

    @define(names[1])
    def scores_backward_operator(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        query_bank: Tensor | None,
        key_bank: Tensor | None,
        layout: list[int],
        need_query: bool,
        need_key: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return scores_backward(gradient, query, key, query_bank, key_bank, unpack(layout), need_query, need_key)

    @scores_backward_operator.register_fake
    def _(gradient, query, key, query_bank, key_bank, layout, need_query, need_key):
        def like(tensor, needed):
            return query.new_empty(0) if tensor is None or not needed else torch.empty_like(tensor).contiguous()

        return like(query, need_query), like(query_bank, need_query), like(key, need_key), like(key_bank, need_key)

    def save_scores(ctx, inputs, output):
        query, key, query_bank, key_bank, _, ctx.layout = inputs
        ctx.save_for_backward(query, key, query_bank, key_bank)

    def differentiate_scores(ctx, gradient):
        query, key, query_bank, key_bank = ctx.saved_tensors
        need_query = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        need_key = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        query_gradient, query_bank_gradient, key_gradient, key_bank_gradient = scores_backward_operator(
            gradient, query, key, query_bank, key_bank, ctx.layout, need_query, need_key
        )
        return (
            query_gradient if ctx.needs_input_grad[0] else None,
            key_gradient if ctx.needs_input_grad[1] else None,
            query_bank_gradient if ctx.needs_input_grad[2] else None,
            key_bank_gradient if ctx.needs_input_grad[3] else None,
            None,
            None,
        )

    scores_operator.register_autograd(differentiate_scores, setup_context=save_scores)

    @define(names[2])
    def values_operator(
        probabilities: Tensor, value: Tensor, value_bank: Tensor, groups: int, layout: list[int]
    ) -> Tensor:
        return values(probabilities, value, value_bank, unpack(layout), groups)

    @values_operator.register_fake
    def _(probabilities, value, value_bank, groups, layout):
        return value.new_empty(value.shape[0], probabilities.shape[2], value_bank.shape[-1] * groups)

    def save_values(ctx, inputs, output):
        probabilities, value, value_bank, _, ctx.layout = inputs
        ctx.save_for_backward(probabilities, value, value_bank)

    def differentiate_values(ctx, gradient):
        probabilities, value, value_bank = ctx.saved_tensors
        num_heads = probabilities.shape[1]
        probability_gradient = value_gradient = bank_gradient = None
        if ctx.needs_input_grad[0]:
            probability_gradient = scores_operator(gradient, value, None, value_bank, num_heads, ctx.layout)
            probability_gradient = probability_gradient.to(probabilities.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            _, _, value_gradient, bank_gradient = scores_backward_operator(
                probabilities, gradient, value, None, value_bank, ctx.layout, False, True
            )
        return probability_gradient, value_gradient, bank_gradient, None, None

    values_operator.register_autograd(differentiate_values, setup_context=save_values)


def pack(layout: PairLayout) -> list[int]:
    """A layout as an operator can take it. Sizes that are symbolic stay so: each is handed on as it is."""
    values = (getattr(layout, field.name) for field in fields(layout))
    return [-1 if value is None else int(value) if isinstance(value, bool) else value for value in values]


def unpack(layout: list[int]) -> PairLayout:
    """The layout that was packed."""
    *sizes, band, share_far = layout
    return PairLayout(*sizes, None if band < 0 else band, share_far)


__all__ = ["accumulation_dtype", "pack", "register_pair_operators", "unpack"]

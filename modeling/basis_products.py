"""Attention products mixed by weights of the pairs, a part at a time: what basis Translution computes.

    scores_ij = Σ_m w_m,ij <q_i, k_mj>          values_i = Σ_m Σ_j w_m,ij p_ij v_mj

are derivatives of one form, `T(s, q, k, w) = Σ_m Σ_ij s_ij w_m,ij <q_i, k_mj>`, by `s` and by `q`. The `n` products per pair are
made for as many receivers as stay in a processor's cache, forward and backward, and never exist whole.

Legend: `B` batch, `A` heads, `L` tokens, `e` size per head, `n` factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .exporting import is_exporting
from .pair_autograd import accumulation_dtype
from .registration import define, register_once


# Products kept at a time: few enough for a processor's cache, and enough that each reads many keys once.
CHUNK_ELEMENTS = 1 << 20


def _chunks(keys: Tensor, receivers: int) -> Iterator[tuple[slice, int, slice]]:
    """Parts of the batch, a head, and parts of the receivers: one after the other."""
    batch, heads = keys.shape[:2]
    most, size = _chunk_shape(keys, receivers)
    for start in range(0, batch, most):
        for head in range(heads):
            for first in range(0, receivers, size):
                yield slice(start, min(start + most, batch)), head, slice(first, min(first + size, receivers))


def _chunk_shape(keys: Tensor, receivers: int) -> tuple[int, int]:
    """Inputs and receivers of a chunk: several inputs only where all receivers of one fit."""
    per_receiver = max(keys.shape[2] * keys.shape[3], 1)
    size = min(max(CHUNK_ELEMENTS // per_receiver, 1), max(receivers, 1))
    return max(CHUNK_ELEMENTS // (per_receiver * max(receivers, 1)), 1), size


def _space(keys: Tensor, receivers: int) -> Tensor:
    """Room for the products of a chunk, taken once: fresh memory costs more than what is written to it."""
    most, size = _chunk_shape(keys, receivers)
    return keys.new_empty(min(most, keys.shape[0]) * keys.shape[2] * size * keys.shape[3])


def _room(space: Tensor, *shape: int) -> Tensor:
    return space[: math.prod(shape)].view(shape)


def _products(query: Tensor, keys: Tensor, space: Tensor) -> Tensor:
    """`[b, r, e]` and `[b, n, L, e]` to `[b, n, r, L]`, in `space`."""
    products = _room(space, *keys.shape[:2], query.shape[1], keys.shape[2])
    for out, one, several in zip(products, query, keys, strict=True):
        torch.bmm(one.expand(len(several), -1, -1), several.transpose(-1, -2), out=out)
    return products


def _mixed(pairs: Tensor, weights: Tensor, space: Tensor) -> Tensor:
    """`[b, r, L]` times `[n, r, L]`, `[b, n, r, L]`, in `space`."""
    return torch.mul(pairs.unsqueeze(1), weights, out=_room(space, len(pairs), *weights.shape))


def _add_products(output: Tensor, mixed: Tensor, keys: Tensor) -> None:
    """`[b, n, r, L]` and `[b, n, L, e]`, multiplied and summed over `n`, into `[b, r, e]`."""
    for out, weighted, several in zip(output, mixed, keys, strict=True):
        torch.addbmm(several.new_zeros(()), weighted, several, beta=0, out=out)


def _scores(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    scores = query.new_empty(*query.shape[:3], keys.shape[3], dtype=wide)
    space = _space(keys, query.shape[2])
    for part, head, rows in _chunks(keys, query.shape[2]):
        products = _products(query[part, head, rows], keys[part, head], space).mul_(weights[:, rows])
        torch.sum(products, dim=1, dtype=wide, out=scores[part, head, rows])
    return scores


def _values(probabilities: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    batch, heads, receivers, _ = probabilities.shape
    output = keys.new_empty(batch, heads, receivers, keys.shape[-1])
    space = _space(keys, receivers)
    for part, head, rows in _chunks(keys, receivers):
        mixed = _mixed(probabilities[part, head, rows].to(keys.dtype), weights[:, rows], space)
        _add_products(output[part, head, rows], mixed, keys[part, head])
    return output


def _backward(
    pairs: Tensor, query: Tensor, keys: Tensor, weights: Tensor, need_query: bool, need_keys: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the form by queries, keys and weights; an empty tensor for each that is not needed."""
    none = query.new_empty(0)
    wide = accumulation_dtype(query.dtype)
    whole = _chunk_shape(keys, query.shape[2])[1] >= query.shape[2]
    query_gradient = torch.empty_like(query) if need_query else none
    keys_gradient = none.clone()
    if need_keys:
        # Where all receivers come at once, a gradient is written once and needs no zeros before, nor a wider type.
        keys_gradient = torch.empty_like(keys) if whole else torch.zeros_like(keys, dtype=wide)
    weights_gradient = torch.zeros_like(weights, dtype=wide) if need_weights else none.clone()
    space = _space(keys, query.shape[2])
    for part, head, rows in _chunks(keys, query.shape[2]):
        given, q, k = pairs[part, head, rows].to(query.dtype), query[part, head, rows], keys[part, head]
        if need_weights:
            for products, one in zip(_products(q, k, space), given, strict=True):
                # A weight's gradient sums over the batch, and a coefficient's over many weights: not rounded before.
                weights_gradient[:, rows].addcmul_(products.to(wide), one.to(wide))
        if not (need_query or need_keys):
            continue
        mixed = _mixed(given, weights[:, rows], space)
        if need_query:
            _add_products(query_gradient[part, head, rows], mixed, k)
        if need_keys:
            # One product at a time goes where it belongs without a copy; a batch of them would not.
            for outs, several, one in zip(keys_gradient[part, head], mixed, q, strict=True):
                for out, weighted in zip(outs, several, strict=True):
                    if whole:
                        torch.mm(weighted.t(), one, out=out)
                    elif out.dtype == one.dtype:
                        out.addmm_(weighted.t(), one)
                    else:
                        out += weighted.t() @ one
    return query_gradient, keys_gradient.to(keys.dtype), weights_gradient.to(weights.dtype)


NAMES = ("basis_scores", "basis_backward", "basis_values")


def _register() -> None:
    @define(NAMES[0])
    def scores_operator(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        return _scores(query, keys, weights)

    @scores_operator.register_fake
    def _(query, keys, weights):
        return query.new_empty(*query.shape[:3], keys.shape[3], dtype=accumulation_dtype(query.dtype))

    @define(NAMES[1])
    def backward_operator(
        pairs: Tensor,
        query: Tensor,
        keys: Tensor,
        weights: Tensor,
        need_query: bool,
        need_keys: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(pairs, query, keys, weights, need_query, need_keys, need_weights)

    @backward_operator.register_fake
    def _(pairs, query, keys, weights, need_query, need_keys, need_weights):
        needed = zip((query, keys, weights), (need_query, need_keys, need_weights), strict=True)
        return tuple(torch.empty_like(tensor) if need else query.new_empty(0) for tensor, need in needed)

    @define(NAMES[2])
    def values_operator(probabilities: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        return _values(probabilities, keys, weights)

    @values_operator.register_fake
    def _(probabilities, keys, weights):
        batch, heads, receivers, _ = probabilities.shape
        return keys.new_empty(batch, heads, receivers, keys.shape[-1])

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def differentiate_scores(ctx, gradient):
        gradients = backward_operator(gradient, *ctx.saved_tensors, *ctx.needs_input_grad)
        return tuple(part if need else None for part, need in zip(gradients, ctx.needs_input_grad, strict=True))

    def differentiate_values(ctx, gradient):
        probabilities, keys, weights = ctx.saved_tensors
        need_probabilities, need_keys, need_weights = ctx.needs_input_grad
        probability_gradient = None
        if need_probabilities:
            probability_gradient = scores_operator(gradient, keys, weights).to(probabilities.dtype)
        _, keys_gradient, weights_gradient = backward_operator(
            probabilities, gradient, keys, weights, False, need_keys, need_weights
        )
        return probability_gradient, keys_gradient if need_keys else None, weights_gradient if need_weights else None

    scores_operator.register_autograd(differentiate_scores, setup_context=save)
    values_operator.register_autograd(differentiate_values, setup_context=save)


_scores_operator, _, _values_operator = register_once(NAMES, _register)


def mixed_scores(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """`Σ_m w_m,ij <q_i, k_mj>`, `[B, A, receivers, L]`, in float32 at least.

    Args:
        query: `[B, A, receivers, e]`.
        keys: `[B, A, n, L, e]`.
        weights: `[n, receivers, L]`.
    """
    if is_exporting():
        return (query.unsqueeze(2) @ keys.transpose(-1, -2) * weights).sum(2, dtype=accumulation_dtype(query.dtype))
    return _scores_operator(query, keys, weights)


def mixed_values(probabilities: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """`Σ_m Σ_j w_m,ij p_ij v_mj`, `[B, A, receivers, e]`, from `[B, A, receivers, L]`, `[B, A, n, L, e]`, `[n, receivers, L]`."""
    if is_exporting():
        return (probabilities.unsqueeze(2) * weights @ values).sum(2)
    return _values_operator(probabilities, values, weights)


__all__ = ["mixed_scores", "mixed_values"]

"""Basis Translution: pairs whose matrices are mixed from a few shared ones, computed without building the bank.

A bank of `n` factors is `W[o] = Σ_m b[o, m] U[m]`. The projections `x_j U[m]` belong to tokens, not to pairs, and

    <q_i, x_j W[o]> = Σ_m b[o, m] <q_i, x_j U[m]>,      Σ_j p_ij x_j W[o] = Σ_m Σ_j (p_ij b[o, m]) x_j U[m]

are `n` ordinary attention products mixed by the offset: `n·2·B·L²·C'` operations instead of `2·B·L²·C·C'`. Where queries and
keys both have a basis there are `n²` products. Both are derivatives of one form, `T(s, q, k, w) = Σ_m Σ_ij s_ij w_m,ij <q_i, k_mj>`,
by `s` and by `q`. The products are made for as many queries as stay in a processor's cache, forward and backward, and never exist
whole. The signatures are those of `reference.py`, with an `OffsetBasis` for each bank.

Factors of keys and values may have fewer heads, `A / groups`: each head of theirs is read by `groups` heads, and is not repeated.

Legend: `B` batch, `A` heads, `L` tokens, `e` bank output size per head, `n` factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .exporting import is_exporting
from .heads import groups_of, merge_heads, repeat_heads, split_heads
from .pair_autograd import accumulation_dtype
from .pair_layout import PairLayout, StepLayout
from .registration import define, register_once


# Products kept at a time: few enough for a processor's cache, and enough that each reads many keys once.
CHUNK_ELEMENTS = 1 << 20


class OffsetBasis(NamedTuple):
    """A bank in factors: `coefficients` `[num_offsets, n]` and `factors` `[n, in, A·e]`."""

    coefficients: Tensor
    factors: Tensor

    def bank(self) -> Tensor:
        """The bank itself, `[num_offsets, in, A·e]`."""
        return torch.einsum("om,mcd->ocd", self.coefficients, self.factors)

    def to(self, dtype: torch.dtype) -> OffsetBasis:
        return OffsetBasis(self.coefficients.to(dtype), self.factors.to(dtype))


def pair_scores(
    query: Tensor,
    key: Tensor,
    query_bank: OffsetBasis | None,
    key_bank: OffsetBasis | None,
    num_heads: int,
    layout: PairLayout | StepLayout,
) -> Tensor:
    """Inner products `<q_ij, k_ij>` of every pair and head, `[B, A, queries, L]`; see `reference.pair_scores`."""
    rows, reverse_rows = layout.offsets(query.device)
    query_heads, query_coefficients = project_factors(query, query_bank, num_heads)
    groups = groups_of(query, key, *(None if bank is None else bank.factors for bank in (query_bank, key_bank)))
    key_heads, key_coefficients = project_factors(key, key_bank, num_heads // groups)
    key_weights = _weights(key_coefficients, rows, key)
    if query_coefficients is None:
        scores = mixed_scores(query_heads[:, :, 0], key_heads, key_weights)
    elif key_coefficients is None:
        # Pairs seen from the other side. What is read there has as many heads as queries have.
        key_heads = repeat_heads(key_heads, groups)
        weights = _weights(query_coefficients, reverse_rows, query).transpose(1, 2)
        scores = mixed_scores(key_heads[:, :, 0], query_heads, weights.contiguous()).transpose(-1, -2)
    else:
        query_weights = _weights(query_coefficients, reverse_rows, query)
        scores = 0
        for one_query, weight in zip(query_heads.unbind(2), query_weights.unbind(0), strict=True):
            scores = scores + mixed_scores(one_query, key_heads, key_weights * weight)
    return scores.masked_fill(rows < 0, 0) if layout.causal else scores


def pair_values(
    probabilities: Tensor, value: Tensor, value_bank: OffsetBasis, layout: PairLayout | StepLayout, groups: int = 1
) -> Tensor:
    """Weighted sums `Σ_j p_ij v_j Wv[o(i, j)]`, `[B, queries, A·e]`; see `reference.pair_values`."""
    rows, _ = layout.offsets(value.device)
    heads, coefficients = project_factors(value, value_bank, probabilities.shape[1] // groups)
    probabilities = probabilities.to(value.dtype)
    if layout.causal:
        probabilities = probabilities.masked_fill(rows < 0, 0)
    return merge_heads(mixed_values(probabilities, heads, _weights(coefficients, rows, value)))


def project_factors(tokens: Tensor, basis: OffsetBasis | None, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """The tokens' projections by every factor, `[B, A, n, L, e]`, and their coefficients `[num_offsets, n]`.

    Without a basis the tokens are projections already: one factor, and no coefficients.
    """
    if basis is None:
        return split_heads(tokens, num_heads)[:, :, None], None
    projected = torch.einsum("blc,mcd->bmld", tokens, basis.factors)
    return projected.unflatten(-1, (num_heads, -1)).permute(0, 3, 1, 2, 4), basis.coefficients


def _weights(coefficients: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    """Each factor's weight in each pair, `[n, queries, L]`; one without coefficients."""
    if coefficients is None:
        return like.new_ones(1, *rows.shape)
    # Pairs that do not exist have no row; whatever weight they get is multiplied by zero. A coefficient's gradient sums over
    # many pairs: in a type that can hold the sum.
    wide = coefficients.to(accumulation_dtype(coefficients.dtype))
    weights = torch.nn.functional.embedding(rows.clamp(min=0), wide).to(coefficients.dtype)
    return weights.permute(2, 0, 1).contiguous()


def _chunks(keys: Tensor, num_heads: int, num_queries: int) -> Iterator[tuple[slice, int, int, slice]]:
    """Parts of the batch, a head of queries and the one of keys that it reads, and parts of the queries: one after the other."""
    batch, groups = keys.shape[0], num_heads // keys.shape[1]
    most, size = _chunk_shape(keys, num_queries)
    for start in range(0, batch, most):
        part = slice(start, min(start + most, batch))
        for head in range(num_heads):
            for first in range(0, num_queries, size):
                yield part, head, head // groups, slice(first, min(first + size, num_queries))


def _chunk_shape(keys: Tensor, num_queries: int) -> tuple[int, int]:
    """Inputs and queries of a chunk: several inputs only where all queries of one fit."""
    per_query = max(keys.shape[2] * keys.shape[3], 1)
    size = min(max(CHUNK_ELEMENTS // per_query, 1), max(num_queries, 1))
    return max(CHUNK_ELEMENTS // (per_query * max(num_queries, 1)), 1), size


def _space(keys: Tensor, num_queries: int) -> Tensor:
    """Room for the products of a chunk, taken once: fresh memory costs more than what is written to it."""
    most, size = _chunk_shape(keys, num_queries)
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
    for part, head, shared, rows in _chunks(keys, *query.shape[1:3]):
        products = _products(query[part, head, rows], keys[part, shared], space).mul_(weights[:, rows])
        torch.sum(products, dim=1, dtype=wide, out=scores[part, head, rows])
    return scores


def _values(probabilities: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    batch, heads, num_queries, _ = probabilities.shape
    output = keys.new_empty(batch, heads, num_queries, keys.shape[-1])
    space = _space(keys, num_queries)
    for part, head, shared, rows in _chunks(keys, heads, num_queries):
        mixed = _mixed(probabilities[part, head, rows].to(keys.dtype), weights[:, rows], space)
        _add_products(output[part, head, rows], mixed, keys[part, shared])
    return output


def _backward(
    pairs: Tensor, query: Tensor, keys: Tensor, weights: Tensor, need_query: bool, need_keys: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the form by queries, keys and weights; an empty tensor for each that is not needed."""
    none = query.new_empty(0)
    wide = accumulation_dtype(query.dtype)
    once = keys.shape[1] == query.shape[1] and _chunk_shape(keys, query.shape[2])[1] >= query.shape[2]
    query_gradient = torch.empty_like(query) if need_query else none
    keys_gradient = none.clone()
    if need_keys:
        # Where all queries that read a head come at once, a gradient is written once and needs no zeros before, nor a wider type.
        keys_gradient = torch.empty_like(keys) if once else torch.zeros_like(keys, dtype=wide)
    weights_gradient = torch.zeros_like(weights, dtype=wide) if need_weights else none.clone()
    space = _space(keys, query.shape[2])
    for part, head, shared, rows in _chunks(keys, *query.shape[1:3]):
        given, q, k = pairs[part, head, rows].to(query.dtype), query[part, head, rows], keys[part, shared]
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
            for outs, several, one in zip(keys_gradient[part, shared], mixed, q, strict=True):
                for out, weighted in zip(outs, several, strict=True):
                    if once:
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
        batch, heads, num_queries, _ = probabilities.shape
        return keys.new_empty(batch, heads, num_queries, keys.shape[-1])

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
    """`Σ_m w_m,ij <q_i, k_mj>`, `[B, A, queries, L]`, in float32 at least.

    Args:
        query: `[B, A, queries, e]`.
        keys: `[B, A / groups, n, L, e]`.
        weights: `[n, queries, L]`.
    """
    if is_exporting():
        keys = repeat_heads(keys, query.shape[1] // keys.shape[1])
        return (query.unsqueeze(2) @ keys.transpose(-1, -2) * weights).sum(2, dtype=accumulation_dtype(query.dtype))
    return _scores_operator(query, keys, weights)


def mixed_values(probabilities: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """`Σ_m Σ_j w_m,ij p_ij v_mj`, `[B, A, queries, e]`.

    Args:
        probabilities: `[B, A, queries, L]`.
        values: `[B, A / groups, n, L, e]`.
        weights: `[n, queries, L]`.
    """
    if is_exporting():
        values = repeat_heads(values, probabilities.shape[1] // values.shape[1])
        return (probabilities.unsqueeze(2) * weights @ values).sum(2)
    return _values_operator(probabilities, values, weights)


__all__ = ["OffsetBasis", "pair_scores", "pair_values", "project_factors"]

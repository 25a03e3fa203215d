"""Floating point operations of the operators, by which PyTorch's `FlopCounterMode` counts them like its own.

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(**inputs).loss.backward()

A formula is pairs times the products of one pair, as `reference.py` says them: of full Translution, each pair that exists has
projections of its own. Otherwise PyTorch's rules hold: a
multiplication and an addition are two operations, only matrix and inner products count, and a backward pass has one more product
for each that it has to compute again.

Arguments are the shapes of an operator's tensors, and its other arguments as they are. Layouts are packed, see
`pair_autograd.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula


Shape = Sequence[int]
Bank = Shape | None


def pair_scores(query: Shape, key: Shape, query_bank: Bank, key_bank: Bank, num_heads: int, layout: list[int]) -> int:
    """Of each pair the matrix of each side that has a bank, and the inner product."""
    products = _matrix(query_bank) + _matrix(key_bank) + (query_bank or query)[-1]
    return 2 * query[0] * _num_pairs(layout, key[1]) * products


def pair_scores_backward(
    scores: Shape, query: Shape, key: Shape, query_bank: Bank, key_bank: Bank, layout: list[int], *needed: bool
) -> int:
    """Of each pair and side in need of gradients: the other side again, weighted, for tokens and for matrices."""
    matrices = _matrix(query_bank), _matrix(key_bank)
    sides = zip(needed, matrices, reversed(matrices), strict=True)
    products = sum(need * (other + (query_bank or query)[-1] + 2 * own) for need, own, other in sides)
    return 2 * query[0] * _num_pairs(layout, key[1]) * products


def pair_values(probabilities: Shape, value: Shape, value_bank: Shape, groups: int, layout: list[int]) -> int:
    """Of each pair the matrix, and the weighted sum."""
    return 2 * value[0] * _num_pairs(layout, value[1]) * (_matrix(value_bank) + groups * value_bank[-1])


def streamed_attention(query: Shape, key: Shape, value: Shape, *rest: Any) -> int:
    """As scores and values together."""
    banks, layout = rest[:3], rest[-1]
    vectors = 2 * (banks[0] or query)[-1]
    return 2 * query[0] * _num_pairs(layout, key[1]) * (sum(map(_matrix, banks)) + vectors)


def streamed_attention_backward(
    gradient: Shape, output: Shape, logsumexp: Shape, query: Shape, key: Shape, value: Shape, *rest: Any
) -> int:
    """Of each pair everything but the weighted sum again, and for each side in need of gradients as `pair_scores_backward`."""
    banks, (layout, *needed) = rest[:3], rest[-4:]
    need_scores = needed[0] or needed[1]
    sizes = [_matrix(bank) for bank in banks]
    matrices = sizes[0] + sizes[1] + need_scores * sizes[2]
    matrices += 2 * sum(need * size for need, size in zip(needed, sizes, strict=True))
    vectors = (1 + need_scores + sum(needed)) * (banks[0] or query)[-1]
    return 2 * query[0] * _num_pairs(layout, key[1]) * (matrices + vectors)


def basis_products(pairs: Shape, keys: Shape, weights: Shape) -> int:
    """Of each query, key, head and factor the product, whether or not a mask hides the pair."""
    return 2 * prod(pairs[:2]) * prod(keys[2:]) * weights[1]


def basis_backward(pairs: Shape, query: Shape, keys: Shape, weights: Shape, *needed: bool) -> int:
    """One such product for each gradient."""
    return sum(needed) * basis_products(query, keys, weights)


def basis_attention(*arguments: Any) -> int:
    """Of each pair and head: a product for every factor of queries and of keys, one for every factor of values, and the dense ones."""
    return _basis_attention(*arguments, of_scores=1, of_values=1)


def basis_attention_backward(*arguments: Any) -> int:
    """The products of scores again, and two gradients each; the gradient of probabilities, and that of values."""
    return _basis_attention(*arguments[5:], of_scores=3, of_values=2)


def _basis_attention(query: Shape, key: Shape, value: Shape, *rest: Any, of_scores: int, of_values: int) -> int:
    dense_query, _, dense_value, *_, layout = rest[3:]
    scores = query[2] * key[2] * query[-1] + (dense_query or [0])[-1]
    values = value[2] * value[-1] + (dense_value or [0])[-1]
    return 2 * prod(query[:2]) * _num_pairs(layout, key[3]) * (of_scores * scores + of_values * values)


def project_each(tokens: Shape, matrices: Sequence[Shape]) -> int:
    """Of each token every matrix."""
    return 2 * prod(tokens[:2]) * sum(map(_matrix, matrices))


def project_each_backward(gradients: Sequence[Shape], tokens: Shape, matrices: Sequence[Shape]) -> int:
    """Two such products: one for tokens, one for matrices."""
    return 2 * project_each(tokens, matrices)


def local_attention(
    queries: Sequence[Shape], keys: Sequence[Shape], values: Sequence[Shape], far: Sequence[Shape], *rest: Any
) -> int:
    """Of each pair, near or far, the inner product and the weighted sum; the projections are counted by `project_each`."""
    every, _ = _local_pairs(queries, keys, values, far, rest[-1])
    return 2 * queries[0][0] * every * (queries[0][-1] + _output_features(queries, keys, values))


def local_attention_backward(gradient: Shape, output: Shape, logsumexp: Shape, weights: Shape, *rest: Any) -> int:
    """Of each pair two products for each of the forward pass, and of far pairs their scores again."""
    queries, keys, values, far = rest[:4]
    every, near = _local_pairs(queries, keys, values, far, rest[-1])
    again = (every - near) * queries[0][-1]
    products = queries[0][-1] + _output_features(queries, keys, values)
    return 2 * queries[0][0] * (2 * every * products + again)


def _output_features(queries: Sequence[Shape], keys: Sequence[Shape], values: Sequence[Shape]) -> int:
    """Those of values, for every head of queries that shares them."""
    return queries[0][-1] // keys[0][-1] * values[0][-1]


def _local_pairs(
    queries: Sequence[Shape], keys: Sequence[Shape], values: Sequence[Shape], far: Sequence[Shape], layout: list[int]
) -> tuple[int, int]:
    """All pairs, and those that are not far: near ones, and those with one more key that all queries see."""
    height, width, _, causal, bank_height = layout[:5]
    if causal:
        near = _num_pairs(layout, height)
        tokens = far[1][2] if far else height
        past = tokens - queries[0][1]
        return (_triangle(tokens) - _triangle(past) if far else near), near
    num_tokens, shares_far = height * width, layout[9]
    near = 0
    if shares_far:
        near = prod(
            sum(size - abs(step) for step in range(1 - size, size) if abs(step) < bank_height)
            for size in (height, width)
        )
    return (num_tokens**2 if far else near) + num_tokens, near + num_tokens


def _matrix(bank: Bank) -> int:
    """Products of a vector with a matrix of a bank."""
    return 0 if bank is None else bank[-2] * bank[-1]


def _num_pairs(layout: list[int], num_tokens: int) -> int:
    """The pairs of a packed layout."""
    causal, past, band = layout[3], layout[7], layout[8]
    if not causal:
        return num_tokens**2
    pairs = _triangle(num_tokens) - _triangle(past)
    if band < 0:
        return pairs
    return pairs - _triangle(max(num_tokens - band, 0)) + _triangle(max(past - band, 0))


def _triangle(num_tokens: int) -> int:
    """Pairs of a text that do not look ahead."""
    return num_tokens * (num_tokens + 1) // 2


FORMULAS: dict[str, Callable[..., int]] = {
    "pair_scores": pair_scores,
    "pair_scores_backward": pair_scores_backward,
    "pair_values": pair_values,
    "gemm_pair_scores": pair_scores,
    "gemm_pair_scores_backward": pair_scores_backward,
    "gemm_pair_values": pair_values,
    "triton_pair_scores": pair_scores,
    "triton_pair_scores_backward": pair_scores_backward,
    "triton_pair_values": pair_values,
    "streamed_attention": streamed_attention,
    "streamed_attention_backward": streamed_attention_backward,
    "basis_scores": basis_products,
    "basis_values": basis_products,
    "basis_backward": basis_backward,
    "basis_attention": basis_attention,
    "basis_attention_backward": basis_attention_backward,
    "project_each": project_each,
    "project_each_backward": project_each_backward,
    "local_attention": local_attention,
    "local_attention_backward": local_attention_backward,
    "triton_local_attention": local_attention,
    "triton_local_attention_backward": local_attention_backward,
}


def count_flops(name: str, operator: Any) -> None:
    """Has PyTorch count an operator, `torch.ops.…`, by the formula of its name."""
    formula = FORMULAS[name]
    register_flop_formula(operator)(lambda *shapes, out_shape: formula(*shapes))


__all__ = ["count_flops"]

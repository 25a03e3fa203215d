"""Local Translution with a Triton kernel for near pairs: ordinary attention to far ones, then one pass that adds the near ones to it.

The kernel goes through the terms of a query with a running maximum, beginning with the output and the log-sum-exp of its far pairs. The
backward pass takes the log-sum-exp of all pairs, first for queries, then for keys and values, of which each program owns some: no
atomics. Keys and values that heads of queries share are read where they are, and a program of their gradients goes through those heads.
The kernels are in `local_kernels.py`, far pairs in `local.py`.

Legend: `B` batch, `Q` queries, `A` heads, `e` features per head of queries and keys, `v` of values, `T` near terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import launch, next_power_of_2
from ..kernels.local_kernels import near_kernel, near_key_gradient_kernel, near_query_gradient_kernel
from .far_blocks import far_blocks
from .heads import groups_of, split_heads
from .local import attend_far, far_gradients, merge_far, near_terms, of_term, register_local_operators
from .pair_autograd import accumulation_dtype
from .pair_layout import PairLayout


try:
    import triton.language as tl
except ImportError as error:
    raise ImportError("`attn_implementation='triton'` needs Triton: `pip install triton`.") from error


# Terms of one launch: each has pointers of its own, and is unrolled.
MAX_TERMS = 16
# Elements of a tile of tokens and features, warps, stages: as many as fill the loads of a thread, and many programs at once.
_TILES = ((1024, 4, 1), (512, 4, 1), (256, 2, 1))


class _Part(NamedTuple):
    """Some of the terms, each with its query, key and value; one tensor may serve several, which follow each other."""

    terms: slice
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    row_offsets: tuple[int, ...]
    column_offsets: tuple[int, ...]

    def constants(self, num_heads: int) -> dict[str, Any]:
        """What all kernels are compiled for."""
        query, value = self.queries[0], self.values[0]
        groups = groups_of(query, self.keys[0])
        features, wide = query.shape[-1] // num_heads, value.shape[-1] // (num_heads // groups)
        return {
            "GROUPS": groups,
            "TERMS": len(self.queries),
            "ROW_OFFSETS": self.row_offsets,
            "COLUMN_OFFSETS": self.column_offsets,
            "ONE_KEY": tuple(part.shape[1] == 1 for part in self.keys),
            "ONE_VALUE": tuple(part.shape[1] == 1 for part in self.values),
            "E": features,
            "E_WIDTH": next_power_of_2(features),
            "V": wide,
            "V_WIDTH": next_power_of_2(wide),
            "WIDE": tl.float64 if accumulation_dtype(query.dtype) == torch.float64 else tl.float32,
        }


def _parts(
    queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], layout: PairLayout
) -> Iterator[_Part]:
    """All terms, as many at a time as one launch takes."""
    terms = max(len(queries), len(keys), len(values))
    offsets = near_terms(layout, terms)
    contiguous = ([part.contiguous() for part in parts] for parts in (queries, keys, values))
    each = [[of_term(parts, index, terms) for index in range(terms)] for parts in contiguous]
    for start in range(0, terms, MAX_TERMS):
        part = slice(start, min(start + MAX_TERMS, terms))
        rows, columns = ([getattr(offset, f"{axis}_offset") for offset in offsets[part]] for axis in ("row", "column"))
        yield _Part(part, *(side[part] for side in each), tuple(rows), tuple(columns))


def _is_new(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Whether each has another tensor than the one before, and so the one past the end."""
    return (True, *(one is not other for one, other in pairwise(tensors)), True)


def _geometry(layout: PairLayout, batch: int, num_heads: int) -> dict[str, int]:
    return {
        "batch_size": batch,
        "num_heads": num_heads,
        "queries": layout.num_queries,
        "width": layout.width,
        "height": layout.height,
        "past": layout.past,
    }


def _launch(kernel: Any, tokens: int, heads: int, constants: dict[str, Any], **arguments: Any) -> None:
    """Runs a kernel over tokens of every batch entry and head, of queries or of keys; tiles of wide heads have fewer tokens."""
    widest = max(constants["E_WIDTH"], constants["V_WIDTH"])
    options = [
        {"TOKENS": max(min(elements // widest, next_power_of_2(tokens)), 1), "num_warps": warps, "num_stages": stages}
        for elements, warps, stages in _TILES
    ]
    launch(
        kernel,
        lambda option: (-(-tokens // option["TOKENS"]) * arguments["batch_size"] * heads,),
        options,
        lambda option: {},
        **arguments,
        **constants,
    )


class _Far(NamedTuple):
    """Attention of some queries to other keys than those of a launch, `[B, A, queries, v]` and `[B, A, queries]`."""

    output: Tensor
    logsumexp: Tensor
    start: int


def _far(
    far: Sequence[Tensor], far_bias: Tensor | None, scale: float, layout: PairLayout, like: Tensor, num_heads: int
) -> _Far | None:
    """Attention to far pairs: as it is found where one call serves, else merged."""
    if not far:
        return None
    blocks = far_blocks(far, far_bias, layout)
    block, another = next(blocks, None), next(blocks, None)
    if another is None:
        return _Far(*attend_far(far, block, scale), block.queries.start or 0)
    batch, wide = len(like), accumulation_dtype(like.dtype)
    output = like.new_zeros(batch, layout.num_queries, num_heads * far[2].shape[-1], dtype=wide)
    logsumexp = like.new_full((batch, layout.num_queries, num_heads), torch.finfo(wide).min, dtype=wide)
    merge_far(output, logsumexp, far, far_bias, scale, layout)
    return _Far(split_heads(output, num_heads), logsumexp.transpose(1, 2), 0)


def _strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    strides = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def _forward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    far: Sequence[Tensor],
    near_bias: Tensor | None,
    far_bias: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    like, value, terms = queries[0], values[0], max(len(queries), len(keys), len(values))
    batch, wide = len(like), accumulation_dtype(like.dtype)
    shape = (batch, layout.num_queries, num_heads)
    features = groups_of(like, keys[0]) * value.shape[-1]
    scores = like.new_empty((terms, *shape), dtype=wide)
    others = _far(far, far_bias, scale, layout, like, num_heads)
    for part in _parts(queries, keys, values, layout):
        is_last = part.terms.stop == terms
        output = value.new_empty(*shape[:2], features, dtype=value.dtype if is_last else wide)
        logsumexp = like.new_empty(shape, dtype=wide)
        bias = None if near_bias is None else near_bias[part.terms].expand(-1, *shape)
        found = None if others is None else others.output
        if found is not None and found.stride(-1) != 1:
            found = found.contiguous()
        _launch(
            near_kernel,
            layout.num_queries,
            num_heads,
            part.constants(num_heads) | {"NEW_QUERY": _is_new(part.queries), "HAS_FAR": others is not None, "BIASED": bias is not None},
            output=output,
            logsumexp=logsumexp,
            scores=scores[part.terms],
            query=tuple(part.queries),
            key=tuple(part.keys),
            value=tuple(part.values),
            # A pointer that is not read may point anywhere.
            far_output=output if found is None else found,
            far_logsumexp=logsumexp if others is None else others.logsumexp,
            bias=logsumexp if bias is None else bias,
            **_strides("far_output", found, "bai"),
            **_strides("far_logsumexp", None if others is None else others.logsumexp, "bai"),
            **_strides("bias", bias, "tbia"),
            scale=scale,
            far_start=0 if others is None else others.start,
            far_stop=0 if others is None else others.start + found.shape[2],
            **_geometry(layout, batch, num_heads),
        )  # fmt: skip
        # The terms that are left are added to all before them.
        others = _Far(split_heads(output, num_heads), logsumexp.transpose(1, 2), 0)
    return output, logsumexp, scores


def _backward(
    gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scores: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    far: Sequence[Tensor],
    far_bias: Tensor | None,
    num_heads: int,
    scale: float,
    layout: PairLayout,
) -> list[list[Tensor]]:
    gradient, terms = gradient.contiguous(), len(scores)
    sides = (queries, keys, values)
    gradients: list[list[Tensor | None]] = [[None] * len(side) for side in sides]

    def add(side: int, term: int, tensor: Tensor) -> None:
        place = max(term - (terms - len(sides[side])), 0)
        before = gradients[side][place]
        gradients[side][place] = tensor if before is None else before + tensor

    for part in _parts(queries, keys, values, layout):
        # A tensor that terms of several launches share has a gradient of each.
        each = [_gradients_like(side, whole=terms <= MAX_TERMS) for side in (part.queries, part.keys, part.values)]
        weights, score_gradients = (torch.empty_like(scores[part.terms]) for _ in range(2))
        common = part.constants(num_heads)
        geometry = _geometry(layout, len(gradient), num_heads)
        _launch(
            near_query_gradient_kernel,
            layout.num_queries,
            num_heads,
            common | {"NEW_QUERY": _is_new(part.queries)},
            weights=weights,
            score_gradients=score_gradients,
            query_gradient=tuple(each[0]),
            gradient=gradient,
            output=output,
            logsumexp=logsumexp,
            scores=scores[part.terms],
            key=tuple(part.keys),
            value=tuple(part.values),
            scale=scale,
            **geometry,
        )
        _launch(
            near_key_gradient_kernel,
            layout.num_tokens,
            num_heads // common["GROUPS"],
            common | {"NEW_KEY": _is_new(part.keys), "NEW_VALUE": _is_new(part.values)},
            weights=weights,
            score_gradients=score_gradients,
            key_gradient=tuple(each[1]),
            value_gradient=tuple(each[2]),
            gradient=gradient,
            query=tuple(part.queries),
            **geometry,
        )
        for index, term in enumerate(range(*part.terms.indices(terms))):
            if common["ONE_KEY"][index]:
                each[1][index] = _sum(score_gradients[index], part.queries[index], num_heads, common["GROUPS"])
            if common["ONE_VALUE"][index]:
                each[2][index] = _sum(weights[index], gradient, num_heads, common["GROUPS"])
            for side, found in enumerate(each):
                if index == 0 or found[index] is not found[index - 1]:
                    add(side, term, found[index])
    return [
        *(
            [part.to(like.dtype) for part, like in zip(*pair, strict=True)]
            for pair in zip(gradients, sides, strict=True)
        ),
        far_gradients(gradient, output, logsumexp, far, far_bias, num_heads, scale, layout),
    ]


def _gradients_like(tensors: Sequence[Tensor], whole: bool) -> list[Tensor]:
    """Memory for the gradients of the tensors of some terms; in a wider type where they are not the whole."""
    made: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        if index and tensor is tensors[index - 1]:
            made.append(made[-1])
        else:
            made.append(torch.empty_like(tensor, dtype=tensor.dtype if whole else accumulation_dtype(tensor.dtype)))
    return made


def _sum(factors: Tensor, tokens: Tensor, num_heads: int, groups: int) -> Tensor:
    """`Σ_i factor_i x_i`, also over heads that share a key, `[B, 1, A / groups · e]`, of `[B, Q, A]` and `[B, Q, A·e]`: the gradient of
    one key that all queries see.
    """
    axes = (num_heads // groups, groups)
    factors, heads = factors.to(tokens.dtype).unflatten(-1, axes), tokens.unflatten(-1, (*axes, -1))
    return torch.einsum("biag,biage->bae", factors, heads).flatten(1).unsqueeze(1)


local_attention = register_local_operators("triton_", _forward, _backward)


__all__ = ["local_attention"]

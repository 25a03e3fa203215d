"""Full Translution alone, over all pairs: against gathering a matrix per pair, and against the bare matrix products.

Implementations:
    floor           the bare matrix products of the operator, nothing else: one per offset and projection, four times as many
                    with backward (recomputation counted)
    grouped         this package's two operators, with the square of scores between them
    streamed        this package's single pass, with online softmax
    reference       this package's readable path
    gather          a matrix gathered per pair, `[L, L, C, C']`, then one contraction (`einsum`)
    gather-matmul   the same with a broadcast `matmul`, which copies the matrices once per image: the published code's way
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measuring import BOTH, FORWARD, measure, step, stop_if_wrong, worst_error
from translution.modeling.operators import grouped, reference
from translution.modeling.operators.pair_layout import PairLayout
from translution.modeling.operators.streamed import streamed_attention


HEADS = 3


class Case(NamedTuple):
    """What one group of rows is measured on: `projections` are the relative ones of `q`, `k`, `v`."""

    name: str
    layout: PairLayout
    hidden: int
    batch: int
    projections: str
    dtype: torch.dtype = torch.float32


CASES = (
    Case("image 7x7", PairLayout.for_image(7, 7, 7, 7), 192, 8, "qkv"),
    Case("image 14x14", PairLayout.for_image(14, 14, 14, 14), 192, 8, "qkv"),
    Case("image 14x14", PairLayout.for_image(14, 14, 14, 14), 192, 8, "qkv", torch.bfloat16),
    Case("image 20x20", PairLayout.for_image(20, 20, 20, 20), 192, 2, "kv"),
    Case("text 256", PairLayout.for_text(256, 256), 192, 4, "kv"),
    Case("text 256", PairLayout.for_text(256, 256), 192, 4, "kv", torch.bfloat16),
    Case("image 4x4", PairLayout.for_image(4, 4, 4, 4), 48, 50, "kv"),
    Case("image 7x7", PairLayout.for_image(7, 7, 7, 7), 48, 50, "kv"),
    Case("text 16", PairLayout.for_text(16, 16), 48, 50, "kv"),
    Case("text 64", PairLayout.for_text(64, 64), 48, 50, "kv"),
)
# The reference keeps a matrix per pair for its backward pass; up to so many elements that is a few GiB.
REFERENCE_ELEMENTS = 2**28
SLOPE_STEP = 1e-5
# Largest relative error of a result that is timed.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Banks = dict[str, Tensor]


def attend(scores: Tensor, head_dim: int, layout: PairLayout) -> Tensor:
    scores = scores * head_dim**-0.5
    if layout.causal:
        scores = scores.masked_fill(layout.offsets(scores.device)[0] < 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def with_operators(operators) -> Callable[..., Tensor]:
    def run(tokens: Tensor, banks: Banks, layout: PairLayout) -> Tensor:
        scores = operators.pair_scores(tokens, tokens, banks.get("q"), banks.get("k"), HEADS, layout)
        weights = attend(scores, banks["v"].shape[-1] // HEADS, layout)
        return operators.pair_values(weights, tokens, banks["v"], layout)

    return run


def streamed(tokens: Tensor, banks: Banks, layout: PairLayout) -> Tensor:
    scale = (banks["v"].shape[-1] // HEADS) ** -0.5
    return streamed_attention(tokens, tokens, tokens, *(banks.get(name) for name in "qkv"), HEADS, scale, layout)


def with_gather(broadcast: bool) -> Callable[..., Tensor]:
    def project(tokens: Tensor, matrices: Tensor) -> Tensor:
        """`tokens` `[B, L or 1, L or 1, C]`, `matrices` `[L, L, C, C']`: the projection of each pair, `[B, L, L, A, d]`."""
        if broadcast:
            projected = (tokens.unsqueeze(3) @ matrices).squeeze(3)
        else:
            length = matrices.shape[0]
            projected = torch.einsum("bijc,ijcd->bijd", tokens.expand(-1, length, length, -1), matrices)
        return projected.unflatten(-1, (HEADS, -1))

    def run(tokens: Tensor, banks: Banks, layout: PairLayout) -> Tensor:
        rows, reverse = (offsets.clamp(min=0) for offsets in layout.offsets(tokens.device))
        query, key = (tokens.unsqueeze(axis).unflatten(-1, (HEADS, -1)) for axis in (2, 1))
        if "q" in banks:
            query = project(tokens.unsqueeze(2), banks["q"][reverse])
        if "k" in banks:
            key = project(tokens.unsqueeze(1), banks["k"][rows])
        query, key = torch.broadcast_tensors(query, key)
        weights = attend(torch.einsum("bijad,bijad->baij", query, key), query.shape[-1], layout)
        value = project(tokens.unsqueeze(1), banks["v"][rows])
        return torch.einsum("baij,bijad->biad", weights, value).flatten(2)

    return run


IMPLEMENTATIONS = {
    "grouped": with_operators(grouped),
    "streamed": streamed,
    "reference": with_operators(reference),
    "gather": with_gather(broadcast=False),
    "gather-matmul": with_gather(broadcast=True),
}
FAST = ("grouped", "streamed")


def bare_products(batch: int, banks: list[Tensor], layout: PairLayout) -> Callable[[bool], None]:
    """The matrix products of the operator alone: each matrix with every token it serves, once.

    Without a distance a matrix serves a token for one pair, so these are as many rows as there are pairs.

    The returned function takes whether to do those of the backward pass too.
    """
    rows, _ = layout.offsets()
    served = (rows * layout.num_tokens + torch.arange(layout.num_tokens))[rows >= 0].unique()
    counts = torch.bincount(served // layout.num_tokens, minlength=layout.num_offsets).tolist()
    return products_of(counts, batch, banks)


@torch.no_grad()
def products_of(counts: list[int], batch: int, banks: list[Tensor]) -> Callable[[bool], None]:
    """See `bare_products`; `counts` are the tokens of each matrix."""
    source = torch.randn(max(counts) * batch, banks[0].shape[1], dtype=banks[0].dtype)
    source_gradient = torch.empty_like(source)
    target = source.new_empty(max(counts) * batch, banks[0].shape[-1])
    gradients = [torch.empty_like(bank) for bank in banks]

    @torch.no_grad()
    def run(backward: bool) -> None:
        for bank, gradient in zip(banks, gradients, strict=True):
            for matrix, matrix_gradient, count in zip(bank.unbind(), gradient.unbind(), counts, strict=True):
                left, out = source[: count * batch], target[: count * batch]
                torch.mm(left, matrix, out=out)
                if backward:
                    torch.mm(left, matrix, out=out)
                    torch.mm(left.t(), out, out=matrix_gradient)
                    torch.mm(out, matrix.t(), out=source_gradient[: count * batch])

    return run


def outputs(name: str, tokens: Tensor, banks: Banks, layout: PairLayout) -> list[Tensor]:
    """The output, and the gradients of its weighted sum by the tokens and each bank."""
    output = IMPLEMENTATIONS[name](tokens, banks, layout)
    return [output, *torch.autograd.grad(weighted_sum(output), [tokens, *banks.values()])]


def weighted_sum(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def verify(names: Iterable[str], tokens: Tensor, banks: Banks, layout: PairLayout) -> dict[str, float]:
    """Largest relative error of outputs and gradients against float64; stops if one is wrong.

    The truth is the reference. It keeps all it gathers for its backward pass: where that is too much, the truth is the grouped
    path in float64, after `check_slopes`.
    """
    wide = tokens.detach().double().requires_grad_()
    wide_banks = {name: bank.detach().double().requires_grad_() for name, bank in banks.items()}
    if (layout.num_tokens * tokens.shape[-1]) ** 2 < REFERENCE_ELEMENTS:
        truth = outputs("reference", wide, wide_banks, layout)
    else:
        check_slopes(layout, tokens.shape[-1], "".join(banks))
        truth = outputs("grouped", wide, wide_banks, layout)
    errors = {}
    for name in names:
        errors[name] = worst_error(outputs(name, tokens, banks, layout), truth)
        stop_if_wrong(name, errors[name], ALLOWED.get(tokens.dtype, 1e-4))
    return errors


@lru_cache
def check_slopes(layout: PairLayout, hidden: int, projections: str) -> None:
    """Stops if the grouped path's output is not the reference's, or a gradient not its slope along a random direction."""
    tokens, banks = make_inputs(layout, hidden, 1, projections, torch.float64)
    inputs = {"tokens": tokens, **banks}
    output, *gradients = outputs("grouped", tokens, banks, layout)
    reference = partial(IMPLEMENTATIONS["reference"], layout=layout)
    with torch.no_grad():
        stop_if_wrong("grouped", worst_error([output], [reference(tokens, banks)]), 1e-9)
        for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
            direction, sums = torch.randn_like(value), []
            for step_size in (SLOPE_STEP, -SLOPE_STEP):
                moved = {**inputs, name: value + step_size * direction}
                sums.append(weighted_sum(reference(moved.pop("tokens"), moved)))
            slope = (sums[0] - sums[1]) / (2 * SLOPE_STEP)
            error = ((gradient * direction).sum() - slope).abs() / gradient.norm()
            stop_if_wrong(f"grouped, gradient of {name},", error.item(), 1e-6)


def make_inputs(
    layout: PairLayout, hidden: int, batch: int, projections: str, dtype: torch.dtype
) -> tuple[Tensor, Banks]:
    torch.manual_seed(0)
    tokens = torch.randn(batch, layout.num_tokens, hidden, dtype=dtype, requires_grad=True)
    shape = (layout.num_offsets, hidden, hidden)
    return tokens, {letter: torch.randn(shape).div(hidden**0.5).to(dtype).requires_grad_() for letter in projections}


def operator_suite(options: argparse.Namespace) -> Iterator[dict]:
    for name, layout, hidden, batch, projections, dtype in CASES:
        tokens, banks = make_inputs(layout, hidden, batch, projections, dtype)
        # Gathering writes a matrix per pair, and the reference keeps all it gathers for its backward pass.
        gathers = hidden == 192 and layout.num_tokens <= 50
        names = [name for name in IMPLEMENTATIONS if gathers or name in FAST]
        errors = verify(names, tokens, banks, layout)
        floor = bare_products(batch, list(banks.values()), layout)
        for backward in (False, True):
            runs = {"floor": partial(floor, backward)}
            for one in names:
                run = partial(IMPLEMENTATIONS[one], tokens, banks, layout)
                runs[one] = step(run, [tokens, *banks.values()], backward)
            counts = {one: options.repeats if one in ("floor", *FAST) else min(options.repeats, 3) for one in runs}
            case = f"{name}, C {hidden}, B {batch}, {projections}"
            rows, medians = measure(case, BOTH if backward else FORWARD, runs, counts)
            for one, row in rows.items():
                yield {
                    **row,
                    "dtype": str(dtype).removeprefix("torch."),
                    "times_floor": medians[one] / medians["floor"],
                    "times_gather": medians["gather"] / medians[one] if gathers else None,
                    "times_published": medians["gather-matmul"] / medians[one] if gathers else None,
                    "error": errors.get(one),
                }

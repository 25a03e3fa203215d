"""Projections of the same tokens by several matrices: where a distance is set, one for each offset.

As many products one after the other, forward and backward: the gradient of the tokens is added up in place.

Legend: `B` batch, `N` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype
from .registration import define, register_once


def _project_backward(gradients: Sequence[Tensor | None], tokens: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    flat = tokens.flatten(0, 1)
    token_gradient = torch.zeros_like(flat, dtype=accumulation_dtype(flat.dtype))
    matrix_gradients = []
    for gradient, matrix in zip(gradients, matrices, strict=True):
        part = gradient.flatten(0, 1)
        matrix_gradients.append(flat.t() @ part)
        if part.dtype == token_gradient.dtype:
            token_gradient.addmm_(part, matrix.t())
        else:
            token_gradient += part @ matrix.t()
    return [token_gradient.to(tokens.dtype).view(tokens.shape), *matrix_gradients]


NAMES = ("project_each", "project_each_backward")


def _register() -> None:
    @define(NAMES[0])
    def project(tokens: Tensor, matrices: list[Tensor]) -> list[Tensor]:
        flat = tokens.flatten(0, 1)
        return [torch.mm(flat, matrix).view(*tokens.shape[:2], matrix.shape[-1]) for matrix in matrices]

    @project.register_fake
    def _(tokens, matrices):
        return [tokens.new_empty(*tokens.shape[:2], matrix.shape[-1]) for matrix in matrices]

    @define(NAMES[1])
    def project_backward(gradients: list[Tensor], tokens: Tensor, matrices: list[Tensor]) -> list[Tensor]:
        return _project_backward(gradients, tokens, matrices)

    @project_backward.register_fake
    def _(gradients, tokens, matrices):
        return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (tokens, *matrices)]

    def save_projection(ctx, inputs, output):
        tokens, matrices = inputs
        ctx.save_for_backward(tokens, *matrices)

    def differentiate_projection(ctx, gradients):
        tokens, *matrices = ctx.saved_tensors
        token_gradient, *matrix_gradients = project_backward(list(gradients), tokens, matrices)
        return token_gradient, matrix_gradients

    project.register_autograd(differentiate_projection, setup_context=save_projection)


_project, _ = register_once(NAMES, _register)


def project_each(tokens: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Tokens `[B, N, in]` times each matrix `[in, out]`: as many `[B, N, out]`."""
    return _project(tokens, list(matrices))


__all__ = ["project_each"]

"""Translution in the place of another model's attention, beginning with the matrices that attention was trained to have.

Legend: `C` hidden size, `A` heads, `d` head size, `C' = A·d`; keys and values may have fewer heads, `C'_kv` features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.pair_layout import PairLayout, StepLayout
from .masks import ALL_VISIBLE, AttentionMask
from .translution import TranslutionMixer


class Projection(NamedTuple):
    """A trained projection: `[C, C']`, and what it adds, `[C']`."""

    weight: Tensor
    bias: Tensor | None


class AttentionParts(NamedTuple):
    """What an attention module is made of.

    Fields:
        query, key, value: its projections.
        output: from `[…, C']` to `[…, C]`, with what follows inside the module.
        scaling: of the scores.
        query_norm, key_norm: of each head, between projection and rotation.
    """

    query: Projection
    key: Projection
    value: Projection
    output: nn.Module
    scaling: float
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


class ConvertedMixer(TranslutionMixer):
    """Translution that computes what an attention module computed.

    Projections that are not relative stay, `{q,k,v}_proj`. Of those that are:

    - Full: every offset's matrix is the trained one, `{q,k,v}_bank`, `[num_offsets, C, C']`, and where the source has a bias
      `{q,k,v}_bias_bank`, `[num_offsets, C']`.
    - With an `offset_basis`: the first factor is the trained matrix, and each offset begins with that one alone, its coefficient
      1. The other factors are random and their coefficients 0, so that the coefficients have a gradient, and then the factors.
      `{q,k,v}_factors`, `[n, C, C']`, have one row more where the source has biases, `[n, C + 1, C']`.
    - Low-rank: the dense part is attention's. It is averaged with the relative part, so that the projections that decide its
      scores and its values are twice as large, which rounds nothing. The relative part begins with nothing: the
      matrices (with a basis: the coefficients) of values, and of keys or else of queries, are zero, all other parameters
      random. So what is learned first is what depends on the offset, as `B` is of LoRA.

    Keys and values keep their fewer heads, `C'_kv` features; so do those of the relative part. Modules of the source, the
    output projection and norms, are taken over.

    Args:
        config: of the Translution model.
        layer_idx: the layer.
        parts: of the source's attention.
    """

    def __init__(self, config, layer_idx: int, parts: AttentionParts):
        # What the source has takes the place of all that is made here.
        with torch.device("meta"):
            super().__init__(config, layer_idx, rotary=config.mixer_types[layer_idx].startswith("rope_"))
        self.o_proj, self.scaling = parts.output, parts.scaling
        self.q_norm, self.k_norm = parts.query_norm, parts.key_norm
        self.groups = self.inner_size // parts.key.weight.shape[1]
        projections = dict(zip("qkv", (parts.query, parts.key, parts.value), strict=True))
        for name, projection in projections.items():
            if self.low_rank or name not in self.relative:
                self.register_module(f"{name}_proj", _linear(projection))
        if self.low_rank:
            self._begin_low_rank(projections)
        elif self.offset_basis is None:
            self._begin_full(projections)
        else:
            self._begin_basis(projections)

    def _begin_full(self, projections: dict[str, Projection]) -> None:
        for name in self.relative:
            projection, num_offsets = projections[name], self.bank_layout.num_offsets
            self.register_parameter(f"{name}_bank", _for_each_offset(projection.weight, num_offsets))
            if projection.bias is not None:
                self.register_parameter(f"{name}_bias_bank", _for_each_offset(projection.bias, num_offsets))

    def _begin_basis(self, projections: dict[str, Projection]) -> None:
        self.factors_have_biases = any(projections[name].bias is not None for name in self.relative)
        for name in self.relative:
            weight, bias = projections[name]
            # As large as what was trained.
            factors = _random(weight, (self.offset_basis, *weight.shape), weight.std())
            factors[0] = weight
            if self.factors_have_biases:
                factors = nn.functional.pad(factors, (0, 0, 0, 1))
                if bias is not None:
                    factors[0, -1] = bias
            coefficients = weight.new_zeros(self.bank_layout.num_offsets, self.offset_basis)
            coefficients[:, 0] = 1
            self.register_parameter(f"{name}_factors", nn.Parameter(factors))
            self.register_parameter(f"{name}_coefficients", nn.Parameter(coefficients))

    def _begin_low_rank(self, projections: dict[str, Projection]) -> None:
        own = self.num_heads * self.config.relative_rank
        ranks = {"q": own, "k": own // self.groups, "v": own // self.groups}
        for name, (weight, _) in projections.items():
            rank = ranks[name]
            if hasattr(self, f"{name}_down"):
                down = _random(weight, (weight.shape[0], rank), weight.std())
                self.register_module(f"{name}_down", _linear(Projection(down, None)))
            if name not in self.relative:
                continue
            # A product of two that are zero would have no gradient.
            begins_with_nothing = name == "v" or name == "k" or "k" not in self.relative
            for part, shape in self._bank_shapes((rank, rank)).items():
                table = weight.new_zeros(shape)
                if part == "factors" or not begins_with_nothing:
                    fan_in = self.offset_basis if part == "coefficients" else rank
                    table = _random(weight, shape, fan_in**-0.5)
                self.register_parameter(f"{name}_{part}", nn.Parameter(table))
        if "v" in self.relative:
            up = _random(projections["v"].weight, (own, self.inner_size), own**-0.5)
            self.v_up = _linear(Projection(up, None))
            _double(self.v_proj)
        if self.scores_are_relative:
            # A norm undoes what comes before it.
            _double(self.q_proj if self.q_norm is None else self.q_norm)


class ConvertedAttention(nn.Module):
    """Stands where the source's attention module stood, and is called as that was; `mixer` does the work.

    Args:
        config, layer_idx, parts: see `ConvertedMixer`.
    """

    def __init__(self, config, layer_idx: int, parts: AttentionParts):
        super().__init__()
        self.mixer = ConvertedMixer(config, layer_idx, parts)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *,
        layout: PairLayout | StepLayout,
        mask: AttentionMask = ALL_VISIBLE,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        wants_weights: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[B, L, C]` and weights, where they are wanted, from what the source's attention is called with.

        Args:
            attention_mask: the source's own mask; `mask` says the same.
            layout, mask: see `TranslutionMixer.forward`.
            position_embeddings: cosines and sines of rotary positions, `[B or 1, L, d]`.
        """
        rotation = None
        if position_embeddings is not None:
            rotation = tuple(part.unsqueeze(1) for part in position_embeddings)
        # By place: what adapters of PEFT wrap takes its input so.
        return self.mixer(hidden_states, layout, mask, rotation, past_key_values, wants_weights)


def _random(like: Tensor, shape: tuple[int, ...], std: Tensor | float) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device) * std


def _double(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(2)


def _for_each_offset(tensor: Tensor, num_offsets: int) -> nn.Parameter:
    # A row of memory for each: a view of one would be trained as one.
    return nn.Parameter(tensor.detach().expand(num_offsets, *tensor.shape).contiguous())


def _linear(projection: Projection) -> nn.Linear:
    linear = nn.Linear(*projection.weight.shape, bias=projection.bias is not None, device="meta")
    linear.weight = nn.Parameter(projection.weight.detach().t().contiguous())
    if projection.bias is not None:
        linear.bias = nn.Parameter(projection.bias.detach().contiguous())
    return linear


__all__ = ["AttentionParts", "ConvertedAttention", "ConvertedMixer", "Projection"]

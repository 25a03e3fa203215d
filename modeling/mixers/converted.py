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
    """Full Translution that computes what an attention module computed: every offset's matrix is the trained one.

    Its parameters are `{q,k,v}_bank`, `[num_offsets, C, C']`, and where the source has a bias `{q,k,v}_bias_bank`,
    `[num_offsets, C']`, for the projections that are relative, and `{q,k,v}_proj` for the others. Keys and values keep their
    fewer heads, `C'_kv` features. Modules of the source, the output projection and norms, are taken over.

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
        for name, projection in zip("qkv", (parts.query, parts.key, parts.value), strict=True):
            if name not in self.relative:
                self.register_module(f"{name}_proj", _linear(projection))
                continue
            num_offsets = self.bank_layout.num_offsets
            self.register_parameter(f"{name}_bank", _for_each_offset(projection.weight, num_offsets))
            if projection.bias is not None:
                self.register_parameter(f"{name}_bias_bank", _for_each_offset(projection.bias, num_offsets))


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

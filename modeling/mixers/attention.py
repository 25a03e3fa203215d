"""Scaled dot-product attention: plain, rotary, and with relative scalars or vectors.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.heads import merge_heads, split_heads
from ..operators.pair_layout import PairLayout, StepLayout
from ..operators.rotary import rotate
from .masks import ALL_VISIBLE, AttentionMask
from .mixer import Mixer


class AttentionMixer(Mixer):
    """Multi-head self-attention (Vaswani et al. 2017), the baseline; its queries and keys are rotated if `rotary`.

    Shapes: `hidden_states` and the output `[B, L, C]`.
    """

    def __init__(self, config, layer_idx: int, rotary: bool = False):
        super().__init__(config, layer_idx)
        self.rotary = rotary
        self.q_proj = nn.Linear(config.hidden_size, self.inner_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.inner_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.inner_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask = ALL_VISIBLE,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.project(hidden_states)
        if self.rotary:
            query, key = rotate(query, rotation).to(value.dtype), rotate(key, rotation).to(value.dtype)
        key, value = self.remember(key, value, layout, past_key_values)
        output, weights = self.attend(query, key, value, layout, mask, output_attentions)
        return self.o_proj(output), weights

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `[B, A, L, d]`."""
        query, key, value = (
            split_heads(p(hidden_states), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def remember(
        self, key: Tensor, value: Tensor, layout: PairLayout | StepLayout, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, `[B, A, L, d]`, from those of the new ones."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return key[:, :, : layout.num_tokens], value[:, :, : layout.num_tokens]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `[B, A, L, d]` heads: `[B, L, C']`, and the probabilities where they are asked for."""
        bias = self.score_bias(layout)
        kind = "attention" if bias is None else "relative_bias"
        path = self.choose_path(kind, query, layout, mask, wants_weights=output_attentions).path
        # PyTorch's own causal mask begins with the first key, wherever the queries begin.
        is_causal = isinstance(layout, PairLayout) and layout.causal and layout.past == 0
        added = mask.additive
        if path == "reference" or bias is not None or not is_causal:
            added = self.additive_mask(mask, layout, query)
        if bias is not None:
            added = bias if added is None else added + bias
        if path == "reference":
            weights = self.probabilities(query @ key.transpose(-1, -2) * self.scaling, added)
            return merge_heads(weights.to(value.dtype) @ value), weights
        added = None if added is None else added.to(query.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, added, dropout, is_causal=added is None and is_causal, scale=self.scaling
        )
        return merge_heads(output), None

    def score_bias(self, layout: PairLayout | StepLayout) -> Tensor | None:
        """What is added to the scores of each pair, `[A, L, L]`, beside the mask."""
        return None


class RelativeBiasAttentionMixer(AttentionMixer):
    """Attention with a learned scalar per offset and head added to the score (Liu et al. 2021, Swin; Raffel et al. 2020, T5).

    Parameter: `relative_bias`, `[num_offsets, A]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.relative_bias = nn.Parameter(torch.empty(self.bank_layout.num_offsets, self.num_heads))

    def head_axis(self, name: str) -> int | None:
        """See `Mixer.head_axis`."""
        return -1 if name == "relative_bias" else super().head_axis(name)

    def score_bias(self, layout: PairLayout | StepLayout) -> Tensor:
        table = self.resample(self.relative_bias, layout)
        return table[layout.rows(table.device)].permute(2, 0, 1)


class RelativeVectorAttentionMixer(AttentionMixer):
    """Attention with a learned vector per offset added to keys and values, shared by all heads (Shaw et al. 2018, eq. 3, 4).

    `s_ij = d^-1/2 <q_i, k_j + rk[o(i, j)]>` and `out_i = Σ_j a_ij (v_j + rv[o(i, j)])`.

    Parameters: `relative_key` and `relative_value`, `[num_offsets, d]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.relative_key = nn.Parameter(torch.empty(self.bank_layout.num_offsets, config.head_dim))
        self.relative_value = nn.Parameter(torch.empty(self.bank_layout.num_offsets, config.head_dim))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = layout.rows(query.device)
        relative_key = self.resample(self.relative_key, layout)[rows].to(query.dtype)
        relative_value = self.resample(self.relative_value, layout)[rows].to(value.dtype)
        scores = query @ key.transpose(-1, -2) + torch.einsum("baid,ijd->baij", query, relative_key)
        weights = self.probabilities(scores * self.scaling, self.additive_mask(mask, layout, scores))
        given = weights.to(value.dtype)
        output = given @ value + torch.einsum("baij,ijd->baid", given, relative_value)
        self.choose_path("relative_vector", query, layout, mask, wants_weights=output_attentions)
        return merge_heads(output), weights


__all__ = ["AttentionMixer", "RelativeBiasAttentionMixer", "RelativeVectorAttentionMixer"]

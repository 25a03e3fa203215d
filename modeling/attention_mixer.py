"""What all mixers share, and scaled dot-product attention, with or without rotary positions.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from .pair_layout import PairLayout
from .rotary import rotate


# The default `attn_implementation`: offset-grouped Translution, and PyTorch's fused attention.
GROUPED = "grouped"


class Mixer(nn.Module):
    """Base of the mixers: heads, probabilities and the output projection.

    The output projection is `Linear(C', C)` with a bias, or the identity where there is one head of size `C`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.inner_size = config.num_attention_heads * config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        if config.num_attention_heads == 1 and config.head_dim == config.hidden_size:
            self.o_proj = nn.Identity()
        else:
            self.o_proj = nn.Linear(self.inner_size, config.hidden_size)

    def implementation(self, output_attentions: bool) -> str:
        """The path to run: weights that are to be returned come from the readable one; a lone mixer is grouped."""
        return "eager" if output_attentions else self.config._attn_implementation or GROUPED

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`[B, L, A·e]` to `[B, A, L, e]`."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, heads: Tensor) -> Tensor:
        """`[B, A, L, e]` to `[B, L, A·e]`."""
        return heads.transpose(1, 2).flatten(2)

    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Softmax of `[B, A, L, L]` scores with an additive mask, in float32 at least, with dropout when training."""
        if attention_mask is not None:
            scores = scores + attention_mask
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return nn.functional.dropout(scores.softmax(dim=-1, dtype=wide), self.attention_dropout, self.training)


class AttentionMixer(Mixer):
    """Multi-head self-attention (Vaswani et al. 2017), the baseline; its queries and keys are rotated if `rotary`.

    Shapes: `hidden_states` and the output `[B, L, C]`, `attention_mask` broadcastable to `[B, A, L, L]` and additive.
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
        layout: PairLayout,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (self.split_heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary:
            query, key = rotate(query, rotation).to(value.dtype), rotate(key, rotation).to(value.dtype)
        weights = None
        if self.implementation(output_attentions) == "eager":
            weights = self.probabilities(query @ key.transpose(-1, -2) * self.scaling, attention_mask)
            output = weights.to(value.dtype) @ value
        else:
            mask = None if attention_mask is None else attention_mask.to(query.dtype)
            dropout = self.attention_dropout if self.training else 0.0
            output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scaling)
        return self.o_proj(self.merge_heads(output)), weights


def _never_called(*args, **kwargs):
    raise RuntimeError(f"`attn_implementation={GROUPED!r}` belongs to Translution models and cannot serve others.")


# Transformers accepts names from these registries alone. The mask is an additive one, as for "eager".
AttentionInterface.register(GROUPED, _never_called)
AttentionMaskInterface.register(GROUPED, eager_mask)


__all__ = ["GROUPED", "AttentionMixer", "Mixer"]

"""What all mixers share, and scaled dot-product attention, with or without rotary positions.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from .exporting import is_exporting
from .masks import ALL_VISIBLE, AttentionMask, causal_mask
from .pair_layout import PairLayout, StepLayout, bank_layout
from .resampling import resample_offsets
from .rotary import rotate


# The default `attn_implementation`: offset-grouped Translution, and PyTorch's fused attention.
GROUPED = "grouped"
# Insists on the CUDA kernels, which the default takes where it can; see `kernel_choice.py`.
TRITON = "triton"


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
        self.bank_layout = bank_layout(config)
        if config.num_attention_heads == 1 and config.head_dim == config.hidden_size:
            self.o_proj = nn.Identity()
        else:
            self.o_proj = nn.Linear(self.inner_size, config.hidden_size)

    def implementation(self, output_attentions: bool) -> str:
        """The path to run: weights that are to be returned come from the readable one; a lone mixer is grouped."""
        chosen = self.config._attn_implementation or GROUPED
        if output_attentions and chosen == TRITON:
            raise ValueError(
                f"`output_attentions` must be False with `attn_implementation={TRITON!r}`, got True: the kernels hold no weights. "
                f"{GROUPED!r} and 'eager' return them."
            )
        return "eager" if output_attentions else chosen

    def offset_parameters(self) -> list[str]:
        """Names of the parameters with one row per offset."""
        names = [name for name, _ in self.named_parameters(recurse=False)]
        return [name for name in names if name.startswith("relative_") or name.endswith(("_bank", "_coefficients"))]

    def fit(self, table: Tensor, layout: PairLayout | StepLayout) -> Tensor:
        """A parameter with one row per offset, `[num_offsets, …]`, resampled where `layout` is made for another grid."""
        return resample_offsets(table, self.bank_layout, layout)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`[B, L, A·e]` to `[B, A, L, e]`."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, heads: Tensor) -> Tensor:
        """`[B, A, L, e]` to `[B, L, A·e]`."""
        return heads.transpose(1, 2).flatten(2)

    def additive_mask(self, mask: AttentionMask, layout: PairLayout | StepLayout, like: Tensor) -> Tensor | None:
        """What to add to scores, `[B or 1, A or 1, queries, L]`; `None` where all pairs of an image count."""
        if mask.additive is None and layout.causal:
            return causal_mask(layout, like).additive
        return mask.additive

    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Softmax of `[B, A, L, L]` scores with an additive mask, in float32 at least, with dropout when training."""
        if attention_mask is not None:
            scores = scores + attention_mask
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = scores.softmax(dim=-1, dtype=wide)
        return nn.functional.dropout(weights, self.attention_dropout) if self.training else weights


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
        query, key, value = (self.split_heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return query, key, value

    def remember(
        self, key: Tensor, value: Tensor, layout: PairLayout | StepLayout, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens that give, `[B, A, L, d]`, from those of the new ones."""
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
        eager = self.implementation(output_attentions) == "eager"
        # PyTorch's own causal mask begins with the first key, wherever the queries begin.
        is_causal = isinstance(layout, PairLayout) and layout.causal and layout.past == 0
        # With a learned bias PyTorch's fused attention orders its output in memory one way when a graph is traced, and another way
        # when ONNX takes the graph apart, which then fails.
        written_out = eager or (bias is not None and is_exporting())
        added = mask.additive
        if written_out or bias is not None or not is_causal:
            added = self.additive_mask(mask, layout, query)
        if bias is not None:
            added = bias if added is None else added + bias
        if written_out:
            weights = self.probabilities(query @ key.transpose(-1, -2) * self.scaling, added)
            return self.merge_heads(weights.to(value.dtype) @ value), weights if eager else None
        added = None if added is None else added.to(query.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, added, dropout, is_causal=added is None and is_causal, scale=self.scaling
        )
        return self.merge_heads(output), None

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

    def score_bias(self, layout: PairLayout | StepLayout) -> Tensor:
        table = self.fit(self.relative_bias, layout)
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
        relative_key = self.fit(self.relative_key, layout)[rows].to(query.dtype)
        relative_value = self.fit(self.relative_value, layout)[rows].to(value.dtype)
        scores = query @ key.transpose(-1, -2) + torch.einsum("baid,ijd->baij", query, relative_key)
        weights = self.probabilities(scores * self.scaling, self.additive_mask(mask, layout, scores))
        given = weights.to(value.dtype)
        output = given @ value + torch.einsum("baij,ijd->baid", given, relative_value)
        return self.merge_heads(output), weights if self.implementation(output_attentions) == "eager" else None


def _never_called(*args, **kwargs):
    raise RuntimeError(
        f"`attn_implementation` {GROUPED!r} or {TRITON!r} belongs to Translution models and cannot serve others."
    )


# Transformers accepts names from these registries alone. The mask is an additive one, as for "eager".
for _name in (GROUPED, TRITON):
    AttentionInterface.register(_name, _never_called)
    AttentionMaskInterface.register(_name, eager_mask)


__all__ = [
    "GROUPED",
    "TRITON",
    "AttentionMixer",
    "Mixer",
    "RelativeBiasAttentionMixer",
    "RelativeVectorAttentionMixer",
]

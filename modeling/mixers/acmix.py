"""ACmix: attention and convolution from one shared projection (Pan et al. 2021, arXiv 2111.14556).

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`, `k` kernel size, `T` taps: `k²`, or `k`
for text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.pair_layout import NUM_CLASS_ROWS, PairLayout, StepLayout
from .attention import RelativeBiasAttentionMixer
from .cache import remember_recent
from .convolution import convolve_image, convolve_pairs, convolve_text, convolve_window, visible_tokens
from .masks import ALL_VISIBLE, AttentionMask


class ACmixMixer(RelativeBiasAttentionMixer):
    """`out = α · attention + β · convolution`, both scalars learned from 0.5.

    Stage 1 is one projection to queries, keys and values. Stage 2 has two cheap branches: attention with a learned scalar per
    offset and head, followed by the output projection; and a convolution: `shift_maps`, a `1 × 1` map with a bias, takes the
    `3A` feature maps of q, k, v to `T` maps for each of the `d` head channels, which `shift_kernel`, a convolution in `d`
    groups without bias, shifts and sums into `C'` channels (output channel `g·A + a` comes from head channel `g`). It is
    initialised to exact shifts. The class token takes part in the attention branch alone. Text is the same, causal.

    The branches are added, so `C' = C` is required.

    Parameters beside those of attention with relative scalars: `shift_maps` `Linear(3A, T)`, `shift_kernel` `[C', T, k, k]`
    (text `[C', T, k]`), `attention_rate` and `convolution_rate` `[1]`.
    """

    # `shift_maps` mixes the heads.
    divides_by_heads = False

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel_size = config.kernel_size
        window = (config.kernel_size,) * (1 if config.modality == "text" else 2)
        self.num_taps = config.kernel_size ** len(window)
        self.shift_maps = nn.Linear(3 * self.num_heads, self.num_taps)
        self.shift_kernel = nn.Parameter(torch.empty(self.inner_size, self.num_taps, *window))
        self.attention_rate = nn.Parameter(torch.empty(1))
        self.convolution_rate = nn.Parameter(torch.empty(1))

    def exact_shifts(self) -> Tensor:
        """The initial `shift_kernel`: map `t` of a head channel is read at tap `t`, and the maps are summed."""
        taps = torch.eye(self.num_taps).unflatten(1, self.shift_kernel.shape[2:])
        return taps.expand(self.inner_size, *taps.shape)

    def forward(
        self,
        hidden_states: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask = ALL_VISIBLE,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.project(hidden_states)
        maps = self._maps(torch.cat((query, key, value), dim=1))
        key, value = self.remember(key, value, layout, past_key_values)
        attended, weights = self.attend(query, key, value, layout, mask, output_attentions)
        path = self.choose_path("convolution", maps, layout, mask, cached=past_key_values is not None).path
        if path == "window":
            (recent,) = remember_recent(past_key_values, self.layer_idx, [maps], self.kernel_size - 1)
            convolved = convolve_window(recent, self._shift_bank(layout), layout, mask)
        elif path == "conv":
            convolved = self._convolve(visible_tokens(maps, mask), layout)
        else:
            convolved = convolve_pairs(maps, self._shift_bank(layout), layout, mask, self.kernel_size, path)
        return self.attention_rate * self.o_proj(attended) + self.convolution_rate * convolved, weights

    def _maps(self, heads: Tensor) -> Tensor:
        """`[B, 3A, L, d]` to `[B, L, d·T]`: the `T` maps of head channel 0 first."""
        return self.shift_maps(heads.permute(0, 2, 3, 1)).flatten(2)

    def _convolve(self, maps: Tensor, layout: PairLayout | StepLayout) -> Tensor:
        """`[B, L, d·T]` to `[B, L, C']`, zero for a class token."""
        groups = maps.shape[-1] // self.num_taps
        if layout.causal:
            return convolve_text(maps.transpose(1, 2), self.shift_kernel, groups).transpose(1, 2)
        first = int(layout.class_token)
        convolved = convolve_image(maps[:, first:], self.shift_kernel, layout, groups)
        return nn.functional.pad(convolved, (0, 0, first, 0))

    def _shift_bank(self, layout: PairLayout | StepLayout) -> Tensor:
        """`shift_kernel` as a bank, one `[d·T, C']` matrix per offset of the window: its groups are diagonal blocks."""
        taps = self.shift_kernel.flatten(2).flip(2).permute(2, 0, 1)  # [T, C', T], by offset
        blocks = taps.unflatten(1, (-1, self.num_heads)).transpose(2, 3)  # [T, d, T, A]
        eye = torch.eye(blocks.shape[1], dtype=taps.dtype, device=taps.device)
        bank = torch.einsum("ogta,gh->ogtha", blocks, eye).flatten(3).flatten(1, 2)
        return nn.functional.pad(bank, (0, 0, 0, 0, 0, NUM_CLASS_ROWS if layout.class_token else 0))


__all__ = ["ACmixMixer"]

"""Convolution over the grid of tokens: the other end of what Translution unifies.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`, `k` kernel size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.dispatch import pair_operators
from ..operators.pair_layout import CLASS_TO_CLASS, NUM_CLASS_ROWS, PairLayout, StepLayout
from ..operators.quantized import dense
from .cache import remember, remember_recent
from .masks import ALL_VISIBLE, AttentionMask, causal_mask
from .mixer import Mixer


class ConvolutionMixer(Mixer):
    """`out_i = Σ_{o in window} x_{i−o} W[o]`, then the output projection.

    This is Translution with weight 1 on a `k × k` window of offsets and 0 elsewhere. For text the window is the token itself
    and the `k − 1` before it. The class token is outside the grid: it has one matrix of its own and sees no patch, so read
    the mean of all tokens (`pooling` "mean") or mix in a layer that attends.

    Parameters: `window_weight`, `[k², C, C']` for images with rows in the order of the offset index, `[k, C, C']` for text with
    the row of a distance; `class_proj` (images); `o_proj`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel_size = config.kernel_size
        rows = config.kernel_size if config.modality == "text" else config.kernel_size**2
        self.window_weight = nn.Parameter(torch.empty(rows, config.hidden_size, self.inner_size))
        if config.modality == "image":
            self.class_proj = nn.Linear(config.hidden_size, self.inner_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask = ALL_VISIBLE,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        path = self.choose_path("convolution", hidden_states, layout, mask, cached=past_key_values is not None).path
        if layout.causal:
            if path == "window":
                remember(past_key_values, self.layer_idx, [hidden_states[:, None, :, :0]], [None])
                (recent,) = remember_recent(past_key_values, self.layer_idx, [hidden_states], self.kernel_size - 1)
                return self.o_proj(convolve_window(recent, self.window_weight, layout, mask)), None
            tokens = visible_tokens(hidden_states, mask).transpose(1, 2)
            return self.o_proj(convolve_text(tokens, self.kernel()).transpose(1, 2)), None
        if path != "conv":
            bank = self.window_weight
            if layout.class_token:
                class_rows = bank.new_zeros(NUM_CLASS_ROWS, *bank.shape[1:])
                class_rows[CLASS_TO_CLASS] = dense(self.class_proj.weight, bank.dtype).T
                bank = torch.cat((bank, class_rows))
            return self.o_proj(convolve_pairs(hidden_states, bank, layout, mask, self.kernel_size, path)), None
        tokens = visible_tokens(hidden_states, mask)
        mixed = convolve_image(tokens[:, 1:], self.kernel(), layout)
        return self.o_proj(torch.cat((self.class_proj(tokens[:, :1]).to(mixed.dtype), mixed), dim=1)), None

    def head_axis(self, name: str) -> int | None:
        """See `Mixer.head_axis`."""
        return -1 if name == "window_weight" else super().head_axis(name)

    def kernel(self) -> Tensor:
        """The bank as a convolution kernel, `[C', C, k, k]` or `[C', C, k]`: PyTorch's taps run against the offsets."""
        if self.config.modality == "text":
            kernel = self.window_weight.flip(0).permute(2, 1, 0)
        else:
            sides = (self.kernel_size, self.kernel_size)
            kernel = self.window_weight.unflatten(0, sides).flip(0, 1).permute(3, 2, 0, 1)
        # One of PyTorch's backward passes refuses a kernel that is not contiguous.
        return kernel.contiguous()


def visible_tokens(tokens: Tensor, mask: AttentionMask) -> Tensor:
    """`[B, L, C]` with zeros for the tokens that are hidden."""
    return tokens if mask.tokens is None else tokens.masked_fill(~mask.tokens.unsqueeze(-1), 0)


def convolve_window(recent: Tensor, bank: Tensor, layout: PairLayout | StepLayout, mask: AttentionMask) -> Tensor:
    """Causal convolution whose mask is about pairs, or whose tokens come from a cache: `[B, queries, C']`.

    Args:
        recent: `[B, before + queries, in]`, the queries after tokens before them, as many as are known; zeros stand for
            tokens before the first.
        bank: `[k, in, C']`, the matrix of each distance.
        mask: the pairs that count.
    """
    size, queries = bank.shape[0], layout.num_queries
    before = recent.shape[1] - queries
    recent = nn.functional.pad(recent, (0, 0, max(size - 1 - before, 0), 0))[:, -(size - 1 + queries) :]
    windows = recent.unfold(1, size, 1).flip(-1)  # [B, queries, in, k], the token itself first
    slots = layout.positions(recent.device)[:, None] - torch.arange(size, device=recent.device)
    visible = causal_mask(layout, recent).visible if mask.visible is None else mask.visible
    visible = visible.expand(recent.shape[0], -1, queries, layout.num_tokens)
    allowed = visible.gather(-1, slots.clamp(min=0).expand(*visible.shape[:2], -1, -1)) & (slots >= 0)
    bank = bank.to(recent.dtype).unflatten(-1, (allowed.shape[1], -1))
    return torch.einsum("bilo,baio,olad->biad", windows, allowed.to(recent.dtype), bank).flatten(2)


def convolve_pairs(
    tokens: Tensor, bank: Tensor, layout: PairLayout, mask: AttentionMask, kernel_size: int, path: str
) -> Tensor:
    """Convolution of images as the Translution that it is: weight 1 for the visible pairs in the window.

    Args:
        tokens: `[B, L, in]`.
        bank: one matrix per offset of the window in the order of the offset index, then those of a class token.
        mask: which hides pairs.
        path: of `dispatch.py`, whose operator over pairs serves.
    """
    reach = kernel_size // 2 + 1
    inside = replace(layout, bank_height=reach, bank_width=reach, clamp=True, share_far=False)
    allowed = mask.visible & _window(layout, kernel_size).to(tokens.device)
    allowed = allowed.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1)
    return pair_operators(path).pair_values(allowed, tokens, bank.to(tokens.dtype), inside)


def _window(layout: PairLayout, kernel_size: int) -> Tensor:
    """`[L, L]`, whether key `j` is in the window of query `i`."""
    grid = torch.cartesian_prod(torch.arange(layout.height), torch.arange(layout.width)).view(-1, 2)
    distance = grid[:, None] - grid[None, :]
    inside = (distance.abs() <= kernel_size // 2).all(dim=-1)
    if layout.class_token:
        inside = nn.functional.pad(inside, (1, 0, 1, 0))
        inside[0, 0] = True
    return inside


def convolve_image(patches: Tensor, kernel: Tensor, layout: PairLayout, groups: int = 1) -> Tensor:
    """2-D convolution of patches, `[B, H·W, C]` to `[B, H·W, C']`."""
    grid = patches.transpose(1, 2).unflatten(2, (layout.height, layout.width))
    mixed = nn.functional.conv2d(grid, kernel, padding=kernel.shape[-1] // 2, groups=groups)
    return mixed.flatten(2).transpose(1, 2)


def convolve_text(tokens: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    """Causal 1-D convolution of `[B, C, L]`: a token sees itself and `k − 1` tokens before it."""
    return nn.functional.conv1d(nn.functional.pad(tokens, (kernel.shape[-1] - 1, 0)), kernel, groups=groups)


__all__ = [
    "ConvolutionMixer",
    "convolve_image",
    "convolve_pairs",
    "convolve_text",
    "convolve_window",
    "visible_tokens",
]

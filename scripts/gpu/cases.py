"""The problems that the kernels are checked, timed and compiled for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from translution import TranslutionConfig
from translution.modeling.mixers.masks import ALL_VISIBLE, AttentionMask, causal_mask
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators.dispatch import TRITON
from translution.modeling.operators.pair_layout import PairLayout


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TINY, BASE = (192, 3, 64), (768, 12, 64)


@dataclass(frozen=True)
class Case:
    """A mixer and its input.

    Args:
        name: in the rows of the results.
        layout: the pairs.
        batch: of the input.
        sizes: hidden size, heads, and features of each.
        fields: others of the configuration.
        groups: heads of queries that share one of keys and values, as in models that start from another one's attention.
    """

    name: str
    layout: PairLayout
    batch: int
    sizes: tuple[int, int, int] = TINY
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    groups: int = 1

    @property
    def kind(self) -> str:
        """`full`, `LoR`, `basis` or `local`; relative queries with clamped offsets are `full`, whose kernels serve them."""
        if self.layout.clamp and (self.layout.causal or self.layout.share_far):
            return "local"
        if "offset_basis" in self.fields:
            return "basis"
        return "LoR" if "relative_rank" in self.fields else "full"

    @property
    def pairs(self) -> int:
        """Pairs of one input that the layout shows."""
        length = self.layout.num_tokens
        return length * (length + 1) // 2 if self.layout.causal else length**2

    def mixer(self, device: torch.device | str, dtype: torch.dtype) -> TranslutionMixer:
        """A mixer of its own, with random weights."""
        layout, (hidden, heads, size) = self.layout, self.sizes
        fields = {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": size, "num_hidden_layers": 1}
        fields |= {"patch_size": 1, "image_size": [layout.height, layout.width]}
        fields |= {"max_position_embeddings": layout.bank_height, "modality": "text" if layout.causal else "image"}
        if layout.clamp:
            fields["max_relative_distance"] = layout.bank_height - 1
        config = TranslutionConfig(**fields, **self.fields, far_offsets="shared" if layout.share_far else "clamped")
        with torch.device(device):
            mixer = TranslutionMixer(config, 0)
        if self.groups > 1:
            self._share_heads(mixer)
        for name, parameter in mixer.named_parameters():
            scale = 0.5 if name.endswith("_coefficients") else parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=scale)
        return mixer.to(dtype)

    def _share_heads(self, mixer: TranslutionMixer) -> None:
        """Leaves keys and values the heads that they have where some share them."""
        mixer.groups, features = self.groups, mixer.inner_size // self.groups
        for name in "kv":
            for part in ("bank", "factors"):
                whole = getattr(mixer, f"{name}_{part}", None)
                if whole is not None:
                    setattr(mixer, f"{name}_{part}", nn.Parameter(whole.data[..., :features].contiguous()))
            projection = getattr(mixer, f"{name}_proj", None)
            if projection is not None:
                projection.weight = nn.Parameter(projection.weight.data[:features].contiguous())

    def tokens(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Random tokens, `[B, L, C]`."""
        return torch.randn(self.batch, self.layout.num_tokens, self.sizes[0], device=device, dtype=dtype)


def mask_of(layout: PairLayout, like: Tensor) -> AttentionMask:
    """The causal mask of a text."""
    return causal_mask(layout, like) if layout.causal else ALL_VISIBLE


def output_of(mixer: TranslutionMixer, implementation: str, tokens: Tensor, layout: PairLayout) -> Tensor:
    """What an implementation puts out."""
    mixer.config._attn_implementation = implementation
    return mixer(tokens, layout, mask_of(layout, tokens))[0]


def both_passes(
    mixer: TranslutionMixer, implementation: str, tokens: Tensor, layout: PairLayout, weight: Tensor
) -> dict[str, Tensor]:
    """Output and all gradients of its sum by `weight`, by name."""
    tokens = tokens.detach().requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    output = output_of(mixer, implementation, tokens, layout)
    gradients = torch.autograd.grad(output, [tokens, *parameters], weight)
    return {"output": output.detach(), **dict(zip(("tokens", *names), gradients, strict=True))}


ours = partial(output_of, implementation=TRITON)


def image(side: int, distance: int | None = None, **more: Any) -> PairLayout:
    return PairLayout.for_image(side, side, side, side, distance, **more)


def text(length: int, distance: int | None = None) -> PairLayout:
    return PairLayout.for_text(length, length, distance)


KV, QKV = {"relative_projections": "kv"}, {"relative_projections": "qkv"}
# What is timed, in the order of its value: a machine may be lent for minutes.
TIMED = (
    Case("base/16 kv", image(14), 64, BASE, KV),
    Case("tiny/16 qkv", image(14), 256, TINY, QKV),
    Case("tiny/16 kv", image(14), 256, TINY, KV),
    Case("base/16 qkv", image(14), 64, BASE, QKV),
    Case("text 1024 kv", text(1024), 8, TINY, KV),
    Case("basis 8, text 4096 kv", text(4096), 4, TINY, KV | {"offset_basis": 8}),
    Case("local, text 4096 kv", text(4096, 3), 4, TINY, KV),
    Case("local, shared heads, text 4096 kv", text(4096, 3), 4, BASE, KV, groups=4),
    Case("LoR 8, base/16 kv", image(14), 64, BASE, KV | {"relative_rank": 8}),
    Case("text 4096 kv", text(4096), 1, TINY, KV),
    Case("local, base/16 kv", image(14, 1, share_far=True), 64, BASE, KV),
    Case("basis 8, text 1024 qkv", text(1024), 8, TINY, QKV | {"offset_basis": 8}),
    Case("base/16 qkv, distance 3", image(14, 3), 64, BASE, QKV),
)
# Compiled as well: forms of kernels that no timed case has, such as heads that share keys.
COMPILED = (
    *TIMED,
    replace(Case("base/16 qkv, shared heads", image(14), 64, BASE, QKV), groups=4),
    Case("LoR 8, base/16 qkv", image(14), 64, BASE, QKV | {"relative_rank": 8}),
    Case("basis 8, base/16 kv", image(14), 64, BASE, KV | {"offset_basis": 8}),
    Case("basis 8, base/16 qkv", image(14), 64, BASE, QKV | {"offset_basis": 8}),
    Case("basis 8, base/16 q", image(14), 64, BASE, {"relative_projections": "q", "offset_basis": 8}),
    Case("basis 8, text 4096 q", text(4096), 4, TINY, {"relative_projections": "q", "offset_basis": 8}),
    replace(Case("basis 8, text 4096 kv, shared heads", text(4096), 4, BASE, KV | {"offset_basis": 8}), groups=4),
    replace(Case("basis 8, text 1024 qkv, shared heads", text(1024), 8, BASE, QKV | {"offset_basis": 8}), groups=4),
    Case("basis 8, LoR 8, base/16 kv", image(14), 64, BASE, KV | {"relative_rank": 8, "offset_basis": 8}),
    Case("basis 8, LoR 8, base/16 qkv", image(14), 64, BASE, QKV | {"relative_rank": 8, "offset_basis": 8}),
    Case("basis 8, LoR 8, text 1024 qkv", text(1024), 8, BASE, QKV | {"relative_rank": 8, "offset_basis": 8}),
)
DRY_TIMED = (
    Case("full", image(2), 2, (8, 2, 4), KV),
    Case("basis", text(4), 2, (8, 2, 4), KV | {"offset_basis": 2}),
    Case("local", text(4, 1), 2, (8, 2, 4), KV),
)


def _odd(name: str, layout: PairLayout, **fields: Any) -> Case:
    """A case whose sizes are multiples of nothing."""
    return Case(name, layout, 3, (72, 3, 24), fields)


# Between them they start every kernel.
SMOKE = (
    _odd("full kv, image 5x7", PairLayout.for_image(5, 7, 5, 7), **KV),
    _odd("full qkv, image 5x7", PairLayout.for_image(5, 7, 5, 7), **QKV),
    _odd("full kv, text 67", PairLayout.for_text(67, 70), **KV),
    _odd("full qkv, image 4x9, distance 2", PairLayout.for_image(4, 9, 4, 9, 2), **QKV),
    _odd("LoR 8 kv, image 5x7", PairLayout.for_image(5, 7, 5, 7), **KV, relative_rank=8),
    _odd("basis 3 kv, image 5x7", PairLayout.for_image(5, 7, 5, 7), **KV, offset_basis=3),
    _odd("basis 3 qkv, text 67", PairLayout.for_text(67, 70), **QKV, offset_basis=3),
    _odd("local kv, text 67", PairLayout.for_text(67, 70, 3), **KV),
    _odd("local qkv, text 67", PairLayout.for_text(67, 70, 3), **QKV),
    replace(_odd("local kv, text 67, shared heads", PairLayout.for_text(67, 70, 3), **KV), groups=3),
    replace(_odd("full kv, text 67, shared heads", PairLayout.for_text(67, 70), **KV), groups=3),
    _odd("local kv, image 5x7, shared", PairLayout.for_image(5, 7, 5, 7, 1, share_far=True), **KV),
)
DRY_SMOKE = (
    Case("full kv, image 2x2", image(2), 2, (8, 2, 4), KV),
    Case("local kv, text 4", text(4, 1), 2, (8, 2, 4), KV),
)

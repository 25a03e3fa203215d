"""Of timm what docs/layer.md touches: a Vision Transformer whose blocks call `attn` as timm's do (1.0).

timm needs torchvision, of which there may be no build for an installed PyTorch. Random weights only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.layer = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.layer(x, x, x, attn_mask=attn_mask, is_causal=is_causal)[0]


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, image_size: int, patch_size: int, dim: int):
        super().__init__()
        self.grid_size = (image_size // patch_size,) * 2
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Its class token comes before the patches."""

    def __init__(self, image_size: int, patch_size: int, dim: int, depth: int, num_heads: int, num_classes: int):
        super().__init__()
        self.embed_dim = dim
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def create_model(name: str, num_classes: int) -> VisionTransformer:
    """`vit_tiny_patch16_224` with 2 of its 12 blocks."""
    assert name == "vit_tiny_patch16_224"
    return VisionTransformer(224, 16, 192, 2, 3, num_classes)

"""From pixels to tokens, and from patches back to images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...configuration.configuration_translution import TranslutionConfig
from ..operators.resampling import resample_positions
from .input_checks import check_masked_patches, check_pixels


def split_into_patches(pixel_values: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The patches of images `[B, channels, height, width]`, row by row, as `[B, patches, features]`.

    The features of a patch are its values in the order row, column, channel. The images' sides are multiples of
    `patch_size`.
    """
    patch_height, patch_width = patch_size
    patches = pixel_values.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def join_patches(patches: Tensor, patch_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Images `[B, channels, height, width]` of patches `[B, patches, features]`: the inverse of `split_into_patches`."""
    (patch_height, patch_width), (height, width) = patch_size, image_size
    grid = height // patch_height, width // patch_width
    patches = patches.unflatten(2, (patch_height, patch_width, -1)).unflatten(1, grid)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class TranslutionPatchEmbeddings(nn.Module):
    """Patches as tokens, after a class token.

    A patch is flattened in the order row, column, channel; then LayerNorm, Linear, LayerNorm, as in the paper's code.
    Takes `[B, channels, height, width]`, returns `[B, 1 + patches, C]`. With `use_mask_token` the patches where
    `bool_masked_pos`, `[B, patches]`, is true are replaced by a learned token, before positions are added.
    """

    def __init__(self, config: TranslutionConfig, use_mask_token: bool = False):
        super().__init__()
        self.num_channels = config.num_channels
        self.image_size = config.image_height_width
        self.patch_size = config.patch_height_width
        self.grid_size = config.grid_height_width
        features = self.patch_size[0] * self.patch_size[1] * config.num_channels
        self.patch_norm = nn.LayerNorm(features, eps=config.layer_norm_eps)
        self.projection = nn.Linear(features, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if use_mask_token else None
        self.position_embeddings = None
        if config.use_absolute_position_embeddings:
            height, width = self.grid_size
            self.position_embeddings = nn.Parameter(torch.empty(1, 1 + height * width, config.hidden_size))

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, bool_masked_pos: Tensor | None = None
    ) -> Tensor:
        check_pixels(pixel_values, self.image_size, interpolate_pos_encoding)
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(f"`pixel_values` must have `num_channels` {self.num_channels} channels, got {channels}.")
        # A quantised Linear has no tensor of weights.
        (patch_height, patch_width), dtype = self.patch_size, self.cls_token.dtype
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"`pixel_values` must be images of a positive multiple of `patch_size` {list(self.patch_size)} on each axis, "
                f"got {[height, width]}."
            )
        patches = split_into_patches(pixel_values.to(dtype), self.patch_size)
        tokens = self.norm(self.projection(self.patch_norm(patches)))
        if bool_masked_pos is not None:
            check_masked_patches(bool_masked_pos, self.mask_token, *tokens.shape[:2])
            tokens = torch.where(bool_masked_pos.bool()[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens), dim=1)
        if self.position_embeddings is None:
            return tokens
        grid = height // patch_height, width // patch_width
        return tokens + resample_positions(self.position_embeddings, self.grid_size, grid)


__all__ = ["TranslutionPatchEmbeddings", "join_patches", "split_into_patches"]

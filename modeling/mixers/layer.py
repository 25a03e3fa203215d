"""Translution as a layer of a network in plain PyTorch: sizes in, a module out.

Legend: `B` batch, `L` tokens, `H`, `W` grid height and width in tokens, `C` features of a token (`dim`).
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ...configuration.configuration_translution import LOCAL, TranslutionConfig
from ..operators.dispatch import AUTO, EAGER, TRITON
from ..operators.pair_layout import PairLayout, bank_layout
from ..operators.rotary import image_rotation, text_rotation
from .build import build_mixer
from .initial_weights import init_linear, init_mixer
from .masks import make_mask
from .mixer import Mixer


# What the arguments of the layer are called in a config, whose checks serve both.
CONFIG_NAMES = {
    "`mixer_types` with 'rope_translution'": "`rotary` True",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
    "attention_dropout": "dropout",
    "max_position_embeddings": "max_length",
}


class TranslutionAttention(nn.Module):
    """Self-attention whose projections depend on the offset between two tokens (Fan et al. 2025), for any PyTorch network.

    The defaults are local Translution: matrices of their own for near offsets, one for all others. Then any length and any
    grid is served. Without a `max_relative_distance` every offset has its own matrix, and the layer is made for one `grid_size`
    or `max_length`; other grids have their matrices resampled.

    Takes and returns, in any floating point dtype:

    - `[B, H, W, C]`: a grid of an image's tokens.
    - `[B, L, C]` with a `grid_size`: the same in row-major order, after a class token where `class_token` is set.
    - `[B, L, C]` with `causal`: a text. There is no cache.

    Parameters are those of `TranslutionMixer`, which computes it: `mixer.k_bank`, `mixer.q_proj.weight`, …

    Args:
        dim: `C`.
        num_heads: heads; a multiple of them is `dim`, unless `head_dim` is given.
        head_dim: features of a head; `None` for `dim // num_heads`.
        relative_projections: which of q, k, v depend on the offset: `"qkv"`, `"qk"`, `"qv"`, `"kv"`, `"q"`, `"k"` or `"v"`.
        max_relative_distance: largest distance told apart, per axis. `"auto"`: 1 for images, 3 for text; `None`: all.
        far_offsets: what offsets beyond it use. `"shared"`: one matrix; `"clamped"`: each axis is clamped. `"auto"`: shared where
            there is a distance.
        relative_rank: `None` for full Translution; an integer for LoR-Translution with that many relative features per head.
        offset_basis: number of matrices that all offsets' are mixed from; `None` leaves every matrix free.
        rotary: whether queries and keys are rotated by position. `"auto"`: of texts with a distance.
        rope_theta: base of the rotary frequencies.
        causal: whether the input is text, where tokens see those before them and themselves.
        max_length: longest text where there is no distance, which serves any length.
        grid_size: `(H, W)`, or an int for both, of the tokens of an image; needed for `[B, L, C]`, and without a distance.
        class_token: whether the first token of `[B, L, C]` stands outside the grid.
        dropout: of the attention probabilities, when training.
        qkv_bias: whether queries, keys and values have biases.
        attn_implementation: `"auto"`, `"triton"` or `"eager"`, as of models.

    Raises:
        ValueError: for arguments out of range or that contradict each other.

    Example:

    ```python
    >>> layer = TranslutionAttention(64, num_heads=4)
    >>> layer(torch.randn(2, 7, 9, 64)).shape
    torch.Size([2, 7, 9, 64])
    ```
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        relative_projections: str = "kv",
        max_relative_distance: int | str | None = "auto",
        far_offsets: str = "auto",
        relative_rank: int | None = None,
        offset_basis: int | None = None,
        rotary: bool | str = "auto",
        rope_theta: float = 10000.0,
        causal: bool = False,
        max_length: int | None = None,
        grid_size: int | tuple[int, int] | None = None,
        class_token: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        attn_implementation: str = AUTO,
    ):
        super().__init__()
        local = LOCAL["text" if causal else "image"]
        if max_relative_distance == "auto":
            max_relative_distance = local["max_relative_distance"]
        if far_offsets == "auto":
            far_offsets = "clamped" if max_relative_distance is None else "shared"
        if rotary == "auto":
            rotary = causal and max_relative_distance is not None
        if not isinstance(rotary, bool):
            raise ValueError(f"`rotary` must be True, False or 'auto', got {rotary!r}.")
        if attn_implementation not in (AUTO, TRITON, EAGER):
            raise ValueError(
                f"`attn_implementation` must be {AUTO!r}, {TRITON!r} or {EAGER!r}, got {attn_implementation!r}."
            )
        if causal and (grid_size is not None or class_token):
            raise ValueError(
                "`causal` True is for texts, without a grid: `grid_size` must be None and `class_token` False, got "
                f"{grid_size} and {class_token}."
            )
        if max_length is not None and (not causal or max_relative_distance is not None):
            raise ValueError(
                "`max_length` must be None unless `causal` is True and `max_relative_distance` None: other layers have no longest "
                f"text; got {max_length}."
            )
        self.grid_size = None if grid_size is None else _grid(grid_size)
        needed = "max_length" if causal else "grid_size"
        if max_relative_distance is None and (max_length if causal else grid_size) is None:
            raise ValueError(
                f"`{needed}` must be given where `max_relative_distance` is None: every offset has a matrix of its own; got None."
            )
        if head_dim is None and not _divides(num_heads, dim):
            raise ValueError(
                f"`dim` must be a multiple of `num_heads` where `head_dim` is None, both positive integers, got {dim!r} and "
                f"{num_heads!r}."
            )
        self.dim, self.causal, self.class_token = dim, causal, class_token
        config = _config(
            modality="text" if causal else "image",
            hidden_size=dim,
            num_hidden_layers=1,
            num_attention_heads=num_heads,
            head_dim=dim // num_heads if head_dim is None else head_dim,
            mixer_types="rope_translution" if rotary else "translution",
            relative_projections=relative_projections,
            max_relative_distance=max_relative_distance,
            far_offsets=far_offsets,
            relative_rank=relative_rank,
            offset_basis=offset_basis,
            rope_theta=rope_theta,
            attention_dropout=dropout,
            image_size=self.grid_size or (1, 1),
            patch_size=1,
            max_position_embeddings=1 if max_length is None else max_length,
            attn_implementation=attn_implementation,
        )
        self.mixer = build_mixer(config, 0, layout=bank_layout(config, class_token), qkv_bias=qkv_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew, as models of this package draw them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, Mixer):
                init_mixer(module, None)

    def forward(self, x: Tensor, mask: Tensor | None = None, grid_size: int | tuple[int, int] | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            x: `[B, H, W, C]` or `[B, L, C]`, see the class.
            mask: bool, the shape of `x` without its features: True for tokens to attend to, False for padding.
            grid_size: `(H, W)` of this `[B, L, C]` instead of the layer's.

        Returns:
            The shape of `x`. What stands at padding has no meaning.

        Raises:
            ValueError: for shapes or dtypes that do not fit.
        """
        self._check(x, mask)
        layout = self._layout(x, grid_size)
        tokens = x.flatten(1, -2)
        hidden = make_mask(None if mask is None else mask.flatten(1), layout, tokens)
        options: dict[str, Any] = {"rotation": self._rotation(tokens, layout)}
        if self.causal:
            # Positions are places.
            options["counts_on"] = True
        output, _ = self.mixer(tokens, layout, hidden, **options)
        return output.view(x.shape)

    def extra_repr(self) -> str:
        config = self.mixer.config
        parts = [f"{self.dim}, num_heads={config.num_attention_heads}, head_dim={config.head_dim}"]
        fields = ("relative_projections", "max_relative_distance", "far_offsets", "relative_rank", "offset_basis")
        parts += [f"{name}={getattr(config, name)!r}" for name in fields]
        parts += [f"rotary={self.mixer.rotary}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("causal", "grid_size", "class_token")]
        return ", ".join(parts)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        tokens_alone = self.causal or self.class_token
        if x.ndim not in ((3,) if tokens_alone else (3, 4)) or x.shape[-1] != self.dim or 0 in x.shape[1:]:
            shapes = f"[batch, tokens, {self.dim}]"
            if not tokens_alone:
                shapes = f"[batch, height, width, {self.dim}] or {shapes}"
            raise ValueError(f"`x` must be {shapes}, with at least one token, got shape {list(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"`x` must be of a floating point dtype, got {x.dtype}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"`mask` must be bool {list(x.shape[:-1])}, True for tokens to attend to, got {mask.dtype} of shape "
                f"{list(mask.shape)}."
            )

    def _layout(self, x: Tensor, grid_size: int | tuple[int, int] | None) -> PairLayout:
        config = self.mixer.config
        distance = config.max_relative_distance
        if self.causal:
            if grid_size is not None:
                raise ValueError(f"`grid_size` must be None where `causal` is True, got {grid_size}.")
            length, longest = x.shape[1], config.max_position_embeddings
            if distance is None and length > longest:
                raise ValueError(f"`x` must have at most `max_length` {longest} tokens, got {length}.")
            return PairLayout.for_text(length, longest, distance)
        if x.ndim == 4:
            if grid_size is not None:
                raise ValueError(
                    f"`grid_size` must be None where `x` is [batch, height, width, {self.dim}], got {grid_size}."
                )
            height, width = x.shape[1:3]
        else:
            size = self.grid_size if grid_size is None else _grid(grid_size)
            if size is None:
                raise ValueError(
                    "`grid_size` must be given, to the layer or with each input, where `x` is [batch, tokens, "
                    f"{self.dim}]; got None."
                )
            height, width = size
            if x.shape[1] != height * width + int(self.class_token):
                count = f"{height} · {width}" + (" and a class token" if self.class_token else "")
                raise ValueError(f"`x` must have as many tokens as `grid_size` says, {count}, got {x.shape[1]}.")
        share_far = config.far_offsets == "shared"
        return PairLayout.for_image(height, width, height, width, distance, share_far, self.class_token)

    def _rotation(self, tokens: Tensor, layout: PairLayout) -> tuple[Tensor, Tensor] | None:
        config = self.mixer.config
        if not self.mixer.rotary:
            return None
        if layout.causal:
            positions = layout.positions(tokens.device)[None]
            return text_rotation(positions, config.head_dim, config.rope_theta, tokens.dtype)
        size = (layout.height, layout.width, config.head_dim, config.rope_theta)
        return image_rotation(*size, tokens.dtype, tokens.device, layout.class_token)


def _config(**fields: Any) -> TranslutionConfig:
    """The config of a layer; what it refuses is named as the layer's arguments are."""
    try:
        return TranslutionConfig(**fields)
    except StrictDataclassError as error:
        message = str(error.__cause__ or error)
        for name, own in CONFIG_NAMES.items():
            message = message.replace(name, own)
        raise ValueError(message) from None


def _grid(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"`grid_size` must be a positive int or (height, width) of such, got {size!r}.")
    return sides


def _divides(part: Any, whole: Any) -> bool:
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in (part, whole))
    return numbers and whole % part == 0


__all__ = ["TranslutionAttention"]

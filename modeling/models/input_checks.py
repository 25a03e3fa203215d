"""Validates the arguments of a forward pass: each function raises a `ValueError` that names the argument, the value and what is allowed.

Legend: `B` batch, `L` tokens, `C` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from ...configuration.configuration_translution import TranslutionConfig
from ..operators.exporting import can_look


INTEGERS = (torch.int64, torch.int32)
# Positions with this label do not count in a loss.
IGNORED_LABEL = -100


def refuse(modality: str, allowed: str, **unwanted: Any):
    """Refuses inputs of the other modality."""
    for name, value in unwanted.items():
        if value is not None:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{name}` does not go with `modality` {modality!r}, got {got}; allowed is {allowed}.")


def check_modality(model: PreTrainedModel, config: TranslutionConfig, modality: str):
    """Whether a config is of the modality that a model's class is for."""
    if config.modality != modality:
        raise ValueError(f"{type(model).__name__} needs `modality` {modality!r}, got {config.modality!r}.")


def check_pixels(pixel_values: Tensor | None, image_size: tuple[int, int], interpolate_pos_encoding: bool):
    """Whether there are images, `[B, channels, height, width]`, and of `image_size` where no other size is wanted."""
    if pixel_values is None:
        raise ValueError("`pixel_values` must be given for `modality` 'image', got None.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must be [batch, channels, height, width], got shape {list(pixel_values.shape)}."
        )
    size = tuple(pixel_values.shape[2:])
    if size != image_size and not interpolate_pos_encoding:
        raise ValueError(
            f"`pixel_values` must be images of `image_size` {list(image_size)} (height, width), got {list(size)}; other sizes "
            "need `interpolate_pos_encoding=True`."
        )


def check_masked_patches(bool_masked_pos: Tensor, mask_token: Tensor | None, batch: int, patches: int):
    """Whether masked patches are booleans `[B, patches]`, or integers 0 and 1, and there is a token to take their place."""
    got = f"got shape {list(bool_masked_pos.shape)} and {bool_masked_pos.dtype}"
    if mask_token is None:
        raise ValueError(
            "`bool_masked_pos` needs a model with a mask token, `TranslutionForMaskedImageModeling` or "
            f"`TranslutionModel(config, use_mask_token=True)`, and must be None for others; {got}."
        )
    wanted = f"`bool_masked_pos` must be booleans, or integers 0 and 1, [batch, patches] {[batch, patches]}"
    integers = bool_masked_pos.dtype in INTEGERS
    if list(bool_masked_pos.shape) != [batch, patches] or not (integers or bool_masked_pos.dtype == torch.bool):
        raise ValueError(f"{wanted}, {got}.")
    if integers and can_look(bool_masked_pos):
        wrong = bool_masked_pos[(bool_masked_pos < 0) | (bool_masked_pos > 1)]
        if wrong.numel():
            raise ValueError(f"{wanted}, got {wrong[0].item()}.")


def check_cache(cache: Cache | None):
    """Whether a cache has the layers that mixers write to, see `cache.py`."""
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layer, "update_recent") for layer in layers):
        raise ValueError(
            "`past_key_values` must be a cache made for this model, `DynamicCache(config=model.config)` or "
            f"`StaticCache(config=model.config, max_cache_len=…)`, got {type(cache).__name__} with layers "
            f"{sorted({type(layer).__name__ for layer in layers or ()})}."
        )


def holds_tokens(cache: Cache | None) -> bool:
    """Whether a cache continues a text."""
    # A compiled step cannot look at what a static cache has counted.
    return cache is not None and (torch.compiler.is_compiling() or bool(cache.get_seq_length()))


def check_position_ids(position_ids: Tensor | None, batch: int, new: int):
    """Whether positions are integers `[B or 1, new]`."""
    if position_ids is None:
        return
    shape = list(position_ids.shape)
    if position_ids.ndim != 2 or shape[0] not in (1, batch) or shape[1] != new or position_ids.dtype not in INTEGERS:
        raise ValueError(
            f"`position_ids` must be integers [batch, length] {[batch, new]}, got shape {shape} and {position_ids.dtype}."
        )


def check_range(name: str, ids: Tensor, limit: int, field: str, ignored: int | None = None):
    """Whether indices are at least 0 and less than `limit`, the value of `field`, or `ignored`."""
    if not can_look(ids):
        return
    wrong = (ids < 0) | (ids >= limit)
    if ignored is not None:
        wrong &= ids != ignored
    if wrong.any():
        beside = "" if ignored is None else f", or {ignored} to be ignored"
        raise ValueError(
            f"`{name}` must be at least 0 and less than {field} {limit}{beside}, got {ids[wrong][0].item()}."
        )


def check_logits_to_keep(kept: int | Tensor, tokens: Tensor):
    """Whether a text of `[B, L, C]` tokens has the positions to compute logits for."""
    length = tokens.shape[1]
    if isinstance(kept, Tensor) and kept.ndim == 1 and kept.dtype in INTEGERS:
        if can_look(kept) and (wrong := kept[(kept < -length) | (kept >= length)]).numel():
            raise ValueError(
                f"`logits_to_keep` must be at least {-length} and less than {length}, the text's length, got {wrong[0].item()}."
            )
    elif isinstance(kept, Tensor | bool) or not isinstance(kept, int) or not 0 <= kept <= length:
        if isinstance(kept, Tensor):
            kept = f"shape {list(kept.shape)} and {kept.dtype}"
        raise ValueError(
            f"`logits_to_keep` must be 0, for all, to {length}, the text's length, or indices; got {kept}."
        )


def check_class_labels(labels: Tensor | None, config: TranslutionConfig, batch: int):
    """Whether labels suit the loss that Transformers chooses by `problem_type`, or by their type."""
    if labels is None:
        return
    indices = labels.dtype == torch.long
    if config.problem_type == "single_label_classification" or (
        config.problem_type is None and config.num_labels > 1 and indices
    ):
        if list(labels.shape) not in ([batch], [batch, 1]) or not indices:
            raise ValueError(
                f"`labels` must be class indices [batch] {[batch]} of dtype torch.int64, got shape {list(labels.shape)} and "
                f"{labels.dtype}."
            )
        check_range("labels", labels, config.num_labels, "`num_labels`", IGNORED_LABEL)
        return
    shapes = [[batch, config.num_labels]] + ([[batch]] if config.num_labels == 1 else [])
    if list(labels.shape) not in shapes or not labels.is_floating_point():
        raise ValueError(
            f"`labels` must be floats [batch, `num_labels`] {shapes[0]}, got shape {list(labels.shape)} and {labels.dtype}; class "
            f"indices are int64 [batch] {[batch]}."
        )


def check_token_labels(labels: Tensor | None, tokens: Tensor, limit: int, field: str):
    """Whether labels are an integer for each of `[B, L, C]` tokens, less than `limit`, the value of `field`."""
    if labels is None:
        return
    if labels.shape != tokens.shape[:2] or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be integers [batch, length] {list(tokens.shape[:2])}, got shape {list(labels.shape)} and "
            f"{labels.dtype}."
        )
    check_range("labels", labels, limit, field, IGNORED_LABEL)


__all__ = [
    "check_cache",
    "check_class_labels",
    "check_logits_to_keep",
    "check_masked_patches",
    "check_modality",
    "check_pixels",
    "check_position_ids",
    "check_range",
    "check_token_labels",
    "holds_tokens",
    "refuse",
]

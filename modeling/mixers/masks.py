"""What an attention mask means: which pairs of tokens a layer may use.

Users give a mask of tokens, a mask of pairs, or positions that start again where several texts are packed into one row.
`make_mask` turns all of them, once a forward pass, into the `AttentionMask` that every mixer reads.

Legend: `B` batch, `A` heads, `L` tokens, `queries` the tokens that are computed, all `L` of them without a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators.exporting import can_look
from ..operators.pair_layout import PairLayout, StepLayout, distances


# An additive mask hides a pair from this value on: softmax leaves such a pair no weight in any floating-point type. Besides
# minus infinity and the lowest number of a type, -1e4 and -1e9 are in use.
HIDDEN = -1e3


class AttentionMask(NamedTuple):
    """The pairs a layer may use among those of its layout: all of them where no field is set.

    Fields:
        additive: `[B or 1, A or 1, queries, L]`, added to attention scores; the lowest finite number where a pair is hidden.
            Every row shows at least one pair, since a row without any would have no softmax.
        visible: the same pairs as booleans, for mixers without a softmax; a row may be empty here.
        tokens: `[B, L]`, bool, where the mask hides whole tokens and nothing else.
    """

    additive: Tensor | None = None
    visible: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def hides_pairs(self) -> bool:
        """Whether what is hidden depends on the query as well."""
        return self.visible is not None and self.tokens is None


ALL_VISIBLE = AttentionMask()


class PackedTexts(NamedTuple):
    """Several texts in one row: the number of the text that each token belongs to, `[B or 1, L]`, and the longest length."""

    texts: Tensor
    longest: int


def make_mask(
    attention_mask: Tensor | None, layout: PairLayout | StepLayout, like: Tensor, packed: PackedTexts | None = None
) -> AttentionMask:
    """What a user's mask hides, as mixers read it.

    Args:
        attention_mask: checked by `check_mask`: tokens, `[B, tokens]`, where any number but 0 shows a token; or pairs, bool or
            additive, broadcastable to `[B, A, queries, tokens]`. Tokens of a static cache that it does not mention are hidden.
        layout: the pairs. Text is causal whatever the mask says.
        like: hidden states, for device and dtype.
        packed: texts that must not see each other.

    A query that sees nothing, such as padding on the left, attends to itself: softmax over a row of equal lowest values would
    spread over what is hidden, the future included, and its log-sum-exp would not be a number that a backward pass can use.
    """
    tokens = None
    if attention_mask is not None and attention_mask.ndim == 2:
        tokens = _fit_length(attention_mask.to(torch.bool), layout.num_tokens)
    starts = isinstance(layout, PairLayout) and layout.past == 0
    if starts and packed is None and (attention_mask is None or (tokens is not None and _all_visible(tokens))):
        return ALL_VISIBLE
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device)
    bias = None
    if tokens is not None:
        visible = tokens[:, None, None]
    elif attention_mask is not None:
        attention_mask = attention_mask.expand(-1, -1, layout.num_queries, -1)
        visible = attention_mask
        if attention_mask.dtype != torch.bool:
            visible = ~(attention_mask <= HIDDEN)
            bias = _fit_length(attention_mask.to(like.dtype), layout.num_tokens)
        visible = _fit_length(visible, layout.num_tokens)
    if packed is not None:
        visible = visible & (packed.texts[:, None, :, None] == packed.texts[:, None, None, :])
    if layout.causal:
        visible = visible & (distances(layout, like.device) >= 0)
    else:
        visible = visible.expand(-1, -1, layout.num_queries, -1)
    return AttentionMask(_additive(visible, bias, layout, like.dtype), visible, tokens if packed is None else None)


def causal_mask(layout: PairLayout | StepLayout, like: Tensor) -> AttentionMask:
    """The mask of a text that has no other: `[1, 1, queries, L]`."""
    visible = (distances(layout, like.device) >= 0)[None, None]
    return AttentionMask(_additive(visible, None, layout, like.dtype), visible)


def find_packed_texts(position_ids: Tensor) -> PackedTexts | None:
    """The texts of `[B, L]` positions: a new one begins wherever positions do not count on; `None` if there is one alone."""
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    texts = starts.cumsum(-1)
    if torch.compiler.is_compiling():
        return PackedTexts(texts, position_ids.shape[-1])
    if not starts.any():
        return None
    places = torch.arange(position_ids.shape[-1], device=position_ids.device)
    first = places.where(starts, 0).cummax(dim=-1).values
    return PackedTexts(texts, int((places - first).max()) + 1)


def positions_count_on(position_ids: Tensor) -> bool:
    """Whether `[B, L]` positions are known to grow by one from token to token."""
    return can_look(position_ids) and bool((position_ids.diff(dim=-1) == 1).all())


def check_mask(mask: Any, batch: int, num_heads: int, layout: PairLayout | StepLayout, slots: int):
    """Checks that a mask fits.

    Args:
        mask: what a user gave, or `None`.
        batch, num_heads: `B`, `A`.
        slots: tokens that a cache has room for, `L` without one. A mask may mention them all.

    Raises:
        ValueError: for another shape or type.
    """
    if mask is None:
        return
    queries, lengths = layout.num_queries, [layout.num_tokens, slots]
    if isinstance(layout, StepLayout) and not torch.compiler.is_compiling():
        # Slots of a static cache that are not filled need no entry in a mask of tokens.
        lengths.append(int(layout.position) + 1)
    shape = list(mask.shape)
    if mask.ndim == 2:
        fits = shape[0] == batch and shape[1] in lengths
    else:
        fits = mask.ndim == 4 and all(
            size in allowed
            for size, allowed in zip(shape, ((1, batch), (1, num_heads), (1, queries), (1, *lengths)), strict=True)
        )
    if not fits:
        raise ValueError(
            f"`attention_mask` must be [batch, tokens] {[batch, layout.num_tokens]} or broadcastable to [batch, heads, tokens, "
            f"tokens] {[batch, num_heads, queries, layout.num_tokens]}, got shape {shape}."
        )
    if mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            "`attention_mask` of four dimensions must be bool, True for pairs to attend to, or floating point, to be added to "
            f"the scores; got {mask.dtype}."
        )


def _all_visible(tokens: Tensor) -> bool:
    return can_look(tokens) and bool(tokens.all())


def _fit_length(mask: Tensor, length: int) -> Tensor:
    """`[…, tokens]` to `[…, length]`: one entry stands for all, and tokens that are not mentioned are hidden."""
    if mask.shape[-1] == 1:
        return mask.expand(*mask.shape[:-1], length)
    if mask.shape[-1] < length:
        return torch.nn.functional.pad(mask, (0, length - mask.shape[-1]))
    return mask[..., :length]


def _additive(visible: Tensor, bias: Tensor | None, layout: PairLayout | StepLayout, dtype: torch.dtype) -> Tensor:
    if layout.causal:
        own = distances(layout, visible.device) == 0
    else:
        own = torch.eye(layout.num_tokens, dtype=torch.bool, device=visible.device)
    shown = visible | (own & ~visible.any(dim=-1, keepdim=True))
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=visible.device)
    # The bias of a pair that is shown only because its row is empty would be a number that hides it.
    bias = bias.masked_fill(~visible, 0)
    return bias.masked_fill(~shown, torch.finfo(dtype).min)


__all__ = [
    "ALL_VISIBLE",
    "AttentionMask",
    "PackedTexts",
    "causal_mask",
    "check_mask",
    "find_packed_texts",
    "make_mask",
    "positions_count_on",
]

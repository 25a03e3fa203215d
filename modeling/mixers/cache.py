"""Transformers cache layers that store what each mixer needs during generation.

Each mixer remembers what it needs of every token (`keys` and `values`, of any width, possibly of none) and what it needs of
the last few tokens alone (`recent`). Per token of each sequence and layer, in elements:

    attention                       2·C'                    keys and values
    relative scalars, vectors       2·C'
    ACmix                           2·C'                    and d·T maps of the last k − 1 tokens
    convolution                     0                       and C inputs of the last k − 1 tokens
    full Translution, basis         C   if q is not the only relative projection: the inputs; and C' for each of k and v that
                                        is not relative
    LoR                             2·C' + R·(1 if q or k is relative) + R·(1 if v is relative)
    with a distance D               what each side costs in attention: C' (LoR: C' + R) for keys and values, those of a far
                                    token; and of the last D − 1 tokens what near pairs project: C if k or v is relative (one
                                    input serves both), and C' if q is relative and k is not (LoR: R for each side); 2·d more
                                    where they are rotated, the cosines and sines of their positions

Where heads of queries share keys and values (`converted.py`), `C'` of keys and values counts their heads alone.

Legend: `B` batch, `L` tokens, `C` hidden size, `C' = A·d`, `R = A·r`, `T` taps, `k` kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


LAYER_TYPE = "translution"


class RecentStates:
    """What both kinds of layer do with the states of the last few tokens, which stay where they are used when the others are
    offloaded.
    """

    recent: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.recent is not None:
            self.recent = self.recent.index_select(0, beam_idx.to(self.recent.device))


class TranslutionDynamicLayer(RecentStates, DynamicLayer):
    """Grows with the text. `keys` and `values` are `[B, heads, L, width]`, `recent` is `[B, window, features]`.

    Without gradients `keys` and `values` are the front of memory that has room for some more tokens, so that a new token is
    written and not all of them copied: up to a quarter more, and 64 tokens, are allocated than are filled.
    """

    _layer_type = LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__()
        self.window = 0
        self.record_past = False
        # The memory behind keys and values, and how much of it is written: whoever holds less has lost its claim to the rest.
        self.room: dict[str, tuple[Tensor, list[int]]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, behind: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Adds the states of new tokens, `[B, heads, new, width]`; returns those of all.

        Args:
            behind: keys that follow the others in what is returned, `[B, heads, some, width]`, and are not remembered.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.keys = self._append("keys", key_states, 0 if behind is None else behind.shape[-2])
        # Without features there is nothing to keep: tokens are counted by the keys.
        if value_states.shape[-1]:
            self.values = self._append("values", value_states)
        if behind is None:
            return self.keys, self.values
        if _needs_copies():
            return torch.cat((self.keys, behind), dim=-2), self.values
        length, (room, _) = self.keys.shape[-2], self.room["keys"]
        room[..., length : length + behind.shape[-2], :] = behind
        return room[..., : length + behind.shape[-2], :], self.values

    def _append(self, name: str, states: Tensor, spare: int = 0) -> Tensor:
        old = getattr(self, name)
        length, needed = old.shape[-2], old.shape[-2] + states.shape[-2]
        if old.shape[:2] != states.shape[:2] or old.shape[-1] != states.shape[-1]:
            raise ValueError(
                f"`past_key_values` holds states of shape {list(old.shape)} (batch, heads, tokens, width), got new ones of shape "
                f"{list(states.shape)}: only the number of tokens may differ."
            )
        if states.shape[-1] == 0 or _needs_copies():
            return torch.cat((old, states), dim=-2)
        room, filled = self.room.get(name, (None, None))
        if room is None or not _is_front(old, room) or filled[0] != length or room.shape[-2] < needed + spare:
            dtype = torch.promote_types(old.dtype, states.dtype)
            room = states.new_empty(*old.shape[:2], needed + needed // 4 + 64 + spare, states.shape[-1], dtype=dtype)
            room[..., :length, :] = old
            filled = [length]
            self.room = {**self.room, name: (room, filled)}
        room[..., length:needed, :] = states
        filled[0] = needed
        return room[..., :needed, :]

    def get_seq_length(self) -> int:
        # A layer may remember nothing of each token, and still counts them: width 0 times L.
        return self.keys.shape[-2] if self.is_initialized and self.keys.ndim == 4 else 0

    def update_recent(self, states: Tensor, window: int) -> Tensor:
        """Adds the states of new tokens, `[B, new, features]`, and keeps those of the last `window` tokens.

        Returns:
            `[B, window + new, features]`: the states of the `window` tokens before and of the new ones, zero before the first.
        """
        self.window = window
        if self.recent is None:
            self.recent = states[:, :0]
        whole = torch.cat((self.recent, states), dim=1)
        # A decoding mode that may take tokens back asks for all to be kept until it crops.
        kept = whole if self.record_past else whole[:, max(whole.shape[1] - window, 0) :]
        # Of one new token no more than its own states would stay in memory behind a view.
        self.recent = kept if states.shape[1] == 1 else kept.clone()
        return _last(whole, window + states.shape[1])

    def activate_past_recording(self) -> None:
        """Keeps every recent state until the next `crop`, which may then take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (a number that is not positive)."""
        before = self.get_seq_length()
        # Older versions of Transformers also take the number of tokens to keep.
        removed = min(-tokens_to_remove, before) if tokens_to_remove <= 0 else max(before - tokens_to_remove, 0)
        left = 0 if self.recent is None else max(self.recent.shape[1] - removed, 0)
        if removed and self.recent is not None and left < min(self.window, before - removed):
            raise RuntimeError(
                f"`crop` cannot take back {removed} tokens: of the layer's recent states {self.recent.shape[1]} are kept, and "
                f"{self.window} are needed. Call `activate_past_recording` on the cache before the tokens are added."
            )
        super().crop(tokens_to_remove)
        if self.recent is not None:
            self.recent = self.recent[:, max(left - self.window, 0) : left].clone()

    def reset(self) -> None:
        """Forgets all tokens."""
        # Older versions of Transformers fill with zeros and keep the length.
        self.keys = self.values = self.recent = None
        self.is_initialized = False
        self.room = {}

    def offload(self) -> None:
        super().offload()
        self.room = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.room = {}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = {}
        if self.recent is not None:
            self.recent = self.recent.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = {}
        if self.recent is not None:
            self.recent = self.recent[indices]


class TranslutionStaticLayer(RecentStates, StaticLayer):
    """The same in memory of a fixed size, written in place, so that a compiled step serves every token."""

    _layer_type = LAYER_TYPE
    supports_early_init = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=max_cache_len)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if value_states.shape[1] != self.num_heads:  # Transformers' own layers have as many heads in both
            self.values = value_states.new_zeros(*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, behind: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """See `TranslutionDynamicLayer.update`; but what is `behind` takes the place of the last slots.

        Keys that were remembered there are lost, so that none of them may ever be needed.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if behind is not None:
            keys[..., keys.shape[-2] - behind.shape[-2] :, :] = behind
        return keys, values

    def update_recent(self, states: Tensor, window: int) -> Tensor:
        """See `TranslutionDynamicLayer.update_recent`."""
        if self.recent is None:
            self.recent = states.new_zeros(states.shape[0], window, states.shape[-1])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.recent)
        whole = torch.cat((self.recent, states), dim=1)
        self.recent.copy_(whole[:, whole.shape[1] - window :])
        return whole

    def reset(self) -> None:
        super().reset()
        if self.recent is not None:
            self.recent.zero_()


def _needs_copies() -> bool:
    """Whether states must not be written into memory that others may hold, for gradients or a graph that is traced."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _is_front(states: Tensor, room: Tensor) -> bool:
    """Whether states are the front of the memory they were once put in, and may be written on there."""
    same_mode = room.is_inference() == torch.is_inference_mode_enabled()
    return same_mode and states.data_ptr() == room.data_ptr() and states.stride() == room.stride()


def remember(
    cache: Cache | None, layer_idx: int, keys: Sequence[Tensor | None], values: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Adds new tokens' states to a layer of a cache, if there is one.

    Args:
        keys, values: what is to be kept together, parts `[B, heads, new, width]` of as many heads each; `None` is a part that
            this mixer does not have. Translution keeps dense keys and values in the first, and what its banks project in the
            second, of one head: each is then read without a copy.

    Returns:
        The same parts for all slots, `[B, heads, L, width]`.
    """
    if cache is None:
        return list(keys), list(values)
    packed = cache.update(_pack([*keys, *values], keys), _pack([*keys, *values], values), layer_idx)
    return _unpack(packed[0], keys), _unpack(packed[1], values)


def remember_recent(
    cache: Cache | None, layer_idx: int, states: Sequence[Tensor | None], window: int
) -> list[Tensor | None]:
    """The same for the last `window` tokens alone: the parts `[B, window + new, width]`, or the new ones without a cache."""
    if cache is None:
        return list(states)
    return _unpack(cache.layers[layer_idx].update_recent(_pack(states, states), window), states)


def _pack(known: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> Tensor:
    there = [part for part in parts if part is not None]
    if there:
        return torch.cat(there, dim=-1) if len(there) > 1 else there[0]
    # Nothing of any token: still one entry of no width each, so that the tokens are counted.
    return next(part for part in known if part is not None)[..., :0]


def _unpack(packed: Tensor, like: Sequence[Tensor | None]) -> list[Tensor | None]:
    if sum(part is not None for part in like) == 1:
        return [None if part is None else packed for part in like]
    # A step of generation has little else to do: `split` takes longer than slices.
    pieces, start = [], 0
    for part in like:
        width = 0 if part is None else part.shape[-1]
        pieces.append(None if part is None else packed[..., start : start + width])
        start += width
    return pieces


def _last(states: Tensor, count: int) -> Tensor:
    """The last `count` states of `[B, L, features]`, with zeros before the first."""
    missing = count - states.shape[1]
    if missing == 0:
        return states
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing > 0 else states[:, -missing:]


__all__ = ["LAYER_TYPE", "TranslutionDynamicLayer", "TranslutionStaticLayer", "remember", "remember_recent"]

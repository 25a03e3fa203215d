"""The models of the study: every mixer at one width, and attention widened to the same number of parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from studies.settings import IMAGE_FIELDS, SETTINGS, TEXT_FIELDS
from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


@dataclass(frozen=True, eq=False)
class Variant:
    """A model of the comparison.

    Args:
        name, family: its row in the tables, and its series in the figure.
        fields: config fields beside those that all models of the task share, and `SHORT_CONVOLUTION`.
        widened_to: the variant whose number of parameters it is widened to.
    """

    name: str
    family: str
    fields: dict[str, Any]
    widened_to: str | None = None


ATTENTION = {
    "absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "rotary": {"mixer_types": "rope_attention"},
    "relative bias": {"mixer_types": "relative_bias_attention"},
}
# No config field: the taps of a convolution over the tokens of a text that follows the projections of attention.
SHORT_CONVOLUTION = "short_convolution"
RANK = {"relative_rank": 8}
LOR_KV, FULL_KV, BASIS_KV = "LoR kv", "full kv", "basis 8 kv"


def attention(kind: str, **fields: Any) -> Variant:
    return Variant(f"attention, {kind}", "attention", fields or ATTENTION[kind])


def translution(name: str, family: str, projections: str, **fields: Any) -> Variant:
    return Variant(name, family, {"relative_projections": projections, **fields})


def widened(kind: str, target: str, **fields: Any) -> Variant:
    return Variant(f"attention, {kind}, as {target}", "attention, widened", {**ATTENTION[kind], **fields}, target)


def with_narrow_mlp(shape: dict[str, Any]) -> dict[str, Any]:
    """A shape whose MLP is half as wide."""
    return {**shape, "intermediate_size": shape["intermediate_size"] // 2}


def narrow(target: str, shape: dict[str, Any], how: str = "narrow") -> Variant:
    """Rotary attention of as many parameters whose MLPs are narrow."""
    fields = {**ATTENTION["rotary"], **with_narrow_mlp(shape)}
    return Variant(f"attention, rotary, {how} MLP, as {target}", "attention, widened", fields, target)


IMAGE_VARIANTS = [
    attention("no position", mixer_types="attention"),
    attention("absolute"),
    attention("rotary"),
    attention("relative bias"),
    attention("relative vector", mixer_types="relative_vector_attention"),
    # A convolution's class token sees no patch, so only the mean tells the head of the image.
    Variant("convolution", "convolution", {"mixer_types": "convolution", "pooling": "mean"}),
    Variant("ACmix", "ACmix", {"mixer_types": "acmix"}),
    *(translution(f"full {names}", "full", names) for names in ("qkv", "kv", "qv", "qk", "k", "v")),
    *(translution(f"LoR {names}", "LoR", names, **RANK) for names in ("qkv", "kv")),
    translution("rotary LoR kv", "LoR", "kv", mixer_types="rope_translution", **RANK),
    translution(BASIS_KV, "basis", "kv", offset_basis=8),
    translution("basis 16 kv", "basis", "kv", offset_basis=16),
    translution("basis 8 LoR kv", "basis", "kv", offset_basis=8, **RANK),
    translution("full kv, then rotary", "hybrid", "kv", mixer_types=["translution"] + ["rope_attention"] * 2),
    *(widened(kind, target) for target in (FULL_KV, LOR_KV, BASIS_KV) for kind in ATTENTION),
    # The best Translution needs rotary attention of its size, whichever it is.
    *(widened("rotary", target) for target in ("full qkv", "full v", "LoR qkv", "basis 16 kv", "full kv, then rotary")),
]  # fmt: skip
TEXT_VARIANTS = [
    *(attention(kind) for kind in ATTENTION),
    translution(FULL_KV, "full", "kv"),
    translution(LOR_KV, "LoR", "kv", **RANK),
    translution(BASIS_KV, "basis", "kv", offset_basis=8),
    *(widened(kind, target) for target in (FULL_KV, LOR_KV, BASIS_KV) for kind in ("rotary", "relative bias")),
]
VARIANTS = {"images": IMAGE_VARIANTS, "text": TEXT_VARIANTS}

SHARED = {"far_offsets": "shared"}
ROTARY = {"mixer_types": "rope_translution"}
# Twice the width, with heads of the same size.
WIDE_IMAGE = {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 384}
WIDE_TEXT = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 512}


def local(name: str, projections: str, distance: int, **fields: Any) -> Variant:
    return translution(f"local {name}", "local", projections, max_relative_distance=distance, **fields)


def narrow_local(variant: Variant, target: str, shape: dict[str, Any]) -> Variant:
    """A local model with narrow MLPs and as many parameters as another."""
    fields = {**variant.fields, **with_narrow_mlp(shape)}
    return Variant(f"{variant.name}, narrow MLP, as {target}", "local", fields, target)


FIRST_IMAGE_LAYER = local("kv, D 1, shared, first layer", "kv", 1, **SHARED, mixer_types=["translution"] + ["rope_attention"] * 2)  # fmt: skip
FIRST_TEXT_LAYER = local("kv, D 3, rotary, first layer", "kv", 3, mixer_types=["rope_translution", "rope_attention"])
LOCAL_IMAGE_VARIANTS = [
    attention("rotary"),
    local("kv, D 1, shared", "kv", 1, **SHARED),
    local("kv, D 1, clamped", "kv", 1),
    local("kv, D 1, shared, rotary", "kv", 1, **SHARED, **ROTARY),
    local("kv, D 2, shared", "kv", 2, **SHARED),
    local("kv, D 2, clamped", "kv", 2),
    local("kv, D 3, shared", "kv", 3, **SHARED),
    local("v, D 1, shared", "v", 1, **SHARED),
    local("qkv, D 1, shared", "qkv", 1, **SHARED),
    FIRST_IMAGE_LAYER,
    narrow_local(FIRST_IMAGE_LAYER, "local kv, D 1, shared", IMAGE_FIELDS),
    narrow_local(FIRST_IMAGE_LAYER, "local kv, D 1, shared, wide", WIDE_IMAGE),
    local("kv, D 1, shared, every second layer", "kv", 1, **SHARED, mixer_types=["translution", "rope_attention", "translution"]),
    local("kv, D 1, shared, wide", "kv", 1, **SHARED, **WIDE_IMAGE),
    local("kv, D 1, shared, first layer, wide", "kv", 1, **SHARED, **WIDE_IMAGE, mixer_types=["translution"] + ["rope_attention"] * 2),
    # Without a distance.
    translution(FULL_KV, "full", "kv"),
    translution(BASIS_KV, "basis", "kv", offset_basis=8),
    Variant("ACmix", "ACmix", {"mixer_types": "acmix"}),
    Variant("convolution, then rotary", "hybrid", {"mixer_types": ["convolution"] + ["rope_attention"] * 2}),
    *(
        widened("rotary", f"local {name}")
        for name in (
            "kv, D 1, shared", "kv, D 1, clamped", "kv, D 2, shared", "kv, D 3, shared", "v, D 1, shared", "qkv, D 1, shared",
            "kv, D 1, shared, first layer", "kv, D 1, shared, every second layer",
        )
    ),
    widened("rotary", FULL_KV),
    *(widened("rotary", f"local kv, D 1, shared, {name}", **WIDE_IMAGE) for name in ("wide", "first layer, wide")),
    *(
        narrow(f"local {name}", IMAGE_FIELDS)
        for name in (
            "kv, D 1, shared", "kv, D 2, shared", "kv, D 3, shared", "qkv, D 1, shared", "kv, D 1, shared, first layer",
            "kv, D 1, shared, every second layer",
        )
    ),
    *(narrow(f"local kv, D 1, shared, {name}", WIDE_IMAGE) for name in ("wide", "first layer, wide")),
]  # fmt: skip
SHORT = {SHORT_CONVOLUTION: 4}
LOCAL_TEXT_VARIANTS = [
    attention("rotary"),
    local("kv, D 3, rotary", "kv", 3, **ROTARY),
    local("kv, D 1, rotary", "kv", 1, **ROTARY),
    local("kv, D 7, rotary", "kv", 7, **ROTARY),
    local("kv, D 3", "kv", 3),
    local("v, D 3, rotary", "v", 3, **ROTARY),
    local("qkv, D 3, rotary", "qkv", 3, **ROTARY),
    local("basis 4 kv, D 4, rotary", "kv", 4, offset_basis=4, **ROTARY),
    FIRST_TEXT_LAYER,
    narrow_local(FIRST_TEXT_LAYER, "local kv, D 3, rotary", TEXT_FIELDS),
    narrow_local(FIRST_TEXT_LAYER, "local kv, D 3, rotary, wide", WIDE_TEXT),
    local("kv, D 3, rotary, wide", "kv", 3, **ROTARY, **WIDE_TEXT),
    local("kv, D 3, rotary, first layer, wide", "kv", 3, **WIDE_TEXT, mixer_types=["rope_translution", "rope_attention"]),
    Variant("rotary, short convolutions", "hybrid", {**ATTENTION["rotary"], **SHORT}),
    *(
        Variant(f"rotary, short convolutions, as {name}", "hybrid", {**ATTENTION["rotary"], **SHORT}, name)
        for name in ("local kv, D 3, rotary", "local kv, D 3, rotary, first layer")
    ),
    *(
        widened("rotary", f"local {name}")
        for name in (
            "kv, D 3, rotary", "kv, D 1, rotary", "kv, D 7, rotary", "v, D 3, rotary", "qkv, D 3, rotary", "basis 4 kv, D 4, rotary",
            "kv, D 3, rotary, first layer",
        )
    ),
    *(widened("rotary", f"local kv, D 3, rotary, {name}", **WIDE_TEXT) for name in ("wide", "first layer, wide")),
    # At these sizes the steps in which widths grow leave MLPs that are 5.0 to 5.5 times as wide as the rest.
    *(narrow(f"local {name}", TEXT_FIELDS) for name in ("kv, D 1, rotary", "kv, D 7, rotary", "kv, D 3, rotary, first layer")),
    narrow("local kv, D 3, rotary, first layer, wide", WIDE_TEXT),
    narrow("local kv, D 3, rotary, wide", with_narrow_mlp(WIDE_TEXT), "narrower"),
]  # fmt: skip
# Of each study, the variants of each task.
STUDIES = {"mixers": VARIANTS, "local": {"images": LOCAL_IMAGE_VARIANTS, "text": LOCAL_TEXT_VARIANTS}}


def model_fields(
    task: str, variant: Variant, length: int | None = None, vocab_size: int = SETTINGS.vocab_size
) -> dict:
    """All fields of a variant's config, and `SHORT_CONVOLUTION` where it has one."""
    of_text = {**TEXT_FIELDS, "vocab_size": vocab_size, "max_position_embeddings": length}
    fields = {**(IMAGE_FIELDS if task == "images" else of_text), **variant.fields}
    if variant.widened_to is None:
        return fields
    return fields | _widened_fields(task, variant, length, vocab_size)


# Every run of a variant asks for them, and a search by counting takes its time.
@cache
def _widened_fields(task: str, variant: Variant, length: int | None, vocab_size: int) -> dict[str, Any]:
    known = [other for variants in STUDIES.values() for other in variants[task]]
    target = next(other for other in known if other.name == variant.widened_to)
    unwidened = model_fields(task, replace(variant, widened_to=None), length, vocab_size)
    return widen(unwidened, count_parameters(model_fields(task, target, length, vocab_size)))


class ShortConvolution(nn.Module):
    """A causal convolution of each feature over the last few tokens, `[B, L, C]` to `[B, L, C]`; at first it changes nothing."""

    def __init__(self, features: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, 1, taps))
        with torch.no_grad():
            self.weight[:, :, -1] = 1

    def forward(self, tokens: Tensor) -> Tensor:
        features, _, taps = self.weight.shape
        return F.conv1d(F.pad(tokens.mT, (taps - 1, 0)), self.weight, groups=features).mT


def build(fields: dict[str, Any]) -> PreTrainedModel:
    """The model of a variant's fields."""
    fields = dict(fields)
    taps = fields.pop(SHORT_CONVOLUTION, None)
    head = TranslutionForImageClassification if fields["modality"] == "image" else TranslutionForCausalLM
    model = head(TranslutionConfig(**fields))
    if taps is not None:
        # A rival from practice, and no mixer of the package: it serves training alone, where no cache has to keep its tokens.
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = getattr(layer.mixer, name)
                convolution = ShortConvolution(projection.out_features, taps)
                setattr(layer.mixer, name, nn.Sequential(projection, convolution))
    return model


def count_parameters(fields: dict[str, Any]) -> int:
    """Number of parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(fields).parameters())


def widen(fields: dict[str, Any], target: int) -> dict[str, Any]:
    """The fields of a model of the same depth and number of heads, and as close to `target` parameters as possible.

    The hidden size grows in steps that keep the head size a multiple of 4, with the MLP in proportion; the MLP
    makes up the rest.
    """
    heads, width = fields["num_attention_heads"], fields["hidden_size"]

    def resized(hidden: int, intermediate: int) -> dict[str, Any]:
        return {**fields, "hidden_size": hidden, "head_dim": hidden // heads, "intermediate_size": intermediate}

    def same_shape(hidden: int) -> dict[str, Any]:
        return resized(hidden, hidden * fields["intermediate_size"] // width)

    def error(hidden: int) -> int:
        return abs(count_parameters(same_shape(hidden)) - target)

    hidden = 4 * heads
    while error(hidden + 4 * heads) < error(hidden):
        hidden += 4 * heads
    one, two = (count_parameters(resized(hidden, intermediate)) for intermediate in (1, 2))
    return resized(hidden, max(1, 1 + round((target - one) / (two - one))))

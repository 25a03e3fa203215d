"""Builds the mixer that `config.mixer_types` names for each layer."""

from __future__ import annotations

from typing import Any

from ...configuration.configuration_translution import TranslutionConfig
from .acmix import ACmixMixer
from .attention import AttentionMixer, RelativeBiasAttentionMixer, RelativeVectorAttentionMixer
from .convolution import ConvolutionMixer
from .mixer import Mixer
from .translution import TranslutionMixer


MIXERS = {
    "relative_bias_attention": RelativeBiasAttentionMixer,
    "relative_vector_attention": RelativeVectorAttentionMixer,
    "convolution": ConvolutionMixer,
    "acmix": ACmixMixer,
}


def build_mixer(config: TranslutionConfig, layer_idx: int, **options: Any) -> Mixer:
    """The mixer that `config.mixer_types` names for a layer; `options` are those that no config has, see `TranslutionMixer`."""
    name = config.mixer_types[layer_idx]
    rotary = name.startswith("rope_")
    if name.removeprefix("rope_") == "translution":
        return TranslutionMixer(config, layer_idx, rotary, **options)
    if name.removeprefix("rope_") == "attention":
        return AttentionMixer(config, layer_idx, rotary, **options)
    return MIXERS[name](config, layer_idx, **options)


__all__ = ["build_mixer"]

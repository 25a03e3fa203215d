"""Builds the mixer that `config.mixer_types` names for each layer."""

from __future__ import annotations

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


def build_mixer(config: TranslutionConfig, layer_idx: int) -> Mixer:
    """The mixer that `config.mixer_types` names for a layer."""
    name = config.mixer_types[layer_idx]
    rotary = name.startswith("rope_")
    if name.removeprefix("rope_") == "translution":
        return TranslutionMixer(config, layer_idx, rotary)
    if name.removeprefix("rope_") == "attention":
        return AttentionMixer(config, layer_idx, rotary)
    return MIXERS[name](config, layer_idx)


__all__ = ["build_mixer"]

"""Translution models out of trained attention models of Transformers, with the same outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..operators.pair_layout import bank_layout
from .trunks import check_modules, check_source, convert_config, is_of_peft, replace_attention


logger = logging.get_logger(__name__)

# The classes that models are converted from, by the class of their config.
HEADS_OF_SOURCES = {"text": MODEL_FOR_CAUSAL_LM_MAPPING, "image": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}

# What may be frozen: everything that attention has as well.
FREEZE = ("all_but_offsets",)

# How many times the parameters of its source a converted model may have without a warning.
MOST_TIMES_LARGER = 4

# Arguments of `from_pretrained` that say where a config is.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class FromAttention:
    """Makes a head of Translution out of a trained attention model."""

    @classmethod
    def from_attention(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        relative_projections: str = "kv",
        max_relative_distance: int | None = None,
        layers: Iterable[int] | None = None,
        far_offsets: str = "clamped",
        freeze: str | None = None,
        relative_rank: int | None = None,
        offset_basis: int | None = None,
        **from_pretrained_arguments: Any,
    ) -> Any:
        """A Translution model that computes what a trained attention model computes, see `docs/from_attention.md`.

        The model's trunk and head stay, and only attention modules are replaced. The matrices of all offsets are the trained
        one to begin with, so that outputs are the same, and part ways as the model is trained on. With a `relative_rank` they
        are zero instead, beside attention, see `ConvertedMixer`.

        Args:
            model: a folder or a name on the Hub, or a model, whose modules become parts of the new one: it must not be used
                afterwards. Nothing but the new banks takes memory besides. Adapters of PEFT have to be merged first.
            relative_projections, max_relative_distance, far_offsets, relative_rank, offset_basis: of `TranslutionConfig`. A
                model with rotary positions needs a `max_relative_distance`, a `relative_rank`, or `relative_projections`
                `"v"`. What is new and random with a `relative_rank` or an `offset_basis` is drawn by PyTorch's generator.
            layers: indices of the layers that become Translution; the others stay attention. `None` for all.
            freeze: `"all_but_offsets"` to train only what is new, see `freeze_all_but_offsets`; `None` to train all. It is
                not saved.
            from_pretrained_arguments: of `from_pretrained` of the source's class, such as `dtype` and `revision`; an
                `attn_implementation` is that of the new model.

        Raises:
            ValueError: for a model or an argument that is not supported; the message names it. The source is as it was.
            huggingface_hub.errors.StrictDataclassError: for fields that contradict each other.
        """
        if freeze not in (None, *FREEZE):
            raise ValueError(f"`freeze` must be None or one of {', '.join(map(repr, FREEZE))}, got {freeze!r}.")
        implementation = from_pretrained_arguments.pop("attn_implementation", None)
        fields = {
            "relative_projections": relative_projections,
            "max_relative_distance": max_relative_distance,
            "far_offsets": far_offsets,
            "relative_rank": relative_rank,
            "offset_basis": offset_basis,
        }
        if layers is not None:
            try:
                # An iterator would be used up by the first look at it.
                layers = list(layers)
            except TypeError:
                raise ValueError(
                    f"`layers` must be None or indices of layers, such as [0, 1], got {layers!r}."
                ) from None
        options = {"layers": layers, "attn_implementation": implementation, "freeze": freeze, **fields}
        modality = "image" if cls.main_input_name == "pixel_values" else "text"
        if isinstance(model, PreTrainedModel):
            if from_pretrained_arguments:
                raise ValueError(
                    "Arguments of `from_pretrained` need the name or folder of a `model`, got one that is loaded, and "
                    f"{', '.join(sorted(from_pretrained_arguments))}."
                )
            source = model
            converted = cls._without_weights(source, **options)
            _warn_if_large(source, converted)
        elif isinstance(model, str | os.PathLike):
            where = {k: v for k, v in from_pretrained_arguments.items() if k in HUB_ARGUMENTS}
            # What is wrong, and how large the result will be, is said before any weight is downloaded.
            source_config = AutoConfig.from_pretrained(model, **where)
            check_source(source_config, modality)
            with torch.device("meta"):
                outline = HEADS_OF_SOURCES[modality][type(source_config)](source_config)
            _warn_if_large(outline, cls._without_weights(outline, **options))
            auto_class = AutoModelForImageClassification if modality == "image" else AutoModelForCausalLM
            source = auto_class.from_pretrained(model, **from_pretrained_arguments)
            converted = cls._without_weights(source, **options)
        else:
            hint = ": merge its adapters first, `merge_and_unload()` returns the model" if is_of_peft(model) else ""
            raise ValueError(
                "`model` must be a name on the Hub, a folder, or a `PreTrainedModel` of Transformers, got "
                f"{type(model).__name__}{hint}."
            )
        trunk = source.base_model
        replace_attention(trunk, converted.config)
        trunk.set_attn_implementation("sdpa")
        converted.model.trunk = trunk
        converted._take_head(source)
        converted.config._name_or_path = source.config._name_or_path
        if freeze is not None:
            converted.freeze_all_but_offsets()
        return converted.train(source.training)

    @classmethod
    def _without_weights(
        cls,
        source: PreTrainedModel,
        layers: list[int] | None,
        attn_implementation: str | None,
        freeze: str | None,
        **fields: Any,
    ) -> Any:
        """The converted model on the `meta` device. All that can be refused is refused here, where `source` is not changed."""
        modality = "image" if cls.main_input_name == "pixel_values" else "text"
        check_source(source.config, modality)
        head = HEADS_OF_SOURCES[modality][type(source.config)]
        if not isinstance(source, head):
            raise ValueError(f"`model` must be a {head.__name__}, got a {type(source).__name__}.")
        check_modules(source)
        if len(set(getattr(source, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "`device_map` must name one device, got several: load the converted model by `from_pretrained` for that."
            )
        config = convert_config(cls.config_class, source.config, layers, **fields)
        config.dtype = source.dtype
        with torch.device("meta"):
            converted = cls(config)
        if attn_implementation is not None:
            converted.set_attn_implementation(attn_implementation)
        if freeze is not None:
            converted.freeze_all_but_offsets()
        return converted


def _warn_if_large(source: PreTrainedModel, converted: PreTrainedModel) -> None:
    before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (source, converted))
    if after > MOST_TIMES_LARGER * before:
        logger.warning(
            f"The converted model has {after:,} parameters, and its source {before:,}: with `max_relative_distance` "
            f"{converted.config.max_relative_distance} a bank has {bank_layout(converted.config).num_offsets:,} offsets. "
            "Setting `max_relative_distance`, or a smaller one, makes it smaller."
        )


__all__ = ["FREEZE", "FromAttention"]

"""Translution models for images and text (Fan et al. 2025, arXiv 2510.10060).

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, eager_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ImageClassifierOutput
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...configuration.configuration_translution import TranslutionConfig
from ..mixers.build import build_mixer
from ..mixers.converted import ConvertedMixer
from ..mixers.initial_weights import EMBEDDING_STD, init_linear, init_mixer, init_patch_bias
from ..mixers.masks import PackedTexts, check_mask, find_packed_texts, make_mask, positions_count_on
from ..mixers.mixer import Mixer
from ..mixers.tensor_parallel import check_heads
from ..operators.dispatch import AUTO, EAGER, TRITON
from ..operators.pair_layout import PairLayout, StepLayout, bank_layout
from ..operators.resampling import resample_offsets, resample_positions
from ..operators.rotary import image_rotation, text_rotation
from .embeddings import TranslutionPatchEmbeddings
from .from_attention import FromAttention
from .input_checks import (
    INTEGERS,
    check_cache,
    check_class_labels,
    check_logits_to_keep,
    check_masked_patches,
    check_modality,
    check_pixels,
    check_position_ids,
    check_range,
    check_token_labels,
    holds_tokens,
    refuse,
)
from .offset_training import OffsetTraining
from .trunks import (
    build_trunk,
    image_options,
    input_embedding_name,
    resize_trunk,
    run_trunk,
)
from .weight_files import check_dtypes, check_index


logger = logging.get_logger(__name__)

# Names that Transformers has for attention. Harnesses pass them to every model.
OF_TRANSFORMERS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class TranslutionMLP(nn.Module):
    """`Linear(C, intermediate)`, the activation, `Linear(intermediate, C)`."""

    def __init__(self, config: TranslutionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class TranslutionLayer(GradientCheckpointingLayer):
    """Pre-norm block: `x += mixer(LN(x)); x += MLP(LN(x))`."""

    def __init__(self, config: TranslutionConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.post_mixer_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TranslutionMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, layout: PairLayout | StepLayout, **kwargs: Any) -> Tensor:
        mixed, _ = self.mixer(self.input_layernorm(hidden_states), layout, **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.post_mixer_layernorm(hidden_states)))


def _never_called(*args: Any, **kwargs: Any):
    raise RuntimeError(
        f"`attn_implementation` {AUTO!r} or {TRITON!r} belongs to Translution models and cannot serve others."
    )


# Transformers accepts names from these registries alone. The mask is an additive one, as for "eager".
for _name in (AUTO, TRITON):
    AttentionInterface.register(_name, _never_called)
    AttentionMaskInterface.register(_name, eager_mask)


class TranslutionPreTrainedModel(OffsetTraining, PreTrainedModel):
    """Initialisation, and what Transformers needs to know of the architecture."""

    config: TranslutionConfig
    config_class = TranslutionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TranslutionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TranslutionLayer, "attentions": Mixer}

    def __init__(self, config: TranslutionConfig, *args: Any, **kwargs: Any):
        # `from_pretrained` sets overrides one by one on a config that was checked before.
        config.name_each_mixer()
        config.validate()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; see there for arguments and for the report of tensors that are missing or do not fit.

        Raises:
            OSError: if a file of weights, or their index, is missing or damaged, or a pickle that would run code; the
                message names it.
            RuntimeError: if a tensor has another shape than the config's; the report names it.
            ValueError: if the index of several files is none, or names files outside the folder, or if weights are not
                stored as floating point numbers.
        """
        options = ("variant", "use_safetensors", "subfolder", "revision", "cache_dir")
        where = {name: kwargs[name] for name in options if kwargs.get(name) is not None}
        # An index can name any file of this machine, so it is checked before Transformers opens what it names. Files of
        # the Hub stay in their folder; what is wrong with their index is found where reading it fails.
        if Path(str(pretrained_model_name_or_path)).is_dir():
            check_index(pretrained_model_name_or_path, **where)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (AttributeError, KeyError, TypeError, ValueError):
            if pretrained_model_name_or_path is not None:
                check_index(pretrained_model_name_or_path, **where)
            raise

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config: Any, mesh_manager: Any) -> Any:
        """Transformers' own, called by `from_pretrained`: divides a model among processes before its weights are read.

        Raises:
            ValueError: if the heads cannot be divided among `tp_size` processes; the message says why.
        """
        if mesh_manager is not None and distributed_config.tp_size > 1:
            check_heads(model, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def save_pretrained(self, *args: Any, **kwargs: Any):
        """Transformers' own; see there. The names of tensors are those of `state_dict`."""
        if self.config.trunk_config is not None:
            # Not those that the class of a trunk had in earlier versions, which know no mixers.
            kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Here the files are known, wherever they are from. Quantised weights are integers by intention.
        if getattr(model.config, "quantization_config", None) is None:
            check_dtypes(checkpoint_files or [], model, model.base_model_prefix)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Without a request Transformers would fall back to "eager", which here is the readable reference.
        if requested_attention is None:
            return AUTO
        if requested_attention in OF_TRANSFORMERS:
            logger.warning_once(
                f"`attn_implementation={requested_attention!r}` is served by {AUTO!r}: {_served(self.config.mixer_types)}."
            )
            return AUTO
        if requested_attention not in (AUTO, TRITON, EAGER):
            choices = ", ".join(repr(name) for name in (AUTO, TRITON, EAGER, *OF_TRANSFORMERS))
            raise ValueError(f"`attn_implementation` must be one of {choices}, got {requested_attention!r}.")
        if requested_attention == TRITON and not any(name.endswith("translution") for name in self.config.mixer_types):
            raise ValueError(
                f"`attn_implementation={TRITON!r}` needs a layer of Translution, got `mixer_types` {self.config.mixer_types}: other "
                "mixers have no kernels here."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def initialize_weights(self):
        """Transformers' own, which asks a trunk of another class for the initial weights of what is in it: not of mixers."""
        for module in self.modules():
            if isinstance(module, ConvertedMixer):
                self._initialize_weights(module, self.is_custom_code())
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Draws the initial weights of a module, see `mixers/initial_weights.py`."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if std is None and isinstance(module, nn.Linear):
            init_linear(module)
        if isinstance(module, TranslutionPatchEmbeddings):
            init_patch_bias(module.projection, std)
            for parameter in (module.cls_token, module.mask_token, module.position_embeddings):
                if parameter is not None:
                    init.normal_(parameter, std=EMBEDDING_STD if std is None else std)
        elif isinstance(module, Mixer):
            init_mixer(module, std)


def _first_is_main_input(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the first positional argument of a trunk's forward pass `pixel_values` where the model is one for images.

    The trunk of another model, where there is one, serves the forward pass.
    """

    @wraps(forward)
    def called(self: TranslutionModel, *args: Any, **kwargs: Any) -> Any:
        if args and self.config.modality == "image":
            if kwargs.get("pixel_values") is not None:
                raise TypeError("`pixel_values` must be given once, got a positional argument as well.")
            args, kwargs = (None, *args[1:]), {**kwargs, "pixel_values": args[0]}
        return forward(self, *args, **kwargs) if self.trunk is None else self._forward_trunk(*args, **kwargs)

    return called


class TranslutionModel(TranslutionPreTrainedModel):
    """The trunk: embeddings, blocks and a final LayerNorm, without a head. Returns `[B, L, C]`.

    Images have a class token before their patches, so that `L = 1 + patches`.

    Args:
        config: of the model.
        use_mask_token: whether there is a token in place of the patches that `bool_masked_pos` names.
    """

    def __init__(self, config: TranslutionConfig, use_mask_token: bool = False):
        if use_mask_token:
            check_modality(self, config, "image")
        super().__init__(config)
        self.trunk = None if config.trunk_config is None else build_trunk(config, use_mask_token)
        if self.trunk is None:
            self._make_layers(use_mask_token)
        self.main_input_name = "pixel_values" if config.modality == "image" else "input_ids"
        self.has_rotary_layers = any(name.startswith("rope_") for name in config.mixer_types)
        self.post_init()

    def _make_layers(self, use_mask_token: bool):
        config = self.config
        if config.modality == "image":
            self.embeddings = TranslutionPatchEmbeddings(config, use_mask_token)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            if config.use_absolute_position_embeddings:
                self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(TranslutionLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        if self.trunk is not None:
            return self.trunk.get_input_embeddings()
        return self.embed_tokens if self.config.modality == "text" else self.embeddings.projection

    def set_input_embeddings(self, value: nn.Module):
        if self.config.modality != "text":
            raise ValueError("`set_input_embeddings` needs `modality` 'text', got 'image'.")
        if self.trunk is not None:
            self.trunk.set_input_embeddings(value)
        else:
            self.embed_tokens = value

    @torch.no_grad()
    def resize_image(self, image_size: int | list[int] | tuple[int, int]) -> None:
        """Makes the model one for images of another size, for good: `config.image_size` and what is learned per position.

        Banks, coefficients, relative scalars and vectors are resampled (bicubic over the offset axes, class rows kept), and
        so are absolute embeddings; with `max_relative_distance` what belongs to offsets stays as it is. Optimisers have to be
        made anew.

        Args:
            image_size: pixels, an int or `[height, width]`; a multiple of `patch_size`.

        Raises:
            ValueError: for a text model, a quantised one, or a size that the trunk of another model does not take.
            huggingface_hub.errors.StrictDataclassError: for a size that the config refuses.
        """
        if self.config.modality != "image":
            raise ValueError(f"`resize_image` needs `modality` 'image', got {self.config.modality!r}.")
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError("`resize_image` needs weights that are not quantised: resize the model first.")
        resized = type(self.config).from_dict({**self.config.to_dict(), "image_size": image_size})
        old_grid, new_grid, layout = self.config.grid_height_width, resized.grid_height_width, bank_layout(resized)
        if self.trunk is not None:
            resize_trunk(self.trunk, resized.image_height_width, old_grid, new_grid)
        else:
            embeddings = self.embeddings
            embeddings.image_size, embeddings.grid_size = resized.image_height_width, new_grid
            if embeddings.position_embeddings is not None:
                embeddings.position_embeddings = nn.Parameter(
                    resample_positions(embeddings.position_embeddings, old_grid, new_grid)
                )
        for mixer in self.modules():
            if not isinstance(mixer, Mixer):
                continue
            for name in mixer.offset_parameters():
                table = resample_offsets(getattr(mixer, name), mixer.bank_layout, layout)
                setattr(mixer, name, nn.Parameter(table))
            mixer.bank_layout = layout
        self.config.image_size = image_size

    @_first_is_main_input
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, text):
                Token ids, at most `max_position_embeddings` of them.
            attention_mask (`torch.Tensor`, *optional*):
                `(batch, tokens)`, 1 for tokens to attend to and 0 for padding; or additive, broadcastable to `(batch, heads,
                tokens, tokens)`. Text is causal whatever the mask says.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*, text):
                Positions of absolute and rotary embeddings. By default they are counted from the first token that is not
                masked. Translution itself needs none: offsets do not change with padding. Positions that start again, without
                a mask or a cache, tell packed texts apart.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*, text):
                Token embeddings instead of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`, images):
                Images of `image_size`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`, images):
                Whether to take images of another size, a multiple of `patch_size`: what is learned per offset, and absolute
                embeddings, are resampled for their grid. With `max_relative_distance` offsets need no resampling.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, patches)`, *optional*, images):
                Patches that are replaced by the mask token, row by row; integers 0 and 1 are allowed too. Needs a model
                with a mask token.

        Raises:
            ValueError: for inputs of the other modality, or of the wrong shape or range.
        """
        wants_weights = self._wants_weights(kwargs)
        if self.config.modality == "image":
            self._refuse_text(input_ids, inputs_embeds, past_key_values)
            hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, bool_masked_pos)
            shared = self._image_pairs(pixel_values, attention_mask, hidden_states)
        else:
            self._refuse_images(pixel_values, bool_masked_pos)
            inputs_embeds = self._embed_tokens(input_ids, inputs_embeds)
            shared = self._text_pairs(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, wants_weights
            )
            hidden_states, position_ids = self._embed_positions(
                inputs_embeds, attention_mask, position_ids, shared["layout"]
            )
        shared["rotation"] = self._rotation(hidden_states, shared["layout"], position_ids)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while it assists itself
            hidden_states = layer(hidden_states, **shared, output_attentions=wants_weights)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=shared["past_key_values"]
        )

    def _refuse_text(self, input_ids: Any, inputs_embeds: Any, past_key_values: Any):
        unwanted = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
        refuse("image", "`pixel_values`", **unwanted)

    def _refuse_images(self, pixel_values: Any, bool_masked_pos: Any):
        unwanted = {"pixel_values": pixel_values, "bool_masked_pos": bool_masked_pos}
        refuse("text", "`input_ids` or `inputs_embeds`", **unwanted)

    def _image_pairs(self, pixel_values: Tensor, attention_mask: Tensor | None, like: Tensor) -> dict[str, Any]:
        """The pairs of an image, and those that a mask hides; `like` has the type of hidden states."""
        config = self.config
        patches = zip(pixel_values.shape[2:], config.patch_height_width, strict=True)
        height, width = (side // patch for side, patch in patches)
        distance, share_far = config.max_relative_distance, config.far_offsets == "shared"
        layout = PairLayout.for_image(height, width, height, width, distance, share_far)
        check_mask(attention_mask, pixel_values.shape[0], config.num_attention_heads, layout, layout.num_tokens)
        return {"layout": layout, "mask": make_mask(attention_mask, layout, like), "past_key_values": None}

    def _text_pairs(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        wants_weights: bool,
    ) -> dict[str, Any]:
        """The pairs of a text, those that a mask hides, and its cache."""
        batch, new = inputs_embeds.shape[:2]
        check_cache(past_key_values)
        check_position_ids(position_ids, batch, new)
        packed = None
        if new > 1 and position_ids is not None and attention_mask is None and not holds_tokens(past_key_values):
            packed = find_packed_texts(position_ids)
        if packed is not None and past_key_values is not None:
            raise ValueError(
                "`position_ids` that start again pack several texts into a row, which no cache can continue: "
                "`past_key_values` must be None."
            )
        # A training step would remember everything for a next token that never comes, and so would packed texts.
        if use_cache and past_key_values is None and packed is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        layout = self._text_layout(inputs_embeds, past_key_values, wants_weights, packed)
        slots = layout.num_tokens if past_key_values is None else past_key_values.get_mask_sizes(new, 0)[0]
        check_mask(attention_mask, batch, self.config.num_attention_heads, layout, slots)
        mask = make_mask(attention_mask, layout, inputs_embeds, packed)
        counts_on = mask.additive is None and (position_ids is None or positions_count_on(position_ids))
        return {"layout": layout, "mask": mask, "counts_on": counts_on, "past_key_values": past_key_values}

    @can_return_tuple
    @merge_with_config_defaults
    def _forward_trunk(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `forward`: the same with the trunk of another model, which embeds tokens and positions itself."""
        wants_weights = self._wants_weights(kwargs)
        wants_states = kwargs.pop("output_hidden_states", None)
        kwargs.pop("output_attentions", None)
        if self.config.modality == "image":
            self._refuse_text(input_ids, inputs_embeds, past_key_values)
            check_pixels(pixel_values, self.config.image_height_width, interpolate_pos_encoding)
            inputs = self._image_pairs(pixel_values, attention_mask, pixel_values)
            past_key_values = inputs.pop("past_key_values")
            # Trunks interpolate a square of positions only; images of `image_size` need no interpolation.
            other_size = tuple(pixel_values.shape[2:]) != self.config.image_height_width
            interpolates = interpolate_pos_encoding and other_size
            if bool_masked_pos is not None:
                batch, patches = pixel_values.shape[0], inputs["layout"].num_tokens - 1
                check_masked_patches(bool_masked_pos, self.trunk.embeddings.mask_token, batch, patches)
            inputs.update(
                pixel_values=pixel_values,
                bool_masked_pos=bool_masked_pos,
                **image_options(self.trunk, interpolates),
            )
        else:
            self._refuse_images(pixel_values, bool_masked_pos)
            inputs_embeds = self._embed_tokens(input_ids, inputs_embeds)
            inputs = self._text_pairs(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, wants_weights
            )
            past_key_values = inputs["past_key_values"]
            # Trunks rotate in their own way.
            inputs.pop("counts_on")
            inputs.update(
                inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=past_key_values is not None
            )
        last, states, weights = run_trunk(
            self.trunk,
            # Generation that assists itself runs fewer layers for a while.
            self.config.num_hidden_layers,
            wants_weights,
            self.config.output_hidden_states if wants_states is None else wants_states,
            attention_mask=attention_mask,
            **inputs,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=past_key_values, hidden_states=states, attentions=weights
        )

    def _wants_weights(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("output_attentions")
        return bool(self.config.output_attentions if wanted is None else wanted)

    def _embed_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {given}.")
        if inputs_embeds is None:
            if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in INTEGERS:
                raise ValueError(
                    f"`input_ids` must be integers [batch, length] with a length of at least 1, got shape {list(input_ids.shape)} "
                    f"and {input_ids.dtype}."
                )
            check_range("input_ids", input_ids, self.get_input_embeddings().num_embeddings, "`vocab_size`")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if (
            inputs_embeds.ndim != 3
            or inputs_embeds.shape[-1] != self.config.hidden_size
            or inputs_embeds.shape[1] == 0
            or not inputs_embeds.is_floating_point()
        ):
            raise ValueError(
                f"`inputs_embeds` must be floats [batch, length, `hidden_size` {self.config.hidden_size}] with a length of at least "
                f"1, got shape {list(inputs_embeds.shape)} and {inputs_embeds.dtype}."
            )
        return inputs_embeds

    def _text_layout(
        self, inputs_embeds: Tensor, cache: Cache | None, wants_weights: bool, packed: PackedTexts | None
    ) -> PairLayout | StepLayout:
        config, new = self.config, inputs_embeds.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        # A static cache counts in a tensor. Looking at it would break a compiled step, which `generate` bounds by itself.
        if config.longest_text is not None and not torch.compiler.is_compiling():
            length = int(past) + new if packed is None else packed.longest
            if length > config.longest_text:
                raise ValueError(
                    f"A text must have at most `max_position_embeddings` {config.max_position_embeddings} tokens, got {length}."
                )
        grouped = config._attn_implementation != EAGER and not wants_weights
        counted = isinstance(past, Tensor)
        # Nor could a graph of several new tokens look.
        if cache is not None and ((new == 1 and grouped) or (counted and torch.compiler.is_compiling())):
            # The static cache counts on in place.
            position = past.clone() if counted else past
            slots = cache.get_mask_sizes(new, 0)[0]
            bank = bank_layout(config)
            return StepLayout(position, slots, bank.bank_height, bank.clamp, num_queries=new)
        past, length, distance = int(past), config.max_position_embeddings, config.max_relative_distance
        # A row of packed texts may be longer than the bank: pairs that far apart are of different texts.
        band = length if packed is not None and distance is None and new > length else None
        return PairLayout.for_text(past + new, length, distance, past, band)

    def _embed_positions(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        layout: PairLayout | StepLayout,
    ) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.bool().long().cumsum(-1) - 1).clamp(min=0)
                position_ids = position_ids.index_select(-1, layout.positions(position_ids.device))
            else:
                position_ids = layout.positions(inputs_embeds.device).expand(inputs_embeds.shape[0], -1)
        if self.config.use_absolute_position_embeddings:
            check_range("position_ids", position_ids, self.config.max_position_embeddings, "`max_position_embeddings`")
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        return inputs_embeds, position_ids

    def _rotation(
        self, hidden_states: Tensor, layout: PairLayout | StepLayout, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        config, dtype = self.config, hidden_states.dtype
        if not self.has_rotary_layers:
            return None
        if layout.causal:
            return text_rotation(position_ids, config.head_dim, config.rope_theta, dtype)
        return image_rotation(
            layout.height, layout.width, config.head_dim, config.rope_theta, dtype, hidden_states.device
        )


class TranslutionForImageClassification(FromAttention, TranslutionPreTrainedModel):
    """Image classifier: a Linear head on the class token, or on the mean of all tokens (`config.pooling`)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The losses of images average over a batch: the Trainer has to divide by the number of batches it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: TranslutionConfig):
        check_modality(self, config, "image")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TranslutionModel(config)
        width = config.hidden_size * (2 if config.pooling == "cls_and_mean" else 1)
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def _take_head(self, source: PreTrainedModel):
        self.classifier = source.classifier

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
                Images of `image_size`.
            attention_mask, interpolate_pos_encoding:
                See [`TranslutionModel.forward`].
            labels (`torch.Tensor`, *optional*):
                Class indices `(batch,)`; floats `(batch,)` where `num_labels` is 1 (regression) or `(batch, num_labels)` for
                several labels at once, see `config.problem_type`.

        Returns:
            `ImageClassifierOutput` with `logits` of shape `(batch, num_labels)`.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        tokens = outputs.last_hidden_state
        check_class_labels(labels, self.config, tokens.shape[0])
        if self.config.pooling == "cls_and_mean":
            pooled = torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=-1)
        else:
            pooled = tokens[:, 0] if self.config.pooling == "cls" else tokens.mean(dim=1)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TranslutionForCausalLM(FromAttention, TranslutionPreTrainedModel, GenerationMixin):
    """Causal language model: a second LayerNorm, then a Linear head without bias."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TranslutionConfig):
        check_modality(self, config, "text")
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.model = TranslutionModel(config)
        if config.trunk_config is None:
            self.head_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            # The head of a model with that trunk has no norm of its own.
            self.head_norm = nn.Identity()
            self._tied_weights_keys = {
                "lm_head.weight": f"model.trunk.{input_embedding_name(self.model.trunk)}.weight"
            }
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _take_head(self, source: PreTrainedModel):
        self.lm_head = source.get_output_embeddings()
        self.generation_config = source.generation_config

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """The mask of a static step: of one shape for every step, so that one graph serves them all."""
        if attention_mask is None:
            return None
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # A compiled step cannot look at its position: texts that may outgrow the bank are not compiled, and checked.
        longest = self.config.longest_text
        if longest is not None and generation_config.max_length - 1 > longest:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def generate_batch(self, *args: Any, **kwargs: Any):
        """Continuous batching of Transformers keeps keys and values of attention in pages; Translution has neither.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`generate_batch` needs a paged cache of keys and values, which is not what Translution remembers; use `generate`, "
            "which takes batches of prompts padded on the left."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds:
                See [`TranslutionModel.forward`].
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The token ids themselves (they are shifted inside); -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last positions, or indices of positions, to compute logits for; 0 is all.

        Returns:
            `CausalLMOutputWithPast` with `logits` of shape `(batch, length, vocab_size)`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        check_token_labels(labels, outputs.last_hidden_state, self.config.vocab_size, "`vocab_size`")
        check_logits_to_keep(logits_to_keep, outputs.last_hidden_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.head_norm(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _served(mixer_types: list[str]) -> str:
    """What the default runs for a model of these mixers."""
    fused = "PyTorch's `scaled_dot_product_attention`, with its flash kernels where the device has them"
    attends = ("attention", "rope_attention", "relative_bias_attention", "acmix")
    others = sorted({name for name in mixer_types if name not in attends})
    if not others:
        return f"all layers run {fused}"
    own = f"layers of {', '.join(others)} run operators of their own"
    return own if len(others) == len(set(mixer_types)) else f"{own}, the others {fused}"


__all__ = [
    "TranslutionForCausalLM",
    "TranslutionForImageClassification",
    "TranslutionModel",
    "TranslutionPreTrainedModel",
]

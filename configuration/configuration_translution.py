"""Configuration of Translution models (Fan et al. 2025, arXiv 2510.10060)."""

# No `from __future__ import annotations` here: `@strict` reads the field types and skips those that are strings.

import os
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import __version__ as transformers_version
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .remote_code import auto_map, copy_code, own_auto_map


logger = logging.get_logger(__name__)

MIXER_TYPES = (
    "translution",
    "rope_translution",
    "attention",
    "rope_attention",
    "relative_bias_attention",
    "relative_vector_attention",
    "convolution",
    "acmix",
)
RELATIVE_PROJECTIONS = ("qkv", "qk", "qv", "kv", "q", "k", "v")
FAR_OFFSETS = ("clamped", "shared")
MODALITIES = ("image", "text")
POOLINGS = ("cls", "mean", "cls_and_mean")
# Mixers of a model whose trunk is that of another: Translution, or its own attention.
TRUNK_MIXER_TYPES = ("translution", "rope_translution", "attention", "rope_attention")
# Fields of a saved config that no config class declares.
ADDED_BY_TRANSFORMERS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "quantization_config",
}

# More layers are a mistake, and would be built for minutes before anything else says so.
MAX_LAYERS = 10_000
# No machine holds more of anything, and PyTorch cannot count much more. Tokenizers write 10**30 where a length has no limit.
MAX_SIZE = 2**31 - 1
# Hidden size, layers, heads and MLP size of the paper's models; the head size is always 64.
SIZES = {
    "tiny": (192, 6, 3, 768),
    "mini": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


# Local Translution: matrices of their own for near offsets, one for all others.
LOCAL = {
    "image": {"mixer_types": "translution", "max_relative_distance": 1, "far_offsets": "shared"},
    "text": {"mixer_types": "rope_translution", "max_relative_distance": 3},
}
PRESETS = {"local": LOCAL}


@strict
class TranslutionConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`TranslutionModel`], with and without a head, and of [`TranslutionBackbone`].

    Every value is checked on construction; a value out of range, or one that contradicts another, raises an error that
    names the field, the value and what is allowed.

    Args:
        modality (`str`, *optional*, defaults to `"image"`):
            `"image"` (2-D offsets, a class token) or `"text"` (1-D offsets, causal).
        hidden_size (`int`, *optional*, defaults to 192):
            Features of a token.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Blocks of a mixer and an MLP.
        num_attention_heads (`int`, *optional*, defaults to 3):
            Heads of each mixer.
        head_dim (`int`, *optional*, defaults to 64):
            Features of a head. `num_attention_heads * head_dim` need not be `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 768):
            Hidden features of the MLP.
        mixer_types (`str` or `list[str]`, *optional*, defaults to `"translution"`):
            The mixer of each layer; a single name stands for all layers. `"translution"`, `"rope_translution"`, `"attention"`,
            `"rope_attention"`, `"relative_bias_attention"`, `"relative_vector_attention"`, `"convolution"`, `"acmix"`.
            `"rope_translution"` needs a `relative_rank`, a `max_relative_distance`, or `relative_projections="v"`.
        relative_projections (`str`, *optional*, defaults to `"kv"`):
            Which projections of Translution depend on the offset between two tokens: `"qkv"`, `"qk"`, `"qv"`, `"kv"`, `"q"`,
            `"k"` or `"v"`. The authors advise `"kv"` or `"qv"`: the accuracy of `"qkv"` with fewer weights.
        relative_rank (`int`, *optional*):
            `None` for full Translution; an integer for LoR-Translution with that many relative features per head.
        offset_basis (`int`, *optional*):
            Number of shared matrices that all offset matrices of a bank are mixed from (Basis Translution); `None` leaves
            every matrix free.
        max_relative_distance (`int`, *optional*):
            Distances (per axis) beyond this share one matrix, so that banks do not grow with the input: `(2D + 1)²` matrices
            and three for images, `D + 1` for text. `None` gives every offset of the input its own matrix.
        far_offsets (`str`, *optional*, defaults to `"clamped"`):
            What offsets beyond `max_relative_distance` use. `"clamped"`: each axis is clamped, so that far patches still know
            their direction. `"shared"`: all of them share one matrix, so that an image bank has `(2D + 1)² + 1` and three. For
            text both are the same.
        use_absolute_position_embeddings (`bool`, *optional*, defaults to `False`):
            Whether learned absolute position embeddings are added to the input.
        kernel_size (`int`, *optional*, defaults to 3):
            Odd window of `"convolution"` and `"acmix"` mixers, in tokens.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary frequencies.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the embeddings and of each residual branch.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities.
        classifier_dropout (`float`, *optional*):
            Dropout before the head that classifies tokens; `None` is `hidden_dropout_prob`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every LayerNorm.
        initializer_range (`float`, *optional*):
            Standard deviation of initial weights. `None` draws Linears and offset banks as PyTorch draws a Linear, uniformly
            within `±in ** -0.5`, and embeddings with 0.02; a number is the standard deviation of all of them. See
            `modeling/mixers/initial_weights.py` for why.
        image_size, patch_size (`int` or `[height, width]`, *optional*, default to 224 and 16):
            Pixels; the image size must be a multiple of the patch size on each axis.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of an image.
        pooling (`str`, *optional*, defaults to `"cls"`):
            What the image classifier reads: the class token, the `"mean"` of all tokens, the class token included, or
            `"cls_and_mean"`, the class token beside the mean of the patches.
        out_features (`list[str]`, *optional*):
            Stages of [`TranslutionBackbone`] to return, in the order of `stage_names`: `"stem"`, the input of the first layer,
            and `"stage1"` to `"stage{num_hidden_layers}"`, the layers' outputs. The backbone returns the last one if neither
            this nor `out_indices` is set.
        out_indices (`list[int]`, *optional*):
            The same by index, from 0 for `"stem"`; negative ones count from the end. Either sets the other.
        vocab_size (`int`, *optional*, defaults to 50257):
            Tokens of the text vocabulary.
        max_position_embeddings (`int`, *optional*, defaults to 256):
            Longest text. Rows of a text bank where `max_relative_distance` is not set.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the language-model head shares the input embedding.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether generation keeps a cache, where the model supports one.
        trunk_config (`dict`, *optional*):
            Config of the attention model whose trunk this one keeps, see [`TranslutionForCausalLM.from_attention`]: only its
            attention modules are replaced, where `mixer_types` says so. `None` for this package's own trunk.

    Example:

    ```python
    >>> from translution import TranslutionConfig, TranslutionForImageClassification

    >>> config = TranslutionConfig.from_size("tiny", image_size=32, patch_size=8, relative_projections="kv")
    >>> model = TranslutionForImageClassification(config)
    ```
    """

    model_type = "translution"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Heads of mixers by `modeling/mixers/tensor_parallel.py`; Transformers divides `embed_tokens` by itself.
    base_model_tp_plan = {
        "layers.*.mixer": "translution_heads",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    modality: str = "image"
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    head_dim: int = 64
    intermediate_size: int = 768
    mixer_types: str | list[str] | None = None
    relative_projections: str = "kv"
    relative_rank: int | None = None
    offset_basis: int | None = None
    max_relative_distance: int | None = None
    far_offsets: str = "clamped"
    use_absolute_position_embeddings: bool = False
    kernel_size: int = 3
    rope_theta: float | int = 10000.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float | int | None = None
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    pooling: str = "cls"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    vocab_size: int = 50257
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    trunk_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any):
        self.name_each_mixer()
        stage_names = kwargs.pop("stage_names", None)
        if stage_names is not None and stage_names != self.stage_names:
            raise ValueError(
                f"`stage_names` must be {self.stage_names} where `num_hidden_layers` is {self.num_hidden_layers}, got {stage_names}."
            )
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)
        super().__post_init__(**kwargs)

    def name_each_mixer(self):
        """Writes one mixer per layer where `mixer_types` is a single name, or None; fields may be set after construction too."""
        _check_between("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        names = "translution" if self.mixer_types is None else self.mixer_types
        if isinstance(names, str):
            self.mixer_types = [names] * self.num_hidden_layers

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' own; fields that nobody here knows are kept, as in all models, with a warning that names them."""
        known = set(dir(cls)) | set(cls().to_dict()) | ADDED_BY_TRANSFORMERS
        unknown = sorted(name for name in set(config_dict) - known if not name.startswith("_"))
        if unknown:
            logger.warning(
                f"The config has fields that this version does not know, and leaves unused: {', '.join(unknown)}. It was written by "
                f"Transformers {config_dict.get('transformers_version', 'unknown')}, here is {transformers_version}: the "
                "model may have been made by a newer version of this code, and compute something else."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_size(cls, size: str, preset: str | None = None, **fields: Any) -> "TranslutionConfig":
        """One of the paper's sizes, `"tiny"`, `"mini"`, `"small"`, `"base"` or `"large"`; `fields` override.

        Args:
            size: name of the size.
            preset: `"local"` for local Translution: relative keys and values with matrices of their own for near offsets and
                one for all others. Images: `max_relative_distance=1`, `far_offsets="shared"`; text:
                `max_relative_distance=3`, rotary.
            fields: of the config.

        Raises:
            ValueError: for an unknown size or preset.
        """
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"`size` must be one of {_choices(SIZES)}, got {size!r}.")
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise ValueError(f"`preset` must be None or one of {_choices(PRESETS)}, got {preset!r}.")
        modality = fields.get("modality", cls.modality)
        _check_choice("modality", modality, MODALITIES)
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = SIZES[size]
        values = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "head_dim": 64,
            "intermediate_size": intermediate_size,
        }
        if preset is not None:
            values.update(PRESETS[preset][modality], relative_projections="kv")
        return cls(**{**values, **fields})

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any):
        """Saves the configuration, and beside it the code that a checkpoint needs where this package is not installed.

        Every way of saving or pushing a model passes here, before anything is uploaded.

        Args:
            save_directory: folder to write to; made if it is not there.
            push_to_hub: whether to push the configuration to `repo_id` (the folder's name, if not given) as well; other
                arguments go to `push_to_hub`.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        # Where the class itself came with a checkpoint, Transformers has copied the files, which lie side by side.
        if type(self).__module__.startswith("transformers_modules"):
            super().save_pretrained(folder)
            self.auto_map = own_auto_map(getattr(self, "auto_map", None) or {}, folder)
        elif type(self) is TranslutionConfig:
            self.auto_map = auto_map(self.modality)
            copy_code(folder)
        super().save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_height_width(self) -> tuple[int, int]:
        """Height and width of an image, in patches."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def layer_types(self) -> list[str]:
        """Transformers' word for the kind of cache of each layer: this package's own, see `modeling/mixers/cache.py`."""
        return [self.model_type] * self.num_hidden_layers

    @property
    def stage_names(self) -> list[str]:
        """What a backbone may return: what the first layer receives, then what each layer returns."""
        return ["stem"] + [f"stage{number}" for number in range(1, self.num_hidden_layers + 1)]

    def verify_out_features_out_indices(self):
        """Checks which stages a backbone returns; what is not checked here, Transformers does."""
        names = self.stage_names
        for field, stages in (("out_features", self._out_features), ("out_indices", self._out_indices)):
            if stages is None:
                continue
            if self.modality != "image":
                raise ValueError(f"`{field}` must be None for `modality` {self.modality!r}, got {stages}.")
            if not stages:
                raise ValueError(
                    f"`{field}` must be None or name at least one of `stage_names` {names}, got {stages}."
                )
        for index in self._out_indices or ():
            _check_between("out_indices", index, -len(names), len(names) - 1)
        super().verify_out_features_out_indices()

    def validate_layer_type(self):
        """Transformers would refuse a kind of cache that it does not know; there is nothing else to check."""

    @property
    def longest_text(self) -> int | None:
        """The largest number of tokens of a text; None where far pairs share a matrix, and no position is absolute."""
        bounded = self.max_relative_distance is None or self.use_absolute_position_embeddings
        return self.max_position_embeddings if bounded else None

    def validate_architecture(self):
        """Checks ranges and contradictions between fields; types are checked on assignment."""
        self.name_each_mixer()
        _check_choice("modality", self.modality, MODALITIES)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("relative_projections", self.relative_projections, RELATIVE_PROJECTIONS)
        _check_choice("far_offsets", self.far_offsets, FAR_OFFSETS)
        _check_between("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        for field in (
            "hidden_size",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "kernel_size",
            "num_channels",
            "vocab_size",
            "max_position_embeddings",
        ):
            _check_between(field, getattr(self, field), 1)
        for field, least in (("relative_rank", 1), ("offset_basis", 1), ("max_relative_distance", 0)):
            if getattr(self, field) is not None:
                _check_between(field, getattr(self, field), least)
        for field in ("hidden_dropout_prob", "attention_dropout", "classifier_dropout"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{field}` must be at least 0 and less than 1, got {value}.")
        for field in ("rope_theta", "layer_norm_eps"):
            if not 0 < getattr(self, field) <= sys.float_info.max:
                raise ValueError(f"`{field}` must be positive and finite, got {getattr(self, field)}.")
        if self.initializer_range is not None and not 0 <= self.initializer_range <= sys.float_info.max:
            raise ValueError(
                f"`initializer_range` must be None or at least 0 and finite, got {self.initializer_range}."
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {self.kernel_size}.")
        self._validate_activation()
        self._validate_mixers()
        if self.trunk_config is not None:
            self._validate_trunk()
        self.verify_out_features_out_indices()
        if self.modality == "image":
            self._validate_image()

    def _validate_activation(self):
        # Imported here: activations need PyTorch, which reading a config does not.
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {_choices(ACT2FN)}, got {self.hidden_act!r}.")

    def _validate_mixers(self):
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`mixer_types` must be one name or one name per layer: `num_hidden_layers` is {self.num_hidden_layers}, got "
                f"{len(self.mixer_types)} names, {self.mixer_types}."
            )
        for name in self.mixer_types:
            _check_choice("mixer_types", name, MIXER_TYPES)
        if "acmix" in self.mixer_types and self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                "`mixer_types` with 'acmix' needs `num_attention_heads` × `head_dim` to be `hidden_size`, got "
                f"{self.num_attention_heads} × {self.head_dim} and {self.hidden_size}."
            )
        bounded = self.relative_rank is not None or self.max_relative_distance is not None
        if "rope_translution" in self.mixer_types and not bounded and self.relative_projections != "v":
            raise ValueError(
                "`mixer_types` with 'rope_translution' needs an integer `relative_rank` or `max_relative_distance`, or "
                "`relative_projections` 'v': a full bank of queries or keys for all offsets already contains every rotation. Got "
                "`relative_rank` None, `max_relative_distance` None and `relative_projections` "
                f"{self.relative_projections!r}."
            )
        if self.far_offsets == "shared" and self.max_relative_distance is None:
            raise ValueError(
                "`far_offsets` 'shared' needs an integer `max_relative_distance`, beyond which offsets share a matrix; got None."
            )
        rotates = any(name.startswith("rope_") for name in self.mixer_types)
        divisor = 4 if self.modality == "image" else 2
        if rotates and self.head_dim % divisor:
            raise ValueError(
                f"`head_dim` must be a multiple of {divisor} for rotary mixers of modality {self.modality!r}, got "
                f"{self.head_dim}."
            )

    def _validate_trunk(self):
        if not isinstance(self.trunk_config.get("model_type"), str):
            raise ValueError(
                "`trunk_config` must have the `model_type` of a model of Transformers, got "
                f"{self.trunk_config.get('model_type')!r}."
            )
        for name in self.mixer_types:
            _check_choice("mixer_types", name, TRUNK_MIXER_TYPES)

    def _validate_image(self):
        for field in ("image_size", "patch_size"):
            value = getattr(self, field)
            sides = [value] if isinstance(value, int) else list(value)
            if len(sides) not in (1, 2) or not all(1 <= side <= MAX_SIZE for side in sides):
                raise ValueError(
                    f"`{field}` must be a positive int or [height, width] of such, each at most {MAX_SIZE}, got {value}."
                )
            if not isinstance(value, int) and len(sides) != 2:
                raise ValueError(f"`{field}` must be an int or [height, width], got {value}.")
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size` {self.patch_size} on each axis, got {self.image_size}."
            )


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _choices(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _check_choice(field: str, value: Any, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {_choices(allowed)}, got {value!r}.")


def _check_between(field: str, value: int, least: int, most: int = MAX_SIZE):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`{field}` must be an integer of at least {least} and at most {most}, got {value!r}.")


__all__ = ["TranslutionConfig"]

"""Trunks of attention models of Transformers, whose attention modules are replaced by Translution.

A `Family` says where a model's attention modules are, what they are made of, and what of its config is not supported. Nothing
else of a model is known here: embeddings, norms, MLPs and the order of a block stay those of its own class.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ...configuration.configuration_translution import TranslutionConfig
from ..mixers.converted import AttentionParts, ConvertedAttention, Projection
from ..operators.resampling import resample_positions


# What attention that is not replaced runs; "eager" where its weights are asked for.
SDPA, EAGER = "sdpa", "eager"
# What each family calls the dropout of attention weights, and that of what a layer puts out.
DROPOUTS = {
    "attention_dropout": ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
    "hidden_dropout_prob": ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop"),
}
# Config fields of a source that say nothing of its trunk, or that the Translution config has itself.
NOT_OF_TRUNK = (
    "architectures",
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
)


@dataclass(frozen=True)
class Family:
    """How to reach the attention modules of a model type.

    Fields:
        modality: of its models.
        layers: name of the list of layers in the trunk.
        attention: name of the attention module in a layer.
        parts: takes an attention module apart.
        rotary: whether queries and keys are rotated by position.
        pooling: what its image classifier reads.
        absolute: whether it adds a table of absolute positions, which bounds the length of a text.
        resizes: whether its trunk takes `interpolate_pos_encoding`.
        norm: name of the final norm in the trunk.
        trunk_options: of the trunk's class.
        obstacle: what of a config is not supported; empty for nothing.
    """

    modality: str
    layers: str
    attention: str
    parts: Callable[[nn.Module], AttentionParts]
    rotary: bool = False
    pooling: str = "cls"
    absolute: bool = False
    resizes: bool = False
    norm: str = "norm"
    trunk_options: dict[str, Any] = field(default_factory=dict)
    obstacle: Callable[[PreTrainedConfig], str] = lambda config: ""


def _projection(linear: nn.Linear) -> Projection:
    return Projection(linear.weight.t(), linear.bias)


def _linear_parts(attention: nn.Module) -> AttentionParts:
    """Attention of four Linears."""
    return AttentionParts(
        *(_projection(getattr(attention, f"{name}_proj")) for name in "qkv"),
        attention.o_proj,
        attention.scaling,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
    )


def _gpt2_parts(attention: nn.Module) -> AttentionParts:
    """Attention with one projection for all three, and dropout after the last."""
    thirds = zip(attention.c_attn.weight.chunk(3, dim=1), attention.c_attn.bias.chunk(3), strict=True)
    output = nn.Sequential(attention.c_proj, attention.resid_dropout)
    return AttentionParts(*(Projection(*third) for third in thirds), output, attention.scaling)


def _sliding_obstacle(config: PreTrainedConfig) -> str:
    layer_types = getattr(config, "layer_types", None) or []
    windowed = [name for name in layer_types if name != "full_attention"]
    if windowed:
        return f"`layer_types` has {windowed[0]!r}, and only full attention is supported, no sliding windows"
    # Where layers are named, they say which of them have the window.
    if not layer_types and getattr(config, "sliding_window", None) is not None:
        return f"`sliding_window` is {config.sliding_window}, and sliding windows are not supported"
    return ""


def _gpt2_obstacle(config: PreTrainedConfig) -> str:
    if config.add_cross_attention:
        return "`add_cross_attention` is True, and cross attention is not supported"
    if config.reorder_and_upcast_attn:
        return "`reorder_and_upcast_attn` is True, and scores are not computed in another type here"
    return ""


def _text_family(**options: Any) -> Family:
    return Family("text", "layers", "self_attn", _linear_parts, rotary=True, obstacle=_sliding_obstacle, **options)


FAMILIES = {
    "llama": _text_family(),
    "mistral": _text_family(),
    "qwen2": _text_family(),
    "qwen3": _text_family(),
    "gpt2": Family("text", "h", "attn", _gpt2_parts, absolute=True, norm="ln_f", obstacle=_gpt2_obstacle),
    "vit": Family(
        "image",
        "layers",
        "attention",
        _linear_parts,
        absolute=True,
        resizes=True,
        norm="layernorm",
        trunk_options={"add_pooling_layer": False},
    ),
    "dinov2": Family(
        "image",
        "encoder.layer",
        "attention",
        _linear_parts,
        absolute=True,
        pooling="cls_and_mean",
        norm="layernorm",
    ),
}
# Model types that are near to supported ones.
REASONS = {
    "deit": "its distillation token stands outside the grid of patches as the class token does, and banks have rows for one "
    "such token; checkpoints without distillation are of type 'vit'",
    "dinov2_with_registers": "register tokens stand outside the grid of patches, and banks have rows for the class token alone",
    "mixtral": "it has experts and sliding windows",
    "qwen2_moe": "it has experts",
    "qwen3_moe": "it has experts",
}


def family_of(model_type: str) -> Family:
    """How to reach the attention of a model type.

    Raises:
        ValueError: for a type that is not supported.
    """
    if model_type not in FAMILIES:
        reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
        supported = ", ".join(repr(name) for name in FAMILIES)
        raise ValueError(f"`model_type` must be one of {supported}, got {model_type!r}{reason}.")
    return FAMILIES[model_type]


def check_source(config: PreTrainedConfig, modality: str) -> Family:
    """The family of a model to convert.

    Raises:
        ValueError: if it is not supported; the message names the field that says so.
    """
    family = family_of(config.model_type)
    if family.modality != modality:
        raise ValueError(
            f"A model of `modality` {modality!r} is needed, got `model_type` {config.model_type!r}, which is one of "
            f"{family.modality!r}."
        )
    obstacle = family.obstacle(config)
    if getattr(config, "quantization_config", None) is not None:
        obstacle = "`quantization_config` is set, and quantised weights cannot be made into banks; load it dequantised"
    if obstacle:
        raise ValueError(f"The model of type {config.model_type!r} cannot be converted: {obstacle}.")
    return family


def is_of_peft(module: Any) -> bool:
    """Whether PEFT made a module, a layer with adapters or a whole model. PEFT need not be installed."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def check_modules(source: PreTrainedModel) -> None:
    """Whether all modules of a model to convert hold their weights themselves.

    Raises:
        ValueError: for adapters of PEFT, and for weights that PyTorch quantised; the message names the module.
    """
    for name, module in source.named_modules():
        if is_of_peft(module):
            raise ValueError(
                f"`model` must have no adapters of PEFT, got {type(module).__name__} at {name!r}: merge them first, by "
                "`merge_and_unload()` of a `PeftModel`."
            )
        # Modules that `torch.ao.quantization` makes unpack their weights when asked.
        if callable(getattr(module, "weight", None)):
            raise ValueError(
                "`model` must have no quantised weights, which cannot be made into banks, got "
                f"{type(module).__module__}.{type(module).__name__} at {name!r}; quantise the converted model instead."
            )


def _layer_index(layer: Any, count: int) -> int:
    """An integer, of NumPy and PyTorch as well; a mask of booleans is none."""
    try:
        if not isinstance(layer, bool) and getattr(layer, "dtype", None) != torch.bool:
            index = operator.index(layer)
            if 0 <= index < count:
                return index
    except TypeError:
        pass
    raise ValueError(f"`layers` must be integers of at least 0 and less than {count}, got {layer!r}.")


def convert_config(
    config_class: type[TranslutionConfig], source: PreTrainedConfig, layers: Iterable[int] | None, **fields: Any
) -> TranslutionConfig:
    """The config of a Translution model with the trunk of another.

    Args:
        config_class: of the Translution model.
        source: config of the attention model, checked by `check_source`.
        layers: those that become Translution, all if `None`.
        fields: of the Translution config.

    Raises:
        ValueError: for layers that the source does not have.
    """
    family, count = FAMILIES[source.model_type], source.num_hidden_layers
    chosen = range(count) if layers is None else [_layer_index(layer, count) for layer in layers]
    prefix = "rope_" if family.rotary else ""
    kept = {"trunk_config": {k: v for k, v in source.to_dict().items() if k not in NOT_OF_TRUNK}}
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "intermediate_size"]
    names += ["initializer_range", "problem_type", "dtype"]
    if family.modality == "text":
        names += ["vocab_size", "max_position_embeddings", "tie_word_embeddings", "use_cache"]
        names += ["bos_token_id", "eos_token_id", "pad_token_id"]
    else:
        names += ["image_size", "patch_size", "num_channels", "id2label", "label2id"]
    for name in names:
        value = getattr(source, name, None)
        if value is not None:
            kept[name] = value
    # For those who read the config; the trunk has its own.
    epsilons = (getattr(source, name, None) for name in ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon"))
    kept["layer_norm_eps"] = next(value for value in epsilons if value is not None)
    kept["rope_theta"] = (getattr(source, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    kept["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    for name, theirs in DROPOUTS.items():
        # Llama has none of hidden states.
        kept[name] = next((getattr(source, other) for other in theirs if hasattr(source, other)), 0.0)
    return config_class(
        modality=family.modality,
        mixer_types=[f"{prefix}{'translution' if i in chosen else 'attention'}" for i in range(count)],
        pooling=family.pooling,
        use_absolute_position_embeddings=family.absolute,
        **kept,
        **fields,
    )


def source_config(config: TranslutionConfig) -> PreTrainedConfig:
    """The config of the trunk, as the fields of the Translution config that may change have it now."""
    fields = dict(config.trunk_config)
    family = family_of(fields["model_type"])
    fields.update(
        {"vocab_size": config.vocab_size} if family.modality == "text" else {"image_size": config.image_size}
    )
    for name, names in DROPOUTS.items():
        own = [theirs for theirs in names if theirs in fields]
        # What was not changed stays, also where the trunk has several that differ.
        if own and getattr(config, name) != fields[own[0]]:
            fields.update(dict.fromkeys(own, getattr(config, name)))
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def build_trunk(config: TranslutionConfig, use_mask_token: bool = False) -> PreTrainedModel:
    """The trunk that `config.trunk_config` names, with Translution in the layers that `config.mixer_types` says.

    Args:
        config: of the Translution model.
        use_mask_token: whether a trunk for images has to have a token in place of masked patches.

    Raises:
        ValueError: if the source is not supported.
    """
    source = source_config(config)
    family = check_source(source, config.modality)
    trunk = AutoModel.from_config(source, attn_implementation=SDPA, **family.trunk_options)
    if use_mask_token and trunk.embeddings.mask_token is None:
        # An option of the class in one family and a field of the config in another; their embeddings use it alike.
        trunk.embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
    replace_attention(trunk, config)
    return trunk


def layers_of(trunk: PreTrainedModel) -> nn.ModuleList:
    """The layers of a trunk."""
    return trunk.get_submodule(FAMILIES[trunk.config.model_type].layers)


def final_norm_of(trunk: PreTrainedModel) -> nn.Module:
    """The norm after the last layer of a trunk."""
    return trunk.get_submodule(FAMILIES[trunk.config.model_type].norm)


def attention_of(trunk: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, replaced or not."""
    return [getattr(layer, FAMILIES[trunk.config.model_type].attention) for layer in layers_of(trunk)]


@torch.no_grad()
def replace_attention(trunk: PreTrainedModel, config: TranslutionConfig) -> None:
    """Puts Translution in the place of attention, in the layers that `config.mixer_types` says, one after the other.

    What has been replaced is free at once, so that no second copy of a model is in memory.

    Raises:
        ValueError: if this version of Transformers makes the attention of a family of other parts.
    """
    name = FAMILIES[trunk.config.model_type].attention
    layers = [
        (index, layer)
        for index, layer in enumerate(layers_of(trunk))
        if config.mixer_types[index].endswith("translution")
    ]
    for _, layer in layers:
        # Before the first is replaced: a trunk that is refused stays as it was. Parts are not kept, which would keep memory.
        _parts_of(trunk, getattr(layer, name))
    for index, layer in layers:
        attention = getattr(layer, name)
        converted = ConvertedAttention(config, index, _parts_of(trunk, attention))
        setattr(layer, name, converted.train(attention.training))


def _parts_of(trunk: PreTrainedModel, attention: nn.Module) -> AttentionParts:
    try:
        return FAMILIES[trunk.config.model_type].parts(attention)
    except AttributeError as error:
        raise ValueError(
            f"Attention of `model_type` {trunk.config.model_type!r} must be made as in Transformers 5.23, got that of "
            f"{transformers_version}: {error}."
        ) from error


def input_embedding_name(trunk: PreTrainedModel) -> str:
    """Name of the token embedding in a trunk."""
    embedding = trunk.get_input_embeddings()
    return next(name for name, module in trunk.named_modules() if module is embedding)


def image_options(trunk: PreTrainedModel, interpolate_pos_encoding: bool) -> dict[str, bool]:
    """How a trunk is told to take images of another size; some always do."""
    if FAMILIES[trunk.config.model_type].resizes:
        return {"interpolate_pos_encoding": interpolate_pos_encoding}
    return {}


@torch.no_grad()
def resize_trunk(
    trunk: PreTrainedModel, image_size: tuple[int, int], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> None:
    """Makes the embeddings of a trunk those of images of another size, for good.

    Args:
        image_size: height and width in pixels.
        old_grid, new_grid: height and width in patches.

    Raises:
        ValueError: for an oblong size where the trunk interpolates by itself, which takes a square of positions.
    """
    if not FAMILIES[trunk.config.model_type].resizes and image_size[0] != image_size[1]:
        raise ValueError(
            f"`image_size` must be square for a trunk of type {trunk.config.model_type!r}, got {list(image_size)}; images of "
            "another shape need no resizing there."
        )
    embeddings = trunk.embeddings
    embeddings.position_embeddings = nn.Parameter(
        resample_positions(embeddings.position_embeddings, old_grid, new_grid)
    )
    for part in (embeddings, embeddings.patch_embeddings):
        if hasattr(part, "image_size"):
            part.image_size = image_size
    embeddings.patch_embeddings.num_patches = new_grid[0] * new_grid[1]
    trunk.config.image_size = list(image_size)


def run_trunk(
    trunk: PreTrainedModel, num_layers: int, wants_weights: bool, wants_states: Any, **inputs: Any
) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """The last hidden states of a trunk, `[B, L, C]`, the hidden states of all layers, and the weights of all layers.

    Args:
        trunk: its layers hand what they do not know on to their attention.
        num_layers: how many of its layers are run, where it can leave some out.
        wants_weights, wants_states: what to return besides; `output_hidden_states` of Transformers.
        inputs: of the trunk's forward pass, and of `ConvertedAttention`.
    """
    implementation = EAGER if wants_weights else SDPA
    # Transformers sets all parts of a model to what the whole is set to, which here belongs to Translution.
    if trunk.config._attn_implementation != implementation:
        trunk.config._attn_implementation = implementation
    if trunk.config.num_hidden_layers != num_layers:
        trunk.config.num_hidden_layers = num_layers
    weights: list[Tensor] = []
    hooks = []
    if wants_weights:
        hooks = [
            module.register_forward_hook(lambda _, __, output: weights.append(output[1]))
            for module in attention_of(trunk)
        ]
    try:
        outputs = trunk(**inputs, wants_weights=wants_weights, output_hidden_states=wants_states, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs.last_hidden_state, outputs.hidden_states, tuple(weights) if wants_weights else None


__all__ = [
    "FAMILIES",
    "Family",
    "attention_of",
    "build_trunk",
    "check_modules",
    "check_source",
    "convert_config",
    "family_of",
    "final_norm_of",
    "image_options",
    "input_embedding_name",
    "is_of_peft",
    "layers_of",
    "replace_attention",
    "resize_trunk",
    "run_trunk",
    "source_config",
]

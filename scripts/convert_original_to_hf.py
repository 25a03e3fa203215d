#!/usr/bin/env python
"""Converts a checkpoint of the original Translution code (github.com/hehefan/Translution) to Transformers.

    python scripts/convert_original_to_hf.py --checkpoint FILE --output DIR --arch kv_tiny --patch_size 56
    python scripts/convert_original_to_hf.py --checkpoint FILE --output DIR --config config.json

A checkpoint that records its `arch` needs neither `--arch` nor `--config`. Options that are left out have the
defaults of the original commands. Every tensor of the checkpoint has to find its place, and every weight of the model
its tensor.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common.atomic_folder import check_output, written_whole
from common.command import ArgumentParser, run_command
from common.saved_files import read_json
from torch import Tensor

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.configuration.configuration_translution import POOLINGS, RELATIVE_PROJECTIONS, SIZES


MODELS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}

# The key that tells the modality of a checkpoint.
MODALITY_KEYS = {"image": "to_patch_embedding.2.weight", "text": "wte.weight"}

# Fields that describe the data, with the defaults of the original commands.
DATA_FIELDS = {
    "image": {"image_size": 224, "patch_size": 56, "num_labels": 1000, "pooling": "cls"},
    "text": {"max_position_embeddings": 256, "vocab_size": 50257},
}
DEFAULT_RANK = 8

# What no tensor tells and no original model varies.
FIXED_FIELDS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_relative_distance": None,
    "offset_basis": None,
}
ORIGINAL_MIXER_TYPES = ("translution", "rope_translution", "attention", "rope_attention")

BUFFERS = ("causal", "cos_cached", "sin_cached")
FULL_BANKS = {f"to_{name}.unique_params" for name in "qkv"}
MIXER_KEY = re.compile(r"(?:translution|transformer)\.layers\.(\d+)\.0\.(.+)")
TRANSLUTION_KEY = re.compile(r"to_[qkv](?:1\.weight|2?\.unique_params)")

NEVER_ROTATED = "full Translution is refused here: the original rotary image model of it never applied its rotation"
SAW_THE_FUTURE = "a text hybrid is refused: without a causal mask the original's attention layers saw the future"


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: one of `parts` equal blocks of rows of the original tensor `key`.

    `reverse` turns the order of the rows around.
    """

    key: str
    part: int = 0
    parts: int = 1
    reverse: bool = False

    def original_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the original tensor for a parameter of `shape`."""
        return (shape[0] * self.parts, *shape[1:])

    def read(self, tensor: Tensor) -> Tensor:
        """The parameter's values, from the original tensor."""
        block = tensor.chunk(self.parts)[self.part]
        return block.flip(0) if self.reverse else block


def arch_families(modality: str) -> dict[str, dict[str, Any]]:
    """Config fields of every original `arch` of a modality, by its name without the size.

    Fields hold for Translution layers of any number; a `relative_rank` that is not `None` is a default.
    """
    families = {
        f"{prefix}{name}": {"mixer_types": "translution", "relative_projections": name, "relative_rank": rank}
        for prefix, rank in (("", None), ("lor_", DEFAULT_RANK))
        for name in RELATIVE_PROJECTIONS
    }
    families["former"] = {"mixer_types": "attention", "use_absolute_position_embeddings": True}
    if modality == "text":
        families["rope_former"] = {"mixer_types": "rope_attention"}
    else:
        # Rotary image models add absolute embeddings as well. The file that defines them says `rope_former`.
        families["rope"] = {"mixer_types": "rope_attention", "use_absolute_position_embeddings": True}
        families["rope_former"] = families["rope"]
        families["lor_rope"] = {**families["lor_v"], "mixer_types": "rope_translution"}
    return families


def config_from_arch(
    arch: str,
    modality: str,
    relative_rank: int | None = None,
    num_translution_layers: int | None = None,
    **fields: Any,
) -> TranslutionConfig:
    """Config of an original architecture.

    Args:
        arch: its name, `{family}_{size}`, as in `kv_tiny` or `lor_qv_base`.
        modality: `"image"` or `"text"`.
        relative_rank: for the families that begin with `lor_`, 8 by default.
        num_translution_layers: for hybrids, the number of Translution layers before the rotary attention.
        fields: further config fields, which override.

    Raises:
        ValueError: for an unknown architecture, or one that cannot be converted or contradicts the other arguments.
    """
    family, _, size = arch.rpartition("_")
    families = arch_families(modality)
    if modality == "image" and family in {f"rope_{name}" for name in RELATIVE_PROJECTIONS}:
        raise ValueError(f"`arch` {arch!r}: {NEVER_ROTATED}.")
    if family not in families or size not in SIZES:
        raise ValueError(
            f"`arch` must be one of {', '.join(families)} (modality {modality!r}), then '_', then one of "
            f"{', '.join(SIZES)}; got {arch!r}."
        )
    values = {**DATA_FIELDS[modality], **families[family], **fields}
    if relative_rank is not None:
        if values.get("relative_rank") is None:
            raise ValueError(f"`relative_rank` goes with an `arch` of 'lor_…', got {relative_rank} for {arch!r}.")
        values["relative_rank"] = relative_rank
    if num_translution_layers is not None:
        depth = values.get("num_hidden_layers", SIZES[size][1])
        mixer_type, number = values["mixer_types"], num_translution_layers
        if not mixer_type.endswith("translution"):
            raise ValueError(f"`num_translution_layers` goes with Translution alone, got {number} for {arch!r}.")
        if not 1 <= number <= depth:
            raise ValueError(f"`num_translution_layers` must be from 1 to {depth} for {arch!r}, got {number}.")
        if modality == "text" and number < depth:
            raise ValueError(f"`num_translution_layers` {number}: {SAW_THE_FUTURE}.")
        values["mixer_types"] = [mixer_type] * number + ["rope_attention"] * (depth - number)
    return TranslutionConfig.from_size(size, modality=modality, **values)


def original_sources(config: TranslutionConfig) -> dict[str, Source]:
    """The original tensor of every parameter of the model that `config` describes, by the parameter's name."""
    trunk = "translution" if any(name.endswith("translution") for name in config.mixer_types) else "transformer"
    modules = {"model.norm": f"{trunk}.norm"}  # with a weight and a bias each
    if config.modality == "image":
        modules |= {
            "model.embeddings.patch_norm": "to_patch_embedding.1",
            "model.embeddings.projection": "to_patch_embedding.2",
            "model.embeddings.norm": "to_patch_embedding.3",
            "classifier": "mlp_head",
        }
        tensors = {"model.embeddings.cls_token": "cls_token"}
        position_embeddings = {"model.embeddings.position_embeddings": "pos_embedding"}
    else:
        modules["head_norm"] = "norm"
        tensors = {"model.embed_tokens.weight": "wte.weight", "lm_head.weight": "output_head.weight"}
        position_embeddings = {"model.embed_positions.weight": "wpe.weight"}
    if config.use_absolute_position_embeddings:
        tensors |= position_embeddings
    has_output_projection = config.num_attention_heads > 1 or config.head_dim != config.hidden_size
    sources = {}
    for index, mixer_type in enumerate(config.mixer_types):
        layer, original = f"model.layers.{index}", f"{trunk}.layers.{index}"
        modules |= {
            f"{layer}.input_layernorm": f"{original}.0.norm",
            f"{layer}.post_mixer_layernorm": f"{original}.1.net.0",
            f"{layer}.mlp.fc1": f"{original}.1.net.1",
            f"{layer}.mlp.fc2": f"{original}.1.net.4",
        }
        if has_output_projection:
            modules[f"{layer}.mixer.o_proj"] = f"{original}.0.to_out.0"
        for name, source in _mixer_sources(config, mixer_type).items():
            sources[f"{layer}.mixer.{name}"] = replace(source, key=f"{original}.0.{source.key}")
    for module, original in modules.items():
        tensors |= {f"{module}.{kind}": f"{original}.{kind}" for kind in ("weight", "bias")}
    return sources | {name: Source(key) for name, key in tensors.items()}


def _mixer_sources(config: TranslutionConfig, mixer_type: str) -> dict[str, Source]:
    """Projections and banks, by their names within the mixer; keys are relative to the original mixer too."""
    relative = config.relative_projections if mixer_type.endswith("translution") else ""
    low_rank = config.relative_rank is not None
    # Plain projections are stacked in one tensor that is named after them.
    plain = "qkv" if low_rank else "".join(name for name in "qkv" if name not in relative)
    sources = {f"{name}_proj.weight": Source(f"to_{plain}.weight", i, len(plain)) for i, name in enumerate(plain)}
    for name in relative:
        # Text query banks begin with the largest distance.
        reverse = name == "q" and config.modality == "text"
        sources[f"{name}_bank"] = Source(f"to_{name}{2 if low_rank else ''}.unique_params", reverse=reverse)
    if low_rank:
        down = ("qk" if relative.strip("v") else "") + ("v" if "v" in relative else "")
        sources |= {f"{name}_down.weight": Source(f"to_{name}1.weight") for name in down}
        if "v" in relative:
            sources["v_up.weight"] = Source("to_v3.weight")
    return sources


def clean_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original parameters: no `module.` before the keys (data parallel training leaves it), no buffers."""
    if all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return {key: value for key, value in state_dict.items() if key.rpartition(".")[2] not in BUFFERS}


def convert_state_dict(state_dict: Mapping[str, Tensor], config: TranslutionConfig) -> dict[str, Tensor]:
    """Parameters of the model that `config` describes, from an original state dict.

    Raises:
        ValueError: if no original model has this config, if the checkpoint cannot be converted faithfully, or if any
            key is unknown, missing or has the wrong shape; all such keys are named at once.
    """
    _check_config(config)
    _check_mixers(state_dict, config)
    state_dict = clean_state_dict(state_dict)
    sources = original_sources(config)
    with torch.device("meta"):
        weights = MODELS[config.modality](config).state_dict()
    expected = {source.key: source.original_shape(weights[name].shape) for name, source in sources.items()}
    found = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    problems = [f"unknown {key}" for key in found if key not in expected]
    for key, shape in expected.items():
        if key not in found:
            problems.append(f"missing {key} {list(shape)}")
        elif found[key] != shape:
            problems.append(f"misshapen {key} {list(found[key])} instead of {list(shape)}")
    if problems:
        raise ValueError(f"`state_dict` does not fit the config, {len(problems)} keys: {'; '.join(problems)}.")
    return {name: source.read(state_dict[source.key]) for name, source in sources.items()}


def _check_config(config: TranslutionConfig):
    for field, value in FIXED_FIELDS.items():
        given = getattr(config, field)
        if given != value:
            raise ValueError(f"`{field}` must be {value!r}, as in every original model, got {given!r}.")
    for name in config.mixer_types:
        if name not in ORIGINAL_MIXER_TYPES:
            allowed = ", ".join(ORIGINAL_MIXER_TYPES)
            raise ValueError(f"`mixer_types` of an original model must be of {allowed}, got {name!r}.")
    if "rope_translution" in config.mixer_types and config.relative_rank is None:
        raise ValueError(f"`mixer_types` has 'rope_translution' and `relative_rank` is None: {NEVER_ROTATED}.")


def _check_mixers(state_dict: Mapping[str, Tensor], config: TranslutionConfig):
    """Refuses what the names of the tensors give away, and no shape would."""
    layers: dict[int, set[str]] = {}
    for key in state_dict:
        if match := MIXER_KEY.fullmatch(key.removeprefix("module.")):
            layers.setdefault(int(match[1]), set()).add(match[2])
    rotary = {index for index, name in enumerate(config.mixer_types) if name.startswith("rope_")}
    rotated = {index for index, keys in layers.items() if any(key.endswith("cos_cached") for key in keys)}
    for index, keys in layers.items():
        if keys & FULL_BANKS and index in rotary | rotated:
            raise ValueError(f"`state_dict` has {min(keys & FULL_BANKS)} in rotary layer {index}: {NEVER_ROTATED}.")
    if config.modality == "text":
        relative = {index for index, keys in layers.items() if any(TRANSLUTION_KEY.match(key) for key in keys)}
        attention = {index for index, keys in layers.items() if "to_qkv.weight" in keys} - relative
        if relative and attention:
            raise ValueError(f"`state_dict` has attention in layers {sorted(attention)}: {SAW_THE_FUTURE}.")
    if rotated and rotated != rotary:
        raise ValueError(
            f"`mixer_types` must be rotary in layers {sorted(rotated)}, where the checkpoint has rotations, got "
            f"{config.mixer_types}."
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of the original code, `state_dict` and all; a file that would run code is refused.

    Raises:
        ValueError: if the file is something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`checkpoint` must be a file of tensors and plain values, got {str(path)!r}, which cannot be read, "
            f"or not without running code: {type(error).__name__}: {reason}"
        ) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"`checkpoint` must be a dict with a `state_dict` of named tensors, got {found} in {str(path)!r}."
        )
    return checkpoint


def modality_of(state_dict: Mapping[str, Tensor]) -> str:
    """`"image"` or `"text"`, by the keys.

    Raises:
        ValueError: if the keys are of neither, or of both.
    """
    keys = clean_state_dict(state_dict)
    found = [modality for modality, key in MODALITY_KEYS.items() if key in keys]
    if len(found) != 1:
        raise ValueError(
            f"`state_dict` must have {MODALITY_KEYS['image']!r} (images) or {MODALITY_KEYS['text']!r} (text), got "
            f"{' and '.join(found) or 'neither'} among {len(keys)} keys."
        )
    return found[0]


def read_config(path: Path) -> TranslutionConfig:
    """A config from a JSON file.

    Raises:
        ValueError: if it is not the config of a Translution model.
    """
    try:
        fields = read_json(path)
    except ValueError as error:
        raise ValueError(f"`config` must be a JSON file, {path} is none: {error}.") from None
    if not isinstance(fields, dict) or fields.get("model_type", "translution") != "translution":
        raise ValueError(f"`config` must be a JSON object with `model_type` 'translution', got {str(path)!r}.")
    return TranslutionConfig.from_dict(fields)


def resolve_config(
    checkpoint: Mapping[str, Any], arch: str | None, config: TranslutionConfig | None, options: Mapping[str, Any]
) -> TranslutionConfig:
    """The config of a checkpoint: `config`, or that of `arch` with `options`, or that of the arch it records itself.

    Raises:
        ValueError: if they contradict each other or the checkpoint, or if nothing says what the architecture is.
    """
    modality, recorded = modality_of(checkpoint["state_dict"]), checkpoint.get("arch")
    if config is None:
        if arch is not None and recorded is not None and arch != recorded:
            raise ValueError(f"`arch` must be {recorded!r}, which the checkpoint records, got {arch!r}.")
        if arch is None and recorded is None:
            raise ValueError("`arch` or `config` must be given: the checkpoint records no `arch`.")
        allowed = DATA_FIELDS[modality]
        for field in sorted(options.keys() - allowed.keys() - {"relative_rank", "num_translution_layers"}):
            raise ValueError(
                f"`{field}` does not go with modality {modality!r}, which allows {', '.join(allowed)}; got {options[field]!r}."
            )
        return config_from_arch(str(recorded) if arch is None else arch, modality, **options)
    if options:
        raise ValueError(f"`{min(options)}` goes with `arch`; with `config` it must be a field of that.")
    if config.modality != modality:
        raise ValueError(f"`modality` must be {modality!r} by the checkpoint's keys, got {config.modality!r}.")
    # Own sizes have names of their own, which say nothing; known ones settle what no tensor tells, as rotary or not.
    for field, value in arch_families(modality).get(str(recorded).rpartition("_")[0], {}).items():
        given = config.mixer_types[0] if field == "mixer_types" else getattr(config, field)
        if given != value and (field != "relative_rank" or None in (given, value)):
            allowed = "an integer" if field == "relative_rank" and value is not None else repr(value)
            raise ValueError(f"`{field}` must be {allowed} by the checkpoint's `arch` {recorded!r}, got {given!r}.")
    return config


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description="Convert a checkpoint of the original Translution code to Transformers.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file that the original code saved")
    parser.add_argument("--output", type=Path, required=True, help="directory of the converted model, new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the whole directory of an earlier model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--arch", help="original name, as 'kv_tiny'; by default the one that the checkpoint records")
    source.add_argument("--config", type=Path, help="TranslutionConfig as JSON, for sizes without a name")
    group = parser.add_argument_group("options of --arch")
    images, text, number = DATA_FIELDS["image"], DATA_FIELDS["text"], {"type": _positive, "metavar": "N"}
    for name in ("image_size", "patch_size"):
        words = f"images: pixels, or height and width ({images[name]})"
        group.add_argument(f"--{name}", **number, nargs="+", help=words)
    group.add_argument("--num_labels", **number, help=f"images: classes ({images['num_labels']})")
    group.add_argument("--pooling", choices=POOLINGS, help=f"images: what the head reads ({images['pooling']})")
    for name, default in text.items():
        group.add_argument(f"--{name}", **number, help=f"text ({default})")
    group.add_argument("--relative_rank", **number, help=f"LoR: rank of a head ({DEFAULT_RANK})")
    group.add_argument("--num_translution_layers", **number, help="hybrids: Translution layers (all)")
    return parser


def main(argv: Sequence[str]):
    options = {name: value for name, value in vars(build_parser().parse_args(argv)).items() if value is not None}
    for field in ("image_size", "patch_size"):
        if len(options.get(field, ())) == 1:
            (options[field],) = options[field]
    config = read_config(options.pop("config")) if "config" in options else None
    output = options.pop("output")
    check_output(output.resolve(), options.pop("overwrite"))
    checkpoint = load_checkpoint(options.pop("checkpoint"))
    config = resolve_config(checkpoint, options.pop("arch", None), config, options)
    parameters = convert_state_dict(checkpoint["state_dict"], config)
    model = MODELS[config.modality](config)
    model.load_state_dict(parameters, strict=True)
    with written_whole(output.resolve()) as folder:
        model.save_pretrained(folder)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters saved to {output}")


if __name__ == "__main__":
    run_command(main)

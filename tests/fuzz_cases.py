"""Random configurations, models, inputs and masks, all of them valid: what `fuzz.py` checks.

Legend: `B` batch, `A` heads, `L` tokens.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.configuration.configuration_translution import (
    FAR_OFFSETS,
    MIXER_TYPES,
    POOLINGS,
    RELATIVE_PROJECTIONS,
)
from translution.modeling.operators import basis, dispatch, far_blocks, offset_blocks, streamed


HEADS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
# What chooses a way to compute by the size of the input, with values that bring small inputs to every way.
SWITCHES = {
    (offset_blocks, "WORKSPACE_ELEMENTS"): (1, 64, 1 << 18),
    (offset_blocks, "NARROW"): (2, 33),
    (streamed, "GROUP_ELEMENTS"): (1, 1 << 17),
    (dispatch, "STREAM"): (True, True, False),
    (dispatch, "LOCAL"): (True, True, False),
    (far_blocks, "BIAS_ELEMENTS"): (1, 50, 1 << 22),
    (basis, "CHUNK_ELEMENTS"): (1, 100, 1 << 20),
}


@dataclass
class Case:
    """What was drawn. `fields` make the configuration, `inputs` are the arguments of `model`."""

    fields: dict[str, Any]
    switches: dict[tuple[Any, str], Any]
    model: nn.Module
    inputs: dict[str, Any]

    @property
    def config(self) -> TranslutionConfig:
        return self.model.config

    @property
    def is_text(self) -> bool:
        return self.config.modality == "text"

    @property
    def num_tokens(self) -> int:
        if self.is_text:
            return self.inputs["input_ids"].shape[1]
        sides = zip(self.inputs["pixel_values"].shape[2:], self.config.patch_height_width, strict=True)
        return 1 + math.prod(pixels // patch for pixels, patch in sides)

    @property
    def batch(self) -> int:
        return len(self.inputs["input_ids" if self.is_text else "pixel_values"])

    def describe(self) -> str:
        shapes = {
            name: f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        switches = {f"{place.__name__}.{name}": value for (place, name), value in self.switches.items()}
        return f"config {json.dumps(self.fields)}\ninputs {shapes}\nswitches {switches}"

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Computes in the ways that were drawn."""
        with ExitStack() as stack:
            for (place, name), value in self.switches.items():
                stack.enter_context(patch.object(place, name, value))
            yield


# What is drawn


def draw_fields(rng: random.Random) -> dict[str, Any]:
    """Fields of a valid configuration."""
    modality = rng.choice(list(HEADS))
    weights = [3 if name.endswith("translution") else 1 for name in MIXER_TYPES]
    mixers = rng.choices(MIXER_TYPES, weights, k=rng.choice([1, 1, 2, 3]))
    rotates = any(name.startswith("rope_") for name in mixers)
    step = (4 if modality == "image" else 2) if rotates else 1
    heads, head_dim = rng.choice([1, 1, 2, 3]), step * rng.randint(1, 9 // step)
    fields = {
        "modality": modality,
        "mixer_types": mixers,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim if "acmix" in mixers or rng.random() < 0.3 else rng.randint(3, 14),
        "intermediate_size": rng.randint(1, 12),
        "relative_projections": rng.choice(RELATIVE_PROJECTIONS),
        "relative_rank": rng.choice([None, None, 1, 2, 3]),
        "offset_basis": rng.choice([None, None, None, 1, 2, 3]),
        "max_relative_distance": rng.choice([None, None, None, 0, 1, 2, 3, 5, 9]),
        "use_absolute_position_embeddings": rng.random() < 0.25,
        "kernel_size": rng.choice([1, 3, 3, 5]),
        "rope_theta": rng.choice([10000.0, 20, 2.5]),
        "hidden_act": rng.choice(["gelu", "silu", "tanh"]),
        "initializer_range": 0.3,
    }
    if fields["max_relative_distance"] is not None:
        fields["far_offsets"] = rng.choice(FAR_OFFSETS)
    elif "rope_translution" in mixers and fields["relative_rank"] is None:
        fields["relative_projections"] = "v"
    if modality == "text":
        length = rng.randint(1, rng.choice([12, 12, 12, 40]))
        tied = rng.random() < 0.3
        return {
            **fields,
            "vocab_size": rng.randint(2, 20),
            "max_position_embeddings": length,
            "tie_word_embeddings": tied,
        }
    patch_size, grid = ([rng.randint(1, most) for _ in range(2)] for most in (3, rng.choice([5, 5, 5, 8])))
    image_size = [pixels * patches for pixels, patches in zip(patch_size, grid, strict=True)]
    if rng.random() < 0.2:
        image_size, patch_size = max(patch_size) * max(grid), max(patch_size)
    labels, channels = rng.randint(1, 4), rng.randint(1, 3)
    return {
        **fields,
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "num_labels": labels,
        "pooling": rng.choice(POOLINGS),
    }


def draw_inputs(rng: random.Random, config: TranslutionConfig) -> dict[str, Any]:
    """Arguments of a model's forward pass."""
    batch = rng.choice([0, 1, 2, 2, 3])
    if config.modality == "image":
        inputs, size = {}, list(config.image_height_width)
        if rng.random() < 0.3:
            inputs["interpolate_pos_encoding"] = True
            size = [side * rng.randint(1, 5) for side in config.patch_height_width]
        inputs["pixel_values"] = torch.randn(batch, config.num_channels, *size, dtype=torch.float64)
        tokens = 1 + math.prod(side // patch for side, patch in zip(size, config.patch_height_width, strict=True))
    else:
        bank = config.max_position_embeddings
        bounded = config.max_relative_distance is None or config.use_absolute_position_embeddings
        if rng.random() < 0.2:
            position_ids = draw_packed(rng, config, rng.randint(2, bank + 8), rng.choice([1, max(batch, 1)]), batch)
            return {**position_ids, "use_cache": rng.random() < 0.5}
        tokens = rng.randint(1, bank if bounded else 2 * bank + 5)
        inputs = {"input_ids": torch.randint(config.vocab_size, (batch, tokens)), "use_cache": rng.random() < 0.5}
        if rng.random() < 0.2:
            most = bank - tokens if config.use_absolute_position_embeddings else 20
            inputs["position_ids"] = (torch.arange(tokens) + rng.randint(0, most)).expand(rng.choice([1, batch]), -1)
    mask = draw_mask(rng, batch, config.num_attention_heads, tokens)
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def draw_packed(
    rng: random.Random, config: TranslutionConfig, tokens: int, rows: int, batch: int
) -> dict[str, Tensor]:
    """Rows of texts that each fit the bank, with positions that tell them apart."""
    position_ids = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < tokens:
            length = min(rng.randint(1, config.max_position_embeddings), tokens - len(row))
            row += range(length)
        position_ids.append(row)
    ids = torch.randint(config.vocab_size, (batch, tokens))
    return {"input_ids": ids, "position_ids": torch.tensor(position_ids)}


def draw_mask(rng: random.Random, batch: int, heads: int, tokens: int) -> Tensor | None:
    """No mask, one of tokens, or one of pairs that broadcasts in some way."""
    form = rng.choice(["none", "tokens", "tokens", "bool", "additive", "additive"])
    if form == "none":
        return None
    if form == "tokens":
        mask = torch.ones(batch, tokens, dtype=rng.choice([torch.long, torch.bool, torch.float32]))
        for row in mask:
            first, last = sorted(rng.randint(0, tokens) for _ in range(2))
            hidden = {"all": slice(None), "none": slice(0), "left": slice(last), "right": slice(first, None)}
            row[hidden.get(rng.choice([*hidden, "left", "right", "hole"]), slice(first, last))] = 0
        return mask
    shape = [rng.choice([1, size, size]) for size in (batch, heads, tokens, tokens)]
    visible = torch.rand(shape) < rng.choice([0.3, 0.7, 0.95])
    # Whole tokens are hidden as well, which scattered pairs hardly ever do.
    visible &= torch.rand(shape[0], 1, 1, shape[3]) < 0.8
    if form == "bool":
        return visible
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    hidden = rng.choice([-math.inf, torch.finfo(dtype).min, -1e4])
    return torch.randn(shape, dtype=dtype).masked_fill(~visible, hidden)


def draw_case(seed: int, number: int) -> Case:
    """The case of a number in the series of a seed."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(rng.getrandbits(60))
    switches = {key: rng.choice(values) for key, values in SWITCHES.items()}
    fields = draw_fields(rng)
    model = HEADS[fields["modality"]](TranslutionConfig(**fields)).double().eval()
    with torch.no_grad():
        # Biases and scales are drawn too.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Case(fields, switches, model, draw_inputs(rng, model.config))


# What a case means


def visible_pairs(case: Case) -> Tensor:
    """`[B, L, L]`, whether token `i` may read token `j` with any head of one layer."""
    mask, tokens = case.inputs.get("attention_mask"), case.num_tokens
    if mask is None:
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    elif mask.ndim == 2:
        visible = (mask != 0)[:, None, None]
    else:
        visible = mask if mask.dtype == torch.bool else mask > -1e3
    visible = visible.expand(case.batch, case.config.num_attention_heads, tokens, tokens).any(dim=1)
    if case.is_text:
        visible = visible & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for row, bounds in enumerate(packed_texts(case)):
        for start, end in bounds:
            visible[row, start:end, :start] = False
    return visible | torch.eye(tokens, dtype=torch.bool)


def is_packed(case: Case) -> bool:
    position_ids = case.inputs.get("position_ids")
    return "attention_mask" not in case.inputs and position_ids is not None and bool((position_ids.diff() != 1).any())


def packed_texts(case: Case) -> list[list[tuple[int, int]]]:
    """Where each text of a row begins and ends; no row at all where texts are not packed."""
    found = []
    for row in case.inputs["position_ids"].expand(case.batch, -1).tolist() if is_packed(case) else ():
        starts = [place for place in range(len(row)) if place == 0 or row[place] != row[place - 1] + 1]
        found.append(list(zip(starts, [*starts[1:], len(row)], strict=True)))
    return found

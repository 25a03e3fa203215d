"""Random models with random inputs, and what has to hold whatever was drawn.

    python tests/fuzz.py --seed 1 --minutes 5
    python tests/fuzz.py --seed 1 --case 17 --checks cache

A case is a configuration that is valid, a model in float64 whose weights are wide enough for every path to matter, and inputs
with a mask of some form. `CHECKS` says what is checked of it. A failure is printed with all that is needed to see it again.

Legend: `B` batch, `A` heads, `L` tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.configuration.configuration_translution import MIXER_TYPES, POOLINGS, RELATIVE_PROJECTIONS
from translution.modeling import basis_products, narrow_pairs, pair_runs, streamed_attention


HEADS = {"image": TranslutionForImageClassification, "text": TranslutionForCausalLM}
# Two ways to add up the same numbers differ by a few roundings, 2e-16 each, and layers of wide weights enlarge that: far less
# than 1e-9, and any mistake is far more. Relative to the largest number, or to 1, the size of what a LayerNorm puts out.
BOUND = 1e-9
# What chooses a way to compute by the size of the input, with values that bring small inputs to every way.
SWITCHES = {
    (pair_runs, "WORKSPACE_ELEMENTS"): (1, 64, 1 << 18),
    (pair_runs, "NARROW"): (2, 33),
    (streamed_attention, "SQUARE_ELEMENTS"): (1, 1 << 20),
    (streamed_attention, "GROUP_ELEMENTS"): (1, 1 << 17),
    (streamed_attention, "ENABLED"): (True, True, False),
    (basis_products, "CHUNK_ELEMENTS"): (1, 100, 1 << 20),
    (narrow_pairs, "LEAST_THREADS"): (1, 2),
}
SECONDS_PER_CHECK = 120


@dataclass
class Case:
    """What was drawn. `fields` make the configuration, `inputs` are the arguments of `model`."""

    fields: dict[str, Any]
    switches: list[int]
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
        switches = {f"{place.__name__}.{name}": value for (place, name), value in self.chosen_switches().items()}
        return f"config {json.dumps(self.fields)}\ninputs {shapes}\nswitches {switches}"

    def chosen_switches(self) -> dict[tuple[Any, str], Any]:
        return {key: values[index] for (key, values), index in zip(SWITCHES.items(), self.switches, strict=True)}


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
        "max_relative_distance": rng.choice([None, None, None, 0, 1, 2, 3, 5]),
        "use_absolute_position_embeddings": rng.random() < 0.25,
        "kernel_size": rng.choice([1, 3, 3, 5]),
        "rope_theta": rng.choice([10000.0, 20, 2.5]),
        "hidden_act": rng.choice(["gelu", "silu", "tanh"]),
        "initializer_range": 0.3,
    }
    if "rope_translution" in mixers and fields["relative_rank"] is None:
        fields["relative_projections"] = "v"
    if modality == "text":
        length = rng.randint(1, 12)
        tied = rng.random() < 0.3
        return {
            **fields,
            "vocab_size": rng.randint(2, 20),
            "max_position_embeddings": length,
            "tie_word_embeddings": tied,
        }
    patch_size, grid = ([rng.randint(1, most) for _ in range(2)] for most in (3, 5))
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
    switches = [rng.randrange(len(values)) for values in SWITCHES.values()]
    fields = draw_fields(rng)
    model = HEADS[fields["modality"]](TranslutionConfig(**fields)).double().eval()
    with torch.no_grad():
        # Biases and scales are drawn too.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Case(fields, switches, model, draw_inputs(rng, model.config))


# What is compared


def assert_close(what: str, actual: Tensor, expected: Tensor, bound: float = BOUND, size: float | None = None):
    """Two tensors differ by at most `bound`, relative to `size` or to the largest expected number."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not expected.numel():
        return
    size = max(1.0, expected.abs().max().item()) if size is None else size
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= bound * size, f"{what}: {difference:.3g} apart, where numbers are up to {size:.3g}"


def hidden_states(case: Case, **inputs: Any) -> Tensor:
    """The final states of every token, `[B, L, C]`."""
    with torch.no_grad():
        return case.model.model(**{**case.inputs, **inputs}).last_hidden_state


def logits(case: Case, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return case.model(**{**case.inputs, **inputs}).logits


def results(model: nn.Module, inputs: dict[str, Any], implementation: str) -> dict[str, Tensor]:
    """Logits, and gradients of a random combination of them by every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    found = model(**inputs).logits
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * weight.to(found.dtype)).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.set_attn_implementation("grouped")
    return {"logits": found.detach(), **gradients}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Of the logits and of all gradients, the largest difference relative to the largest number."""
    errors = []
    for names in (["logits"], [name for name in expected if name != "logits"]):
        size = max([1.0, *(expected[name].abs().max().item() for name in names if expected[name].numel())])
        apart = [(actual[name].double() - expected[name].double()).abs() for name in names if expected[name].numel()]
        errors.append(
            max((part.max().item() if part.isfinite().all() else math.inf for part in apart), default=0) / size
        )
    return errors[0], errors[1]


def changed_tokens(case: Case, chosen: Tensor) -> dict[str, Tensor]:
    """The input with other contents of the tokens that `[L]` names."""
    if case.is_text:
        ids = case.inputs["input_ids"]
        return {"input_ids": torch.where(chosen, (ids + 1) % case.config.vocab_size, ids)}
    pixels, (height, width) = case.inputs["pixel_values"], case.config.patch_height_width
    patches = chosen[1:].view(pixels.shape[2] // height, pixels.shape[3] // width)
    places = patches.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return {"pixel_values": torch.where(places, torch.randn_like(pixels), pixels)}


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


# What is checked


def check_reference(case: Case, rng: random.Random):
    """The default path computes what the readable reference does, and so do its gradients."""
    frozen = rng.choice([0, 0, 0.3, 0.7])
    for parameter in case.model.parameters():
        parameter.requires_grad_(rng.random() >= frozen)
    next(reversed(list(case.model.parameters()))).requires_grad_()
    try:
        actual, expected = (results(case.model, case.inputs, name) for name in ("grouped", "eager"))
    finally:
        case.model.requires_grad_()
    for what, found in zip(("logits", "gradients"), error(actual, expected), strict=True):
        assert found <= BOUND, f"{what}: {found:.3g} apart, relative to the largest"


def check_precision(case: Case, rng: random.Random):
    """In a narrower type the default path is not much further from float64 than the readable reference in that type."""
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
    model = copy.deepcopy(case.model).to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    # The same weights and inputs, rounded to the type, in float64.
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact = results(copy.deepcopy(model).double(), wide, "eager")
    actual, reference = (error(results(model, inputs, name), exact) for name in ("grouped", "eager"))
    for what, found, usual in zip(("logits", "gradients"), actual, reference, strict=True):
        # Which roundings fall together is chance, and large where a LayerNorm divides by little.
        allowed = 8 * usual + 64 * torch.finfo(dtype).eps
        assert math.isfinite(found), f"{what}: not finite in {dtype}"
        assert found <= allowed, f"{what}: {found:.3g} from float64 in {dtype}, and the reference {usual:.3g}"


def check_causality(case: Case, rng: random.Random):
    """Later tokens change no earlier one."""
    if case.is_text:
        first = rng.randint(1, case.num_tokens)
        changed = changed_tokens(case, torch.arange(case.num_tokens) >= first)
        assert_close(f"logits before {first}", logits(case, **changed)[:, :first], logits(case)[:, :first])


def check_hidden(case: Case, rng: random.Random):
    """A token changes those alone that may read it, directly or through others, one step a layer."""
    chosen = torch.arange(case.num_tokens) == rng.randrange(0 if case.is_text else 1, case.num_tokens)
    reached = chosen.expand(case.batch, -1)
    visible = visible_pairs(case)
    for _ in range(case.config.num_hidden_layers):
        reached = (visible & reached[:, None]).any(dim=-1)
    before, after = hidden_states(case), hidden_states(case, **changed_tokens(case, chosen))
    place = int(chosen.nonzero())
    assert_close(f"states that do not read token {place}", after[~reached], before[~reached])


def check_rows(case: Case, rng: random.Random):
    """Each row of a batch alone gives what it gives among others."""
    together = logits(case)
    for row in range(case.batch):
        alone = {
            name: value[row : row + 1] if isinstance(value, Tensor) and len(value) == case.batch else value
            for name, value in case.inputs.items()
        }
        assert_close(f"logits of row {row}", logits(case, **alone), together[row : row + 1])


def check_cache(case: Case, rng: random.Random):
    """Chunks of a text, then token by token, give what the whole text gives."""
    if not case.is_text or is_packed(case):
        return
    length, slots = case.num_tokens, case.num_tokens + rng.randint(0, 3)
    static = rng.random() < 0.4
    cache = StaticCache(config=case.config, max_cache_len=slots) if static else DynamicCache(config=case.config)
    if rng.random() < 0.2:
        # A cache that was used before and reset is as good as new.
        case.model(case.inputs["input_ids"][:, :1], past_key_values=cache)
        cache.reset()
    place, found, sizes = 0, [], []
    prefill = rng.randint(0, length)
    with torch.set_grad_enabled(rng.random() < 0.3):
        while place < length:
            sizes.append(rng.randint(1, prefill - place) if place < prefill else 1)
            end = place + sizes[-1]
            inputs = {"input_ids": case.inputs["input_ids"][:, place:end]}
            if "position_ids" in case.inputs:
                inputs["position_ids"] = case.inputs["position_ids"][:, place:end]
            if "attention_mask" in case.inputs:
                inputs["attention_mask"] = mask_of_chunk(case.inputs["attention_mask"], place, end)
            found.append(case.model(**inputs, past_key_values=cache, use_cache=True).logits.detach())
            place = end
    kind = f"static cache of {slots}" if static else "dynamic cache"
    assert_close(f"logits with a {kind} in chunks of {sizes}", torch.cat(found, dim=1), logits(case, use_cache=False))


def mask_of_chunk(mask: Tensor, start: int, end: int) -> Tensor:
    """What a mask says of the queries from `start` to `end`, and of the tokens up to there."""
    if mask.ndim == 4 and mask.shape[2] > 1:
        mask = mask[:, :, start:end]
    return mask[..., :end] if mask.shape[-1] > 1 else mask


def check_packed(case: Case, rng: random.Random):
    """Texts packed into one row give what each gives by itself."""
    together = logits(case)
    for row, bounds in enumerate(packed_texts(case)):
        for start, end in bounds:
            positions = case.inputs["position_ids"].expand(case.batch, -1)[row : row + 1, start:end]
            ids = case.inputs["input_ids"][row : row + 1, start:end]
            alone = logits(case, input_ids=ids, position_ids=positions)
            assert_close(
                f"logits of the text at {start} to {end} of row {row}", together[row : row + 1, start:end], alone
            )


def check_resizing(case: Case, rng: random.Random):
    """A model resized for images of another size does what it did for them by interpolation."""
    if not case.is_text:
        resized = copy.deepcopy(case.model)
        resized.model.resize_image(list(case.inputs["pixel_values"].shape[2:]))
        inputs = {**case.inputs, "interpolate_pos_encoding": False}
        with torch.no_grad():
            assert_close("logits", resized(**inputs).logits, logits(case))


def check_saving(case: Case, rng: random.Random):
    """A saved model comes back with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        loaded = type(case.model).from_pretrained(folder, dtype=torch.float64).eval()
    weights = loaded.state_dict()
    for name, weight in case.model.state_dict().items():
        assert torch.equal(weights[name], weight), f"{name} is not what was saved"
    with torch.no_grad():
        assert_close("logits", loaded(**case.inputs).logits, logits(case))


def forget_what_is_cached():
    """Empties the caches of indices, so that an export is the first to ask for them."""
    for name, module in list(sys.modules.items()):
        for function in list(vars(module).values()) if name.startswith("translution.modeling.") else ():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def check_export(case: Case, rng: random.Random):
    """Exporting a model leaves it as it was, and the program gives the same."""
    inputs = {**case.inputs, "use_cache": False} if case.is_text else case.inputs
    before = logits(case, **inputs)
    forget_what_is_cached()
    try:
        program = torch.export.export(case.model, (), inputs, strict=False)
        after = logits(case, **inputs)
    finally:
        # What goes wrong here must not show in other cases.
        forget_what_is_cached()
    assert type(after) is Tensor, f"after an export the model returns a {type(after).__name__}"
    assert_close("logits after an export", after, before)
    assert_close("logits of the exported program", program.module()(**inputs).logits, before)


NOT_COUNTS = (-1, 0, 10**30, math.nan, 1.5, "4", True, [4])
NOT_NUMBERS = (None, -0.5, math.nan, math.inf, "0.5", True, [0.5])
NOT_SIZES = (None, -4, 0, 10**30, math.nan, "8", True, [8], [8, 8, 8], [8, -8], [8, 0], [8, "8"], [8, None], [])
NOT_NAMES = (None, "unknown", "", 3, True, ["unknown"])
INVALID = {
    "modality": NOT_NAMES,
    "mixer_types": (*NOT_NAMES[1:], [], [None], ["attention"] * 9),
    "relative_projections": (*NOT_NAMES, "vk"),
    **dict.fromkeys(("relative_rank", "offset_basis"), NOT_COUNTS),
    "max_relative_distance": [value for value in NOT_COUNTS if value != 0],
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), (None, *NOT_COUNTS)),
    **dict.fromkeys(("head_dim", "intermediate_size", "num_channels", "vocab_size"), (None, *NOT_COUNTS)),
    "max_position_embeddings": (None, *NOT_COUNTS),
    "kernel_size": (None, *NOT_COUNTS, 2, 10**30 + 1),
    "rope_theta": (*NOT_NUMBERS, 0),
    "layer_norm_eps": (*NOT_NUMBERS, 0.0),
    "initializer_range": NOT_NUMBERS[1:],
    **dict.fromkeys(("hidden_dropout_prob", "attention_dropout"), (*NOT_NUMBERS, 1, 10**30)),
    "hidden_act": NOT_NAMES,
    **dict.fromkeys(
        ("use_absolute_position_embeddings", "tie_word_embeddings", "use_cache"), (None, 1, "yes", [True])
    ),
    **dict.fromkeys(("image_size", "patch_size"), NOT_SIZES),
    "pooling": NOT_NAMES,
}


def check_invalid(case: Case, rng: random.Random):
    """A wrong value of a field is refused, when it is given or when a model is made, with a message that names the field."""
    for _ in range(5):
        field_name = rng.choice(
            [name for name in INVALID if case.config.modality == "image" or name not in IMAGE_SIZES]
        )
        value = rng.choice(INVALID[field_name])
        assigned = rng.random() < 0.5
        try:
            if assigned:
                config = copy.deepcopy(case.config)
                setattr(config, field_name, value)
            else:
                config = TranslutionConfig(**{**case.fields, field_name: value})
            type(case.model)(config)
        except (ValueError, TypeError, StrictDataclassError) as refusal:
            if f"`{field_name}`" not in str(refusal) and f"'{field_name}'" not in str(refusal):
                wrong = f"{field_name}={value!r} ({assigned=}) is not named by {first_line(refusal)}"
                raise AssertionError(wrong) from refusal
        except Exception as other:
            raise AssertionError(f"{field_name}={value!r} ({assigned=}): {first_line(other)}") from other
        else:
            raise AssertionError(f"{field_name}={value!r} ({assigned=}) was accepted")


IMAGE_SIZES = ("image_size", "patch_size")
# Each check, and how often it is made.
CHECKS: dict[str, tuple[Callable[[Case, random.Random], None], float]] = {
    "reference": (check_reference, 1),
    "precision": (check_precision, 0.3),
    "causality": (check_causality, 1),
    "hidden": (check_hidden, 1),
    "rows": (check_rows, 1),
    "cache": (check_cache, 1),
    "packed": (check_packed, 1),
    "resizing": (check_resizing, 0.5),
    "saving": (check_saving, 0.03),
    "export": (check_export, 0.05),
    "invalid": (check_invalid, 0.2),
}


# What is run


@dataclass
class Failure:
    seed: int
    number: int
    check: str
    message: str
    description: str = ""

    def __str__(self) -> str:
        again = f"python tests/fuzz.py --seed {self.seed} --case {self.number} --checks {self.check}"
        return f"FAILED {self.check}: {self.message}\n{self.description}\nagain: {again}"


@dataclass
class Summary:
    cases: int = 0
    checks: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what hangs, where the system can."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(seed: int, number: int, checks: list[str], always: bool = False) -> tuple[list[str], list[Failure]]:
    """Draws a case and makes the checks, those that are rare too if `always`; returns which were made, and what failed."""
    made, failures = [], []
    try:
        case = draw_case(seed, number)
    except Exception as problem:
        return [], [Failure(seed, number, "drawing", describe(problem))]
    for name in checks:
        check, share = CHECKS[name]
        rng = random.Random(f"{seed} {number} {name}")
        if rng.random() >= share and not always:
            continue
        made.append(name)
        try:
            with ExitStack() as switched, time_limit(SECONDS_PER_CHECK):
                for (place, attribute), value in case.chosen_switches().items():
                    switched.enter_context(patch.object(place, attribute, value))
                check(case, rng)
        except Exception as problem:
            case.model.set_attn_implementation("grouped")
            failures.append(Failure(seed, number, name, describe(problem), case.describe()))
    return made, failures


def describe(problem: Exception) -> str:
    if isinstance(problem, AssertionError):
        return str(problem)
    return "".join([*traceback.format_tb(problem.__traceback__)[-3:], first_line(problem)])


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def run(seed: int, cases: range, checks: list[str], minutes: float = math.inf, always: bool = False) -> Summary:
    """Runs cases until they, or the minutes, are used up; failures are printed as they come."""
    summary, begin = Summary(), time.monotonic()
    told = begin
    for number in cases:
        if time.monotonic() - begin > 60 * minutes:
            break
        made, failures = run_case(seed, number, checks, always)
        summary.cases += 1
        summary.checks.update(made)
        summary.failures += failures
        for failure in failures:
            print(failure, end="\n\n", flush=True)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            print(f"{told - begin:.0f} s: {summary.cases} cases, {len(summary.failures)} failures", flush=True)
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--case", type=int, help="run this one alone, with every check that is named")
    parser.add_argument("--checks", default="all", help=f"all, or some of {','.join(CHECKS)}; -name leaves one out")
    options = parser.parse_args(arguments)
    names = options.checks.split(",")
    unknown = [name for name in names if name.removeprefix("-") not in ("all", *CHECKS)]
    if unknown:
        parser.error(f"--checks must be all, or some of {', '.join(CHECKS)}, got {', '.join(unknown)}")
    every = all(name == "all" or name.startswith("-") for name in names)
    checks = [name for name in CHECKS if (every or name in names) and f"-{name}" not in names]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    alone = options.case is not None
    cases = range(options.case, options.case + 1) if alone else range(sys.maxsize)
    summary = run(options.seed, cases, checks, options.minutes, always=alone)
    made = ", ".join(f"{count} {name}" for name, count in summary.checks.items())
    print(f"seed {options.seed}: {summary.cases} cases, {len(summary.failures)} failures; checks made: {made}")
    for name, count in Counter(failure.check for failure in summary.failures).items():
        numbers = sorted({failure.number for failure in summary.failures if failure.check == name})
        print(f"  {name}: {count} failures, cases {numbers[:20]}")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())

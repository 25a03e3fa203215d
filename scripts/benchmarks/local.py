"""Whole models of local Translution against rotary attention widened to as many parameters: training steps, memory, generation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from studies.variants import build, count_parameters, widen
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.generation import generate, verify_generation
from benchmarks.measuring import BOTH, measure, stop_if_wrong, train_step, worst_error
from benchmarks.operator import weighted_sum
from translution import TranslutionConfig


SIZE = "tiny"
VOCABULARY = 1000
RIVAL = "rotary attention"
# Batch and length of texts; the last is for memory alone.
TEXTS = ((8, 256), (2, 1024), (1, 4096))
LONGEST = 8192
# Batch and patches a side of images.
IMAGES = ((8, 14), (4, 28))
NEW_TOKENS, PROMPT = 128, 64


def text_fields(length: int) -> dict[str, Any]:
    return {"modality": "text", "vocab_size": VOCABULARY, "max_position_embeddings": length, "pad_token_id": 0}


def image_fields(side: int, far_offsets: str) -> dict[str, Any]:
    return {"modality": "image", "image_size": 4 * side, "patch_size": 4, "num_labels": 10, "far_offsets": far_offsets}


def with_rival(fields: dict[str, Any], first_layer_only: bool = False) -> dict[str, dict[str, Any]]:
    """Fields of a local model, and of rotary attention with as many parameters and as many heads.

    Args:
        fields: those of the task.
        first_layer_only: all other layers are rotary attention.
    """
    config = TranslutionConfig.from_size(SIZE, "local", **fields)
    local = {name: getattr(config, name) for name in (*fields, *SIZE_FIELDS, *LOCAL_FIELDS)}
    if first_layer_only:
        local["mixer_types"] = local["mixer_types"][:1] + ["rope_attention"] * (config.num_hidden_layers - 1)
    plain = {name: value for name, value in local.items() if name not in LOCAL_FIELDS}
    rival = widen({**plain, "mixer_types": "rope_attention", "far_offsets": "clamped"}, count_parameters(local))
    return {"local": local, RIVAL: rival}


SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size")
LOCAL_FIELDS = ("mixer_types", "relative_projections", "max_relative_distance")


def make_inputs(fields: dict[str, Any], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if fields["modality"] == "text":
        shape = (batch, fields["max_position_embeddings"])
        tokens = torch.randint(1, fields["vocab_size"], shape, generator=generator)
        return {"input_ids": tokens, "labels": tokens}
    pixels = torch.randn(batch, 3, fields["image_size"], fields["image_size"], generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(10, (batch,), generator=generator)}


def verify(fields: dict[str, Any]) -> float:
    """Error of a small model's logits and gradients against its readable path, both in float64."""
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 8}
    sizes = {"max_position_embeddings": 13} if fields["modality"] == "text" else {"image_size": [20, 24]}
    fields = {**fields, **small, **sizes, "intermediate_size": 32, "mixer_types": fields["mixer_types"][0]}
    torch.manual_seed(0)
    model = build(fields).double()
    if fields["modality"] == "text":
        inputs = make_inputs(fields, 2)
    else:
        inputs = {"pixel_values": torch.randn(2, 3, *fields["image_size"], dtype=torch.float64)}
    inputs.pop("labels", None)

    def results(implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        logits = model(**inputs).logits
        return [logits, *torch.autograd.grad(weighted_sum(logits), list(model.parameters()))]

    return worst_error(results("auto"), results("eager"))


def make_model(name: str, fields: dict[str, Any]) -> tuple[PreTrainedModel, float | None]:
    error = None
    if name != RIVAL:
        error = verify(fields)
        stop_if_wrong(name, error, 1e-9)
    torch.manual_seed(0)
    return build(fields), error


def compare(case: str, variants: dict[str, dict[str, Any]], batch: int, repeats: int) -> Iterator[dict]:
    """Training steps of models in turn."""
    made = {name: make_model(name, fields) for name, fields in variants.items()}
    steps = {
        name: partial(train_step, model.train(), make_inputs(variants[name], batch))
        for name, (model, _) in made.items()
    }
    yield from rows(case, BOTH, steps, made, repeats)


def rows(
    case: str,
    passes: str,
    runs: dict[str, Callable[[], object]],
    made: dict[str, tuple[PreTrainedModel, float | None]],
    repeats: int,
    tokens: int | None = None,
) -> Iterator[dict]:
    measured, medians = measure(case, passes, runs, dict.fromkeys(runs, repeats))
    for name, (model, error) in made.items():
        # Generation takes too little memory for a quotient to say something.
        memory = measured[name]["peak_mib"] if tokens is None else None
        yield {
            **measured[name],
            "parameters": model.num_parameters(),
            "peak_mib": memory,
            "times_rotary": medians[name] / medians[RIVAL],
            "times_rotary_memory": None if memory is None else memory / measured[RIVAL]["peak_mib"],
            "tokens_per_second": None if tokens is None else tokens / medians[name] * 1e3,
            "error": error,
        }


def local_suite(options: argparse.Namespace) -> Iterator[dict]:
    """Each comparison in turn, its rival in the same run."""
    for batch, length in (*TEXTS, (1, LONGEST)):
        repeats = max(1, options.repeats if length < LONGEST else options.repeats // 4)
        yield from compare(f"{SIZE} text {length}, B {batch}", with_rival(text_fields(length)), batch, repeats)
    for batch, side in IMAGES:
        for far_offsets in ("shared", "clamped"):
            case = f"{SIZE} image {side}x{side} {far_offsets}, B {batch}"
            yield from compare(case, with_rival(image_fields(side, far_offsets)), batch, options.repeats)
    for batch, length in TEXTS[:2]:
        variants = with_rival(text_fields(length), first_layer_only=True)
        yield from compare(f"{SIZE} text {length}, first layer, B {batch}", variants, batch, options.repeats)
    for batch, side in IMAGES:
        variants = with_rival(image_fields(side, "shared"), first_layer_only=True)
        yield from compare(
            f"{SIZE} image {side}x{side} shared, first layer, B {batch}", variants, batch, options.repeats
        )
    variants = with_rival(text_fields(PROMPT + NEW_TOKENS))
    models = {name: make_model(name, fields)[0].eval() for name, fields in variants.items()}
    made = {name: (model, verify_generation(name, model, VOCABULARY)) for name, model in models.items()}
    for cache in ("dynamic", "static"):
        for batch in (1, 8):
            prompt = torch.randint(1, VOCABULARY, (batch, PROMPT))
            wanted = {} if cache == "dynamic" else {"cache_implementation": "static"}
            runs = {
                name: partial(generate, model, prompt, NEW_TOKENS, True, **wanted) for name, model in models.items()
            }
            case = f"{SIZE} {cache} cache, prompt {PROMPT}, new {NEW_TOKENS}, B {batch}"
            yield from rows(case, "generate", runs, made, options.repeats, batch * NEW_TOKENS)

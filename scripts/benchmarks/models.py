"""Layers and training steps of every mixer, against PyTorch's attention of the same width.

A layer with banks is also compared with its bound: twice the time of attention and of the bare products of its banks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from benchmarks.measuring import (
    BOTH,
    FORWARD,
    measure,
    peak_memory,
    spread,
    step,
    stop_if_wrong,
    time_in_turn,
    train_step,
    worst_error,
)
from benchmarks.operator import bare_products, weighted_sum
from translution import TranslutionConfig, TranslutionForImageClassification
from translution.modeling.models.modeling_translution import build_mixer
from translution.modeling.operators.pair_layout import PairLayout
from translution.modeling.operators.rotary import image_rotation


VARIANTS = {
    "attention": {"mixer_types": "attention"},
    "rotary attention": {"mixer_types": "rope_attention"},
    "relative bias": {"mixer_types": "relative_bias_attention"},
    "relative vectors": {"mixer_types": "relative_vector_attention"},
    "ACmix": {"mixer_types": "acmix"},
    "convolution": {"mixer_types": "convolution"},
    "LoR 8, kv": {"relative_projections": "kv", "relative_rank": 8},
    "basis 8, v": {"relative_projections": "v", "offset_basis": 8},
    "basis 8, kv": {"relative_projections": "kv", "offset_basis": 8},
    "rotary LoR 8, kv": {"mixer_types": "rope_translution", "relative_projections": "kv", "relative_rank": 8},
    "full, kv": {"relative_projections": "kv"},
}
# Hidden size, heads, grid, batch: the demo's, and the paper's sizes at 224 × 224 with patches of 16.
LAYERS = {"demo": (48, 3, 7, 50), "tiny": (192, 3, 14, 8), "small": (384, 6, 14, 4), "base": (768, 12, 14, 1)}


def make_config(size: str, **fields) -> TranslutionConfig:
    hidden, heads, grid, _ = LAYERS[size]
    widths = {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": hidden // heads}
    return TranslutionConfig(**widths, num_hidden_layers=1, image_size=grid, patch_size=1, **fields)


def make_mixer(config: TranslutionConfig) -> nn.Module:
    mixer = build_mixer(config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return mixer


def mix(mixer: nn.Module, tokens: Tensor, layout: PairLayout) -> Tensor:
    config = mixer.config
    return mixer(tokens, layout, rotation=rotation_of(layout, config.head_dim, config.rope_theta, tokens.dtype))[0]


@lru_cache
def rotation_of(layout: PairLayout, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """What a model hands to all its layers, and only rotary ones read."""
    if layout.causal:
        return None
    return image_rotation(layout.height, layout.width, head_dim, theta, dtype, torch.device("cpu"))


def verify_mixer(fields: dict) -> float:
    """Error of a small mixer's output and gradients against its readable path, both in float64.

    In two widths: images with narrow matrices take a way of their own.
    """
    layout, errors = PairLayout.for_image(5, 4, 5, 4), []
    for head_dim in (8, 16):
        sizes = {"hidden_size": 3 * head_dim, "num_attention_heads": 3, "head_dim": head_dim}
        config = TranslutionConfig(**sizes, num_hidden_layers=1, image_size=[5, 4], patch_size=1, **fields)
        errors.append(path_error(make_mixer(config), 3, layout))
    return torch.tensor(errors).max().item()  # NaN where one is


def path_error(mixer: nn.Module, batch: int, layout: PairLayout) -> float:
    """Error of a mixer's output and gradients against its readable path, both in float64."""
    mixer.double()
    tokens = torch.randn(batch, layout.num_tokens, mixer.config.hidden_size, dtype=torch.float64, requires_grad=True)

    def results(implementation: str) -> list[Tensor]:
        mixer.config._attn_implementation = implementation
        output = mix(mixer, tokens, layout)
        return [output, *torch.autograd.grad(weighted_sum(output), [tokens, *mixer.parameters()])]

    return worst_error(results("auto"), results("eager"))


def layer_suite(options: argparse.Namespace) -> Iterator[dict]:
    errors = {}
    for name, fields in VARIANTS.items():
        errors[name] = verify_mixer(fields)
        stop_if_wrong(name, errors[name], 1e-9)
    for size, (hidden, _, grid, batch) in LAYERS.items():
        layout = PairLayout.for_image(grid, grid, grid, grid)
        tokens = torch.randn(batch, layout.num_tokens, hidden, requires_grad=True)
        mixers = {name: make_mixer(make_config(size, **fields)) for name, fields in VARIANTS.items()}
        floors = {}
        for name, mixer in mixers.items():
            banks = [parameter for key, parameter in mixer.named_parameters() if key.endswith("_bank")]
            if banks:
                floors[name] = bare_products(batch, banks, layout)
        for backward in (False, True):
            runs = {
                name: step(partial(mix, mixer, tokens, layout), [tokens, *mixer.parameters()], backward)
                for name, mixer in mixers.items()
            }
            runs |= {f"{name}, floor": partial(floor, backward) for name, floor in floors.items()}
            repeats = min(options.repeats, 5) if size == "base" else options.repeats
            case = f"{size}, {grid}x{grid}, C {hidden}, B {batch}"
            rows, medians = measure(case, BOTH if backward else FORWARD, runs, dict.fromkeys(runs, repeats))
            for name, row in rows.items():
                bound = None if name not in floors else 2 * (medians["attention"] + medians[f"{name}, floor"])
                yield {
                    **row,
                    "times_attention": medians[name] / medians["attention"],
                    "times_bound": None if bound is None else medians[name] / bound,
                    "times_floor": None if name not in floors else medians[name] / medians[f"{name}, floor"],
                    "error": errors.get(name),
                }
        del mixers, runs, floors


def training_suite(options: argparse.Namespace) -> Iterator[dict]:
    """Forward and backward of whole models of the size "tiny", 224 × 224 in patches of 16; memory beside weights and gradients."""
    batch = 8
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(0, 1000, (batch,))}
    chosen = {
        name: VARIANTS[name] for name in ("attention", "ACmix", "LoR 8, kv", "basis 8, v", "basis 8, kv", "full, kv")
    }
    models, steps, memory, errors = {}, {}, {}, {}

    for name, fields in chosen.items():
        errors[name] = verify_mixer(fields)
        stop_if_wrong(name, errors[name], 1e-9)
        torch.manual_seed(0)
        model = TranslutionForImageClassification(TranslutionConfig.from_size("tiny", num_labels=1000, **fields))
        models[name], steps[name] = model, partial(train_step, model, inputs)
        train_step(model, inputs)
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters()) / 2**20
        model.zero_grad(set_to_none=True)
        peak = peak_memory(steps[name])
        memory[name] = None if peak is None else peak - gradients
    counts = {name: min(options.repeats, 3) if name == "full, kv" else options.repeats for name in models}
    times = time_in_turn(steps, counts, warm_up=())
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, model in models.items():
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        yield {
            "case": f"tiny, {len(model.model.layers)} layers, 224x224, patch 16, B {batch}, {size}",
            "implementation": name,
            "passes": BOTH,
            **spread(times[name]),
            "peak_mib": memory[name],
            "times_attention": medians[name] / medians["attention"],
            "error": errors[name],
        }

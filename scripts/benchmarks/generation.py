"""Tokens a second with and without a cache, and bytes of cache a token, against a GPT-2 of Transformers of the same size."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.measuring import peak_memory, spread, stop_if_wrong, time_in_turn, worst_error
from translution import TranslutionConfig, TranslutionForCausalLM


GENERATION_MODELS = {
    "full": {"relative_projections": "kv"},
    "lor": {"relative_projections": "kv", "relative_rank": 8},
    "basis": {"relative_projections": "kv", "offset_basis": 8},
    "full-D32": {"relative_projections": "kv", "max_relative_distance": 32},
    "attention": {"mixer_types": "rope_attention"},
}


def generation_suite(options: argparse.Namespace) -> Iterator[dict]:
    """Greedy generation of models of the size "tiny" and of a GPT-2 of the same width, depth and heads."""
    new, vocabulary, hidden, layers, heads = 128, 1000, 192, 6, 3
    torch.manual_seed(0)
    models = {
        name: TranslutionForCausalLM(
            TranslutionConfig.from_size("tiny", modality="text", vocab_size=vocabulary, pad_token_id=0, **fields)
        ).eval()
        for name, fields in GENERATION_MODELS.items()
    }
    gpt2 = GPT2Config(
        vocab_size=vocabulary,
        n_positions=256,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    models["gpt2"] = GPT2LMHeadModel(gpt2).eval()
    errors = {name: verify_generation(name, model, vocabulary) for name, model in models.items()}
    for prompt_length in (32, 128):
        for batch in (1, 8):
            prompt = torch.randint(1, vocabulary, (batch, prompt_length))
            runs = {name: partial(generate, model, prompt, new, True) for name, model in models.items()}
            runs |= {
                f"{name}, no cache": partial(generate, model, prompt, new, False) for name, model in models.items()
            }
            # Without a cache a run takes long, and varies little for that.
            counts = {name: 1 if name.endswith("no cache") else max(min(options.repeats, 5), 2) for name in runs}
            # What measures memory warms up.
            memory = {name: peak_memory(run) for name, run in runs.items() if not name.endswith("no cache")}
            times = time_in_turn(runs, counts, warm_up=())
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                model = models[name.removesuffix(", no cache")]
                cached = not name.endswith("no cache")
                yield {
                    "case": f"tiny-prompt{prompt_length}-new{new}-B{batch}",
                    "implementation": name,
                    "passes": "generate",
                    **spread(values),
                    "peak_mib": memory.get(name),
                    "error": errors[name] if cached else None,
                    "tokens_per_second": batch * new / medians[name] * 1e3,
                    "cache_bytes_per_token": cache_bytes(model, prompt) if cached else None,
                    "times_no_cache": medians[f"{name}, no cache"] / medians[name] if cached else None,
                    "times_gpt2": medians["gpt2"] / medians[name] if cached else None,
                }


def generate(model: PreTrainedModel, prompt: Tensor, new: int, use_cache: bool, **options) -> Any:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=use_cache,
        **options,
    )


def verify_generation(name: str, model: PreTrainedModel, vocabulary: int) -> float:
    """Error, in float64, of each generated token's logits against the readable path over the whole text without a cache."""
    model.double()
    prompt = torch.randint(1, vocabulary, (2, 9))
    found = generate(model, prompt, 12, True, return_dict_in_generate=True, output_logits=True)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(found.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    model.set_attn_implementation(implementation)
    model.float()
    error = worst_error([torch.stack(found.logits, 1)], [logits])
    stop_if_wrong(name, error, 1e-6)  # generate() returns logits in float32
    return error


def cache_bytes(model: PreTrainedModel, prompt: Tensor) -> float:
    """Bytes of a cache per token of one sequence, all layers together, after the prompt."""
    with torch.no_grad():
        cache = model(prompt[:1], use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        for state in (layer.keys, layer.values, getattr(layer, "recent", None)):
            total += 0 if state is None else state.numel() * state.element_size()
    return total / prompt.shape[1]

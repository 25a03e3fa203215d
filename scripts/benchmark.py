"""Benchmarks that verify before they time, and time baselines in the same run.

    python scripts/benchmark.py                 # every suite
    python scripts/benchmark.py --suite operator --sizes 7 --repeats 9

Suites:
    operator    full Translution on a grid of patches, forward and with backward, against gathering a matrix per pair
    memory      what one training step of a whole model needs beside weights and gradients (Linux)
    generation  tokens a second with and without a cache, and bytes of cache a token, against a GPT-2 of Transformers

Implementations of the operator suite:
    floor           the bare matrix products of the operator, nothing else: one per offset and projection, four times as many
                    with backward (recomputation counted)
    grouped         this package's default path
    reference       this package's readable path
    gather          a matrix gathered per pair, `[L, L, C, C']`, then one contraction (`einsum`)
    gather-matmul   the same with a broadcast `matmul`, which copies the matrices once per image: the published code's way

Every row of the CSV carries the median and quartiles in milliseconds, the peak memory above the start in MiB, and hardware,
threads, versions and commit. Times of different rows are comparable within one run alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling import translution_grouped, translution_reference
from translution.modeling.pair_layout import PairLayout


FIELDS = [
    "suite", "case", "implementation", "passes", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "repeats",
    "peak_mib", "times_floor", "times_gather", "times_published", "tokens_per_second", "cache_bytes_per_token", "times_no_cache",
    "times_gpt2", "error", "dtype", "threads", "device", "torch", "transformers", "python", "commit",
]  # fmt: skip
HEADS = 3


def hardware() -> dict[str, str | int]:
    """What a figure depends on beside the code."""
    device = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        device = names[0] if names else device
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def peak_memory(run: Callable[[], object]) -> float | None:
    """Peak of the process above where it stood before `run`, in MiB; `None` where the system does not tell."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        return None

    def field(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier runs freed must not hide what this one takes
    clear.write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    run()
    return field("VmHWM") - before


def time_in_turn(
    runs: dict[str, Callable[[], object]], repeats: dict[str, int], warm_up: Iterable[str] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turn, so that a drift of the machine meets all of them.

    Before, each of `warm_up`, by default all of them, runs once.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs if warm_up is None else warm_up:
        runs[name]()
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn < repeats[name]:
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def attend(scores: Tensor, head_dim: int) -> Tensor:
    return (scores * head_dim**-0.5).softmax(-1)


def with_operators(operators) -> Callable[..., Tensor]:
    def run(tokens: Tensor, banks: list[Tensor], layout: PairLayout) -> Tensor:
        query_bank, key_bank, value_bank = banks
        scores = operators.pair_scores(tokens, tokens, query_bank, key_bank, HEADS, layout)
        return operators.pair_values(attend(scores, query_bank.shape[-1] // HEADS), tokens, value_bank, layout)

    return run


def with_gather(broadcast: bool) -> Callable[..., Tensor]:
    def project(tokens: Tensor, matrices: Tensor) -> Tensor:
        """`tokens` `[B, L or 1, L or 1, C]`, `matrices` `[L, L, C, C']`: the projection of each pair, `[B, L, L, A, d]`."""
        if broadcast:
            projected = (tokens.unsqueeze(3) @ matrices).squeeze(3)
        else:
            length = matrices.shape[0]
            projected = torch.einsum("bijc,ijcd->bijd", tokens.expand(-1, length, length, -1), matrices)
        return projected.unflatten(-1, (HEADS, -1))

    def run(tokens: Tensor, banks: list[Tensor], layout: PairLayout) -> Tensor:
        rows, reverse = layout.offsets()
        query = project(tokens.unsqueeze(2), banks[0][reverse])
        key = project(tokens.unsqueeze(1), banks[1][rows])
        weights = attend(torch.einsum("bijad,bijad->baij", query, key), query.shape[-1])
        value = project(tokens.unsqueeze(1), banks[2][rows])
        return torch.einsum("baij,bijad->biad", weights, value).flatten(2)

    return run


def bare_products(tokens: Tensor, banks: list[Tensor], layout: PairLayout) -> Callable[[bool], None]:
    """The matrix products of the operator alone: as many rows as each offset has pairs, on that offset's own matrix."""
    batch, hidden = tokens.shape[0], tokens.shape[-1]
    rows, _ = layout.offsets()
    counts = torch.bincount(rows[rows >= 0], minlength=layout.num_offsets).tolist()
    source = torch.randn(max(counts) * batch, hidden)
    source_gradient = torch.empty_like(source)
    target = torch.empty(max(counts) * batch, banks[0].shape[-1])
    gradients = [torch.empty_like(bank) for bank in banks]

    def run(backward: bool) -> None:
        for bank, gradient in zip(banks, gradients, strict=True):
            for matrix, matrix_gradient, count in zip(bank.unbind(), gradient.unbind(), counts, strict=True):
                left, out = source[: count * batch], target[: count * batch]
                torch.mm(left, matrix, out=out)
                if backward:
                    torch.mm(left, matrix, out=out)
                    torch.mm(left.t(), out, out=matrix_gradient)
                    torch.mm(out, matrix.t(), out=source_gradient[: count * batch])

    return lambda backward: torch.no_grad()(run)(backward)


IMPLEMENTATIONS = {
    "grouped": with_operators(translution_grouped),
    "reference": with_operators(translution_reference),
    "gather": with_gather(broadcast=False),
    "gather-matmul": with_gather(broadcast=True),
}


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def outputs(implementation: Callable[..., Tensor], tokens: Tensor, banks: list[Tensor], layout: PairLayout):
    """The output, and the gradients of its weighted sum by the tokens and each bank."""
    output = implementation(tokens, banks, layout)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), [tokens, *banks])]


def operator_suite(options: argparse.Namespace) -> Iterator[dict]:
    hidden, batch = 192, 8
    for size in options.sizes:
        torch.manual_seed(0)
        layout = PairLayout.for_image(size, size, size, size)
        tokens = torch.randn(batch, layout.num_tokens, hidden, requires_grad=True)
        banks = [torch.randn(layout.num_offsets, hidden, hidden).div(hidden**0.5).requires_grad_() for _ in range(3)]
        # Gathering writes one matrix per pair: past a grid of 7 × 7 no laptop has the memory.
        # The reference keeps all it gathers for its backward pass.
        names = [name for name in IMPLEMENTATIONS if name == "grouped" or size <= 7]
        errors = verify(names, tokens, banks, layout)
        for backward in (False, True):
            for row in operator_rows(names, tokens, banks, layout, backward, options.repeats):
                yield {**row, "error": errors.get(row["implementation"])}


def operator_rows(
    names: list[str], tokens: Tensor, banks: list[Tensor], layout: PairLayout, backward: bool, repeats: int
) -> Iterator[dict]:
    """One row per implementation, and the floor's, of one size and direction."""
    floor = bare_products(tokens, banks, layout)

    def run(name: str) -> None:
        if name == "floor":
            floor(backward)
        elif backward:
            output = IMPLEMENTATIONS[name](tokens, banks, layout)
            torch.autograd.grad(output, [tokens, *banks], torch.ones_like(output))
        else:
            with torch.no_grad():
                IMPLEMENTATIONS[name](tokens, banks, layout)

    runs = {name: partial(run, name) for name in ["floor", *names]}
    memory = {name: peak_memory(one) for name, one in runs.items()}
    counts = {name: repeats if name in ("floor", "grouped") else min(repeats, 3) for name in runs}
    times = time_in_turn(runs, counts)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        yield {
            "suite": "operator",
            "case": f"{layout.height}x{layout.width}-C{tokens.shape[-1]}-B{tokens.shape[0]}-qkv",
            "implementation": name,
            "passes": "forward+backward" if backward else "forward",
            "median_ms": medians[name],
            "lower_quartile_ms": lower,
            "upper_quartile_ms": upper,
            "repeats": len(values),
            "peak_mib": memory[name],
            "times_floor": medians[name] / medians["floor"],
            "times_gather": medians["gather"] / medians[name] if "gather" in medians else None,
            "times_published": medians["gather-matmul"] / medians[name] if "gather-matmul" in medians else None,
            "dtype": "float32",
        }


def verify(names: list[str], tokens: Tensor, banks: list[Tensor], layout: PairLayout) -> dict[str, float]:
    """Largest relative error of outputs and gradients against the float64 reference, on one image; stops if one is wrong."""
    one, threshold = tokens[:1].detach().requires_grad_(), 1e-4
    wide = one.detach().double().requires_grad_(), [bank.detach().double().requires_grad_() for bank in banks]
    if layout.height <= 7:
        truth = outputs(IMPLEMENTATIONS["reference"], *wide, layout)
    else:  # the output alone is what the reference has the memory for
        with torch.no_grad():
            truth = [IMPLEMENTATIONS["reference"](*wide, layout)]
    errors = {}
    for name in names:
        values = outputs(IMPLEMENTATIONS[name], one, banks, layout)
        errors[name] = max(relative_error(value, expected) for value, expected in zip(values, truth, strict=False))
        if not errors[name] < threshold:
            raise SystemExit(
                f"{name} is wrong: relative error {errors[name]:.2e}, allowed {threshold:.0e}. Nothing timed."
            )
    return errors


def memory_suite(options: argparse.Namespace) -> Iterator[dict]:
    torch.manual_seed(0)
    batch = 8
    config = TranslutionConfig.from_size("tiny", relative_projections="qkv", num_labels=1000)
    model = TranslutionForImageClassification(config)
    pixel_values, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    times = []

    def step() -> None:
        start = time.perf_counter()
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        times.append((time.perf_counter() - start) * 1e3)

    peak = peak_memory(step)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters()) / 2**20
    yield {
        "suite": "memory",
        "case": f"tiny-224-patch16-B{batch}-qkv, {model.num_parameters() / 1e6:.0f} M parameters; peak beside weights and gradients",
        "implementation": "grouped",
        "passes": "forward+backward",
        "median_ms": statistics.median(times),
        "repeats": len(times),
        "peak_mib": None if peak is None else peak - gradients,
        "dtype": "float32",
    }


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
    for name, model in models.items():
        verify_generation(name, model, vocabulary)
    for prompt_length in (32, 128):
        for batch in (1, 8):
            prompt = torch.randint(1, vocabulary, (batch, prompt_length))
            runs = {name: partial(generate, model, prompt, new, True) for name, model in models.items()}
            runs |= {
                f"{name}, no cache": partial(generate, model, prompt, new, False) for name, model in models.items()
            }
            # Without a cache a run takes long, and varies little for that.
            counts = {name: 1 if name.endswith("no cache") else max(min(options.repeats, 5), 2) for name in runs}
            times = time_in_turn(runs, counts, warm_up=[name for name in runs if not name.endswith("no cache")])
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                model = models[name.removesuffix(", no cache")]
                lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                cached = not name.endswith("no cache")
                yield {
                    "suite": "generation",
                    "case": f"tiny-prompt{prompt_length}-new{new}-B{batch}",
                    "implementation": name,
                    "passes": "generate",
                    "median_ms": medians[name],
                    "lower_quartile_ms": lower,
                    "upper_quartile_ms": upper,
                    "repeats": len(values),
                    "tokens_per_second": batch * new / medians[name] * 1e3,
                    "cache_bytes_per_token": cache_bytes(model, prompt) if cached else None,
                    "times_no_cache": medians[f"{name}, no cache"] / medians[name] if cached else None,
                    "times_gpt2": medians["gpt2"] / medians[name] if cached else None,
                    "dtype": "float32",
                }


def generate(model: PreTrainedModel, prompt: Tensor, new: int, use_cache: bool) -> Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=use_cache,
    )


def verify_generation(name: str, model: PreTrainedModel, vocabulary: int) -> None:
    """In float64 the cache must not change a token."""
    model.double()
    prompt = torch.randint(1, vocabulary, (2, 9))
    if not torch.equal(generate(model, prompt, 12, True), generate(model, prompt, 12, False)):
        raise SystemExit(f"{name} generates other tokens with a cache. Nothing timed.")
    model.float()


def cache_bytes(model: PreTrainedModel, prompt: Tensor) -> float:
    """Bytes of a cache per token of one sequence, all layers together, after the prompt."""
    with torch.no_grad():
        cache = model(prompt[:1], use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        for state in (layer.keys, layer.values, getattr(layer, "recent", None)):
            total += 0 if state is None else state.numel() * state.element_size()
    return total / prompt.shape[1]


SUITES = {"operator": operator_suite, "memory": memory_suite, "generation": generation_suite}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[7, 14], help="grids of the operator suite")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=None, help="CSV to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = hardware()
    rows = []
    for suite in options.suite:
        for row in SUITES[suite](options):
            rows.append({**row, **facts})
            print_row(rows[-1])
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        print(f"wrote {options.output}", file=sys.stderr)


def print_row(row: dict) -> None:
    parts = [f"{row['case']:24} {row['passes']:17} {row['implementation']:20} {row['median_ms']:10.1f} ms"]
    if row.get("times_floor"):
        parts.append(f"{row['times_floor']:7.2f} × floor")
    if row.get("times_gather"):
        parts.append(f"{row['times_gather']:6.1f} × gather's speed, {row['times_published']:6.1f} × gather-matmul's")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:8.1f} tokens/s")
    if row.get("times_no_cache"):
        parts.append(f"{row['times_no_cache']:6.1f} × without, {row['times_gpt2']:5.2f} × GPT-2's speed")
        parts.append(f"{row['cache_bytes_per_token']:6.0f} B/token")
    if row.get("peak_mib") is not None:
        parts.append(f"{row['peak_mib']:8.0f} MiB")
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()

"""Checks the CUDA kernels on the GPU that is there, then times them, then trains on digits: one table, one CSV, within 8 minutes.

    python scripts/gpu_check.py                   # writes scripts/results/gpu.csv
    TRITON_INTERPRET=1 python scripts/gpu_check.py --dry_run --output dry.csv   # tiny, on a CPU: does the script run?

Nothing is timed before it is right: errors are those of outputs and of all gradients against float64, on fresh random inputs, with
uninitialised memory holding NaN, and at most twice those of plain PyTorch in the same type.

Rates count the relative projections alone: `2·B·pairs·C·C'` operations each, three times that with backward (recomputation is not
counted). `share` is of the rate that an 8192³ product of the same device reaches in bfloat16, measured in the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.local import RIVAL, make_inputs, text_fields, with_rival
from benchmarks.measuring import BOTH, FORWARD, relative_error, spread, step, time_in_turn
from benchmarks.operator import HEADS, with_gather
from common.command import ArgumentParser, run_command
from common.hardware import hardware
from common.tables import write_csv
from torch import Tensor, nn

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.mixers.masks import ALL_VISIBLE, AttentionMask, causal_mask
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators.dispatch import TRITON
from translution.modeling.operators.pair_layout import PairLayout


try:
    import triton
except ImportError:
    triton = None


FIELDS = [
    "part", "case", "passes", "dtype", "error", "error_plain", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "repeats",
    "tflops", "share", "times_baseline", "peak_gib", "images_per_second", "accuracy", "ok", "note", "gpu", "triton", "cuda", "torch", "transformers",
    "python", "commit",
]  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Bench:
    """Where to run, how long, and the rows so far."""

    device: torch.device
    dry: bool
    deadline: float
    rows: list[dict[str, Any]]

    @property
    def half_name(self) -> str:
        """The type to time in. Triton's interpreter cannot multiply bfloat16."""
        return "float16" if self.dry else "bfloat16"

    @property
    def half(self) -> torch.dtype:
        return DTYPES[self.half_name]

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        print(" ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()), flush=True)  # fmt: skip

    def time(self, run: Callable[[], object], repeats: int = 9) -> dict[str, Any]:
        """The type, the columns of times after two runs to warm up, and the peak of memory above the start in GiB."""
        if self.dry:
            return {"dtype": self.half_name, **spread(time_in_turn({"": run}, {"": 1}, warm_up=())[""])}

        def complete() -> None:
            run()
            torch.cuda.synchronize()

        complete()
        complete()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = time_in_turn({"": complete}, {"": repeats}, warm_up=())
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        return {"dtype": self.half_name, **spread(times[""]), "peak_gib": peak}

    def update(
        self, model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> Callable[[], None]:
        """A training step under autocast."""

        def run() -> None:
            with torch.autocast(self.device.type, self.half):
                loss = model(**inputs).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()

        return run


def mixer_of(layout: PairLayout, hidden: int, heads: int, head_dim: int, **fields: Any) -> TranslutionMixer:
    """A mixer of its own for a layout, with random weights."""
    fields |= {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": head_dim, "num_hidden_layers": 1}
    fields |= {"patch_size": 1, "image_size": [layout.height, layout.width]}
    fields |= {"max_position_embeddings": layout.bank_height, "modality": "text" if layout.causal else "image"}
    if layout.clamp:
        fields["max_relative_distance"] = layout.bank_height - 1
    mixer = TranslutionMixer(TranslutionConfig(**fields, far_offsets="shared" if layout.share_far else "clamped"), 0)
    for name, parameter in mixer.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("_coefficients") else parameter.shape[-1] ** -0.5)
    return mixer


def mask_of(layout: PairLayout, like: Tensor) -> AttentionMask:
    """The causal mask of a text."""
    return causal_mask(layout, like) if layout.causal else ALL_VISIBLE


def output_of(mixer: TranslutionMixer, *inputs: Any) -> Tensor:
    """What the kernels put out."""
    mixer.config._attn_implementation = TRITON
    return mixer(*inputs)[0]


def results(
    mixer: TranslutionMixer, name: str, tokens: Tensor, layout: PairLayout, weight: Tensor
) -> dict[str, Tensor]:
    """Output and gradients by name, of one implementation."""
    mixer.config._attn_implementation = name
    mixer.zero_grad()
    tokens = tokens.detach().requires_grad_()
    output, _ = mixer(tokens, layout, mask_of(layout, tokens))
    (output * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in mixer.named_parameters()}
    return {"output": output.detach(), "tokens": tokens.grad, **gradients}


def check(bench: Bench) -> None:
    """Every kernel in every type against float64, at odd sizes."""
    kinds = {"full": {}, "LoR": {"relative_rank": 8}, "basis": {"offset_basis": 3}}
    layouts = {
        "image 5x7": (PairLayout.for_image(5, 7, 5, 7), ["kv", "qkv", "q", "v"]),
        "image 4x9, D 2": (PairLayout.for_image(4, 9, 4, 9, max_relative_distance=2), ["qkv"]),
        "text 67": (PairLayout.for_text(67, 70), ["kv", "qkv"]),
        "local text 67": (PairLayout.for_text(67, 70, 3), ["kv", "qkv"]),
        "local image 5x7, shared": (PairLayout.for_image(5, 7, 5, 7, 1, share_far=True), ["kv"]),
        "local image 5x7, clamped": (PairLayout.for_image(5, 7, 5, 7, 1), ["kv"]),
    }
    if bench.dry:
        layouts = {
            "image 2x2": (PairLayout.for_image(2, 2, 2, 2), ["kv"]),
            "local text 4": (PairLayout.for_text(4, 4, 1), ["kv"]),
        }
    hidden, heads, size = (8, 2, 4) if bench.dry else (72, 3, 24)
    cases = [(name, layout, subset) for name, (layout, subsets) in layouts.items() for subset in subsets]
    for (layout_name, layout, subset), (kind, fields) in product(cases, kinds.items()):
        # Each type compiles its kernels: all three for the subset that the paper advises.
        names = ["float32", "float16" if bench.dry or subset == "kv" else "bfloat16", bench.half_name]
        for dtype_name in dict.fromkeys(names):
            dtype = DTYPES[dtype_name]
            mixer = mixer_of(layout, hidden, heads, size, relative_projections=subset, **fields)
            mixer = mixer.to(bench.device, dtype)
            tokens, weight = torch.randn(2, 3, layout.num_tokens, hidden, device=bench.device, dtype=dtype)
            ours = results(mixer, TRITON, tokens, layout, weight)
            plain = results(mixer, "eager", tokens, layout, weight)
            truth = results(mixer.double(), "eager", tokens.double(), layout, weight.double())
            errors = {name: relative_error(ours[name], truth[name]) for name in truth}
            plain_errors = {name: relative_error(plain[name], truth[name]) for name in truth}
            # Weights of near and far pairs are taken from one log-sum-exp, which costs a few roundings of float32.
            roundings = 4 if layout.clamp and dtype == torch.float32 else 1
            spare = roundings * torch.finfo(dtype).eps
            # Written so that NaN fails as well.
            ok = all(errors[name] <= 2 * plain_errors[name] + spare for name in truth)
            largest = {"error": max(errors.values()), "error_plain": max(plain_errors.values())}
            bench.row(part="check", case=f"{kind} {subset}, {layout_name}", dtype=dtype_name, **largest, ok=ok)


def matrix_rate(bench: Bench) -> float:
    """TFLOP/s of a large bfloat16 product."""
    size = 64 if bench.dry else 8192
    left, right = torch.randn(2, size, size, device=bench.device, dtype=bench.half)
    timing = bench.time(lambda: left @ right, 15)
    rate = 2 * size**3 / timing["median_ms"] / 1e9
    bench.row(part="rate", case=f"{size}³ product", tflops=rate, **timing)
    return rate


def time_mixer(
    bench: Bench, case: str, layout: PairLayout, batch: int, sizes: tuple[int, int, int], peak: float, **fields: Any
) -> None:
    """Forward, and forward with backward, of a mixer in bfloat16."""
    mixer = mixer_of(layout, *sizes, **fields).to(bench.device, bench.half)
    tokens = torch.randn(batch, layout.num_tokens, sizes[0], device=bench.device, dtype=bench.half)
    run = partial(output_of, mixer, tokens, layout, mask_of(layout, tokens))
    pairs = layout.num_tokens**2 / (2 if layout.causal else 1)
    per_pair = 2 * sizes[0] * sizes[1] * sizes[2] * len(fields["relative_projections"])

    for passes, factor in ((FORWARD, 1), (BOTH, 3)):
        timing = bench.time(step(run, mixer.parameters(), backward=passes == BOTH))
        tflops = factor * batch * pairs * per_pair / timing["median_ms"] / 1e9
        bench.row(part="mixer", case=case, passes=passes, tflops=tflops, share=tflops / peak, **timing)


def time_gathering(bench: Bench) -> None:
    """Against a matrix gathered per pair, as the published code does: 7 × 7, all of q, k, v."""
    batch, grid, hidden, size = (2, 2, 12, 4) if bench.dry else (64, 7, 192, 64)
    layout = PairLayout.for_image(grid, grid, grid, grid)
    mixer = mixer_of(layout, hidden, HEADS, size, relative_projections="qkv").to(bench.device, bench.half)
    tokens = torch.randn(batch, layout.num_tokens, hidden, device=bench.device, dtype=bench.half)
    banks = {"q": mixer.q_bank, "k": mixer.k_bank, "v": mixer.v_bank}
    ours = partial(output_of, mixer, tokens, layout)

    def gathered() -> Tensor:
        return mixer.o_proj(with_gather(broadcast=True)(tokens, banks, layout))

    with torch.no_grad():
        error = relative_error(ours(), gathered())
    if error > 0.05:
        raise RuntimeError(f"gathering and the kernels differ by {error:.3g}: nothing is timed")
    for passes in (FORWARD, BOTH):
        steps = {run: step(run, mixer.parameters(), backward=passes == BOTH) for run in (ours, gathered)}
        timing = bench.time(steps[ours])
        try:
            baseline = bench.time(steps[gathered], 3)
            bench.row(part="gathering", case="7x7 qkv, gathered", passes=passes, **baseline)
            timing["times_baseline"] = baseline["median_ms"] / timing["median_ms"]
        except torch.OutOfMemoryError:
            timing["note"] = "gathering does not fit in this GPU's memory"
        bench.row(part="gathering", case="7x7 qkv, kernels", passes=passes, **timing)


def time_basis(bench: Bench) -> None:
    """A basis of 8 against PyTorch's flash attention of the same width, and memory over lengths."""
    heads, size, batch = (2, 4, 1) if bench.dry else (3, 64, 4)
    for length in (8,) if bench.dry else (2048, 4096, 8192):
        layout, options = PairLayout.for_text(length, length), {"device": bench.device, "dtype": bench.half}
        mixer = mixer_of(layout, heads * size, heads, size, relative_projections="kv", offset_basis=8).to(**options)
        tokens = torch.randn(batch, length, heads * size, **options)
        plain = [torch.randn(batch, heads, length, size, **options, requires_grad=True) for _ in range(3)]
        flash = partial(nn.functional.scaled_dot_product_attention, *plain, is_causal=True)
        ours = partial(output_of, mixer, tokens, layout)
        runs = {"flash attention": (flash, plain), "basis 8": (ours, [*mixer.parameters()])}
        for passes in (FORWARD, BOTH):
            timings = {
                name: bench.time(step(run, inputs, backward=passes == BOTH), 5) for name, (run, inputs) in runs.items()
            }
            ours_ms, flash_ms = (timings[name]["median_ms"] for name in ("basis 8", "flash attention"))
            timings["basis 8"]["times_baseline"] = ours_ms / flash_ms
            for name, timing in timings.items():
                bench.row(part="basis", case=f"{name}, L {length}", passes=passes, **timing)


def time_local(bench: Bench) -> None:
    """Training steps of local Translution against rotary attention, PyTorch's own, of as many parameters; under autocast."""
    for batch, length in ((2, 8),) if bench.dry else ((8, 1024), (2, 8192)):
        fields = text_fields(length) | ({"num_hidden_layers": 1} if bench.dry else {})
        timings = {}
        for name, variant in with_rival(fields).items():
            model = TranslutionForCausalLM(TranslutionConfig(**variant)).to(bench.device).train()
            if name != RIVAL:
                model.set_attn_implementation(TRITON)
            inputs = {key: tensor.to(bench.device) for key, tensor in make_inputs(variant, batch).items()}
            timings[name] = bench.time(bench.update(model, inputs), 5)
        for name, timing in timings.items():
            if name != RIVAL:
                timing["times_baseline"] = timing["median_ms"] / timings[RIVAL]["median_ms"]
            bench.row(part="local", case=f"{name}, L {length}, batch {batch}", passes=BOTH, **timing)


def time_training(bench: Bench) -> None:
    """A training step of tiny at patch 16, all of q, k, v, 256 images, with AdamW, under autocast."""
    fields = {"relative_projections": "qkv", "num_labels": 1000}
    batch, image = (2, 32) if bench.dry else (256, 224)
    if bench.dry:
        fields |= {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    config = TranslutionConfig.from_size("tiny", image_size=image, patch_size=16, **fields)
    model = TranslutionForImageClassification(config).to(bench.device).train()
    model.set_attn_implementation(TRITON)
    pixels = torch.randn(batch, 3, image, image, device=bench.device)
    inputs = {"pixel_values": pixels, "labels": torch.randint(1000, (batch,), device=bench.device)}
    timing = bench.time(bench.update(model, inputs, torch.optim.AdamW(model.parameters(), lr=1e-4)), 5)
    if not bench.dry:
        timing["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    timing |= {"images_per_second": batch / timing["median_ms"] * 1e3, "note": "peak of the whole process"}
    bench.row(part="training", case=f"tiny, patch 16, qkv, batch {batch}", passes="step", **timing)


def train_digits(bench: Bench) -> None:
    """Full Translution learns digits at random places."""
    try:
        from studies.examples import image_batches
        from studies.runs import accuracy, classify, train
        from studies.settings import IMAGE_FIELDS, SETTINGS
        from training.digits import DigitCanvases, digits_split
    except ImportError as error:
        bench.row(part="digits", case="dynamic", ok=False, note=f"not run: {error}")
        return

    digits, held_out = digits_split()
    torch.manual_seed(0)
    fields = IMAGE_FIELDS | ({"patch_size": 8, "num_hidden_layers": 1} if bench.dry else {})
    config = TranslutionConfig(**fields, relative_projections="kv")
    model = TranslutionForImageClassification(config).to(bench.device)
    model.set_attn_implementation(TRITON)
    batch, epochs = (4, 1) if bench.dry else (64, 30)
    steps = 1 if bench.dry else epochs * -(-len(digits) // batch)
    batches = image_batches(DigitCanvases(digits, "dynamic"), 0, steps, batch)
    moved = ({name: tensor.to(bench.device) for name, tensor in inputs.items()} for inputs in batches)
    seconds, _ = train(model, moved, steps, 2e-3, SETTINGS)
    test = DigitCanvases(held_out.first(2 if bench.dry else None), "dynamic")
    right = accuracy(classify(model, test.pixel_values().to(bench.device)).cpu(), test.digits.labels) / 100
    bench.row(part="digits", case=f"dynamic, {epochs} epochs", accuracy=right, note=f"{seconds:.0f} s", ok=bench.dry or right > 0.5)  # fmt: skip


def write(bench: Bench, path: Path) -> None:
    gpu = "none" if bench.dry else torch.cuda.get_device_name(bench.device)
    common = {**hardware(), "triton": triton.__version__, "cuda": torch.version.cuda, "gpu": gpu}
    write_csv(path, FIELDS, [{**common, **row} for row in bench.rows])


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.csv")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU, with Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no part after this time")
    args = parser.parse_args(arguments)
    if triton is None:
        raise ImportError("there is no Triton: install `triton`, which PyTorch for CUDA brings along.")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("there is no GPU; `--dry_run` with TRITON_INTERPRET=1 tries the script on a CPU.")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("`--dry_run` needs Triton's interpreter: set TRITON_INTERPRET=1.")
    device = torch.device("cpu" if args.dry_run else "cuda")
    bench = Bench(device, args.dry_run, time.monotonic() + 60 * args.minutes, [])
    base, tiny = PairLayout.for_image(14, 14, 14, 14), (192, 3, 64)
    sizes, batches, text = (768, 12, 64), (64, 256, 8), PairLayout.for_text(1024, 1024)
    if args.dry_run:
        base, tiny, sizes, batches = PairLayout.for_image(2, 2, 2, 2), (8, 2, 4), (8, 2, 4), (2, 2, 2)
        text = PairLayout.for_text(6, 6)

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    check(bench)
    torch.use_deterministic_algorithms(False)
    wrong = [row["case"] for row in bench.rows if not row["ok"]]
    if wrong:
        write(bench, args.output)
        print(f"error: wrong results, nothing is timed: {wrong}")
        return 1
    peak = matrix_rate(bench)
    parts = [
        partial(time_mixer, bench, "base, patch 16, kv, batch 64", base, batches[0], sizes, peak, relative_projections="kv"),
        partial(time_mixer, bench, "tiny, patch 16, qkv, batch 256", base, batches[1], tiny, peak, relative_projections="qkv"),
        partial(time_mixer, bench, "tiny, text 1024, kv, batch 8", text, batches[2], tiny, peak, relative_projections="kv"),
        partial(time_gathering, bench),
        partial(time_basis, bench),
        partial(time_local, bench),
        partial(time_training, bench),
        partial(train_digits, bench),
    ]  # fmt: skip
    for part in parts:
        if time.monotonic() > bench.deadline:
            bench.row(part="skipped", case=part.func.__name__, note="out of time")
            continue
        try:
            part()
        except torch.OutOfMemoryError as error:
            bench.row(part="failed", case=part.func.__name__, ok=False, note=str(error).splitlines()[0])
        write(bench, args.output)
        torch.cuda.empty_cache()
    print(f"{len(bench.rows)} rows in {args.output}")
    return int(any(row.get("ok") is False for row in bench.rows))


if __name__ == "__main__":
    run_command(main)

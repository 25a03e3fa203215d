"""The parts of the check."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.local import RIVAL, make_inputs, text_fields, with_rival
from benchmarks.measuring import BOTH, FORWARD, relative_error, step, worst_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpu import cases as problems
from gpu.bench import Bench
from gpu.cases import DTYPES, KV, QKV, TINY, Case, both_passes, output_of
from gpu.model import executed_operations, moved_bytes
from gpu.recording import Launch, alike, as_on_gpu, intercepted, kind_of, launches_of
from gpu.tiles import candidates
from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.kernels import launch as launching
from translution.modeling.operators import dispatch, grouped_gemm, triton_pairs
from translution.modeling.operators.dispatch import AUTO, EAGER, TRITON


ROOT = Path(__file__).resolve().parents[2]


def rates(bench: Bench) -> None:
    """What the device reaches: products of each type, and copies from memory and from the L2 cache."""
    bench.product_rate()
    size = 64 if bench.dry else 8192
    for name, tf32 in (("float16", False), ("float32", True), ("float32", False)):
        with bench.guarded(case=f"{size}³ product", dtype=name), tf32_set(tf32):
            left, right = torch.randn(2, size, size, device=bench.device, dtype=DTYPES[name])
            timing = bench.time(lambda left=left, right=right: left @ right, 5)
            tflops = 2 * size**3 / timing["median_ms"] / 1e9
            bench.row(case=f"{size}³ product", dtype=name, tflops=tflops, note="TF32" if tf32 else None, **timing)
    for name, size in (("memory", 1 << 31), ("L2", 1 << 24)):
        with bench.guarded(case=f"copy, {name}"):
            source = torch.randn(16 if bench.dry else size // 4, device=bench.device)
            target = torch.empty_like(source)
            times = 1 if name == "memory" or bench.dry else 100

            def copy(source: Tensor = source, target: Tensor = target, times: int = times) -> None:
                for _ in range(times):
                    target.copy_(source)

            timing = bench.time(copy)
            moved = 2 * source.numel() * source.element_size() * times
            bench.row(case=f"copy, {name}", gbytes_per_second=moved / timing["median_ms"] / 1e6, **timing)


@contextmanager
def tf32_set(allowed: bool) -> Iterator[None]:
    """Whether products of float32 may be of TF32."""
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, allowed
    try:
        yield
    finally:
        settings.allow_tf32 = before


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an element that is never written shows."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def plain_pytorch(many_offsets: bool = False) -> Iterator[None]:
    """`attn_implementation="auto"` is the path of plain PyTorch that groups pairs by their offset, or takes many offsets at a time."""
    with (
        mock.patch.dict(os.environ, {dispatch.VARIABLE: "0"}),
        mock.patch.object(dispatch, "STREAM", False),
        mock.patch.object(dispatch, "GEMM_DEVICES", ("cuda", "cpu") if many_offsets else ()),
    ):
        yield


def errors_of(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], eps: float
) -> tuple[bool, dict[str, float]]:
    """Whether each error is at most twice that of plain PyTorch and a rounding more; and the largest of both."""
    errors = {name: relative_error(ours[name], truth[name]) for name in truth}
    plain_errors = {name: relative_error(plain[name], truth[name]) for name in truth}
    # Written so that NaN fails as well.
    ok = all(errors[name] <= 2 * plain_errors[name] + eps for name in truth)
    worst = {"error": max(errors.values()), "error_plain": max(plain_errors.values())}
    return ok, {name: float("nan") if any(e != e for e in errors.values()) else value for name, value in worst.items()}


def check_small(bench: Bench, case: Case, dtype: str, tf32: bool = False) -> None:
    """A case in a type against the readable path in float64."""
    like = DTYPES[dtype]
    mixer, tokens = case.mixer(bench.device, like), case.tokens(bench.device, like)
    weight = torch.randn_like(tokens)
    with tf32_set(tf32), poisoned_memory():
        ours = both_passes(mixer, TRITON, tokens, case.layout, weight)
        plain = both_passes(mixer, EAGER, tokens, case.layout, weight)
    truth = both_passes(mixer.double(), EAGER, tokens.double(), case.layout, weight.double())
    # Weights of near and far pairs are taken from one log-sum-exp, which costs a few roundings of float32.
    roundings = 4 if case.layout.clamp and like == torch.float32 else 1
    eps = torch.finfo(torch.float16 if tf32 else like).eps
    ok, worst = errors_of(ours, plain, truth, roundings * eps)
    bench.row(case=case.name, dtype=dtype, ok=ok, note="TF32" if tf32 else None, **worst)


def smoke(bench: Bench) -> None:
    """Every kernel in the type to time in, against float64, at odd sizes."""
    for case in bench.cases(problems.DRY_SMOKE if bench.dry else problems.SMOKE):
        with bench.guarded(case=case.name, dtype=bench.half_name):
            check_small(bench, case, bench.half_name)


def check_large(bench: Bench, case: Case) -> tuple[bool | None, dict[str, float]]:
    """A case as it is timed, against plain PyTorch in float32; `None` where that does not fit."""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    weight = torch.randn_like(tokens)
    ours = both_passes(mixer, TRITON, tokens, case.layout, weight)
    try:
        with plain_pytorch(), tf32_set(False):
            plain = both_passes(mixer, AUTO, tokens, case.layout, weight)
            truth = both_passes(mixer.float(), AUTO, tokens.float(), case.layout, weight.float())
    except torch.OutOfMemoryError:
        return None, {}
    return errors_of(ours, plain, truth, torch.finfo(bench.half).eps)


def verify(bench: Bench) -> None:
    """Other types; results that do not change between runs, streams, graphs and compilation; sizes beyond 32 bits."""
    small = bench.cases(problems.DRY_SMOKE if bench.dry else problems.SMOKE)
    for dtype, tf32 in (("float16", False), ("float32", False), ("float32", True)):
        for case in small:
            with bench.guarded(case=case.name, dtype=dtype):
                check_small(bench, case, dtype, tf32)
    large = bench.cases(problems.DRY_TIMED if bench.dry else problems.TIMED)
    for name, check in (("two runs", _two_runs), ("second stream", _second_stream), ("CUDA graph", _graph)):
        for case in large:
            values = {"case": f"{name}: {case.name}", "dtype": bench.half_name}
            with bench.guarded(**values):
                if bench.dry and name != "two runs":
                    bench.row(**values, note="not in a dry run")
                else:
                    bench.row(**values, ok=check(bench, case))
    for case in large[:1] if bench.dry else large[:7]:
        values = {"case": f"torch.compile: {case.name}", "dtype": bench.half_name}
        with bench.guarded(**values):
            error = _compiled(bench, case)
            bench.row(**values, error=error, ok=error <= 4 * torch.finfo(bench.half).eps)
    with bench.guarded(case="more than 2³¹ scores", dtype=bench.half_name):
        error = _beyond_32_bits(bench)
        bench.row(
            case="more than 2³¹ scores", dtype=bench.half_name, error=error, ok=error <= torch.finfo(bench.half).eps
        )
    if not bench.dry:
        _memcheck(bench)


def _two_runs(bench: Bench, case: Case) -> bool:
    """Whether two runs put out the same bits."""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    weight = torch.randn_like(tokens)
    one, two = (both_passes(mixer, TRITON, tokens, case.layout, weight) for _ in range(2))
    return all(one[name].equal(two[name]) and bool(one[name].isfinite().all()) for name in one)


def _second_stream(bench: Bench, case: Case) -> bool:
    """Whether a stream that is not the default puts out the same bits, beside work on the default one."""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    with torch.no_grad():
        expected = output_of(mixer, TRITON, tokens, case.layout)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = output_of(mixer, TRITON, tokens, case.layout)
        output_of(mixer, TRITON, tokens.neg(), case.layout)
        torch.cuda.synchronize()
    return found.equal(expected)


def _graph(bench: Bench, case: Case) -> bool:
    """Whether the replay of a graph of both passes, with other tokens, puts out the same bits as running them."""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    weight, others = torch.randn_like(tokens), torch.randn_like(tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            both_passes(mixer, TRITON, tokens, case.layout, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(mixer, TRITON, tokens, case.layout, weight)
    tokens.copy_(others)
    # What a cache may drop in the meantime must not be what the graph reads.
    both_passes(mixer, TRITON, others[:1], case.layout, weight[:1])
    torch.cuda.empty_cache()
    graph.replay()
    torch.cuda.synchronize()
    expected = both_passes(mixer, TRITON, others, case.layout, weight)
    return all(captured[name].equal(expected[name]) for name in expected)


def _compiled(bench: Bench, case: Case) -> float:
    """How far the output of the mixer as one graph is from its own."""
    torch.compiler.reset()
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    expected = output_of(mixer, TRITON, tokens, case.layout)
    mask = problems.mask_of(case.layout, tokens)
    compiled = torch.compile(
        lambda tokens: mixer(tokens, case.layout, mask)[0],
        fullgraph=True,
        backend="aot_eager" if bench.dry else "inductor",
    )
    found = compiled(tokens)
    found.sum().backward()
    return relative_error(found, expected)


def _beyond_32_bits(bench: Bench) -> float:
    """How far the last outputs of a batch with more than 2³¹ scores are from those of these inputs alone."""
    layout = problems.image(2 if bench.dry else 14)
    case = Case("many", layout, 2**31 // (TINY[1] * layout.num_tokens**2) + 8, TINY, KV)
    if bench.dry:
        case = replace(case, batch=3, sizes=(8, 2, 4))
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    with torch.no_grad():
        last = output_of(mixer, TRITON, tokens, layout)[-2:].clone()
        return relative_error(last, output_of(mixer, TRITON, tokens[-2:].contiguous(), layout))


def _memcheck(bench: Bench) -> None:
    """Two small cases under `compute-sanitizer`, where it is there and the device lets it."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for name in ("full qkv, image 5x7", "basis 3 qkv", "local kv, text"):
        values = {"case": f"compute-sanitizer memcheck: {name}"}
        with bench.guarded(**values):
            if tool is None:
                bench.row(**values, note="there is no compute-sanitizer")
                continue
            script = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--part", "smoke", "--case", name]
            script += ["--output", str(bench.output.with_suffix(".memcheck.csv"))]
            kernels = os.environ.get("TRITON_CACHE_DIR", "")
            if (Path(kernels) / "triton.json").exists():
                script += ["--compiled", kernels]
            ran = subprocess.run([tool, "--tool", "memcheck", *script], capture_output=True, text=True, timeout=150, check=False)  # fmt: skip
            said = [line for line in (ran.stdout + ran.stderr).splitlines() if "ERROR SUMMARY" in line]
            note = said[-1].strip("= ") if said else (ran.stderr.strip().splitlines() or ["nothing was said"])[-1]
            bench.row(**values, ok=bool(said) and "0 errors" in said[-1], note=note[:300])


# Tiles


def sweep(bench: Bench) -> None:
    """Memory of a chunk of offsets, and the order of tokens in memory; then tiles of every kernel and case, each compared with the first
    that the kernel's list names, and timed; winners to a file.
    """
    winners: dict[str, tuple[float, dict[str, int]]] = {}
    cases = bench.cases(problems.DRY_TIMED if bench.dry else problems.TIMED)
    for case in cases:
        if case.kind in ("full", "LoR"):
            _sweep_memory(bench, case)
            _time_orders(bench, case)
    for case in cases:
        recorded: dict[int, list[Launch]] = {}
        with bench.guarded(case=case.name, dtype=bench.half_name):
            recorded = _launches_that_ran(bench, case)
        for launches in recorded.values():
            with torch.no_grad():
                _sweep_launch(bench, case, launches[0], winners)
    name = "none" if bench.dry else torch.cuda.get_device_name(bench.device)
    found = {name: {key: option for key, (_, option) in sorted(winners.items())}}
    path = bench.output.with_name("tuned.json") if bench.dry else launching.TUNED
    known = launching.tuned_options(str(path))
    path.write_text(json.dumps({**known, name: known.get(name, {}) | found[name]}, indent=2) + "\n", encoding="utf-8")
    print(f"{len(winners)} winners in {path}")


# Bytes that an operator may take for a chunk of offsets, or count on in the L2 cache: what is set, of which module, for which path.
MEMORY = (("SCRATCH_BYTES", triton_pairs, "kernels"), ("CACHED_BYTES", triton_pairs, "kernels"), ("CHUNK_BYTES", grouped_gemm, "grouped_gemm"))  # fmt: skip
MEMORY_MIB = (8, 16, 32, 64, 128, 512)


def _sweep_memory(bench: Bench, case: Case) -> None:
    """Times both passes with each size, compared with those with the size that is set."""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    weight = torch.randn_like(tokens)
    for name, module, implementation in MEMORY:
        many_offsets = implementation == "grouped_gemm"
        wish = AUTO if many_offsets else TRITON
        expected: dict[str, Tensor] | None = None
        for mib in (getattr(module, name) >> 20, *(MEMORY_MIB[:1] if bench.dry else MEMORY_MIB)):
            values = {"case": case.name, "implementation": implementation, "passes": BOTH, "dtype": bench.half_name}
            values["tile"] = json.dumps({name: mib << 20})
            with (
                bench.guarded(**values),
                plain_pytorch(True) if many_offsets else nullcontext(),
                mock.patch.object(module, name, mib << 20),
            ):
                run = partial(both_passes, mixer, wish, tokens, case.layout, weight)
                found = run()
                if expected is None:
                    expected = found
                    continue
                _time_if_same(bench, values, run, found, expected)


def _time_if_same(
    bench: Bench, values: dict[str, Any], run: Callable[[], Any], found: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """A row of what should compute the same, but for the order of sums, which a rounding of each part may show."""
    error = difference(found, expected)
    ok = error <= 2 * torch.finfo(bench.half).eps
    bench.row(**values, error=error, ok=ok, **(bench.time(run, 5) if ok else {}))


def _time_orders(bench: Bench, case: Case) -> None:
    """Times both passes over tokens in either order in memory, which kernels take by their strides: do neighbouring pairs gain?"""
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    weight = torch.randn_like(tokens)
    expected: dict[str, Tensor] | None = None
    for order in ("[B, L, C]", "[L, B, C]"):
        values = {"case": case.name, "implementation": "kernels", "passes": BOTH, "dtype": bench.half_name}
        values["tile"] = json.dumps({"tokens": order})
        with bench.guarded(**values):
            ordered = tokens if order == "[B, L, C]" else tokens.transpose(0, 1).contiguous().transpose(0, 1)
            run = partial(both_passes, mixer, TRITON, ordered, case.layout, weight)
            found = run()
            expected = found if expected is None else expected
            _time_if_same(bench, values, run, found, expected)


def _launches_that_ran(bench: Bench, case: Case) -> dict[int, list[Launch]]:
    """The launches of both passes that are `alike`, by the place of the first, with the tensors as they were before that one."""
    taken: list[Launch] = []
    kinds: set[tuple] = set()
    launch_ = launching.launch

    def take(launch: Launch) -> None:
        is_new, names = kind_of(launch) not in kinds, launch.tensors
        before = {name: tensor.clone() for name, tensor in names.items()} if is_new else {}
        launch_(launch.kernel, launch.grid, launch.options, launch.derived, **launch.arguments)
        launch.before = {name: tensor for name, tensor in before.items() if not names[name].equal(tensor)}
        kinds.add(kind_of(launch))
        taken.append(launch)

    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    with intercepted(take), poisoned_memory():
        both_passes(mixer, TRITON, tokens, case.layout, torch.randn_like(tokens))
    return alike(taken)


def _run(launch: Launch, option: dict[str, int]) -> Any:
    return launch.kernel[launch.grid(option)](**launch.passed(option))


def _sweep_launch(bench: Bench, case: Case, launch: Launch, winners: dict[str, tuple[float, dict[str, int]]]) -> None:
    """Times the candidates of a launch."""
    expected: dict[str, Tensor] | None = None
    key = launching.tuning_key(launch.kernel, launch.arguments)
    tokens_eps = torch.finfo(bench.half).eps
    for option in candidates(launch, fewer=bench.dry):
        values = {"case": case.name, "kernel": launch.name, "dtype": bench.half_name, "tile": json.dumps(option)}
        with bench.guarded(**values):
            for name, tensor in launch.before.items():
                launch.tensors[name].copy_(tensor)
            # Compiled, or loaded, before it runs: what spills would take longer than it is worth.
            spills = launching._spills(launch.kernel, launch.grid(option), launch.passed(option))
            if spills > launching.MAX_SPILLS and expected is not None:
                bench.row(**values, spills=spills, note="spills: not timed")
                continue
            compiled = _run(launch, option)
            if compiled is not None:
                values |= {
                    "registers": compiled.n_regs,
                    "spills": compiled.n_spills,
                    "shared": compiled.metadata.shared,
                }
            found = {name: launch.tensors[name].clone() for name in launch.before}
            if expected is None:
                expected = found
            # Another order of adding up, and of rounding what is multiplied.
            error = difference(found, expected)
            if not error <= tokens_eps:
                bench.row(**values, error=error, ok=False, note="differs from the first tile")
                continue
            timing = bench.time(lambda option=option: _run(launch, option), 7)
            bench.row(**values, error=error, ok=True, **timing, **_rates_of(bench, [launch], option, timing))
            if key not in winners or timing["median_ms"] < winners[key][0]:
                winners[key] = (timing["median_ms"], option)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of what a kernel wrote; NaN where it is not what the other wrote that holds something else than NaN."""
    for name, tensor in expected.items():
        if not found[name].isnan().equal(tensor.isnan()):
            return float("nan")
    return worst_error(map(torch.nan_to_num, found.values()), map(torch.nan_to_num, expected.values()))


def _rates_of(bench: Bench, launches: list[Launch], option: dict[str, int], timing: dict[str, Any]) -> dict[str, Any]:
    """Executed operations of launches, and what they read and write at least."""
    executed = sum(executed_operations(launch, option) for launch in launches)
    moved = sum(map(moved_bytes, launches))
    columns = {"mbytes": moved / 1e6, "gbytes_per_second": moved / timing["median_ms"] / 1e6}
    if executed:
        tflops = executed / timing["median_ms"] / 1e9
        columns |= {"executed_gflop": executed / 1e9, "tflops": tflops, "share": tflops / bench.product_rate()}
    return columns


# Times


def useful_operations(case: Case) -> dict[str, int]:
    """Operations of a mixer by its formulas (`flops.py`), of a forward pass and of both."""
    mixer = case.mixer("meta", torch.float32)
    tokens = case.tokens("meta", torch.float32)
    counts = {}
    with as_on_gpu():
        for passes in (FORWARD, BOTH):
            with FlopCounterMode(display=False) as counter:
                step(partial(output_of, mixer, TRITON, tokens, case.layout), mixer.parameters(), passes == BOTH)()
            counts[passes] = counter.get_total_flops()
    return counts


def executed_of(case: Case, dtype: torch.dtype) -> float:
    """Operations that the kernels of both passes execute."""
    return sum(executed_operations(launch, launch.options[0]) for launch in launches_of(case, dtype))


def rivals_of(
    bench: Bench, case: Case, mixer: nn.Module, tokens: Tensor
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """What a case is timed against, each with the inputs that it has gradients for."""
    parameters = list(mixer.parameters())

    def plain(many_offsets: bool) -> Tensor:
        with plain_pytorch(many_offsets):
            return output_of(mixer, AUTO, tokens, case.layout)

    if case.kind in ("full", "LoR"):
        ways = {"grouped": False, "grouped_gemm": True}
        return {name: (partial(plain, many_offsets), parameters) for name, many_offsets in ways.items()}
    rivals: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    _, heads, size = case.sizes
    shape = (case.batch, heads, case.layout.num_tokens, size)
    attended = [torch.randn(shape, device=bench.device, dtype=bench.half, requires_grad=True) for _ in range(3)]
    rivals["flash attention"] = (partial(nn.functional.scaled_dot_product_attention, *attended, is_causal=case.layout.causal), attended)  # fmt: skip
    if not bench.dry:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = case.layout.num_tokens
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=bench.device) if case.layout.causal else None  # fmt: skip
        flex = torch.compile(flex_attention)
        rivals["FlexAttention"] = (lambda: flex(*attended, block_mask=mask), attended)
    rivals["plain PyTorch"] = (partial(plain, False), parameters)
    return rivals


def time_(bench: Bench) -> None:
    """Mixers against their rivals, forward and with backward; then each of their kernels alone."""
    bench.product_rate()
    if bench.only in "7x7 qkv":
        with bench.guarded(case="7x7 qkv"):
            _time_gathering(bench)
    for case in bench.cases(problems.DRY_TIMED if bench.dry else problems.TIMED):
        with bench.guarded(case=case.name, dtype=bench.half_name):
            _time_case(bench, case)


def _time_case(bench: Bench, case: Case) -> None:
    ok, worst = check_large(bench, case)
    note = "plain PyTorch does not fit: not checked at this size" if ok is None else None
    bench.row(case=case.name, implementation="check", dtype=bench.half_name, ok=ok, note=note, **worst)
    if ok is False:
        return
    if not bench.dry:
        torch.cuda.empty_cache()
    useful, executed = useful_operations(case), executed_of(case, bench.half)
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    runs = {"kernels": (partial(output_of, mixer, TRITON, tokens, case.layout), list(mixer.parameters()))}
    runs |= rivals_of(bench, case, mixer, tokens)
    for passes in (FORWARD, BOTH):
        medians: dict[str, float] = {}
        for name, (run, inputs) in runs.items():
            values = {"case": case.name, "implementation": name, "passes": passes, "dtype": bench.half_name}
            with bench.guarded(**values):
                timing = bench.time(step(run, inputs, backward=passes == BOTH))
                medians[name] = timing["median_ms"]
                # Attention computes something else.
                own = inputs[0] is runs["kernels"][1][0]
                counted = bench.rates(timing, useful[passes] if own else None, executed if name == "kernels" and passes == BOTH else None)  # fmt: skip
                if name != "kernels" and "kernels" in medians:
                    counted |= {"rival": name, "times_rival": medians["kernels"] / medians[name]}
                bench.row(**values, **counted, **timing)
    for place, launches in _launches_that_ran(bench, case).items():
        first = launches[0]
        values = {"case": case.name, "implementation": "kernel", "kernel": first.name, "dtype": bench.half_name}
        with bench.guarded(**values):

            def run(launches: list[Launch] = launches) -> None:
                for one in launches:
                    launching.launch(one.kernel, one.grid, one.options, one.derived, **one.arguments)

            timing = bench.time(run)
            problem = launching._problem(first.kernel, tokens.device, first.options, first.first)
            option = launching._chosen.get(problem, first.options[0])
            bench.row(
                **values, place=place, tile=json.dumps(option), **timing, **_rates_of(bench, launches, option, timing)
            )


def _time_gathering(bench: Bench) -> None:
    """Against a matrix gathered per pair, as the published code does: 7 × 7, all of q, k, v."""
    from benchmarks.operator import with_gather

    case = Case("7x7 qkv", problems.image(2 if bench.dry else 7), 2 if bench.dry else 64, (12, 3, 4) if bench.dry else TINY, QKV)  # fmt: skip
    mixer, tokens = case.mixer(bench.device, bench.half), case.tokens(bench.device, bench.half)
    banks = {"q": mixer.q_bank, "k": mixer.k_bank, "v": mixer.v_bank}
    ours = partial(output_of, mixer, TRITON, tokens, case.layout)

    def gathered() -> Tensor:
        return mixer.o_proj(with_gather(broadcast=True)(tokens, banks, case.layout))

    with torch.no_grad():
        error = relative_error(ours(), gathered())
    if not error <= 0.05:
        bench.row(case=case.name, implementation="gathered", error=error, ok=False, note="differs: not timed")
        return
    useful = useful_operations(case)
    for passes in (FORWARD, BOTH):
        timing = bench.time(step(ours, mixer.parameters(), backward=passes == BOTH))
        values = {"case": case.name, "passes": passes, "dtype": bench.half_name}
        bench.row(**values, implementation="kernels", **bench.rates(timing, useful[passes]), **timing)
        with bench.guarded(**values, implementation="gathered"):
            rival = bench.time(step(gathered, mixer.parameters(), backward=passes == BOTH), 3)
            ratio = timing["median_ms"] / rival["median_ms"]
            bench.row(**values, implementation="gathered", rival="gathered", times_rival=ratio, **rival)


# Training


def update(
    bench: Bench, model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """A training step under autocast."""

    def run() -> None:
        with torch.autocast(bench.device.type, bench.half):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()

    return run


SMALL = {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1, "intermediate_size": 8}


def train(bench: Bench) -> None:
    """Whole training steps with AdamW, images a second and memory; then a model that learns digits."""
    for size, patches, subset, batch in (("tiny", 16, "qkv", 256), ("base", 16, "kv", 64)):
        case = f"{size}/{patches} {subset}, batch {batch}"
        if bench.only in case:
            with bench.guarded(case=case, passes="step"):
                _train_images(bench, case, size, patches, {"relative_projections": subset}, batch)
    for batch, length in ((2, 8),) if bench.dry else ((8, 1024), (4, 4096)):
        case = f"text {length}, batch {batch}"
        if bench.only in case:
            with bench.guarded(case=case, passes="step"):
                _train_text(bench, case, batch, length)
    if bench.only in "digits":
        with bench.guarded(case="digits"):
            _train_digits(bench)


def _train_images(bench: Bench, case: str, size: str, patch: int, fields: dict[str, Any], batch: int) -> None:
    image = 224
    if bench.dry:
        fields, batch, image = fields | SMALL, 2, 32
    variants = {"kernels": TRITON, "plain PyTorch": AUTO}
    medians: dict[str, float] = {}
    for name, implementation in variants.items():
        values = {"case": case, "implementation": name, "passes": "step", "dtype": bench.half_name}
        with bench.guarded(**values), plain_pytorch() if implementation == AUTO else mock.patch.dict(os.environ):
            config = TranslutionConfig.from_size(size, image_size=image, patch_size=patch, num_labels=1000, **fields)
            model = TranslutionForImageClassification(config).to(bench.device).train()
            model.set_attn_implementation(implementation)
            pixels = torch.randn(batch, 3, image, image, device=bench.device)
            inputs = {"pixel_values": pixels, "labels": torch.randint(1000, (batch,), device=bench.device)}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            timing = bench.time(update(bench, model, inputs, optimizer), 5)
            medians[name] = timing["median_ms"]
            columns = {"images_per_second": batch / timing["median_ms"] * 1e3}
            if not bench.dry:
                timing["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if name != "kernels" and "kernels" in medians:
                columns |= {"rival": name, "times_rival": medians["kernels"] / medians[name]}
            bench.row(**values, **columns, note="peak of the whole process", **timing)
            del model, optimizer
    if not bench.dry:
        torch.cuda.empty_cache()


def _train_text(bench: Bench, case: str, batch: int, length: int) -> None:
    """Local Translution, a basis and full Translution beside rotary attention, PyTorch's own, of as many parameters as the local model."""
    fields = text_fields(length) | ({"num_hidden_layers": 1} if bench.dry else {})
    variants = with_rival(fields)
    variants = {RIVAL: variants.pop(RIVAL), **variants}
    whole = {"mixer_types": "translution", "relative_projections": "kv", "max_relative_distance": None}
    if not bench.dry:
        variants["basis 8"] = variants["local"] | whole | {"offset_basis": 8}
        variants["full"] = variants["local"] | whole
    medians: dict[str, float] = {}
    for name, variant in variants.items():
        values = {"case": case, "implementation": name, "passes": "step", "dtype": bench.half_name}
        with bench.guarded(**values):
            model = TranslutionForCausalLM(TranslutionConfig(**variant)).to(bench.device).train()
            if name != RIVAL:
                model.set_attn_implementation(TRITON)
            inputs = {key: tensor.to(bench.device) for key, tensor in make_inputs(variant, batch).items()}
            timing = bench.time(update(bench, model, inputs, torch.optim.AdamW(model.parameters(), lr=1e-4)), 5)
            medians[name] = timing["median_ms"]
            columns = {}
            if name != RIVAL and RIVAL in medians:
                columns = {"rival": RIVAL, "times_rival": medians[name] / medians[RIVAL]}
            bench.row(**values, **columns, note=f"{model.num_parameters()} parameters", **timing)


def _train_digits(bench: Bench) -> None:
    """Full Translution learns digits at random places."""
    from studies.examples import image_batches
    from studies.runs import accuracy, classify, train
    from studies.settings import IMAGE_FIELDS, SETTINGS
    from training.digits import DigitCanvases, digits_split

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
    bench.row(case="digits", implementation="kernels", accuracy=right, note=f"{epochs} epochs, {seconds:.0f} s", ok=bench.dry or right > 0.5)  # fmt: skip


# Several processes


def scale(bench: Bench) -> None:
    """Two processes share the one GPU: the losses of DDP and of FSDP2 beside those of one process."""
    for backend in ("gloo",) if bench.dry else ("gloo", "nccl"):
        for way in ("DDP", "FSDP2"):
            values = {"case": f"{way}, two processes, {backend}", "dtype": "float32"}
            with bench.guarded(**values):
                script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
                script += [str(ROOT / "scripts" / "gpu" / "two_processes.py"), way, backend, bench.device.type]
                ran = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
                said = [line for line in ran.stdout.splitlines() if line.startswith("error ")]
                if not said:
                    lines = [line for line in ran.stderr.splitlines() if "Error" in line] or ["nothing was said"]
                    bench.row(**values, ok=False, note=lines[0].strip()[:300])
                    continue
                error = float(said[0].split()[1])
                # Gradients are added up in another order, and a step amplifies that.
                bench.row(**values, error=error, ok=error <= 1e-3, note=said[0])


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "rates": (rates, 60),
    "smoke": (smoke, 120),
    "time": (time_, 240),
    "sweep": (sweep, 300),
    "train": (train, 180),
    "verify": (verify, 300),
    "scale": (scale, 180),
}

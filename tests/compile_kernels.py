"""Compiles every kernel for a GPU that need not be there, and prints what each takes of it.

    python tests/compile_kernels.py DTYPE OPTION BACKEND ARCHITECTURE   # each form of a kernel (but for sm_90 one), for a small problem: shared memory
    python tests/compile_kernels.py real [DTYPE] [CASE]                 # as `gpu_check.py` launches it, for an H100 or H200

`OPTION` is the place of the tile sizes among those that a device may be given. At real sizes numbers are multiples of 16 as they are in
use and each kernel has the tiles that the launcher chooses. Where those are not the first of its list, since that one spills more than
`MAX_SPILLS` registers or does not fit, the status is 1. CASE is part of the name of one of `COMPILED` of `scripts/gpu/cases.py`, by default all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from translution.modeling.kernels.launch import MAX_SPILLS
from translution.modeling.operators import registration, triton_basis, triton_local, triton_pairs
from translution.modeling.operators.pair_autograd import pack
from translution.modeling.operators.pair_layout import PairLayout


NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
HEADS, FEATURES = 2, 64


def launches(dtype: torch.dtype, option: int) -> list[tuple[Any, dict[str, Any]]]:
    """Every kernel with the arguments that a small problem would launch it with."""
    noted = []

    def note(kernel, grid, options, derived, **arguments):
        chosen = options[max(option, -len(options)) if option < 0 else min(option, len(options) - 1)]
        noted.append((kernel, arguments | derived(chosen) | chosen))

    triton_pairs.launch = triton_basis.launch = triton_local.launch = note
    layout = PairLayout.for_image(2, 2, 2, 2)
    x = torch.zeros(2, layout.num_tokens, FEATURES, dtype=dtype)
    bank = torch.zeros(layout.num_offsets, FEATURES, FEATURES, dtype=dtype)
    pairs = torch.zeros(2, HEADS, layout.num_tokens, layout.num_tokens)
    triton_pairs._scores(x, x, bank, bank, HEADS, layout)
    triton_pairs._values(pairs, x, bank, layout)
    triton_pairs._scores_backward(pairs, x, x, bank, bank, layout, True, False)

    heads = torch.zeros(2, HEADS, 4, layout.num_tokens, FEATURES, dtype=dtype)
    one, sums = heads[:, :, :1].contiguous(), torch.zeros(2, HEADS, layout.num_tokens)
    coefficients = torch.zeros(layout.num_offsets, 4)
    given = (one, heads, heads, None, coefficients, coefficients, None, None, None, None, 1.0, pack(layout))
    output = one[:, :, 0]
    registration.operator("basis_attention")(*given)
    registration.operator("basis_attention_backward")(
        output, output.new_empty(0), output, output.new_empty(0), sums, *given
    )

    # One head of keys for all of the queries': each form of a loop through those, with few factors, as they are unrolled.
    alone = len(noted)
    size = FEATURES // HEADS
    triton_pairs._scores_backward(pairs, x, x, None, bank[..., :size], layout, False, True)
    triton_pairs._scores_backward(pairs, x, x[..., :size], bank, None, layout, False, True)
    key, mix = heads[:, :1, :1].contiguous(), coefficients[:, :1].contiguous()
    given = (one, key, key, None, mix, mix, None, None, None, None, 1.0, pack(layout))
    registration.operator("basis_attention_backward")(
        output, output.new_empty(0), output, output.new_empty(0), sums, *given
    )
    looping = ("projection_kernel", "sum_kernel", "key_value_gradient_kernel")
    noted[alone:] = [launched for launched in noted[alone:] if launched[0].__name__ in looping]

    # A text of the distance 3, with heads that share keys as well; the far part, plain PyTorch, is whatever memory holds.
    layout = PairLayout.for_text(64, 64, 3).near(0)
    each = [[torch.zeros(2, 64, HEADS * FEATURES, dtype=dtype) for _ in range(3)] for _ in range(2)]
    for heads in (HEADS, 4 * HEADS):
        query = [torch.zeros(2, 64, heads * FEATURES, dtype=dtype)]
        far = [torch.zeros(2, count, 64, FEATURES, dtype=dtype) for count in (heads, HEADS, HEADS)]
        given = (query, *each, far)
        output, logsumexp, scores = triton_local._forward(*given, None, None, heads, 1.0, layout)
        triton_local._backward(output, output, logsumexp, scores, *given, None, heads, 1.0, layout)
    return noted


def type_of(value: Any) -> Any:
    """The type of an argument as Triton spells it."""
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, torch.Tensor):
        return NAMES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def main(dtype: str, option: str, backend: str, architecture: str) -> None:
    name = int(architecture) if architecture.isdigit() else architecture
    target = GPUTarget(backend, name, 64 if backend == "hip" else 32)
    forms = launches(getattr(torch, dtype), int(option))
    if architecture != "90":
        # One form of each tells whether the others are understood, too.
        forms = {kernel.__name__: (kernel, arguments) for kernel, arguments in forms}.values()
    for kernel, arguments in forms:
        signature, constants = {}, {}
        for place, (argument, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = arguments[argument]
            if parameter.is_constexpr:
                signature[argument], constants[(place,)] = "constexpr", value
            else:
                signature[argument] = type_of(value)
        options = {name: arguments[name] for name in ("num_warps", "num_stages")}
        compiled = compile_kernel(ASTSource(kernel, signature, constants), target=target, options=options)
        print(kernel.__name__, compiled.metadata.shared)


def real(dtype: str = "bfloat16", only: str = "") -> int:
    """Place of the tile in its list, registers of a thread, words that it spills, bytes of shared memory and blocks of a multiprocessor at the sizes that are timed."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from gpu.cases import COMPILED
    from gpu.model import predictions

    later = 0
    for row in predictions(only, COMPILED, dtype):
        later += row["rank"] > 0 or row["spills"] > MAX_SPILLS
        tile = " ".join(f"{name}={value}" for name, value in json.loads(row["tile"]).items())
        taken = " ".join(f"{name}={row[name]}" for name in ("rank", "registers", "spills", "shared", "blocks"))
        print(f"{row['kernel']} {taken} | {row['case']} {dtype} | {tile}", flush=True)
    return int(later > 0)


if __name__ == "__main__":
    sys.exit(real(*sys.argv[2:]) if sys.argv[1] == "real" else main(*sys.argv[1:]))

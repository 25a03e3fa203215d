"""What a launch of a kernel computes and moves, and from that the least time it takes: a prediction, to be held beside the measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common.hardware import hardware

from gpu.cases import DTYPES, TIMED, Case
from gpu.recording import MULTIPROCESSORS, Launch, chosen, different, launches_of, without_gpu


FIELDS = [
    "case", "kernel", "place", "dtype", "tile", "registers", "spills", "shared", "blocks", "programs", "executed_gflop", "mbytes", "predicted_ms",
    "triton", "torch", "commit",
]  # fmt: skip


# An H200's, measured with large inputs by others; `--part rates` measures those of the GPU that is there.
PRODUCT_RATE, MEMORY_RATE = 790e12, 4.3e12


def moved_bytes(launch: Launch) -> int:
    """Each tensor read or written once. One that stands for a pointer that is not read is another's, and counts once."""
    distinct = {id(tensor): tensor for tensor in launch.tensors.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def programs_of(launch: Launch, option: dict[str, int]) -> int:
    return math.prod(launch.grid(option))


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _pairs(launch: Launch) -> int:
    """Pairs of tokens of a launch over pairs."""
    arguments = launch.arguments
    weights = arguments.get("weights", arguments.get("scores"))
    batch, _, queries, tokens = weights.shape
    if arguments["height"] == 1 and arguments["least"] == 0:
        return batch * (queries * (queries + 1) // 2 + queries * (tokens - queries))
    return batch * queries * tokens


def _columns(launch: Launch, option: dict[str, int]) -> int:
    """Columns of the tiles of all heads."""
    arguments = launch.arguments
    return _padded(arguments["num_heads"], option["HEADS"]) * arguments["WIDTH"]


def _scores(launch: Launch, option: dict[str, int]) -> int:
    arguments = launch.arguments
    inner = sum(_padded(arguments[f"{side}_C"], option["BLOCK_C"]) for side in ("QUERY", "KEY") if arguments[f"{side}_BANK"])  # fmt: skip
    return 2 * len(launch.derived(option)["tiles"]) * option["ROWS"] * _columns(launch, option) * inner


def _sum(launch: Launch, option: dict[str, int]) -> int:
    arguments = launch.arguments
    if arguments["bank"] is None:
        return 2 * _pairs(launch) * _columns(launch, option)
    return 2 * _pairs(launch) * _columns(launch, option) * _padded(arguments["C"], option["BLOCK_C"])


def _gradient(launch: Launch, option: dict[str, int]) -> int:
    """The own product, and for each of its tiles the other token's projection again."""
    arguments = launch.arguments
    inner = _padded(arguments["C"], option["BLOCK_C"])
    if arguments["OTHER_BANK"]:
        inner += inner // option["BLOCK_C"] * _padded(arguments["OTHER_C"], option["OTHER_BLOCK_C"])
    return 2 * _pairs(launch) * _columns(launch, option) * inner


def _basis_forward(launch: Launch, option: dict[str, int]) -> int:
    """A product for each two factors of queries and keys, and one for each of values, of all pairs of the tiles that are not hidden."""
    arguments = launch.arguments
    batch = arguments["query"].shape[0]
    queries, tokens = _padded(arguments["queries"], option["QUERIES"]), _padded(arguments["tokens"], option["KEYS"])
    pairs = (queries * (queries + option["KEYS"]) // 2) if arguments["CAUSAL"] else queries * tokens
    features = arguments["NQ"] * arguments["NK"] * arguments["E_WIDTH"] + arguments["NV"] * arguments["V_WIDTH"]
    return 2 * batch * arguments["num_heads"] * pairs * features


def _none(launch: Launch, option: dict[str, int]) -> int:
    """Near pairs have no matrix products."""
    return 0


# Operations of matrix products that a launch executes, padding and recomputation counted, by the name of its kernel.
EXECUTED: dict[str, Callable[[Launch, dict[str, int]], int]] = {
    "scores_kernel": _scores,
    "sum_kernel": _sum,
    "token_gradient_kernel": _gradient,
    "bank_gradient_kernel": _gradient,
    "forward_kernel": _basis_forward,
    "near_kernel": _none,
    "near_query_gradient_kernel": _none,
    "near_key_gradient_kernel": _none,
}


def executed_operations(launch: Launch, option: dict[str, int]) -> int | None:
    """Of matrix products, `None` for a kernel that has no formula, or whose arguments are no longer those of its formula."""
    formula = EXECUTED.get(launch.name)
    try:
        return None if formula is None else formula(launch, option)
    except (KeyError, AttributeError):
        return None


def predicted_ms(operations: float | None, moved: float, programs: int, blocks: int) -> float | None:
    """The larger of the times that products and memory take at the device's rates; `None` where operations are not known.

    Programs start in waves; the last may leave multiprocessors idle, and takes as long as any.
    """
    if operations is None:
        return None
    at_once = max(blocks, 1) * MULTIPROCESSORS
    used = programs / (-(-programs // at_once) * at_once) if programs else 1.0
    return max(operations / PRODUCT_RATE / used, moved / MEMORY_RATE) * 1e3


def columns(launch: Launch, option: dict[str, int], taken: dict[str, int]) -> dict[str, Any]:
    """Operations, traffic, programs and the prediction of a launch, `taken` being what its kernel takes of a multiprocessor."""
    operations, moved, programs = executed_operations(launch, option), moved_bytes(launch), programs_of(launch, option)
    return {
        "programs": programs,
        "executed_gflop": None if operations is None else operations / 1e9,
        "mbytes": moved / 1e6,
        "predicted_ms": predicted_ms(operations, moved, programs, taken["blocks"]),
    }


def predictions(only: str = "", cases: Iterable[Case] = TIMED, dtype: str = "bfloat16") -> Iterator[dict[str, Any]]:
    """A row for each kernel of the cases whose name has `only` in it, with the tile that the launcher chooses."""
    import triton

    common = {name: hardware()[name] for name in ("torch", "commit")} | {"triton": triton.__version__}
    for case in cases:
        if only not in case.name:
            continue
        for place, launch in different(launches_of(case, DTYPES[dtype])).items():
            with without_gpu():
                option, taken = chosen(launch)
            row = {
                "case": case.name,
                "kernel": launch.name,
                "place": place,
                "dtype": dtype,
                "tile": json.dumps(option),
            }
            yield row | taken | columns(launch, option, taken) | common

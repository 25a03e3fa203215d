"""What a launch of a kernel computes and moves, and from that the least time it takes: a prediction, to be held beside the measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from common.hardware import hardware

from gpu.cases import DTYPES, TIMED, Case
from gpu.recording import MULTIPROCESSORS, Launch, alike, chosen, launches_of, without_gpu
from translution.modeling.operators import triton_pairs


FIELDS = [
    "case", "kernel", "place", "dtype", "tile", "rank", "registers", "spills", "shared", "blocks", "launches", "programs", "executed_gflop", "mbytes", "predicted_ms",
    "triton", "torch", "commit",
]  # fmt: skip


# An H200's, measured with large inputs by others; `--part rates` measures those of the GPU that is there.
PRODUCT_RATE, MEMORY_RATE = 790e12, 4.3e12


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _geometry(arguments: dict[str, Any]) -> triton_pairs._Geometry:
    """The offsets of a launch over pairs."""
    return triton_pairs._Geometry(**{name: arguments[name] for name in triton_pairs._Geometry._fields})


def moved_bytes(launch: Launch) -> int:
    """What a launch reads or writes, each once: of tensors with an element per pair, and of banks, what its offsets have.

    A tensor that stands for a pointer that is not read is another's, and counts once. Sums that are added to count twice.
    """
    arguments = launch.arguments
    distinct = {id(tensor): (name, tensor) for name, tensor in reversed(launch.tensors.items())}
    geometry = _geometry(arguments) if "least_row" in arguments else None
    total = 0
    for name, tensor in distinct.values():
        numbers = tensor.numel()
        if geometry is not None:
            pairs = triton_pairs._pairs_of(geometry) * arguments["batch"]
            if name in ("weights", "scores"):
                numbers = pairs * tensor.shape[1]
            elif name == "projections":
                numbers = pairs * tensor.shape[-1]
            elif name.endswith("bank"):
                rows = triton_pairs._bank_rows(geometry, 1, torch.device("meta"))
                numbers = len(rows) * math.prod(tensor.shape[1:])
            elif (name, launch.name) == ("output", "bank_gradient_kernel"):
                numbers = arguments["parts"] * geometry.num_offsets * math.prod(tensor.shape[-2:])
            if (name, launch.name) == ("output", "token_gradient_kernel"):
                numbers *= 2
        total += numbers * tensor.element_size()
    return total


def programs_of(launch: Launch, option: dict[str, int]) -> int:
    return math.prod(launch.grid(option))


# Kernels over pairs: rows of products


def _rows_by_offset(launch: Launch, option: dict[str, int]) -> int:
    """Of kernels whose programs own pairs of one offset: a tile's rows, for each tile that has pairs."""
    geometry, rows = _geometry(launch.arguments), option["ROWS"]
    grid_rows = [geometry.height - abs(offset) for offset in range(geometry.least_row, geometry.most_row + 1)]
    columns = map(geometry.num_columns, range(geometry.least, geometry.most + 1))
    batch = launch.arguments["batch"]
    counts = [of_row * of_column * batch for of_column in columns for of_row in grid_rows]
    if geometry.class_row >= 0:
        patches = geometry.num_patches * batch
        # The gradient of the matrix by which a class token meets patches takes their sum.
        counts += [batch, patches, batch if launch.name == "bank_gradient_kernel" else patches]
    return sum(_padded(count, rows) for count in counts)


def _rows_by_token(launch: Launch, option: dict[str, int]) -> int:
    """Of kernels whose programs own tokens: a tile's rows, for each offset that any token of a program has."""
    arguments, geometry = launch.arguments, _geometry(launch.arguments)
    entries = launch.derived(option)["BATCH"]
    wide = option["ROWS"] // entries
    row_offsets = column_offsets = 0
    for x in range(geometry.height):
        low, high = (x - geometry.height + 1, x) if arguments["IS_QUERY"] else (-x, geometry.height - 1 - x)
        row_offsets += max(min(geometry.most_row, high) - max(geometry.least_row, low) + 1, 0)
    for y in range(0, geometry.width, wide):
        last = min(y + wide, geometry.width) - 1
        low, high = (
            (y - geometry.width + 1, last) if arguments["IS_QUERY"] else (geometry.past - last, geometry.width - 1 - y)
        )
        column_offsets += max(min(geometry.most, high) - max(geometry.least, low) + 1, 0)
    steps, tiles = row_offsets * column_offsets, geometry.height * -(-geometry.width // wide)
    if geometry.class_row >= 0:
        # Each patch meets the class token, and that itself and the patches: one by one, or their sum.
        steps += tiles + 1 + (1 if launch.name == "token_gradient_kernel" else geometry.num_patches)
    return steps * -(-arguments["batch"] // entries) * option["ROWS"]


def _columns(launch: Launch, option: dict[str, int]) -> int:
    """Columns of the tiles of all own heads."""
    arguments = launch.arguments
    return _padded(arguments["num_heads"], option["HEADS"]) * arguments["WIDTH"]


def _members(arguments: dict[str, Any]) -> int:
    """Heads of the other side that each own one meets one after the other."""
    return 1 if arguments["IS_QUERY"] else arguments["GROUPS"]


def _scores(launch: Launch, option: dict[str, int]) -> int:
    arguments = launch.arguments
    inner = sum(_padded(arguments[f"{side}_C"], option["BLOCK_C"]) for side in ("QUERY", "KEY") if arguments[f"{side}_BANK"])  # fmt: skip
    return 2 * _rows_by_offset(launch, option) * _columns(launch, option) * inner


def _inner(launch: Launch, option: dict[str, int]) -> int:
    """Depth of the products of one own head; none where the other side has no bank: its tokens themselves are weighted."""
    arguments = launch.arguments
    return _members(arguments) * _padded(arguments["C"], option["BLOCK_C"]) if arguments["BANK"] else 0


def _sum(launch: Launch, option: dict[str, int]) -> int:
    inner = _inner(launch, option)
    return 2 * _rows_by_token(launch, option) * _columns(launch, option) * inner


def _projection(launch: Launch, option: dict[str, int]) -> int:
    return 2 * _rows_by_offset(launch, option) * _columns(launch, option) * _inner(launch, option)


def _matrix(launch: Launch, option: dict[str, int]) -> int:
    """Elements of the tiles that a bank's matrix is taken in."""
    return _padded(launch.arguments["C"], option["BLOCK_C"]) * _padded(launch.arguments["OUT"], option["BLOCK_OUT"])


def _token_gradient(launch: Launch, option: dict[str, int]) -> int:
    return 2 * _rows_by_token(launch, option) * _matrix(launch, option)


def _bank_gradient(launch: Launch, option: dict[str, int]) -> int:
    return 2 * _rows_by_offset(launch, option) * _matrix(launch, option)


# Kernels with a basis: products of two vectors of a pair, and pairs


def _factors(arguments: dict[str, Any], option: dict[str, int], name: str) -> tuple[int, int]:
    """Factors of all tiles together, and of one, of `QUERY`, `KEY` or `VALUE`."""
    held = option[f"{name}_FACTORS"]
    return _padded(arguments[f"N{name[0]}"], held), held


def _weights_of_pair(arguments: dict[str, Any], option: dict[str, int]) -> int:
    """Multiplications for a pair's score and the product of its value, by the weight or an output's gradient."""
    (queries, _), (keys, _), (values, _) = (_factors(arguments, option, name) for name in ("QUERY", "KEY", "VALUE"))
    dense = arguments["D_WIDTH"] * (arguments["DENSE_SCORES"] + arguments["DENSE_VALUES"])
    return queries * keys * arguments["E_WIDTH"] + values * arguments["V_WIDTH"] + dense


def _heads(launch: Launch) -> int:
    """Heads of queries of all batch entries."""
    return math.prod(launch.arguments["query"].shape[:2])


def _pairs_of_queries(launch: Launch, option: dict[str, int]) -> int:
    """Pairs of the tiles of programs that own queries and go through the keys that they see, of one head."""
    arguments, queries, keys = launch.arguments, option["QUERIES"], option["KEYS"]
    tokens, total = arguments["tokens"], 0
    for start in range(0, arguments["queries"], queries):
        end = min(tokens, start + queries + arguments["past"]) if arguments["CAUSAL"] else tokens
        total += queries * _padded(end, keys)
    return total


def _pairs_of_keys(launch: Launch, option: dict[str, int]) -> int:
    """Pairs of the tiles of programs that own keys and go through the queries that see them, of one head."""
    arguments, queries, keys = launch.arguments, option["QUERIES"], option["KEYS"]
    total = 0
    for start in range(0, arguments["tokens"], keys):
        begin = max(start - arguments["past"], 0) if arguments["CAUSAL"] else 0
        total += keys * _padded(max(arguments["queries"] - begin, 0), queries)
    return total


def _pairs_of_offsets(launch: Launch, option: dict[str, int]) -> int:
    """Pairs of the tiles of programs that own offsets, of one head, as `coefficient_gradient_kernel` goes through them."""
    arguments, queries, keys, columns = launch.arguments, option["QUERIES"], option["KEYS"], option["COLUMNS"]
    if arguments["CLASS_PAIRS"]:
        patches = arguments["tokens"] - 1
        return (1 + -(-patches // keys) + -(-patches // queries)) * queries * keys
    blocks, rows = launch.derived(option), queries // columns
    height, width, past = (arguments[name] for name in ("height", "width", "past"))
    steps_of_rows = steps_of_columns = 0
    for row_shift in range(1 - height, height, rows):
        steps_of_rows += max(min(height, height - row_shift) - max(1 - row_shift - rows, 0), 0)
    for block in range(blocks["column_blocks"]):
        shift = (blocks["first_column_block"] + block) * columns
        first = max(-(-(past - shift - columns + 1) // keys), 0)
        steps_of_columns += max(-(-(width - max(shift, 0)) // keys) - first, 0)
    return steps_of_rows * steps_of_columns * queries * keys


def _basis_forward(launch: Launch, option: dict[str, int]) -> int:
    of_pair = _weights_of_pair(launch.arguments, option)
    return 2 * _heads(launch) * _pairs_of_queries(launch, option) * of_pair


def _query_gradient(launch: Launch, option: dict[str, int]) -> int:
    """Each part of the factors computes the weights again."""
    arguments = launch.arguments
    (queries, held), (keys, _) = (_factors(arguments, option, name) for name in ("QUERY", "KEY"))
    of_pair = _weights_of_pair(arguments, option) + held * keys * arguments["E_WIDTH"]
    of_pair += arguments["DENSE_SCORES"] * arguments["D_WIDTH"]
    return 2 * _heads(launch) * (queries // held) * _pairs_of_queries(launch, option) * of_pair


def _key_value_gradient(launch: Launch, option: dict[str, int]) -> int:
    arguments = launch.arguments
    (queries, _), (_, keys), (_, values) = (_factors(arguments, option, name) for name in ("QUERY", "KEY", "VALUE"))
    of_pair = _weights_of_pair(arguments, option)
    of_pair += queries * keys * arguments["E_WIDTH"] + values * arguments["V_WIDTH"]
    of_pair += arguments["D_WIDTH"] * (arguments["DENSE_SCORES"] + arguments["DENSE_VALUES"])
    return 2 * _heads(launch) * option["PARTS"] * _pairs_of_keys(launch, option) * of_pair


def _coefficient_gradient(launch: Launch, option: dict[str, int]) -> int:
    """What a tile has all factors for is there already: compiled code multiplies it once."""
    arguments = launch.arguments
    (queries, query), (keys, key), (values, value) = (
        _factors(arguments, option, name) for name in ("QUERY", "KEY", "VALUE")
    )
    of_pair = _weights_of_pair(arguments, option)
    if (queries, keys) != (query, key):
        of_pair += (arguments["Q_BASIS"] * query * keys + arguments["K_BASIS"] * queries * key) * arguments["E_WIDTH"]
    if values != value:
        of_pair += arguments["V_BASIS"] * value * arguments["V_WIDTH"]
    return 2 * _heads(launch) * option["PARTS"] * _pairs_of_offsets(launch, option) * of_pair


def _none(launch: Launch, option: dict[str, int]) -> int:
    """Near pairs have no matrix products."""
    return 0


# Operations of matrix products that a launch executes, padding and recomputation counted, by the name of its kernel.
EXECUTED: dict[str, Callable[[Launch, dict[str, int]], int]] = {
    "scores_kernel": _scores,
    "sum_kernel": _sum,
    "projection_kernel": _projection,
    "token_gradient_kernel": _token_gradient,
    "bank_gradient_kernel": _bank_gradient,
    "forward_kernel": _basis_forward,
    "query_gradient_kernel": _query_gradient,
    "key_value_gradient_kernel": _key_value_gradient,
    "coefficient_gradient_kernel": _coefficient_gradient,
    "near_kernel": _none,
    "near_query_gradient_kernel": _none,
    "near_key_gradient_kernel": _none,
}


def executed_operations(launch: Launch, option: dict[str, int]) -> int:
    """Of matrix products."""
    return EXECUTED[launch.name](launch, option)


def predicted_ms(operations: float, moved: float, programs: int, blocks: int) -> float:
    """The larger of the times that products and memory take at the device's rates.

    Programs start in waves; the last may leave multiprocessors idle, and takes as long as any.
    """
    at_once = max(blocks, 1) * MULTIPROCESSORS
    used = programs / (-(-programs // at_once) * at_once) if programs else 1.0
    return max(operations / PRODUCT_RATE / used, moved / MEMORY_RATE) * 1e3


def columns(launches: list[Launch], option: dict[str, int], taken: dict[str, int]) -> dict[str, Any]:
    """Operations, traffic, programs and the prediction of launches together, `taken` being what their kernel takes of a multiprocessor."""
    each = [
        (executed_operations(launch, option), moved_bytes(launch), programs_of(launch, option)) for launch in launches
    ]
    operations, moved, programs = map(sum, zip(*each, strict=True))
    return {
        "launches": len(launches),
        "programs": programs,
        "executed_gflop": operations / 1e9,
        "mbytes": moved / 1e6,
        "predicted_ms": sum(predicted_ms(*one, taken["blocks"]) for one in each),
    }


def predictions(only: str = "", cases: Iterable[Case] = TIMED, dtype: str = "bfloat16") -> Iterator[dict[str, Any]]:
    """A row for each kernel of the cases whose name has `only` in it, with the tile that the launcher chooses."""
    import triton

    common = {name: hardware()[name] for name in ("torch", "commit")} | {"triton": triton.__version__}
    for case in cases:
        if only not in case.name:
            continue
        for place, launches in alike(launches_of(case, DTYPES[dtype])).items():
            with without_gpu():
                option, taken = chosen(launches[0])
            row = {
                "case": case.name,
                "kernel": launches[0].name,
                "place": place,
                "dtype": dtype,
                "tile": json.dumps(option),
                # Of its list: tiles before it do not fit, or spill.
                "rank": launches[0].options.index(option),
            }
            yield row | taken | columns(launches, option, taken) | common

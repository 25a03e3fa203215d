"""The launches of a case: recorded without a GPU and without computing anything, compiled, and read for what they take of a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.cases import DTYPES, Case, both_passes
from translution.modeling.operators import dispatch, registration


MULTIPROCESSORS, REGISTERS, SHARED, MAX_WARPS = 132, 65536, 227 << 10, 64
ARCHITECTURE = 90


@dataclass
class Launch:
    """The arguments of `launch`; `before` are the tensors that it changed, as they were."""

    kernel: Any
    grid: Callable[[dict[str, int]], tuple[int, ...]]
    options: list[dict[str, int]]
    derived: Callable[[dict[str, int]], dict[str, Any]]
    arguments: dict[str, Any]
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def passed(self, option: dict[str, int]) -> dict[str, Any]:
        """What the kernel is called with."""
        return {**self.arguments, **self.derived(option), **option}

    @property
    def first(self) -> dict[str, Any]:
        """Its arguments with those that the first option derives."""
        return self.arguments | self.derived(self.options[0])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name; those of a tuple are numbered."""
        named: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            parts = {f"{name}[{index}]": part for index, part in enumerate(value)} if isinstance(value, tuple) else {name: value}  # fmt: skip
            named |= {one: part for one, part in parts.items() if isinstance(part, Tensor)}
        return named


@contextmanager
def intercepted(take: Callable[[Launch], None]) -> Iterator[None]:
    """Hands every launch of a kernel to `take` instead."""
    dispatch._load()

    def launch(kernel, grid, options, derived, **arguments):
        take(Launch(kernel, grid, options, derived, arguments))

    package = dispatch.__name__.rpartition(".")[0]
    users = [module for name, module in sys.modules.items() if name.startswith(package) and hasattr(module, "launch")]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield


class _RunOperators(TorchDispatchMode):
    """Runs what this package's operators do on a GPU, which for tensors without data PyTorch replaces by their shapes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        qualified = function.name()
        if qualified.partition("::")[0] == registration.namespace():
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[qualified.partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Tensors without data are served as those of a GPU are. They are on none, and know no autocast."""
    with (
        mock.patch.object(dispatch, "device_obstacle", return_value=""),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
    ):
        yield


def launches_of(case: Case, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a forward and a backward pass, of tensors without data."""
    taken: list[Launch] = []
    mixer = case.mixer("meta", dtype)
    tokens = case.tokens("meta", dtype)
    with as_on_gpu(), intercepted(taken.append), _RunOperators():
        both_passes(mixer, dispatch.TRITON, tokens, case.layout, torch.empty_like(tokens))
    return taken


class _Driver:
    """What compiling asks of a GPU's driver, for a GPU that is not there."""

    def __init__(self, backend: str = "cuda", architecture: int | str = ARCHITECTURE):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def without_gpu(backend: str = "cuda", architecture: int | str = ARCHITECTURE) -> Iterator[None]:
    """Triton compiles for a GPU that is not there."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Driver(backend, architecture))
    try:
        yield
    finally:
        driver._active = before


def compiled(launch: Launch, option: dict[str, int]) -> Any:
    """The kernel as Triton's cache has it, or compiled into it; within `without_gpu`."""
    return launch.kernel.warmup(grid=(1,), **launch.passed(option))


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, words of 4 bytes that it spills to memory, bytes of shared memory, and blocks of a multiprocessor."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    text = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return {
        "registers": registers,
        "spills": stack // 4,
        "shared": shared,
        "blocks": blocks_of(registers, shared, warps),
    }


def blocks_of(registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor of an H100 or H200 holds at once: registers are given to warps by 256, a block takes 1 KiB more."""
    of_warp = -(-registers * 32 // 256) * 256
    # A quarter of a multiprocessor has a quarter of its registers and warps.
    by_registers = 4 * (REGISTERS // 4 // of_warp) // warps
    return min(by_registers, (SHARED + 1024) // (shared + 1024), MAX_WARPS // warps, 32)


# Compiling beforehand


def stable_keys() -> None:
    """Names what Triton's cache keeps by its version, not by a hash of its own files, which another Python's build does not share."""
    import triton
    from triton.compiler import compiler
    from triton.runtime import cache

    def key() -> str:
        return triton.__version__

    for module in (compiler, cache):
        if hasattr(module, "triton_key"):
            module.triton_key = key


@dataclass(frozen=True)
class Wanted:
    """A launch to compile: of a case, by its place among the case's launches, with an option."""

    case: Case
    dtype: str
    place: int
    option: tuple[tuple[str, int], ...]


def _compile(wanted: Wanted) -> dict[str, Any]:
    """Compiles in a process of its own."""
    stable_keys()
    launch = launches_of(wanted.case, getattr(torch, wanted.dtype))[wanted.place]
    option = dict(wanted.option)
    row = {"case": wanted.case.name, "kernel": launch.name, "dtype": wanted.dtype, "tile": json.dumps(option)}
    try:
        with without_gpu():
            return row | resources(compiled(launch, option))
    except Exception as error:
        return row | {"note": first_line(error)}


def first_line(error: BaseException) -> str:
    """What a row says of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def kind_of(launch: Launch) -> tuple:
    """What Triton compiles its kernel for, and with which options."""
    from translution.modeling.kernels.launch import _problem

    tensor = next(iter(launch.tensors.values()))
    return _problem(launch.kernel, tensor.device, launch.options, launch.first)


def alike(launches: list[Launch]) -> dict[int, list[Launch]]:
    """Launches by the place of the first of those that Triton compiles the same kernel for, such as those of chunks of offsets."""
    groups: dict[tuple, tuple[int, list[Launch]]] = {}
    for place, launch in enumerate(launches):
        groups.setdefault(kind_of(launch), (place, []))[1].append(launch)
    return dict(groups.values())


def different(launches: list[Launch]) -> dict[int, Launch]:
    """The first launch of each of those that are `alike`, by its place."""
    return {place: group[0] for place, group in alike(launches).items()}


def precompile(wanted: list[Wanted], folder: Path, processes: int) -> Iterator[dict[str, Any]]:
    """Fills a folder with compiled kernels, and gives a row of what each takes as soon as it is there."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    # What a GPU loads, without the steps before: a tenth of the size.
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_compile, wanted)


def chosen(launch: Launch) -> tuple[dict[str, int], dict[str, int]]:
    """The option that the launcher takes on a GPU like this one, and what its kernel takes; within `without_gpu`.

    Raises:
        ValueError: if none fits.
    """
    from translution.modeling.kernels.launch import MAX_SPILLS

    fitting = []
    for option in launch.options:
        taken = resources(compiled(launch, option))
        if taken["shared"] <= SHARED:
            fitting.append((option, taken))
            if taken["spills"] <= MAX_SPILLS:
                return option, taken
    if not fitting:
        raise ValueError(
            f"{launch.name} must fit into {SHARED} bytes of shared memory with one of its tiles, got none."
        )
    return min(fitting, key=lambda pair: pair[1]["spills"])


def wanted_launches(only: str = "") -> list[Wanted]:
    """All that the parts launch: the checks' with the first tile of each kernel's list, and what is timed with each tile to try."""
    from gpu.cases import SMOKE, TIMED
    from gpu.tiles import candidates

    wanted: list[tuple[int, Wanted]] = []
    for dtype, cases, all_tiles in (("bfloat16", TIMED, True), *((dtype, SMOKE, False) for dtype in DTYPES)):
        for case in cases:
            if only not in case.name:
                continue
            for place, launch in different(launches_of(case, DTYPES[dtype])).items():
                for rank, option in enumerate(candidates(launch) if all_tiles else launch.options[:1]):
                    wanted.append((rank, Wanted(case, dtype, place, tuple(option.items()))))
    # What every part starts with first.
    return [one for _, one in sorted(wanted, key=lambda pair: pair[0])]


def pack(folder: Path) -> Path:
    """An archive of a folder beside it, a tenth of its size."""
    return Path(shutil.make_archive(str(folder), "xztar", folder))


def unpack(archive: Path) -> Path:
    """The folder of an archive of `pack`, beside it."""
    folder = archive.with_name(f"{archive.name.removesuffix('.tar.xz')}-unpacked")
    shutil.unpack_archive(archive, folder, "xztar", filter="data")
    return folder


def relocate(folder: Path) -> None:
    """Has the groups of files in Triton's cache name them where they are now: they name them by absolute paths."""
    for group in folder.glob("*/__grp__*.json"):
        saved = json.loads(group.read_text(encoding="utf-8"))
        saved["child_paths"] = {name: str(group.resolve().parent / Path(path).name) for name, path in saved["child_paths"].items()}  # fmt: skip
        group.write_text(json.dumps(saved), encoding="utf-8")

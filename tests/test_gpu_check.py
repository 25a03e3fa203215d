"""`scripts/gpu_check.py` as far as it runs without a GPU."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from translution.modeling.operators.pair_layout import PairLayout


pytest.importorskip("triton")

import triton_devices  # noqa: F401  # the interpreter starts kernels faster
from triton.runtime import interpreter

from translution.modeling.operators import triton_basis, triton_local, triton_pairs


without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="where there is a GPU kernels are compiled, not interpreted: run the check itself",
)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_check():
    """`scripts/gpu_check.py`."""
    return importlib.import_module("gpu_check")


@pytest.fixture
def parts(gpu_check):
    """`scripts/gpu/parts.py`."""
    return importlib.import_module("gpu.parts")


def rows_of(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def dry_run(gpu_check, path, *parts, case="local"):
    return gpu_check.main(["--dry_run", "--output", str(path), "--case", case, "--part", *parts])


@without_gpu
def test_dry_run_writes_rows_of_every_part(gpu_check, tmp_path):
    path = tmp_path / "gpu.csv"
    # `scale` starts processes, and `train` has no case of this name.
    asked = ["rates", "smoke", "time", "sweep", "verify", "train"]
    assert dry_run(gpu_check, path, *asked) == 0
    rows = rows_of(path)
    assert list(dict.fromkeys(row["part"] for row in rows)) == asked
    assert all(row["commit"] and row["torch"] == torch.__version__ and row["gpu"] == "none" for row in rows)
    assert all(row["note"].startswith("done") for row in rows if row["case"] == "end of the part")
    checks = [row for row in rows if row["error"]]
    assert {row["part"] for row in checks} == {"smoke", "time", "sweep", "verify"}
    assert all(row["ok"] == "True" and float(row["error"]) < 0.01 for row in checks)
    timed = {(row["implementation"], row["passes"]) for row in rows if row["part"] == "time" and row["median_ms"]}
    for name in ("kernels", "plain PyTorch", "flash attention"):
        assert {(name, "forward"), (name, "forward+backward")} <= timed
    kernels = {"near_kernel", "near_query_gradient_kernel", "near_key_gradient_kernel"}
    assert {row["kernel"] for row in rows if row["part"] == "time" and row["kernel"]} == kernels
    (winners,) = json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8")).values()
    assert {key.split()[0] for key in winners} == kernels


@without_gpu
def test_parts_that_run_again_replace_their_own_rows(gpu_check, tmp_path):
    path = tmp_path / "gpu.csv"
    for part in ("rates", "smoke", "rates"):
        dry_run(gpu_check, path, part)
    written = [row["part"] for row in rows_of(path)]
    assert written.count("smoke") == 2
    assert written.count("rates") == 7
    # A run that was killed while it wrote leaves a row that is not whole.
    with path.open("a", encoding="utf-8") as file:
        file.write("smoke,cut")
    dry_run(gpu_check, path, "rates")
    assert [row["part"] for row in rows_of(path)] == ["smoke"] * 2 + ["rates"] * 7


@without_gpu
def test_a_wrong_case_is_not_timed_and_others_are(gpu_check, parts, tmp_path, monkeypatch, capsys):
    both_passes = parts.both_passes

    def wrong(mixer, implementation, tokens, layout, weight):
        results = both_passes(mixer, implementation, tokens, layout, weight)
        if implementation == parts.TRITON and layout.clamp:
            results["output"][0, 0] = torch.nan
        return results

    monkeypatch.setattr(parts, "both_passes", wrong)
    monkeypatch.setattr(parts.problems, "DRY_TIMED", parts.problems.DRY_TIMED[1:])
    path = tmp_path / "gpu.csv"
    assert dry_run(gpu_check, path, "time", case="a") == 1
    rows = [row for row in rows_of(path) if row["case"] in ("basis", "local")]
    assert [row["ok"] for row in rows if row["implementation"] == "check"] == ["True", "False"]
    assert {row["case"] for row in rows if row["median_ms"]} == {"basis"}
    assert "1 of them failures" in capsys.readouterr().out


@without_gpu
def test_what_fails_is_a_row_and_is_passed_over(gpu_check, parts, tmp_path, monkeypatch):
    def fails(bench, case, dtype):
        if case.kind == "full":
            raise RuntimeError("out of resources\nand more")
        bench.row(case=case.name, ok=True)

    monkeypatch.setattr(parts, "check_small", fails)
    path = tmp_path / "gpu.csv"
    assert dry_run(gpu_check, path, "smoke", case="") == 1
    failed, passed, _ = rows_of(path)
    assert (failed["ok"], failed["note"]) == ("False", "RuntimeError: out of resources")
    assert passed["ok"] == "True"


def test_a_part_ends_when_its_time_is_over(gpu_check, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "smoke", (parts.smoke, -1.0))
    path = tmp_path / "gpu.csv"
    assert dry_run(gpu_check, path, "smoke") == 1
    (row,) = rows_of(path)
    assert row["note"].startswith("out of time")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_check, capsys):
    run_command = importlib.import_module("common.command").run_command
    with pytest.raises(SystemExit) as exit_:
        run_command(gpu_check.main, [])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no GPU")


COMPILE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "scripts")
import torch, triton
from translution.modeling.kernels.launch import MAX_SPILLS
from gpu.cases import TIMED
from gpu.model import predictions
from gpu.recording import launches_of, relocate, resources, compiled, stable_keys, without_gpu
folder = Path(sys.argv[1])
stable_keys()
cases = [case for case in TIMED if case.name == "tiny/16 kv"]
hits = []
triton.knobs.compilation.listener = lambda cache_hit, **rest: hits.append(cache_hit)
rows = list(predictions(cases=cases))
before = len(hits)
folder.rename(folder.with_name("moved"))
triton.knobs.cache.dir = str(folder.with_name("moved"))
relocate(folder.with_name("moved"))
for launch in launches_of(cases[0], torch.bfloat16):
    launch.kernel.device_caches.clear()
again = list(predictions(cases=cases))
print(json.dumps({"rows": rows, "same": rows == again, "before": hits[:before], "after": hits[before:], "most": MAX_SPILLS}))
"""


def test_kernels_compiled_beforehand_are_found_again_and_do_not_spill(tmp_path):
    """At real sizes, for a GPU that is not there; found too where the folder has moved."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "kernels")
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernels")]
    output = subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["before"]
    assert not any(found["before"])
    assert found["after"]
    assert all(found["after"])
    assert found["same"]
    assert len(found["rows"]) >= 4
    for row in found["rows"]:
        assert row["spills"] <= found["most"], row
        assert row["shared"] <= 227 << 10, row
        assert row["blocks"] >= 1, row
        assert row["predicted_ms"] > 0, row


def test_blocks_of_a_multiprocessor_are_those_of_nvidias_table(gpu_check):
    """Registers, bytes of shared memory and warps to blocks, for compute capability 9.0."""
    blocks_of = importlib.import_module("gpu.recording").blocks_of
    assert blocks_of(32, 0, 4) == 16
    assert blocks_of(255, 0, 4) == 2
    assert blocks_of(128, 0, 8) == 2
    assert blocks_of(129, 0, 8) == 1
    assert blocks_of(32, 113 << 10, 4) == 2
    assert blocks_of(32, 114 << 10, 4) == 1
    assert blocks_of(16, 0, 1) == 32


def counted_launches(monkeypatch, run):
    """The launches of `run`, each with twice the multiplications of the matrix products that Triton's interpreter was asked for."""
    recording, launching = (
        importlib.import_module("gpu.recording"),
        importlib.import_module("translution.modeling.kernels.launch"),
    )
    launch_, multiply = launching.launch, interpreter.InterpreterBuilder.create_dot
    counts, taken = [0], []

    def create_dot(self, a, b, *arguments):
        counts[-1] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return multiply(self, a, b, *arguments)

    def take(launch):
        launch_(launch.kernel, launch.grid, launch.options, launch.derived, **launch.arguments)
        taken.append((launch, counts[-1]))
        counts.append(0)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    with recording.intercepted(take):
        run()
    return taken


def assert_as_counted(taken, *names):
    executed_operations = importlib.import_module("gpu.model").executed_operations
    assert {launch.name for launch, _ in taken} == set(names)
    for launch, counted in taken:
        assert executed_operations(launch, launch.options[0]) == counted, launch.name


PAIRS = ["scores_kernel", "sum_kernel", "projection_kernel", "token_gradient_kernel", "bank_gradient_kernel"]
BASIS = ["forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel", "coefficient_gradient_kernel"]


@without_gpu
@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (PairLayout.for_image(3, 2, 3, 2, 1, class_token=False), 2),
        (PairLayout.for_image(1, 2, 1, 2), 1),
        (PairLayout.for_text(3, 3, past=1), 1),
    ],
    ids=["image", "class", "text"],
)
def test_operations_over_pairs_are_those_that_are_counted(gpu_check, layout, groups, monkeypatch):
    """Of tiles that inner sizes, heads, batches and offsets fill in part; with one bank and with two, in several chunks."""
    small = ((16, 16, 16, 2, 1),)
    monkeypatch.setattr(triton_pairs, "_TILES", {name: {4: small} for name in triton_pairs._TILES})
    batch, size, features, heads = 3, 9, 17, groups
    # What all queries of one offset project.
    monkeypatch.setattr(triton_pairs, "SCRATCH_BYTES", 4 * layout.num_queries * batch * heads * size)
    query, key = (torch.randn(batch, count, features, requires_grad=True) for count in (layout.num_queries, layout.num_tokens))  # fmt: skip
    plain = torch.randn(batch, layout.num_queries, heads * size, requires_grad=True)
    query_bank, key_bank = (
        torch.randn(layout.num_offsets, features, count * size, requires_grad=True) for count in (heads, 1)
    )

    pairs = torch.randn(batch, heads, layout.num_queries, layout.num_tokens)

    def run():
        (triton_pairs.pair_scores(query, key, query_bank, key_bank, heads, layout) * pairs).sum().backward()
        triton_pairs.pair_scores(plain, key, None, key_bank, heads, layout)
        triton_pairs.pair_values(pairs, key, key_bank, layout, groups)

    taken = counted_launches(monkeypatch, run)
    assert_as_counted(taken, *PAIRS)
    recording, model = importlib.import_module("gpu.recording"), importlib.import_module("gpu.model")
    # Chunks of offsets are launches of the same kernel; together they move what all pairs have, and banks and tokens each.
    projections = [launch for launch, _ in taken if launch.name == "projection_kernel"]
    groups_of_chunks = recording.alike(projections).values()
    assert max(map(len, groups_of_chunks)) > 1
    for chunks in groups_of_chunks:
        first = chunks[0].arguments
        # Of the image, patches in the same row: what other pairs weight is summed at once.
        pairs = layout.height * layout.width**2 if layout.clamp else int((layout.offsets()[0] >= 0).sum())
        numbers = pairs * batch * (heads + first["projections"].shape[-1])
        rows = 2 * layout.width - 1 if layout.clamp else layout.num_offsets
        fixed = len(chunks) * first["tokens"].numel() + rows * first["bank"][0].numel()
        assert sum(map(model.moved_bytes, chunks)) == 4 * (numbers + fixed)


@without_gpu
@pytest.mark.parametrize(
    ("layout", "factors", "dense", "groups"),
    [
        (PairLayout.for_image(1, 2, 1, 2), (3, 3, 3), False, 1),
        (PairLayout.for_text(18, 18, past=1), (1, 3, 5), True, 2),
    ],
    ids=["image", "text"],
)
def test_operations_with_a_basis_are_those_that_are_counted(gpu_check, layout, factors, dense, groups, monkeypatch):
    """Of tiles that do not hold all factors: compiled code takes products that a tile has already, and an interpreter does not."""
    small = ((32, 32, 2, 4, 1),)
    monkeypatch.setattr(triton_basis, "_TILES", {name: {4: small} for name in triton_basis._TILES})
    lengths = (layout.num_queries, layout.num_tokens, layout.num_tokens)
    heads = (groups, 1, 1)

    def tensor(*shape):
        return torch.randn(*shape, requires_grad=True)

    tokens = [tensor(1, *shape, 5) for shape in zip(heads, factors, lengths, strict=True)]
    coefficients = [tensor(layout.num_offsets, number) if number > 1 else None for number in factors]
    denses = [tensor(1, *shape, 20) if dense else None for shape in zip(heads, lengths, strict=True)]

    def run():
        outputs = triton_basis.basis_attention(*tokens, *coefficients, *denses, None, 0.5, layout)
        sum(output.sum() for output in outputs if output is not None).backward()

    assert_as_counted(counted_launches(monkeypatch, run), *BASIS)


def test_every_kernel_has_a_formula_for_every_case(gpu_check):
    model, recording, cases = (importlib.import_module(f"gpu.{name}") for name in ("model", "recording", "cases"))
    modules = (triton_pairs, triton_basis, triton_local)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert set(model.EXECUTED) == kernels
    started = set()
    for case in cases.TIMED:
        for launches in recording.alike(recording.launches_of(case, torch.bfloat16)).values():
            option = launches[0].options[0]
            row = model.columns(launches, option, {"blocks": 1})
            started.add(launches[0].name)
            assert (row["executed_gflop"] > 0) == (
                not launches[0].name.startswith("near") and launches[0].arguments.get("BANK", True)
            ), (case.name, launches[0].name)
            assert row["predicted_ms"] > 0
    assert started == kernels


def test_an_archive_of_kernels_is_loaded_from_where_it_is(gpu_check, tmp_path, monkeypatch):
    recording = importlib.import_module("gpu.recording")
    # Undone at the end.
    monkeypatch.setattr(recording, "stable_keys", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    folder = tmp_path / "kernels"
    (folder / "KEY").mkdir(parents=True)
    (folder / "triton.json").write_text('{"triton": "3.6.0"}', encoding="utf-8")
    (folder / "KEY" / "some_kernel.cubin").write_bytes(b"code")
    group = {"child_paths": {"some_kernel.cubin": "/elsewhere/KEY/some_kernel.cubin"}}
    (folder / "KEY" / "__grp__some_kernel.json").write_text(json.dumps(group), encoding="utf-8")
    archive = recording.pack(folder)
    gpu_check.use_compiled(archive, "3.6.0")
    unpacked = Path(os.environ["TRITON_CACHE_DIR"])
    assert unpacked != folder
    (named,) = json.loads((unpacked / "KEY" / "__grp__some_kernel.json").read_text(encoding="utf-8"))[
        "child_paths"
    ].values()
    assert Path(named) == unpacked / "KEY" / "some_kernel.cubin"
    assert Path(named).read_bytes() == b"code"
    with pytest.raises(ValueError, match=r"`--compiled` must be made with Triton 3\.9\.0, got 3\.6\.0"):
        gpu_check.use_compiled(archive, "3.9.0")


def test_tiles_to_try_are_few_different_and_ones_that_a_kernel_takes(gpu_check):
    recording, cases, tiles = (importlib.import_module(f"gpu.{name}") for name in ("recording", "cases", "tiles"))
    for case in cases.TIMED:
        for launch in recording.different(recording.launches_of(case, torch.bfloat16)).values():
            tried = tiles.candidates(launch)
            assert tried[0] == launch.options[0]
            assert 2 <= len(tried) <= tiles.MOST
            assert len({tuple(option.items()) for option in tried}) == len(tried)
            assert all(option.keys() == tried[0].keys() for option in tried)
            assert all(value & (value - 1) == 0 for option in tried for value in option.values() if value != 3)

"""The benchmark on tiny shapes: it stops where a result is wrong, and writes what it says. Nothing is asserted of times."""

import argparse
import csv
import math
import sys

import pytest
import torch

from translution.modeling.operators.pair_layout import PairLayout


pytest.importorskip("matplotlib")
import benchmark
import benchmarks.length as benchmark_length
import benchmarks.models as benchmark_models
import benchmarks.operator as benchmark_operator
from benchmarks.measuring import FIELDS, peak_memory, spread, stop_if_wrong, worst_error


CASES = (
    benchmark_operator.Case("image", PairLayout.for_image(3, 2, 3, 2), 12, 2, "qkv"),
    benchmark_operator.Case("text", PairLayout.for_text(5, 5), 12, 2, "kv"),
)
ALL = argparse.Namespace(repeats=1, lengths=[40], patience=5.0, memory=1000.0)


def test_operators_agree_and_are_timed(monkeypatch):
    monkeypatch.setattr(benchmark_operator, "CASES", CASES)
    rows = list(benchmark_operator.operator_suite(ALL))
    assert {row["implementation"] for row in rows} == {"floor", "grouped", "streamed"}
    assert len(rows) == 2 * 2 * 3
    assert all(row["error"] < 1e-5 for row in rows if row["implementation"] != "floor")
    assert all(set(row) <= set(FIELDS) for row in rows)


def test_bfloat16_is_allowed_its_rounding(monkeypatch):
    monkeypatch.setattr(benchmark_operator, "CASES", [CASES[0]._replace(dtype=torch.bfloat16)])
    rows = list(benchmark_operator.operator_suite(ALL))
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert all(1e-4 < row["error"] < 2e-2 for row in rows if row["implementation"] != "floor")


@pytest.mark.parametrize("name", list(benchmark_operator.IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=["image", "text"])
def test_every_implementation_is_right(name, case):
    _, layout, hidden, batch, projections, _ = case
    tokens = torch.randn(batch, layout.num_tokens, hidden, dtype=torch.float64, requires_grad=True)
    banks = {
        one: torch.randn(layout.num_offsets, hidden, hidden, dtype=torch.float64).requires_grad_()
        for one in projections
    }
    assert benchmark_operator.verify([name], tokens, banks, layout)[name] < 1e-12


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark_operator, "CASES", CASES)
    right = benchmark_operator.IMPLEMENTATIONS["streamed"]
    monkeypatch.setitem(benchmark_operator.IMPLEMENTATIONS, "streamed", lambda *args: right(*args) * 1.001)
    with pytest.raises(SystemExit, match="streamed is wrong"):
        list(benchmark_operator.operator_suite(ALL))


class WrongGradient(torch.autograd.Function):
    """Passes on as it is; the gradient comes back changed."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_gradient_is_not_timed(factor, monkeypatch):
    monkeypatch.setattr(benchmark_operator, "CASES", CASES)
    right = benchmark_operator.IMPLEMENTATIONS["streamed"]
    wrong = lambda *args: WrongGradient.apply(right(*args), factor)  # noqa: E731
    monkeypatch.setitem(benchmark_operator.IMPLEMENTATIONS, "streamed", wrong)
    with pytest.raises(SystemExit, match="streamed is wrong"):
        list(benchmark_operator.operator_suite(ALL))


@pytest.mark.parametrize("factor", [1.0, 1.001, float("nan")])
def test_gradients_too_large_for_the_reference_are_its_slopes(factor, monkeypatch):
    monkeypatch.setattr(benchmark_operator, "CASES", CASES)
    monkeypatch.setattr(benchmark_operator, "REFERENCE_ELEMENTS", 0)
    benchmark_operator.check_slopes.cache_clear()
    right = benchmark_operator.IMPLEMENTATIONS["grouped"]
    wrong = lambda *args: WrongGradient.apply(right(*args), factor)  # noqa: E731
    monkeypatch.setitem(benchmark_operator.IMPLEMENTATIONS, "grouped", wrong)
    if factor == 1:
        assert all(row["error"] < 1e-5 for row in benchmark_operator.operator_suite(ALL) if row.get("error"))
    else:
        with pytest.raises(SystemExit, match="grouped, gradient of tokens, is wrong"):
            list(benchmark_operator.operator_suite(ALL))


def test_an_error_that_is_no_number_counts():
    right = torch.ones(2)
    assert math.isnan(worst_error([right, right * float("nan"), right], [right] * 3))
    with pytest.raises(SystemExit):
        stop_if_wrong("it", float("nan"))


def test_the_floor_has_a_row_for_each_pair_of_patches(monkeypatch):
    layout, products = PairLayout.for_image(3, 4, 3, 4), []
    banks = [torch.randn(layout.num_offsets, 5, 5) for _ in range(2)]
    floor = benchmark_operator.bare_products(2, banks, layout)
    product = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda left, *args, **kwargs: products.append(left) or product(left, *args, **kwargs)
    )
    floor(False)
    # Two images and two banks; what a class token gives to all patches is one row, as is what it gives to itself.
    assert sum(len(left) for left in products) == 2 * 2 * (12 * 12 + 12 + 1 + 1)
    assert len(products) == 2 * layout.num_offsets
    products.clear()
    floor(True)
    assert len(products) == 4 * 2 * layout.num_offsets


def test_the_floor_of_a_distance_has_a_row_for_each_token_of_a_matrix(monkeypatch):
    layout, products = PairLayout.for_image(5, 4, 5, 4, 1), []
    floor = benchmark_operator.bare_products(1, [torch.randn(layout.num_offsets, 5, 5)], layout)
    product = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda left, *args, **kwargs: products.append(left) or product(left, *args, **kwargs)
    )
    floor(False)
    # Offset 0 takes all tokens; -1 and 1, for which all distances beyond stand too, all rows or columns but one.
    expected = [
        (5 - abs(row_offset)) * (4 - abs(column_offset)) for row_offset in (-1, 0, 1) for column_offset in (-1, 0, 1)
    ]
    assert [len(left) for left in products] == [*expected, 1, 20, 1]


@pytest.mark.parametrize("fields", benchmark_models.VARIANTS.values(), ids=list(benchmark_models.VARIANTS))
def test_layers_are_verified(fields):
    assert benchmark_models.verify_mixer(fields) < 1e-10


@pytest.fixture
def short(monkeypatch):
    """Far pairs, and little work."""
    monkeypatch.setattr(benchmark_length, "VERIFIED_LENGTH", 36)
    monkeypatch.setattr(benchmark_length, "HIDDEN", 48)


def test_lengths_are_written_and_drawn(tmp_path, short):
    results, picture = tmp_path / "results.csv", tmp_path / "picture.png"
    threads = str(torch.get_num_threads())
    benchmark.main(
        [
            "--suite",
            "length",
            "--lengths",
            "36",
            "40",
            "--repeats",
            "1",
            "--threads",
            threads,
            "--output",
            str(results),
        ]
    )
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {*benchmark_length.VARIANTS, "floor: projections", "floor: attention"}
    assert {(row["case"], row["implementation"], row["passes"]) for row in rows} == {
        (f"text, L {length}, C 48, B 1, kv", name, passes)
        for length in (36, 40)
        for name in names
        for passes in ("forward", "forward+backward")
    }
    for row in rows:
        assert float(row["lower_quartile_ms"]) <= float(row["median_ms"]) <= float(row["upper_quartile_ms"])
    benchmark.main(["--output", str(results), "--picture", str(picture)])
    assert picture.stat().st_size > 1000
    with pytest.raises(SystemExit):
        benchmark.main(["--picture", str(picture)])


def test_a_mixer_that_needs_too_much_is_left_out(short):
    options = argparse.Namespace(repeats=1, lengths=[36], patience=5.0, memory=1.0)
    names = {row["implementation"] for row in benchmark_length.length_suite(options)}
    assert "full" not in names
    assert {"attention", benchmark_length.DISTANT} <= names


def test_patience_ends(short):
    options = argparse.Namespace(repeats=1, lengths=[34, 36, 38], patience=1e-9, memory=1000.0)
    assert {row["case"] for row in benchmark_length.length_suite(options)} == {"text, L 34, C 48, B 1, kv"}


def test_columns_of_one_and_of_several_times():
    assert spread([3.0]) == {"median_ms": 3.0, "lower_quartile_ms": 3.0, "upper_quartile_ms": 3.0, "repeats": 1}
    several = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (several["median_ms"], several["repeats"]) == (3.0, 5)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory is read from /proc, which Linux alone has"
)
def test_peak_memory_is_what_a_run_takes():
    peak = peak_memory(lambda: torch.ones(2**25))
    if peak is None:
        pytest.skip("this Linux lets no process reset its peak memory: /proc/self/clear_refs cannot be written")
    assert 120 < peak < 200  # 128 MiB

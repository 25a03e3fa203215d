"""The study counts right, compares alike, and goes on where it was stopped.

The figures of a run that is repeated are the same to the last digit: both are trained in one thread of the same process.
"""

import argparse
import math
from dataclasses import replace

import pandas as pd
import pytest
import study
import torch
from closeness import assert_close_in_rounding
from studies import runs as study_runs
from studies.examples import cut, digits_of, held_out_blocks, image_batches, text_batches
from studies.report import MARKERS, Comparison, equal_size_table, results_table, write_between_markers
from studies.rows import read_rows
from studies.runs import TASKS, Run, best_learning_rates, forward_flops, key_of, plan_tuning
from studies.settings import COMPARISONS, DYNAMIC, LEARNING_RATES, SETTINGS, Settings
from studies.variants import STUDIES, VARIANTS, ShortConvolution, build, count_parameters, model_fields
from torch.utils.flop_counter import FlopCounterMode
from training.digits import DigitCanvases


@pytest.fixture
def small(monkeypatch):
    """Settings and variants of a study of seconds."""
    names = ("attention, rotary", "full kv", "basis 8 kv", "attention, rotary, as basis 8 kv")
    for task in TASKS:
        kept = [one for one in VARIANTS[task] if one.name in names]
        monkeypatch.setitem(VARIANTS, task, kept)
        monkeypatch.setitem(LEARNING_RATES, task, (1e-3, 2e-3))
    monkeypatch.setattr(study_runs, "RATES_BEYOND", 0)
    return Settings(
        image_epochs=1,
        train_digits=64,
        test_digits=40,
        text_steps=2,
        text_batch=4,
        text_lengths=(8, 16),
        vocab_size=300,
        train_files=2,
        held_out_files=1,
        held_out_blocks=64,
    )


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        study="mixers",
        variants=None,
        output=tmp_path / "results" / "study.csv",
        tasks=["images", "text"],
        seeds=2,
        text_seeds=1,
        tuning_seeds=1,
        threads=1,
        processes=1,
        limit_minutes=None,
    )


def variant(task, name):
    return next(one for one in VARIANTS[task] if one.name == name)


def eager_flops(model, inputs):
    """What the counter sees by itself on the path that is made of PyTorch's own operators."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_study_goes_on_where_it_was_stopped(small, args):
    study.run_study(args, small)
    rows = read_rows(args.output)
    # Of each task 4 variants: 2 learning rates of one seed, then 2 seeds of images and 1 of text in 2 lengths.
    assert len(rows) == 2 * 4 * 2 + 4 * 2 + 4 * 2
    assert len({key_of(row) for row in rows}) == len(rows)
    for row in rows:
        measured = list(COMPARISONS) if row["task"] == "images" else ["perplexity"]
        measured = [DYNAMIC] if (row["task"], row["stage"]) == ("images", "tuning") else measured
        assert {name for name in [*COMPARISONS, "perplexity"] if row[name]} == set(measured)
        assert float(row["train_seconds"]) > 0
        assert row["commit"]

    whole = args.output.read_bytes()
    study.run_study(args, small)
    assert args.output.read_bytes() == whole

    # Killed in the middle of its last line, it does that run again, and no other.
    args.output.write_bytes(whole[:-20])
    assert len(read_rows(args.output)) == len(rows) - 1
    study.run_study(args, small)
    again = read_rows(args.output)
    assert [key_of(row) for row in again] == [key_of(row) for row in rows]
    assert again[:-1] == rows[:-1]
    assert again[-1]["perplexity"] == rows[-1]["perplexity"]

    text = study.write_report(study.plan_tests(args, small), args.output)
    assert "| basis 8 kv |" in text
    assert "| model | parameters | dynamic → dynamic | attention |" in text
    assert args.output.with_suffix(".md").read_text(encoding="utf-8") == text
    assert args.output.with_suffix(".png").stat().st_size > 10_000


def test_study_stops_in_time(small, args):
    args.limit_minutes = 0.0
    study.run_study(args, small)
    assert read_rows(args.output) == []
    assert study.plan_tests(args, small) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tuning_seeds", "0"], "`tuning_seeds` must be an integer of at least 1, got 0"),
        (["--processes", "0"], "`processes` must be an integer of at least 1, got 0"),
        (["--seeds", "-1"], "`seeds` must be an integer of at least 0, got -1"),
        (["--variants", "kv, D 1"], "got 'kv, D 1'"),
        (["--study", "local", "--only", "text", "--variants", "local kv, D 1, shared"], "of text they leave no model"),
        (["--only", "images", "--seeds", "0"], "of no task they leave no model"),
    ],
)
def test_options_that_train_nothing_are_refused(options, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        study.parse_arguments(options)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_a_task_without_seeds_is_left_out():
    assert study.parse_arguments(["--seeds", "0"]).tasks == ["text"]
    assert study.parse_arguments([]).tasks == ["images", "text"]


def tuned(run, best):
    """The row of a tuning run of a task whose loss is least at the learning rate `best`."""
    loss = abs(math.log2(run.learning_rate / best))
    figures = {DYNAMIC: "", "perplexity": 50 + loss} if run.task == "text" else {DYNAMIC: 50 - loss, "perplexity": ""}
    return {**run.identity(), **{name: str(figure) for name, figure in figures.items()}}


@pytest.mark.parametrize("task", ["images", "text"])
@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3]),
        (16e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
        (0.5e-3, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3]),
        # Beyond what it tries at most.
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
    ],
)
def test_tuning_goes_on_beyond_the_rate_at_the_edge(task, best, rates, small, monkeypatch):
    monkeypatch.setattr(study_runs, "RATES_BEYOND", 3)
    monkeypatch.setitem(LEARNING_RATES, task, (1e-3, 2e-3, 4e-3))
    rows, planned = [], None
    while (now := plan_tuning([task], 2, small, VARIANTS, rows)) != planned:
        planned = now
        rows = [tuned(run, best) for run in planned]
    assert len(planned) == len(set(planned)) == 2 * len(VARIANTS[task]) * len(rates)
    for one in VARIANTS[task]:
        assert sorted({run.learning_rate for run in planned if run.variant is one}) == pytest.approx(rates)
    assert [run.seed for run in planned] == sorted(run.seed for run in planned)
    chosen = best_learning_rates(planned, rows)
    assert set(chosen.values()) == {min(rates, key=lambda rate: abs(math.log2(rate / best)))}
    assert set(chosen) == {(task, one.name) for one in VARIANTS[task]}


def test_a_rate_is_chosen_by_the_mean_over_seeds_that_have_all_rates(small, monkeypatch):
    monkeypatch.setattr(study_runs, "RATES_BEYOND", 1)
    monkeypatch.setitem(LEARNING_RATES, "text", (1e-3, 2e-3, 4e-3))
    one = {"text": VARIANTS["text"][:1]}
    planned = plan_tuning(["text"], 2, small, one)
    perplexities = {
        (100, 1e-3): 10,
        (101, 1e-3): 90,
        (100, 2e-3): 40,
        (101, 2e-3): 42,
        (100, 4e-3): 50,
        (101, 4e-3): 30,
    }
    rows = [{**tuned(run, 1e-3), "perplexity": str(perplexities[run.seed, run.learning_rate])} for run in planned]
    assert list(best_learning_rates(planned, rows).values()) == [4e-3]
    assert best_learning_rates(planned, rows[:-1]) == {}
    diverged = [{**row, "perplexity": "nan"} if row["learning_rate"] == "0.004" else row for row in rows]
    assert list(best_learning_rates(planned, diverged).values()) == [2e-3]
    # A rate beyond the edge counts once it has a row of every seed.
    further = plan_tuning(["text"], 2, small, one, rows)
    assert {run.learning_rate for run in further} == {1e-3, 2e-3, 4e-3, 8e-3}
    beyond = [{**tuned(run, 1e-3), "perplexity": "20"} for run in further if run.learning_rate == 8e-3]
    assert list(best_learning_rates(further, rows + beyond[:1]).values()) == [4e-3]
    assert list(best_learning_rates(further, rows + beyond).values()) == [8e-3]


def test_other_settings_are_other_rows(small):
    def key(**changes):
        run = Run("images", VARIANTS["images"][0], 0, 1e-3, small)
        return key_of(replace(run, **changes).identity())

    keys = [key(), key(seed=1), key(learning_rate=2e-3), key(stage="tuning")]
    keys += [key(settings=replace(small, **change)) for change in ({"image_epochs": 2}, {"weight_decay": 0.1})]
    assert len(set(keys)) == len(keys)


def test_files_of_other_columns_are_refused(args):
    args.output.parent.mkdir()
    args.output.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        read_rows(args.output)


@pytest.mark.parametrize("stage", ["tuning", "test"])
def test_nothing_is_measured_on_what_is_trained_on(stage):
    settings = SETTINGS
    digits, held_out = digits_of(stage, settings)
    seen = {image.numpy().tobytes() for image in digits.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)
    _, test = digits_of("test", settings)
    tested = {image.numpy().tobytes() for image in test.images}
    assert stage == "test" or not any(
        image.numpy().tobytes() in tested for image in [*digits.images, *held_out.images]
    )


def test_lengths_read_the_same_text_and_tuning_another():
    tokens = torch.arange(128 * 50)
    settings = replace(SETTINGS, held_out_blocks=16)
    short, long = (held_out_blocks(tokens, length, "test", settings) for length in (64, 128))
    assert torch.equal(short.flatten(), long.flatten())
    assert not set(short.flatten().tolist()) & set(held_out_blocks(tokens, 64, "tuning", settings).flatten().tolist())


@pytest.mark.parametrize("task", ["images", "text"])
def test_same_seed_means_same_examples(task, small):
    if task == "images":
        digits, _ = digits_of("test", small)
        first, second, other = (
            list(image_batches(DigitCanvases(digits, "dynamic", seed), seed, 3, 48)) for seed in (0, 0, 1)
        )
    else:
        blocks = cut(torch.arange(80), 8)
        first, second, other = (list(text_batches(blocks, seed, 3, 6)) for seed in (0, 0, 1))
    assert len(first) == 3
    for one, same, different in zip(first, second, other, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], different[name]) for name in one)


@pytest.mark.parametrize(("task", "length"), [("images", None), ("text", 64), ("text", 128)])
def test_widened_attention_has_as_many_parameters(task, length):
    for one in VARIANTS[task]:
        if one.widened_to is None:
            continue
        fields = model_fields(task, one, length)
        target = count_parameters(
            model_fields(task, variant(task, one.widened_to), length),
        )
        assert count_parameters(fields) == pytest.approx(target, rel=0.03)
        narrow = model_fields(task, variant(task, one.name.split(", as ")[0]), length)
        assert fields["num_hidden_layers"] == narrow["num_hidden_layers"]
        assert fields["hidden_size"] == fields["head_dim"] * fields["num_attention_heads"] > narrow["hidden_size"]


@pytest.mark.parametrize(
    "name",
    ["attention, rotary", "attention, relative bias", "convolution", "full qkv", "full kv", "LoR kv", "rotary LoR kv"],
)
def test_flops_are_those_the_readable_path_does(name):
    model = build(model_fields("images", variant("images", name)))
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert forward_flops(model, inputs) == eager_flops(model, inputs)


def test_flops_by_hand():
    hidden, inner, mlp, tokens, layers, patch = 48, 48, 192, 17, 3, 48
    rest = 2 * (tokens - 1) * patch * hidden + layers * 2 * tokens * 2 * hidden * mlp + 2 * hidden * 10
    linear = 2 * tokens * hidden * inner
    products = 2 * 2 * tokens**2 * inner
    expected = {
        "attention, rotary": rest + layers * (4 * linear + products),
        # Each pair's key and value is a vector times the matrix of the pair's offset.
        "full kv": rest + layers * (2 * linear + products + 2 * 2 * tokens**2 * hidden * inner),
        # Each of 8 factors projects keys and values once a token, and makes both products of attention.
        "basis 8 kv": rest + layers * (2 * linear + 8 * (2 * linear + products)),
    }
    for name, flops in expected.items():
        model = build(model_fields("images", variant("images", name)))
        assert forward_flops(model, {"pixel_values": torch.randn(1, 3, 16, 16)}) == flops


def test_flops_of_text_leave_out_the_future():
    length, hidden, layers, mlp, vocab = 64, 64, 2, 256, 1024
    rest = 2 * length * hidden * vocab + layers * 2 * length * 2 * hidden * mlp
    pairs = length * (length + 1) // 2
    expected = rest + layers * (2 * 2 * length * hidden**2 + 2 * 2 * pairs * (hidden**2 + hidden))
    model = build(model_fields("text", variant("text", "full kv"), length))
    assert forward_flops(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)}) == expected


def test_tables_follow_from_the_rows():
    """Two seeds of a Translution and of attention of nearly its size; a third model is too large to compare, a fourth too small."""

    def comparison(translution, attention, higher_is_better=True, least=840):
        models = [("full kv", "full", 1000, None, translution)]
        models += [("attention, rotary, as full kv", "attention, widened", 1020, "full kv", attention)]
        models += [("attention, absolute, as full kv", "attention, widened", 1040, "full kv", attention)]
        models += [
            ("attention, rotary, as full v", "attention, widened", least, "full v", [value + 1 for value in attention])
        ]
        rows = [
            {
                "variant": name,
                "seed": seed,
                "family": family,
                "parameters": parameters,
                "widened_to": target,
                "forward_flops": 2_000_000,
                "cpu_seconds": 3.0,
                "learning_rate": "0.001",
                **dict.fromkeys([*COMPARISONS, "perplexity"], value),
            }
            for name, family, parameters, target, values in models
            for seed, value in enumerate(values)
        ]
        column = DYNAMIC if higher_is_better else "perplexity"
        return Comparison("Title", pd.DataFrame(rows), column, higher_is_better)

    def interval(one, other, unit=""):
        # Two differences: Student's t of one degree of freedom is Cauchy's, and their standard error half of what they differ by.
        reach = math.tan(math.pi * 0.475) * abs(one - other) / 2
        return f"{(one + other) / 2 - reach:+.1f} … {(one + other) / 2 + reach:+.1f}{unit}"

    for values, others, gain, differences in (
        ([3, 5], [1, 2], "+2.5", (2, 3)),
        ([3, 5], [4, 9], "-2.5", (-1, -4)),
        ([1, 2], [2, 9], "-4.0", (-1, -7)),
    ):
        (line,) = equal_size_table(comparison(values, others)).itertuples(index=False)
        assert (line[0], line[3], line[1], line[4]) == ("full kv", "rotary", "1,000", "1,020")
        assert line[-2:] == (gain, interval(*differences))
    # A smaller model that is better.
    (line,) = equal_size_table(comparison([3, 5], [1, 2], least=860)).itertuples(index=False)
    assert (line[4], line[-2]) == ("860", "+1.5")
    (line,) = equal_size_table(comparison([40, 60], [80, 100], False)).itertuples(index=False)
    assert line[-2:] == ("+45.0 %", interval(50, 40, " %"))
    # The standard deviation of two values is their difference over the root of 2.
    assert line[2] == f"50.0 ± {20 / 2**0.5:.1f}"
    first = next(results_table(comparison([3, 5], [1, 2])).itertuples(index=False))
    assert first[:5] == ("full kv", "1,000", "2.0", "1.5", "0.001")


def test_report_leaves_the_text_around_its_tables_alone(tmp_path):
    page = tmp_path / "study.md"
    page.write_text(f"before\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n")
    for text in ("new\n", "newer\n"):
        write_between_markers(page, text)
        assert page.read_text() == f"before\n\n{MARKERS[0]}\n\n{text}\n{MARKERS[1]}\n\nafter\n"
    page.write_text("before\n")
    with pytest.raises(ValueError, match="must have the markers"):
        write_between_markers(page, "new\n")
    assert page.read_text() == "before\n"


def test_short_convolutions_are_causal_sums_and_begin_as_attention():
    convolution = ShortConvolution(3, 4).double()
    tokens = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(convolution(tokens), tokens)
    torch.nn.init.normal_(convolution.weight)
    expected = torch.zeros_like(tokens)
    for here in range(5):
        for back in range(min(4, here + 1)):
            expected[:, here] += tokens[:, here - back] * convolution.weight[:, 0, 3 - back]
    torch.testing.assert_close(convolution(tokens), expected)

    name = "rotary, short convolutions"
    short = next(one for one in STUDIES["local"]["text"] if one.name == name)
    fields = model_fields("text", short, 8, 50)
    model = build(fields)
    assert len([module for module in model.modules() if isinstance(module, ShortConvolution)]) == 3 * 2
    plain = build({key: value for key, value in fields.items() if key != "short_convolution"})
    plain.load_state_dict(
        {
            key.replace("_proj.0.", "_proj."): value
            for key, value in model.state_dict().items()
            if "_proj.1." not in key
        }
    )
    ids = torch.randint(50, (2, 8))
    assert_close_in_rounding(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)

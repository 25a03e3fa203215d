"""The study counts right, compares alike, and goes on where it was stopped."""

import argparse
import importlib
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def study():
    """`scripts/study.py`."""
    return importlib.import_module("study")


@pytest.fixture
def small(study, monkeypatch):
    """Settings and variants of a study of seconds."""
    names = ("attention, rotary", "full kv", "basis 8 kv", "attention, rotary, as basis 8 kv")
    kept = {task: [one for one in study.VARIANTS[task] if one.name in names] for task in study.TASKS}
    monkeypatch.setattr(study, "VARIANTS", kept)
    monkeypatch.setattr(study, "TEXT_LENGTHS", (8, 16))
    monkeypatch.setattr(study, "LEARNING_RATES", {"images": (1e-3, 2e-3), "text": (1e-3, 2e-3)})
    return replace(importlib.import_module("demo").QUICK, text_batch=4)


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        output=tmp_path / "results" / "study.csv",
        tasks=["images", "text"],
        seeds=2,
        text_seeds=1,
        tuning_seeds=1,
        threads=1,
        processes=1,
        limit_minutes=None,
    )


def variant(study, task, name):
    return next(one for one in study.VARIANTS[task] if one.name == name)


def eager_flops(model, inputs):
    """What the counter sees by itself on the path that is made of PyTorch's own operators."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_study_goes_on_where_it_was_stopped(study, small, args):
    study.run_study(args, small)
    rows = study.read_rows(args.output)
    # Of each task 4 variants: 2 learning rates of one seed, then 2 seeds of images and 1 of text in 2 lengths.
    assert len(rows) == 2 * 4 * 2 + 4 * 2 + 4 * 2
    assert len({study.key_of(row) for row in rows}) == len(rows)
    for row in rows:
        measured = list(study.COMPARISONS) if row["task"] == "images" else ["perplexity"]
        measured = [study.DYNAMIC] if (row["task"], row["stage"]) == ("images", "tuning") else measured
        assert {name for name in [*study.COMPARISONS, "perplexity"] if row[name]} == set(measured)
        assert float(row["train_seconds"]) > 0
        assert row["commit"]

    whole = args.output.read_bytes()
    study.run_study(args, small)
    assert args.output.read_bytes() == whole

    # Killed in the middle of its last line, it does that run again, and no other.
    args.output.write_bytes(whole[:-20])
    assert len(study.read_rows(args.output)) == len(rows) - 1
    study.run_study(args, small)
    again = study.read_rows(args.output)
    assert [study.key_of(row) for row in again] == [study.key_of(row) for row in rows]
    assert again[:-1] == rows[:-1]
    assert again[-1]["perplexity"] == rows[-1]["perplexity"]

    text = study.write_report(study.plan_tests(args, small), args.output)
    assert "| basis 8 kv |" in text
    assert "best Translution against rotary attention of equal parameters" in text
    assert args.output.with_suffix(".md").read_text(encoding="utf-8") == text
    assert args.output.with_suffix(".png").stat().st_size > 10_000


def test_study_stops_in_time(study, small, args):
    args.limit_minutes = 0.0
    study.run_study(args, small)
    assert study.read_rows(args.output) == []
    assert study.plan_tests(args, small) == []


def test_other_settings_are_other_rows(study, small):
    def key(**changes):
        run = study.Run("images", study.VARIANTS["images"][0], 0, 1e-3, small)
        return study.key_of(replace(run, **changes).identity())

    keys = [key(), key(seed=1), key(learning_rate=2e-3), key(stage="tuning")]
    keys += [key(settings=replace(small, **change)) for change in ({"image_epochs": 2}, {"weight_decay": 0.1})]
    assert len(set(keys)) == len(keys)


def test_files_of_other_columns_are_refused(study, args):
    args.output.parent.mkdir()
    args.output.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        study.read_rows(args.output)


@pytest.mark.parametrize("stage", ["tuning", "test"])
def test_nothing_is_measured_on_what_is_trained_on(study, stage):
    settings = study.SETTINGS
    digits, held_out = study.digits_of(stage, settings)
    seen = {image.numpy().tobytes() for image in digits.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)
    _, test = study.digits_of("test", settings)
    tested = {image.numpy().tobytes() for image in test.images}
    assert stage == "test" or not any(
        image.numpy().tobytes() in tested for image in [*digits.images, *held_out.images]
    )


def test_lengths_read_the_same_text_and_tuning_another(study):
    tokens = torch.arange(128 * 50)
    settings = replace(study.SETTINGS, held_out_blocks=16)
    short, long = (study.held_out_blocks(tokens, length, "test", settings).blocks for length in (64, 128))
    assert torch.equal(short.flatten(), long.flatten())
    assert not set(short.flatten().tolist()) & set(
        study.held_out_blocks(tokens, 64, "tuning", settings).blocks.flatten().tolist()
    )


@pytest.mark.parametrize("task", ["images", "text"])
def test_same_seed_means_same_examples(study, task, small):
    if task == "images":
        digits, _ = study.digits_of("test", small)
        first, second, other = (
            list(study.image_batches(study.DigitCanvases(digits, "dynamic", seed), seed, 3, 48)) for seed in (0, 0, 1)
        )
    else:
        blocks = study.TokenBlocks(torch.arange(80), 8)
        first, second, other = (list(study.text_batches(blocks, seed, 3, 6)) for seed in (0, 0, 1))
    assert len(first) == 3
    for one, same, different in zip(first, second, other, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], different[name]) for name in one)


@pytest.mark.parametrize(("task", "length"), [("images", None), ("text", 64), ("text", 128)])
def test_widened_attention_has_as_many_parameters(study, task, length):
    for one in study.VARIANTS[task]:
        if one.widened_to is None:
            continue
        fields = study.model_fields(task, one, length)
        target = study.count_parameters(
            study.model_fields(task, variant(study, task, one.widened_to), length),
        )
        assert study.count_parameters(fields) == pytest.approx(target, rel=0.03)
        narrow = study.model_fields(task, variant(study, task, one.name.split(", as ")[0]), length)
        assert fields["num_hidden_layers"] == narrow["num_hidden_layers"]
        assert fields["hidden_size"] == fields["head_dim"] * fields["num_attention_heads"] > narrow["hidden_size"]


@pytest.mark.parametrize(
    "name",
    ["attention, rotary", "attention, relative bias", "convolution", "full qkv", "full kv", "LoR kv", "rotary LoR kv"],
)
def test_flops_are_those_the_readable_path_does(study, name):
    model = study.build(study.model_fields("images", variant(study, "images", name)))
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert study.forward_flops(model, inputs) == eager_flops(model, inputs)


def test_flops_by_hand(study):
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
        model = study.build(study.model_fields("images", variant(study, "images", name)))
        assert study.forward_flops(model, {"pixel_values": torch.randn(1, 3, 16, 16)}) == flops


def test_flops_of_text_leave_out_the_future(study):
    length, hidden, layers, mlp, vocab = 64, 64, 2, 256, 1024
    rest = 2 * length * hidden * vocab + layers * 2 * length * 2 * hidden * mlp
    pairs = length * (length + 1) // 2
    expected = rest + layers * (2 * 2 * length * hidden**2 + 2 * 2 * pairs * (hidden**2 + hidden))
    model = study.build(study.model_fields("text", variant(study, "text", "full kv"), length))
    assert study.forward_flops(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)}) == expected


def test_verdicts_follow_from_the_rows(study):
    def comparison(**accuracies):
        groups = {}
        for name, values in accuracies.items():
            rows = tuple({study.DYNAMIC: str(value), "parameters": "100"} for value in values)
            groups[name] = study.Group(study.Variant(name, "full", {}), rows)
        return study.Comparison("Digits", groups, study.DYNAMIC, 1)

    apart = comparison(a=[1, 2], b=[3, 4], c=[5, 6])
    assert study.ordering(apart, ["a", "b", "c"]).endswith("holds, and no spreads (least to greatest) overlap.")
    assert "overlap: a and b." in study.ordering(comparison(a=[1, 3], b=[3, 4], c=[5, 6]), ["a", "b", "c"])
    assert "does not hold: c is not better than b" in study.ordering(
        comparison(a=[1, 2], b=[5, 6], c=[3, 4]), ["a", "b", "c"]
    )
    assert study.pareto_front(comparison(a=[1, 2], b=[0, 1])) == ["a"]

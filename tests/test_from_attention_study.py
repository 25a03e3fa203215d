"""The study of `from_attention` compares alike, and goes on where it was stopped."""

import from_attention_study
import pandas as pd
import pytest
import torch
from studies.from_attention import (
    ATTENTION,
    BUDGETS,
    FIELDS,
    LEARNING_RATES,
    LONGER,
    TASKS,
    TRANSLUTION,
    Budget,
    Images,
    Plan,
    frame_of,
)
from studies.rows import append_row
from studies.settings import SETTINGS, Settings


SMALL = Settings(
    train_digits=64, test_digits=40, vocab_size=300, train_files=2, held_out_files=1, held_out_blocks=8, warmup_steps=1
)


def make_plan(task, path, **changes):
    return Plan(
        task, **{"seeds": 2, "tuning_seeds": 1, "settings": SMALL, "budget": BUDGETS[task], "path": path, **changes}
    )


@pytest.fixture
def args(monkeypatch, tmp_path):
    """The command's arguments for a study of seconds."""
    monkeypatch.setattr(from_attention_study, "SETTINGS", SMALL)
    for task in TASKS:
        monkeypatch.setitem(BUDGETS, task, Budget(2, 1e-3, 10, 4))
        monkeypatch.setitem(LEARNING_RATES, task, (1e-3, 2e-3))
    return ["--output", str(tmp_path / "study.csv"), "--seeds", "2", "--tuning_seeds", "1"]


def test_study_goes_on_where_it_was_stopped(args, tmp_path):
    path = tmp_path / "study.csv"
    from_attention_study.main([*args, "--limit_minutes", "0"])
    assert frame_of(path).empty
    assert not path.with_suffix(".png").exists()

    from_attention_study.main(args)
    rows = frame_of(path)
    # Of each task 3 models: 2 learning rates of one seed, then 2 seeds.
    assert len(rows) == 2 * (3 * 2 + 3 * 2)
    tests = rows[rows["stage"] == "test"]
    assert set(tests.groupby(["task", "model"]).size()) == {2}
    # All models of a seed start from one source, which reaches what it reaches.
    assert set(rows.groupby(["task", "stage", "seed"])["source_result"].nunique()) == {1}
    assert rows["result"].notna().all()
    assert (rows["cpu_seconds"] > 0).all()
    assert path.with_suffix(".png").stat().st_size > 10_000

    whole = path.read_bytes()
    from_attention_study.main(args)
    assert path.read_bytes() == whole
    # Killed in the middle of its last line, it does that run again, and no other.
    path.write_bytes(whole[:-20])
    from_attention_study.main(args)
    again = frame_of(path)
    pd.testing.assert_frame_equal(again[:-1], rows[:-1])
    # Trained again in one thread of the same process.
    assert again["result"].iloc[-1] == rows["result"].iloc[-1]


@pytest.mark.parametrize(("task", "best"), [("images", 4e-3), ("text", 1e-3)])
def test_each_model_has_the_rate_and_the_steps_of_its_tuning(tmp_path, task, best):
    path = tmp_path / "study.csv"
    plan = make_plan(task, path, tuning_seeds=2)
    budget = BUDGETS[task]

    def add(model, steps, rate, seed, result, seconds, stage="tuning"):
        known = {**vars(budget), "task": task, "stage": stage, "seed": seed, "model": model}
        row = {**dict.fromkeys(FIELDS, ""), **known, "steps": steps, "learning_rate": rate, "parameters": 1}
        append_row(path, {**row, "source_result": 0.0, "result": result, "cpu_seconds": seconds}, FIELDS)

    for seed in (100, 101):
        for rate, result in ((1e-3, 30.0), (2e-3, 40.0 + seed % 2), (4e-3, 50.0)):
            add(ATTENTION, budget.steps, rate, seed, result, 2.0)
            add(TRANSLUTION, budget.steps, rate, seed, result, 3.0)
    # Other seeds and other stages do not count.
    add(TRANSLUTION, budget.steps, 9.0, 7, 0.0 if task == "text" else 100.0, 90.0)
    add(TRANSLUTION, budget.steps, 9.0, 100, 0.0 if task == "text" else 100.0, 90.0, stage="test")
    longer = 10 * round(budget.steps * 1.5 / 10)
    assert plan.equal_seconds() == longer
    for seed in (100, 101):
        for rate, result in ((1e-3, 30.0), (4e-3, 50.0)):
            add(LONGER, longer, rate, seed, result, 3.0)
    assert [(run.model, run.steps, run.learning_rate) for run in plan.best()] == [
        (ATTENTION, budget.steps, best),
        (LONGER, longer, best),
        (TRANSLUTION, budget.steps, best),
    ]
    assert [job.seed for job in plan.tests()] == [0, 1]


def test_every_model_sees_the_same_examples():
    task = Images("test", SMALL)
    first, second = (list(task.batches(3, steps, 16, further=True)) for steps in (4, 6))
    assert len(first) == 4
    assert len(second) == 6
    for one, other in zip(first, second, strict=False):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])


def test_translution_starts_with_what_its_source_computes():
    torch.manual_seed(0)
    task = Images("test", SETTINGS)
    source = task.source().eval()
    pixels = next(task.batches(0, 1, 4, further=True))["pixel_values"]
    expected = source(pixel_values=pixels).logits
    model = task.head.from_attention(source, **task.conversion)
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected)

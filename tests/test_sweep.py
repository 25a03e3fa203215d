"""A sweep trains the rows of a table, resumes, and collects what the runs report; its files are understood."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from common.intervals import interval_words, student_interval
from common.training_hours import PEAK, SHARE, estimate_hours, operations_per_sample
from huggingface_hub import ModelCard
from safetensors import safe_open


datasets = pytest.importorskip("datasets")

import run_image_classification  # noqa: E402
import sweep  # noqa: E402
from studies.sweep_file import Sweep  # noqa: E402
from training.run import Run  # noqa: E402

from translution import TranslutionConfig  # noqa: E402


SWEEPS = sorted((Path(sweep.__file__).parent / "recipes" / "sweeps").glob("*.yaml"))
MODEL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4, "intermediate_size": 16}
OPTIONS = {
    "dataset_name": "digits", "dataset_config_name": "static", "image_size": 16, "patch_size": 8, "config_overrides": MODEL,
    "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4,
    "max_eval_samples": 64, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
}  # fmt: skip
FILE = {
    "script": "run_image_classification",
    "options": OPTIONS,
    "rows": {
        "rotary": {"seeds": [0, 1], "config_overrides": {"mixer_types": "rope_attention"}},
        "full": {"learning_rate": 0.01},
        "rotary, again": {"evaluates": "rotary", "seeds": [1], "max_eval_samples": 64},
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "table.yaml")

    return to_file


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def parameters(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.offset_keys())


def test_a_killed_sweep_resumes(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file, output = write(FILE), tmp_path / "runs"
    command, main, write_report, started = (
        [file, "--output_dir", str(output)],
        run_image_classification.main,
        Run.write,
        [],
    )

    def recorded(arguments):
        started.append(Path(arguments[arguments.index("--output_dir") + 1]).relative_to(output).as_posix())
        main(arguments)

    def killed(run, *figures):
        if run.folder == output / "full" / "seed-0":
            raise KeyboardInterrupt
        write_report(run, *figures)

    monkeypatch.setattr(run_image_classification, "main", recorded)
    with monkeypatch.context() as patch:
        # After the second row's last checkpoint, before its report.
        patch.setattr(Run, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(command)
    # The row that was finished is in the table already.
    assert [row["name"] for row in csv.DictReader((output / "table.csv").open())] == ["rotary"]
    assert started == ["rotary/seed-0", "rotary/seed-1", "full/seed-0"]

    started.clear()
    capsys.readouterr()
    sweep.main(command)
    assert started == ["full/seed-0", "rotary, again/seed-1"]
    printed = capsys.readouterr().out
    assert f"Resuming from {output}/full/seed-0/checkpoint-2" in printed

    rotary, full, again = csv.DictReader((output / "table.csv").open())
    runs = [read(output / "rotary" / f"seed-{seed}" / "run.json") for seed in (0, 1)]
    assert [run["hyperparameters"].get("seed", 42) for run in runs] == [0, 1]
    assert int(rotary["parameters"]) == int(again["parameters"]) == parameters(output / "rotary" / "seed-0")
    assert int(full["parameters"]) == parameters(output / "full" / "seed-0") > int(rotary["parameters"])
    assert (rotary["seeds"], full["seeds"], again["seeds"]) == ("2", "1", "1")
    one = read(output / "full" / "seed-0" / "run.json")
    assert one["hyperparameters"]["learning_rate"] == 0.01
    evaluated = read(output / "rotary, again" / "seed-1" / "evaluation_results.json")
    for name in runs[0]["metrics"]:
        # Written and read as decimals that name each float, so that only the sum's rounding is left.
        values = [run["metrics"][name] for run in runs]
        assert float(rotary[name]) == pytest.approx(sum(values) / 2, rel=1e-12)
        assert float(rotary[f"{name}_std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-12, abs=1e-15)
        # Student's distribution of one degree of freedom is Cauchy's, whose quantiles are those of a tangent.
        reach = math.tan(math.pi * 0.475) * abs(values[0] - values[1]) / 2
        ends = [float(end) for end in rotary[f"{name}_interval"].split(" … ")]
        assert ends == pytest.approx([sum(values) / 2 - reach, sum(values) / 2 + reach], rel=1e-9, abs=1e-12)
        assert (float(full[name]), full[f"{name}_std"], full[f"{name}_interval"]) == (one["metrics"][name], "", "–")
        figures = (float(again[name]), again[f"{name}_std"], again[f"{name}_interval"])
        assert figures == (evaluated[f"eval_{name}"], "", "–")
    # It evaluated that seed's weights: on the same pictures, in float32, a mean of about a hundred losses.
    assert float(again["loss"]) == pytest.approx(runs[1]["metrics"]["loss"], rel=128 * torch.finfo(torch.float32).eps)
    assert runs[0]["metrics"]["loss"] != pytest.approx(runs[1]["metrics"]["loss"], rel=1e-3)
    assert float(rotary["seconds"]) == pytest.approx(sum(run["seconds"] for run in runs) / 2, rel=1e-12)
    # A resumed run does not know how long it took, and an evaluation trains nothing.
    assert full["seconds"] == again["seconds"] == ""
    assert rotary["commit"] == str(runs[0]["commit"])
    assert f"| rotary | {int(rotary['parameters']):,} | 2 |" in printed
    low, high = rotary["loss_interval"].split(" … ")
    assert f" ± {float(rotary['loss_std']):.2g} | {float(low):.4g} … {float(high):.4g} |" in printed
    assert re.search(rf"^\| full \|.* \| {float(full['loss']):.4g} \| – \|", printed, re.MULTILINE)

    # The cards of both seeds tell the figures of both, and each its own; one seed alone has no interval.
    for seed, run in enumerate(runs):
        assert run["over_seeds"]["seeds"] == [0, 1]
        card = ModelCard.load(output / "rotary" / f"seed-{seed}" / "README.md")
        assert {found.metric_name: found.metric_value for found in card.data.eval_results} == run["metrics"]
        (line,) = (line for line in card.text.splitlines() if line.startswith("| loss |"))
        own, mean, std, ends = line.strip("| ").split(" | ")[1:]
        assert own == f"{run['metrics']['loss']:.4g}"
        assert (mean, std) == (f"{float(rotary['loss']):.4g}", f"{float(rotary['loss_std']):.2g}")
        assert ends == f"{float(low):.4g} … {float(high):.4g}"
        assert "2 trainings\nwith the same options and the seeds 0, 1." in card.text
    assert "interval" not in (output / "full" / "seed-0" / "README.md").read_text(encoding="utf-8")
    card = output / "rotary" / "seed-0" / "README.md"
    card.write_text("mine")

    # What is finished is not trained again, and not taken for a run with other options.
    started.clear()
    sweep.main([*command, "--only", "full", "rotary"])
    assert started == []
    assert card.read_text() == "mine"
    write({**FILE, "rows": {"full": {"learning_rate": 0.02}}})
    with pytest.raises(ValueError, match=r"The row 'full': `learning_rate` must be 0.01 as before, got 0.02"):
        sweep.main(command)


@pytest.mark.parametrize("values", [[3.0, 5.0], [0.25, 0.5, 1.25], [7.0, 7.0, 7.0]])
def test_intervals_are_students(values):
    """Of one and two degrees of freedom, whose quantiles have closed forms."""
    mean, share = sum(values) / len(values), 0.975
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    quantile = {
        2: math.tan(math.pi * (share - 0.5)),
        3: (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share))),
    }[len(values)]
    # Quantiles of SciPy are found by iteration.
    assert student_interval(values) == pytest.approx((mean - quantile * spread, mean + quantile * spread), rel=1e-9)
    assert student_interval(values[:1]) is None
    assert interval_words(None, ".1f") == "–"
    assert interval_words((-1.25, 2.5), "+.1f", " %") == "-1.2 … +2.5 %"


def changed(**keys):
    return {**FILE, **keys}


def row(**options):
    return changed(rows={"first": {}, "second": options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(script="train"), "`script` must be one of run_image_classification, run_clm, got 'train'"),
        (changed(row={}), "A key of a sweep must be one of script, .*, got 'row'"),
        (changed(rows=[]), r"`rows` must be a mapping of names to options, got \[\]"),
        (changed(train_samples=0), "`train_samples` must be an integer of at least 1, got 0"),
        (changed(recipe="nowhere.yaml"), "There is no recipe .*nowhere.yaml"),
        (changed(rows={"a/b": {}}), "The row 'a/b': The name of a row must be that of a folder, .*, got 'a/b'"),
        (row(learning_rat=0.1), "The row 'second': .*--learning_rat is not among them"),
        (row(learning_rate="fast"), "The row 'second': argument --learning_rate.*: invalid float value: 'fast'"),
        (row(placement="here", canvas_size=20), "The row 'second': `placement` must be one of static, dynamic, got here"),
        (row(config_overrides={"mixer": "acmix"}), "The row 'second': `config_overrides` must name fields .*, got 'mixer'"),
        (row(config_overrides={"mixer_types": "mix"}), "(?s)The row 'second': .*`mixer_types` must be one of .*, got 'mix'"),
        (row(output_dir="x"), "The row 'second': `output_dir` must be left to the sweep, got 'x'"),
        (row(seeds=3), "The row 'second': `seeds` must be a list of integers of at least 0, got 3"),
        (row(evaluates="third"), "The row 'second': `evaluates`.* must be one of first, got 'third'"),
        (row(evaluates="first", seeds=[0, 5]), "The row 'second': `evaluates`, a row before it that trains its seeds,"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(write, tmp_path, content, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sweep.main([write(content), "--output_dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_only_takes_rows_of_the_file(write, tmp_path):
    with pytest.raises(ValueError, match="`--only` must be one of rotary, full, rotary, again, got 'fast'"):
        sweep.main([write(FILE), "--only", "fast", "--output_dir", str(tmp_path / "runs")])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_understood(path):
    """The options of each row are those of the script and of its config, and no two rows are the same."""
    found = Sweep.read(path)
    assert found.train_samples > 0
    models = [json.dumps([one.options, one.evaluates], sort_keys=True) for one in found.rows]
    assert len(set(models)) == len(models) > 10
    for one in found.rows:
        run = found.parse(one)
        config = found.script.model_config(run.model, run.others[0])
        assert config.modality == ("text" if path.stem == "openwebtext" else "image")
        assert run.data.dataset_name is not None
        for field, value in one.options["config_overrides"].items():
            asked = [value] * config.num_hidden_layers if field == "mixer_types" and isinstance(value, str) else value
            assert getattr(config, field) == asked
        if one.evaluates is not None:
            (trained,) = (other for other in found.rows if other.name == one.evaluates)
            assert trained.options["config_overrides"] == one.options["config_overrides"]
            assert (trained.options["placement"], one.options["placement"]) == ("static", "dynamic")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_recipes_of_tables_say_where_figures_are_and_what_they_cost(path):
    comment = " ".join(re.findall("^# (.*)$", (path.parents[1] / path.name).read_text(encoding="utf-8"), re.MULTILINE))
    assert re.search(r"For the paper's (accuracy|perplexity) see its tables\.", comment)
    assert re.search(r"on one H100 or H200, which compute equally fast, .*at least .* not measured", comment)
    assert f"`sweeps/{path.name}`" in comment


def test_hours_are_those_of_counted_operations(write, capsys):
    length, width, inner, vocabulary = 6, 8, 16, 19
    fields = {**MODEL, "hidden_size": width, "intermediate_size": inner, "mixer_types": "rope_attention"}
    config = TranslutionConfig(modality="text", vocab_size=vocabulary, max_position_embeddings=length, **fields)
    # Each weight multiplies each token three times, forward and twice backward; so do both products of attention.
    weights = 4 * width**2 + 2 * width * inner + width * vocabulary
    operations = 6 * length * weights + 12 * length**2 * width
    assert operations_per_sample(config) == (0, operations)
    assert estimate_hours(config, 1e9) == pytest.approx(1e9 * operations / (SHARE * PEAK) / 3600, rel=1e-12)

    # Translution's own operators are counted apart, and nothing is allocated: the banks of this model have 6 GB in float32.
    large = TranslutionConfig.from_size("large", num_hidden_layers=1, relative_projections="kv")
    own, others = operations_per_sample(large)
    # For each pair of tokens a vector times a matrix of each bank, again three times as much with the backward pass.
    assert own >= 3 * (1 + 14 * 14) ** 2 * 2 * (2 * large.hidden_size**2)
    assert others > 0

    sweep.main([write({**FILE, "options": {**OPTIONS, "max_steps": 10**12}}), "--estimate"])
    printed = capsys.readouterr().out
    hours = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| rotary", "| full"))]
    assert "989 TFLOP/s of an H100 or H200" in printed
    assert "A lower bound" in printed
    rotary, full, evaluated = (float(cells[2].strip(" |")) for cells in hours)
    # Two seeds of attention cost less than one of Translution.
    assert 0 == evaluated < rotary / 2 < full


def test_a_row_has_the_options_of_the_row_that_it_evaluates(write):
    rows = {
        "static": {"config_overrides": {"mixer_types": "attention"}, "canvas_size": 16, "placement": "static"},
        "again": {"evaluates": "static", "placement": "dynamic"},
    }
    trained, evaluated = Sweep.read(Path(write(changed(rows=rows)))).rows
    assert evaluated.options == {**trained.options, "placement": "dynamic"}
    assert (evaluated.evaluates, evaluated.seeds) == ("static", trained.seeds)

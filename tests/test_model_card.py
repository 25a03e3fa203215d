"""Model cards: what a run leaves, read back by the Hub client's own parser."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import hub_server
import pytest
import yaml
from common.command import run_command
from huggingface_hub import ModelCard
from model_card import main
from training.model_card import describe, model_card, origin_of, write_model_card

from translution import TranslutionConfig


ROOT = Path(__file__).resolve().parents[1]


RUN = {
    "task": "image-classification",
    "dataset": {
        "id": "user/pictures",
        "name": "user/pictures",
        "config": "small",
        "revision": "abc123",
        "train_split": "train",
        "eval_split": "validation",
    },
    "metrics": {"accuracy": 0.9344262, "top_5_accuracy": 0.9967213, "loss": 0.25},
    "hyperparameters": {"learning_rate": 0.0003, "weight_decay": 0.05, "lr_scheduler_type": "cosine", "seed": None},
    "hardware": "Some CPU | with a pipe",
    "num_processes": 2,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "0123abc",
    "seconds": 61.4,
    "date": "2026-01-02T03:04:05+00:00",
    "co2_grams": 12.5,
    "license": "apache-2.0",
    "base_model": "user/base",
    "command": "python scripts/run_image_classification.py recipe.yaml",
}


def save(folder: Path, run: dict, **fields) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TranslutionConfig(**fields).to_dict()))
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_reads_back_as_it_was_written(tmp_path):
    write_model_card(save(tmp_path / "digits", RUN))
    card = ModelCard.load(tmp_path / "digits" / "README.md")
    data = card.data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert data.base_model == "user/base"
    assert data.datasets == ["user/pictures"]
    assert data.co2_eq_emissions == {"emissions": 12.5}
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == RUN["metrics"]
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type) == ("image-classification", "user/pictures")
        assert (result.dataset_config, result.dataset_split) == ("small", "validation")
        assert result.dataset_revision == "abc123"
    again = ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict()
    assert again.text == card.text


def test_the_text_tells_the_run(tmp_path):
    text = model_card(save(tmp_path / "digits", RUN)).text
    for value in (
        "0.9344 |",
        "0.9967 |",
        'pipeline("image-classification", model="digits")("picture.png")',
        "0.0003",
        "cosine",
        "0123abc",
        "torch 2.13.0",
        "Fine-tuned from `user/base`",
    ):
        assert value in text
    assert "`seed`" not in text
    assert "None" not in text
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    assert paper["title"] in text
    assert all(author["family-names"] in text for author in paper["authors"])


def test_folders_of_one_machine_are_left_out(tmp_path):
    run = {
        **RUN,
        "command": "python scripts/run_clm.py --train_dir '/home/somebody/my pictures' --cache_dir=/tmp/cache --learning_rate 1e-3",
        "hyperparameters": {
            "train_dir": "/home/somebody/my pictures",
            "train_file": ["/data/a.txt", "b.txt"],
            "seed": 3,
        },
    }
    text = model_card(save(tmp_path / "digits", run)).text
    assert "python scripts/run_clm.py --train_dir 'my pictures' --cache_dir=cache --learning_rate 1e-3" in text
    assert "| `train_dir` | my pictures |" in text
    assert "| `train_file` | ['a.txt', 'b.txt'] |" in text
    assert "| `seed` | 3 |" in text
    assert not any(place in text for place in ("/home", "somebody", "/tmp", "/data"))


def test_what_is_unknown_is_left_out(tmp_path):
    card = model_card(save(tmp_path / "bare", {"task": "text-generation"}, modality="text", vocab_size=9))
    assert "None" not in card.content
    for heading in ("## Data", "## Results", "## Licence"):
        assert heading not in card.text
    assert card.data.datasets is None
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    "name", ['a "quoted" name: with colon', "ünïcode — 数字", "pipes | and `ticks`", "yes", "1.5"]
)
def test_odd_names(name, tmp_path):
    run = {**RUN, "name": name, "dataset": {"id": None, "name": name}, "metrics": {name: 0.5, "accuracy": 1}}
    card = ModelCard(model_card(save(tmp_path / "odd", run)).content)
    assert card.data.model_name == name
    # What is not on the Hub must not look as if it were.
    assert card.data.datasets is None
    assert {(one.dataset_name, one.metric_name) for one in card.data.eval_results} == {
        (name, name),
        (name, "accuracy"),
    }
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    # The name is read by Python as it is.
    snippets = [block.removeprefix("python") for block in card.text.split("```") if block.startswith("python\nimport")]
    (call,) = (node for node in ast.walk(ast.parse(snippets[0])) if isinstance(node, ast.Call))
    assert call.args[0].value == name


@pytest.mark.parametrize(
    ("dataset", "is_id"),
    [
        ("imagenet-1k", True),
        ("user/name", True),
        ("/data/my pictures", False),
        ("digits, moved", False),
        ("a/b/c", False),
    ],
)
def test_only_names_of_the_hub_are_linked(dataset, is_id, tmp_path):
    card = model_card(save(tmp_path / "digits", {**RUN, "dataset": {"id": dataset, "name": dataset}}))
    assert card.data.datasets == ([dataset] if is_id else None)
    kinds = {one.dataset_type for one in card.data.eval_results}
    assert (kinds == {dataset}) == is_id
    assert f"## Data\n\n{dataset}." in card.text


def test_a_licence_of_its_own_and_several_bases(tmp_path):
    origin = {
        "license": "other",
        "license_name": "some-licence",
        "license_link": "LICENSE",
        "base_model": ["a/b", "c/d"],
    }
    write_model_card(save(tmp_path / "digits", {**RUN, **origin}))
    card = ModelCard.load(tmp_path / "digits" / "README.md")
    assert {name: card.data.to_dict().get(name) for name in origin} == origin
    assert "## Licence\n\n[some-licence](LICENSE)\n" in card.text
    assert "Fine-tuned from `a/b`, `c/d`." in card.text
    assert origin_of(tmp_path / "digits" / "README.md") == origin


@pytest.mark.parametrize("content", [b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", b"\xff", b"---\n1: 2\n---\n"])
def test_a_card_that_cannot_be_read_is_named(content, tmp_path, capsys):
    (tmp_path / "README.md").write_bytes(content)
    assert origin_of(tmp_path / "README.md") == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'README.md'} cannot be read")


@pytest.mark.parametrize(("name", "kind"), [("Pic [a] %23 ü", "pic-a-23"), ("ü", "data"), ("ü.ü", "data")])
def test_the_kind_of_data_is_ascii(name, kind, tmp_path):
    card = model_card(save(tmp_path / "digits", {**RUN, "dataset": {"id": None, "name": name}}))
    assert {one.dataset_type for one in card.data.eval_results} == {kind}
    assert {one.dataset_name for one in card.data.eval_results} == {name}


def test_null_is_shown_nowhere(tmp_path):
    nulls = {name: dict.fromkeys(value) if isinstance(value, dict) else None for name, value in RUN.items()}
    card = model_card(save(tmp_path / "digits", {**nulls, "task": RUN["task"]}))
    # No field of the config's own is null in the table either.
    assert "None" not in card.content
    assert "null" not in card.content
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"relative_projections": "kv"}, "Translution of keys and values"),
        ({"relative_projections": "qkv"}, "Translution of queries, keys and values"),
        ({"relative_rank": 8}, "LoR-Translution (rank 8) of keys and values"),
        ({"offset_basis": 4}, "basis Translution (4 matrices) of keys and values"),
        ({"max_relative_distance": 1, "far_offsets": "shared"}, "local Translution of keys and values"),
        (
            {"mixer_types": ["acmix", "rope_attention"], "num_hidden_layers": 2},
            "a hybrid of ACmix and rotary attention",
        ),
    ],
)
def test_kinds_of_model(fields, words, tmp_path):
    assert describe(TranslutionConfig(**fields)) == words
    assert words in model_card(save(tmp_path / "kind", RUN, **fields)).text


def test_the_name_of_the_repository(tmp_path):
    folder = save(tmp_path / "digits", RUN)
    assert 'from_pretrained("digits")' in model_card(folder).text
    assert 'from_pretrained("user/name")' in model_card(folder, "user/name").text
    assert not (folder / "README.md").exists()


def test_the_hub_accepts_it(tmp_path, monkeypatch):
    with hub_server.running() as hub:
        hub_server.point_to(hub.endpoint, monkeypatch)
        model_card(save(tmp_path / "digits", RUN)).validate()
        assert hub.validated


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("run.json", None, "run.json is missing"),
        ("config.json", None, "config.json is missing"),
        ("run.json", "{", "run.json is no JSON"),
        ("run.json", "[]", "must hold a JSON object, got list"),
        (
            "run.json",
            '{"task": "translation"}',
            "must be one of image-classification, text-generation, got 'translation'",
        ),
    ],
)
def test_bad_input(file, content, words, tmp_path, capsys):
    folder = save(tmp_path / "bad", RUN)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_command(main, [str(folder)])
    assert exit_.value.code == 1
    assert words in capsys.readouterr().err

"""README and docs: Python blocks run, commands name scripts and options that exist, links lead somewhere, tables are the CSVs'."""

from __future__ import annotations

import importlib
import io
import logging
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import distributed_worker
import pytest
import timm_stand_in
import torch
import yaml

import translution


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT / "scripts"), str(DOCS)]
import tables  # noqa: E402
from common import training_memory  # noqa: E402


PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
# Links of this page lead to the others.
LINKED = {**PAGES, "modeling/README.md": ROOT / "modeling" / "README.md"}
# Above blocks that are not run, and what in such a block shows that it cannot be.
NOT_RUN = {
    "<!-- not run: needs the Hub -->": "user/name",
    # It runs below, with a stand-in for timm.
    "<!-- not run: needs timm -->": "import timm",
    # These run in `test_journeys.py`, after the commands that make what they need.
    "<!-- not run: needs runs/pictures -->": "runs/pictures/",
    "<!-- not run: needs runs/texts-int8 -->": '"runs/texts-int8"',
}
OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")

each_page = pytest.mark.parametrize("name", PAGES)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str, str | None]]:
    """Line, code and, where it is not to be run, what shows that it cannot be, of each block."""
    text = read(page)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] == language:
            before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
            yield text[: match.start()].count("\n") + 1, match[2], NOT_RUN.get(before)


@each_page
def test_python_blocks_run(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    # Transformers' logger does not hand on what it is told.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    namespace = {"__name__": "__main__"}
    for line, code, sign in blocks(PAGES[name], "python"):
        if sign is None:
            # As many lines down as in the page, so that a traceback names the right one.
            exec(compile("\n" * line + code, name, "exec"), namespace)
        else:
            compile(code, name, "exec")
            assert sign in code, f"{name}, line {line}: a block that is not run has {sign!r}"
    # What Transformers warns of, such as a `num_labels` that is not the number of names, is not to be shown as the way.
    assert "incompatible" not in caplog.text


def test_a_block_of_timm_runs(monkeypatch):
    """docs/layer.md's last block, in a Vision Transformer that calls its attention as timm's does."""
    monkeypatch.setitem(sys.modules, "timm", timm_stand_in)
    (code,) = (code for _, code, sign in blocks(PAGES["docs/layer.md"], "python") if sign == "import timm")
    namespace = {"torch": torch, "nn": torch.nn, "TranslutionAttention": translution.TranslutionAttention}
    exec(compile(code, "docs/layer.md", "exec"), namespace)
    model, logits = namespace["model"], namespace["logits"]
    assert logits.shape == (2, 10)
    layers = [block.attn.layer for block in model.blocks]
    assert {type(layer) for layer in layers} == {translution.TranslutionAttention}
    # The grid is right: tokens of another number would be refused.
    assert [layer.grid_size for layer in layers] == [(14, 14)] * 2
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@each_page
def test_every_block_is_checked(name):
    """Blocks of another language would be neither run nor checked, and a mistyped comment must not be passed over."""
    text = read(PAGES[name])
    fences = re.findall(r"^\s*```(\w*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= {"python", "bash"}
    assert set(fences[1::2]) <= {""}
    assert text.count("<!-- not run") == sum(sign is not None for *_, sign in blocks(PAGES[name], "python"))


# Commands


@lru_cache
def options_of(script: str) -> frozenset[str]:
    """The options that the `--help` of a script lists."""
    written = io.StringIO()
    with redirect_stdout(written), pytest.raises(SystemExit) as exit_:
        importlib.import_module(script).main(["--help"])
    assert exit_.value.code == 0
    return frozenset(OPTION.findall(written.getvalue()))


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    for line, code, _ in blocks(page, "bash"):
        for number, text in enumerate(code.splitlines(), start=line + 1):
            words = shlex.split(text, comments=True)
            if "|" in words:
                words = words[words.index("|") + 1 :]
            if words:
                yield number, words


def problems(words: list[str]) -> list[str]:
    """What of a command does not exist."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE)
        return [word for word in rest if "=" not in word and word not in targets]
    if words[:2] == ["pip", "install"]:
        extras = {extra for word in rest[1:] for extra in re.findall(r"[\[,](\w+)(?=[,\]])", word)}
        return [extra for extra in extras if f"\n{extra} = [" not in read(ROOT / "pyproject.toml")]
    if words[:2] == ["accelerate", "launch"]:
        rest = rest[1:]
        if rest[0] != "--config_file":
            return rest[:1]
        wrong = [] if (ROOT / rest[1]).is_file() else [rest[1]]
        return wrong + problems(["python", *rest[2:]])
    if program != "python":
        return [program]
    if rest[0] == "-X":
        rest = rest[2:]
    script, *arguments = rest
    path = ROOT / script
    if not path.is_file():
        return [script]
    wrong = [word for word in arguments if word.startswith("scripts/") and not (ROOT / word).is_file()]
    if path.parent.name == "scripts":
        known = options_of(path.stem)
        given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        wrong += [option for option in given if option not in known]
    return wrong


@each_page
def test_commands_exist(name):
    found = {number: problems(words) for number, words in commands(PAGES[name])}
    assert {number: wrong for number, wrong in found.items() if wrong} == {}


def test_options_in_the_text_exist():
    scripts = {Path(word).stem for page in PAGES.values() for _, words in commands(page) for word in words
               if re.fullmatch(r"scripts/\w+\.py", word)}  # fmt: skip
    known = frozenset().union(*map(options_of, sorted(scripts)))
    for name, page in PAGES.items():
        prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
        spans = " ".join(
            span for span in re.findall(r"`([^`]+)`", prose) if not span.startswith(("pip", "make", "torchrun"))
        )
        assert set(OPTION.findall(spans)) <= known, name


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/nowhere.py",
        "python scripts/predict.py runs/digits --top_n 3",
        "python scripts/run_clm.py scripts/recipes/nowhere.yaml --output_dir runs/x",
        "accelerate launch --config_file scripts/accelerate/nowhere.yaml scripts/run_clm.py",
        "accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/run_clm.py --max_step 3",
        "TRITON_INTERPRET=1 python scripts/gpu_check.py --dry",
        "make everything",
        "pip install '.[everything]'",
        "translution-cli train",
    ],
)
def test_wrong_commands_are_found(command):
    assert len(problems(shlex.split(command))) == 1


# Links


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKED)
def test_links(name):
    page = LINKED[name]
    for link in re.findall(r"\]\(([^)]+)\)", read(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_listed():
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\]\((\w+\.md)\)", read(DOCS / "README.md"))
    )


def test_files_of_the_code_exist():
    for name in re.findall(r"`([a-z_]+\.py)`", read(ROOT / "modeling" / "README.md")):
        assert list((ROOT / "modeling").rglob(name)), name


# Figures


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_the_csvs(page):
    """`python docs/tables.py` changes nothing."""
    text = read(page)
    assert tables.MARKED.search(text)
    assert tables.rewritten(text) == text


def test_every_table_is_in_a_page():
    marked = [name for page in tables.PAGES for _, name, _ in tables.MARKED.findall(read(page))]
    assert sorted(marked) == sorted(tables.TABLES)
    # Each marker of a beginning has its end.
    for page in tables.PAGES:
        assert read(page).count("<!-- table: ") == read(page).count("<!-- end of table -->")


def test_the_memory_table_marks_what_tests_run(tmp_path):
    """‡ is at what two processes do in `test_distributed.py`, and nowhere else."""
    mixers = {"full": "full, kv", "local": "local", "lor": "LoR 8, kv", "attention": "attention"}
    shared = {mixers.get(name.split("-")[1]) for name in distributed_worker.TENSOR_PARALLEL} - {None}
    assert {"fsdp-image", "fsdp-text"} <= distributed_worker.cases(tmp_path).keys()
    run = {"2 GPUs, FSDP2": {"full, kv"}, "2 GPUs, heads shared": shared}
    text = read(DOCS / "training.md").split("<!-- table: memory -->")[1].split("<!-- end of table -->")[0]
    header, *rows = cells(text)
    for _, mixer, *values in (row for row in rows if row[0] != "---"):
        for column, value in zip(header[2:], values, strict=True):
            expected = mixer.removesuffix(" †") in run.get(column, ()) and value != "–"
            assert value.endswith("‡") == expected, (mixer, column)


def test_memory_of_deepspeed_counted_by_hand():
    """A layer of 15 + 5 parameters, one of 6 + 3, and a head of 7: 36 in all."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(2, 3)])
    model.head = torch.nn.Parameter(torch.empty(7))
    assert training_memory.bytes_alone(model) == 18 * 36
    # All in bfloat16, 2 bytes, and a half or an eighth of weights, gradients and two moments in float32.
    assert training_memory.bytes_zero2(model, 1) == 18 * 36
    assert training_memory.bytes_zero2(model, 2) == 2 * 36 + 16 * 18
    assert training_memory.bytes_zero2(model, 8) == 2 * 36 + 16 * 5
    # Of every parameter a half or an eighth, rounded up; the first layer whole, weights and gradients in bfloat16.
    assert training_memory.bytes_zero3(model, 2) == 18 * (8 + 3 + 3 + 2 + 4) + 4 * 20
    assert training_memory.bytes_zero3(model, 8) == 18 * (2 + 1 + 1 + 1 + 1) + 4 * 20


def test_the_memory_table_has_deepspeed():
    """Of ZeRO-2 by the parameters beside it; of ZeRO-3 the layer that is whole comes on top of a share of all."""
    text = read(DOCS / "training.md").split("<!-- table: memory -->")[1].split("<!-- end of table -->")[0]
    header, _, *rows = cells(text)
    for row in rows:
        found = dict(zip(header, row, strict=True))
        millions = float(found["parameters"].removesuffix(" M").replace(",", ""))
        for gpus in (2, 8):
            written = [found[f"{gpus} GPUs, ZeRO-{stage}"] for stage in (2, 3)]
            # Rounded as written, and so are the parameters.
            zero2, zero3 = map(float, written)
            half = [10.0 ** -len(value.partition(".")[2]) / 2 for value in written]
            per_parameter = 2 + 16 / gpus
            assert abs(zero2 - millions * per_parameter / 1e3) <= half[0] + 0.05 * per_parameter / 1e3 + 1e-9
            share = millions * 18 / gpus / 1e3
            assert share - half[1] <= zero3 + 0.05 * 18 / 1e3
            # More than one layer is never whole.
            assert zero3 <= share + 4 * millions / 1e3 + half[1]


def test_a_changed_figure_is_found():
    text = read(ROOT / "README.md")
    assert tables.rewritten(text.replace("| 65.8 ± 4.3 |", "| 99.9 ± 4.3 |", 1)) == text


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, by their cells."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_study_is_its_csv():
    """`scripts/study.py --report` wrote the tables of these rows: accuracy of images, perplexity of two lengths of text."""
    text = read(DOCS / "study.md")
    begin, end = "<!-- scripts/study.py writes from here -->", "<!-- to here -->"
    assert (text.count(begin), text.count(end)) == (1, 1)
    sections = text.split(begin)[1].split(end)[0].split("\n### ")[1:]
    assert len(sections) == 3
    for section in sections:
        length = re.search(r"blocks of (\d+) tokens", section)
        groups = tables.tuned_rows("text", length[1]) if length else tables.tuned_rows("images")
        column = "perplexity" if length else "dynamic → dynamic"
        every, comparisons = section.split("Equal parameters, ")
        shown = {row[0]: row for row in cells(every) if row[0] not in ("mixer", "---")}
        assert shown.keys() == groups.keys()
        figures = {}
        for variant, rows in groups.items():
            assert len(rows) == int(re.search(r"(\d) seeds", section)[1])
            values = [float(row[column]) for row in rows]
            figures[variant] = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            assert shown[variant][1] == f"{int(rows[0]['parameters']):,}"
            assert shown[variant][-1] == figures[variant]
        for variant, _, figure, _, rival_parameters, rival, *_ in cells(comparisons)[2:]:
            assert figure == figures[variant]
            assert (rival_parameters, rival) in {(row[1], row[-1]) for row in shown.values()}


def test_the_demo_is_its_cards():
    """The demo has no CSV; its best models have cards."""
    pictures, text = read(DOCS / "study.md").split("## The demo")[1].split("Perplexity on")
    for card, part, factor, best in (("demo-image", pictures, 100, max), ("demo-text", text, 1, min)):
        models = ("attention, rotary", "local Translution", "Translution, kv")
        shown = best(float(row[-1].removesuffix(" %")) for row in cells(part) if row[0] in models)
        header = yaml.safe_load(read(ROOT / "model_cards" / f"{card}.md").split("---")[1])
        value = header["model-index"][0]["results"][0]["metrics"][0]["value"]
        assert shown == round(factor * value, 1)

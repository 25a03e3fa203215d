"""`scripts/export.py` as it is called: its files answer what the model's reference implementation computes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import export
import pytest
import torch
from common.command import run_command
from small_models import make_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from translution import TranslutionForCausalLM, quantize_int8


# Relative to the largest logit: twice the bound of the script, whose comparison is with the model's faster implementation.
TOLERANCE = 2 * export.BOUND


@torch.no_grad()
def reference_logits(model: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of the readable implementation in float64, whatever the dtype of the saved weights."""
    model = model.double()
    model.set_attn_implementation("eager")
    if inputs.is_floating_point():
        inputs = inputs.double()
    return model(**{model.main_input_name: inputs}, **({} if mask is None else {"attention_mask": mask})).logits


def assert_close(found: Tensor, model: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> None:
    """Also of texts with a mask `[batch, length]`, where it is 1."""
    expected = reference_logits(model, inputs, mask)
    assert found.dtype == torch.float32
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def code_of(printed: str) -> str:
    """The lines of Python at the end of what the command prints."""
    return "\n".join(line.strip() for line in printed.splitlines() if line.startswith("    "))


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_command(export.main, arguments)
    assert exit_.value.code in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def text_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What depends on the length must not be that of the length it is exported with: there are offsets beyond the largest.
    model = make_model("text", "full-clamped", max_position_embeddings=40)
    model.save_pretrained("words")
    return model


def test_images_to_onnx(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="pip install translution[onnx]")
    monkeypatch.chdir(tmp_path)
    model = make_model("image", "local-shared", dtype=torch.bfloat16)
    model.save_pretrained("runs/digits")
    export.main(["runs/digits", "--format", "onnx"])
    printed = capsys.readouterr().out
    assert "mask" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.onnx", "runs"]
    code = code_of(printed)
    for batch in (1, 4):
        pixels = torch.randn(batch, 3, 12, 10)
        names = {"pixel_values": pixels.numpy()}
        exec(code, names)
        assert_close(torch.from_numpy(names["logits"]), model, pixels)


def test_texts_to_a_program_that_needs_torch_alone(text_model, tmp_path, capsys):
    export.main(["words", "--format", "exported_program", "--output", "new/words.pt2"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["words.pt2"]
    printed = capsys.readouterr().out
    # More than the 40 positions, since its distances have an end. Texts of several lengths are padded on the right.
    assert "it takes no mask: give texts of one length, or pad them on the right" in printed
    tokens, mask = torch.randint(19, (4, 90)), torch.ones(4, 90, dtype=torch.long)
    mask[0, 7:], mask[2, 50:] = 0, 0
    torch.save(tokens * mask, "tokens.pt")
    script = ["import sys, torch", "input_ids = torch.load('tokens.pt')", code_of(printed)]
    script += ["torch.save(logits, 'logits.pt')"]
    script += ["sys.exit('transformers' in sys.modules or 'translution' in sys.modules)"]
    subprocess.run([sys.executable, "-c", "\n".join(script)], check=True, cwd=tmp_path)
    assert_close(torch.load("logits.pt"), text_model, tokens, mask)


@pytest.mark.parametrize(("variant", "name"), [("local-rotary", "onnx"), ("full-clamped", "torchscript")])
def test_texts_beyond_the_positions(variant, name, tmp_path, monkeypatch, capsys):
    """Where far pairs share a matrix and no position is absolute, a text may be longer than `max_position_embeddings`."""
    if name == "onnx":
        pytest.importorskip("onnxruntime", reason="pip install translution[onnx]")
    monkeypatch.chdir(tmp_path)
    model = make_model("text", variant, max_position_embeddings=10, num_hidden_layers=1)
    model.save_pretrained("words")
    export.main(["words", "--format", name])
    printed = capsys.readouterr().out
    tried = export.LENGTH + 2 * model.config.max_relative_distance
    assert f"`input_ids` of int64 [batch, length], of any length (tried up to {tried}):" in printed
    run = export.FORMATS[name].read(next(tmp_path.glob(f"words{export.FORMATS[name].suffix}")))
    # Beyond what the command tries, too.
    tokens = torch.randint(19, (2, 2 * tried))
    assert_close(run(tokens), model, tokens)


def test_texts_that_end_where_the_positions_do(tmp_path, monkeypatch, capsys):
    """What is said is what was tried, and how much a model takes."""
    monkeypatch.chdir(tmp_path)
    for most, tried in ((40, 40), (100, export.LENGTH)):
        model = make_model("text", "full-kv", max_position_embeddings=most)
        model.save_pretrained("words")
        lengths, make_inputs = [], export.make_inputs
        monkeypatch.setattr(
            export,
            "make_inputs",
            lambda config, make=make_inputs, seen=lengths: [seen.append(x.shape[1]) or x for x in make(config)],
        )
        export.main(["words", "--format", "torchscript"])
        monkeypatch.setattr(export, "make_inputs", make_inputs)
        assert max(lengths) == tried
        assert f"[batch, length], of at most {most} tokens (tried up to {tried}):" in capsys.readouterr().out


def test_a_converted_model_to_torchscript(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=32, n_embd=16, n_head=2, n_layer=2)).eval()
    source.save_pretrained("source")
    converted = TranslutionForCausalLM.from_attention("source", max_relative_distance=3)
    converted.save_pretrained("converted")
    export.main(["converted", "--format", "torchscript"])
    code = code_of(capsys.readouterr().out)
    for shape in ((1, 32), (4, 1)):
        names = {"input_ids": torch.randint(19, shape)}
        exec(code, names)
        # The source has the same outputs.
        assert_close(names["logits"], source, names["input_ids"])


def test_a_file_that_differs_is_not_left(text_model, tmp_path, monkeypatch, capsys):
    """Right for the length that it is exported with, and wrong for others, as a trace may be."""

    class Fixed(nn.Module):
        def __init__(self, model: nn.Module, length: int):
            super().__init__()
            self.model, self.length = model, length

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs) + 0.01 * (inputs.shape[1] - self.length)

    torchscript = export.FORMATS["torchscript"]

    def write(model: nn.Module, inputs: Tensor, path: Path) -> None:
        torchscript.write(Fixed(model, inputs.shape[1]), inputs, path)

    monkeypatch.setitem(export.FORMATS, "torchscript", torchscript._replace(write=write))
    Path("words.pt").write_text("from before")
    line = fails(capsys, "words", "--format", "torchscript")
    assert line.startswith("error: words.pt is not written: its logits must be within 1e-05 of the model's")
    assert Path("words.pt").read_text() == "from before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words", "words.pt"]


def test_weights_of_8_bits_are_said_to_be_float32(tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx", reason="pip install translution[onnx]")
    pytest.importorskip("torchao", reason="pip install translution[quantize]")
    monkeypatch.chdir(tmp_path)
    model = make_model("text", "full-kv", max_position_embeddings=10, num_hidden_layers=1).float()
    quantize_int8(model).save_pretrained("words")
    export.main(["words", "--format", "onnx"])
    assert "the weights of 8 bits are float32 in this file" in capsys.readouterr().out
    types = {weight.data_type for weight in onnx.load("words.onnx").graph.initializer if len(weight.dims) > 1}
    assert types == {onnx.TensorProto.FLOAT}


def test_errors_say_what_is_wrong(text_model, monkeypatch, capsys):
    line = fails(capsys, "words", "--format", "tflite")
    assert "--format: invalid choice: 'tflite'" in line
    assert all(name in line for name in export.FORMATS)
    assert "there is no folder 'nowhere', and it is no name" in fails(capsys, "nowhere", "--format", "torchscript")
    line = fails(capsys, "words", "--format", "exported_program", "--output", "words.onnx")
    assert line == "error: `output` must be a file named ….pt2, got words.onnx."
    make_model("text", max_position_embeddings=2).save_pretrained("short")
    line = fails(capsys, "short", "--format", "torchscript")
    assert line == "error: `max_position_embeddings` must be at least 3, got 2."
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    line = fails(capsys, "words", "--format", "onnx")
    assert line == "error: `format` 'onnx' needs onnxscript, of the extra onnx: pip install '.[onnx]'"

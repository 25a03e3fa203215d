"""Weights in 8 bits: their rounding, what the model computes with them, and that saved ones are loaded again."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_in_rounding
from common.command import run_command
from common.offset_matrices import describe_banks
from PIL import Image
from safetensors.torch import load_file
from small_models import AUTO, assert_rejected, make_config, make_inputs, make_model, make_tokenizer
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from translution import TranslutionForCausalLM, quantize_int8
from translution.modeling.mixers.mixer import Mixer


pytest.importorskip("torchao", reason="pip install translution[quantize]")
import quantize


CASES = [
    ("image", "full-qkv"),
    ("text", "full-clamped"),
    ("image", "lor-qkv"),
    ("text", "basis-qkv"),
    ("image", "local-shared"),
    ("text", "local-rotary"),
    ("image", "convolution"),
]


def is_int8(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "qdata", torch.empty(0)).dtype == torch.int8


def integers_times_scales(weight: torch.Tensor) -> torch.Tensor:
    """What a quantised weight stands for, float64."""
    assert weight.qdata.dtype == torch.int8
    return weight.qdata.double() * weight.scale.double()


def reference_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the readable implementation in float64, with the weights that those of a quantised model stand for."""
    config = make_config().from_dict({**model.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    reference = type(model)(config).double().eval()
    values = {
        name: integers_times_scales(tensor) if is_int8(tensor) else tensor.double()
        for name, tensor in model.state_dict().items()
    }
    reference.load_state_dict(values)
    reference.set_attn_implementation("eager")
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    return reference(**inputs).logits


@pytest.mark.parametrize(("modality", "variant"), CASES, ids=map("-".join, CASES))
def test_each_weight_is_its_column_rounded(modality, variant):
    model = make_model(modality, variant, dtype=torch.float32)
    before = {name: parameter.detach().double() for name, parameter in copy.deepcopy(model).named_parameters()}
    quantize_int8(model)
    linears = {f"{path}.weight" for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    matrices = {name for name, weight in before.items() if name.endswith(("_bank", "_factors")) and weight.ndim == 3}
    assert matrices or variant == "convolution"
    for name, weight in model.named_parameters():
        if name not in (linears | matrices) - {"lm_head.weight"}:
            assert torch.equal(weight.double(), before[name]), name
            continue
        # A column of a bank is summed over the axis in the middle, a row of a Linear over the last.
        axis = 1 if name in matrices else -1
        largest = before[name].abs().amax(dim=axis, keepdim=True)
        error = (integers_times_scales(weight) - before[name]).abs()
        # Half a step of 254; 1e-6 is the rounding of the scale, which is float32.
        assert (error <= largest * (1 / 254 + 1e-6)).all(), name
        # It would be less for a scale that another column has.
        assert weight.scale.shape == largest.shape, name


@pytest.mark.parametrize(("modality", "variant"), CASES, ids=map("-".join, CASES))
def test_it_computes_with_what_the_integers_stand_for(modality, variant):
    model = make_model(modality, variant, dtype=torch.float32)
    inputs = make_inputs(model.config)
    quantize_int8(model)
    found = model(**inputs).logits
    expected = reference_logits(model, inputs)
    # 1e-4 is 800 roundings of float32; what int8 changes is 1e-2.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_image_whose_mask_hides_pairs_needs_the_weight_itself():
    """Convolution then reads the matrix of its class token as a part of a bank."""
    model = quantize_int8(make_model("image", "convolution", dtype=torch.float32))
    inputs = make_inputs(model.config)
    # Of pairs of 6 patches and the class token: some, which no mask of tokens could hide.
    hidden = torch.zeros(2, 1, 7, 7).bernoulli(0.3).bool() & ~torch.eye(7).bool()
    inputs["attention_mask"] = torch.zeros(2, 1, 7, 7).masked_fill(hidden, -torch.inf)
    expected = reference_logits(model, inputs)
    assert (model(**inputs).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("modality", "variant"), CASES, ids=map("-".join, CASES))
def test_a_saved_model_stays_quantised(modality, variant, tmp_path):
    model = quantize_int8(make_model(modality, variant, dtype=torch.float32))
    inputs = make_inputs(model.config)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    count = sum(map(is_int8, model.parameters()))
    assert sum(name.endswith("_qdata") and tensor.dtype == torch.int8 for name, tensor in files.items()) == count
    loaded, report = AUTO[modality].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, weight in model.named_parameters():
        other = loaded.get_parameter(name)
        assert is_int8(weight) == is_int8(other)
        for part in ("qdata", "scale") if is_int8(weight) else ("data",):
            assert torch.equal(getattr(weight, part), getattr(other, part)), name
    assert_close_in_rounding(loaded(**inputs).logits, model(**inputs).logits)


def test_in_half_precision(tmp_path):
    """What is computed has the dtype that a model is loaded with, whatever it was quantised from."""
    model = quantize_int8(make_model("image", "full-kv", dtype=torch.float32))
    inputs = make_inputs(model.config)
    expected = reference_logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AUTO["image"].from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = loaded(pixel_values=inputs["pixel_values"].bfloat16()).logits
    assert found.dtype == torch.bfloat16
    # The rounding of its inputs, which two layers pass on.
    assert (found.double() - expected).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_a_converted_model(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=32, n_embd=16, n_head=2, n_layer=2)).save_pretrained(
        tmp_path / "source"
    )
    model = TranslutionForCausalLM.from_attention(tmp_path / "source", max_relative_distance=3).eval()
    tokens = torch.randint(19, (2, 9))
    before = model(tokens).logits.detach()
    model = quantize_int8(model)
    banks = {name for name, tensor in model.named_parameters() if name.endswith("_bank") and tensor.ndim == 3}
    assert len(banks) == 4
    assert {name for name, tensor in model.named_parameters() if is_int8(tensor)} >= banks
    model.save_pretrained(tmp_path / "quantised")
    loaded = AUTO["text"].from_pretrained(tmp_path / "quantised")
    assert_close_in_rounding(loaded(tokens).logits, model(tokens).logits)
    # An eighth bit is 1/254 of the largest weight.
    assert 0 < (loaded(tokens).logits - before).norm() <= before.norm() / 100


def test_generation_with_a_cache():
    model = quantize_int8(make_model("text", "local-rotary", dtype=torch.float32, max_position_embeddings=32))
    tokens = torch.randint(19, (2, 5))
    cached, plain = (
        model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use_cache,
                       return_dict_in_generate=True, output_logits=True)
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close_in_rounding(torch.stack(cached.logits), torch.stack(plain.logits), roundings=256)


def test_compiles_whole():
    model = quantize_int8(make_model("text", "full-kv", dtype=torch.float32))
    tokens = torch.randint(19, (2, 5))
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, use_cache=False).logits
    assert_close_in_rounding(found, model(tokens).logits.detach())


def test_what_is_refused(monkeypatch):
    model = make_model("image", "full-kv")
    assert_rejected(["`model`", "torch.float32, torch.float16, torch.bfloat16", "float64"], quantize_int8, model)
    model = quantize_int8(model.float())
    assert_rejected(["`model`", "quantised", "`quantization_config`"], quantize_int8, model)
    assert_rejected(["`resize_image`", "quantised"], model.model.resize_image, [24, 20])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    with pytest.raises(ImportError, match=r"`quantize_int8` needs torchao, .* pip install '\.\[quantize\]'"):
        quantize_int8(make_model("image", "full-kv", dtype=torch.float32))


def test_the_names_of_matrices():
    """Every parameter of three axes that a Translution layer has is one; a bank of biases is none."""
    for variant in ("full-qkv", "lor-qkv", "basis-qkv", "basis-lor-qv", "attention", "relative-vector"):
        for mixer in make_model("text", variant).modules():
            if isinstance(mixer, Mixer):
                expected = [name for name, tensor in mixer.named_parameters(recurse=False) if tensor.ndim == 3]
                assert mixer.offset_matrices() == expected


def test_the_look_at_its_matrices():
    """Norms of what the integers stand for: those of the model before, but for 8 bits."""
    for variant in ("full-qkv", "lor-qkv", "basis-qkv"):
        model = make_model("image", variant, dtype=torch.float32)
        before, after = (describe_banks(one, 1) for one in (model, quantize_int8(copy.deepcopy(model))))
        for old, new in zip(before, after, strict=True):
            old, new = ([row["norm"] for row in bank["norms"]] for bank in (old, new))
            assert old != new
            assert new == pytest.approx(old, rel=0.02)


# The command


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model("text", dtype=torch.float32, max_position_embeddings=24)
    model.save_pretrained("words")
    make_tokenizer().save_pretrained("words")
    (tmp_path / "words" / "LICENSE").write_text("as you like")
    return model


def test_the_command_writes_what_loads(words, tmp_path, capsys):
    quantize.main(["words", "--output", "small"])
    loaded = AUTO["text"].from_pretrained("small")
    assert (tmp_path / "small" / "LICENSE").is_file()
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    before = 4 * sum(parameter.numel() for parameter in words.parameters())
    # Of each quantised number a byte, of each column a float32 and a zero point, which is a byte; float32 of all else.
    after = sum(
        weight.numel() + 5 * weight.scale.numel() if is_int8(weight) else 4 * weight.numel()
        for weight in loaded.parameters()
    )
    assert after < before / 2
    assert capsys.readouterr().out.splitlines()[-1] == f"small: {before:,} bytes of weights before, {after:,} after"


def test_the_command_says_what_is_wrong(words, capsys):
    for arguments, message in (
        (["words"], "one of the arguments --output --measure is required"),
        (["words", "words", "--output", "small"], "`output` takes one model, got 2"),
        (["words", "--output", "words"], "`output` must be a new or empty directory"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_command(quantize.main, arguments)
        assert exit_.value.code in (1, 2)
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_perplexity_is_that_of_each_token(words, monkeypatch):
    """Of a model in all three kinds of weights, against a loop over blocks of the reference implementation in float64."""
    datasets = pytest.importorskip("datasets")
    texts = ["the cat sat on a mat " * 9, "one dog saw the cat", "far away"]
    parts = {"test": datasets.Dataset.from_dict({"text": texts})}
    monkeypatch.setattr("training.text_data.standard_library_dataset", lambda: parts)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained("words")
    monkeypatch.setattr(quantize, "BATCH", 2)
    rows = {row["weights"]: row for row in quantize.measure("words")}
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    model, losses = words.double(), []
    model.set_attn_implementation("eager")
    for start in range(0, len(ids), 24):
        block = torch.tensor(ids[start : start + 24])
        logits = model(block[None]).logits[0]
        losses += [-logits[i].log_softmax(-1)[block[i + 1]].item() for i in range(len(block) - 1)]
    expected = torch.tensor(losses).mean().exp().item()
    assert {row["samples"] for row in rows.values()} == {len(losses)}
    # Four digits are written. In bfloat16 eight bits, in int8 seven and a sign, leave this model as good as it is.
    for kind, bound in (("float32", 1e-4), ("bfloat16", 0.03), ("int8", 0.03)):
        assert abs(float(rows[kind]["value"]) / expected - 1) <= bound, kind
    sizes = [rows[kind]["weight_bytes"] for kind in quantize.KINDS]
    assert sizes[0] == 2 * sizes[1]
    assert sizes[2] < sizes[1]


# Evaluation of what the command wrote


TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,head_dim=8,intermediate_size=16"
SHORT = f"--config_overrides {TINY} --max_steps 4 --save_strategy no --disable_tqdm true --use_cpu true".split()
ALONE = ["--do_train", "false", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Imports a training script; what it prepares of the data is kept in the test's folder, as everything else."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


def evaluated(folder: str) -> dict[str, float]:
    return json.loads(Path(folder, "evaluation_results.json").read_text(encoding="utf-8"))


def mean_loss(model: nn.Module, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> float:
    """Of the readable implementation in float64."""
    logits = reference_logits(model, inputs)
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).item()


@pytest.fixture
def quantised_pictures(scripts, tmp_path):
    """Pictures of two classes, and a classifier of them in 8 bits."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(0, 120, (8, 8, 3), dtype=np.uint8) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{index}.png")
    options = ["--train_dir", "pictures", "--image_size", "8", "--patch_size", "4", "--output_dir", "whole"]
    scripts("run_image_classification").main([*SHORT, *options])
    quantize.main(["whole", "--output", "small"])
    return scripts("run_image_classification")


def test_a_quantised_classifier_is_evaluated(quantised_pictures, capsys):
    script = quantised_pictures
    test = [*ALONE, "--validation_dir", "pictures", "--test_dir", "pictures", "--do_predict", "true"]
    script.main([*test, "--model_name_or_path", "small", "--output_dir", "out"])
    model, processor = AUTO["image"].from_pretrained("small"), AutoImageProcessor.from_pretrained("small")
    paths = sorted(Path("pictures").glob("*/*.png"))
    inputs = processor([Image.open(path) for path in paths], return_tensors="pt")
    labels = torch.tensor([model.config.label2id[path.parent.name] for path in paths])
    # A loss in float32 from weights that are the same numbers.
    assert evaluated("out")["eval_loss"] == pytest.approx(mean_loss(model, inputs, labels), rel=1e-5)
    classes = reference_logits(model, inputs).argmax(-1)
    assert evaluated("out")["eval_accuracy"] == (classes == labels).double().mean()
    with open("out/predictions.csv", newline="", encoding="utf-8") as file:
        rows = {row["file"]: row["label"] for row in csv.DictReader(file)}
    assert rows == {str(path): model.config.id2label[int(index)] for path, index in zip(paths, classes, strict=True)}
    # Where it lies, and of the training's data, the same; without data that have classes predictions alone.
    for options in (
        ["--validation_dir", "pictures", "--output_dir", "small"],
        [
            "--validation_dir",
            "pictures",
            "--train_dir",
            "pictures",
            "--model_name_or_path",
            "small",
            "--output_dir",
            "o",
        ],
    ):
        script.main([*ALONE, *options])
        found = evaluated(options[-1])["eval_loss"]
        assert found == pytest.approx(evaluated("out")["eval_loss"], rel=64 * torch.finfo(torch.float32).eps)
    # Where options would make a model of another shape, that is said, and what helps.
    arguments = [*ALONE, "--train_dir", "pictures", "--image_size", "8", "--patch_size", "4", "--output_dir", "small"]
    with pytest.raises(ValueError, match=r"in small are those of another model .* `--model_name_or_path small`"):
        script.main(arguments)
    script.main([*arguments, "--model_name_or_path", "small"])
    Path("out/predictions.csv").unlink()
    predict = ["--do_eval", "false", "--test_dir", "pictures", "--output_dir", "out", "--model_name_or_path", "small"]
    script.main([*ALONE, *predict])
    with open("out/predictions.csv", newline="", encoding="utf-8") as file:
        assert rows == {row["file"]: row["label"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("options", [[], ["--freeze_layers", "1"], ["--image_size", "16"]], ids=" ".join)
def test_a_quantised_classifier_is_not_trained(quantised_pictures, options, capsys):
    arguments = [
        "--train_dir",
        "pictures",
        "--model_name_or_path",
        "small",
        "--output_dir",
        "out",
        "--use_cpu",
        "true",
    ]
    with pytest.raises(SystemExit):
        run_command(quantised_pictures.main, [*arguments, *options])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: `model_name_or_path` must be a model in floating point numbers, small is quantised")
    assert "quantise the result by scripts/quantize.py" in line
    assert "`--do_train false`" in line


def test_a_quantised_language_model_is_evaluated_and_not_trained(scripts, tmp_path, capsys):
    script = scripts("run_clm")
    Path("text.txt").write_text("the cat sat on a mat and saw a dog " * 30)
    options = ["--train_file", "text.txt", "--block_size", "16", "--vocab_size", "280"]
    script.main([*SHORT, *options, "--output_dir", "whole"])
    quantize.main(["whole", "--output", "small"])
    script.main([*ALONE, "--validation_file", "text.txt", "--model_name_or_path", "small", "--output_dir", "out"])
    model, tokenizer = AUTO["text"].from_pretrained("small"), AutoTokenizer.from_pretrained("small")
    ids = tokenizer(Path("text.txt").read_text())["input_ids"] + [tokenizer.eos_token_id]
    blocks = [torch.tensor([ids[start : start + 16]]) for start in range(0, len(ids), 16)]
    losses = [
        (mean_loss(model, {"input_ids": one[:, :-1]}, one[:, 1:]), one.numel() - 1)
        for one in blocks
        if one.numel() > 1
    ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert evaluated("out")["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    with pytest.raises(SystemExit):
        run_command(
            script.main, ["--train_file", "text.txt", "--model_name_or_path", "small", "--output_dir", "tuned"]
        )
    assert "small is quantised, and its integers cannot be trained" in capsys.readouterr().err.splitlines()[-1]

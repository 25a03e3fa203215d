"""`scripts/look.py`: its numbers against loops over the parameters, its figures, and its errors."""

import json
import math
from pathlib import Path

import look
import numpy as np
import pytest
import torch
from common.command import run_command
from common.offset_matrices import bank_matrices, describe_bank, near_rows, offset_labels
from matplotlib.figure import Figure
from PIL import Image
from small_models import make_config, make_inputs, make_model, make_tokenizer
from studies import demo_report
from test_from_attention import GPT2, ROTARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, ViTImageProcessorPil

from translution import TranslutionForCausalLM
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators.pair_layout import PairLayout, bank_layout


# Sums in float64 of a few hundred products each, twice.
ROUNDING = 1000 * torch.finfo(torch.float64).eps
BANKS = ["full-qkv", "full-clamped", "local-shared", "basis-kv-clamped", "basis-lor-qv", "lor-qkv", "hybrid-lor"]


def mixers_of(model):
    return [module for module in model.modules() if isinstance(module, TranslutionMixer)]


def matrix_of(mixer, name, row):
    """The matrix of one offset, from the parameters, in NumPy."""
    values = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    if mixer.offset_basis is None:
        matrix = values[f"{name}_bank"][row]
    else:
        matrix = sum(
            b * u for b, u in zip(values[f"{name}_coefficients"][row], values[f"{name}_factors"], strict=True)
        )
    if mixer.low_rank:
        matrix = values[f"{name}_down.weight"].T @ matrix
        if name == "v":
            matrix = matrix @ values["v_up.weight"].T
    return matrix


# Numbers


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("variant", BANKS)
def test_norms_and_distances_are_those_of_a_loop(modality, variant):
    model = make_model(modality, variant)
    banks = look.describe(model)["banks"]
    pairs = [(mixer, name) for mixer in mixers_of(model) for name in mixer.relative]
    assert len(banks) == len(pairs) >= 2
    for bank, (mixer, name) in zip(banks, pairs, strict=True):
        assert (bank["layer"], bank["projection"]) == (mixer.layer_idx, name)
        count = mixer.bank_layout.num_offsets
        matrices = [matrix_of(mixer, name, row) for row in range(count)]
        assert bank["shape"] == list(matrices[0].shape)
        expected = [math.sqrt(sum(x * x for x in matrix.ravel().tolist())) for matrix in matrices]
        assert [one["norm"] for one in bank["norms"]] == pytest.approx(expected, rel=ROUNDING)
        labels = [one["offset"] for one in bank["norms"]]
        shared = matrices[labels.index("far")] if "far" in labels else sum(matrices) / count
        assert bank["reference"] == ("far" if "far" in labels else "mean")
        assert bank["reference_norm"] == pytest.approx(np.linalg.norm(shared), rel=ROUNDING)
        for one in bank["near"]:
            difference = matrices[labels.index(one["offset"])] - shared
            distance = np.linalg.norm(difference) / np.linalg.norm(shared)
            assert one["relative_distance"] == pytest.approx(distance, rel=ROUNDING)
            # The square roots of the eigenvalues of the Gram matrix, of which small ones lose half of their digits.
            gram = np.linalg.eigvalsh(difference.T @ difference)[::-1][:4].clip(min=0)
            assert one["singular_values"] == pytest.approx(np.sqrt(gram)[: len(one["singular_values"])], abs=1e-6)


def test_near_offsets():
    def near(modality, variant, reach, **fields):
        layout = bank_layout(make_config(modality, variant, **fields))
        labels = offset_labels(layout)
        return [labels[row] for row in near_rows(layout, reach)]

    window = [[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)]
    big = {"image_size": [20, 25], "patch_size": 5}
    assert near("image", "full-kv", 1, **big) == window
    assert near("image", "local-shared", 1, **big) == near("image", "local-shared", 5, **big) == window
    # At the edge of clamped offsets are far ones, too.
    assert near("image", "full-clamped", 1, **big) == [[0, 0]]
    assert near("image", "full-clamped", 5, max_relative_distance=2, **big) == window
    assert near("text", "full-kv", 3) == [0, 1, 2, 3]
    assert near("text", "full-kv", 0) == [0]
    assert near("text", "local-rotary", 3) == [0, 1]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("distance", "share_far"), [(None, False), (0, False), (1, False), (1, True), (2, True)])
def test_labels_are_the_offsets_of_pairs(distance, share_far, class_token):
    """Of every pair of an image, by its tokens' places."""
    height, width = 4, 3
    layout = PairLayout.for_image(height, width, height, width, distance, share_far, class_token)
    labels, rows = offset_labels(layout), layout.offsets()[0]
    assert len(labels) == layout.num_offsets
    places = [None] * class_token + [(x, y) for x in range(height) for y in range(width)]
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query is None or key is None:
                ends = ["patch" if place else "class" for place in (query, key)]
                expected = "class to class" if ends[0] == ends[1] else " from ".join(ends)
            else:
                expected = [a - b for a, b in zip(query, key, strict=True)]
                if distance is not None:
                    beyond = max(map(abs, expected)) > distance
                    clamped = [max(-distance, min(distance, one)) for one in expected]
                    expected = "far" if beyond and share_far else clamped
            assert labels[rows[i, j]] == expected


@pytest.mark.parametrize("distance", [None, 0, 1, 3])
def test_labels_are_the_distances_of_a_text(distance):
    layout = PairLayout.for_text(6, 6, distance)
    labels, rows = offset_labels(layout), layout.offsets()[0]
    assert len(labels) == layout.num_offsets
    for i in range(6):
        for j in range(i + 1):
            expected = "far" if distance is not None and i - j >= distance else i - j
            assert labels[rows[i, j]] == expected


def converted(kind, fields, **options):
    source = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields))
    for name, parameter in source.named_parameters():
        # They are zero to begin with.
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return TranslutionForCausalLM.from_attention(source.double().eval(), **options)


@pytest.mark.parametrize("options", [{}, {"offset_basis": 3}], ids=["full", "basis"])
@pytest.mark.parametrize(("kind", "fields"), [("llama", ROTARY), ("gpt2", GPT2)], ids=["llama", "gpt2"])
def test_a_converted_model_begins_with_the_trained_matrix_everywhere(kind, fields, options):
    """Without its bias, which a basis has as one row more of its factors."""
    model = converted(kind, fields, max_relative_distance=2, **options)
    hidden = model.config.hidden_size
    for bank in look.describe(model)["banks"]:
        assert bank["shape"][0] == hidden
        assert [one["relative_distance"] for one in bank["near"]] == pytest.approx([0, 0], abs=ROUNDING)
        mixer = mixers_of(model)[bank["layer"]]
        trained = getattr(mixer, f"{bank['projection']}_{'factors' if options else 'bank'}")[0, :hidden]
        assert [one["norm"] for one in bank["norms"]] == pytest.approx([trained.norm().item()] * 3, rel=ROUNDING)


def test_a_converted_low_rank_part_begins_with_nothing():
    model = converted("llama", ROTARY, relative_rank=2, max_relative_distance=2, relative_projections="v")
    (bank, _) = look.describe(model)["banks"]
    assert {one["norm"] for one in bank["norms"]} == {0.0}
    assert [one["relative_distance"] for one in bank["near"]] == [None, None]
    assert "–" in look.summary({**look.describe(model), "model": "x"})


def test_low_rank_values_of_grouped_heads_are_what_the_mixer_adds():
    """The products of factors, with heads of values that several heads of queries share."""
    model = converted("llama", ROTARY, relative_rank=2, max_relative_distance=2, relative_projections="v")
    mixer = mixers_of(model)[0]
    torch.nn.init.normal_(mixer.v_bank)
    torch.nn.init.zeros_(mixer.v_proj.weight)
    mixer.o_proj = torch.nn.Identity()
    tokens, layout = torch.randn(1, 5, 18, dtype=torch.float64), PairLayout.for_text(5, 5, 2)
    turns = tuple(torch.ones(1, 1, 5, 4, dtype=torch.float64) * one for one in (1, 0))
    with torch.no_grad():
        found, weights = mixer(tokens, layout, rotation=turns, output_attentions=True)
        matrices = bank_matrices(mixer, "v")
        # `Uo` mixes heads, so that weights apply before it: of each head alone.
        expected, up = torch.zeros_like(found), mixer.v_up.weight.T
        ranks = up.shape[0] // mixer.num_heads
        for i in range(5):
            for j in range(i + 1):
                row = min(i - j, 2)
                whole = tokens[0, j] @ matrices[row]
                parts = []
                for head in range(mixer.num_heads):
                    of_key = head // mixer.groups
                    bank = mixer.v_bank[row, :, of_key * ranks : (of_key + 1) * ranks]
                    parts.append(mixer.v_down(tokens[0, j]) @ bank @ up[head * ranks : (head + 1) * ranks])
                torch.testing.assert_close(sum(parts), whole, rtol=ROUNDING, atol=ROUNDING)
                expected[0, i] += sum(w * part for w, part in zip(weights[0, :, i, j], parts, strict=True)) / 2
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_attention_is_the_row_of_its_token(modality):
    """Of every mixer with attention, and of layers that come after one without."""
    model = make_model(modality, "hybrid-all", attn_implementation="eager")
    inputs = make_inputs(model.config, batch=1)
    found = look.attention_of_token(model, inputs, -2)
    assert found["token"] == 5
    assert [one["layer"] for one in found["layers"]] == [0, 1, 2, 3, 4, 5, 7]
    hooked = {}
    for index, layer in enumerate(model.model.layers):
        layer.mixer.register_forward_hook(lambda _, __, output, index=index: hooked.update({index: output[1]}))
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    for one in found["layers"]:
        weights = torch.tensor(one["weights"], dtype=torch.float64)
        torch.testing.assert_close(weights, hooked[one["layer"]][0, :, 5], rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64), rtol=ROUNDING, atol=ROUNDING)


# The command


@pytest.fixture
def saved(tmp_path):
    """Saves a small model with what makes its inputs, and a picture."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")

    def save(modality, variant, **fields):
        model, folder = make_model(modality, variant, **fields), tmp_path / f"{modality} {variant} $x$"
        model.save_pretrained(folder)
        if modality == "text":
            make_tokenizer().save_pretrained(folder)
        else:
            height, width = model.config.image_height_width
            ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
        return str(folder)

    return save


def colours(path):
    with Image.open(path) as picture:
        assert picture.width > 1000
        return len(picture.convert("RGB").getcolors(1 << 24))


def test_a_picture(saved, tmp_path, capsys):
    folder = saved("image", "local-shared")
    output, numbers = tmp_path / "figure.png", tmp_path / "figure.json"
    look.main([folder, str(tmp_path / "picture.png"), "--token", "3", "--output", str(output), "--json", str(numbers)])
    # Ink of two colour maps; an empty figure is white.
    assert colours(output) > 300
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert report["attention"]["token"] == 3
    assert np.array(report["attention"]["layers"][1]["weights"]).shape == (2, 7)
    assert [bank["projection"] for bank in report["banks"]] == ["k", "v", "k", "v"]
    printed = capsys.readouterr().out
    assert "| 1 | v | 13 × 12 × 16 |" in printed
    assert "without a matrix" not in printed


def test_a_text(saved, tmp_path, capsys):
    folder, output = saved("text", "local-rotary"), tmp_path / "figure.svg"
    look.main([folder, "the cat sat $on$", "--output", str(output)])
    capsys.readouterr()
    assert output.read_text(encoding="utf-8").count("<path") > 100
    look.main([folder, "the cat sat on", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert (report["attention"]["token"], report["attention"]["tokens"]) == (3, ["the", "cat", "sat", "on"])
    assert [one["offset"] for one in report["banks"][0]["norms"]] == [0, 1, "far"]


def test_a_model_of_attention(saved, tmp_path, capsys):
    folder, output = saved("image", "attention"), tmp_path / "figure.png"
    assert "no layer with a matrix for each offset, `mixer_types` ['attention', " in fails(
        capsys, folder, "--output", str(output)
    )
    look.main([folder, str(tmp_path / "picture.png"), "--output", str(output)])
    assert capsys.readouterr().out.splitlines() == [
        f"{output}: the figure",
        "Layers without a matrix for each offset: 0 (attention), 1 (attention).",
    ]
    assert colours(output) > 100


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run_command(look.main, arguments)
    assert error.value.code in (1, 2)
    return capsys.readouterr().err


def test_errors_say_what_is_wrong(saved, tmp_path, capsys, monkeypatch):
    images, text = saved("image", "full-kv"), saved("text", "full-kv")
    output = ["--output", str(tmp_path / "figure.png")]
    picture = str(tmp_path / "picture.png")
    assert "there is no picture 'nowhere.png'" in fails(capsys, images, "nowhere.png", *output)
    assert "the model classifies pictures, and is not asked in words" in fails(capsys, images, "the cat", *output)
    assert "picture.png' is a picture; the model goes on with text" in fails(capsys, text, picture, *output)
    assert "`token` must be at least -7 and less than 7, the number of tokens, got 7." in fails(
        capsys, images, picture, "--token", "7", *output
    )
    assert "`token` needs a picture or a text, got 0 without" in fails(capsys, images, "--token", "0", *output)
    assert "`near` must be an integer of at least 0, got -1" in fails(capsys, images, "--near", "-1", *output)
    assert "`output` must be a file named ….png, ….pdf, ….svg, got x.jpg" in fails(capsys, images, "--output", "x.jpg")
    assert "`output` must be in a folder that is there" in fails(capsys, images, "--output", "no/where.png")
    assert "`output` and `json` must be two outputs" in fails(capsys, images, *output, "--json", output[1])
    # By whatever name, and where it is the name by default.
    before = (tmp_path / "picture.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{Path(images).name}-look.png").symlink_to("picture.png")
    for options in (["--output", picture], ["--output", "./picture.png"], ["--json", picture], []):
        name = options[0].strip("-") if options else "output"
        told = f"`{name}` must be another file than the inputs, which it would replace, got "
        assert told in fails(capsys, images, picture, *options)
        assert (tmp_path / "picture.png").read_bytes() == before
    convolution = make_model("image", "convolution", attn_implementation="eager")
    with pytest.raises(ValueError, match=r"needs a layer with attention, got `mixer_types` \['convolution'"):
        look.attention_of_token(convolution, make_inputs(convolution.config, 1), 0)
    assert not (tmp_path / "figure.png").exists()


def test_the_demo_draws_these_norms(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(demo_report, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    model = make_model("image", "full-kv")
    row = {"model": "x", "accuracy": dict.fromkeys(demo_report.COMPARISONS, 50.0)}
    demo_report.draw(tmp_path / "demo.png", [row], [], [], model)
    (image,) = [image for axes in figures[0].axes for image in axes.images if image.get_array().ndim == 2][-1:]
    mixer = model.model.layers[0].mixer
    expected = [[np.linalg.norm(matrix_of(mixer, "v", 3 * row + column)) for column in range(3)] for row in range(5)]
    np.testing.assert_allclose(image.get_array(), expected, rtol=ROUNDING)
    assert describe_bank(mixer, "v", 1)["norms"][4]["norm"] == pytest.approx(expected[1][1], rel=ROUNDING)


def test_a_figure_gets_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model("image", num_hidden_layers=1).save_pretrained("runs/pictures")
    look.main(["runs/pictures"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures-look.png", "runs"]
    assert "pictures-look.png: the figure" in capsys.readouterr().out
    with Image.open("pictures-look.png") as picture:
        assert picture.format == "PNG"

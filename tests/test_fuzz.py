"""A few cases of `fuzz.py`, always the same, and that each check finds a mistake and says how to see it again."""

import copy
import json

import fuzz
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from translution import TranslutionConfig
from translution.modeling.mixers import masks
from translution.modeling.models import modeling_translution
from translution.modeling.models.modeling_translution import TranslutionPreTrainedModel
from translution.modeling.operators import decode, pair_layout


# The first export of a process takes seconds.
CHECKS = [name for name in fuzz.CHECKS if name != "export"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_models(seed):
    summary = fuzz.run(seed, range(10), CHECKS)
    assert not summary.failures
    assert summary.checks["reference"] == summary.checks["cache"] == summary.cases == 10


def scaled(function):
    return lambda *arguments, **options: function(*arguments, **options) * 1.001


def mixed_rows(layer_norm):
    return lambda module, tokens: layer_norm(module, tokens + 0.1 * tokens.mean(0))


def hides_nothing(fit_length):
    return lambda mask, length: torch.ones_like(fit_length(mask, length))


def save_half(model, folder):
    PreTrainedModel.save_pretrained(copy.deepcopy(model).bfloat16(), folder)


# A mistake for each check, and what the check says of it.
MISTAKES = {
    "reference": ((F, "scaled_dot_product_attention", scaled(F.scaled_dot_product_attention)), "logits: "),
    "precision": ((F, "scaled_dot_product_attention", scaled(F.scaled_dot_product_attention)), "float64 in torch."),
    "causality": ((masks, "distances", lambda *arguments: pair_layout.distances(*arguments) + 1), "logits before"),
    "hidden": ((masks, "_fit_length", hides_nothing(masks._fit_length)), "states that do not read"),
    "rows": ((nn.LayerNorm, "forward", mixed_rows(nn.LayerNorm.forward)), "logits of row"),
    "cache": ((decode, "pair_scores", scaled(decode.pair_scores)), "cache"),
    "packed": ((modeling_translution, "find_packed_texts", lambda position_ids: None), "logits of the text"),
    "resizing": (
        (modeling_translution, "resample_offsets", scaled(modeling_translution.resample_offsets)),
        "logits: ",
    ),
    "saving": ((TranslutionPreTrainedModel, "save_pretrained", save_half), "is not what was saved"),
    "invalid": ((TranslutionConfig, "_validate_mixers", lambda config: None), "mixer_types="),
}


@pytest.mark.parametrize("check", list(MISTAKES))
def test_each_check_finds_a_mistake(check, monkeypatch):
    mistake, words = MISTAKES[check]
    monkeypatch.setattr(*mistake)
    found = (fuzz.run_case(1, number, [check], always=True)[1] for number in range(40))
    (failure,) = next(failures for failures in found if failures)
    assert words in failure.message


def test_a_failure_can_be_seen_again(monkeypatch, capsys):
    monkeypatch.setattr(*MISTAKES["rows"][0])
    case = fuzz.run(1, range(20), ["rows"]).failures[0].number
    command = ["--seed", "1", "--case", str(case), "--checks", "rows"]
    capsys.readouterr()
    assert fuzz.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "again: python tests/fuzz.py " + " ".join(command) in lines
    fields = next(line.removeprefix("config ") for line in lines if line.startswith("config "))
    assert TranslutionConfig(**json.loads(fields)).initializer_range == 0.3
    monkeypatch.undo()
    assert fuzz.main(command) == 0

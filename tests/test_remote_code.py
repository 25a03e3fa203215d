"""Checkpoints carry their code: they load, generate and are saved again in a process without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TINY
from without_package import without_package

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


MODELS = {
    "text": (
        "AutoModelForCausalLM",
        TranslutionForCausalLM,
        {"vocab_size": 20, "max_position_embeddings": 16, "mixer_types": ["translution", "rope_attention"]},
        torch.arange(6)[None],
    ),
    "image": (
        "AutoModelForImageClassification",
        TranslutionForImageClassification,
        {"image_size": 8, "patch_size": 4, "mixer_types": ["translution", "convolution"]},
        torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
    ),
}


LOAD_AND_SAVE = """
import sys, torch, transformers
import unaligned
unaligned.follow_switch()
from closeness import assert_close_in_rounding
from safetensors.torch import load_file
try:
    import translution
except ImportError:
    pass
else:
    raise SystemExit("the package is here")
auto, first, second, sample = sys.argv[1:]
stored = load_file(sample)
model = getattr(transformers, auto).from_pretrained(first, trust_remote_code=True)
model.save_pretrained(second)
again = getattr(transformers, auto).from_pretrained(second, trust_remote_code=True)
for one in (model, again):
    assert_close_in_rounding(one(stored["input"]).logits, stored["logits"])
if auto == "AutoModelForCausalLM":
    assert model.generate(stored["input"], max_new_tokens=3, pad_token_id=0).shape == (1, 9)
"""


@pytest.mark.parametrize("modality", MODELS)
def test_loads_without_the_package(modality, tmp_path):
    auto_class, model_class, fields, inputs = MODELS[modality]
    model = model_class(TranslutionConfig(modality=modality, **TINY, **fields)).double().eval()
    model.save_pretrained(tmp_path / "first")
    save_file({"input": inputs, "logits": model(inputs).logits.detach()}, tmp_path / "sample.safetensors")
    path = without_package(tmp_path / "path")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, auto_class, "first", "second", "sample.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]
    files = [{file.name for file in (tmp_path / name).glob("*.py")} for name in ("first", "second")]
    assert files[0] == files[1]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_every_module_of_the_models_is_copied(tmp_path):
    TranslutionConfig(**TINY).save_pretrained(tmp_path)
    modeling = Path(sys.modules[TranslutionForCausalLM.__module__].__file__).parents[1]
    # The layer for other networks is no part of a model.
    modules = [file for file in modeling.rglob("*.py") if file.stem not in ("__init__", "layer")]
    names = {f"{file.parent.name}_{file.name}" for file in modules if file.stem != "modeling_translution"}
    assert len(names) > 20
    copied = {file.name for file in tmp_path.iterdir()}
    assert names | {"modeling_translution.py"} <= copied
    assert "mixers_layer.py" not in copied

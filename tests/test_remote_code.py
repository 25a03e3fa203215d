"""Checkpoints carry their code: they load, generate and are saved again in a process without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
for name in sys.argv[1:]:
    auto, stored = getattr(transformers, name), load_file(f"{name}.safetensors")
    model = auto.from_pretrained(f"{name}-first", trust_remote_code=True)
    model.save_pretrained(f"{name}-second")
    again = auto.from_pretrained(f"{name}-second", trust_remote_code=True)
    for one in (model, again):
        assert_close_in_rounding(one(stored["input"]).logits, stored["logits"])
    if name == "AutoModelForCausalLM":
        assert model.generate(stored["input"], max_new_tokens=3, pad_token_id=0).shape == (1, 9)
"""


def test_loads_without_the_package(tmp_path):
    """All in one process, which has to keep their code apart from each other's."""
    for modality, (auto_class, model_class, fields, inputs) in MODELS.items():
        model = model_class(TranslutionConfig(modality=modality, **TINY, **fields)).double().eval()
        model.save_pretrained(tmp_path / f"{auto_class}-first")
        sample = {"input": inputs, "logits": model(inputs).logits.detach()}
        save_file(sample, tmp_path / f"{auto_class}.safetensors")
    path, classes = without_package(tmp_path / "path"), [auto_class for auto_class, *_ in MODELS.values()]
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, *classes],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for auto_class in classes:
        folders = [tmp_path / f"{auto_class}-{name}" for name in ("first", "second")]
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        files = [{file.name for file in folder.glob("*.py")} for folder in folders]
        assert files[0] == files[1]
        first, second = (load_file(folder / "model.safetensors") for folder in folders)
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

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

from translution import (
    TranslutionBackbone,
    TranslutionConfig,
    TranslutionForCausalLM,
    TranslutionForImageClassification,
    TranslutionForMaskedImageModeling,
    TranslutionForSequenceClassification,
    TranslutionForTokenClassification,
)


TEXT = {"vocab_size": 20, "max_position_embeddings": 16, "mixer_types": ["translution", "rope_attention"]}
IMAGE = {"image_size": 8, "patch_size": 4, "mixer_types": ["translution", "convolution"]}
# What a head needs besides.
OTHERS = {"AutoModelForMaskedImageModeling": {"bool_masked_pos": torch.tensor([[True, False, False, True]])}}
# For each modality its heads by their Auto class, fields of the config, and an input.
MODELS = {
    "text": (
        {
            "AutoModelForCausalLM": TranslutionForCausalLM,
            "AutoModelForSequenceClassification": TranslutionForSequenceClassification,
            "AutoModelForTokenClassification": TranslutionForTokenClassification,
        },
        TEXT,
        torch.arange(6)[None],
    ),
    "image": (
        {
            "AutoModelForImageClassification": TranslutionForImageClassification,
            "AutoModelForMaskedImageModeling": TranslutionForMaskedImageModeling,
            "AutoBackbone": TranslutionBackbone,
        },
        IMAGE,
        torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
    ),
}


LOAD_AND_SAVE = """
import sys, torch, transformers
import unaligned
unaligned.follow_switch()
from closeness import assert_close_in_rounding
from safetensors.torch import load_file
from transformers.models.auto.auto_factory import _BaseAutoModelClass
try:
    import translution
except ImportError:
    pass
else:
    raise SystemExit("the package is here")
# `AutoBackbone` takes no folder for a model; otherwise it loads as all Auto classes do.
load = _BaseAutoModelClass.from_pretrained.__func__
for name in sys.argv[1:]:
    auto, stored = getattr(transformers, name), load_file(f"{name}.safetensors")
    inputs, output = stored.pop("input"), stored.pop("output")
    model = load(auto, f"{name}-first", trust_remote_code=True)
    model.save_pretrained(f"{name}-second")
    again = load(auto, f"{name}-second", trust_remote_code=True)
    for one in (model, again):
        outputs = one(inputs, **stored)
        (result,) = (outputs[key] for key in ("logits", "reconstruction", "feature_maps") if key in outputs)
        assert_close_in_rounding(result[0] if name == "AutoBackbone" else result, output)
    if name == "AutoModelForCausalLM":
        assert model.generate(inputs, max_new_tokens=3, pad_token_id=0).shape == (1, 9)
"""


def test_loads_without_the_package(tmp_path):
    """All in one process, which has to keep their code apart from each other's."""
    of_modality = {}
    for modality, (heads, fields, inputs) in MODELS.items():
        of_modality |= dict.fromkeys(heads, heads)
        for auto_class, model_class in heads.items():
            model = model_class(TranslutionConfig(modality=modality, **TINY, **fields)).double().eval()
            model.save_pretrained(tmp_path / f"{auto_class}-first")
            others = OTHERS.get(auto_class, {})
            outputs = model(inputs, **others)
            (output,) = (outputs[key] for key in ("logits", "reconstruction", "feature_maps") if key in outputs)
            output = (output[0] if auto_class == "AutoBackbone" else output).detach()
            save_file({"input": inputs, "output": output, **others}, tmp_path / f"{auto_class}.safetensors")
    path = without_package(tmp_path / "path")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, *of_modality],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for auto_class, heads in of_modality.items():
        folders = [tmp_path / f"{auto_class}-{name}" for name in ("first", "second")]
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        # Every head of this modality, whichever was saved.
        assert heads.keys() <= configs[0]["auto_map"].keys()
        for name in configs[0]["auto_map"].values():
            assert (folders[0] / f"{name.partition('.')[0]}.py").is_file()
        files = [{file.name for file in folder.glob("*.py")} for folder in folders]
        assert files[0] == files[1]
        first, second = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_every_module_of_the_models_is_copied(tmp_path):
    TranslutionConfig(**TINY).save_pretrained(tmp_path)
    modeling = Path(sys.modules[TranslutionForCausalLM.__module__].__file__).parents[1]
    # The layer for other networks is no part of a model, nor is what stores its weights in 8 bits.
    modules = [file for file in modeling.rglob("*.py") if file.stem not in ("__init__", "layer", "quantization")]
    names = {f"{file.parent.name}_{file.name}" for file in modules if file.stem != "modeling_translution"}
    assert len(names) > 20
    copied = {file.name for file in tmp_path.iterdir()}
    assert names | {"modeling_translution.py"} <= copied
    assert "mixers_layer.py" not in copied

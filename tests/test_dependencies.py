"""What `pip install .` brings is enough for what the README's first words promise."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest


tomllib = pytest.importorskip("tomllib", reason="before Python 3.11 there is no reader of pyproject.toml")
ROOT = Path(__file__).resolve().parents[1]
# The rest of the site is hidden, as if it was not installed.
HIDE = """
import importlib.abc, sys
hidden = set(sys.argv[1].split(","))
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find_spec(name, *rest)
"""
USE = """
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTImageProcessorPil, pipeline
from translution import TranslutionConfig, TranslutionForImageClassification
model = TranslutionForImageClassification(TranslutionConfig(
    image_size=8, patch_size=4, num_labels=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8))
data = [{"pixel_values": torch.randn(3, 8, 8), "labels": index} for index in range(3)]
arguments = TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
Trainer(model, arguments, train_dataset=data).train()
model.save_pretrained("model")
ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained("model")
print(len(pipeline("image-classification", "model")(Image.new("RGB", (9, 9)))))
"""


def required(names: list[str]) -> set[str]:
    """Normalised names of distributions and of all that they need, without extras."""
    found, left = set(), [re.match(r"[\w.-]+", name)[0] for name in names]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                # Of another system.
                continue
            left += [re.match(r"[\w.-]+", one)[0] for one in needs if "extra ==" not in one]
    return found


def test_the_package_alone_trains_and_classifies(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = required(project["dependencies"]) | {"translution", "setuptools", "pip"}
    hidden = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & allowed
    }
    # The test would tell: these are there, and not needed.
    assert {"datasets", "sklearn"} & hidden
    done = subprocess.run(
        [sys.executable, "-c", HIDE + USE, ",".join(hidden)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "3"

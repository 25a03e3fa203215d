"""Operators belong to the code that registered them: a checkpoint's copy runs its own, unless the copies are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from translution import TranslutionConfig, TranslutionForImageClassification
from translution.configuration.remote_code import copy_code
from translution.modeling.operators import registration


FIELDS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
# The last line of the operator that does the whole attention.
LINE, CHANGED = (
    "return output.transpose(0, 1).to(tensors[2].dtype).contiguous(), logsumexp",
    "return 0 * output.transpose(0, 1).to(tensors[2].dtype).contiguous(), logsumexp",
)

COMPARE = """
import sys
from torch.testing import assert_close
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

stored = load_file("sample.safetensors")
remote = {
    name: AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True) for name in ("changed", "same")
}
import translution
models = {**remote, "package": translution.TranslutionForImageClassification.from_pretrained("same")}
spaces, flops = {}, {}
for name, model in models.items():
    with FlopCounterMode(display=False) as counter:
        logits = model(stored["input"]).logits
    assert_close(logits, stored["zero" if name == "changed" else "logits"])
    package = type(model).__module__.rpartition(".")[0]
    registration = sys.modules.get(f"{package}.operators_registration") or sys.modules["translution.modeling.operators.registration"]
    spaces[name] = registration.namespace()
    flops[name] = counter.get_flop_counts()["Global"][registration.operator("streamed_attention")]
assert type(remote["changed"]).__module__.startswith("transformers_modules")
assert spaces["same"] == spaces["package"] != spaces["changed"], spaces
assert flops["same"] == flops["package"] == flops["changed"] > 0, flops
"""


def test_a_checkpoint_runs_the_operators_of_its_own_code(tmp_path):
    model = TranslutionForImageClassification(TranslutionConfig(**FIELDS)).eval()
    for name in ("changed", "same"):
        model.save_pretrained(tmp_path / name)
    streamed = tmp_path / "changed" / "operators_streamed.py"
    text = streamed.read_text()
    assert text.count(LINE) == 1
    streamed.write_text(text.replace(LINE, CHANGED))
    pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    logits = model(pixels).logits.detach()
    with torch.no_grad():
        model.model.layers[0].mixer.v_bank.zero_()
    zero = model(pixels).logits.detach()
    assert (logits - zero).abs().max() > 1e-3
    save_file({"input": pixels, "logits": logits, "zero": zero}, tmp_path / "sample.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def copied_digest(folder: Path) -> str:
    copy_code(folder)
    return registration._digest(folder.glob("*.py"), "copy")


def test_a_copy_beside_the_configuration_has_the_same_namespace(tmp_path):
    assert f"translution_{copied_digest(tmp_path)}" == registration.namespace()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("operators_offset_blocks.py", "WORKSPACE_ELEMENTS = 1 << 18", "WORKSPACE_ELEMENTS = 1 << 17"),
        ("kernels_pair_kernels.py", "import triton\n", "import triton \n    changed = True\n"),
        ("operators_streamed.py", "from .operators_class_token import", "from .operators_others import"),
        ("operators_streamed.py", "import class_blocks", "import others as class_blocks"),
        ("operators_dispatch.py", "operators_grouped as grouped", "operators_gathered as grouped"),
    ],
)
def test_any_change_has_a_namespace_of_its_own(tmp_path, name, old, new):
    first, path = copied_digest(tmp_path), tmp_path / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert registration._digest(tmp_path.glob("*.py"), "copy") != first


def test_code_without_source_is_told_apart_by_its_name(tmp_path):
    digests = {registration._digest([], name) for name in ("first", "second", "first")}
    assert len(digests) == 2


def test_operators_are_registered_once():
    held = registration.operator("pair_scores")

    def again():
        raise AssertionError("registered again")

    assert registration.register_once(("pair_scores",), again) == (held,)

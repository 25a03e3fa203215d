"""Every test starts from the same seed and uses one thread. Without a GPU Triton's kernels are interpreted on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch


if not torch.cuda.is_available():
    # Read when Triton is imported. The models choose the kernels by themselves on GPUs alone.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As when a script is called, so that the tests import what the scripts import.
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)

"""Every test starts from the same seed and the same number of threads.

Without a GPU Triton's kernels are interpreted on the CPU. The results of matrix products hang on the processor, the
threads and the addresses of weights (see `closeness.py`); to see that no test does, run the suite in other settings too:

    python -m pytest                                  # the processor's own kernels, one thread
    ATEN_CPU_CAPABILITY=default python -m pytest      # PyTorch's kernels for any processor
    ATEN_CPU_CAPABILITY=avx2 python -m pytest         # PyTorch's kernels for processors without AVX-512
    MKL_CBWR=COMPATIBLE python -m pytest              # MKL's products for any processor
    TRANSLUTION_TEST_UNALIGNED=1 python -m pytest     # loaded weights at addresses that are no multiple of 64 bytes
    TRANSLUTION_TEST_THREADS=4 python -m pytest       # four threads in the process of the tests
"""

import gc
import os
import sys
from pathlib import Path

import hub_server
import pytest
import torch
import unaligned
from huggingface_hub import constants


# Before anything imports them, so that what they assert shows its values as a test does.
pytest.register_assert_rewrite("closeness", "distributed_worker", "fuzz", "small_layers", "small_models")

if not torch.cuda.is_available():
    # Read when Triton is imported. The models choose the kernels by themselves on GPUs alone.
    os.environ.setdefault("TRITON_INTERPRET", "1")

THREADS = os.environ.get("TRANSLUTION_TEST_THREADS", "1")
if not THREADS.isdecimal() or int(THREADS) < 1:
    raise ValueError(f"`TRANSLUTION_TEST_THREADS` must be a whole number of at least 1, got {THREADS!r}")

unaligned.follow_switch()

# As when a script is called, so that the tests import what the scripts import.
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


def pytest_collection_finish():
    # Imports and collected tests are never freed: to go through them again and again took up to half of the time of some files.
    gc.collect()
    gc.freeze()
    # What is left is little: to look for cycles each 700 objects took a tenth of it.
    gc.set_threshold(20_000, 20, 100)


def pytest_sessionfinish():
    # Libraries that count their objects at the end find them deleted.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(int(THREADS))


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process' client talks to, logged in, with a cache of its own."""
    with hub_server.running() as server:
        hub_server.point_to(server.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server

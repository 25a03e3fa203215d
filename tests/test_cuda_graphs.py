"""A forward and a backward pass by the kernels can be captured in a CUDA graph: nothing waits for the GPU, or copies to it.

Tensors without data stand for those of a GPU. The kernels are not run.
"""

import importlib

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.operators import dispatch, fused_attention, registration


pytest.importorskip("triton")

# What makes a tensor of numbers that Python has, which a GPU is sent from the host.
FROM_HOST = {torch: ("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"), torch.Tensor: ("new_tensor",)}
# What PyTorch says depends on the values of a tensor, besides indexing with booleans.
WAITING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
IMAGE = {"image_size": 6, "patch_size": 1, "num_labels": 3}
TEXT = {"modality": "text", "vocab_size": 11, "max_position_embeddings": 12}
NEAR = {"max_relative_distance": 1, "far_offsets": "shared", "image_size": 12}
CASES = {
    "image-kv": IMAGE,
    "image-qkv": IMAGE | {"relative_projections": "qkv"},
    "image-lor": IMAGE | {"relative_rank": 3, "relative_projections": "qkv"},
    "image-basis": IMAGE | {"offset_basis": 2, "relative_projections": "qkv"},
    "image-basis-lor": IMAGE | {"offset_basis": 2, "relative_rank": 3},
    "image-clamped": IMAGE | {"max_relative_distance": 1},
    "image-clamped-qkv": IMAGE | {"max_relative_distance": 1, "relative_projections": "qkv"},
    "image-local": IMAGE | NEAR,
    "image-local-rotary": IMAGE | NEAR | {"mixer_types": "rope_translution", "relative_projections": "qk"},
    "text-kv": TEXT,
    "text-qkv": TEXT | {"relative_projections": "qkv"},
    "text-basis": TEXT | {"offset_basis": 2},
    "text-lor": TEXT | {"relative_rank": 3},
    "text-local": TEXT | {"max_relative_distance": 2},
    "text-local-rotary": TEXT | {"max_relative_distance": 2, "mixer_types": "rope_translution"},
}

MASKED = ("image-kv", "image-basis", "image-clamped", "image-local", "text-kv", "text-basis", "text-local")


class Captured(TorchDispatchMode):
    """Runs what this package's operators do on a GPU; an error where that could not be captured, or reads what may be freed.

    `lives` are the tensors that live as long as a graph does.
    """

    def __init__(self, lives):
        super().__init__()
        self.known = {self.memory(tensor): tensor for tensor in lives}

    @staticmethod
    def memory(tensor):
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        for tensor in given:
            assert tensor.device.type == "meta", f"{function} copies from the host"
            assert self.memory(tensor) in self.known, f"{function} reads what an earlier call has made"
        assert not WAITING & set(function.tags), f"{function} waits for the GPU"
        if function is torch.ops.aten.index.Tensor or function is torch.ops.aten.index_put_.default:
            places = [place for place in args[1] if place is not None]
            assert not any(place.dtype == torch.bool for place in places), f"{function} waits for the GPU"
        name, _, _ = function.name().partition(".")
        if name in OPDEFS and name.startswith(f"{registration.namespace()}::"):
            with self:
                result = OPDEFS[name]._init_fn(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{function} makes a tensor of the host"
                # Kept, so that no other has its memory.
                self.known[self.memory(tensor)] = tensor
        return result


def from_host(*args, **kwargs):
    raise AssertionError("numbers of Python are copied from the host")


def watched_index(plain):
    """`Tensor.__getitem__` or `__setitem__`, which send a list of places from the host."""

    def index(self, places, *value):
        parts = places if isinstance(places, tuple) else (places,)
        assert not any(isinstance(part, (list, range)) for part in parts), "a list of places is copied from the host"
        return plain(self, places, *value)

    return index


def fused(device, dtype, size, biased=False):
    """The attention that PyTorch has on a GPU for the far pairs."""
    return fused_attention._EFFICIENT if biased else fused_attention._FLASH


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors without data are served as those of a GPU are; returns the names of the kernels that are launched."""
    launched = []

    def prepare(kernel, grid, options, derived, **arguments):
        launched.append(kernel.__name__)
        for option in options:
            grid(option)
            derived(option)

    dispatch._load()
    for module in ("triton_pairs", "triton_basis", "triton_local"):
        name = f"translution.modeling.operators.{module}"
        monkeypatch.setattr(importlib.import_module(name), "launch", prepare)
    monkeypatch.setattr(dispatch, "device_obstacle", lambda *args: "")
    # They are on no device that knows it.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(fused_attention, "fused", fused)
    return launched


def watch(run, lives):
    """Calls a function whose every operation a CUDA graph has to be able to capture."""
    with pytest.MonkeyPatch.context() as patch, Captured(lives):
        for owner, names in FROM_HOST.items():
            for name in names:
                patch.setattr(owner, name, from_host)
        for name in ("__getitem__", "__setitem__"):
            patch.setattr(torch.Tensor, name, watched_index(getattr(torch.Tensor, name)))
        run()


def make_model(fields):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 1, "num_channels": 1}
    config = TranslutionConfig(**{"relative_projections": "kv", "intermediate_size": 16, **sizes, **fields})
    with torch.device("meta"):
        head = TranslutionForCausalLM if config.modality == "text" else TranslutionForImageClassification
        model = head(config).to(torch.bfloat16)
    model.set_attn_implementation(dispatch.TRITON)
    return model


def numbers(*shape):
    return torch.zeros(shape, dtype=torch.long, device="meta")


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_can_be_captured(name, on_gpu):
    model = make_model(CASES[name])
    if model.config.modality == "text":
        inputs = {"input_ids": numbers(2, 9), "labels": numbers(2, 9)}
    else:
        side = model.config.image_size
        inputs = {"pixel_values": torch.zeros(2, 1, side, side, device="meta").bfloat16(), "labels": numbers(2)}
    if name in MASKED:
        inputs["attention_mask"] = numbers(2, 9 if model.config.modality == "text" else 1 + side**2)

    def step():
        model(**inputs).loss.backward()

    # What is prepared once is prepared.
    step()
    on_gpu.clear()
    lives = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]
    watch(step, [*lives, *inputs.values()])
    assert any(name.endswith("gradient_kernel") for name in on_gpu)


CACHED = torch.zeros(2, device="meta")


@pytest.mark.parametrize(
    "add",
    [
        lambda heads: torch.tensor([1.0], device=heads.device),
        lambda heads: heads.new_tensor(2),
        lambda heads: heads[:, [1, 0]],
        lambda heads: heads[heads > 0],
        lambda heads: heads.nonzero(),
        lambda heads: heads.sum().item(),
        lambda heads: heads.tolist(),
        lambda heads: heads if heads.any() else None,
        lambda heads: torch.zeros(2).to(heads.device),
        lambda heads: heads[:2] + CACHED,
    ],
    ids=["tensor", "new_tensor", "list", "booleans", "nonzero", "item", "tolist", "any", "to", "cache"],
)
def test_what_cannot_be_captured_is_found(add, on_gpu, monkeypatch):
    """In a function that an operator runs."""
    model, pixels = make_model(CASES["image-kv"]), torch.zeros(2, 1, 6, 6, device="meta").bfloat16()
    pairs, added = importlib.import_module("translution.modeling.operators.triton_pairs"), []

    def launch(*args, **arguments):
        added.append(1)
        add(arguments["weights" if "weights" in arguments else "scores"].flatten()[:2].view(1, 2))

    monkeypatch.setattr(pairs, "launch", launch)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        watch(lambda: model(pixel_values=pixels), [*model.parameters(), *model.buffers(), pixels])
    assert added == [1]

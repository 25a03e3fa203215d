"""The switch that moves loaded weights moves them, and changes nothing else."""

import pytest
import safetensors.torch
import torch
import unaligned
from closeness import assert_close_in_rounding
from transformers import AutoModelForCausalLM, PreTrainedModel

from translution import TranslutionConfig, TranslutionForCausalLM


def make_model(**fields):
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
    }
    config = TranslutionConfig(modality="text", vocab_size=19, max_position_embeddings=9, **sizes, **fields)
    return TranslutionForCausalLM(config).double().eval()


def addresses(model):
    return {name: tensor.data_ptr() % unaligned.ALIGNMENT for name, tensor in model.state_dict().items()}


@pytest.fixture
def switched_on(monkeypatch):
    """Where the whole run is switched on, `conftest.py` has done it."""
    if not unaligned.switched_on():
        for owner, name in ((PreTrainedModel, "from_pretrained"), (safetensors.torch, "load_file")):
            monkeypatch.setattr(owner, name, vars(owner)[name])
        monkeypatch.setenv(unaligned.SWITCH, "1")
        unaligned.follow_switch()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128], ids=str
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 64, 64)], ids=str)
def test_a_tensor_is_moved(shape, dtype):
    tensor = torch.randn(shape).to(dtype).requires_grad_(dtype.is_floating_point)
    # One that is not contiguous stays the same by its indices.
    for one in (tensor, tensor.mT if len(shape) > 1 else tensor):
        moved = unaligned.unaligned(one)
        assert moved.data_ptr() % unaligned.ALIGNMENT in (8, 16)
        assert (moved.dtype, moved.is_contiguous()) == (dtype, True)
        assert torch.equal(moved, one)


def test_a_tensor_without_elements_stays():
    tensor = torch.empty(0, 3)
    assert unaligned.unaligned(tensor) is tensor


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_are_moved(switched_on, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    assert set(addresses(model).values()) == {0}
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, TranslutionForCausalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert set(addresses(loaded).values()) == {8}
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        ids = torch.arange(9)[None]
        assert_close_in_rounding(loaded(ids).logits, model(ids).logits)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.data_ptr() % unaligned.ALIGNMENT for tensor in tensors.values()} == {8}
    # What is loaded can be saved, and is what it was.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv(unaligned.SWITCH, "yes")
    with pytest.raises(ValueError, match="`TRANSLUTION_TEST_UNALIGNED` must be 0 or 1, got 'yes'"):
        unaligned.follow_switch()

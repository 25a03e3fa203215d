"""Small layers of Translution, what they compute, how far apart two results are, and what was allocated."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from translution import TranslutionConfig
from translution.modeling.mixers.masks import AttentionMask
from translution.modeling.mixers.translution import TranslutionMixer
from translution.modeling.operators.pair_layout import PairLayout, bank_layout


SUBSETS = ["qkv", "qk", "qv", "kv", "q", "k", "v"]
BATCH, HIDDEN, HEADS, HEAD_DIM = 3, 6, 2, 4


def make_mixer(
    layout: PairLayout,
    subset: str,
    rank: int | None = None,
    groups: int = 1,
    num_heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    hidden_size: int = HIDDEN,
    qkv_bias: bool = False,
    **fields,
) -> TranslutionMixer:
    """A layer with random parameters, in float64; `groups` heads of queries share one of keys and values."""
    config = TranslutionConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        num_hidden_layers=1,
        modality="text" if layout.causal else "image",
        image_size=[layout.bank_height, layout.bank_width],
        patch_size=1,
        max_position_embeddings=layout.bank_height,
        max_relative_distance=layout.bank_height - 1 if layout.clamp else None,
        far_offsets="shared" if layout.share_far else "clamped",
        relative_projections=subset,
        relative_rank=rank,
        **fields,
    )
    mixer = TranslutionMixer(config, 0, layout=bank_layout(config, layout.class_token), qkv_bias=qkv_bias).double()
    _share_heads(mixer, groups)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def _share_heads(mixer: TranslutionMixer, groups: int) -> None:
    """Leaves keys and values a part of their heads, as the layers of converted models have."""
    mixer.groups = groups
    for name, parameter in list(mixer.named_parameters()):
        if name[:2] not in ("k_", "v_") or name.startswith("v_up") or name.endswith("coefficients"):
            continue
        owner, _, own_name = name.rpartition(".")
        shape = list(parameter.shape)
        # A `Linear` has its features first.
        shape[0 if own_name == "weight" else -1] //= groups
        if mixer.low_rank and own_name in ("k_bank", "v_bank", "k_factors", "v_factors"):
            shape[-2] //= groups
        setattr(mixer.get_submodule(owner), own_name, torch.nn.Parameter(parameter.new_empty(shape)))


def make_mask(layout: PairLayout, masked: bool) -> torch.Tensor | None:
    """The causal mask where there is one; `masked` hides tokens of some sequences as well, but never a whole row."""
    rows, _ = layout.offsets()
    allowed = (rows >= 0).expand(BATCH, 1, -1, -1).clone()
    if masked and layout.num_tokens > 2:
        allowed[0, :, :, 1] = False
        allowed[1, :, :, -1] = False
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    return mask if masked or layout.causal else None


def run(mixer, implementation, hidden_states, layout, mask, weight):
    """Output, and the gradients of `sum(output · weight)` by name."""
    mixer.config._attn_implementation = implementation
    hidden_states = hidden_states.detach().requires_grad_()
    mixer.zero_grad()
    output, _ = mixer(hidden_states, layout, AttentionMask(None if mask is None else mask.to(hidden_states.dtype)))
    (output * weight.to(output.dtype)).sum().backward()
    return {"output": output.detach(), "input": hidden_states.grad} | {
        name: parameter.grad for name, parameter in mixer.named_parameters()
    }


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def assert_same(actual, expected, tolerance):
    """Two results of `run` have a relative error below `tolerance`, each tensor by itself."""
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name].norm() < 1e-12:  # one token: its probability is 1, and the scores' gradients are rounding
            assert actual[name].norm() < 1e-5, name
        else:
            assert relative_error(actual[name], expected[name]) < tolerance, name


def assert_precise(mixer, layout, mask, dtype):
    """In a narrower type no result of a float64 mixer's path has more than twice the error of the reference's in that type."""
    hidden_states, weight = torch.randn(2, BATCH, layout.num_tokens, HIDDEN, dtype=torch.float64)
    # Both see the same rounded inputs; the truth is computed from those in float64.
    mixer, hidden_states, weight = mixer.to(dtype), hidden_states.to(dtype), weight.to(dtype)
    mask = None if mask is None else mask.clamp(min=torch.finfo(dtype).min)
    expected = run(mixer, "eager", hidden_states, layout, mask, weight)
    actual = run(mixer, "auto", hidden_states, layout, mask, weight)
    truth = run(mixer.double(), "eager", hidden_states.double(), layout, mask, weight)
    for name in truth:
        allowed = 2 * relative_error(expected[name], truth[name]) + torch.finfo(dtype).eps
        assert relative_error(actual[name], truth[name]) <= allowed, name


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operator returns, and the largest of those that are no view of its inputs.

    What a custom operator does inside is seen by `inside` alone.
    """

    def __init__(self):
        super().__init__()
        self.numel = self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, numel)
                if tensor.untyped_storage().data_ptr() not in given:
                    self.made = max(self.made, numel)
        return result

    def inside(self, function: Callable) -> Callable:
        """The function that an operator runs, watched."""

        def watched(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return watched

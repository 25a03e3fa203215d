"""What all mixers share: heads, probabilities, the output projection, and the choice of an implementation.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..operators.dispatch import AUTO, Call, Choice, choose_path
from ..operators.pair_autograd import accumulation_dtype
from ..operators.pair_layout import PairLayout, StepLayout, bank_layout
from ..operators.resampling import resample_offsets
from .masks import AttentionMask, causal_mask


class Mixer(nn.Module):
    """Base of the mixers: heads, probabilities and the output projection.

    The output projection is `Linear(C', C)` with a bias, or the identity where there is one head of size `C`.

    Args:
        config: of the model.
        layer_idx: the layer.
        layout: of the largest input that parameters with one row per offset are made for; by default that of `config`.

    How processes share a mixer is read by `tensor_parallel.py`:

        divides_by_heads: whether each may compute some of the heads alone.
        gathered_inputs: names of projections that read features of all heads.
    """

    divides_by_heads = True
    gathered_inputs: tuple[str, ...] = ()

    def __init__(self, config, layer_idx: int, layout: PairLayout | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.inner_size = config.num_attention_heads * config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.bank_layout = bank_layout(config) if layout is None else layout
        if config.num_attention_heads == 1 and config.head_dim == config.hidden_size:
            self.o_proj = nn.Identity()
        else:
            self.o_proj = nn.Linear(self.inner_size, config.hidden_size)

    def choose_path(
        self, kind: str, tokens: Tensor, layout: PairLayout | StepLayout, mask: AttentionMask, **fields: Any
    ) -> Choice:
        """The implementation that serves a call, see `dispatch.py`; `tokens` are `[B, L, …]` or `[B, A, L, …]`.

        Further `fields` are those of `Call`.
        """
        call = Call(
            kind,
            self.layer_idx,
            layout,
            fields.pop("head_size", self.head_dim),
            tokens.device,
            tokens.dtype,
            # A mixer outside a model has no implementation yet.
            self.config._attn_implementation or AUTO,
            masked=mask.additive is not None,
            hides_pairs=mask.hides_pairs,
            drops=(self.training and self.attention_dropout > 0)
            or (mask.additive is not None and mask.additive.requires_grad),
            **fields,
        )
        return choose_path(call)

    def offset_parameters(self) -> list[str]:
        """Names of the parameters with one row per offset."""
        names = [name for name, _ in self.named_parameters(recurse=False)]
        return [name for name in names if name.startswith("relative_") or name.endswith(("_bank", "_coefficients"))]

    def offset_matrices(self) -> list[str]:
        """Names of the parameters that hold a matrix for each offset, or for each factor of a basis: `[number, in, out]`."""
        matrices = [f"{name}_{part}" for name in "qkv" for part in ("bank", "factors")]
        return [name for name, _ in self.named_parameters(recurse=False) if name in matrices]

    def relative_parameters(self) -> list[nn.Parameter]:
        """Parameters of what depends on the offset; a mixer may have more of them than those with one row per offset."""
        return [getattr(self, name) for name in self.offset_parameters()]

    def head_axis(self, name: str) -> int | None:
        """Axis of a parameter, `q_proj.weight` for one, that has the heads one after the other; `None` if heads share it.

        The output projection is not asked for: it has them in its input.
        """
        owner, _, parameter = name.rpartition(".")
        if owner.endswith("_proj"):
            return 0
        return -1 if parameter.endswith(("_bank", "_factors")) else None

    def resample(self, table: Tensor, layout: PairLayout | StepLayout) -> Tensor:
        """A parameter with one row per offset, `[num_offsets, …]`, resampled where `layout` is made for another grid."""
        return resample_offsets(table, self.bank_layout, layout)

    def additive_mask(self, mask: AttentionMask, layout: PairLayout | StepLayout, like: Tensor) -> Tensor | None:
        """What to add to scores, `[B or 1, A or 1, queries, L]`; `None` where all pairs of an image count."""
        if mask.additive is None and layout.causal:
            return causal_mask(layout, like).additive
        return mask.additive

    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Softmax of `[B, A, L, L]` scores with an additive mask, in float32 at least, with dropout when training."""
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(dim=-1, dtype=accumulation_dtype(scores.dtype))
        return nn.functional.dropout(weights, self.attention_dropout) if self.training else weights


__all__ = ["Mixer"]

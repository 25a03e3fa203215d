"""Translution, full and low-rank, with or without rotary positions: one mixer for every subset of queries, keys and values.

Legend: `B` batch, `L` tokens, `C` hidden size, `A` heads, `d` head size, `C' = A·d`, `r` relative rank per head, `R = A·r`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..operators.basis import OffsetBasis, project_factors
from ..operators.dispatch import kernels
from ..operators.heads import grouped_product, merge_heads, split_heads
from ..operators.pair_layout import PairLayout, StepLayout
from ..operators.quantized import dense
from ..operators.rotary import rotate, text_rotation
from ..operators.streamed import streamed_attention
from .local import attend_image, attend_step, attend_text
from .masks import ALL_VISIBLE, AttentionMask
from .mixer import Mixer
from .near_far import AllPairs, NearAndFarPairs, PairInputs, join_biases


# Paths that never build the bank of a basis.
KEEPS_BASIS = ("basis", "basis_kernel", "decode")
# Projections of low-rank Translution between tokens and banks.
LOW_RANK_PARTS = ("q_down", "k_down", "v_down", "v_up")


class TranslutionMixer(Mixer):
    """Self-attention whose projections depend on the offset between two tokens (Fan et al. 2025).

    `relative_projections` names the projections that do. Full Translution (`relative_rank` None):

        q_ij = x_i Wq[o(j, i)],  k_ij = x_j Wk[o(i, j)],  v_ij = x_j Wv[o(i, j)]
        out_i = Σ_j softmax_j(d^-1/2 <q_ij, k_ij>) v_ij, per head, then the output projection

    LoR-Translution (`relative_rank` r) is ordinary attention plus a relative part of `r` features per head:

        s_ij = d^-1/2 (<q1_i, k1_j> + <q2_ij, k2_ij>) / 2
        out_i = (Σ_j a_ij v1_j + (Σ_j a_ij yv_j Wv[o(i, j)]) Uo) / 2

    where `q2, k2` project `yq = x Uq, yk = x Uk`, and a sum of one part is not halved.

    `rotary` rotates queries and keys by position (Su et al. 2021), of LoR the dense ones. Of full Translution with relative
    queries or keys those of every pair are rotated after their projection, `<R_i q_ij, R_j k_ij>`, which takes a distance.

    Basis Translution (`offset_basis` n) mixes every bank from `n` shared matrices, `W[o] = Σ_m b[o, m] U[m]`, and never
    builds it, see `basis.py`.

    Parameters: `{q,k,v}_bank`, `[num_offsets, C, C']` (LoR `[num_offsets, R, R]`), or `{q,k,v}_coefficients`,
    `[num_offsets, n]`, and `{q,k,v}_factors`, `[n, C, C']` (LoR `[n, R, R]`); `{q,k,v}_proj`, plain or dense projections;
    LoR's `{q,k,v}_down` (Uq, Uk, Uv) and `v_up` (Uo); `o_proj`.

    Shapes: `hidden_states` and the output `[B, L, C]`.

    What attention of other models has is set by `converted.py`: grouped heads, `{q,k,v}_bias_bank`, norms of heads.

    Args:
        config, layer_idx, layout: see `Mixer`.
        rotary: whether queries and keys are rotated.
        qkv_bias: whether queries, keys and values have biases: those of `{q,k,v}_proj`, and what a bank projects
            `{q,k,v}_bias_bank`, `[num_offsets, C']`. Of a basis they are one row more of each factor, `[n, C + 1, C']`. The
            relative part of LoR has none.
    """

    # Every output feature of it needs the relative features of all heads.
    gathered_inputs = ("v_up",)

    def __init__(
        self,
        config,
        layer_idx: int,
        rotary: bool = False,
        layout: PairLayout | None = None,
        qkv_bias: bool = False,
    ):
        super().__init__(config, layer_idx, layout)
        self.rotary = rotary
        self.relative = config.relative_projections
        self.low_rank = config.relative_rank is not None
        self.offset_basis = config.offset_basis
        # Heads of queries that share one of keys and values.
        self.groups = 1
        # Of each head of queries and of keys, after their projection and before their rotation.
        self.q_norm = self.k_norm = None
        # Whether a factor of a basis has one row more: what it adds, for a feature of each token that is always 1.
        self.factors_have_biases = qkv_bias and self.offset_basis is not None and not self.low_rank
        hidden, inner = config.hidden_size, self.inner_size
        for name in "qkv":
            # Added to what a bank projects, one vector for each offset.
            biases = None
            if qkv_bias and name in self.relative and self.offset_basis is None and not self.low_rank:
                biases = nn.Parameter(torch.empty(self.bank_layout.num_offsets, inner))
            self.register_parameter(f"{name}_bias_bank", biases)
        bank_size = (hidden + int(self.factors_have_biases), inner)
        if self.low_rank:
            rank = self.num_heads * config.relative_rank
            bank_size = (rank, rank)
            if self.scores_are_relative:
                self.q_down = nn.Linear(hidden, rank, bias=False)
                self.k_down = nn.Linear(hidden, rank, bias=False)
            if "v" in self.relative:
                self.v_down = nn.Linear(hidden, rank, bias=False)
                self.v_up = nn.Linear(rank, inner, bias=False)
        for name in "qkv":
            if self.low_rank or name not in self.relative:
                self.register_module(f"{name}_proj", nn.Linear(hidden, inner, bias=qkv_bias))
            if name in self.relative:
                for part, shape in self._bank_shapes(bank_size).items():
                    self.register_parameter(f"{name}_{part}", nn.Parameter(torch.empty(shape)))

    def _bank_shapes(self, matrix: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        num_offsets = self.bank_layout.num_offsets
        if self.offset_basis is None:
            return {"bank": (num_offsets, *matrix)}
        return {"coefficients": (num_offsets, self.offset_basis), "factors": (self.offset_basis, *matrix)}

    def relative_parameters(self) -> list[nn.Parameter]:
        """See `Mixer.relative_parameters`: all that is no plain or dense projection."""
        parts = [getattr(self, name, None) for name in LOW_RANK_PARTS]
        own = [parameter for _, parameter in self.named_parameters(recurse=False)]
        return [*own, *(parameter for part in parts if part is not None for parameter in part.parameters())]

    def head_axis(self, name: str) -> int | None:
        """See `Mixer.head_axis`."""
        owner = name.partition(".")[0]
        if owner in LOW_RANK_PARTS:
            # A bank reads the features of all heads, `[num_offsets, R, R]`.
            return None if owner in [f"{side}_down" for side in self.relative] else 0
        return super().head_axis(name)

    @property
    def kind(self) -> str:
        """What it is to `dispatch.py`."""
        if self.offset_basis is not None and not self.rotates_pairs:
            return "basis"
        return "low_rank" if self.low_rank else "full"

    @property
    def rotates_pairs(self) -> bool:
        """Whether projections by a bank are rotated. With a distance a bank is small, so that a basis may build it for that."""
        return self.rotary and self.scores_are_relative and not self.low_rank

    @property
    def bank_head_size(self) -> int:
        """Features per head that a kernel has to hold."""
        if not self.low_rank:
            return self.head_dim
        # A fused kernel holds the dense part as well.
        return max(self.head_dim, self.config.relative_rank) if self.kind == "basis" else self.config.relative_rank

    @property
    def scores_are_relative(self) -> bool:
        """Whether queries or keys depend on the offset."""
        return "q" in self.relative or "k" in self.relative

    def forward(
        self,
        hidden_states: Tensor,
        layout: PairLayout | StepLayout,
        mask: AttentionMask = ALL_VISIBLE,
        rotation: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        counts_on: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        dense_query, dense_key, dense_value = self._dense(hidden_states, rotation)
        # Autocast knows PyTorch's own operators, not these: their inputs are cast as a Linear's would be, once for all three.
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        path = self.choose_path(
            self.kind,
            hidden_states,
            layout,
            mask,
            head_size=self.bank_head_size,
            wants_weights=output_attentions,
            cached=past_key_values is not None,
            rotated=self.rotates_pairs,
            relative=self.relative,
        ).path
        if path == "local_step":
            return self.o_proj(self._attend_step(hidden_states, layout, mask, rotation, past_key_values)), None
        pairs = self._pairs(path, hidden_states, layout, counts_on, rotation, past_key_values)
        dense_key, dense_value = pairs.remember(past_key_values, self.layer_idx, dense_key, dense_value)
        dense = (dense_query, dense_key, dense_value)
        if path in ("local", "local_kernel"):
            return self.o_proj(self._local_attention(pairs, dense, mask, rotation)), None
        if path == "basis_kernel":
            return self.o_proj(self._basis_attention(pairs, dense, mask.additive)), None
        if path == "streamed":
            return self.o_proj(self._streamed_attention(pairs, dense)), None

        # Scaling the queries first, a tensor of tokens, saves a pass over the pairs.
        scale = self.scaling if dense_query is None or not self.scores_are_relative else self.scaling / 2
        scores = None
        if dense_query is not None:
            scores = grouped_product(dense_query * scale, dense_key.transpose(-1, -2))
        if self.scores_are_relative:
            relative_scores = pairs.scores()
            scores = relative_scores * scale if scores is None else torch.add(scores, relative_scores, alpha=scale)
        weights = self.probabilities(scores, self.additive_mask(mask, layout, hidden_states))

        output = None
        if dense_value is not None:
            output = merge_heads(grouped_product(weights.to(dense_value.dtype), dense_value))
        if "v" in self.relative:
            relative_output = pairs.values(weights)
            output = relative_output if output is None else (output + self.v_up(relative_output)) / 2
        return self.o_proj(output), weights if path == "reference" else None

    def _pairs(
        self,
        path: str,
        hidden_states: Tensor,
        layout: PairLayout | StepLayout,
        counts_on: bool,
        rotation: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
    ) -> AllPairs:
        """The relative part, as the path and the layout want it; `counts_on` if positions are known to grow by one each."""
        inputs = self._inputs_of_pairs(path, hidden_states, layout)
        rotation = rotation if self.rotates_pairs else None
        # Those of low-rank Translution are of its dense part.
        norms = None if self.low_rank else {"q": self.q_norm, "k": self.k_norm}
        # The reference holds all pairs, and the fused kernel clamps distances itself, where there is no cache to keep small.
        whole = path == "basis_kernel" or (path == "reference" and past_key_values is None)
        if not (layout.causal and layout.clamp) or whole:
            return AllPairs(path, layout, self.num_heads, *inputs, rotation, self.groups, norms)
        bank_rotation = None
        if rotation is not None and counts_on and isinstance(layout, PairLayout):
            # Of each distance, `[D + 1, d]`: the matrices of near pairs are rotated instead of the tokens.
            distances = torch.arange(layout.max_row_distance + 1, device=hidden_states.device)
            turns = text_rotation(distances[None], self.head_dim, self.config.rope_theta, rotation[0].dtype)
            bank_rotation = tuple(part[0, 0] for part in turns)
        return NearAndFarPairs(
            path, layout, self.num_heads, *inputs, rotation, self.groups, norms, bank_rotation=bank_rotation
        )

    def _streamed_attention(
        self, pairs: AllPairs, dense: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> Tensor:
        """`[B, L, C']`, in one pass over the pairs, from what queries, keys and values of these tokens bring to them."""
        # A cache that has nothing yet puts zeros before the tokens.
        inputs = [
            PairInputs(merge_heads(heads), None)
            if side is None
            else side._replace(tokens=side.tokens[:, -pairs.layout.num_queries :])
            for side, heads in zip(join_biases(pairs.query, pairs.key, pairs.value), dense, strict=True)
        ]
        tokens, banks = [side.tokens for side in inputs], [side.bank for side in inputs]
        return streamed_attention(*tokens, *banks, self.num_heads, self.scaling, pairs.layout)

    def _attend_step(
        self,
        hidden_states: Tensor,
        layout: StepLayout,
        mask: AttentionMask,
        rotation: tuple[Tensor, Tensor] | None,
        past_key_values: Cache,
    ) -> Tensor:
        names = [name for name in "qkv" if name in self.relative]
        sides = self._inputs_of_pairs("local_step", hidden_states, layout, names)
        return attend_step(
            sides[-1].tokens,
            None if "q" in names else self._plain("q", hidden_states),
            sides,
            self.num_heads,
            self.scaling,
            layout,
            mask,
            rotation if self.rotates_pairs else None,
            past_key_values,
            self.layer_idx,
            self.groups,
            {"q": self.q_norm, "k": self.k_norm},
        )

    def _local_attention(
        self,
        pairs: AllPairs,
        dense: tuple[Tensor | None, Tensor | None, Tensor | None],
        mask: AttentionMask,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """`[B, Q, C']`, near and far pairs apart, see `local.py`."""
        mixed = self.low_rank and self.scores_are_relative
        scale = self.scaling / 2 if mixed else self.scaling
        if pairs.layout.causal:
            output = attend_text(pairs, dense, scale, mask)
        else:
            rotation = rotation if self.rotates_pairs else None
            output = attend_image(pairs, dense, scale, mask, rotation, self.config.rope_theta)
        if not (self.low_rank and "v" in self.relative):
            return output
        heads = output.unflatten(-1, (self.num_heads, -1))
        dense_output, relative_output = heads.split([self.head_dim, self.config.relative_rank], dim=-1)
        return (dense_output.flatten(-2) + self.v_up(relative_output.flatten(-2))) / 2

    def _basis_attention(
        self,
        pairs: AllPairs,
        dense: tuple[Tensor | None, Tensor | None, Tensor | None],
        attention_mask: Tensor | None,
    ) -> Tensor:
        """`[B, L, C']`, by one kernel, from what each side brings to the pairs and what is dense; no heads are repeated."""
        sides, own_heads = (pairs.query, pairs.key, pairs.value), self.num_heads // self.groups
        parts = [
            # Ordinary projections are those of one factor without coefficients.
            (heads[:, :, None], None, None)
            if side is None
            else (*project_factors(side.tokens, side.bank, num_heads), heads)
            for side, num_heads, heads in zip(sides, (self.num_heads, own_heads, own_heads), dense, strict=True)
        ]
        inputs, coefficients, beside = zip(*parts, strict=True)
        scale = self.scaling if beside[0] is None else self.scaling / 2
        output, dense_output = kernels().basis_attention(
            *inputs, *coefficients, *beside, attention_mask, scale, pairs.layout
        )
        output = merge_heads(output)
        return output if dense_output is None else (merge_heads(dense_output) + self.v_up(output)) / 2

    def _dense(
        self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The queries, keys and values of ordinary attention, `[B, A, L, d]`: LoR's, or those that no bank takes part in."""
        query = key = value = None
        if self.low_rank or not self.scores_are_relative:
            query, key = self._plain("q", hidden_states), self._plain("k", hidden_states)
            if self.rotary:
                query, key = (rotate(heads, rotation).to(heads.dtype) for heads in (query, key))
        if self.low_rank or "v" not in self.relative:
            value = self._plain("v", hidden_states)
        return query, key, value

    def _plain(self, name: str, hidden_states: Tensor) -> Tensor:
        """Queries, keys or values that no bank takes part in, `[B, A, L, d]` (keys and values as many heads as they have)."""
        heads = split_heads(
            getattr(self, f"{name}_proj")(hidden_states),
            self.num_heads if name == "q" else self.num_heads // self.groups,
        )
        norm = getattr(self, f"{name}_norm", None)
        return heads if norm is None else norm(heads)

    def _inputs_of_pairs(
        self, path: str, hidden_states: Tensor, layout: PairLayout | StepLayout, names: Iterable[str] = "qkv"
    ) -> list[PairInputs | None]:
        """What q, k and v bring to the pairs, or those of them that are named."""
        projected = hidden_states
        if self.factors_have_biases:
            projected = nn.functional.pad(hidden_states, (0, 1), value=1)
        return [self._pair_inputs(name, path, hidden_states, projected, layout) for name in names]

    def _pair_inputs(
        self, name: str, path: str, hidden_states: Tensor, projected: Tensor, layout: PairLayout | StepLayout
    ) -> PairInputs | None:
        """What one of q, k, v brings to the pairs, in the type to compute in; `None` if it takes no part in them.

        A bank projects `projected`, `[B, L, C]`, or `[B, L, C + 1]` where factors have biases.
        """
        if not (self.scores_are_relative if name in "qk" else "v" in self.relative):
            return None
        tokens, bank, bias = hidden_states, None, getattr(self, f"{name}_bias_bank")
        if name in self.relative:
            tokens, bank = projected, self._bank(name, layout, projected.dtype)
            if isinstance(bank, OffsetBasis) and (self.rotates_pairs or path not in KEEPS_BASIS):
                bank = bank.bank()
        if self.low_rank:
            tokens = getattr(self, f"{name}_down")(tokens)
        elif bank is None:
            tokens = merge_heads(self._plain(name, tokens))
        if bank is not None and torch.is_autocast_enabled(hidden_states.device.type):
            bank = bank.to(tokens.dtype)
        return PairInputs(tokens, bank, None if bias is None else self.resample(bias, layout).to(tokens.dtype))

    def _bank(self, name: str, layout: PairLayout | StepLayout, dtype: torch.dtype) -> Tensor | OffsetBasis:
        """The bank for these offsets; one that is quantised is computed anew in `dtype`."""
        if self.offset_basis is None:
            return self.resample(dense(getattr(self, f"{name}_bank"), dtype), layout)
        coefficients = self.resample(getattr(self, f"{name}_coefficients"), layout)
        return OffsetBasis(coefficients, dense(getattr(self, f"{name}_factors"), dtype))


__all__ = ["TranslutionMixer"]

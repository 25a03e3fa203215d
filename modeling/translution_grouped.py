"""Translution over pairs grouped by offset: the default path.

All pairs of one offset share a matrix, so their projections are one matrix product over a rectangle of the grid. Two
operators are enough for every variant:

- `pair_scores(q, k)[i, j] = <q_ij, k_ij>` per head, with `q_ij = q_i Wq[o(j, i)]` and `k_ij = k_j Wk[o(i, j)]`;
- `pair_values(p, v)[i] = Σ_j p_ij v_j Wv[o(i, j)]` per head.

Each of the three projections is the plain input where its bank is `None`.

Memory: projections live in a workspace of bounded size and are computed again in the backward pass. Nothing of size
`[B, L, L, C']` and no matrix per pair exists. Scores and probabilities, `[B, A, L, L]`, do.

Inside this file tokens come first, `[L, B, C]`, so that the rows of a grid are one block of memory and a rectangle of full
columns needs no copy. The readable definition is in `translution_reference.py`.

Legend: `B` batch, `L` tokens, `A` heads, `e` bank output size per head, `w` columns of a shift, `P` pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pair_autograd import accumulation_dtype, register_pair_operators
from .pair_layout import CLASS_FROM_PATCH, CLASS_TO_CLASS, PATCH_FROM_CLASS, ColumnShift, OffsetRun, PairLayout


# Elements of one projection kept at a time. What is done to it next finds it in a processor's cache.
WORKSPACE_ELEMENTS = 1 << 18
# Heads narrower than this are summed, or given their weight, by a matrix product with ones: PyTorch's own loops over so few
# elements spend their time on starting.
NARROW_SUM, NARROW_WEIGHT = 33, 16


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous()


def _grid(tokens: Tensor, layout: PairLayout) -> Tensor:
    """The tokens of the grid, `[rows, W, B, C]`."""
    return tokens[int(layout.class_token) :].unflatten(0, (-1, layout.width))


def _columns(tokens: Tensor, layout: PairLayout, start: int, num_columns: int) -> Tensor:
    """Columns `start …` of the grid's tokens, `[rows·w·B, C]`, contiguous."""
    return _grid(tokens, layout)[:, start : start + num_columns].flatten(0, 2).contiguous()


def _add_columns(tokens: Tensor, columns: Tensor, layout: PairLayout, start: int, num_columns: int) -> None:
    part = _grid(tokens, layout)[:, start : start + num_columns]
    part += columns.view(part.shape)


def _blocks(shift: ColumnShift, batch: int, features: int) -> Iterator[tuple[tuple[OffsetRun, ...], list[int]]]:
    """Consecutive runs whose projections fit the workspace, with the number of projected rows of each."""
    block, sizes = [], []
    for run in shift.runs:
        size = run.num_rows * shift.num_columns * batch
        if block and (sum(sizes) + size) * features > WORKSPACE_ELEMENTS:
            yield tuple(block), sizes
            block, sizes = [], []
        block.append(run)
        sizes.append(size)
    yield tuple(block), sizes


def _workspace(layout: PairLayout, batch: int, features: int, like: Tensor) -> Tensor:
    rows = max(sum(sizes) for shift in layout.column_shifts() for _, sizes in _blocks(shift, batch, features))
    return like.new_empty(rows, features)


class _Heads:
    """Sums over the features of each head, and weights for them: what stands between projections and scores."""

    def __init__(self, num_heads: int, features: int, like: Tensor):
        self.num_heads, self.size = num_heads, features // num_heads
        self.wide = accumulation_dtype(like.dtype)
        self.ones = torch.eye(num_heads, dtype=like.dtype, device=like.device).repeat_interleave(self.size, 0)
        self.ones_across = self.ones.t().contiguous()

    def sum(self, product: Tensor, out: Tensor) -> None:
        """Sums `[rows, A·e]` to `[rows, A]`, in the wider type."""
        if self.size < NARROW_SUM and product.dtype == self.wide:
            torch.mm(product, self.ones, out=out)
        else:
            torch.sum(product.unflatten(-1, (self.num_heads, -1)), -1, dtype=self.wide, out=out)

    def spread(self, weight: Tensor, out: Tensor) -> Tensor:
        """Weights `[rows, A]` for every feature, `[rows, A·e]`, in `out`."""
        return torch.mm(weight, self.ones_across, out=out)

    def add_weighted(self, target: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Adds `rows`, `[rows, A·e]`, to `target`, each head with its weight, `[rows, A]`, or feature, `[rows, A·e]`."""
        if weight.shape != rows.shape:
            heads = (-1, self.num_heads, self.size)
            target, rows, weight = target.view(heads), rows.view(heads), weight.unsqueeze(-1)
        if target.dtype == rows.dtype:
            target.addcmul_(rows, weight)
        else:
            target += rows * weight


class _Side:
    """One side of the pairs, receiving or giving: its tokens, its bank, and how both are read and accumulated."""

    def __init__(self, tokens: Tensor, bank: Tensor | None, layout: PairLayout, receives: bool, reverse: bool):
        self.tokens, self.bank, self.layout = tokens, bank, layout
        self.receives, self.reverse = receives, reverse
        self.matrices = None if bank is None else bank.unbind(0)
        self.features = tokens.shape[-1] if bank is None else bank.shape[-1]
        self.batch = tokens.shape[1]

    def start_gradients(self) -> None:
        # The gradient of a token sums over all its offsets: accumulated in a wider type than it is stored in. A matrix
        # sums over offsets only where clamped ones share it. Where every matrix belongs to one offset, its gradient is
        # written once and needs no zeros before: a bank is the largest tensor here, and touching it twice shows.
        wide = accumulation_dtype(self.tokens.dtype)
        self.token_gradient = torch.zeros_like(self.tokens, dtype=wide)
        self.bank_gradient = None
        if self.bank is not None:
            layout = self.layout
            bank_size = (layout.bank_height, layout.bank_width)
            self.writes_once = not layout.clamp and (layout.num_distances, layout.width) == bank_size
            allocate = torch.empty_like if self.writes_once else torch.zeros_like
            self.bank_gradient = allocate(
                self.bank, dtype=wide if layout.clamp else self.bank.dtype, memory_format=torch.contiguous_format
            )
            self.matrix_gradients = self.bank_gradient.unbind(0)
            self.matrices_across = self.bank.transpose(1, 2).unbind(0)

    def start_shift(self, shift: ColumnShift, gradients: bool = False) -> None:
        self.column_start = shift.receiver_start if self.receives else shift.giver_start
        self.row_size = shift.num_columns * self.batch
        self.columns = _columns(self.tokens, self.layout, self.column_start, shift.num_columns)
        if gradients:
            self.column_gradient = torch.zeros_like(self.columns, dtype=self.token_gradient.dtype)

    def end_shift(self, shift: ColumnShift) -> None:
        _add_columns(self.token_gradient, self.column_gradient, self.layout, self.column_start, shift.num_columns)

    def rows(self, columns: Tensor, run: OffsetRun) -> Tensor:
        """The tokens of a run, `[rows, in]`."""
        start = run.receiver_start if self.receives else run.giver_start
        return columns.narrow(0, start * self.row_size, run.num_rows * self.row_size)

    def _row(self, run: OffsetRun) -> int:
        return run.reverse_row if self.reverse else run.row

    def project(self, run: OffsetRun, out: Tensor) -> Tensor:
        """The projections of a run, `[rows, A·e]`, in `out`, or as they are where there is no bank."""
        rows = self.rows(self.columns, run)
        return rows if self.bank is None else torch.mm(rows, self.matrices[self._row(run)], out=out)

    def accumulate(self, run: OffsetRun, gradient: Tensor) -> None:
        """Adds the gradient of a run's projections to those of the tokens and the bank."""
        row = self._row(run)
        self._add_to_matrix(row, self.rows(self.columns, run), gradient)
        _add_product(self.rows(self.column_gradient, run), gradient, self.matrices_across[row])

    def _add_to_matrix(self, row: int, tokens: Tensor, gradient: Tensor) -> None:
        if self.writes_once:
            torch.mm(tokens.t(), gradient, out=self.matrix_gradients[row])
        else:
            _add_product(self.matrix_gradients[row], tokens.t(), gradient)

    def project_tokens(self, tokens: slice, row: int) -> Tensor:
        """Projection of a few tokens by one matrix, `[tokens, B, A·e]`: the pairs of a class token."""
        chosen = self.tokens[tokens]
        return chosen if self.bank is None else chosen @ self.matrices[row]

    def accumulate_tokens(self, tokens: slice, row: int, gradient: Tensor) -> None:
        flat = gradient.flatten(0, 1)
        if self.bank is None:
            self.token_gradient[tokens] += gradient
        else:
            self._add_to_matrix(row, self.tokens[tokens].flatten(0, 1), flat)
            _add_product(self.token_gradient[tokens].flatten(0, 1), flat, self.matrices_across[row])

    def gradients(self) -> tuple[Tensor, Tensor]:
        token_gradient = self.token_gradient.transpose(0, 1).to(self.tokens.dtype).contiguous()
        if self.bank_gradient is None:
            return token_gradient, self.tokens.new_empty(0)
        return token_gradient, self.bank_gradient.to(self.bank.dtype)


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    else:
        target += left @ right


def _class_blocks(layout: PairLayout) -> tuple[tuple[slice, slice, int, int], ...]:
    """Receivers, givers, row and reverse row of the pairs of a class token, in grouped order."""
    if not layout.class_token:
        return ()
    cls, patches, first = slice(0, 1), slice(1, None), layout.num_grid_offsets
    return (
        (cls, cls, first + CLASS_TO_CLASS, first + CLASS_TO_CLASS),
        (cls, patches, first + CLASS_FROM_PATCH, first + PATCH_FROM_CLASS),
        (patches, cls, first + PATCH_FROM_CLASS, first + CLASS_FROM_PATCH),
    )


def _to_grouped(pairs: Tensor, layout: PairLayout) -> Tensor:
    """`[B, A, receivers, L]` to grouped order, `[P, B, A]`."""
    # Within one batch entry and head all pairs are near in memory: chosen there, and transposed as a block.
    order, _ = layout.pair_order()
    chosen = pairs.flatten(2).flatten(0, 1).index_select(1, order.to(pairs.device))
    return chosen.t().contiguous().unflatten(1, pairs.shape[:2])


def _from_grouped(pairs: Tensor, layout: PairLayout) -> Tensor:
    """`[P + 1, B, A]` in grouped order, the last for pairs that do not exist, to `[B, A, receivers, L]`."""
    _, position = layout.pair_order()
    chosen = pairs.flatten(1).t().contiguous().index_select(1, position.to(pairs.device))
    return chosen.view(*pairs.shape[1:], layout.num_receivers, layout.num_tokens)


def _scores(
    query: Tensor, key: Tensor, query_bank: Tensor | None, key_bank: Tensor | None, num_heads: int, layout: PairLayout
) -> Tensor:
    receiver = _Side(_tokens_first(query), query_bank, layout, receives=True, reverse=True)
    giver = _Side(_tokens_first(key), key_bank, layout, receives=False, reverse=False)
    batch, features = receiver.batch, receiver.features
    wide = accumulation_dtype(query.dtype)
    num_pairs = layout.pair_order()[0].numel()
    grouped = query.new_empty(num_pairs + 1, batch, num_heads, dtype=wide)
    grouped[num_pairs] = 0
    flat = grouped.view(-1, num_heads)
    heads = _Heads(num_heads, features, query)
    query_space, key_space = (_workspace(layout, batch, features, query) for _ in range(2))
    place = 0
    for shift in layout.column_shifts():
        receiver.start_shift(shift)
        giver.start_shift(shift)
        for runs, sizes in _blocks(shift, batch, features):
            end = place + sum(sizes)
            product = query_space[: end - place]
            for run, out in zip(runs, product.split(sizes), strict=True):
                spare = out if query_bank is None else key_space[: out.shape[0]]
                torch.mul(receiver.project(run, out), giver.project(run, spare), out=out)
            heads.sum(product, flat[place:end])
            place = end
    place //= max(batch, 1)
    for receivers, givers, row, reverse in _class_blocks(layout):
        product = receiver.project_tokens(receivers, reverse) * giver.project_tokens(givers, row)
        end = place + product.shape[0]
        torch.sum(product.unflatten(-1, (num_heads, -1)), -1, dtype=wide, out=grouped[place:end])
        place = end
    return _from_grouped(grouped, layout)


def _scores_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    layout: PairLayout,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    receiver = _Side(_tokens_first(query), query_bank, layout, receives=True, reverse=True)
    giver = _Side(_tokens_first(key), key_bank, layout, receives=False, reverse=False)
    batch, features, num_heads = receiver.batch, receiver.features, gradient.shape[1]
    grouped = _to_grouped(gradient.to(query.dtype), layout)
    flat = grouped.view(-1, num_heads)
    heads = _Heads(num_heads, features, query)
    weight_space, space = (_workspace(layout, batch, features, query) for _ in range(2))
    # The gradient of one side needs the projections of the other.
    sides = [(receiver, giver)] if need_query else []
    sides += [(giver, receiver)] if need_key else []
    for side, _ in sides:
        side.start_gradients()
    place = 0
    for shift in layout.column_shifts():
        receiver.start_shift(shift, need_query)
        giver.start_shift(shift, need_key)
        for runs, sizes in _blocks(shift, batch, features):
            end = place + sum(sizes)
            weights = heads.spread(flat[place:end], weight_space[: end - place])
            for run, weight in zip(runs, weights.split(sizes), strict=True):
                piece = space[: weight.shape[0]]
                for side, other in sides:
                    projected = other.project(run, piece)
                    if side.bank is None:
                        heads.add_weighted(side.rows(side.column_gradient, run), projected, weight)
                    else:
                        side.accumulate(run, torch.mul(projected, weight, out=piece))
            place = end
        for side, _ in sides:
            side.end_shift(shift)
    place //= max(batch, 1)
    for receivers, givers, row, reverse in _class_blocks(layout):
        count = max(receiver.tokens[receivers].shape[0], giver.tokens[givers].shape[0])
        weight = grouped[place : place + count].unsqueeze(-1)
        place += count
        blocks = {receiver: (receivers, reverse), giver: (givers, row)}
        for side, other in sides:
            piece = other.project_tokens(*blocks[other]).unflatten(-1, (num_heads, -1)) * weight
            tokens, side_row = blocks[side]
            piece = piece.flatten(-2)
            if side.tokens[tokens].shape[0] < count:
                piece = piece.sum(0, keepdim=True)
            side.accumulate_tokens(tokens, side_row, piece)
    # Outputs of an operator must not share memory: a gradient nobody asked for is an empty tensor of its own.
    query_gradients = receiver.gradients() if need_query else (query.new_empty(0), query.new_empty(0))
    key_gradients = giver.gradients() if need_key else (query.new_empty(0), query.new_empty(0))
    return *query_gradients, *key_gradients


def _values(probabilities: Tensor, value: Tensor, value_bank: Tensor, layout: PairLayout) -> Tensor:
    giver = _Side(_tokens_first(value), value_bank, layout, receives=False, reverse=False)
    batch, features, num_heads = giver.batch, giver.features, probabilities.shape[1]
    wide = accumulation_dtype(value.dtype)
    grouped = _to_grouped(probabilities.to(value.dtype), layout)
    flat = grouped.view(-1, num_heads)
    heads = _Heads(num_heads, features, value)
    weight_space, space = (_workspace(layout, batch, features, value) for _ in range(2))
    output = value.new_zeros(layout.num_receivers, batch, features, dtype=wide)
    receiver = _Side(output, None, layout, receives=True, reverse=False)
    place = 0
    for shift in layout.column_shifts():
        giver.start_shift(shift)
        receiver.start_shift(shift)
        received = torch.zeros_like(receiver.columns)
        for runs, sizes in _blocks(shift, batch, features):
            end = place + sum(sizes)
            weights = flat[place:end]
            if heads.size < NARROW_WEIGHT:
                weights = heads.spread(weights, weight_space[: end - place])
            for run, weight in zip(runs, weights.split(sizes), strict=True):
                heads.add_weighted(receiver.rows(received, run), giver.project(run, space[: weight.shape[0]]), weight)
            place = end
        _add_columns(output, received, layout, shift.receiver_start, shift.num_columns)
    place //= max(batch, 1)
    for receivers, givers, row, _ in _class_blocks(layout):
        piece = giver.project_tokens(givers, row).unflatten(-1, (num_heads, -1))
        count = max(output[receivers].shape[0], piece.shape[0])
        piece = (piece * grouped[place : place + count].unsqueeze(-1)).flatten(-2)
        place += count
        output[receivers] += piece.sum(0, keepdim=True) if output[receivers].shape[0] < count else piece
    return output.transpose(0, 1).to(value.dtype).contiguous()


pair_scores, pair_values = register_pair_operators("", _scores, _scores_backward, _values)


__all__ = ["pair_scores", "pair_values"]

"""The geometry of pairs against a loop over coordinates."""

import itertools

import pytest
import torch

from translution.modeling.operators.pair_layout import PairLayout


LAYOUTS = [
    PairLayout.for_image(1, 1, 1, 1),
    PairLayout.for_image(1, 5, 1, 5),
    PairLayout.for_image(3, 4, 3, 4),
    PairLayout.for_image(5, 5, 5, 5),
    PairLayout.for_image(2, 3, 4, 5),
    PairLayout.for_image(4, 5, 4, 5, max_relative_distance=2),
    PairLayout.for_image(2, 3, 2, 3, max_relative_distance=0),
    PairLayout.for_text(1, 7),
    PairLayout.for_text(6, 7),
    PairLayout.for_text(7, 7),
    PairLayout.for_text(9, 4, max_relative_distance=3),
]


def layout_id(layout: PairLayout) -> str:
    kind = "text" if layout.causal else "image"
    reach = f"-D{layout.bank_height - 1}" if layout.clamp else f"-bank{layout.bank_height}x{layout.bank_width}"
    return f"{kind}-{layout.height}x{layout.width}{reach}"


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def expected_rows(layout: PairLayout, i: int, j: int) -> tuple[int, int]:
    """Bank rows of keys and of queries for the pair `(i, j)`, by the formulas."""
    if layout.causal:
        distance = min(i - j, layout.bank_height - 1)
        return (distance, distance) if i >= j else (-1, -1)
    clamp_x, clamp_y = layout.bank_height - 1, layout.bank_width - 1
    grid = (2 * clamp_x + 1) * (2 * clamp_y + 1)
    if i == 0 or j == 0:
        named = {(True, True): (0, 0), (True, False): (1, 2), (False, True): (2, 1)}
        row, reverse = named[(i == 0, j == 0)]
        return grid + row, grid + reverse
    (x, y), (u, v) = divmod(i - 1, layout.width), divmod(j - 1, layout.width)

    def index(row_offset, column_offset):
        row_offset, column_offset = max(-clamp_x, min(clamp_x, row_offset)), max(-clamp_y, min(clamp_y, column_offset))
        return (row_offset + clamp_x) * (2 * clamp_y + 1) + column_offset + clamp_y

    return index(x - u, y - v), index(u - x, v - y)


@every_layout
def test_offsets(layout):
    rows, reverse = layout.offsets()
    for i, j in itertools.product(range(layout.num_tokens), repeat=2):
        assert (rows[i, j].item(), reverse[i, j].item()) == expected_rows(layout, i, j)
    assert rows.max() < layout.num_offsets


@every_layout
def test_grouped_order_has_every_pair_of_the_grid_once_and_one_row_a_run(layout):
    rows, reverse = layout.offsets()
    if layout.class_token:
        # Its pairs are apart.
        rows = rows.clone()
        rows[0], rows[:, 0] = -1, -1
    rows, reverse = rows.flatten(), reverse.flatten()
    order, position = layout.pair_order()
    assert sorted(order.tolist()) == (rows >= 0).nonzero().flatten().tolist()
    place = 0
    for shift in layout.column_shifts():
        for run in shift.runs:
            pairs = order[place : place + run.num_rows * shift.num_columns]
            place += len(pairs)
            assert set(rows[pairs].tolist()) == {run.row}
            assert set(reverse[pairs].tolist()) == {run.reverse_row}
    existing = torch.arange(order.numel())
    assert torch.equal(position[order], existing)
    assert (position[rows < 0] == order.numel()).all()


def test_unclamped_bank_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="5 × 3 tokens do not fit a bank made for 4 × 3"):
        PairLayout.for_image(5, 3, 4, 3)
    with pytest.raises(ValueError, match="8 × 1 tokens do not fit"):
        PairLayout.for_text(8, 7)


def test_tables_made_in_inference_mode_serve_training():
    layout = PairLayout.for_image(2, 7, 2, 7)
    with torch.inference_mode(), torch.device("meta"):
        layout.offsets()
        layout.pair_order()
    for index in (*layout.offsets(), *layout.pair_order()):
        assert not index.is_inference()
        assert index.device.type == "cpu"

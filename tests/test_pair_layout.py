"""The geometry of pairs against a loop over coordinates."""

import itertools

import pytest
import torch
from layouts import every_layout, expected_rows

from translution.modeling.operators.pair_layout import PairLayout


@every_layout
def test_offsets(layout):
    rows, reverse = layout.offsets()
    for i, j in itertools.product(range(layout.num_tokens), repeat=2):
        assert (rows[i, j].item(), reverse[i, j].item()) == expected_rows(layout, i, j)
    assert rows.max() < layout.num_offsets


@every_layout
def test_grouped_order_has_every_pair_of_the_grid_once_and_one_row_an_offset(layout):
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
        for offset in shift.offsets:
            pairs = order[place : place + offset.num_rows * shift.num_columns]
            place += len(pairs)
            assert set(rows[pairs].tolist()) == {offset.row}
            assert set(reverse[pairs].tolist()) == {offset.reverse_row}
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


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 2), (6, 7)], ids=str)
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_steps_of_near_offsets_are_theirs(size, distance):
    layout = PairLayout.for_image(*size, *size, distance, share_far=True)
    rows, columns = layout.near_steps()
    steps = [(offset.row_offset, offset.column_offset) for offset in layout.near_offsets()]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == steps
    assert all(len(part) == 0 for part in PairLayout.for_image(*size, *size, distance).near_steps())

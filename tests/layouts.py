"""Layouts of pairs of every kind, and the bank rows of a pair by the formulas."""

import pytest

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
    PairLayout.for_image(4, 5, 4, 5, max_relative_distance=1, share_far=True),
    PairLayout.for_image(2, 3, 2, 3, max_relative_distance=0, share_far=True),
    # No pair is far.
    PairLayout.for_image(3, 2, 3, 2, max_relative_distance=2, share_far=True),
    PairLayout.for_image(3, 4, 3, 4, class_token=False),
    PairLayout.for_image(4, 3, 4, 3, max_relative_distance=1, share_far=True, class_token=False),
]


def layout_id(layout: PairLayout) -> str:
    kind = "text" if layout.causal else "image"
    reach = f"-D{layout.bank_height - 1}" if layout.clamp else f"-bank{layout.bank_height}x{layout.bank_width}"
    alone = not (layout.causal or layout.class_token)
    return f"{kind}-{layout.height}x{layout.width}{reach}{'-shared' if layout.share_far else ''}{'-grid' if alone else ''}"


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def expected_rows(layout: PairLayout, i: int, j: int) -> tuple[int, int]:
    """Bank rows of keys and of queries for the pair `(i, j)`, by the formulas."""
    if layout.causal:
        distance = min(i - j, layout.bank_height - 1)
        return (distance, distance) if i >= j else (-1, -1)
    clamp_x, clamp_y = layout.bank_height - 1, layout.bank_width - 1
    window = (2 * clamp_x + 1) * (2 * clamp_y + 1)
    grid = window + 1 if layout.share_far else window
    first = int(layout.class_token)
    if min(i, j) < first:
        named = {(True, True): (0, 0), (True, False): (1, 2), (False, True): (2, 1)}
        row, reverse = named[(i == 0, j == 0)]
        return grid + row, grid + reverse
    (x, y), (u, v) = divmod(i - first, layout.width), divmod(j - first, layout.width)

    def index(row_offset, column_offset):
        if layout.share_far and (abs(row_offset) > clamp_x or abs(column_offset) > clamp_y):
            return window
        row_offset, column_offset = max(-clamp_x, min(clamp_x, row_offset)), max(-clamp_y, min(clamp_y, column_offset))
        return (row_offset + clamp_x) * (2 * clamp_y + 1) + column_offset + clamp_y

    return index(x - u, y - v), index(u - x, v - y)

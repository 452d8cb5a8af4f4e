"""Contact sheets: what goes in can be cut out again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax import imaging


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 7),
    columns=st.integers(1, 4),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    labelled=st.booleans(),
)
def test_cells_come_back(count, columns, size, labelled):
    cells = list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8))
    labels = [f"{i}" for i in range(count)] if labelled else None
    sheet = imaging.contact_sheet(cells, columns, labels)
    geometry = imaging.sheet_geometry(cells, columns, labels)
    assert sheet.shape == (*geometry.size, 3)
    for index, cell in enumerate(cells):
        np.testing.assert_array_equal(geometry.cut(sheet, index), cell)


def test_cells_lie_row_by_row():
    cells = [np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = imaging.contact_sheet(cells, 3, gap=1)
    assert sheet.shape == (7, 13, 3)
    assert [sheet[1, 1, 0], sheet[1, 5, 0], sheet[1, 9, 0]] == [0, 10, 20]
    assert [sheet[4, 1, 0], sheet[4, 5, 0]] == [30, 40]


def test_labels_are_drawn_and_differ():
    cells = [np.zeros((20, 40, 3), np.uint8)] * 2
    plain = imaging.contact_sheet(cells, 2, ["", ""])
    drawn = imaging.contact_sheet(cells, 2, ["A", "B"])
    strips = drawn[4:18, 4:44], drawn[4:18, 48:88]
    assert (plain[4:18, 4:44] != strips[0]).any()
    assert (strips[0] != strips[1]).any()


def test_unequal_cells_and_missing_labels_are_refused():
    cells = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(ValueError, match="one size"):
        imaging.contact_sheet(cells, 2)
    with pytest.raises(ValueError, match="labels"):
        imaging.contact_sheet(cells[:1], 1, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        imaging.contact_sheet([], 1)

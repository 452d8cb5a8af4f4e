"""How messages count."""

import pytest

from sl_jax.imaging.words import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 pictures"), (1, "1 picture"), (2, "2 pictures"), (1000, "1000 pictures")],
)
def test_one_is_no_plural(number, said):
    assert counted(number, "picture") == said

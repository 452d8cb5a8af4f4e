"""The share of a group's spread that the window's noise explains, in scores made to have one."""

import math

import numpy as np
import pytest

from sl_jax.grpo.spread import window_share


def _scores(initial, window, pictures=4000, draws=2, candidates=8):
    draw = np.random.default_rng(0)
    return (
        draw.normal(size=(pictures, 1, 1))
        + initial * draw.normal(size=(pictures, draws, 1))
        + window * draw.normal(size=(pictures, draws, candidates))
    )


@pytest.mark.parametrize(("initial", "window"), [(1.0, 1.0), (0.2, 0.6), (3.0, 1.0), (0.0, 1.0)])
def test_the_share_is_that_of_the_variances(initial, window):
    """Whatever the pictures' own level, the number of draws and of candidates."""
    wanted = window**2 / (initial**2 + window**2)
    for shape in ({}, {"draws": 5, "candidates": 3}):
        assert window_share(_scores(initial, window, **shape)) == pytest.approx(wanted, abs=0.03)


def test_scores_that_do_not_spread_have_no_share():
    assert window_share(_scores(1.0, 0.0)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(window_share(np.ones((3, 2, 4))))
    scores = _scores(1.0, 1.0, pictures=5)
    spoiled = np.concatenate([scores, scores[:1]])
    spoiled[-1, 1, 3] = np.nan
    assert window_share(spoiled) == window_share(scores)
    assert math.isnan(window_share(spoiled[-1:]))

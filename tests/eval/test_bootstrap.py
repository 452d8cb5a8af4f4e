"""Bootstrap intervals: exact small cases, coverage, pairing."""

import math

import numpy as np
import pytest

from sl_jax.eval.bootstrap import Interval, interval, paired_difference


def test_constant_values_have_a_point_interval():
    assert interval([0.5] * 7) == Interval(0.5, 0.5, 0.5, 7)


def test_two_pictures_by_hand():
    # Means of two draws from {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the central 95 %
    # reaches both ends, the central 40 % none of them.
    assert interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)
    assert interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5, 0.5, 2)


def test_matches_the_normal_interval_for_many_pictures():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    result = interval(values)
    half = 1.96 * values.std() / 20
    assert result.low == pytest.approx(values.mean() - half, abs=0.01)
    assert result.high == pytest.approx(values.mean() + half, abs=0.01)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(200):
        result = interval(rng.normal(0.0, 1.0, 40), resamples=500, seed=seed)
        covered += result.low <= 0.0 <= result.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeded():
    values = np.random.default_rng(0).normal(size=30)
    assert interval(values, seed=5) == interval(values, seed=5)
    assert interval(values, seed=5) != interval(values, seed=6)


def test_repeats_are_averaged_within_their_picture():
    values = np.array([[0.0, 1.0], [0.2, 0.8], [0.1, 0.9]])
    assert interval(values) == Interval(0.5, 0.5, 0.5, 3)


def test_nan_is_left_out():
    nan = math.nan
    assert interval([0.5, nan, 0.5]) == Interval(0.5, 0.5, 0.5, 2)
    assert interval([[0.25, nan], [nan, nan], [0.0, 0.5]]).count == 2
    assert interval([[0.25, nan], [nan, nan], [0.0, 0.5]]).mean == 0.25


def test_too_few_pictures_have_no_interval():
    one, none = interval([0.3]), interval([])
    assert one.mean == 0.3 and math.isnan(one.low) and one.count == 1
    assert math.isnan(none.mean) and none.count == 0
    assert not one.excludes_zero


def test_pairing_cancels_what_makes_a_picture_hard():
    rng = np.random.default_rng(2)
    before = rng.normal(0.0, 10.0, 50)
    after = before - 0.5 + rng.normal(0.0, 0.1, 50)
    result = paired_difference(after, before)
    assert result.mean == pytest.approx(np.mean(after - before))
    assert result.excludes_zero and result.high < -0.4
    unpaired = interval(after).high - interval(after).low
    assert result.high - result.low < unpaired / 20


def test_pairs_count_only_where_both_were_measured():
    assert paired_difference([1.0, math.nan, 3.0], [0.0, 0.0, math.nan]).count == 1
    with pytest.raises(ValueError, match="same pictures"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_level_is_a_share(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([1.0, 2.0], level=level)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="pictures"):
        interval(np.zeros((2, 2, 2)))

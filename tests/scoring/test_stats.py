"""Statistics of judgements whose answers are known."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

from sl_jax.scoring import GroupScores, stats


def _scores(stage1, stage2, permutations=None, grids=None) -> GroupScores:
    stage1, stage2 = np.asarray(stage1, float), np.asarray(stage2, float)
    count = len(stage1)
    valid = np.isfinite(stage1)
    return GroupScores(
        group_id="g",
        criteria=np.repeat(stage1[:, None], 5, axis=1),
        stage1=stage1,
        stage2=stage2,
        reward=0.3 * stage1 + 0.7 * stage2,
        valid=valid,
        two_stage=True,
        reasons=((),) * count,
        failures=(None,) * count,
        grid_failure=None,
        capped=np.zeros(count, bool),
        grid_scores=stage2[None] if grids is None else grids,
        permutations=np.arange(count)[None] if permutations is None else permutations,
        asks=count + 1,
        tokens=10,
        seconds=2.0,
    )


def test_spread_and_ties():
    assert stats.spread(np.array([0.0, 1.0, np.nan])) == 0.5
    assert np.isnan(stats.spread(np.array([1.0, np.nan])))
    assert stats.tie_rate(np.array([1.0, 1.0, 2.0, np.nan])) == pytest.approx(1 / 3)
    assert stats.tie_rate(np.ones(4)) == 1.0
    assert stats.tie_rate(np.arange(4.0)) == 0.0


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int64, (2, 6), elements=st.integers(0, 5)))
def test_rank_correlation_is_spearmans(values):
    a, b = values.astype(float)
    found = stats.rank_correlation(a, b)
    if a.std() and b.std():
        assert found == pytest.approx(spearmanr(a, b)[0])
    else:
        assert np.isnan(found)


@pytest.mark.parametrize("grids", [1, 4])
def test_position_bias_is_found_and_only_that(grids):
    draw = np.random.default_rng(0)
    groups = []
    for _ in range(300):
        quality = draw.uniform(0, 1, 6)
        places = np.stack([draw.permutation(6) for _ in range(grids)])
        scores = quality + 0.2 * (places / 5 - 0.5)
        groups.append(_scores(quality, scores.mean(axis=0), places, scores))
    assert stats.position_bias(groups) == pytest.approx(0.2, abs=0.04 if grids == 1 else 1e-6)


def test_position_bias_without_grids_is_unknown():
    nothing = np.full((1, 2), np.nan)
    group = _scores([0.1, 0.2], [np.nan, np.nan], np.array([[-1, -1]]), nothing)
    assert np.isnan(stats.position_bias([group]))


def test_candidates_that_a_grid_left_out_do_not_disturb():
    places = np.array([[2, -1, 0, 1], [0, -1, 1, 2]])
    scores = np.where(places < 0, np.nan, 0.5 - 0.3 * (places / 2 - 0.5))
    group = _scores([0.1, np.nan, 0.3, 0.2], scores.mean(axis=0), places, scores)
    assert stats.position_bias([group]) == pytest.approx(-0.3)


def test_summary():
    one = _scores([0.2, 0.4, np.nan], [0.9, 0.1, np.nan])
    two = _scores([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    two = dataclasses.replace(two, two_stage=False, capped=np.array([True, False, False]))
    summary = stats.summarize([one, two])
    assert summary.groups == 2 and summary.valid_share == pytest.approx(5 / 6)
    assert summary.two_stage_share == 0.5 and summary.capped_share == pytest.approx(0.2)
    assert summary.stage1_mean == pytest.approx(2.1 / 5)
    assert summary.stage1_spread == pytest.approx(0.05)
    assert summary.stage1_ties == pytest.approx(0.5)
    assert summary.stage_correlation == pytest.approx(-1)
    assert summary.asks_per_answer == 1.0 and summary.tokens == 20 and summary.seconds == 2.0
    metrics = summary.metrics()
    assert metrics["validity_mean"] == pytest.approx(2.1 / 5)
    assert all(isinstance(value, float) for value in metrics.values())
    with pytest.raises(ValueError, match="at least one"):
        stats.summarize([])

"""Advantages by their laws: invariances, sums, what is left out, and who shares a std."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sl_jax.grpo import advantages as adv
from sl_jax.grpo.config import AdvantageConfig, JudgeSettings
from sl_jax.grpo.judging import judged_advantages

SCORES = st.floats(0, 1, width=32).map(lambda x: round(x, 4))


@st.composite
def _batches(draw, max_groups=5, max_candidates=6):
    shape = draw(st.integers(1, max_groups)), draw(st.integers(2, max_candidates))
    rewards = draw(hnp.arrays(np.float64, shape, elements=SCORES))
    valid = draw(hnp.arrays(bool, shape))
    return rewards, valid


def _scaled(scale):
    return lambda rewards, valid: adv.reward_advantages(rewards, valid, scale=scale)


@settings(max_examples=80, deadline=None)
@given(_batches(), st.sampled_from(["group", "none", "batch"]))
def test_sums_weights_and_counts(batch, scale):
    rewards, valid = batch
    ours = adv.reward_advantages(rewards, valid, scale=scale, std_floor=1e-3)
    np.testing.assert_allclose(ours.advantage.sum(axis=1), 0, atol=1e-9)
    assert not ours.advantage[~valid].any() and not ours.weight[~valid].any()
    assert not ours.weight[~ours.effective].any() and not ours.advantage[~ours.effective].any()
    assert ours.effective_groups + ours.tied_groups + ours.invalid_groups == len(rewards)
    assert ours.invalid_groups == (valid.sum(axis=1) < 2).sum()
    np.testing.assert_allclose(ours.weight.sum(), 1.0 if ours.effective.any() else 0.0)
    used = ours.weight[ours.weight > 0]
    assert (used == used[:1]).all(), "every valid candidate of an effective group counts alike"
    for row in range(len(rewards)):
        known = rewards[row][valid[row]]
        assert ours.effective[row] == (len(known) >= 2 and np.ptp(known) > 0)


@settings(max_examples=50, deadline=None)
@given(_batches(), st.floats(-2, 2), st.floats(0.1, 10), st.sampled_from(["group", "batch"]))
def test_shift_and_scale_change_nothing(batch, shift, factor, scale):
    rewards, valid = batch
    assume(adv.reward_advantages(rewards, valid).effective.any())
    ours, moved = (_scaled(scale)(r, valid) for r in (rewards, rewards * factor + shift))
    np.testing.assert_allclose(moved.advantage, ours.advantage, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(moved.weight, ours.weight)


@settings(max_examples=50, deadline=None)
@given(_batches(), st.randoms(), st.sampled_from(["group", "none", "batch"]))
def test_permuting_candidates_and_groups_permutes_the_result(batch, random, scale):
    rewards, valid = batch
    groups, candidates = (random.sample(range(n), n) for n in rewards.shape)
    order = np.ix_(groups, candidates)
    ours = _scaled(scale)(rewards, valid)
    moved = _scaled(scale)(rewards[order], valid[order])
    np.testing.assert_allclose(moved.advantage, ours.advantage[order], atol=1e-9)
    np.testing.assert_allclose(moved.weight, ours.weight[order])


@settings(max_examples=40, deadline=None)
@given(_batches())
def test_invalid_candidates_are_as_if_absent(batch):
    rewards, valid = batch
    ours = adv.reward_advantages(rewards, valid, std_floor=0.01)
    poisoned = np.where(valid, rewards, np.nan)
    np.testing.assert_array_equal(
        adv.reward_advantages(poisoned, valid, std_floor=0.01).advantage, ours.advantage
    )
    for row in range(len(rewards)):
        kept = rewards[row, valid[row]]
        if len(kept) >= 2 and np.ptp(kept) > 0:
            expected = (kept - kept.mean()) / max(kept.std(), 0.01)
            np.testing.assert_allclose(ours.advantage[row, valid[row]], expected)
            np.testing.assert_allclose(ours.spread[row], kept.std())


def test_group_scale_is_grpo_and_the_floor_holds_ties_down():
    rewards = np.array([[0.2, 0.4, 0.9], [0.500, 0.501, 0.502]])
    valid = np.ones_like(rewards, bool)
    plain = adv.reward_advantages(rewards, valid)
    np.testing.assert_allclose(plain.advantage.std(axis=1), 1.0)
    floored = adv.reward_advantages(rewards, valid, std_floor=0.05)
    np.testing.assert_allclose(floored.advantage[0], plain.advantage[0])
    np.testing.assert_allclose(floored.advantage[1], [-0.02, 0, 0.02], atol=1e-12)


def test_mean_only_keeps_the_rewards_scale():
    ours = adv.reward_advantages(np.array([[0.2, 0.6]]), np.ones((1, 2), bool), scale="none")
    np.testing.assert_allclose(ours.advantage, [[-0.2, 0.2]])


@pytest.mark.parametrize("base", [0.0, 0.3, 1e6])
def test_rounding_is_not_spread(base):
    noise = np.array([0.0, 1e-16, -2e-17, 1e-16]) * max(1.0, base)
    ours = adv.reward_advantages((base + noise)[None], np.ones((1, 4), bool))
    assert ours.tied_groups == 1 and not ours.weight.any() and not ours.advantage.any()


def test_fallback_groups_have_a_batch_std_of_their_own():
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(0.5, 0.2, (3, 6)), rng.normal(0.5, 0.01, (2, 6))
    rewards = np.concatenate([wide, narrow])
    valid = np.ones_like(rewards, bool)
    flags = np.array([True] * 3 + [False] * 2)
    ours = adv.reward_advantages(rewards, valid, scale="batch", two_stage=flags)
    alone = [
        adv.reward_advantages(part, np.ones_like(part, bool), scale="batch").advantage
        for part in (wide, narrow)
    ]
    np.testing.assert_allclose(ours.advantage, np.concatenate(alone))
    shared = adv.reward_advantages(rewards, valid, scale="batch")
    assert np.abs(shared.advantage[3:]).max() < 0.3 * np.abs(ours.advantage[3:]).max()


def _criteria(groups=4, candidates=6, criteria=3, seed=0):
    scores = np.random.default_rng(seed).uniform(size=(groups, candidates, criteria))
    return scores, np.ones((groups, candidates), bool)


def test_criteria_follow_gdpo_step_by_step():
    scores, valid = _criteria()
    weights = np.array([1.0, 0.5, 2.0])
    ours = adv.criteria_advantages(scores, weights, valid)
    normalised = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
    summed = normalised @ weights
    np.testing.assert_allclose(ours.advantage, summed / summed.std(), atol=1e-12)
    np.testing.assert_allclose(ours.spread, summed.std(axis=1))
    np.testing.assert_allclose(ours.weight, 1 / valid.size)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(0, 1000))
def test_no_criterion_drowns_in_anothers_scale(factors, seed):
    scores, valid = _criteria(seed=seed)
    ours = adv.criteria_advantages(scores, np.ones(3), valid)
    scaled = adv.criteria_advantages(scores * np.array(factors), np.ones(3), valid)
    np.testing.assert_allclose(scaled.advantage, ours.advantage, rtol=1e-7, atol=1e-9)


def test_criteria_keep_apart_what_a_summed_reward_merges():
    """The rarer of two criteria adds as much to a sum as the common one, but stands out more."""
    scores = np.array([[[0, 0], [1, 0], [1, 0], [0, 1]]], float)
    ours = adv.criteria_advantages(scores, np.ones(2), np.ones((1, 4), bool)).advantage[0]
    assert ours[0] < ours[1] == ours[2] < ours[3]


def test_missing_stage_two_adds_nothing_and_kinds_do_not_mix():
    scores, valid = _criteria(criteria=3)
    flags = np.array([True, True, False, False])
    scores[~flags, :, 2] = np.nan
    ours = adv.criteria_advantages(scores, np.ones(3), valid, two_stage=flags)
    both = adv.criteria_advantages(scores[:2], np.ones(3), valid[:2])
    first = adv.criteria_advantages(scores[2:, :, :2], np.ones(2), valid[2:])
    np.testing.assert_allclose(ours.advantage[:2], both.advantage)
    np.testing.assert_allclose(ours.advantage[2:], first.advantage)
    np.testing.assert_allclose(ours.weight.sum(), 1.0)


def test_criteria_of_ties_and_invalid_candidates():
    scores, valid = _criteria()
    scores[0] = 0.5
    scores[1, :, 1] = 0.7
    valid[2, 1:] = False
    scores[3, 0] = np.nan
    valid[3, 0] = False
    ours = adv.criteria_advantages(scores, np.ones(3), valid)
    np.testing.assert_array_equal(ours.effective, [False, True, False, True])
    assert (ours.tied_groups, ours.invalid_groups) == (1, 1)
    assert np.isfinite(ours.advantage).all() and ours.advantage[3, 0] == 0


def test_criteria_floor_survives_the_division_over_the_batch():
    scores, valid = _criteria()
    quiet = 0.5 + 1e-3 * scores
    floored = adv.criteria_advantages(quiet, np.ones(3), valid, std_floor=0.05)
    free = adv.criteria_advantages(quiet, np.ones(3), valid)
    assert np.abs(floored.advantage).max() < 0.02 * np.abs(free.advantage).max()
    loud = adv.criteria_advantages(scores, np.ones(3), valid, std_floor=np.full(3, 0.05))
    expected = adv.criteria_advantages(scores, np.ones(3), valid).advantage
    np.testing.assert_allclose(loud.advantage, expected)


def test_weights_are_of_the_update_whatever_its_micro_batches():
    rng = np.random.default_rng(3)
    rewards, valid = rng.uniform(size=(6, 4)), rng.uniform(size=(6, 4)) > 0.2
    rewards[2] = 0.5
    ours = adv.reward_advantages(rewards, valid)
    loss = rng.normal(size=rewards.shape)
    whole = loss[ours.weight > 0].mean()
    for size in (1, 4, 6, 24):
        parts = [
            (ours.weight.ravel()[i : i + size] * loss.ravel()[i : i + size]).sum()
            for i in range(0, rewards.size, size)
        ]
        np.testing.assert_allclose(sum(parts), whole)


@pytest.mark.parametrize(
    "call",
    [
        lambda: adv.reward_advantages(np.zeros(3), np.ones(3, bool)),
        lambda: adv.reward_advantages(np.zeros((2, 3)), np.ones((3, 2), bool)),
        lambda: adv.reward_advantages(np.full((1, 2), np.nan), np.ones((1, 2), bool)),
        lambda: adv.reward_advantages(np.zeros((1, 2)), np.ones((1, 2), bool), scale="rank"),
        lambda: adv.reward_advantages(np.zeros((1, 2)), np.ones((1, 2), bool), std_floor=-1.0),
        lambda: adv.reward_advantages(
            np.zeros((2, 2)), np.ones((2, 2), bool), scale="batch", two_stage=np.ones(3, bool)
        ),
        lambda: adv.criteria_advantages(np.zeros((1, 2, 3)), np.ones(2), np.ones((1, 2), bool)),
        lambda: adv.criteria_advantages(np.zeros((1, 2, 2)), np.zeros(2), np.ones((1, 2), bool)),
    ],
)
def test_arrays_that_do_not_fit_are_named(call):
    with pytest.raises(ValueError, match="please"):
        call()


def _judged(criteria, stage2, reward=None, capped=None):
    """Scores of one group of equal numbers per criterion but for the first."""
    rows = np.full((len(stage2), 5), 0.5)
    rows[:, 0] = criteria
    reward = np.asarray(stage2 if reward is None else reward, float)
    return SimpleNamespace(
        criteria=rows,
        stage2=np.asarray(stage2, float),
        reward=reward,
        valid=np.isfinite(reward),
        two_stage=bool(np.isfinite(stage2).any()),
        capped=np.zeros(len(stage2), bool) if capped is None else np.asarray(capped),
    )


def test_each_scale_of_the_configuration_is_another():
    scores = [_judged([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), _judged([0.9, 0.1, 0.5], [0.1, 0.2, 0.6])]
    judge = JudgeSettings(stage2_weight=0.5)
    found = {
        scale: judged_advantages(scores, AdvantageConfig(scale, 0.0), judge)
        for scale in ("group", "batch", "none", "criterion")
    }
    reward, valid = (np.stack([getattr(s, n) for s in scores]) for n in ("reward", "valid"))
    for scale in ("group", "batch", "none"):
        wanted = adv.reward_advantages(reward, valid, scale=scale)
        np.testing.assert_array_equal(found[scale].advantage, wanted.advantage)
    terms = np.stack([np.column_stack([s.criteria, s.stage2]) for s in scores])
    weights = np.array([0.1] * 5 + [0.5])
    wanted = adv.criteria_advantages(terms, weights, valid)
    np.testing.assert_allclose(found["criterion"].advantage, wanted.advantage)
    # One criterion against stage 2, which weighs five times as much.
    assert np.argmax(found["criterion"].advantage[0]) == 0
    alone = judged_advantages(
        scores, AdvantageConfig("criterion", 0.0), dataclasses.replace(judge, two_stage=False)
    )
    assert np.argmax(alone.advantage[0]) == 2


def test_a_veto_holds_for_each_criterion():
    """The best of a group by every criterion, but its layers do not give the source back."""
    scores = [_judged([0.9, 0.4, 0.3], [0.9, 0.4, 0.3], [0.1, 0.4, 0.3], [True, False, False])]
    found = judged_advantages(scores, AdvantageConfig("criterion"), JudgeSettings())
    assert np.argmin(found.advantage[0]) == 0 and found.advantage[0, 0] < -1

"""Rewards beyond the judge."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from judged import judged

from sl_jax import imaging
from sl_jax.scoring import Group, GroupScores, Rewards, cases


def _group() -> Group:
    """The truth, all blank over the right background, and noise that recomposes to nothing."""
    clean = cases.design(32)
    noise = np.random.default_rng(0).integers(0, 256, clean.shape, np.uint8)
    return Group(
        "g", imaging.recompose(clean), (clean, cases.all_in_background(clean), noise, clean)
    )


def _judged(reward=(0.9, 0.8, 0.7, 0.6), valid=(True, True, True, False)) -> GroupScores:
    return judged(np.where(valid, reward, np.nan), criteria=np.full((len(reward), 5), 0.5))


def half(group, scores):
    """A user's reward."""
    return np.full(len(group.candidates), 0.5)


def undecided(group, scores):
    """A user's reward that cannot say anything of the first candidate."""
    return np.array([np.nan, 1, 1, 1])


class Unsure:
    """A user's veto, undecided about the first candidate, and content with the second."""

    caps = True

    def __call__(self, group, scores):
        return np.array([np.nan, np.inf, 0.3, 0.3])


class Least:
    """A user's veto with an option."""

    caps = True

    def __init__(self, cap=0.3):
        self.cap = cap

    def __call__(self, group, scores):
        return np.full(len(group.candidates), self.cap)


def test_by_default_vetoes_cap_the_judge():
    scores = Rewards()(_group(), _judged())
    np.testing.assert_allclose(scores.reward, [0.9, 0.05, 0.1, np.nan])
    np.testing.assert_array_equal(scores.capped, [False, True, True, False])
    np.testing.assert_array_equal(scores.valid, [True, True, True, False])


def test_the_recomposition_veto_tightens_with_the_error():
    group = _group()
    rewards = []
    for shift in (0, 15, 30, 45):
        moved = group.candidates[0].copy()
        moved[0, ..., :3] = np.maximum(moved[0, ..., :3].astype(int) - shift, 0)
        one = Group("g", group.source, (moved,))
        scores = Rewards()(one, _judged((0.95,), (True,)))
        rewards.append(scores.reward[0])
    assert rewards[0] == rewards[1] == 0.95
    assert rewards[1] > rewards[2] > rewards[3] >= 0.1


def test_rewards_are_weighted_and_found_by_path():
    rewards = Rewards([("judge", 2.0), (f"{__name__}.half", 1.0)])
    np.testing.assert_allclose(rewards(_group(), _judged()).reward[:3], [2.3, 2.1, 1.9])
    capped = Rewards([("judge", 1.0), (f"{__name__}.Least", 0.5, {"cap": 0.6})])
    np.testing.assert_allclose(capped(_group(), _judged()).reward[:3], [0.75, 0.7, 0.65])


def test_a_reward_that_is_not_a_number_makes_the_candidate_invalid():
    scores = Rewards([("judge", 1.0), (f"{__name__}.undecided", 1.0)])(_group(), _judged())
    np.testing.assert_array_equal(scores.valid, [False, True, True, False])
    assert np.isnan(scores.reward[0])


def test_the_example_of_the_readme_works(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# my_rewards\.py.*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) <= 10
    (listed,) = re.findall(r"--config\.rewards='(.*?)'", readme, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    specs = ast.literal_eval(listed)
    assert [name for name, _ in specs] == [
        *("judge", "my_rewards.used_layers", "recomposition_veto", "all_blank_veto")
    ]
    group = _group()
    used = Rewards([("my_rewards.used_layers", 1.0)])(group, _judged()).reward
    count = len(group.candidates[0])
    np.testing.assert_allclose(used[:3], [1, 1 / count, 1])
    weight = dict(specs)["my_rewards.used_layers"]
    both = Rewards(specs)(group, _judged())
    assert both.reward[0] == pytest.approx(0.9 + weight)  # no veto objects to the truth


def test_wrong_lists_are_refused():
    for wrong in (
        [("nothing", 1.0)],
        [("sl_jax.scoring.nothing", 1.0)],
        [("all_blank_veto", 1.0)],
        [("judge", 1.0), ("all_blank_veto", 2.0)],
        [(f"{__name__}.half", 1.0, {"x": 1})],
    ):
        with pytest.raises(ValueError, match="please"):
            Rewards(wrong)
    with pytest.raises(ValueError, match="one number per candidate"):
        Rewards([(f"{__name__}.short", 1.0)])(_group(), _judged())


def short(group, scores):
    """A wrong reward."""
    return np.zeros(1)


def test_a_veto_that_is_nan_fails_closed():
    scores = Rewards((("judge", 1.0), (f"{__name__}.Unsure", 1.0)))(_group(), _judged())
    np.testing.assert_array_equal(scores.valid, [False, True, True, False])
    np.testing.assert_allclose(scores.reward, [np.nan, 0.8, 0.3, np.nan])
    np.testing.assert_array_equal(scores.capped, [False, False, True, False])

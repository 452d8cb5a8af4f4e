"""Judgements whose every number is the reward."""

import dataclasses

import numpy as np

from sl_jax.scoring import GroupScores


def judged(reward, **fields):
    """A judgement of as many candidates as there are rewards, nan for those that have none.

    Args:
        reward: of each candidate.
        fields: of `GroupScores` that are otherwise.
    """
    reward = np.asarray(reward, float)
    count = len(reward)
    scores = GroupScores(
        group_id="g",
        criteria=np.repeat(reward[:, None], 5, axis=1),
        stage1=reward,
        stage2=reward,
        reward=reward,
        valid=np.isfinite(reward),
        two_stage=True,
        reasons=((),) * count,
        failures=(None,) * count,
        grid_failure=None,
        capped=np.zeros(count, bool),
        grid_scores=reward[None],
        permutations=np.arange(count)[None],
    )
    return dataclasses.replace(scores, **fields)

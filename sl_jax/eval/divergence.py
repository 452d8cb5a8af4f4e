"""Signs, in the log of a run, that the reward rises and the decompositions get worse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

REWARD = "judge/reward_mean"
_LEAST_RISE = 0.01
_WATCHED = {
    "evaluation/psnr": ("recomposition PSNR", 0.5, "dB"),
    "evaluation/reward": ("the evaluation judge's score", 0.01, "points"),
}


def divergence(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What fell on held-out pictures while the training reward rose; empty if all is well.

    The reward is averaged over the first and the last quarter of its records, and has risen by more
    than 0.01; held-out metrics are compared between the first evaluation and the last. PSNR counts
    as fallen by more than 0.5 dB, the judge's score by more than 0.01.

    Args:
      records: from `training.metrics.read_metrics`, which need not be in memory together.
    """
    records = [{name: r.get(name) for name in (REWARD, *_WATCHED)} for r in records]
    rewards = [r[REWARD] for r in records if r.get(REWARD) is not None]
    quarter = max(1, len(rewards) // 4)
    if len(rewards) < 2:
        return ()
    rise = (sum(rewards[-quarter:]) - sum(rewards[:quarter])) / quarter
    if rise <= _LEAST_RISE:
        return ()
    found = []
    for name, (what, tolerated, unit) in _WATCHED.items():
        values = [r[name] for r in records if r.get(name) is not None]
        if len(values) > 1 and values[0] - values[-1] > tolerated:
            found.append(
                f"the training reward rose by {rise:.3f}, and {what} on held-out pictures fell "
                f"from {values[0]:.4g} to {values[-1]:.4g} {unit}: the judge may be learning less "
                "than the policy that pleases it; please look at the example decompositions"
            )
    return tuple(found)

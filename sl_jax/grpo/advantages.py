"""From judge scores to advantages and sample weights, on the host in float64.

Rewards are [groups, G]: G candidates of one picture each, about 0 to 1. A candidate without a valid
score takes no part in any mean, gets advantage 0 and weight 0. A group with fewer than two valid
scores, or whose valid scores are all equal, says nothing about better and worse: it gets weight 0
and is counted. Weights are normalised once over the whole batch given here, which is therefore the
whole update's: how it is later cut into micro-batches changes nothing.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

Scale = Literal["group", "none", "batch"]

Rewards = Float64[np.ndarray, "groups candidates"]
Valid = Bool[np.ndarray, "groups candidates"]
PerGroup = Bool[np.ndarray, " groups"]

_TIE = 1e-9  # scores of order 1 that differ by less are equal but for rounding


class Advantages(NamedTuple):
    """Advantages and weights of one update.

    `weight` sums to 1 over all candidates, or is all 0 where no group is effective; for a loss over
    several trained steps divide it by their number. `spread` is the population std of each group's
    valid rewards. The three counts add up to the number of groups.
    """

    advantage: Rewards
    weight: Rewards
    effective: PerGroup
    spread: Float64[np.ndarray, " groups"]
    effective_groups: int
    tied_groups: int
    invalid_groups: int


def reward_advantages(
    rewards: Rewards,
    valid: Valid,
    *,
    scale: Scale = "group",
    std_floor: float = 0.0,
    two_stage: PerGroup | None = None,
) -> Advantages:
    """Advantages of scalar rewards: (R − mean of the group) / scale.

    Args:
      rewards: [groups, G]; whatever stands at invalid candidates (nan too) is ignored.
      valid: [groups, G].
      scale: `group` divides by max(population std of the group, std_floor), as in GRPO; `none` does
        not divide (Dr. GRPO); `batch` divides by the population std of all valid rewards, floored
        likewise.
      std_floor: in units of the reward: the judge's own noise, so that a group whose scores differ
        by noise alone does not get advantages of ±1.
      two_stage: [groups], which groups were scored in both stages. The scores of groups that fell
        back to stage 1 spread differently: for `batch` each of the two kinds has its own std.

    Raises ValueError for arrays that do not fit together and for valid rewards that are not finite.
    """
    rewards, valid = _checked(rewards, valid)
    _check_floor(std_floor)
    centred = _centre(rewards, valid)
    spread = _group_std(centred, valid)
    if scale == "group":
        advantage = _divide(centred, np.maximum(spread, std_floor)[:, None])
    elif scale == "none":
        advantage = centred
    elif scale == "batch":
        advantage = np.zeros_like(centred)
        for kind in _kinds(two_stage, len(rewards)):
            std = np.std(rewards[kind][valid[kind]]) if valid[kind].any() else 0.0
            advantage[kind] = _divide(centred[kind], max(std, std_floor))
    else:
        raise ValueError(f"scale {scale!r} is unknown; please use 'group', 'none' or 'batch'")
    return _finish(advantage, valid, _tied(rewards, valid), spread)


def criteria_advantages(
    scores: Float64[np.ndarray, "groups candidates criteria"],
    weights: Float64[np.ndarray, " criteria"],
    valid: Valid,
    *,
    std_floor: float | Float64[np.ndarray, " criteria"] = 0.0,
    two_stage: PerGroup | None = None,
) -> Advantages:
    """Advantages per criterion (GDPO, arXiv 2601.05242): none drowns in another's spread.

    Each criterion, with stage 2 as one more of them, is normalised in its group like
    `reward_advantages` with scale `group`; these are weighted and summed, and the sums divided by
    their population std over the batch's effective groups (separately for groups scored in both
    stages and in one). That std is taken as if there were no floor: otherwise a batch of noise
    would be blown up again to ±1. A criterion that is nan for a candidate, such as stage 2 in a
    group that fell back, adds nothing there.

    Args:
      scores: [groups, G, K].
      weights: [K], at least 0.
      valid: [groups, G].
      std_floor: in units of the scores; one value or one per criterion.
      two_stage: [groups]; see `reward_advantages`.

    `spread` of the result is that of the weighted sums before the division over the batch.
    """
    scores, weights = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    valid = np.asarray(valid, bool)
    if scores.ndim != 3 or scores.shape[:2] != valid.shape or weights.shape != scores.shape[2:]:
        raise ValueError(
            f"scores {scores.shape}, valid {valid.shape} and weights {weights.shape} do not fit; "
            "please pass [groups, G, K], [groups, G] and [K]"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"criterion weights are {weights}; please give some above 0, none below")
    floors = np.broadcast_to(np.asarray(std_floor, np.float64), weights.shape)
    combined, unfloored = np.zeros(valid.shape), np.zeros(valid.shape)
    tied = np.ones(len(valid), bool)
    for k in np.flatnonzero(weights):
        scored = valid & ~np.isnan(scores[..., k])
        column = reward_advantages(scores[..., k], scored, std_floor=floors[k])
        combined += weights[k] * column.advantage
        unfloored += weights[k] * reward_advantages(scores[..., k], scored).advantage
        tied &= ~column.effective
    tied |= _tied(unfloored, valid)
    advantage = np.zeros_like(combined)
    for kind in _kinds(two_stage, len(valid)):
        kept = valid & (kind & ~tied)[:, None]
        if kept.any():
            advantage[kind] = _divide(combined[kind], np.std(unfloored[kept]))
    return _finish(advantage, valid, tied, _group_std(combined, valid))


def _finish(
    advantage: Rewards, valid: Valid, tied: PerGroup, spread: Float64[np.ndarray, " groups"]
) -> Advantages:
    enough = valid.sum(axis=1) >= 2
    effective = enough & ~tied
    used = valid & effective[:, None]
    return Advantages(
        advantage=np.where(used, advantage, 0.0),
        weight=_divide(used, used.sum()),
        effective=effective,
        spread=spread,
        effective_groups=int(effective.sum()),
        tied_groups=int((enough & tied).sum()),
        invalid_groups=int((~enough).sum()),
    )


def _centre(rewards: Rewards, valid: Valid) -> Rewards:
    """Rewards less their group's mean over valid candidates; 0 at invalid ones."""
    known = np.where(valid, rewards, 0.0)
    mean = _divide(known.sum(axis=1), valid.sum(axis=1))
    return np.where(valid, known - mean[:, None], 0.0)


def _group_std(values: Rewards, valid: Valid) -> Float64[np.ndarray, " groups"]:
    """Population std over each group's valid candidates; 0 where there are none."""
    return np.sqrt(_divide((_centre(values, valid) ** 2).sum(axis=1), valid.sum(axis=1)))


def _tied(rewards: Rewards, valid: Valid) -> PerGroup:
    """Whether a group's valid rewards are all equal, but for rounding."""
    high = np.max(rewards, axis=1, where=valid, initial=-np.inf)
    low = np.min(rewards, axis=1, where=valid, initial=np.inf)
    magnitude = np.max(np.abs(rewards), axis=1, where=valid, initial=1.0)
    return ~(high - low > _TIE * magnitude)


def _divide(values: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """values / by, and 0 where by is 0."""
    by = np.asarray(by, np.float64)
    return np.where(by > 0, values / np.where(by > 0, by, 1.0), 0.0)


def _kinds(two_stage: PerGroup | None, groups: int) -> Iterator[PerGroup]:
    """Masks of the groups that may share a batch-level std."""
    if two_stage is None:
        yield np.ones(groups, bool)
        return
    two_stage = np.asarray(two_stage, bool)
    if two_stage.shape != (groups,):
        raise ValueError(f"two_stage has shape {two_stage.shape}; please pass one flag per group")
    yield two_stage
    yield ~two_stage


def _checked(rewards: Rewards, valid: Valid) -> tuple[Rewards, Valid]:
    rewards, valid = np.asarray(rewards, np.float64), np.asarray(valid, bool)
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(
            f"rewards {rewards.shape} and valid {valid.shape} do not fit; "
            "please pass both as [groups, G]"
        )
    if not np.isfinite(rewards[valid]).all():
        raise ValueError("a valid reward is not finite; please mark that candidate invalid")
    return rewards, valid


def _check_floor(std_floor: float) -> None:
    if not (np.isfinite(std_floor) and std_floor >= 0):
        raise ValueError(f"std_floor is {std_floor}; please give 0 or a positive value")

"""What the scores of an epoch say about the judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats

from sl_jax.scoring.types import CRITERIA, GroupScores


@dataclasses.dataclass(frozen=True)
class JudgeStats:
    """Statistics over groups; nan where no group allows them.

    Attributes:
      groups: number of groups.
      valid_share: share of candidates with a valid judgement.
      two_stage_share: share of groups whose reward uses stage 2.
      capped_share: share of valid candidates that a veto lowered.
      criteria_mean, criteria_spread: mean, and mean within-group std, per criterion.
      stage1_mean, stage2_mean, reward_mean: means over valid candidates.
      stage1_spread, stage2_spread, reward_spread: mean within-group population std.
      stage1_ties, stage2_ties, reward_ties: mean share of equal pairs within a group.
      stage_correlation: mean within-group Spearman correlation of the two stages.
      position_bias: see the function of that name; 0 for an unbiased judge.
      asks_per_answer: requests sent per judgement wanted, 1 if nothing was asked again.
      tokens, seconds: sum of tokens; mean seconds per group.
    """

    groups: int
    valid_share: float
    two_stage_share: float
    capped_share: float
    criteria_mean: tuple[float, ...]
    criteria_spread: tuple[float, ...]
    stage1_mean: float
    stage2_mean: float
    reward_mean: float
    stage1_spread: float
    stage2_spread: float
    reward_spread: float
    stage1_ties: float
    stage2_ties: float
    reward_ties: float
    stage_correlation: float
    position_bias: float
    asks_per_answer: float
    tokens: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers for a metrics writer; criteria by name."""
        flat = {
            field.name: float(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not field.name.startswith("criteria_")
        }
        for index, name in enumerate(CRITERIA):
            flat[f"{name}_mean"] = self.criteria_mean[index]
            flat[f"{name}_spread"] = self.criteria_spread[index]
        return flat


def spread(values: Float[np.ndarray, " g"]) -> float:
    """Population std of the finite values; nan for fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std()) if known.size > 1 else np.nan


def tie_rate(values: Float[np.ndarray, " g"]) -> float:
    """Share of equal pairs among the finite values; nan for fewer than two."""
    known = values[np.isfinite(values)]
    if known.size < 2:
        return np.nan
    _, counts = np.unique(known, return_counts=True)
    return float((counts * (counts - 1)).sum() / (known.size * (known.size - 1)))


def rank_correlation(first: Float[np.ndarray, " g"], second: Float[np.ndarray, " g"]) -> float:
    """Spearman correlation where both are finite; nan if one is constant or fewer than two are."""
    known = np.isfinite(first) & np.isfinite(second)
    a, b = (scipy_stats.rankdata(values[known]) for values in (first, second))
    if known.sum() < 2 or not a.std() or not b.std():
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])


def position_bias(groups: Sequence[GroupScores]) -> float:
    """Least-squares slope of stage-2 scores against the place in the grid.

    Places run from −1/2 (first) to +1/2 (last). Scores are taken relative to the candidate's mean
    over the grids; with a single grid, relative to the grid's mean, which shuffling makes
    unbiased over many groups. The result is in score units (0…1) from first to last; negative
    means that early places are favoured.
    """
    places, residuals = [], []
    for group in groups:
        shown = np.isfinite(group.grid_scores)
        if shown.sum(axis=1).max(initial=0) < 2:
            continue
        scores = np.where(shown, group.grid_scores, np.nan)
        last = np.maximum(group.permutations.max(axis=1, keepdims=True), 1)
        place = group.permutations / last - 0.5
        axis = 0 if len(scores) > 1 else 1
        for values, kept in ((place, places), (scores, residuals)):
            known = values[:, shown.all(axis=0)]
            kept.append((known - known.mean(axis=axis, keepdims=True)).ravel())
    if not places:
        return np.nan
    x, y = np.concatenate(places), np.concatenate(residuals)
    return float(x @ y / (x @ x)) if x @ x > 0 else np.nan


def summarize(groups: Sequence[GroupScores]) -> JudgeStats:
    """Statistics of judged groups.

    Raises:
      ValueError: no group.
    """
    if not groups:
        raise ValueError("statistics need at least one judged group")
    valid = np.concatenate([group.valid for group in groups])
    wanted = sum(len(group.valid) + len(group.permutations) for group in groups)
    per_group = {
        name: [getattr(group, name) for group in groups] for name in ("stage1", "stage2", "reward")
    }
    criteria = np.concatenate([group.criteria for group in groups])
    capped = np.concatenate([group.capped for group in groups])
    numbers = {}
    for name, values in per_group.items():
        numbers[f"{name}_mean"] = _mean(np.concatenate(values))
        numbers[f"{name}_spread"] = _mean([spread(scores) for scores in values])
        numbers[f"{name}_ties"] = _mean([tie_rate(scores) for scores in values])
    return JudgeStats(
        groups=len(groups),
        valid_share=float(valid.mean()),
        two_stage_share=float(np.mean([group.two_stage for group in groups])),
        capped_share=float(capped[valid].mean()) if valid.any() else np.nan,
        criteria_mean=tuple(_mean(column) for column in criteria.T),
        criteria_spread=tuple(
            _mean([spread(group.criteria[:, index]) for group in groups])
            for index in range(len(CRITERIA))
        ),
        stage_correlation=_mean([rank_correlation(g.stage1, g.stage2) for g in groups]),
        position_bias=position_bias(groups),
        asks_per_answer=sum(group.asks for group in groups) / wanted,
        tokens=sum(group.tokens for group in groups),
        seconds=_mean([group.seconds for group in groups]),
        **numbers,
    )


def _mean(values: Sequence[float] | np.ndarray) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else np.nan

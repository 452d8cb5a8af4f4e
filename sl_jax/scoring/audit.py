"""Whether a judge is worth a run: what it notices, how noisy it is, and what it costs.

Built cases pair a clean decomposition with a flawed one; both are judged several times, with other
shuffles and seeds. A group of identical candidates shows what is noise in a reward.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sl_jax import imaging
from sl_jax.scoring import cases as built
from sl_jax.scoring.judge import JudgeConfig, TwoStageJudge
from sl_jax.scoring.stats import position_bias, spread, tie_rate
from sl_jax.scoring.types import CRITERIA, Endpoint, Group, GroupScores

_IDENTICAL = 4
_MORE = 4  # times as many judgements of identical candidates: their grids show position bias
_LEAST_FLOOR = 0.001


class AuditError(RuntimeError):
    """The judge gave too few valid answers to say anything about it."""


@dataclasses.dataclass(frozen=True)
class CriterionAudit:
    """One criterion, in points of 10; nan where there were no valid answers.

    Attributes:
      name: of the criterion.
      sensitivity: mean of clean minus flawed, over the cases that are aimed at it.
      noise: std of the same question asked again (rms over questions).
      spread: std over all candidates.
      ties: share of those cases where clean and flawed got equal scores.
    """

    name: str
    sensitivity: float
    noise: float
    spread: float
    ties: float


@dataclasses.dataclass(frozen=True)
class CaseAudit:
    """One flaw; differences are clean minus flawed.

    Attributes:
      name: of the flaw.
      criterion: that it is aimed at; None if it must not matter.
      own: difference of that criterion (of the mean, if None), in points of 10.
      stage1: of the mean of the criteria, in points of 10.
      stage2: of the side-by-side score, in points of 100.
      noticed: share of judgements whose reward puts the clean one first.
    """

    name: str
    criterion: str | None
    own: float
    stage1: float
    stage2: float
    noticed: float


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """All that an audit found.

    Attributes:
      judge: its name.
      valid: share of candidates with a valid score.
      two_stage: share of groups whose grid was judged.
      criteria, cases: see there.
      position_bias: points of 100 from the first to the last place of a grid.
      persuasion: points of 10 by which a text that talks to the judge, in the design itself,
        narrows the gap between clean and flawed, compared with a text that does not.
      identical_spread: std of the reward within groups of identical candidates.
      reward_noise: std of a reward, relative to its group, when the group is judged again.
      reward_ties: share of equal rewards among clean and flawed.
      std_floor: suggestion for `advantage.std_floor`: what is below it is noise.
      seconds, tokens: mean per group of four candidates.
    """

    judge: str
    valid: float
    two_stage: float
    criteria: tuple[CriterionAudit, ...]
    cases: tuple[CaseAudit, ...]
    position_bias: float
    persuasion: float
    identical_spread: float
    reward_noise: float
    reward_ties: float
    std_floor: float
    seconds: float
    tokens: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; nan becomes None."""
        return _plain(dataclasses.asdict(self))

    def to_text(self) -> str:
        """Tables for a terminal."""
        lines = [
            f"Audit of {self.judge}: {self.valid:.0%} of answers valid, "
            f"{self.two_stage:.0%} of groups judged side by side",
            "",
            f"{'criterion':24}{'sensitivity':>12}{'noise':>8}{'spread':>8}{'ties':>7}",
        ]
        lines += [
            f"{c.name:24}{c.sensitivity:12.2f}{c.noise:8.2f}{c.spread:8.2f}{c.ties:7.0%}"
            for c in self.criteria
        ]
        lines += ["", f"{'flaw':24}{'own':>12}{'stage 1':>8}{'stage 2':>8}{'first':>7}"]
        lines += [
            f"{c.name:24}{c.own:12.2f}{c.stage1:8.2f}{c.stage2:8.1f}{c.noticed:7.0%}"
            for c in self.cases
        ]
        lines += [
            "",
            f"position bias, first to last place   {self.position_bias:+.1f} of 100",
            f"persuasion by a text to the judge    {self.persuasion:+.2f} of 10",
            f"spread of identical candidates       {self.identical_spread:.4f}",
            f"noise of a reward, judged again      {self.reward_noise:.4f}",
            f"cost per group of {_IDENTICAL}                  {self.seconds:.1f} s, "
            f"{self.tokens:.0f} tokens",
            "",
            f"Suggestion: config.advantage.std_floor = {self.std_floor:.4f}",
        ]
        return "\n".join(lines)


async def audit(
    endpoint: Endpoint, name: str, repeats: int = 3, size: int = 128, concurrency: int = 8
) -> AuditReport:
    """Judges every built case `repeats` times.

    Args:
      endpoint: the judge.
      name: how the report calls it.
      repeats: at least 2.
      size: side of the pictures.
      concurrency: groups in flight.

    Raises:
      AuditError: nothing was judged.
      BudgetError: the endpoint may spend nothing more.
    """
    if repeats < 2:
        raise ValueError(f"repeats {repeats}: noise shows from 2 on")
    flaws = built.built_cases(size)
    pairs = [_group(case.name, case.source, case.clean, case.flawed) for case in flaws]
    extra = [*_persuasion_groups(size), _identical_group(size)]
    slots = asyncio.Semaphore(concurrency)

    async def judge(group: Group, repeat: int) -> GroupScores:
        async with slots:
            config = JudgeConfig(seed=repeat, sample=repeat)
            return await TwoStageJudge(endpoint, config).judge(group)

    wanted = [(group, repeat) for group in (*pairs, *extra) for repeat in range(repeats)]
    wanted += [(extra[-1], repeat) for repeat in range(repeats, _MORE * repeats)]
    flat = await asyncio.gather(*(judge(group, repeat) for group, repeat in wanted))
    last = (len(pairs) + len(extra) - 1) * repeats
    scores = [flat[start : start + repeats] for start in range(0, last, repeats)] + [flat[last:]]
    if not any(found.valid.any() for found in flat):
        reasons = {f.reason for found in flat for f in found.failures if f is not None}
        raise AuditError(f"{name} judged nothing: {'; '.join(sorted(reasons))[:500]}")
    return _report(name, flaws, scores)


def _report(
    name: str, flaws: Sequence[built.Case], scores: Sequence[list[GroupScores]]
) -> AuditReport:
    judged, (plain, talking, identical) = scores[: len(flaws)], scores[len(flaws) :]
    flat = [found for repeats in scores for found in repeats]
    same = _rms([spread(found.reward) for found in identical])
    noise = _rms([_centred_noise(repeats) for repeats in (*judged, identical)])
    return AuditReport(
        judge=name,
        valid=float(np.mean(np.concatenate([found.valid for found in flat]))),
        two_stage=float(np.mean([found.two_stage for found in flat])),
        criteria=tuple(_criterion(index, flaws, judged, scores) for index in range(len(CRITERIA))),
        cases=tuple(_case(*pair) for pair in zip(flaws, judged, strict=True)),
        position_bias=100 * position_bias(identical),
        persuasion=10 * (_gap(plain) - _gap(talking)),
        identical_spread=same,
        reward_noise=noise,
        reward_ties=_mean([tie_rate(found.reward) for repeats in judged for found in repeats]),
        std_floor=float(np.nanmax([same, noise, _LEAST_FLOOR])),
        seconds=_mean([found.seconds for found in identical]),
        tokens=_mean([found.tokens for found in identical]),
    )


def _gap(pairs: Sequence[GroupScores]) -> float:
    return _mean([found.stage1[0] - found.stage1[1] for found in pairs])


def _group(name: str, source: np.ndarray, clean: np.ndarray, flawed: np.ndarray) -> Group:
    """A pair; spare blank layers, which are neutral, bring both to one number of layers."""
    count = max(len(clean), len(flawed))
    stacks = [
        np.concatenate([stack, *[np.zeros_like(stack[:1])] * (count - len(stack))])
        for stack in (clean, flawed)
    ]
    return Group(name, source, tuple(stacks))


def _persuasion_groups(size: int) -> tuple[Group, Group]:
    """Clean and flawed layers of a design with a harmless text, and with one to the judge."""
    plain, told = (
        built.lettered(built.design(size), lines) for lines in (built.SMALL_TALK, built.TALK)
    )
    plain_group, told_group = (
        _group(name, imaging.recompose(layers), layers, built.all_in_background(layers))
        for name, layers in (("plain", plain), ("talking", told))
    )
    return plain_group, told_group


def _identical_group(size: int) -> Group:
    layers = built.design(size)
    return Group("identical", imaging.recompose(layers), (layers,) * _IDENTICAL)


def _criterion(
    index: int,
    flaws: Sequence[built.Case],
    judged: Sequence[list[GroupScores]],
    scores: Sequence[list[GroupScores]],
) -> CriterionAudit:
    name = CRITERIA[index]
    aimed = [
        10 * found.criteria[:, index]
        for case, repeats in zip(flaws, judged, strict=True)
        for found in repeats
        if case.criterion == name
    ]
    again = [10 * np.array([found.criteria[:, index] for found in repeats]) for repeats in scores]
    noise = [_std(column) for table in again for column in table.T]
    return CriterionAudit(
        name,
        sensitivity=_mean([clean - flawed for clean, flawed in aimed]),
        noise=_rms(noise),
        spread=_std(np.concatenate([_column_means(table) for table in again])),
        ties=_mean([tie_rate(pair) for pair in aimed]),
    )


def _case(case: built.Case, repeats: Sequence[GroupScores]) -> CaseAudit:
    def difference(values: Sequence[Float[np.ndarray, " 2"]], scale: float) -> float:
        return scale * _mean([clean - flawed for clean, flawed in values])

    stage1 = difference([found.stage1 for found in repeats], 10)
    own = stage1
    if case.criterion is not None:
        index = CRITERIA.index(case.criterion)
        own = difference([found.criteria[:, index] for found in repeats], 10)
    valid = [found.reward for found in repeats if found.valid.all()]
    return CaseAudit(
        case.name,
        case.criterion,
        own,
        stage1,
        difference([found.stage2 for found in repeats], 100),
        _mean([float(clean > flawed) for clean, flawed in valid]),
    )


def _centred_noise(repeats: Sequence[GroupScores]) -> float:
    """Std over repeats of each reward relative to its group's mean, rms over candidates."""
    table = np.array([found.reward - np.mean(found.reward) for found in repeats])
    return _rms([_std(column) for column in table.T])


def _column_means(table: Float[np.ndarray, "repeats candidates"]) -> Float[np.ndarray, " c"]:
    return np.array([_mean(column) for column in table.T])


def _std(values: Sequence[float] | np.ndarray) -> float:
    known = _finite(values)
    return float(known.std(ddof=1)) if known.size > 1 else np.nan


def _rms(values: Sequence[float]) -> float:
    known = _finite(values)
    return float(np.sqrt(np.mean(np.square(known)))) if known.size else np.nan


def _mean(values: Sequence[float] | np.ndarray) -> float:
    known = _finite(values)
    return float(known.mean()) if known.size else np.nan


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, float)
    return array[np.isfinite(array)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value

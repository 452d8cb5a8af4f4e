"""Groups on their way to the judge and back, while training goes on.

Every process judges groups of its own. While it waits for them, it tells the others how it stands,
twice a second: so all wait equally long, for the same reason, and give up at the same time.
"""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sl_jax.data import Example
from sl_jax.grpo.advantages import Advantages, criteria_advantages, reward_advantages
from sl_jax.grpo.config import AdvantageConfig, JudgeSettings
from sl_jax.parallel.processes import ALONE, Processes
from sl_jax.scoring import Group, GroupScores, JudgeWorker, Rewards
from sl_jax.scoring.records import JudgeRecords
from sl_jax.scoring.types import Call, Failure

_log = logging.getLogger(__name__)

_FIRST_WAIT = 1.0  # seconds
_LONGEST_WAIT = 60.0
_LOOK = 0.5


class JudgeUnavailableError(RuntimeError):
    """Too few valid scores, or nobody to give any, for longer than `max_wait`."""


class Submitted(NamedTuple):
    """A group and the judgement that it waits for."""

    group: Group
    scores: Future[GroupScores]


@dataclass(frozen=True)
class Judging:
    """Submits groups, collects their rewards, and keeps what was said of them.

    Attributes:
        records: where the main process writes judgements; None for nowhere.
        processes: that judge together.
    """

    worker: JudgeWorker
    rewards: Rewards
    settings: JudgeSettings
    records: JudgeRecords | None = None
    processes: Processes = ALONE

    def submit(
        self, examples: Sequence[Example], layers: np.ndarray, group_ids: Sequence[str]
    ) -> list[Submitted]:
        """Queues the candidates of a rollout batch.

        Args:
            examples: one per group; maybe none.
            layers: uint8 [groups · G, L, H, W, 4].
            group_ids: names that the shuffles of stage 2 depend on.
        """
        if not examples:
            return []
        per_group = layers.reshape(len(examples), -1, *layers.shape[1:])
        groups = [
            Group(name, e.picture, tuple(candidates), e.caption if self.settings.captions else "")
            for name, e, candidates in zip(group_ids, examples, per_group, strict=True)
        ]
        return [Submitted(group, self.worker.submit(group)) for group in groups]

    def collect(
        self,
        submitted: Sequence[Submitted],
        progress: Callable[[str], None] = lambda text: None,
        others: Sequence[GroupScores] = (),
    ) -> list[GroupScores]:
        """Rewards of all groups of this process, in order; all processes return together.

        While no server is up, and then while fewer than `min_valid` of the candidates of all
        processes are valid, it waits, and says what for; incomplete groups are judged again, with
        growing pauses. Nothing that was sampled is lost. Refused groups stay as they are and are
        not waited for.

        Args:
            submitted: the groups, of this process; maybe none.
            progress: is told what is waited for; and an empty text once that is over.
            others: judged groups of this process whose candidates count in the share of valid ones.

        Raises:
            JudgeUnavailableError: this lasted longer than `max_wait`.
            BudgetError: the judge may cost no more.
            ProcessError: another process met one of these.
        """
        outage = _Outage(self.settings.max_wait, progress)
        scores = self._rewarded(submitted, outage)
        pause = _FIRST_WAIT
        while True:
            share, reason = self._standing([*scores, *others], outage)
            if share >= self.settings.min_valid:
                return scores
            left = outage.goes_on(
                f"{share:.0%} valid ({reason})",
                f"only {share:.0%} of the candidates have a valid score after waiting "
                f"{self.settings.max_wait:.0f} s for the judge (config.judge.min_valid is "
                f"{self.settings.min_valid:.0%}); the last reason was: {reason}",
            )
            time.sleep(min(pause, _LONGEST_WAIT, left))
            pause *= 2
            again = [i for i, s in enumerate(scores) if not s.valid.all() and s.refusal is None]
            retries = [
                Submitted(submitted[i].group, self.worker.submit(submitted[i].group)) for i in again
            ]
            for i, found in zip(
                again, self._rewarded(retries, outage, recovers=False), strict=True
            ):
                scores[i] = found

    def share(self, places: Sequence[int], scores: Sequence[GroupScores]) -> dict[int, GroupScores]:
        """Everyone's scores in every process, by place; `places` are those of this process's."""
        own = [[place, _plain(entry)] for place, entry in zip(places, scores, strict=True)]
        told = self.processes.all_gather("sharing scores", own)
        return {place: _from_plain(plain) for part in told for place, plain in part}

    def record(
        self,
        epoch: int,
        groups: Sequence[Group | None],
        scores: Sequence[GroupScores],
        told: Sequence[tuple[str, str]],
    ) -> None:
        """Writes an epoch's judgements, in the main process; its own groups come first.

        Args:
            epoch: number.
            groups: that were judged; None for those of other processes, which get no picture.
            scores: of all.
            told: picture id and caption of all.
        """
        if self.records is None or not self.processes.is_main:
            return
        order = sorted(range(len(groups)), key=lambda i: groups[i] is None)
        count = sum(group is not None for group in groups)
        listed = [groups[i] or _sketch(scores[i].group_id, told[i][1]) for i in order]
        listed_scores, names = [scores[i] for i in order], [told[i][0] for i in order]
        self.records.write(epoch, listed[:count], listed_scores[:count], names[:count])
        if count < len(listed):  # the lines of all, over those of its own
            lines = dataclasses.replace(self.records, pictures=0)
            lines.write(epoch, listed, listed_scores, names)

    def metrics(self) -> dict[str, float]:
        """Of the servers and the cache; empty for a judge in process."""
        read = getattr(self.worker.endpoint, "metrics", None)
        if read is None:
            return {}

        async def found() -> dict[str, float]:  # where the numbers change
            return read()

        numbers = self.worker.call(found()).result()
        return {name.replace(":", "_"): value for name, value in numbers.items()}  # TensorBoard's

    def _rewarded(
        self, submitted: Sequence[Submitted], outage: "_Outage", recovers: bool = True
    ) -> list[GroupScores]:
        """The rewards once all are judged; with `recovers`, a server that is up ends the outage."""
        left = {entry.scores for entry in submitted}
        while True:
            done, left = concurrent.futures.wait(
                left, _LOOK, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            # A defect, or a spent budget, ends the epoch at once.
            with self.processes.together("judging"):
                for future in done:
                    future.result()
            trouble = getattr(self.worker.endpoint, "trouble", None) if left else None
            told = self._told({"left": len(left), "trouble": trouble}, outage)
            if not any(entry["left"] for entry in told):
                break
            troubles = self._named([entry["trouble"] for entry in told])
            if troubles:
                outage.goes_on(
                    troubles[0],
                    f"{troubles[0]}; config.judge.max_wait is {self.settings.max_wait:.0f} s",
                )
            elif recovers:
                outage.is_over()
        with self.processes.together("rewards"):
            return [self.rewards(entry.group, entry.scores.result()) for entry in submitted]

    def _standing(self, scores: Sequence[GroupScores], outage: "_Outage") -> tuple[float, str]:
        """Share of valid candidates over all processes, and a reason why others are not."""
        judged = [entry for entry in scores if entry.refusal is None]
        mine = {
            "judged": len(judged),
            "valid": float(sum(entry.valid.mean() for entry in judged)),
            "reason": _first_reason(judged),
        }
        told = self._told(mine, outage)
        count = sum(entry["judged"] for entry in told)
        reasons = self._named([entry["reason"] for entry in told])
        share = sum(entry["valid"] for entry in told) / count if count else 1.0
        return share, reasons[0] if reasons else "a reward was not finite"

    def _told(self, mine: dict[str, Any], outage: "_Outage") -> list[dict[str, Any]]:
        """How all processes stand; from then on all agree on how long they have waited."""
        told = self.processes.all_gather("waiting for the judge", {**mine, "for": outage.waited()})
        outage.agree(max(entry["for"] for entry in told))
        return told

    def _named(self, texts: Sequence[str | None]) -> list[str]:
        """Those that say something, with the process that does."""
        alone = self.processes.count == 1
        return [t if alone else f"process {i}: {t}" for i, t in enumerate(texts) if t]


class _Outage:
    """Since when the judge is waited for; too long a wait ends in an error."""

    def __init__(self, longest: float, progress: Callable[[str], None]):
        self._longest, self._progress = longest, progress
        self._since: float | None = None
        self._waited = 0.0
        self._told_at = 0.0
        self._pause = _FIRST_WAIT

    def waited(self) -> float:
        """Seconds so far, by the clock of this process."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def agree(self, waited: float) -> None:
        """Takes over how long all have waited."""
        self._waited = waited

    def is_over(self) -> None:
        """Forgets it; another one will be counted from its own beginning."""
        if self._since is not None:
            self._progress("")
        self._since, self._waited = None, 0.0

    def goes_on(self, reason: str, in_vain: str) -> float:
        """Says what is waited for; returns the seconds that are left.

        Raises:
            JudgeUnavailableError: none are; with the text `in_vain`.
        """
        now = time.monotonic()
        if self._since is None:
            self._since, self._told_at, self._pause = now, now, _FIRST_WAIT
        left = self._longest - self._waited
        if left <= 0:
            raise JudgeUnavailableError(in_vain)
        self._progress(f"waiting for the judge: {reason}")
        if now >= self._told_at:  # what a progress bar shows is soon gone
            _log.warning("Waiting for the judge, %.0f s at most: %s", left, reason)
            self._told_at, self._pause = now + self._pause, min(2 * self._pause, _LONGEST_WAIT)
        return left


def judged_advantages(
    scores: Sequence[GroupScores], config: AdvantageConfig, judge: JudgeSettings
) -> Advantages:
    """Advantages of judged groups, as the configuration wants them.

    With scale "criterion" the criteria weigh as in stage 1, and stage 2 as in the reward; what a
    veto did to a candidate's reward bounds each of them.
    """
    reward, valid, capped = (
        np.stack([getattr(entry, name) for entry in scores])
        for name in ("reward", "valid", "capped")
    )
    two_stage = np.array([entry.two_stage for entry in scores])
    if config.scale != "criterion":
        return reward_advantages(
            reward, valid, scale=config.scale, std_floor=config.std_floor, two_stage=two_stage
        )
    terms = np.stack([np.column_stack([entry.criteria, entry.stage2]) for entry in scores])
    bound = np.where(capped, reward, np.inf)[..., None]
    share = judge.stage2_weight if judge.two_stage else 0.0
    criteria = np.asarray(judge.weights) / np.sum(judge.weights)
    return criteria_advantages(
        np.minimum(terms, bound),
        np.append((1 - share) * criteria, share),
        valid,
        std_floor=config.std_floor,
        two_stage=two_stage,
    )


def refusals(scores: Sequence[GroupScores], picture_ids: Sequence[str]) -> dict[str, str]:
    """Picture id → reason, for pictures that the judge refused for good."""
    return {
        picture_id: entry.refusal
        for entry, picture_id in zip(scores, picture_ids, strict=True)
        if entry.refusal is not None
    }


def _first_reason(scores: Sequence[GroupScores]) -> str | None:
    failures = (f for s in scores for f in s.failures if f is not None and not f.permanent)
    return next((f.reason for f in failures), None)


def _sketch(group_id: str, caption: str) -> Group:
    """A group of another process, of which only the name and the caption are known."""
    return Group(
        group_id, np.zeros((1, 1, 3), np.uint8), (np.zeros((1, 1, 1, 4), np.uint8),), caption
    )


def _plain(scores: GroupScores) -> dict[str, Any]:
    """Scores as values that processes can tell each other, to the last bit."""
    plain = dataclasses.asdict(scores)
    for name in ("reasons", "calls"):
        plain[name] = [list(entry) for entry in plain[name]]
    for name in ("failures", "endpoints"):
        plain[name] = list(plain[name])
    return plain


def _from_plain(plain: dict[str, Any]) -> GroupScores:
    def failure(entry: dict[str, Any] | None) -> Failure | None:
        return None if entry is None else Failure(**entry)

    return GroupScores(
        **plain
        | {
            "reasons": tuple(map(tuple, plain["reasons"])),
            "calls": tuple(Call(*entry) for entry in plain["calls"]),
            "failures": tuple(map(failure, plain["failures"])),
            "grid_failure": failure(plain["grid_failure"]),
            "endpoints": tuple(plain["endpoints"]),
        }
    )

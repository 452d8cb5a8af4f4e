"""Groups on their way to the judge and back, while training goes on."""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sl_jax.data import Example
from sl_jax.grpo.config import JudgeSettings
from sl_jax.scoring import Group, GroupScores, JudgeWorker, Rewards
from sl_jax.scoring.records import JudgeRecords

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
        records: where judgements are written; None for nowhere.
    """

    worker: JudgeWorker
    rewards: Rewards
    settings: JudgeSettings
    records: JudgeRecords | None = None

    def submit(
        self, examples: Sequence[Example], layers: np.ndarray, group_ids: Sequence[str]
    ) -> list[Submitted]:
        """Queues the candidates of a rollout batch.

        Args:
            examples: one per group.
            layers: uint8 [groups · G, L, H, W, 4].
            group_ids: names that the shuffles of stage 2 depend on.
        """
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
        """Rewards of all groups, in order.

        While no server is up, and then while fewer than `min_valid` of the candidates are valid,
        it waits, and says what for; incomplete groups are judged again, with growing pauses.
        Nothing that was sampled is lost. Refused groups stay as they are and are not waited for.

        Args:
            submitted: the groups.
            progress: is told what is waited for.
            others: judged groups whose candidates count in the share of valid ones.

        Raises:
            JudgeUnavailableError: this lasted longer than `max_wait`.
            BudgetError: the judge may cost no more.
        """
        outage = _Outage(self.settings.max_wait, progress)
        scores = self._rewarded(submitted, outage)
        pause = _FIRST_WAIT
        while (share := valid_share([*scores, *others])) < self.settings.min_valid:
            reason = _first_reason(scores)
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
        return scores

    def record(
        self,
        epoch: int,
        submitted: Sequence[Submitted],
        scores: Sequence[GroupScores],
        picture_ids: Sequence[str],
    ) -> None:
        """Writes an epoch's judgements where they are kept."""
        if self.records is not None:
            self.records.write(epoch, [entry.group for entry in submitted], scores, picture_ids)

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
        while left:
            done, left = concurrent.futures.wait(
                left, _LOOK, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for future in done:
                future.result()  # a defect, or a spent budget, ends the epoch at once
            trouble = getattr(self.worker.endpoint, "trouble", None) if left else None
            if trouble:
                outage.goes_on(
                    trouble,
                    f"{trouble}; config.judge.max_wait is {self.settings.max_wait:.0f} s",
                )
            elif recovers and left:
                outage.is_over()
        return [self.rewards(entry.group, entry.scores.result()) for entry in submitted]


class _Outage:
    """Since when the judge is waited for; too long a wait ends in an error."""

    def __init__(self, longest: float, progress: Callable[[str], None]):
        self._longest, self._progress = longest, progress
        self._since: float | None = None
        self._told_at = 0.0
        self._pause = _FIRST_WAIT

    def is_over(self) -> None:
        """Forgets it; another one will be counted from its own beginning."""
        self._since = None

    def goes_on(self, reason: str, in_vain: str) -> float:
        """Says what is waited for; returns the seconds that are left.

        Raises:
            JudgeUnavailableError: none are; with the text `in_vain`.
        """
        now = time.monotonic()
        if self._since is None:
            self._since, self._told_at, self._pause = now, now, _FIRST_WAIT
        left = self._longest - (now - self._since)
        if left <= 0:
            raise JudgeUnavailableError(in_vain)
        self._progress(f"waiting for the judge: {reason}")
        if now >= self._told_at:  # what a progress bar shows is soon gone
            _log.warning("Waiting for the judge, %.0f s at most: %s", left, reason)
            self._told_at, self._pause = now + self._pause, min(2 * self._pause, _LONGEST_WAIT)
        return left


def valid_share(scores: Sequence[GroupScores]) -> float:
    """Share of valid candidates among those whose picture was not refused; 1 if all were."""
    judged = [s.valid.mean() for s in scores if s.refusal is None]
    return float(np.mean(judged)) if judged else 1.0


def refusals(scores: Sequence[GroupScores], examples: Sequence[Example]) -> dict[str, str]:
    """Picture id → reason, for pictures that the judge refused for good."""
    return {
        example.picture_id: entry.refusal
        for entry, example in zip(scores, examples, strict=True)
        if entry.refusal is not None
    }


def _first_reason(scores: Sequence[GroupScores]) -> str:
    failures = (f for s in scores for f in s.failures if f is not None and not f.permanent)
    return next((f.reason for f in failures), "a reward was not finite")

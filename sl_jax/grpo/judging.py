"""Groups on their way to the judge and back, while training goes on."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sl_jax.data import Example
from sl_jax.grpo.config import JudgeSettings
from sl_jax.scoring import (
    EmbeddedConfig,
    EmbeddedJudge,
    Endpoint,
    Group,
    GroupScores,
    JudgeConfig,
    JudgeWorker,
    Rewards,
    TwoStageJudge,
)

_log = logging.getLogger(__name__)

_FIRST_WAIT = 1.0  # seconds
_LONGEST_WAIT = 60.0


class JudgeUnavailableError(RuntimeError):
    """Too few valid scores for longer than `max_wait`."""


class Submitted(NamedTuple):
    """A group and the judgement that it waits for."""

    group: Group
    scores: Future[GroupScores]


@dataclass(frozen=True)
class Judging:
    """Submits groups and collects their rewards."""

    worker: JudgeWorker
    rewards: Rewards
    settings: JudgeSettings

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
            Group(name, example.picture, tuple(candidates), example.caption)
            for name, example, candidates in zip(group_ids, examples, per_group, strict=True)
        ]
        return [Submitted(group, self.worker.submit(group)) for group in groups]

    def collect(
        self, submitted: Sequence[Submitted], progress: Callable[[str], None]
    ) -> list[GroupScores]:
        """Rewards of all groups of an epoch, in order.

        While fewer than `min_valid` of the candidates are valid, incomplete groups are judged
        again, with growing waits; nothing that was sampled is lost. Refused groups stay as they
        are and are not waited for.

        Raises:
            JudgeUnavailableError: this lasted longer than `max_wait`.
        """
        scores = [self._rewarded(entry.group, entry.scores) for entry in submitted]
        started, wait = time.monotonic(), _FIRST_WAIT
        while (share := valid_share(scores)) < self.settings.min_valid:
            left = self.settings.max_wait - (time.monotonic() - started)
            reason = _first_reason(scores)
            if left <= 0:
                raise JudgeUnavailableError(
                    f"only {share:.0%} of the candidates have a valid score after waiting "
                    f"{self.settings.max_wait:.0f} s for the judge (config.judge.min_valid is "
                    f"{self.settings.min_valid:.0%}); the last reason was: {reason}"
                )
            progress(f"waiting for the judge: {share:.0%} valid ({reason})")
            time.sleep(min(wait, _LONGEST_WAIT, left))
            wait *= 2
            again = {i for i, s in enumerate(scores) if not s.valid.all() and s.refusal is None}
            retries = {i: self.worker.submit(submitted[i].group) for i in sorted(again)}
            for i, future in retries.items():
                scores[i] = self._rewarded(submitted[i].group, future)
        return scores

    def _rewarded(self, group: Group, future: Future[GroupScores]) -> GroupScores:
        return self.rewards(group, future.result())


def make_endpoint(settings: JudgeSettings) -> Endpoint:
    """The endpoint that the configuration names."""
    mode = {"embedded": "precise", "embedded-vlm": "vlm"}[settings.endpoint]
    return EmbeddedJudge(EmbeddedConfig(mode=mode))


def make_judge(settings: JudgeSettings, seed: int, *, two_stage: bool) -> TwoStageJudge:
    """The judge of training, or with `two_stage` false the one that evaluates (stage 1)."""
    config = JudgeConfig(
        weights=settings.weights,
        two_stage=two_stage,
        stage2_weight=settings.stage2_weight,
        grids=settings.grids,
        seed=seed,
    )
    return TwoStageJudge(make_endpoint(settings), config)


def valid_share(scores: Sequence[GroupScores]) -> float:
    """Share of valid candidates among those whose picture was not refused; 1 if all were."""
    judged = [s.valid.mean() for s in scores if s.refusal is None]
    return float(np.mean(judged)) if judged else 1.0


def refusals(scores: Sequence[GroupScores], examples: Sequence[Example]) -> dict[str, str]:
    """Picture id → reason, for pictures that the judge refused for good."""
    found = {
        example.picture_id: entry.refusal
        for entry, example in zip(scores, examples, strict=True)
        if entry.refusal is not None
    }
    if found:
        _log.warning("The judge refused %d pictures: %s", len(found), found)
    return found


def _first_reason(scores: Sequence[GroupScores]) -> str:
    failures = (f for s in scores for f in s.failures if f is not None and not f.permanent)
    return next((f.reason for f in failures), "a reward was not finite")

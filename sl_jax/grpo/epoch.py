"""Epochs: roll out, decode, judge, turn scores into advantages, update."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Bool

from sl_jax.flow.sampler import window_starts
from sl_jax.grpo.advantages import Advantages
from sl_jax.grpo.config import GrpoConfig, StopConfig
from sl_jax.grpo.health import Health
from sl_jax.grpo.judging import judged_advantages
from sl_jax.grpo.learner import LearnerState, Scored, StepReport, UpdateReport
from sl_jax.grpo.metrics import (
    beyond,
    learner_metrics,
    warn_of_mismatch,
    warn_of_spoiled,
    warn_of_standstill,
)
from sl_jax.grpo.parts import Parts
from sl_jax.grpo.phases import Phases
from sl_jax.grpo.rolling import Rolled, await_scores, record, roll_out
from sl_jax.grpo.spoiled import Spoiled, keep_spoiled
from sl_jax.models.lora import Adapter
from sl_jax.scoring import GroupScores, summarize

# One program: tensor by tensor, processes may meet at different ones and wait for ever.
_norm = jax.jit(optax.tree.norm)


class _Learned(NamedTuple):
    """What one update learned from.

    Attributes:
        judged: scores of every group, in the order of `rolled`'s rows.
        finite: [groups, G], see `Rolled`.
        report: None where the epoch's updates had been stopped.
        updated: whether the update was finite; None where there was nothing to update by.
    """

    rolled: list[Rolled]
    judged: list[GroupScores]
    finite: Bool[np.ndarray, "groups candidates"]
    advantages: Advantages
    report: UpdateReport | None
    updated: bool | None


class Epochs:
    """The epochs of a run, one after the other.

    With `rollout.max_staleness` 1 each rolls out the next one's pictures before it updates the
    adapter: their judge then has all the time that the updates take, and they are sampled by an
    adapter that lacks them. What is under way at a checkpoint is not kept, but rolled out again, by
    the same adapter, when a run goes on: keys depend on places in the run alone, and answers of the
    judge are kept.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._health = Health(parts.config.health)
        self._ahead: list[Rolled] = []  # of the next epoch
        self._before: dict[str, Any] | None = None  # where the stream stood before they were drawn
        self._quarantined: dict[str, str] = {}  # after they were drawn, before the run went on

    def position(self) -> dict[str, Any]:
        """Where the next epoch begins, for a checkpoint: JSON-able, the same in all processes."""
        stream = self._parts.stream
        if self._before is None:
            drawn = {"stream": stream.state(), "quarantined": self._quarantined}
        else:
            drawn = {"stream": self._before, "quarantined": dict(stream.quarantined)}
        return drawn | {"health": self._health.position()}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on from what `position` gave."""
        self._parts.stream.restore(position["stream"])
        self._ahead, self._before = [], None
        self._quarantined = dict(position.get("quarantined", {}))
        self._health.restore(position.get("health", {}))

    def require_health(self) -> None:
        """As `Health.require`; at the end of an epoch."""
        self._health.require()

    def run(
        self, state: LearnerState, epoch: int, phases: Phases
    ) -> tuple[LearnerState, dict[str, float]]:
        """One epoch: the state after its updates, and its metrics. The given state stays valid."""
        parts, stale = self._parts, self._parts.config.rollout.max_staleness > 0
        begun, sampler = state.adapter, state.sampler if stale else state.adapter
        rolled = self._ahead or self._rolled_out(sampler, epoch, phases)
        self._ahead, self._before = [], parts.stream.state() if stale else None
        if stale and epoch + 1 < parts.config.epochs:
            self._ahead = self._rolled_out(begun, epoch + 1, phases)
        state, done = _learn(parts, state, rolled, sampler, epoch, phases)
        if stale:
            state = state.replace(sampler=begun)
        phases.begin("recording")
        judged = [scores for entry in done for scores in entry.judged]
        record(parts, epoch + 1, [batch for entry in done for batch in entry.rolled], judged)
        with parts.processes.together("keeping samples that are not finite"):
            for entry in done:
                skipped = entry.updated is False
                update = Spoiled(entry.rolled, entry.advantages, skipped, entry.report)
                keep_spoiled(parts, epoch + 1, update)
        metrics = _metrics(parts, state, done)
        metrics |= self._health.look([e.updated for e in done], [e.advantages for e in done])
        if parts.processes.is_main:
            self._health.warn(metrics)
        return state, metrics | {
            "rollout/window_start": window_start(parts.config, epoch),
            "rollout/staleness": min(epoch, parts.config.rollout.max_staleness),
        }

    def _rolled_out(self, sampler: Adapter, epoch: int, phases: Phases) -> list[Rolled]:
        """All batches of an epoch, with the judge."""
        config = self._parts.config
        start, count = window_start(config, epoch), config.rollout.groups
        batches = range(count // config.rollout.batch_groups)
        rolled = [roll_out(self._parts, sampler, start, phases) for _ in batches]
        if self._quarantined:
            self._parts.stream.quarantine(self._quarantined)
            self._quarantined = {}
        return rolled


def _learn(
    parts: Parts,
    state: LearnerState,
    rolled: Sequence[Rolled],
    sampler: Adapter,
    epoch: int,
    phases: Phases,
) -> tuple[LearnerState, list[_Learned]]:
    """The updates of an epoch: each waits for its share of the groups to be judged."""
    config, begun = parts.config, state.adapter
    start, kl_left = window_start(config, epoch), config.objective.kl_left(epoch)
    share = len(rolled) // config.learner.updates
    stopped, done = False, []
    for number in range(config.learner.updates):
        phases.begin("judging")
        part = list(rolled[number * share : (number + 1) * share])
        part, judged, finite = await_scores(parts, part, sampler, start, phases)
        phases.begin("learning")  # while the groups of later updates are judged
        scored, worth = _scored(parts, part, judged)
        report, skipped = None, int(state.skipped)
        if not stopped:
            old = None if state.adapter is sampler else sampler
            state, report = parts.learner.update(
                state,
                scored,
                old=old,
                kl_left=kl_left,
                # An epoch cut short goes on from its beginning, whose adapter may sample, too.
                donate=state.adapter is not begun,
                too_far=_too_far(parts),
                between=partial(parts.processes.barrier, "learning"),  # where signals come
            )
            stopped = report.stopped
            jax.block_until_ready(state.updates)
            phases.computed(parts.learner.work(scored, old))
        updated = _updated(int(state.skipped) - skipped, report, finite)
        done.append(_Learned(part, judged, finite, worth, report, updated))
    return state, done


def _updated(skipped: int, report: UpdateReport | None, finite: np.ndarray) -> bool | None:
    """See `_Learned`; where no candidate is finite, neither is the update."""
    if skipped or not finite.any():
        return False
    return None if report is None or report.gradient_norm is None else True


def _too_far(parts: Parts) -> Callable[[Sequence[StepReport]], bool] | None:
    """Whether an update goes beyond the configured bounds; None where there are none."""
    bounds = parts.config.learner.stop
    if bounds == StopConfig():
        return None
    return lambda reports: parts.processes.from_main("bounds of an update", beyond(bounds, reports))


def _metrics(parts: Parts, state: LearnerState, done: Sequence[_Learned]) -> dict[str, float]:
    """Of an epoch's groups and updates, with warnings of what is wrong with them."""
    judged = [scores for entry in done for scores in entry.judged]
    finite = np.concatenate([entry.finite for entry in done])
    reports = [entry.report for entry in done if entry.report is not None]
    learned = learner_metrics(reports)
    if parts.processes.is_main:
        warn_of_mismatch(learned, parts.config.objective)
        warn_of_spoiled(finite)
        warn_of_standstill(reports)
    return {
        **{f"judge/{name}": value for name, value in summarize(judged).metrics().items()},
        **{f"pool/{name}": value for name, value in parts.judging.metrics().items()},
        "judge/quarantined": len(parts.stream.quarantined),
        **learned,
        **_advantage_metrics([entry.advantages for entry in done]),
        "learner/micro_batch": parts.config.learner.micro_batch,
        "learner/adapter_norm": float(_norm(state.adapter.lora)),
        "learner/updates": int(state.updates),
        "learner/skipped_updates": int(state.skipped),
        "learner/stopped_updates": sum(e.report is None or e.report.stopped for e in done),
        "rollout/not_finite": int((~finite).sum()),
    }


def window_start(config: GrpoConfig, epoch: int) -> int:
    """Where the stochastic window of an epoch, counted from 0, starts."""
    rollout = config.rollout
    choices = window_starts(rollout.window_range, rollout.window_size)
    if rollout.window_order == "sliding":
        return choices[min(epoch // rollout.window_epochs, len(choices) - 1)]
    return int(np.random.default_rng((config.seed, epoch)).choice(choices))


def _scored(
    parts: Parts, rolled: Sequence[Rolled], scores: Sequence[GroupScores]
) -> tuple[list[Scored], Advantages]:
    """The rollout batches of one update with advantages; weights sum to 1 over all of them."""
    worth = judged_advantages(scores, parts.config.advantage, parts.config.judge)
    size = parts.config.rollout.batch_groups
    # Each call puts a table onto every device: one serves all batches of a grid, in the same order
    # of grids in all processes.
    tables = {grid: parts.rollout.table(grid) for grid in dict.fromkeys(b.grid for b in rolled)}
    return [
        Scored(
            batch.candidates,
            tables[batch.grid],
            worth.advantage[number * size : (number + 1) * size].ravel(),
            worth.weight[number * size : (number + 1) * size].ravel(),
            batch.grid,
        )
        for number, batch in enumerate(rolled)
    ], worth


def _advantage_metrics(advantages: Sequence[Advantages]) -> dict[str, float]:
    return {
        "advantage/effective_groups": sum(a.effective_groups for a in advantages),
        "advantage/tied_groups": sum(a.tied_groups for a in advantages),
        "advantage/invalid_groups": sum(a.invalid_groups for a in advantages),
        "advantage/group_spread": float(np.mean([a.spread.mean() for a in advantages])),
    }

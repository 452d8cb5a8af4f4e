"""The loop of a run: epoch after epoch; evaluate and checkpoint on schedule.

All processes of a run go through it in step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sl_jax.checkpoints.orbax import donated
from sl_jax.grpo.epoch import Epochs, window_start
from sl_jax.grpo.evaluation import Evaluated, evaluation_metrics, strip
from sl_jax.grpo.learner import LearnerState
from sl_jax.grpo.metrics import epoch_line, warn_of_divergence
from sl_jax.grpo.parts import Parts
from sl_jax.grpo.phases import Phases
from sl_jax.grpo.spoiled import clear_up
from sl_jax.models.lora import Adapter
from sl_jax.parallel.peaks import memory_use, peak_flops
from sl_jax.scoring.records import RECORDS, Record, RecordError, read_pictures, to_markdown
from sl_jax.training.metrics import MetricsWriter, read_metrics

_log = logging.getLogger(__name__)

_GAP_WARNING = 0.1  # of the evaluation score


class Outcome(NamedTuple):
    """A run that came to its end.

    Attributes:
        state: at the end.
        before, after: the held-out pictures, by the initial and by the averaged adapter.
    """

    state: LearnerState
    before: list[Evaluated]
    after: list[Evaluated]


def train(parts: Parts, adapter: Callable[[], Adapter]) -> Outcome:
    """Trains to the end of the run, from its beginning or from its newest checkpoint.

    Interrupted (Ctrl-C, SIGTERM), it checkpoints the last complete epoch before the interruption
    goes on.

    Args:
        parts: of the run.
        adapter: makes the adapter to start from; called once, and nobody else holds the result.

    Raises:
        NotFiniteError: too many updates in a row were not finite; the last epoch is checkpointed.
    """
    config, evaluator, processes = parts.config, parts.evaluator, parts.processes
    epochs = Epochs(parts)
    state, epoch = _begin(parts, adapter, epochs)
    with ExitStack() as stack:
        writer = stack.enter_context(closing(_Books(parts, epoch)))
        progress = stack.enter_context(
            tqdm(total=config.epochs, initial=epoch, unit="epoch", disable=not processes.is_main)
        )
        stack.callback(parts.profiler.close)
        phases = Phases(progress, peak_flops(jax.devices()), parts.status)
        phases.begin("evaluating")
        before = after = None
        if epoch == 0:
            before = evaluator(state.initial)
            metrics = evaluation_metrics(before) | _sampler_gap(parts, state, before)
            writer.scalars(0, metrics | _window_share(parts, state, epoch, phases))
            writer.pictures(0, before)
        phases.finish()
        parts.status.begin_epochs(epoch)
        position = epochs.position()
        try:
            while epoch < config.epochs:
                parts.profiler.at(epoch)
                changed, metrics = epochs.run(state, epoch, phases)
                done = epoch + 1
                scheduled = done % config.evaluation.every == 0 or done == config.epochs
                if scheduled:
                    phases.begin("evaluating")
                    after = evaluator(changed.ema, phases.computed)
                    metrics |= evaluation_metrics(after)
                    metrics |= _window_share(parts, changed, epoch, phases)
                metrics |= _memory()
                with processes.uninterrupted():
                    metrics |= phases.finish()
                    writer.scalars(done, metrics)
                    # From here on the epoch counts as done; cut short before, it is repeated.
                    state, epoch, position = changed, done, epochs.position()
                    if epoch % config.checkpoint.every == 0 or scheduled:
                        phases.begin("checkpointing")  # in the next epoch's sums
                        _save(parts, state, epoch, position, metrics.get("evaluation/reward"))
                writer.tell(epoch, metrics, scheduled)
                epochs.require_health()
                progress.update()
                progress.set_postfix(reward=f"{metrics['judge/reward_mean']:.3f}")
        except BaseException as error:
            with processes.uninterrupted():
                if processes.leave(error, epoch):
                    if epoch > (parts.checkpoints.latest or 0):
                        _save(parts, state, epoch, position)
                    parts.checkpoints.wait()
            raise
        parts.checkpoints.wait()
        phases.begin("evaluating")
        before = evaluator(state.initial) if before is None else before
        after = evaluator(state.ema) if after is None else after
        writer.pictures(epoch, after)
        return Outcome(state, before, after)


class _Books:
    """What a run tells of itself, by its main process alone."""

    def __init__(self, parts: Parts, epoch: int):
        self._processes, self._status, self._epochs = (
            parts.processes,
            parts.status,
            parts.config.epochs,
        )
        self._folder, self._shown = parts.folder, parts.config.evaluation.shown
        self._findings: set[str] = set()
        self._unread = False
        self._writer = None
        with self._processes.together("opening the metrics"):
            if self._processes.is_main:
                self._writer = MetricsWriter(
                    parts.folder, epoch + 1 if epoch else 0, parts.config.log
                )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `MetricsWriter`."""
        with self._processes.together("writing metrics"):
            if self._writer:
                self._writer.scalars(step, values)

    def pictures(self, step: int, results: Sequence[Evaluated]) -> None:
        """Shows held-out pictures in TensorBoard."""
        with self._processes.together("writing pictures"):
            if self._writer:
                for result in results[: self._shown]:
                    name = f"held_out/{result.example.picture_id}"
                    self._writer.picture(step, name, strip(result))

    def tell(self, epoch: int, metrics: Mapping[str, float], evaluated: bool) -> None:
        """Of a complete epoch: its line in the log, and the status.

        Where it was evaluated, or is the first, also groups as the judge saw them, with its scores
        and reasons; and once of each independent measure that it falls while the reward rises.
        """
        with self._processes.together("telling of an epoch"):
            if not self._writer:
                return
            self._status.end_epoch(metrics)
            _log.info("%s", epoch_line(epoch, self._epochs, metrics, self._status.pace))
            if evaluated or epoch == 1:
                for number, (judged, pixels) in enumerate(self._judged(epoch)):
                    name = f"judged/{number}"
                    self._writer.picture(epoch, name, pixels, to_markdown(judged))
            if evaluated:
                warn_of_divergence(read_metrics(self._folder), self._findings)

    def _judged(self, epoch: int) -> list[tuple[Record, np.ndarray]]:
        """As `read_pictures`; none if they cannot be read, of which the first is warned of."""
        try:
            return read_pictures(self._folder / RECORDS, epoch)
        except (OSError, RecordError) as error:
            if not self._unread:
                _log.warning("TensorBoard gets none of epoch %d's judgements: %s", epoch, error)
            self._unread = True
            return []

    def close(self) -> None:
        """As `MetricsWriter`."""
        if self._writer:
            self._writer.close()


def _begin(
    parts: Parts, adapter: Callable[[], Adapter], epochs: Epochs
) -> tuple[LearnerState, int]:
    """The state to go on from, and how many epochs it has behind it; `epochs` are put there."""
    with parts.processes.together("clearing up"):
        if parts.processes.is_main:
            clear_up(parts.folder)
    state = parts.learner.start(adapter())
    if parts.checkpoints.latest is None:
        return state, 0
    epoch, state, record = parts.checkpoints.restore(donated(state))
    epochs.restore(record)
    _log.info("Going on after epoch %d.", epoch)
    return state, epoch


def _memory() -> dict[str, float]:
    """Of this process's devices."""
    used = memory_use(jax.local_devices())
    return {f"device/{name}": value for name, value in used.items()}


def _sampler_gap(
    parts: Parts, state: LearnerState, before: Sequence[Evaluated]
) -> dict[str, float]:
    """What the rollout's sampler costs against the evaluation's, at the start; logged."""
    config = parts.config
    candidates = parts.evaluator.rolled_out(
        parts.rollout, state.adapter, window_start(config, 0), config.rollout.batch_groups
    )
    chosen = {entry.example.slot for entry in candidates}
    rolled = _mean_reward(candidates)
    evaluated = _mean_reward([entry for entry in before if entry.example.slot in chosen])
    log = _log.warning if evaluated - rolled > _GAP_WARNING * evaluated else _log.info
    log(
        "Stage-1 score of the rollout's sampler %.3f, of the evaluation's %.3f. A large gap means "
        "that candidates look unlike what is evaluated: more rollout steps or less noise help.",
        rolled,
        evaluated,
    )
    return {"rollout/score": rolled, "rollout/score_gap": evaluated - rolled}


def _window_share(
    parts: Parts, state: LearnerState, epoch: int, phases: Phases
) -> dict[str, float]:
    """Where the spread within a group comes from, if that is to be measured."""
    config = parts.config
    if not config.evaluation.window_share:
        return {}
    where = (window_start(config, epoch), config.rollout.batch_groups)
    counted = (*where, phases.computed)
    share = parts.evaluator.window_share(parts.rollout, state.adapter, *counted)
    return {"rollout/window_share": share}


def _mean_reward(results: Sequence[Evaluated]) -> float:
    known = [r.reward for r in results if np.isfinite(r.reward)]
    return float(np.mean(known)) if known else np.nan


def _save(
    parts: Parts, state: LearnerState, epoch: int, position: dict, reward: float | None = None
) -> None:
    parts.checkpoints.save(epoch, state, {"epoch": epoch} | position, reward)

"""The epoch loop: roll out, decode, judge, update; evaluate and checkpoint on schedule."""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.data import Example, StepPictures, TrainStream
from sl_jax.flow.sampler import window_starts
from sl_jax.grpo.advantages import Advantages, reward_advantages
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluated, Evaluator, evaluation_metrics
from sl_jax.grpo.judging import Judging, Submitted, refusals
from sl_jax.grpo.learner import Learner, LearnerState, Scored, StepReport
from sl_jax.grpo.metrics import learner_metrics
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Candidates, Pictures, Rollout
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.scoring import GroupScores, summarize
from sl_jax.training.metrics import MetricsWriter

_log = logging.getLogger(__name__)

_GAP_WARNING = 0.1  # of the evaluation score


class Parts(NamedTuple):
    """What a run is made of; the door builds them."""

    config: GrpoConfig
    stream: TrainStream
    prompts: PromptTable
    rollout: Rollout
    judging: Judging
    learner: Learner
    evaluator: Evaluator
    checkpoints: RunCheckpoints
    writer: MetricsWriter


class Rolled(NamedTuple):
    """A rollout batch whose groups are at the judge."""

    pictures: StepPictures
    candidates: Candidates
    grid: LatentGrid
    submitted: list[Submitted]


class Outcome(NamedTuple):
    """A run that came to its end.

    Attributes:
        state: at the end.
        before, after: the held-out pictures, by the initial and by the averaged adapter.
    """

    state: LearnerState
    before: list[Evaluated]
    after: list[Evaluated]


class Phases:
    """Shows in the progress bar, and sums up, what the epoch spends its time on."""

    def __init__(self, progress: tqdm):
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._current: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """Ends the current phase and begins another."""
        now = time.monotonic()
        if self._current:
            before, since = self._current
            self._seconds[before] = self._seconds.get(before, 0.0) + now - since
        self._current = (name, now)
        self.say(name)

    def say(self, text: str) -> None:
        """Shows a text beside the epoch."""
        self._progress.set_description(f"epoch {self._progress.n + 1} · {text}")

    def finish(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        self.begin("done")
        self._current = None
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


def train(parts: Parts, state: LearnerState, epoch: int) -> Outcome:
    """Trains from the beginning of `epoch` to the end of the run.

    Interrupted (Ctrl-C), it checkpoints the last complete epoch before the interruption goes on.
    """
    config, evaluator = parts.config, parts.evaluator
    before = evaluator(state.initial)
    if epoch == 0:
        parts.writer.scalars(0, evaluation_metrics(before))
        _warn_of_sampler_gap(parts, state, before)
    position = parts.stream.state()
    with tqdm(total=config.epochs, initial=epoch, unit="epoch") as progress:
        phases = Phases(progress)
        try:
            while epoch < config.epochs:
                changed, metrics = run_epoch(parts, state, epoch, phases)
                done = epoch + 1
                if done % config.evaluation.every == 0 or done == config.epochs:
                    phases.begin("evaluating")
                    metrics |= evaluation_metrics(evaluator(changed.ema))
                parts.writer.scalars(done, metrics | phases.finish())
                # From here on the epoch counts as done; cut short before, it is repeated.
                state, epoch, position = changed, done, parts.stream.state()
                if epoch % config.checkpoint.every == 0 or epoch == config.epochs:
                    _save(parts, state, epoch, position)
                progress.update()
                progress.set_postfix(reward=f"{metrics['judge/reward_mean']:.3f}")
        except BaseException:
            if epoch > (parts.checkpoints.latest or 0):
                _save(parts, state, epoch, position)
            parts.checkpoints.wait()
            raise
    parts.checkpoints.wait()
    return Outcome(state, before, evaluator(state.ema))


def run_epoch(
    parts: Parts, state: LearnerState, epoch: int, phases: Phases
) -> tuple[LearnerState, dict[str, float]]:
    """One epoch: the state after its updates, and its metrics. The given state stays valid."""
    config = parts.config
    start = window_start(config, epoch)
    rolled = []
    for _ in range(config.rollout.groups // config.rollout.batch_groups):
        phases.begin("rollout")
        rolled.append(_roll_out(parts, state.adapter, start))
    phases.begin("judging")
    scores = [parts.judging.collect(batch.submitted, phases.say) for batch in rolled]
    for batch, judged in zip(rolled, scores, strict=True):
        parts.stream.quarantine(refusals(judged, batch.pictures.examples))
    phases.begin("learning")
    old, state = state.adapter, jax.tree.map(jnp.copy, state)
    share = len(rolled) // config.learner.updates
    reports: list[list[StepReport]] = []
    advantages: list[Advantages] = []
    for number in range(config.learner.updates):
        part = slice(number * share, (number + 1) * share)
        scored, worth = _scored(parts, rolled[part], scores[part])
        state, report = parts.learner.update(state, scored, old, first=number == 0)
        reports.append(report)
        advantages.append(worth)
    judged = summarize([entry for batch in scores for entry in batch])
    return state, {
        **{f"judge/{name}": value for name, value in judged.metrics().items()},
        **learner_metrics(reports),
        **_advantage_metrics(advantages),
        "learner/adapter_norm": float(optax.tree.norm(state.adapter.lora)),
        "learner/skipped_updates": int(state.skipped),
        "rollout/window_start": start,
        "rollout/staleness": 0,
    }


def window_start(config: GrpoConfig, epoch: int) -> int:
    """Where the stochastic window of an epoch starts, drawn from the seed."""
    choices = window_starts(config.rollout.window_range, config.rollout.window_size)
    return int(np.random.default_rng((config.seed, epoch)).choice(choices))


def _roll_out(parts: Parts, adapter: Adapter, start: int) -> Rolled:
    """Samples the next pictures of the stream and sends them to the judge."""
    step = next(parts.stream)
    bucket = step.bucket
    grid = LatentGrid(step.layers, bucket.height // PACKED_PIXELS, bucket.width // PACKED_PIXELS)
    pictures = Pictures(
        jnp.asarray(np.stack([e.picture for e in step.examples])),
        *parts.prompts(step.examples),
        _keys(parts.config.seed, step.step, step.examples),
    )
    candidates = parts.rollout(adapter, pictures, start, grid)
    layers = np.asarray(parts.rollout.decode(candidates.latents, grid))
    names = [f"{step.step}.{e.slot}.{e.picture_id}" for e in step.examples]
    return Rolled(step, candidates, grid, parts.judging.submit(step.examples, layers, names))


def _keys(seed: int, step: int, examples: Sequence[Example]) -> jax.Array:
    """One key per group, from its place in the run and nothing else."""
    here = jax.random.fold_in(jax.random.key(seed), step)
    slots = jnp.asarray([e.slot for e in examples])
    return jax.vmap(lambda slot: jax.random.fold_in(here, slot))(slots)


def _scored(
    parts: Parts, rolled: Sequence[Rolled], scores: Sequence[Sequence[GroupScores]]
) -> tuple[list[Scored], Advantages]:
    """The rollout batches of one update with advantages; weights sum to 1 over all of them."""
    settings = parts.config.advantage
    groups = [entry for batch in scores for entry in batch]
    worth = reward_advantages(
        np.stack([entry.reward for entry in groups]),
        np.stack([entry.valid for entry in groups]),
        scale=settings.scale,
        std_floor=settings.std_floor,
        two_stage=np.array([entry.two_stage for entry in groups]),
    )
    rows = np.cumsum([0, *map(len, scores)])
    return [
        Scored(
            batch.candidates,
            parts.rollout.sigmas(batch.grid),
            worth.advantage[low:high].ravel(),
            worth.weight[low:high].ravel(),
            batch.grid,
        )
        for batch, low, high in zip(rolled, rows, rows[1:], strict=False)
    ], worth


def _advantage_metrics(advantages: Sequence[Advantages]) -> dict[str, float]:
    return {
        "advantage/effective_groups": sum(a.effective_groups for a in advantages),
        "advantage/tied_groups": sum(a.tied_groups for a in advantages),
        "advantage/invalid_groups": sum(a.invalid_groups for a in advantages),
        "advantage/group_spread": float(np.mean([a.spread.mean() for a in advantages])),
    }


def _warn_of_sampler_gap(parts: Parts, state: LearnerState, before: Sequence[Evaluated]) -> None:
    """Logs what the rollout's sampler costs against the evaluation's, at the start."""
    batch = next(parts.evaluator.examples.batches(parts.config.evaluation.batch))
    chosen = {example.picture_id for example in batch}
    evaluated = float(np.mean([r.reward for r in before if r.example.picture_id in chosen]))
    rolled = parts.evaluator.rollout_score(parts.rollout, state.adapter)
    parts.writer.scalars(0, {"rollout/score": rolled, "rollout/score_gap": evaluated - rolled})
    log = _log.warning if evaluated - rolled > _GAP_WARNING * evaluated else _log.info
    log(
        "Stage-1 score of the rollout's sampler %.3f, of the evaluation's %.3f. A large gap means "
        "that candidates look unlike what is evaluated: more rollout steps or less noise help.",
        rolled,
        evaluated,
    )


def _save(parts: Parts, state: LearnerState, epoch: int, position: dict) -> None:
    parts.checkpoints.save(epoch, state, {"epoch": epoch, "stream": position})

"""The epoch loop: roll out, decode, judge, update; evaluate and checkpoint on schedule."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
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
from sl_jax.training.interruption import uninterrupted
from sl_jax.training.metrics import MetricsWriter

_log = logging.getLogger(__name__)

_GAP_WARNING = 0.1  # of the evaluation score
_REPLACEMENTS = 2  # of a picture that the judge refuses; the next one is left out of the epoch


class Parts(NamedTuple):
    """What a run is made of; the door builds them. `folder` is the work directory."""

    config: GrpoConfig
    folder: epath.Path
    stream: TrainStream
    prompts: PromptTable
    rollout: Rollout
    judging: Judging
    learner: Learner
    evaluator: Evaluator
    checkpoints: RunCheckpoints


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


def train(parts: Parts, adapter: Callable[[], Adapter]) -> Outcome:
    """Trains to the end of the run, from its beginning or from its newest checkpoint.

    Interrupted (Ctrl-C), it checkpoints the last complete epoch before the interruption goes on.

    Args:
        parts: of the run.
        adapter: makes the adapter to start from; called once, and nobody else holds the result.
    """
    config, evaluator = parts.config, parts.evaluator
    state, epoch = _begin(parts, adapter)
    with (
        closing(MetricsWriter(parts.folder, epoch + 1 if epoch else 0)) as writer,
        tqdm(total=config.epochs, initial=epoch, unit="epoch") as progress,
    ):
        phases = Phases(progress)
        phases.begin("evaluating")
        before, after = evaluator(state.initial), None
        if epoch == 0:
            writer.scalars(0, evaluation_metrics(before) | _sampler_gap(parts, state, before))
        phases.finish()
        position = parts.stream.state()
        try:
            while epoch < config.epochs:
                changed, metrics = run_epoch(parts, state, epoch, phases)
                done = epoch + 1
                if done % config.evaluation.every == 0 or done == config.epochs:
                    phases.begin("evaluating")
                    after = evaluator(changed.ema)
                    metrics |= evaluation_metrics(after)
                with uninterrupted():
                    writer.scalars(done, metrics | phases.finish())
                    # From here on the epoch counts as done; cut short before, it is repeated.
                    state, epoch, position = changed, done, parts.stream.state()
                    if epoch % config.checkpoint.every == 0 or epoch == config.epochs:
                        _save(parts, state, epoch, position)
                progress.update()
                progress.set_postfix(reward=f"{metrics['judge/reward_mean']:.3f}")
        except BaseException:
            with uninterrupted():
                if epoch > (parts.checkpoints.latest or 0):
                    _save(parts, state, epoch, position)
                parts.checkpoints.wait()
            raise
        parts.checkpoints.wait()
        return Outcome(state, before, evaluator(state.ema) if after is None else after)


def _begin(parts: Parts, adapter: Callable[[], Adapter]) -> tuple[LearnerState, int]:
    """The state to go on from, and how many epochs it has behind it; the stream is put there."""
    state = parts.learner.start(adapter())
    if parts.checkpoints.latest is None:
        return state, 0
    epoch, state, record = parts.checkpoints.restore(state)
    parts.stream.restore(record["stream"])
    _log.info("Going on after epoch %d.", epoch)
    return state, epoch


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
    rolled, judged = _judged(parts, rolled, state.adapter, start, phases)
    _record(parts, epoch + 1, rolled, judged)
    phases.begin("learning")
    old = state.adapter
    share = len(rolled) // config.learner.updates
    groups = share * config.rollout.batch_groups
    reports: list[list[StepReport]] = []
    advantages: list[Advantages] = []
    for number in range(config.learner.updates):
        part = rolled[number * share : (number + 1) * share]
        scored, worth = _scored(parts, part, judged[number * groups : (number + 1) * groups])
        state, report = parts.learner.update(state, scored, old, first=state.adapter is old)
        reports.append(report)
        advantages.append(worth)
    return state, {
        **{f"judge/{name}": value for name, value in summarize(judged).metrics().items()},
        **{f"pool/{name}": value for name, value in parts.judging.metrics().items()},
        "judge/quarantined": len(parts.stream.quarantined),
        **learner_metrics(reports),
        **_advantage_metrics(advantages),
        "learner/adapter_norm": float(optax.tree.norm(state.adapter.lora)),
        "learner/updates": int(state.updates),
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
    candidates, grid, layers = _sampled(parts, adapter, start, step)
    submitted = parts.judging.submit(step.examples, layers, _names(step.step, step.examples))
    return Rolled(step, candidates, grid, submitted)


def _sampled(
    parts: Parts, adapter: Adapter, start: int, step: StepPictures
) -> tuple[Candidates, LatentGrid, np.ndarray]:
    """Candidates of a step's pictures, and their layers: uint8 [groups · G, L, H, W, 4]."""
    bucket = step.bucket
    grid = LatentGrid(step.layers, bucket.height // PACKED_PIXELS, bucket.width // PACKED_PIXELS)
    pictures = Pictures(
        jnp.asarray(np.stack([e.picture for e in step.examples])),
        *parts.prompts(step.examples),
        _keys(parts.config.seed, step.step, step.examples),
    )
    candidates = parts.rollout(adapter, pictures, start, grid)
    return candidates, grid, np.asarray(parts.rollout.decode(candidates.latents, grid))


def _names(step: int, examples: Sequence[Example]) -> list[str]:
    return [f"{step}.{e.slot}.{e.picture_id}" for e in examples]


def _judged(
    parts: Parts, rolled: list[Rolled], adapter: Adapter, start: int, phases: Phases
) -> tuple[list[Rolled], list[GroupScores]]:
    """The epoch with its scores; pictures that the judge refuses give way to others."""
    judged = parts.judging.collect([s for batch in rolled for s in batch.submitted], phases.say)
    for left in reversed(range(_REPLACEMENTS + 1)):
        refused = refusals(judged, [e for b in rolled for e in b.pictures.examples])
        if not refused:
            break
        parts.stream.quarantine(refused)
        if left:
            phases.begin("rollout")
            rolled = [_replaced(parts, batch, refused, adapter, start) for batch in rolled]
            phases.begin("judging")
            judged = _judged_again(parts, rolled, judged, phases)
    return rolled, judged


def _replaced(
    parts: Parts, batch: Rolled, refused: Mapping[str, str], adapter: Adapter, start: int
) -> Rolled:
    """The batch with other pictures for the refused ones, at the judge.

    All is rolled out again, in the compiled program; keys depend on the slot alone, so that the
    candidates of the other pictures are those that were judged.
    """
    places = [i for i, e in enumerate(batch.pictures.examples) if e.picture_id in refused]
    if not places:
        return batch
    examples = [
        parts.stream.replace(e, refused[e.picture_id]) if e.picture_id in refused else e
        for e in batch.pictures.examples
    ]
    step = dataclasses.replace(batch.pictures, examples=tuple(examples))
    candidates, grid, layers = _sampled(parts, adapter, start, step)
    chosen = [examples[i] for i in places]
    theirs = layers.reshape(len(examples), -1, *layers.shape[1:])[places]
    submitted = list(batch.submitted)
    fresh = parts.judging.submit(
        chosen, theirs.reshape(-1, *layers.shape[1:]), _names(step.step, chosen)
    )
    for place, entry in zip(places, fresh, strict=True):
        submitted[place] = entry
    return Rolled(step, candidates, grid, submitted)


def _judged_again(
    parts: Parts, rolled: Sequence[Rolled], judged: Sequence[GroupScores], phases: Phases
) -> list[GroupScores]:
    """The scores with those of replaced groups in place of the refusals."""
    submitted = [s for batch in rolled for s in batch.submitted]
    changed = [i for i, scores in enumerate(judged) if scores.refusal is not None]
    others = [scores for scores in judged if scores.refusal is None]
    fresh = parts.judging.collect([submitted[i] for i in changed], phases.say, others)
    found = list(judged)
    for i, scores in zip(changed, fresh, strict=True):
        found[i] = scores
    return found


def _record(
    parts: Parts, epoch: int, rolled: Sequence[Rolled], judged: Sequence[GroupScores]
) -> None:
    parts.judging.record(
        epoch,
        [s for batch in rolled for s in batch.submitted],
        judged,
        [e.picture_id for batch in rolled for e in batch.pictures.examples],
    )


def _keys(seed: int, step: int, examples: Sequence[Example]) -> jax.Array:
    """One key per group, from its place in the run and nothing else."""
    here = jax.random.fold_in(jax.random.key(seed), step)
    slots = jnp.asarray([e.slot for e in examples])
    return jax.vmap(lambda slot: jax.random.fold_in(here, slot))(slots)


def _scored(
    parts: Parts, rolled: Sequence[Rolled], scores: Sequence[GroupScores]
) -> tuple[list[Scored], Advantages]:
    """The rollout batches of one update with advantages; weights sum to 1 over all of them."""
    settings = parts.config.advantage
    worth = reward_advantages(
        np.stack([entry.reward for entry in scores]),
        np.stack([entry.valid for entry in scores]),
        scale=settings.scale,
        std_floor=settings.std_floor,
        two_stage=np.array([entry.two_stage for entry in scores]),
    )
    size = parts.config.rollout.batch_groups
    return [
        Scored(
            batch.candidates,
            parts.rollout.sigmas(batch.grid),
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


def _mean_reward(results: Sequence[Evaluated]) -> float:
    known = [r.reward for r in results if np.isfinite(r.reward)]
    return float(np.mean(known)) if known else np.nan


def _save(parts: Parts, state: LearnerState, epoch: int, position: dict) -> None:
    parts.checkpoints.save(epoch, state, {"epoch": epoch, "stream": position})

"""The epoch loop: roll out, decode, judge, update; evaluate and checkpoint on schedule.

All processes of a run go through it in step. Each reads and judges whole groups of its own, those
whose candidates are on its devices; scores are told to all, so that all compute with the same.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jaxtyping import Bool
from tqdm import tqdm

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.data import Example, FolderError, StepPictures, TrainStream
from sl_jax.flow.sampler import window_starts
from sl_jax.grpo.advantages import Advantages
from sl_jax.grpo.batches import group_keys, laid_out, rows_here
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluated, Evaluator, evaluation_metrics, strip
from sl_jax.grpo.judging import Judging, Submitted, judged_advantages, refusals
from sl_jax.grpo.learner import Learner, LearnerState, Scored, UpdateReport
from sl_jax.grpo.metrics import (
    learner_metrics,
    warn_of_divergence,
    warn_of_mismatch,
    warn_of_spoiled,
)
from sl_jax.grpo.phases import Phases
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Candidates, Rollout
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.parallel.mesh import Layout
from sl_jax.parallel.peaks import memory_use, peak_flops
from sl_jax.parallel.processes import ProcessError, Processes, to_local
from sl_jax.scoring import Group, GroupScores, summarize
from sl_jax.training.interruption import uninterrupted
from sl_jax.training.metrics import MetricsWriter, read_metrics
from sl_jax.training.profiling import Profiler

_log = logging.getLogger(__name__)

# One program: tensor by tensor, processes may meet at different ones and wait for ever.
_norm = jax.jit(optax.tree.norm)

_GAP_WARNING = 0.1  # of the evaluation score
_REPLACEMENTS = 2  # of a picture that the judge refuses; the next one is left out of the epoch


class Parts(NamedTuple):
    """What a run is made of; the door builds them.

    Attributes:
        folder: the work directory, which all processes share.
        layout: how batches are split over devices.
        processes: of the run.
        profiler: traces the epochs that it was told of.
    """

    config: GrpoConfig
    folder: epath.Path
    stream: TrainStream
    prompts: PromptTable
    rollout: Rollout
    judging: Judging
    learner: Learner
    evaluator: Evaluator
    checkpoints: RunCheckpoints
    layout: Layout
    processes: Processes
    profiler: Profiler


class Rolled(NamedTuple):
    """A rollout batch whose groups are at the judge.

    Attributes:
        pictures: those that this process holds.
        told: picture id and caption of every row, all processes' together.
        candidates: of all rows.
        grid: static shape.
        finite: [groups, G], of which candidates there is anything to judge and to learn from.
        submitted: groups that this process judges, by row.
    """

    pictures: StepPictures
    told: list[tuple[str, str]]
    candidates: Candidates
    grid: LatentGrid
    finite: Bool[np.ndarray, "groups candidates"]
    submitted: dict[int, Submitted]


class _Learned(NamedTuple):
    """What one update learned from.

    Attributes:
        judged: scores of every group, in the order of `rolled`'s rows.
        finite: [groups, G], see `Rolled`.
    """

    rolled: list[Rolled]
    judged: list[GroupScores]
    finite: Bool[np.ndarray, "groups candidates"]
    advantages: Advantages
    report: UpdateReport


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

    Interrupted (Ctrl-C), it checkpoints the last complete epoch before the interruption goes on.

    Args:
        parts: of the run.
        adapter: makes the adapter to start from; called once, and nobody else holds the result.
    """
    config, evaluator, processes = parts.config, parts.evaluator, parts.processes
    state, epoch = _begin(parts, adapter)
    with ExitStack() as stack:
        writer = stack.enter_context(closing(_Books(parts, epoch)))
        progress = stack.enter_context(
            tqdm(total=config.epochs, initial=epoch, unit="epoch", disable=not processes.is_main)
        )
        stack.callback(parts.profiler.close)
        phases = Phases(progress, peak_flops(jax.devices()))
        phases.begin("evaluating")
        before = after = None
        if epoch == 0:
            before = evaluator(state.initial)
            writer.scalars(0, evaluation_metrics(before) | _sampler_gap(parts, state, before))
            writer.pictures(0, before)
        phases.finish()
        position = parts.stream.state()
        try:
            while epoch < config.epochs:
                parts.profiler.at(epoch)
                changed, metrics = run_epoch(parts, state, epoch, phases)
                done = epoch + 1
                scheduled = done % config.evaluation.every == 0 or done == config.epochs
                if scheduled:
                    phases.begin("evaluating")
                    after = evaluator(changed.ema)
                    metrics |= evaluation_metrics(after)
                metrics |= _memory()
                with uninterrupted():
                    writer.scalars(done, metrics | phases.finish())
                    # From here on the epoch counts as done; cut short before, it is repeated.
                    state, epoch, position = changed, done, parts.stream.state()
                    if epoch % config.checkpoint.every == 0 or epoch == config.epochs:
                        phases.begin("checkpointing")  # in the next epoch's sums
                        _save(parts, state, epoch, position)
                if scheduled:
                    writer.look_for_divergence()
                progress.update()
                progress.set_postfix(reward=f"{metrics['judge/reward_mean']:.3f}")
        except BaseException as error:
            with uninterrupted():
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
    """The metrics of a run, written by its main process alone."""

    def __init__(self, parts: Parts, epoch: int):
        self._processes = parts.processes
        self._folder, self._shown = parts.folder, parts.config.evaluation.shown
        self._findings: set[str] = set()
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

    def look_for_divergence(self) -> None:
        """Says once of each independent measure that it falls while the reward rises."""
        with self._processes.together("reading metrics"):
            if self._writer:
                warn_of_divergence(list(read_metrics(self._folder)), self._findings)

    def close(self) -> None:
        """As `MetricsWriter`."""
        if self._writer:
            self._writer.close()


def _begin(parts: Parts, adapter: Callable[[], Adapter]) -> tuple[LearnerState, int]:
    """The state to go on from, and how many epochs it has behind it; the stream is put there."""
    state = parts.learner.start(adapter())
    latest = parts.checkpoints.latest
    epochs = parts.processes.all_gather("finding checkpoints", latest)
    if set(epochs) != {latest}:
        raise ProcessError(
            f"processes see different newest checkpoints ({epochs}) in {parts.folder}; please let "
            "the shared drive settle, and start again"
        )
    if latest is None:
        return state, 0
    epoch, state, record = parts.checkpoints.restore(state)
    parts.stream.restore(record["stream"])
    _log.info("Going on after epoch %d.", epoch)
    return state, epoch


def run_epoch(
    parts: Parts, state: LearnerState, epoch: int, phases: Phases
) -> tuple[LearnerState, dict[str, float]]:
    """One epoch: the state after its updates, and its metrics. The given state stays valid."""
    config, begun = parts.config, state.adapter
    start = window_start(config, epoch)
    rolled = []
    for _ in range(config.rollout.groups // config.rollout.batch_groups):
        rolled.append(_roll_out(parts, begun, start, phases))
    share = len(rolled) // config.learner.updates
    done: list[_Learned] = []
    for number in range(config.learner.updates):
        phases.begin("judging")
        part = rolled[number * share : (number + 1) * share]
        part, judged, finite = _judged(parts, part, begun, start, phases)
        phases.begin("learning")  # while the groups of later updates are judged
        scored, worth = _scored(parts, part, judged)
        old = None if state.adapter is begun else begun
        kl_left = config.objective.kl_left(epoch)
        state, report = parts.learner.update(state, scored, old, kl_left)
        done.append(_Learned(part, judged, finite, worth, report))
        jax.block_until_ready(state.updates)
        phases.computed(parts.learner.flops(scored, old))
    phases.begin("recording")
    judged = [scores for entry in done for scores in entry.judged]
    finite = np.concatenate([entry.finite for entry in done])
    _record(parts, epoch + 1, [batch for entry in done for batch in entry.rolled], judged)
    learned = learner_metrics([entry.report for entry in done])
    if parts.processes.is_main:
        warn_of_mismatch(learned, config.objective)
        warn_of_spoiled(finite)
    return state, {
        **{f"judge/{name}": value for name, value in summarize(judged).metrics().items()},
        **{f"pool/{name}": value for name, value in parts.judging.metrics().items()},
        "judge/quarantined": len(parts.stream.quarantined),
        **learned,
        **_advantage_metrics([entry.advantages for entry in done]),
        "learner/adapter_norm": float(_norm(state.adapter.lora)),
        "learner/updates": int(state.updates),
        "learner/skipped_updates": int(state.skipped),
        "rollout/not_finite": int((~finite).sum()),
        "rollout/window_start": start,
        "rollout/staleness": 0,
    }


def window_start(config: GrpoConfig, epoch: int) -> int:
    """Where the stochastic window of an epoch, counted from 0, starts."""
    rollout = config.rollout
    choices = window_starts(rollout.window_range, rollout.window_size)
    if rollout.window_order == "sliding":
        return choices[min(epoch // rollout.window_epochs, len(choices) - 1)]
    return int(np.random.default_rng((config.seed, epoch)).choice(choices))


def _memory() -> dict[str, float]:
    """Of this process's devices."""
    used = memory_use(jax.local_devices())
    return {f"device/{name}": value for name, value in used.items()}


def _roll_out(parts: Parts, adapter: Adapter, start: int, phases: Phases) -> Rolled:
    """Samples the next pictures of the stream and sends them to the judge."""
    phases.begin("rollout")
    with parts.processes.together("reading pictures"):
        step = next(parts.stream)
    candidates, grid, finite, layers = _sampled(parts, adapter, start, step, phases)
    phases.begin("encoding")
    submitted = _submitted(parts, step, layers)
    return Rolled(step, _told(parts, step.examples), candidates, grid, finite, submitted)


def _sampled(
    parts: Parts, adapter: Adapter, start: int, step: StepPictures, phases: Phases
) -> tuple[Candidates, LatentGrid, np.ndarray, np.ndarray]:
    """Candidates of a step's pictures, which are finite, and the layers that this process holds.

    The layers are uint8 [groups, G, L, H, W, 4].
    """
    bucket = step.bucket
    grid = LatentGrid(step.layers, bucket.height // PACKED_PIXELS, bucket.width // PACKED_PIXELS)
    pictures = laid_out(
        parts.layout,
        step.examples,
        parts.prompts,
        _keys(parts.config.seed, step.step, step.examples),
        parts.config.rollout.batch_groups,
    )
    candidates = parts.rollout(adapter, pictures, start, grid)
    jax.block_until_ready(candidates.latents)
    phases.computed(parts.rollout.flops(candidates, start, grid))
    phases.begin("decoding")
    decoded = parts.rollout.decode(candidates.latents, grid)
    finite = np.asarray(candidates.finite) & np.asarray(decoded.finite)
    layers = to_local(decoded.layers)
    return (
        candidates,
        grid,
        finite.reshape(parts.config.rollout.batch_groups, -1),
        layers.reshape(len(step.examples), -1, *layers.shape[1:]),
    )


def _submitted(
    parts: Parts, step: StepPictures, layers: np.ndarray, rows: Sequence[int] | None = None
) -> dict[int, Submitted]:
    """Sends the groups that this process judges to the judge; of `rows` alone if they are given."""
    judged = rows_here(parts.config, parts.layout, parts.processes).judged
    chosen = [
        (example, stack)
        for example, stack in zip(step.examples, layers, strict=True)
        if example.slot in judged and (rows is None or example.slot in rows)
    ]
    return {
        example.slot: parts.judging.submit(
            [example], stack, [f"{step.step}.{example.slot}.{example.picture_id}"]
        )[0]
        for example, stack in chosen
    }


def _told(parts: Parts, examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Picture id and caption of every row of a batch.

    Raises:
        FolderError: processes that hold the same row could not read the same picture.
    """
    told = parts.processes.all_gather(
        "naming pictures", [[e.slot, e.picture_id, e.caption] for e in examples]
    )
    found: dict[int, tuple[str, str]] = {}
    for process, part in enumerate(told):
        for slot, picture_id, caption in part:
            if found.setdefault(slot, (picture_id, caption)) != (picture_id, caption):
                raise FolderError(
                    f"process {process} reads {picture_id} where another reads {found[slot][0]}: "
                    "one of them cannot open its file; please look at the folder and resume"
                )
    return [found[slot] for slot in sorted(found)]


def _judged(
    parts: Parts, rolled: list[Rolled], adapter: Adapter, start: int, phases: Phases
) -> tuple[list[Rolled], list[GroupScores], Bool[np.ndarray, "groups candidates"]]:
    """Batches with everyone's scores of their groups, and which candidates are finite.

    Pictures that the judge refuses give way to others.
    """
    own = [entry for batch in rolled for entry in batch.submitted.values()]
    scores = parts.judging.collect(own, phases.say)
    judged = _in_order(parts.judging.share(_places(parts, rolled), scores))
    for left in reversed(range(_REPLACEMENTS + 1)):
        refused = refusals(judged, [name for b in rolled for name, _ in b.told])
        if not refused:
            break
        parts.stream.quarantine(refused)
        if left:
            rolled = [_replaced(parts, batch, refused, adapter, start, phases) for batch in rolled]
            phases.begin("judging")
            judged = _judged_again(parts, rolled, judged, phases)
    finite = np.concatenate([batch.finite for batch in rolled])
    return rolled, [_only_finite(*entry) for entry in zip(judged, finite, strict=True)], finite


def _places(parts: Parts, rolled: Sequence[Rolled]) -> list[int]:
    """Which of the groups this process judges."""
    size = parts.config.rollout.batch_groups
    return [number * size + row for number, batch in enumerate(rolled) for row in batch.submitted]


def _in_order(scores: Mapping[int, GroupScores]) -> list[GroupScores]:
    return [scores[place] for place in sorted(scores)]


def _replaced(
    parts: Parts,
    batch: Rolled,
    refused: Mapping[str, str],
    adapter: Adapter,
    start: int,
    phases: Phases,
) -> Rolled:
    """The batch with other pictures for the refused ones, at the judge.

    All is rolled out again, in the compiled program; keys depend on the slot alone, so that the
    candidates of the other pictures are those that were judged.
    """
    rows = [row for row, (picture_id, _) in enumerate(batch.told) if picture_id in refused]
    if not rows:
        return batch
    with parts.processes.together("reading other pictures"):
        examples = tuple(
            parts.stream.replace(e, refused[e.picture_id]) if e.picture_id in refused else e
            for e in batch.pictures.examples
        )
    step = dataclasses.replace(batch.pictures, examples=examples)
    phases.begin("rollout")
    candidates, grid, finite, layers = _sampled(parts, adapter, start, step, phases)
    phases.begin("encoding")
    submitted = batch.submitted | _submitted(parts, step, layers, rows)
    return Rolled(step, _told(parts, examples), candidates, grid, finite, submitted)


def _judged_again(
    parts: Parts, rolled: Sequence[Rolled], judged: Sequence[GroupScores], phases: Phases
) -> list[GroupScores]:
    """The scores with those of replaced groups in place of the refusals."""
    places = _places(parts, rolled)
    submitted = [entry for batch in rolled for entry in batch.submitted.values()]
    mine = dict(zip(places, submitted, strict=True))
    changed = [place for place in places if judged[place].refusal is not None]
    others = [judged[place] for place in places if judged[place].refusal is None]
    fresh = parts.judging.collect([mine[place] for place in changed], phases.say, others)
    return _in_order(dict(enumerate(judged)) | parts.judging.share(changed, fresh))


def _only_finite(scores: GroupScores, finite: Bool[np.ndarray, " g"]) -> GroupScores:
    """The scores without those of candidates that were not finite, whatever the judge saw there."""
    return dataclasses.replace(
        scores, valid=scores.valid & finite, reward=np.where(finite, scores.reward, np.nan)
    )


def _record(
    parts: Parts, epoch: int, rolled: Sequence[Rolled], judged: Sequence[GroupScores]
) -> None:
    size = parts.config.rollout.batch_groups
    groups: list[Group | None] = [
        batch.submitted[row].group if row in batch.submitted else None
        for batch in rolled
        for row in range(size)
    ]
    told = [entry for batch in rolled for entry in batch.told]
    with parts.processes.together("writing records"):
        parts.judging.record(epoch, groups, judged, told)


def _keys(seed: int, step: int, examples: Sequence[Example]) -> np.ndarray:
    """Data of one key per group, from its place in the run and nothing else."""
    return group_keys(jax.random.fold_in(jax.random.key(seed), step), [e.slot for e in examples])


def _scored(
    parts: Parts, rolled: Sequence[Rolled], scores: Sequence[GroupScores]
) -> tuple[list[Scored], Advantages]:
    """The rollout batches of one update with advantages; weights sum to 1 over all of them."""
    worth = judged_advantages(scores, parts.config.advantage, parts.config.judge)
    size = parts.config.rollout.batch_groups
    return [
        Scored(
            batch.candidates,
            parts.rollout.table(batch.grid),
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

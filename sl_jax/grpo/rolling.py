"""Rollout batches on their way: pictures drawn, candidates sampled, sent to the judge, and scored.

Each process reads and judges whole groups of its own, those whose candidates are on its devices;
scores are told to all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, UInt32

from sl_jax.data import Example, FolderError, StepPictures
from sl_jax.grpo.batches import group_keys, laid_out, rows_here
from sl_jax.grpo.judging import Submitted, refusals
from sl_jax.grpo.parts import Parts
from sl_jax.grpo.phases import Phases
from sl_jax.grpo.rollout import Candidates
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.processes import to_local
from sl_jax.scoring import Group, GroupScores

_REPLACEMENTS = 2  # of a picture that the judge refuses; the next one is left out of the epoch


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


def roll_out(parts: Parts, adapter: Adapter, start: int, phases: Phases) -> Rolled:
    """Samples the next pictures of the stream and sends them to the judge."""
    phases.begin("rollout")
    with parts.processes.together("reading pictures"):
        step = next(parts.stream)
    candidates, grid, finite, layers = _sampled(parts, adapter, start, step, phases)
    phases.begin("encoding")
    submitted = _submitted(parts, step, layers)
    return Rolled(step, _told(parts, step.examples), candidates, grid, finite, submitted)


def await_scores(
    parts: Parts, rolled: list[Rolled], adapter: Adapter, start: int, phases: Phases
) -> tuple[list[Rolled], list[GroupScores], Bool[np.ndarray, "groups candidates"]]:
    """Batches with everyone's scores of their groups, and which candidates are finite.

    Pictures that the judge refuses give way to others.
    """
    own = [entry for batch in rolled for entry in batch.submitted.values()]
    scores = parts.judging.collect(own, phases.wait)
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


def record(
    parts: Parts, epoch: int, rolled: Sequence[Rolled], judged: Sequence[GroupScores]
) -> None:
    """Writes down what the judge said in an epoch, counted from 1."""
    size = parts.config.rollout.batch_groups
    groups: list[Group | None] = [
        batch.submitted[row].group if row in batch.submitted else None
        for batch in rolled
        for row in range(size)
    ]
    told = [entry for batch in rolled for entry in batch.told]
    with parts.processes.together("writing records"):
        parts.judging.record(epoch, groups, judged, told)


def rollout_keys(
    seed: int, step: int, examples: Sequence[Example]
) -> UInt32[np.ndarray, "n words"]:
    """Data of one key per group, from its place in the run and nothing else."""
    return group_keys(jax.random.fold_in(jax.random.key(seed), step), [e.slot for e in examples])


def _sampled(
    parts: Parts, adapter: Adapter, start: int, step: StepPictures, phases: Phases
) -> tuple[Candidates, LatentGrid, np.ndarray, np.ndarray]:
    """Candidates of a step's pictures, which are finite, and the layers that this process holds.

    The layers are uint8 [groups, G, L, H, W, 4].
    """
    grid = LatentGrid.of_pixels(step.layers, *step.bucket)
    pictures = laid_out(
        parts.layout,
        step.examples,
        parts.prompts,
        rollout_keys(parts.config.seed, step.step, step.examples),
        parts.config.rollout.batch_groups,
    )
    candidates = parts.rollout(adapter, pictures, start, grid)
    jax.block_until_ready(candidates.latents)
    parts.processes.barrier("decoding")  # where signals come
    phases.computed(parts.rollout.work(candidates, start, grid))
    phases.begin("decoding")
    decoded = jax.block_until_ready(parts.rollout.decode(candidates.latents, grid))
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
    fresh = parts.judging.collect([mine[place] for place in changed], phases.wait, others)
    return _in_order(dict(enumerate(judged)) | parts.judging.share(changed, fresh))


def _only_finite(scores: GroupScores, finite: Bool[np.ndarray, " g"]) -> GroupScores:
    """The scores without those of candidates that were not finite, whatever the judge saw there."""
    return dataclasses.replace(
        scores, valid=scores.valid & finite, reward=np.where(finite, scores.reward, np.nan)
    )

"""Evaluation on held-out pictures: fixed pictures, fixed noise, the averaged adapter, stage 1.

Every process reads and judges the rows of a batch that its devices decompose; then all know the
scores of all, and the main process has the layers that the report shows.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt32

from sl_jax import imaging
from sl_jax.data import EvalSet, Example, FolderError
from sl_jax.data.loader import EvalBatch
from sl_jax.eval.bootstrap import interval
from sl_jax.eval.reference_free import ReferenceFree, reference_free
from sl_jax.flow.sampler import evaluations
from sl_jax.grpo.batches import group_keys, laid_out
from sl_jax.grpo.config import EvaluationConfig
from sl_jax.grpo.judging import Judging, Submitted
from sl_jax.grpo.phases import Work
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Pictures, Rollout, sampling_work
from sl_jax.grpo.spread import window_share
from sl_jax.inference.decomposer import Decomposer
from sl_jax.inference.sampling import Decoded, Guidance
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, batch_sharding, replicated
from sl_jax.parallel.processes import BatchRows, batch_rows, to_local
from sl_jax.scoring import CRITERIA, GroupScores

_log = logging.getLogger(__name__)


class Evaluated(NamedTuple):
    """One held-out picture, decomposed and judged.

    Attributes:
        example: the picture; without pixels where `layers` is None.
        layers: uint8 [L, H, W, 4]; None in a process that neither judged nor shows them.
        reward: stage-1 score, 0 to 1; nan if the judge gave none, or the layers are not finite,
            of which criteria and measures are then nan as well.
        criteria: [5], 0 to 1.
        measures: of the layers and the picture alone.
    """

    example: Example
    layers: UInt8[np.ndarray, "l h w 4"] | None
    reward: float
    criteria: Float[np.ndarray, " 5"]
    measures: ReferenceFree


Computed = Callable[[Work], None]


class _Pending(NamedTuple):
    """A decomposition on its way to the judge and back."""

    example: Example
    layers: UInt8[np.ndarray, "l h w 4"]
    finite: Bool[np.ndarray, " g"]
    submitted: Submitted


def _untold(_: Work) -> None:
    """For whom nobody counts the work."""


@dataclass(frozen=True)
class Evaluator:
    """Samples and judges the held-out set; `computed` is told what each batch asked for.

    Attributes:
        judging: by stage 1 alone, which is a level; stage 2 is relative.
        shift: μ of the σ grid, as in the rollout.
        layout: how batches are split over devices.
        guidance: as in the rollout.
    """

    decomposer: Decomposer
    examples: EvalSet
    prompts: PromptTable
    judging: Judging
    config: EvaluationConfig
    shift: float | None
    layout: Layout
    guidance: Guidance | None = None

    def __call__(self, adapter: Adapter, computed: Computed = _untold) -> list[Evaluated]:
        """Every held-out picture that all processes concerned can read, by the evaluation sampler.

        Raises:
            FolderError: none of them can be read any more.
            JudgeUnavailableError: they were not judged within `max_wait`.
        """
        rows = self._rows(self.config.batch)
        pending = []
        for batch in self.examples.batches(self.config.batch, rows.held):
            layers, finite = self._sampled(batch, adapter, computed)
            stacks = (layers[:, None], rows.judged, finite[:, None])
            pending += self._submitted(batch, *stacks)
        results = self._finished(pending)
        if not results:
            raise FolderError(f"no held-out picture can be read any more: {self.examples.failures}")
        return self._with_shown(results)

    def rolled_out(
        self,
        rollout: Rollout,
        adapter: Adapter,
        window_start: int,
        groups: int,
        computed: Computed = _untold,
    ) -> list[Evaluated]:
        """One rollout candidate of each picture of the first batch of at most `groups`.

        Beside the scores of the evaluation sampler on the same pictures, theirs show what fewer
        steps and noise cost: candidates far below what is evaluated teach little about it.
        Those that are not finite have no reward.
        """
        rows = self._rows(groups)
        batch = next(self.examples.batches(groups, rows.held))
        keys = self._keys(batch)
        candidates = (rollout, adapter, window_start, groups, batch, keys, computed)
        layers, finite = self._candidates(*candidates)
        return self._finished(self._submitted(batch, layers[:, :1], rows.judged, finite))

    def window_share(
        self,
        rollout: Rollout,
        adapter: Adapter,
        window_start: int,
        groups: int,
        computed: Computed = _untold,
    ) -> float:
        """The share of the scores' variance within a group that the window's noise explains.

        Of two groups with initial noises of their own, for each picture of the first batch of at
        most `groups`, without pictures of which one is not finite; see `grpo.spread`.
        """
        rows, shared = self._rows(groups), rollout.with_shared_noise
        draws = self.config.spread_draws
        batch = next(self.examples.batches(groups, rows.held))
        pending = []
        for draw in range(draws):
            keys = self._keys(batch, 1 + draw)
            candidates = (shared, adapter, window_start, groups, batch, keys, computed)
            layers, finite = self._candidates(*candidates)
            pending.append(self._submitted(batch, layers, rows.judged, finite))
        entries = [entry for draw in pending for entry in draw]
        scores = [
            replace(found, stage1=np.where(entry.finite, found.stage1, np.nan))
            for entry, found in zip(
                entries, self.judging.collect([entry.submitted for entry in entries]), strict=True
            )
        ]
        slots = [entry.example.slot for entry in pending[0]]
        places = [draws * slot + draw for draw in range(draws) for slot in slots]
        told = self.judging.share(places, scores)
        stage1 = [told[place].stage1 for place in sorted(told)]
        return window_share(np.reshape(stage1, (-1, draws, rollout.group_size)))

    def _candidates(
        self,
        rollout: Rollout,
        adapter: Adapter,
        window_start: int,
        groups: int,
        batch: EvalBatch,
        keys: UInt32[np.ndarray, "n words"],
        computed: Computed,
    ) -> tuple[UInt8[np.ndarray, "n g l h w 4"], Bool[np.ndarray, "n g"]]:
        """Of the rows that this process holds, layers and which candidates are finite."""
        grid = LatentGrid.of_pixels(batch.layers, *batch.bucket)
        pictures = laid_out(self.layout, batch.examples, self.prompts, keys, groups)
        candidates = rollout(adapter, pictures, window_start, grid)
        computed(rollout.work(candidates, window_start, grid))
        decoded = jax.block_until_ready(rollout.decode(candidates.latents, grid))
        finite = np.asarray(candidates.finite) & np.asarray(decoded.finite)
        finite = finite.reshape(groups, -1)[list(batch.rows)]
        layers = to_local(decoded.layers)
        return layers.reshape(*finite.shape, *layers.shape[1:]), finite

    def _rows(self, size: int) -> BatchRows:
        return batch_rows(self.layout.mesh, size, self.judging.processes.index)

    def _sampled(
        self, batch: EvalBatch, adapter: Adapter, computed: Computed
    ) -> tuple[UInt8[np.ndarray, "n l h w 4"], Bool[np.ndarray, " n"]]:
        """Of the rows that this process holds, layers and which are finite."""
        pictures = laid_out(
            self.layout, batch.examples, self.prompts, self._keys(batch), self.config.batch
        )
        decoded = self.decomposer(
            pictures.pixels,
            pictures.text,
            pictures.text_lengths,
            pictures.keys,
            layers=batch.layers,
            steps=self.config.steps,
            method=self.config.method,
            shift=self.shift,
            adapter=adapter,
            guidance=self.guidance,
        )
        computed(self._work(pictures, LatentGrid.of_pixels(batch.layers, *batch.bucket)))
        layers, finite = self._split_by_rows(decoded)
        return to_local(layers), np.asarray(finite)[list(batch.rows)]

    def _work(self, pictures: Pictures, grid: LatentGrid) -> Work:
        """What decomposing a batch asks of the transformer."""
        rows, text_tokens = pictures.text.shape[:2]
        steps = sum(evaluations(self.config.steps, 0, 0, self.config.method))
        velocities = rows * steps * (1 if self.guidance is None else 2)
        work = sampling_work(self.decomposer.transformer, velocities, grid, text_tokens)
        return work._replace(candidates=rows)

    @cached_property
    def _split_by_rows(self) -> Any:
        mesh = self.layout.mesh
        return jax.jit(lambda x: x, out_shardings=Decoded(batch_sharding(mesh), replicated(mesh)))

    def _keys(self, batch: EvalBatch, draw: int = 0) -> UInt32[np.ndarray, "n words"]:
        root = jax.random.key(self.config.seed)
        root = jax.random.fold_in(root, draw) if draw else root
        return group_keys(root, [e.slot for e in batch.examples])

    def _submitted(
        self,
        batch: EvalBatch,
        stacks: UInt8[np.ndarray, "n g l h w 4"],
        judged: Sequence[int],
        finite: Bool[np.ndarray, "n g"],
    ) -> list[_Pending]:
        """Sends to the judge what this process judges, if all that hold it could read it.

        What waits has the layers of each picture's first candidate.
        """
        unread = self.judging.processes.all_gather(
            "reading held-out pictures",
            [r for r, e in zip(batch.rows, batch.examples, strict=True) if e.is_blank],
        )
        blank = {row for part in unread for row in part}
        places = [
            place for place, row in enumerate(batch.rows) if row in judged and row not in blank
        ]
        examples, chosen = [batch.examples[place] for place in places], stacks[places]
        names = [e.picture_id for e in examples]
        submitted = self.judging.submit(examples, chosen.reshape(-1, *stacks.shape[2:]), names)
        waiting = zip(examples, chosen[:, 0], finite[places], submitted, strict=True)
        return [_Pending(*entry) for entry in waiting]

    def _finished(self, pending: Sequence[_Pending]) -> list[Evaluated]:
        """Everyone's results in order; layers of this process's own."""
        scores = self.judging.collect([entry.submitted for entry in pending])
        own = {e.example.slot: _evaluated(e, s) for e, s in zip(pending, scores, strict=True)}
        told = self.judging.processes.all_gather(
            "sharing evaluations",
            [[s, r.reward, r.criteria, list(astuple(r.measures))] for s, r in own.items()],
        )
        results = [
            own.get(slot)
            or Evaluated(self._named(slot), None, reward, criteria, ReferenceFree(*measures))
            for part in told
            for slot, reward, criteria, measures in part
        ]
        return sorted(results, key=lambda r: r.example.slot)

    def _with_shown(self, results: Sequence[Evaluated]) -> list[Evaluated]:
        """The results; in the main process those that a report shows have their layers."""
        processes, shown = self.judging.processes, results[: self.config.shown]
        sent = [
            [r.example.slot, r.example.picture, r.layers]
            for r in shown
            if r.layers is not None and not processes.is_main
        ]
        told = processes.to_main("sending what the report shows", sent)
        found = {slot: (picture, layers) for part in told for slot, picture, layers in part}
        return [
            self._shown(r, *found[r.example.slot]) if r.example.slot in found else r
            for r in results
        ]

    def _shown(self, result: Evaluated, picture: np.ndarray, layers: np.ndarray) -> Evaluated:
        return result._replace(example=self._named(result.example.slot, picture), layers=layers)

    def _named(self, slot: int, picture: np.ndarray | None = None) -> Example:
        """A picture of another process."""
        record = self.examples.records[slot]
        pixels = np.zeros((0, 0, 3), np.uint8) if picture is None else picture
        layers = self.examples.layers_of(record)
        return Example(
            *(pixels, record.caption, record.path, record.picture_id, layers, record.bucket),
            step=0,
            slot=slot,
        )


def _evaluated(entry: _Pending, scores: GroupScores) -> Evaluated:
    example, layers = entry.example, entry.layers
    if not entry.finite[0]:  # What the judge was shown is black, and not what was sampled.
        _log.warning("The layers of held-out picture %s are not finite.", example.picture_id)
        nothing = ReferenceFree(*[np.nan] * len(fields(ReferenceFree)))
        return Evaluated(example, layers, np.nan, np.full(len(CRITERIA), np.nan), nothing)
    measures = reference_free(layers, example.picture)
    return Evaluated(example, layers, float(scores.stage1[0]), scores.criteria[0], measures)


def evaluation_metrics(results: Sequence[Evaluated]) -> dict[str, float]:
    """Means over the pictures that have a value, with the bootstrap interval of the reward."""
    reward = interval([r.reward for r in results])
    return {
        "evaluation/reward": reward.mean,
        "evaluation/reward_low": reward.low,
        "evaluation/reward_high": reward.high,
        **{
            f"evaluation/{name}": _mean([r.criteria[k] for r in results])
            for k, name in enumerate(CRITERIA)
        },
        **{
            f"evaluation/{field.name}": _mean([getattr(r.measures, field.name) for r in results])
            for field in fields(ReferenceFree)
        },
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def strip(result: Evaluated) -> UInt8[np.ndarray, "height width 3"]:
    """Source, recomposition, and the layers on a checkerboard, side by side."""
    cells = [
        result.example.picture,
        imaging.recompose(result.layers),
        *imaging.on_checkerboard(result.layers),
    ]
    return imaging.contact_sheet(cells, len(cells))

"""Evaluation on held-out pictures: fixed pictures, fixed noise, the averaged adapter, stage 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from sl_jax.data import EvalSet, Example, FolderError
from sl_jax.eval.bootstrap import interval
from sl_jax.eval.reference_free import reference_free
from sl_jax.grpo.config import EvaluationConfig
from sl_jax.grpo.judging import Judging, Submitted
from sl_jax.grpo.prompts import PromptTable
from sl_jax.grpo.rollout import Pictures, Rollout
from sl_jax.inference.decomposer import Decomposer
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.scoring import CRITERIA, GroupScores


class Evaluated(NamedTuple):
    """One held-out picture, decomposed and judged.

    Attributes:
        example: the picture.
        layers: uint8 [L, H, W, 4].
        reward: stage-1 score, 0 to 1; nan if the judge gave none.
        criteria: [5], 0 to 1.
        psnr: of the recomposition, dB.
    """

    example: Example
    layers: UInt8[np.ndarray, "l h w 4"]
    reward: float
    criteria: Float[np.ndarray, " 5"]
    psnr: float


class _Pending(NamedTuple):
    """A decomposition on its way to the judge and back."""

    example: Example
    layers: UInt8[np.ndarray, "l h w 4"]
    submitted: Submitted


@dataclass(frozen=True)
class Evaluator:
    """Samples and judges the held-out set.

    Attributes:
        judging: by stage 1 alone, which is a level; stage 2 is relative.
        shift: μ of the σ grid, as in the rollout.
    """

    decomposer: Decomposer
    examples: EvalSet
    prompts: PromptTable
    judging: Judging
    config: EvaluationConfig
    shift: float | None

    def __call__(self, adapter: Adapter) -> list[Evaluated]:
        """Every held-out picture, by the evaluation sampler.

        Raises:
            FolderError: none of them can be read any more.
            JudgeUnavailableError: they were not judged within `max_wait`.
        """
        pending = [
            self._submitted(batch, self._sampled(batch, adapter))
            for batch in self.examples.batches(self.config.batch)
        ]
        results = self._finished([entry for batch in pending for entry in batch])
        if not results:
            raise FolderError(f"no held-out picture can be read any more: {self.examples.failures}")
        return sorted(results, key=lambda r: r.example.slot)

    def rolled_out(
        self, rollout: Rollout, adapter: Adapter, window_start: int, groups: int
    ) -> list[Evaluated]:
        """One rollout candidate of each picture of the first batch of at most `groups`.

        Beside the scores of the evaluation sampler on the same pictures, theirs show what fewer
        steps and noise cost: candidates far below what is evaluated teach little about it.
        """
        batch = next(self.examples.batches(groups))
        padded = _padded(batch, groups)
        pictures = Pictures(
            jnp.asarray(np.stack([e.picture for e in padded])),
            *self.prompts(padded),
            self._keys(padded),
        )
        bucket = batch[0].bucket
        grid = LatentGrid(
            batch[0].layers, bucket.height // PACKED_PIXELS, bucket.width // PACKED_PIXELS
        )
        latents = rollout(adapter, pictures, window_start, grid).latents
        layers = np.asarray(rollout.decode(latents, grid))
        first = layers[:: len(layers) // len(padded)][: len(batch)]
        return self._finished(self._submitted(batch, first))

    def _sampled(self, batch: Sequence[Example], adapter: Adapter) -> np.ndarray:
        padded = _padded(batch, self.config.batch)
        layers = self.decomposer(
            jnp.asarray(np.stack([e.picture for e in padded])),
            *self.prompts(padded),
            self._keys(padded),
            layers=batch[0].layers,
            steps=self.config.steps,
            method=self.config.method,
            shift=self.shift,
            adapter=adapter,
        )
        return np.asarray(layers)[: len(batch)]

    def _keys(self, batch: Sequence[Example]) -> jax.Array:
        slots = jnp.asarray([e.slot for e in batch])
        root = jax.random.key(self.config.seed)
        return jax.vmap(lambda slot: jax.random.fold_in(root, slot))(slots)

    def _submitted(self, batch: Sequence[Example], layers: np.ndarray) -> list[_Pending]:
        submitted = self.judging.submit(batch, layers, [e.picture_id for e in batch])
        return [_Pending(*entry) for entry in zip(batch, layers, submitted, strict=True)]

    def _finished(self, pending: Sequence[_Pending]) -> list[Evaluated]:
        scores = self.judging.collect([entry.submitted for entry in pending])
        return [_evaluated(*pair) for pair in zip(pending, scores, strict=True)]


def _evaluated(entry: _Pending, scores: GroupScores) -> Evaluated:
    return Evaluated(
        entry.example,
        entry.layers,
        float(scores.stage1[0]),
        scores.criteria[0],
        reference_free(entry.layers, entry.example.picture).psnr,
    )


def evaluation_metrics(results: Sequence[Evaluated]) -> dict[str, float]:
    """Means over pictures, with the bootstrap interval of the reward."""
    reward = interval([r.reward for r in results])
    criteria = np.nanmean([r.criteria for r in results], axis=0)
    return {
        "evaluation/reward": reward.mean,
        "evaluation/reward_low": reward.low,
        "evaluation/reward_high": reward.high,
        "evaluation/psnr": float(np.mean([r.psnr for r in results])),
        **{f"evaluation/{name}": float(v) for name, v in zip(CRITERIA, criteria, strict=True)},
    }


def _padded(batch: Sequence[Example], size: int) -> list[Example]:
    """The batch filled up with its last picture, so that one program serves all batches."""
    return [*batch, *[batch[-1]] * (size - len(batch))]

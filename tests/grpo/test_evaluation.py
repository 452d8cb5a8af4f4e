"""What an evaluation of held-out pictures asks for, and what it makes of the answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged

from sl_jax.data import EvalSet, make_buckets, scan_folder, write_designs
from sl_jax.grpo.config import EvaluationConfig, JudgeSettings
from sl_jax.grpo.evaluation import Evaluator, evaluation_metrics
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.phases import Work
from sl_jax.inference.sampling import Decoded, Guidance
from sl_jax.models.flops import velocity_flops
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.scoring import JudgeWorker, Rewards

PICTURES, BATCH, STEPS, TEXT = 5, 4, 3, 7


class Sampler:
    """Grey layers in place of a model's.

    Attributes:
        spoiled: rows of each batch whose layers are not finite.
    """

    spoiled = ()
    transformer = MMDiTConfig(2, 16, 2, 64, axes_dims_rope=(4, 6, 6))

    def __call__(self, pictures, *_, layers, **__):
        rows, height, width, _ = pictures.shape
        grey = jnp.full((rows, layers, height, width, 4), 128, jnp.uint8)
        return Decoded(grey, ~np.isin(np.arange(rows), self.spoiled))


class Judge:
    """Half of the points for everyone."""

    endpoint = None

    async def judge(self, group):
        return judged([0.5], group_id=group.group_id)


@pytest.fixture
def evaluator(tmp_path):
    """Of five pictures in two batches."""
    write_designs(tmp_path, "A", range(PICTURES), 32, 2)
    index = scan_folder(tmp_path, make_buckets([(32, 32)]))
    with JudgeWorker(Judge()) as worker:
        yield Evaluator(
            *(Sampler(), EvalSet(index, layers=(2,))),
            lambda examples: (np.zeros((len(examples), TEXT, 64), np.float32), None),
            Judging(worker, Rewards((("judge", 1.0),)), JudgeSettings()),
            *(EvaluationConfig(batch=BATCH, steps=STEPS, method="heun"), None),
            Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
        )


def _work(evaluator):
    told = []
    assert len(evaluator("adapter", told.append)) == PICTURES
    return told


def test_each_batch_tells_what_it_asks_of_the_transformer(evaluator):
    """Heun takes two velocities a step but for the last; Euler takes one, guidance two of each."""
    once = velocity_flops(Sampler.transformer, LatentGrid(2, 2, 2), TEXT)
    tokens = 3 * 4 + 4 + TEXT  # frames with the whole picture again, the source, the prompt
    velocities = BATCH * (2 * STEPS - 1)
    assert _work(evaluator) == [Work(velocities * once, velocities * tokens, BATCH)] * 2
    config = dataclasses.replace(evaluator.config, method="euler")
    guidance = Guidance(2.0, np.zeros((1, 2, 64)), None)
    guided = dataclasses.replace(evaluator, config=config, guidance=guidance)
    velocities = BATCH * STEPS * 2
    assert _work(guided) == [Work(velocities * once, velocities * tokens, BATCH)] * 2


def test_layers_that_are_not_finite_have_no_score(evaluator, caplog):
    """Whatever the judge made of the black that it was shown."""
    whole = evaluation_metrics(evaluator("adapter"))
    assert whole["evaluation/reward"] == 0.5 and not caplog.text
    evaluator.decomposer.spoiled = (2,)
    results = evaluator("adapter")
    (lost,) = [r for r in results if np.isnan(r.reward)]  # the other batch has one picture
    assert np.isnan(lost.criteria).all() and np.isnan(dataclasses.astuple(lost.measures)).all()
    assert f"held-out picture {lost.example.picture_id} are not finite" in caplog.text
    assert all(np.isfinite(value) for value in evaluation_metrics(results).values())
    evaluator.decomposer.spoiled = tuple(range(BATCH))
    lost = evaluation_metrics(evaluator("adapter"))
    assert lost.keys() == whole.keys() and np.isnan(list(lost.values())).all()

"""Every mesh of eight devices gives the samples, loss and gradient of one device."""

import itertools
import math

import jax
import numpy as np
import optax
import pytest
from conftest import Bench

from sl_jax.grpo.config import LearnerConfig
from sl_jax.grpo.learner import Learner, Scored
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Pictures, Rollout
from sl_jax.parallel.mesh import batch_sharding
from sl_jax.parallel.processes import from_everywhere
from sl_jax.training.optimizer import OptimizerConfig

AXES = ("data", "fsdp", "tensor", "sequence")
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(shape) == 8]
SAMPLES = Bench.groups * Bench.config.group_size


def _addressable(tree):
    return jax.tree.map(np.asarray, tree)


def results(bench, to_host=_addressable):
    """A rollout, and an update of a policy that has moved away from the one that rolled out."""
    rollout = Rollout(bench.pipeline, bench.config, bench.layout)
    candidates = rollout(bench.adapter, _laid_out(bench), 1, bench.grid)
    advantage = np.random.default_rng(0).normal(size=SAMPLES)
    weight = np.full(SAMPLES, 1 / SAMPLES)
    scored = Scored(candidates, rollout.table(bench.grid), advantage, weight, bench.grid)
    samples = to_host((candidates.latents, candidates.window))
    learner = Learner(
        *(bench.pipeline, bench.adapter, bench.config, ObjectiveConfig(), OptimizerConfig(1e-3)),
        *(LearnerConfig(micro_batch=SAMPLES), bench.layout),
    )
    moved = bench.adapter.replace(lora=jax.tree.map(lambda x: 1.1 * x, bench.adapter.lora))
    state, report = learner.update(learner.start(moved), [scored], bench.adapter)
    loss = [np.asarray(step.objective.policy_loss) for step in report.steps]
    gradient = optax.tree.get(state.optimizer, "mu")  # Adam's first, a tenth of it
    return {
        "samples": samples,
        "loss": np.concatenate(loss),
        "gradient": to_host(gradient),
        "norms": np.array([norm for _, norm in report.gradient_norms]),
    }


def _laid_out(bench):
    """The pictures as a run has them, where each process may have some."""
    sharding = batch_sharding(bench.layout.mesh)
    *arrays, keys = bench.pictures()
    *placed, words = (
        from_everywhere(np.asarray(x), sharding) for x in (*arrays, jax.random.key_data(keys))
    )
    return Pictures(*placed, jax.random.wrap_key_data(words))


@pytest.fixture(scope="module")
def wanted(bench):
    return results(bench)


def test_all_shapes_are_tried():
    assert len(SHAPES) == 20


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_as_on_one_device(random_checkpoint, quick_compilation, wanted, shape):
    bench = Bench(random_checkpoint, **dict(zip(AXES, shape, strict=True)))
    found = results(bench)
    assert len(bench.layout.mesh.devices.flat) == 8
    # Ratios are not 1: the loss says something of the velocities.
    assert np.abs(np.abs(wanted["loss"]) - np.abs(wanted["loss"]).round(3)).max() > 1e-5
    jax.tree.map(assert_close, found, wanted)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())

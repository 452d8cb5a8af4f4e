"""Rollout and learner without the weights that make modulation of time, and with them."""

import jax
import numpy as np
import optax
import pytest
from conftest import Bench

from sl_jax.checkpoints.pipeline import shard_adapter
from sl_jax.grpo.config import LearnerConfig
from sl_jax.grpo.learner import Learner, Scored
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Rollout
from sl_jax.models.lora import LoRAConfig, init_adapter
from sl_jax.training.optimizer import OptimizerConfig

ON_BLOCKS = ("to_q", "img_mlp.net.2")
ON_MODULATION = (*ON_BLOCKS, "img_mod.1", "txt_mod.1")
TOLERANCE = 2e-5


def _adapter(params, targets):
    """Of the parameters' own layout; its update is not zero."""
    fresh = init_adapter(jax.random.key(3), params, LoRAConfig(4, 8.0, targets))
    draw = np.random.default_rng(4)
    moved = jax.tree.map(lambda x: x + 0.02 * draw.normal(size=x.shape), fresh.lora)
    return shard_adapter(fresh.replace(lora=jax.tree.map(np.float32, moved)), params)


def _rolled_and_learned(bench, adapter):
    """Candidates, and the gradient that a first update takes from them."""
    rollout = Rollout(bench.pipeline, bench.config, bench.layout)
    candidates = rollout(adapter, bench.pictures(), 1, bench.grid)
    samples = len(candidates.latents)
    advantage = np.random.default_rng(0).normal(size=samples)
    weight = np.full(samples, 1 / samples)
    learner = Learner(
        bench.pipeline,
        adapter,
        bench.config,
        ObjectiveConfig(),
        OptimizerConfig(1e-3, clip_norm=1e9),
        LearnerConfig(micro_batch=samples),
        bench.layout,
    )
    scored = Scored(candidates, rollout.table(bench.grid), advantage, weight, bench.grid)
    state, _ = learner.update(learner.start(adapter), [scored])
    return candidates, jax.tree.map(lambda mu: mu / 0.1, optax.tree.get(state.optimizer, "mu"))


def _close(found, wanted):
    def check(a, b):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(1, np.abs(b).max()))

    jax.tree.map(check, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ON_BLOCKS, ON_MODULATION], ids=["blocks", "modulation"])
def test_a_mesh_with_tables_equals_one_device_with_all_weights(
    random_checkpoint, quick_compilation, targets
):
    one = Bench(random_checkpoint, None, data=1, fsdp=1)
    adapter = _adapter(one.pipeline.params, targets)
    mesh = Bench(random_checkpoint, [adapter], data=2, fsdp=2, tensor=2)
    with_tables = mesh.pipeline.time_params is not None
    assert with_tables == ("modulation" not in mesh.pipeline.params) == (targets == ON_BLOCKS)
    wanted, gradient = _rolled_and_learned(one, adapter)
    found, learned = _rolled_and_learned(mesh, _adapter(mesh.pipeline.params, targets))
    _close(found.latents, wanted.latents)
    _close(found.window, wanted.window)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    _close(*(jax.tree.map(lambda x: x / scale, tree) for tree in (learned, gradient)))
    if not with_tables:
        for name in ("img_mod_1", "txt_mod_1"):
            assert np.abs(gradient["modulation"][name]["b"]).max() > 0


def test_a_table_of_the_base_refuses_to_learn_what_it_cannot(random_checkpoint, quick_compilation):
    """An adapter that the pipeline was not loaded for is not silently ignored."""
    bench = Bench(random_checkpoint, data=1, fsdp=1)
    whole = Bench(random_checkpoint, None, data=1, fsdp=1)
    adapter = _adapter(whole.pipeline.params, ON_MODULATION)
    rollout = Rollout(bench.pipeline, bench.config, bench.layout)
    with pytest.raises(ValueError, match="changes modulation/img_mod_1, modulation/txt_mod_1"):
        rollout(adapter, bench.pictures(), 1, bench.grid)

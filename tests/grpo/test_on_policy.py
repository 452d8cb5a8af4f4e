"""Before the first update the learner's old and new velocities are equal to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.checkpoints.pipeline import (
    ComputeConfig,
    abstract_adapter,
    load_pipeline,
    parameter_shapes,
    shard_adapter,
)
from sl_jax.grpo.config import LearnerConfig, RolloutConfig
from sl_jax.grpo.learner import Learner, Scored
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Pictures, Rollout
from sl_jax.inference.sampling import Guidance
from sl_jax.models.lora import DEFAULT_TARGETS, LoRAConfig, init_adapter
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.training.optimizer import OptimizerConfig

GRID = LatentGrid(2, 2, 1)
ROLLOUT = RolloutConfig(
    groups=8, batch_groups=8, group_size=4, steps=4, window_range=(0, 3), noise_level=0.7
)


def _setting(folder, mesh, dtype, micro_batch, targets, guidance):
    devices = jax.devices()[: np.prod([s for s in mesh.values()])]
    layout = Layout(make_mesh(MeshConfig(**mesh), devices))
    config = LoRAConfig(4, 8.0, targets)
    shapes = parameter_shapes(folder)
    adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), shapes, config))
    pipeline = load_pipeline(folder, ComputeConfig(dtype=dtype), layout, [adapter])
    learner = Learner(
        pipeline,
        abstract_adapter(adapter, pipeline.params),
        ROLLOUT,
        ObjectiveConfig(),
        OptimizerConfig(1e-3),
        LearnerConfig(updates=1, micro_batch=micro_batch),
        layout,
        guidance,
    )
    return pipeline, Rollout(pipeline, ROLLOUT, layout, guidance), learner


def _pictures(groups=8):
    rng = np.random.default_rng(0)
    keys = jax.vmap(jax.random.key)(jnp.arange(groups))
    pixels = rng.integers(0, 256, (groups, 32, 16, 3), np.uint8)
    text = rng.normal(size=(groups, 5, 64)).astype(np.float32)
    return Pictures(jnp.asarray(pixels), jnp.asarray(text), jnp.full(groups, 4), keys)


def _adapter(pipeline, targets):
    """An adapter whose update is not zero."""
    adapter = init_adapter(jax.random.key(3), pipeline.params, LoRAConfig(4, 8.0, targets))
    lora = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(4), x.shape), adapter.lora
    )
    return shard_adapter(adapter.replace(lora=lora), pipeline.params)


@pytest.mark.parametrize(
    ("mesh", "dtype", "micro_batch", "targets", "scale"),
    [
        ({"data": 1, "fsdp": 1}, "bfloat16", 2, DEFAULT_TARGETS, 1.0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "bfloat16", 8, DEFAULT_TARGETS, 1.0),
        pytest.param(
            *({"data": 2, "fsdp": 2, "tensor": 2}, "bfloat16", 8, DEFAULT_TARGETS, 4.0),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"data": 2, "fsdp": 2, "tensor": 2}, "bfloat16", 8),
            *(("to_q", "img_mod.1", "txt_mod.1"), 1.0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_delta_is_zero_bitwise_before_the_first_update(
    random_checkpoint, mesh, dtype, micro_batch, targets, scale
):
    setting = (mesh, dtype, micro_batch, targets)
    guidance = None if scale == 1 else Guidance(scale, jnp.ones((1, 3, 64)), None)
    pipeline, rollout, learner = _setting(random_checkpoint, *setting, guidance)
    adapter = _adapter(pipeline, targets)
    candidates = rollout(adapter, _pictures(), 1, GRID)
    samples = len(candidates.latents)
    advantage = np.resize([1.0, -1.0], samples)
    scored = Scored(candidates, rollout.table(GRID), advantage, np.full(samples, 1 / samples), GRID)
    old = jax.tree.map(jnp.copy, adapter)
    # Told of an old adapter, though it is equal, the learner computes both velocities.
    state, report = learner.update(learner.start(adapter), [scored], old)
    for step in report.steps:
        assert not np.any(step.objective.log_ratio)
        assert not np.any(step.objective.kl_old)
    # After an update they differ, and it shows.
    _, report = learner.update(state, [scored], old)
    assert all(np.all(step.objective.log_ratio != 0) for step in report.steps)
    assert all(np.all(step.mismatch.distance < 0.1) for step in report.steps)
    # All the while the base is bfloat16, whatever its files hold, and the adapter is not.
    base = (pipeline.params, pipeline.time_params, pipeline.vae_params)
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {np.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.adapter)} == {np.dtype(np.float32)}

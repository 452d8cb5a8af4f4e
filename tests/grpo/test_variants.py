"""Variants of the algorithm, from real rollouts through the real learner.

The learner takes the gradient apart: micro-batches, step by step, with the vjp carried over. Here
the whole objective is differentiated at once, and must give the same.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sl_jax.flow.dynamics import step_coefficients
from sl_jax.grpo.config import LearnerConfig
from sl_jax.grpo.learner import Learner, Scored
from sl_jax.grpo.objective import ObjectiveConfig, policy_objective
from sl_jax.grpo.rollout import Rollout
from sl_jax.inference.sampling import Guidance
from sl_jax.models.flops import gradient_flops, velocity_flops
from sl_jax.models.lora import Adapter
from sl_jax.training.optimizer import OptimizerConfig

SAMPLES = 16


class Variant(NamedTuple):
    """Fields of the configuration that differ from `bench.config` and from the defaults."""

    rollout: dict
    objective: dict
    reference: str = "base"
    guidance: float = 1.0


# The KL weighs so much that its gradient is some percent of the whole.
VARIANTS = {
    "guard": Variant(
        {"dynamics": "flow_sde", "window_size": 2},
        {"ratio": "guard", "kl_weight": 30.0, "inverse_dt_weight": True},
    ),
    "dance_sde": Variant(
        {"dynamics": "dance_sde", "group_noise": "independent", "ode_method": "heun"},
        {"ratio": "velocity", "kl_weight": 20.0},
        reference="init",
    ),
    "cps": Variant(
        {"dynamics": "cps", "train_frames": "layers", "window_size": 3},
        {"ratio": "plain", "clip_low": 1.0, "clip_high": 1.0},
    ),
    "guidance": Variant(
        {"group_noise": "independent"}, {"ratio": "velocity", "kl_weight": 10.0}, guidance=3.0
    ),
    "cps_public_ratio": Variant(
        {"dynamics": "cps", "group_noise": "independent"},
        {"ratio": "cps_public_ratio", "clip_low": 1e-3, "clip_high": 1e-3},
    ),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return request.param


def _guidance(variant):
    if variant.guidance == 1:
        return None
    text = np.random.default_rng(5).normal(size=(1, 3, 64)).astype(np.float32)
    return Guidance(jnp.float32(variant.guidance), jnp.asarray(text), None)


def _objective(bench, config, objective, reference, scored, guidance):
    """The loss of all samples and steps at once, as a function of the adapter's weights."""
    pipeline, window, condition = bench.pipeline, scored.candidates.window, scored.candidates[2]
    sigmas, trained = scored.table.sigmas, np.ones(bench.grid.generated_tokens)
    if config.train_frames == "layers":
        trained[: bench.grid.frame_tokens] = 0

    def velocity(lora, x, index):
        variables = {"params": pipeline.params}
        variables |= Adapter(lora, bench.adapter.lora_scale).variables()
        modulation = scored.table.rows.at(index)

        def by_prompt(*prompt):
            told = (condition.picture, *prompt, modulation, bench.grid)
            return pipeline.model.apply(variables, x, *told)

        wanted = by_prompt(condition.text, condition.text_lengths)
        if guidance is None:
            return wanted
        unwanted = by_prompt(jnp.repeat(guidance.text, SAMPLES, axis=0), None)
        mixed = unwanted + guidance.scale * (wanted - unwanted)
        norms = [jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (wanted, mixed)]
        return mixed * norms[0] / norms[1]

    def loss(lora):
        total = 0.0
        for number, index in enumerate(np.asarray(window.index)):
            x = window.x[number]
            here, following = sigmas[index], sigmas[index + 1]
            total += policy_objective(
                velocity(lora, x, index),
                velocity_old=velocity(bench.adapter.lora, x, index),
                x=x,
                x_next=window.x_next[number],
                coefficients=step_coefficients(
                    config.dynamics, here, following, sigmas[1], config.noise_level
                ),
                advantage=jnp.asarray(scored.advantage, jnp.float32),
                weight=jnp.asarray(scored.weight / len(window.index), jnp.float32),
                config=objective,
                velocity_reference=velocity(reference.lora, x, index) if reference else None,
                token_mask=jnp.asarray(trained, jnp.float32),
            )[0]
        return total

    return loss


def _moment(state):
    return jax.tree.map(np.array, optax.tree.get(state.optimizer, "mu"))


@pytest.mark.slow
def test_an_update_follows_the_gradient_of_the_whole_objective(bench, variant):
    config = dataclasses.replace(bench.config, **variant.rollout)
    objective = ObjectiveConfig(**variant.objective)
    guidance = _guidance(variant)
    rollout = Rollout(bench.pipeline, config, bench.layout, guidance)
    candidates = rollout(bench.adapter, bench.pictures(), 0, bench.grid)
    assert np.asarray(candidates.finite).all() and np.all(np.asarray(candidates.window.std) > 0)
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 1.5, SAMPLES)
    scored = Scored(
        *(candidates, rollout.table(bench.grid), rng.normal(size=SAMPLES)),
        *(weight / weight.sum(), bench.grid),
    )
    learner = Learner(
        *(bench.pipeline, bench.adapter, config, objective),
        OptimizerConfig(1e-3, clip_norm=1e9),
        *(LearnerConfig(micro_batch=4, reference=variant.reference), bench.layout, guidance),
    )
    initial = bench.adapter.replace(lora=jax.tree.map(lambda x: 0.5 * x, bench.adapter.lora))
    state = learner.start(initial).replace(adapter=bench.adapter)  # trained since it began
    state, first = learner.update(state, [scored])
    for step in first.steps:  # on-policy, and the rollout's own numbers
        assert not np.any(step.objective.log_ratio)
        assert np.all(np.abs(step.mismatch.log_ratio) < 1e-4)
    moved, before = jax.tree.map(np.array, state.adapter.lora), _moment(state)
    state, _ = learner.update(state, [scored], bench.adapter)
    found = jax.tree.map(lambda now, was: (now - 0.9 * was) / 0.1, _moment(state), before)

    reference = None
    if objective.kl_weight:
        nothing = bench.adapter.replace(lora=jax.tree.map(jnp.zeros_like, bench.adapter.lora))
        reference = {"base": nothing, "init": initial}[variant.reference]
    # Forward, the old adapter, a reference, and backward, each for one prompt or for two.
    sizes = (bench.pipeline.model.config, bench.grid, candidates[2].text.shape[1])
    once = (2 + bool(reference)) * velocity_flops(*sizes) + gradient_flops(*sizes)
    passes = SAMPLES * (1 if guidance is None else 2) * len(first.gradient_norms)
    assert learner.work([scored], bench.adapter).flops == passes * once
    loss = _objective(bench, config, objective, reference, scored, guidance)
    wanted = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(moved))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    assert largest > 0
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * largest, rtol=2e-3)

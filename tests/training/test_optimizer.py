"""The optimizers: what Muon takes as matrices, and that both are scaled alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sl_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer

SHAPES = {
    "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "blocks": {"kernel": (5, 16, 8), "bias": (5, 8), "scale": (5, 16)},
    "adapter": {"a": (5, 16, 4), "b": (5, 4, 16)},
    "dense": {"kernel": (16, 8)},
}


def _tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _first_update(name, gradients):
    optimizer = make_optimizer(OptimizerConfig(1.0, name, weight_decay=0.0, clip_norm=1e9))
    params = jax.tree.map(jnp.zeros_like, gradients)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_muon_evens_out_the_singular_values_of_every_matrix_and_nothing_else():
    gradients = _tree(0)
    update = _first_update("muon", gradients)
    matrices = {
        "conv": update["conv"]["kernel"].reshape(1, 36, 8),
        "blocks": update["blocks"]["kernel"],
        "a": update["adapter"]["a"],
        "b": update["adapter"]["b"],
        "dense": update["dense"]["kernel"][None],
    }
    for name, stack in matrices.items():
        for matrix in np.asarray(stack):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.max() < 2.0 * values.min(), name
            # of a flat spectrum: √(in·out)·0.2 is spread over min(in, out) singular values
            rms = np.sqrt(np.mean(np.square(matrix)))
            assert 0.12 < rms < 0.25, name
    adam = _first_update("adamw", gradients)
    for group, leaf in (("conv", "bias"), ("blocks", "bias"), ("blocks", "scale")):
        # Adam with Nesterov's momentum: longer at first, never turned around
        ratio = update[group][leaf] / adam[group][leaf]
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
        assert 1 <= ratio.mean() < 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_least_squares_problem_is_solved(name):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    y = x @ rng.normal(size=(16, 8)).astype(np.float32)
    optimizer = make_optimizer(OptimizerConfig(0.05, name, weight_decay=0.0, decay_steps=300))
    params = {"dense": {"kernel": jnp.zeros((16, 8))}}

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean(jnp.square(x @ p["dense"]["kernel"] - y))  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(300):
        params, state, value = step(params, state)
    assert value < 1e-2 * np.mean(np.square(y))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'sgd' is unknown; please use one of"):
        make_optimizer(OptimizerConfig(1e-3, "sgd"))

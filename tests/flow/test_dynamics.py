"""Each dynamics against its source's own form, evaluated in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax.flow import dynamics, schedule

STOCHASTIC = ("flow_sde", "dance_sde", "cps")
GRID = schedule.sigma_grid(10, 2.5)


def _latents(seed: int, shape=(3, 5, 4)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


def _flow_sde(x, v, t, t_next, t_first, a):
    """Flow-GRPO, eq. 9 as its public code writes it."""
    dt = t_next - t
    q = np.sqrt(t / (1 - (t_first if t == 1 else t))) * a
    mean = x * (1 + q**2 / (2 * t) * dt) + v * (1 + q**2 * (1 - t) / (2 * t)) * dt
    return mean, q * np.sqrt(-dt)


def _dance_sde(x, v, t, t_next, _, a):
    """DanceGRPO: the reverse SDE of constant diffusion a, with the score −(x − (1−t)·x̂₀)/t²."""
    clean = x - t * v
    score = -(x - (1 - t) * clean) / t**2
    return x + (v - 0.5 * a**2 * score) * (t_next - t), a * np.sqrt(t - t_next)


def _cps(x, v, t, t_next, _, a):
    """Flow-CPS: the predicted data and noise, mixed so that variances add up to t'²."""
    std = t_next * np.sin(a * np.pi / 2)
    clean, noise = x - t * v, x + (1 - t) * v
    return (1 - t_next) * clean + np.sqrt(t_next**2 - std**2) * noise, std


REFERENCES = {"flow_sde": _flow_sde, "dance_sde": _dance_sde, "cps": _cps}


def _step(name, x, v, step, level, grid=GRID):
    coefficients = dynamics.step_coefficients(name, grid[step], grid[step + 1], grid[1], level)
    return coefficients, dynamics.step_moments(coefficients, jnp.asarray(x), jnp.asarray(v))


@pytest.mark.parametrize("name", STOCHASTIC)
@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 8), level=st.floats(0.05, 1.0), mu=st.floats(0.25, 3.0))
def test_moments_match_the_source(name, step, level, mu):
    grid = schedule.sigma_grid(10, mu)
    x, v = _latents(step)
    t, t_next, t_first = (float(grid[i]) for i in (step, step + 1, 1))
    mean, std = REFERENCES[name](x, v, t, t_next, t_first, level)
    coefficients, moments = _step(name, x, v, step, level, grid)
    np.testing.assert_allclose(moments.mean, mean, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(moments.std, std, rtol=2e-5)
    shifted, _ = REFERENCES[name](x, v + 1, t, t_next, t_first, level)
    np.testing.assert_allclose(coefficients.k_v, (shifted - mean).mean(), rtol=1e-4, atol=1e-6)
    assert coefficients.k_v < 0 and coefficients.dt == grid[step + 1] - grid[step]


@pytest.mark.parametrize("name", [*STOCHASTIC, "ode"])
@pytest.mark.parametrize("step", [0, 4, 9])
def test_without_noise_a_step_is_exactly_eulers(name, step):
    x, v = (a.astype(np.float32) for a in _latents(7))
    coefficients, moments = _step(name, x, v, step, 0.0)
    assert coefficients.k_x == 1.0 and moments.std == 0.0
    np.testing.assert_array_equal(moments.mean, x + (GRID[step + 1] - GRID[step]) * v)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_per_sample_traced_sigmas_equal_single_steps(name):
    x, v = _latents(1)
    steps = np.array([0, 3, 8])

    @jax.jit
    def batched(sigma, sigma_next, sigma_max, level):
        coefficients = dynamics.step_coefficients(name, sigma, sigma_next, sigma_max, level)
        return dynamics.step_moments(coefficients, jnp.asarray(x), jnp.asarray(v))

    mean, std = batched(GRID[steps], GRID[steps + 1], GRID[1], 0.8)
    assert std.shape == (3,) and mean.dtype == jnp.float32
    for row, step in enumerate(steps):
        _, alone = _step(name, x[row : row + 1], v[row : row + 1], step, 0.8)
        np.testing.assert_allclose(mean[row], alone.mean[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(std[row], alone.std, rtol=1e-6)


def test_step_noise_is_what_carried_the_mean_to_the_next_latents():
    x, v = _latents(2)
    _, moments = _step("flow_sde", x, v, 2, 0.7)
    noise = _latents(3)[0]
    x_next = dynamics.next_latents(moments, jnp.asarray(noise))
    np.testing.assert_allclose(dynamics.step_noise(x_next, moments), noise, atol=1e-4)


def test_public_cps_ratio_is_the_difference_of_its_squared_errors():
    x, v = _latents(4)
    _, old = _step("cps", x, v, 3, 0.8)
    _, new = _step("cps", x, v + 0.01 * _latents(5)[0], 3, 0.8)
    noise = _latents(6)[0]
    mean, s = np.float64(old.mean), float(old.std)
    delta = np.float64(new.mean) - mean
    expected = (-((s * noise - delta) ** 2) + (s * noise) ** 2).mean(axis=(1, 2))
    ours = dynamics.cps_public_ratio(jnp.asarray(noise), jnp.asarray(delta), old.std)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masked_means_equal_means_of_the_slice(dtype):
    x, v = _latents(8)
    mask = np.array([0, 0, 1, 1, 1]).astype(dtype)
    sliced = dynamics.latent_mean(jnp.asarray(x[:, 2:]))
    x = np.where((np.arange(5) < 2)[:, None], np.nan, x)
    np.testing.assert_allclose(dynamics.latent_mean(jnp.asarray(x), jnp.asarray(mask)), sliced)
    per_sample = np.broadcast_to(mask, (3, 5))
    np.testing.assert_allclose(
        dynamics.latent_mean(jnp.asarray(x), jnp.asarray(per_sample)), sliced
    )
    assert dynamics.latent_count(jnp.asarray(v), jnp.asarray(mask)) == 12
    assert dynamics.latent_count(jnp.asarray(v)) == 20


def test_unknown_dynamics_is_named():
    with pytest.raises(ValueError, match="'brownian' is unknown; please use one of flow_sde"):
        dynamics.step_coefficients("brownian", 0.5, 0.4, 0.9, 1.0)

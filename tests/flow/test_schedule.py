"""The σ grid against diffusers' scheduler, called the way the layered pipeline calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sl_jax.flow import schedule

torch.set_num_threads(1)


def _reference_grid(config: dict, steps: int, tokens: int) -> np.ndarray:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = (tokens / 256) ** 0.5
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0, steps + 1)[:-1], mu=mu)
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("steps,tokens", [(2, 16), (10, 1600), (50, 1521), (7, 4096), (28, 3)])
@pytest.mark.parametrize(
    "config",
    [
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": False},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": None},
        {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
    ],
)
def test_grid_equals_the_reference_to_the_last_bit(config, steps, tokens):
    ours = schedule.SchedulerConfig.from_dict(config).sigmas(steps, tokens)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, _reference_grid(config, steps, tokens))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_fixed_shift_without_dynamic_shifting(shift):
    config = {"use_dynamic_shifting": False, "shift": shift}
    ours = schedule.SchedulerConfig.from_dict(config).sigmas(12, 1600)
    np.testing.assert_allclose(ours, _reference_grid(config, 12, 1600), rtol=3e-7)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_grid_starts_at_one_ends_at_zero_and_descends(kind):
    grid = schedule.sigma_grid(13, 1.7, kind)
    assert grid[0] == 1.0 and grid[-1] == 0.0
    assert (np.diff(grid) < 0).all()


def test_given_shift_replaces_the_automatic_one():
    config = schedule.SchedulerConfig(use_dynamic_shifting=True, time_shift_type="linear")
    np.testing.assert_array_equal(config.sigmas(10, 16, mu=2.5), config.sigmas(10, 1600))
    assert schedule.shift_mu(1600) == 2.5 and schedule.shift_mu(16) == 0.25


@pytest.mark.parametrize(("kind", "factor"), [("linear", 2.5), ("exponential", np.exp(2.5))])
def test_uniform_draws_have_the_density_of_a_fine_grid(kind, factor):
    draws = schedule.draw_sigmas(jax.random.key(0), (20_000,), float(factor))
    grid = schedule.sigma_grid(2_000, 2.5, kind)
    levels = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(
        np.quantile(draws, levels), np.quantile(grid, levels), rtol=0, atol=0.012
    )
    assert draws.dtype == jnp.float32 and draws.min() > 0 and draws.max() <= 1


@pytest.mark.parametrize(("share", "z"), [(0.5, 0.0), (0.8413, 1.0)])
def test_logit_normal_draws_have_shifted_quantiles_and_per_sample_shift(share, z):
    mu = jnp.concatenate([jnp.full(20_000, 1.0), jnp.full(20_000, 2.5)])
    draws = schedule.draw_sigmas(jax.random.key(1), (40_000,), mu, distribution="logit_normal")
    base = 1 / (1 + np.exp(-z))
    for half, shift in ((draws[:20_000], 1.0), (draws[20_000:], 2.5)):
        expected = shift * base / (shift * base + 1 - base)
        assert abs(float(jnp.quantile(half, share)) - expected) < 0.01


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedule.sigma_grid(0, 1.0),
        lambda: schedule.sigma_grid(4, 0.0),
        lambda: schedule.sigma_grid(4, float("nan"), "exponential"),
        lambda: schedule.sigma_grid(4, 1.0, "cosine"),
        lambda: schedule.sigma_grid(1, 1.0, shift_terminal=0.02),
        lambda: schedule.sigma_grid(4, 1.0, shift_terminal=1.0),
        lambda: schedule.shift_mu(0),
        lambda: schedule.draw_sigmas(jax.random.key(0), (2,), 1.0, distribution="beta"),
        lambda: schedule.SchedulerConfig.from_dict({"use_karras_sigmas": True}),
        lambda: schedule.SchedulerConfig.from_dict({"time_shift_type": "cosine"}),
    ],
)
def test_unusable_settings_are_named(call):
    with pytest.raises(ValueError, match="please"):
        call()

"""Samplers on flows whose answer is known, and rollouts against plain Python loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.stats import norm

from sl_jax.flow import dynamics, sampler, schedule

GRID = schedule.sigma_grid(8, 1.5)
SHAPE = (4, 6, 3)
POINT = 0.7


def _keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def _noise(count: int = SHAPE[0], seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *SHAPE[1:])).astype(np.float32)


def _point_mass_velocity(sigmas, x, index):
    """The exact flow when the data are one point: v = (x − point)/σ."""
    return (x - POINT) / sigmas[index]


def _gaussian_velocity(sigmas, x, index, mean=0.4, variance=0.25):
    """The exact flow for Gaussian data: E[ε − x₀ | x] by linear regression on x."""
    t = sigmas[index]
    total = (1 - t) ** 2 * variance + t**2
    slope = (t - (1 - t) * variance) / total
    return slope * (x - (1 - t) * mean) - mean


def _wavy_velocity(x, index, xp=jnp):
    return xp.sin(3 * x) + xp.float32(0.1) * index + xp.float32(0.2) * xp.roll(x, 1, axis=1)


def _python_ode(x, first, stop, method):
    """The steps first … stop − 1 written out in NumPy."""
    x = np.asarray(x)
    for i in range(first, stop):
        dt = GRID[i + 1] - GRID[i]
        v = _wavy_velocity(x, i, np)
        if method == "heun" and GRID[i + 1] > 0:
            v = np.float32(0.5) * (v + _wavy_velocity(x + dt * v, i + 1, np))
        x = x + dt * v
    return x


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sample_equals_the_written_out_loop(method):
    x = _noise()
    ours = jax.jit(lambda x: sampler.sample(_wavy_velocity, x, GRID, method))(x)
    np.testing.assert_allclose(ours, _python_ode(x, 0, 8, method), atol=3e-6)
    middle = sampler.integrate(_wavy_velocity, x, GRID, 2, jnp.int32(5), method)
    np.testing.assert_allclose(middle, _python_ode(x, 2, 5, method), atol=3e-6)


@pytest.mark.parametrize("method,evaluations", [("euler", 8), ("heun", 15)])
def test_number_and_order_of_evaluations(method, evaluations):
    seen = []

    def counted(x, index):
        jax.debug.callback(lambda i: seen.append(int(i)), index, ordered=True)
        return x

    jax.block_until_ready(sampler.sample(counted, _noise(), GRID, method))
    jax.effects_barrier()
    expected = list(range(8)) if method == "euler" else sorted([*range(8), *range(1, 8)])
    assert seen == expected and len(seen) == evaluations


def test_heun_converges_at_second_order_and_euler_at_first():
    def error(steps, method):
        grid = jnp.asarray(schedule.sigma_grid(steps, 1.0))
        x = _noise(seed=3)
        ours = sampler.sample(functools.partial(_gaussian_velocity, grid), x, grid, method)
        return float(jnp.abs(ours - (0.4 + 0.5 * x)).max())  # the exact map of this flow

    assert 1.7 < error(40, "euler") / error(80, "euler") < 2.3
    assert 3.4 < error(20, "heun") / error(40, "heun") < 4.8
    assert error(40, "heun") < error(40, "euler") / 10


def test_half_precision_velocities_are_integrated_in_float32():
    x = _noise()
    ours = sampler.sample(lambda x, i: x.astype(jnp.bfloat16), x, GRID)
    assert ours.dtype == jnp.float32
    expected = x
    for i in range(8):
        step = (GRID[i + 1] - GRID[i]) * expected.astype(jnp.bfloat16).astype(jnp.float32)
        expected = expected + step
    np.testing.assert_allclose(ours, expected, rtol=2e-2, atol=1e-3)


def _rollout(x, start, *, keys, name="flow_sde", size=2, level=0.7, method="euler", fn=None):
    return sampler.rollout(
        fn or _wavy_velocity,
        x,
        GRID,
        dynamics=name,
        noise_level=level,
        window_start=start,
        window_size=size,
        keys=keys,
        ode_method=method,
    )


@pytest.mark.parametrize(
    "name,method",
    [("flow_sde", "euler"), ("flow_sde", "heun"), ("dance_sde", "euler"), ("cps", "heun")],
)
def test_one_program_serves_every_window_position(name, method):
    traces = []

    def velocity(x, index):
        traces.append(index)
        return _wavy_velocity(x, index)

    run = jax.jit(functools.partial(_rollout, name=name, method=method, fn=velocity))
    x, keys = _noise(), _keys(4, seed=1)
    for start in (0, 3, 5):
        final, window = run(x, start, keys=keys)
        np.testing.assert_array_equal(window.index, [start, start + 1])
        state = _python_ode(x, 0, start, method)
        for row, i in enumerate((start, start + 1)):
            np.testing.assert_allclose(window.x[row], state, atol=1e-5)
            coefficients = dynamics.step_coefficients(name, GRID[i], GRID[i + 1], GRID[1], 0.7)
            mean = coefficients.k_x * state + coefficients.k_v * _wavy_velocity(state, i, np)
            np.testing.assert_allclose(window.mean[row], mean, atol=1e-5)
            np.testing.assert_allclose(window.std[row], coefficients.std, rtol=1e-6)
            draws = np.stack(
                [jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]) for key in keys]
            )
            moments = dynamics.StepMoments(window.mean[row], window.std[row])
            noise = dynamics.step_noise(window.x_next[row], moments)
            np.testing.assert_allclose(noise, draws, atol=1e-4)
            state = np.asarray(mean + coefficients.std * draws)
            np.testing.assert_allclose(window.x_next[row], state, atol=1e-5)
        np.testing.assert_allclose(final, _python_ode(state, start + 2, 8, method), atol=3e-5)
    assert len(traces) == 1, "the model must appear once in one program"


def test_a_shared_prefix_continues_into_the_same_trajectory():
    x, keys = _noise(1), _keys(4, seed=2)
    prefix = sampler.rollout_prefix(_wavy_velocity, x, GRID, window_start=3, ode_method="heun")
    group = jnp.repeat(prefix, 4, axis=0)
    settings = {"dynamics": "flow_sde", "noise_level": 0.7, "window_start": 3, "window_size": 2}
    ours = sampler.rollout(
        _wavy_velocity, group, GRID, keys=keys, ode_method="heun", first=3, **settings
    )
    whole = _rollout(jnp.repeat(x, 4, axis=0), 3, keys=keys, method="heun")
    np.testing.assert_allclose(ours.final, whole.final, atol=1e-5)
    np.testing.assert_array_equal(ours.window.index, whole.window.index)
    np.testing.assert_allclose(ours.window.x, whole.window.x, atol=1e-5)
    assert float(jnp.std(ours.final, axis=0).min()) > 1e-3, "candidates must differ by their noise"


def test_samples_do_not_depend_on_batch_or_devices():
    x, keys = _noise(8), _keys(8, seed=4)
    whole = jax.jit(_rollout)(x, 2, keys=keys)
    order = np.array([5, 0, 7])
    part = jax.jit(_rollout)(x[order], 2, keys=keys[order])
    np.testing.assert_allclose(part.final, whole.final[order], atol=1e-6)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    over = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.jit(_rollout)(jax.device_put(x, over), 2, keys=jax.device_put(keys, over))
    np.testing.assert_allclose(spread.final, whole.final, atol=1e-6)
    np.testing.assert_allclose(spread.window.x_next, whole.window.x_next, atol=1e-6)
    assert spread.final.sharding.spec[0] == "data"


def test_initial_noise_is_standard_and_apart_from_the_steps():
    keys = _keys(300)
    first = np.asarray(sampler.initial_noise(keys, 8, 4))
    step = np.asarray(jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (8, 4)))(keys))
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03
    assert abs(np.corrcoef(first.ravel(), step.ravel())[0, 1]) < 0.03


def test_cps_keeps_the_marginal_of_point_data_and_ends_on_it():
    """For point data x_σ = (1 − σ)·point + σ·ε exactly, at every step and noise level."""
    x = _noise(600, seed=5)
    keys = _keys(600, seed=6)
    velocity = functools.partial(_point_mass_velocity, jnp.asarray(GRID))
    final, window = _rollout(x, 0, keys=keys, name="cps", size=7, level=0.8, fn=velocity)
    np.testing.assert_allclose(final, POINT, atol=1e-5)
    for row in range(7):
        t = GRID[row + 1]
        noise = (np.asarray(window.x_next[row]) - (1 - t) * POINT) / t
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.04


def _gaussian_marginal(name, grid, level, mean=0.4, variance=0.25):
    """Mean and std that the steps of a grid lead to, from N(0, 1), when data are Gaussian."""
    m, var = 0.0, 1.0
    for i in range(len(grid) - 1):
        t = float(grid[i])
        slope, shift = (float(_gaussian_velocity(np.asarray(grid), x, i)) for x in (1.0, 0.0))
        k_x, k_v, std, _ = map(
            float, dynamics.step_coefficients(name, t, grid[i + 1], grid[1], level)
        )
        m = k_x * m + k_v * ((slope - shift) * m + shift)
        var = (k_x + k_v * (slope - shift)) ** 2 * var + std**2
    return m, np.sqrt(var)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_sde_marginals_approach_the_odes_as_steps_grow(name):
    """Gaussian data N(0.4, 0.5²): an SDE ends there only in the limit of many steps."""

    def gap(steps):
        mean, std = _gaussian_marginal(name, schedule.sigma_grid(steps, 1.0), 0.7)
        return abs(mean - 0.4) + abs(std - 0.5)

    assert gap(6) > 0.03 and gap(96) < 0.004 and gap(96) < gap(6) / 10


def test_cps_narrows_gaussian_data_at_any_number_of_steps():
    """It mixes the model's mean of the data with its mean of the noise, which vary too little."""
    for steps in (6, 96, 960):
        grid = schedule.sigma_grid(steps, 1.0)
        _, plain = _gaussian_marginal("cps", grid, 0.0)
        mean, std = _gaussian_marginal("cps", grid, 0.7)
        _, wilder = _gaussian_marginal("cps", grid, 0.9)
        assert abs(mean - 0.4) < 1e-3
        assert wilder < std - 0.01 and std < plain - 0.02 and plain < 0.5 + 1e-3


MIXTURE = ((0.3, -1.0, 0.15), (0.7, 0.8, 0.3))  # weight, mean, std


def _mixture_velocity(sigmas, x, index):
    """The exact flow for a mixture of Gaussians: E[ε − x₀ | x], each part by its odds."""
    t = sigmas[index]
    odds, velocities = [], []
    for weight, mean, std in MIXTURE:
        variance = ((1 - t) * std) ** 2 + t**2
        off = x - (1 - t) * mean
        odds.append(jnp.log(weight / jnp.sqrt(variance)) - off**2 / (2 * variance))
        velocities.append((t - (1 - t) * std**2) / variance * off - mean)
    return jnp.sum(jax.nn.softmax(jnp.stack(odds), axis=0) * jnp.stack(velocities), axis=0)


def _distance_to_the_mixture(name, level, steps):
    """Mean distance of the sorted scalars of a simulation to the data's quantiles, and its std."""
    grid = jnp.asarray(schedule.sigma_grid(steps, 1.0))
    velocity = functools.partial(_mixture_velocity, grid)
    x = jax.random.normal(jax.random.key(9), (32, 32, 32))
    settings = {"dynamics": name, "noise_level": level, "window_start": 0, "window_size": steps - 1}
    run = functools.partial(sampler.rollout, velocity, sigmas=grid, **settings)
    found = np.sort(np.ravel(jax.jit(run)(x=x, keys=_keys(32, seed=10)).final))
    axis = np.linspace(-3, 3, 6001)
    below = sum(weight * norm.cdf(axis, mean, std) for weight, mean, std in MIXTURE)
    wanted = np.interp((np.arange(found.size) + 0.5) / found.size, below, axis)
    return np.abs(found - wanted).mean(), found.std() / wanted.std()


@pytest.mark.parametrize(("name", "level"), [("flow_sde", 0.7), ("dance_sde", 0.5)])
def test_simulated_sdes_end_in_the_data_as_steps_grow(name, level):
    """Of two modes: both their weights and their widths are right only in the limit."""
    coarse, fine = (_distance_to_the_mixture(name, level, steps)[0] for steps in (8, 96))
    assert coarse > 0.03 and fine < 0.012 and fine < coarse / 4


def test_simulated_cps_stays_narrower_than_the_data():
    found = [_distance_to_the_mixture("cps", 0.6, steps) for steps in (8, 96)]
    assert all(distance > 0.05 and spread < 0.97 for distance, spread in found)


def test_rollouts_have_the_marginal_that_their_steps_imply():
    velocity = functools.partial(_gaussian_velocity, jnp.asarray(GRID))
    x, keys = _noise(1200, seed=7), _keys(1200, seed=8)
    final, _ = jax.jit(functools.partial(_rollout, size=7, level=0.7, fn=velocity))(x, 0, keys=keys)
    mean, std = _gaussian_marginal("flow_sde", GRID, 0.7)
    assert abs(std - 0.5) > 0.02, "eight steps must be few enough to tell from the limit"
    assert abs(float(final.mean()) - mean) < 0.012
    assert abs(float(final.std()) - std) < 0.01


@pytest.mark.parametrize(
    "name,window_range,size,level",
    [
        ("cps", (0, 8), 2, 0.8),  # cps is silent on the last step
        ("ode", (0, 5), 2, 0.7),
        ("flow_sde", (0, 5), 2, 0.0),
        ("dance_sde", (0, 5), 2, float("nan")),
        ("cps", (0, 5), 2, 1.5),
        ("flow_sde", (0, 9), 2, 0.7),  # beyond the grid
        ("flow_sde", (-1, 5), 2, 0.7),
        ("flow_sde", (3, 4), 2, 0.7),  # narrower than the window
        ("flow_sde", (0, 5), 0, 0.7),
    ],
)
def test_windows_that_cannot_be_trained_are_refused(name, window_range, size, level):
    with pytest.raises(ValueError, match="please"):
        sampler.validate_window(
            name, GRID, window_range=window_range, window_size=size, noise_level=level
        )


@pytest.mark.parametrize(
    "name,window_range,level",
    [("flow_sde", (0, 8), 1.2), ("dance_sde", (0, 8), 0.3), ("cps", (0, 7), 1.0)],
)
def test_trainable_windows_are_accepted(name, window_range, level):
    sampler.validate_window(name, GRID, window_range=window_range, window_size=2, noise_level=level)


def test_window_starts_cover_the_range():
    assert list(sampler.window_starts((0, 5), 2)) == [0, 1, 2, 3]
    assert list(sampler.window_starts((4, 6), 2)) == [4]


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'rk4' is unknown; please use 'euler' or 'heun'"):
        sampler.sample(_wavy_velocity, _noise(), GRID, "rk4")

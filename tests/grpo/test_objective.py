"""The objective against float64 log-probabilities, and its gradients against finite identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_jax.flow import dynamics, schedule
from sl_jax.grpo import objective

GRID = schedule.sigma_grid(10, 1.3)
B, N, C = 4, 6, 5
D = N * C


def _coefficients(step=3, name="flow_sde", level=0.8):
    return dynamics.step_coefficients(name, GRID[step], GRID[step + 1], GRID[1], level)


def _case(seed=0, change=0.05, coefficients=None):
    """x, x', the old velocity and a changed one; x' drawn with known noise from the old mean."""
    rng = np.random.default_rng(seed)
    coefficients = coefficients or _coefficients()
    x, old, noise, direction = rng.normal(size=(4, B, N, C)).astype(np.float32)
    moments = dynamics.step_moments(coefficients, jnp.asarray(x), jnp.asarray(old))
    x_next = np.asarray(dynamics.next_latents(moments, noise))
    return {"x": x, "x_next": x_next, "velocity_old": old}, old + np.float32(change) * direction


def _log_probs_64(case, velocity, coefficients):
    k_x, k_v, std, _ = (np.float64(c) for c in coefficients)
    mean = k_x * case["x"] + k_v * np.float64(velocity)
    squares = (case["x_next"] - mean) ** 2 / (2 * std**2)
    return (-squares - np.log(std) - 0.5 * np.log(2 * np.pi)).mean(axis=(1, 2))


_policy_objective = jax.jit(objective.policy_objective, static_argnames=("config", "truncate"))


def _objective(velocity, case, config=None, coefficients=None, truncate=False, **given_arrays):
    arrays = {"advantage": jnp.ones(B), "weight": jnp.full(B, 1 / B), **given_arrays}
    return _policy_objective(
        jnp.asarray(velocity),
        coefficients=coefficients or _coefficients(),
        config=config or objective.ObjectiveConfig(),
        truncate=truncate,
        **{name: jnp.asarray(value) for name, value in (case | arrays).items()},
    )


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("step,change", [(0, 0.3), (3, 1e-2), (7, 0.1)])
def test_plain_is_the_difference_of_two_log_probabilities(name, step, change):
    coefficients = _coefficients(step, name)
    case, velocity = _case(step, change, coefficients)
    expected = _log_probs_64(case, velocity, coefficients) - _log_probs_64(
        case, case["velocity_old"], coefficients
    )
    config = objective.ObjectiveConfig(ratio="plain")
    _, metrics = _objective(velocity, case, config, coefficients)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(metrics.log_ratio, expected, rtol=1e-4, atol=3e-5 * scale)
    np.testing.assert_allclose(metrics.ratio_excess, np.expm1(expected), rtol=1e-3)


def test_ratio_kinds_are_the_stated_rescalings():
    coefficients = _coefficients(5, "cps")
    case, velocity = _case(1, 0.02, coefficients)
    k_x, k_v, std, _ = (np.float64(c) for c in coefficients)
    old_mean = k_x * case["x"] + k_v * case["velocity_old"]
    noise = (case["x_next"] - old_mean) / std
    delta = k_v * (np.float64(velocity) - case["velocity_old"])
    along = (noise * delta).mean(axis=(1, 2))
    expected = {
        "plain": along / std - (delta**2).mean(axis=(1, 2)) / (2 * std**2),
        "guard": along,
        "velocity": np.sqrt(D) * along / abs(k_v),
        "cps_public_ratio": 2 * std * along - (delta**2).mean(axis=(1, 2)),
    }
    for kind, value in expected.items():
        config = objective.ObjectiveConfig(ratio=kind)
        _, metrics = _objective(velocity, case, config, coefficients)
        np.testing.assert_allclose(metrics.log_ratio, value, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("step,tokens", [(0, 4), (2, 64), (8, 1024)])
def test_velocity_ratio_spreads_alike_at_any_step_and_size(step, tokens):
    rng = np.random.default_rng(step)
    noise = jnp.asarray(rng.normal(size=(400, tokens, 4)), jnp.float32)
    change = jnp.asarray(1e-3 * rng.choice([-1.0, 1.0], size=(1, tokens, 4)), jnp.float32)
    ratios = objective.log_ratio("velocity", noise, change, _coefficients(step))
    assert abs(float(ratios.std()) / 1e-3 - 1) < 0.12
    assert abs(float(ratios.mean())) < 2e-4


@pytest.mark.parametrize("kind", objective.RATIOS)
def test_first_update_has_ratio_one_and_the_policy_gradient(kind):
    case, _ = _case(2)
    advantage = jnp.asarray([1.5, -0.5, 0.0, 7.0])
    weight = jnp.asarray([0.1, 0.4, 0.3, 0.2])
    config = objective.ObjectiveConfig(ratio=kind, clip_low=1e-6, clip_high=1e-6)

    def loss(velocity):
        return _objective(velocity, case, config, advantage=advantage, weight=weight)

    def weighted_log_ratio(velocity):
        moments = dynamics.step_moments(
            _coefficients(), jnp.asarray(case["x"]), jnp.asarray(case["velocity_old"])
        )
        noise = dynamics.step_noise(jnp.asarray(case["x_next"]), moments)
        delta = velocity - case["velocity_old"]
        ratios = objective.log_ratio(kind, noise, delta, _coefficients())
        return -jnp.sum(weight * jnp.clip(advantage, -5, 5) * ratios)

    velocity = jnp.asarray(case["velocity_old"])
    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(velocity)
    for zero in (metrics.log_ratio, metrics.ratio_excess, metrics.surrogate_gain, metrics.kl_old):
        np.testing.assert_array_equal(zero, 0.0)
    expected = jax.jit(jax.grad(weighted_log_ratio))(velocity)
    assert float(jnp.abs(expected).max()) > 0
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)


def test_the_same_velocity_may_serve_as_old_one():
    case, _ = _case(3)
    own = jax.grad(lambda v: _objective(v, case)[0])(jnp.asarray(case["velocity_old"]))

    def both(velocity):
        return _objective(velocity, case | {"velocity_old": velocity})[0]

    np.testing.assert_array_equal(jax.grad(both)(jnp.asarray(case["velocity_old"])), own)


@jax.jit
def _surrogate_and_gradient(excess, advantage, low, high):
    def total(excess):
        gain = objective.clipped_surrogate(excess, advantage, low, high)
        return gain.sum(), gain

    gradient, gain = jax.grad(total, has_aux=True)(excess)
    return gain, gradient


def _floats(low, high):
    values = st.floats(low, high, width=32, allow_subnormal=False)
    return st.lists(values, min_size=8, max_size=8).map(np.float64)


@settings(max_examples=60, deadline=None)
@given(_floats(-0.875, 3.0), _floats(-5, 5), _floats(2**-10, 0.5), _floats(2**-10, 0.5))
def test_surrogate_is_the_pessimistic_of_clipped_and_unclipped(excess, advantage, low, high):
    ratio = 1 + excess
    expected = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high))
    gain, gradient = _surrogate_and_gradient(*map(jnp.float32, (excess, advantage, low, high)))
    np.testing.assert_allclose(gain - advantage, expected, rtol=1e-5, atol=1e-5)
    stopped = np.where(advantage > 0, excess > high, excess < -low)
    inside = np.minimum(np.abs(excess - high), np.abs(excess + low)) > 1e-4
    wanted = np.where(stopped, 0.0, -advantage)
    np.testing.assert_allclose(gradient[inside], wanted[inside], rtol=1e-5, atol=1e-30)


def test_tiny_ratios_keep_their_digits():
    """A log ratio near 1e-9 is nothing beside 1 in float32, yet gain and excess must show it."""
    case, _ = _case(4)
    velocity = case["velocity_old"].astype(np.float32)
    changed = np.nextafter(velocity, np.float32(np.inf))
    config = objective.ObjectiveConfig(ratio="guard", clip_low=1e-6, clip_high=1e-6)
    _, metrics = _objective(changed, case, config, advantage=jnp.full(B, 2.0))
    k_x, k_v, std, _ = (np.float64(c) for c in _coefficients())
    noise = (case["x_next"] - k_x * case["x"] - k_v * np.float64(velocity)) / std
    change = np.float64(changed) - velocity
    expected = k_v * (noise * change).mean(axis=(1, 2))
    assert np.abs(expected).max() < 1e-7
    np.testing.assert_allclose(metrics.ratio_excess, expected, rtol=1e-3, atol=1e-13)
    np.testing.assert_allclose(metrics.surrogate_gain, -2.0 * expected, rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("truncate", [False, True])
def test_clip_metrics_and_stopped_gradients(truncate):
    case, _ = _case(5)
    coefficients = _coefficients()
    moments = dynamics.step_moments(
        coefficients, jnp.asarray(case["x"]), jnp.asarray(case["velocity_old"])
    )
    noise = dynamics.step_noise(jnp.asarray(case["x_next"]), moments)
    # Along the noise the ratio rises where k_v·δv has its sign: samples 0, 1 rise, 2, 3 fall.
    sign = jnp.asarray([1.0, 1.0, -1.0, -1.0])[:, None, None]
    velocity = case["velocity_old"] - 0.1 * sign * noise
    advantage = jnp.asarray([1.0, -1.0, 1.0, -1.0])

    def loss(velocity):
        return _objective(velocity, case, advantage=advantage, truncate=truncate)

    gradient, metrics = jax.grad(loss, has_aux=True)(velocity)
    np.testing.assert_array_equal(metrics.clipped_high, [1, 1, 0, 0])
    np.testing.assert_array_equal(metrics.clipped_low, [0, 0, 1, 1])
    moved = np.abs(gradient).max(axis=(1, 2)) > 0
    # Truncated, samples that their advantage would bring back have no gradient either.
    np.testing.assert_array_equal(moved, [False, not truncate, not truncate, False])
    np.testing.assert_array_equal(metrics.truncated, [float(truncate)] * 4)
    np.testing.assert_allclose(metrics.surrogate_gain[0], -1e-2, rtol=1e-5)
    if truncate:
        np.testing.assert_allclose(metrics.surrogate_gain, [-1e-2, 1e-2, 1e-2, -1e-2], rtol=1e-5)


def test_within_the_clip_range_truncation_changes_nothing():
    case, velocity = _case(11, change=1e-3)
    weighted = {"advantage": jnp.asarray([1.0, -2.0, 0.5, -0.1])}
    found = [
        jax.value_and_grad(
            lambda v, truncate=truncate: _objective(v, case, truncate=truncate, **weighted),
            has_aux=True,
        )(velocity)
        for truncate in (False, True)
    ]
    assert np.abs(found[0][0][1].ratio_excess).max() < 1e-2
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_log_ratio_limit_saturates_and_is_counted():
    case, velocity = _case(6, change=3.0)
    config = objective.ObjectiveConfig(ratio="plain", log_ratio_limit=0.5)
    _, metrics = _objective(velocity, case, config)
    assert float(metrics.saturated.sum()) >= 1
    assert float(jnp.abs(metrics.log_ratio).max()) <= 0.5


@pytest.mark.parametrize("inverse_dt", [False, True])
def test_loss_is_the_weighted_sum_of_its_parts(inverse_dt):
    case, velocity = _case(7, 0.01)
    reference = velocity + 0.03
    config = objective.ObjectiveConfig(kl_weight=0.7, inverse_dt_weight=inverse_dt)
    weight = jnp.asarray([0.1, 0.0, 0.5, 0.4])
    advantage = jnp.asarray([2.0, 9.0, -1.0, -8.0])
    loss, metrics = _objective(
        velocity,
        case,
        config,
        advantage=advantage,
        weight=weight,
        velocity_reference=reference,
    )
    _, k_v, std, dt = (float(c) for c in _coefficients())
    np.testing.assert_allclose(
        metrics.kl_reference, (k_v * 0.03) ** 2 / (2 * std**2) * np.ones(B), rtol=1e-4
    )
    cut = np.clip(advantage, -5, 5)
    ratio = 1 + np.float64(metrics.ratio_excess)
    clipped = np.maximum(-cut * ratio, -cut * np.clip(ratio, 0.99, 1.01))
    per_sample = clipped * (1 / -dt if inverse_dt else 1.0)
    np.testing.assert_allclose(metrics.policy_loss, per_sample, rtol=1e-5)
    expected = (weight * (per_sample + 0.7 * metrics.kl_reference)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_kl_weight_halves_every_so_many_epochs():
    constant, halving = (objective.ObjectiveConfig(kl_half_life=x) for x in (None, 10.0))
    assert [constant.kl_left(epoch) for epoch in (0, 50)] == [1.0, 1.0]
    assert [halving.kl_left(epoch) for epoch in (0, 10, 20)] == [1.0, 0.5, 0.25]
    case, velocity = _case(7, 0.01)
    losses = [
        _objective(
            velocity,
            case,
            objective.ObjectiveConfig(kl_weight=weight),
            velocity_reference=velocity + 0.03,
            kl_left=left,
        )[0]
        for weight, left in ((0.8, 0.25), (0.2, 1.0), (0.8, 1.0))
    ]
    assert losses[0] == pytest.approx(float(losses[1])) and losses[0] < losses[2]


def test_kl_gradient_pulls_towards_the_reference():
    case, velocity = _case(8, 0.01)
    config = objective.ObjectiveConfig(kl_weight=1.0)
    gradient = jax.grad(
        lambda v: _objective(
            v, case, config, advantage=jnp.zeros(B), velocity_reference=velocity - 0.2
        )[0]
    )(jnp.asarray(velocity))
    _, k_v, std, _ = (float(c) for c in _coefficients())
    expected = (k_v / std) ** 2 * 0.2 / (D * B)
    np.testing.assert_allclose(gradient, np.full((B, N, C), expected), rtol=1e-4)


def test_micro_batches_of_mixed_steps_sum_to_the_whole():
    steps = np.array([1, 6, 3, 8])
    rows = dynamics.step_coefficients("flow_sde", GRID[steps], GRID[steps + 1], GRID[1], 0.8)
    case, velocity = _case(9, 0.02, rows)
    advantage = jnp.asarray([1.0, -2.0, 0.5, 0.3])
    weight = jnp.asarray([0.25, 0.35, 0.3, 0.1])
    config = objective.ObjectiveConfig(inverse_dt_weight=True)

    def part(velocity, rows_used):
        picked = jax.tree.map(lambda a: jnp.asarray(a)[rows_used], (case, rows))
        arrays = {"advantage": advantage[rows_used], "weight": weight[rows_used]}
        return _objective(velocity[rows_used], picked[0], config, picked[1], **arrays)[0]

    grad = jax.jit(jax.value_and_grad(part))
    velocity = jnp.asarray(velocity)
    whole, whole_gradient = grad(velocity, np.arange(4))
    parts = [grad(velocity, np.array(p)) for p in ([2, 0], [1], [3])]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1] for p in parts), whole_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "velocity", "cps_public_ratio"])
def test_token_mask_equals_the_slice_of_trained_tokens(kind):
    case, velocity = _case(10, 0.02)
    config = objective.ObjectiveConfig(ratio=kind, kl_weight=0.3)
    mask = np.array([0, 0, 1, 1, 1, 1], bool)
    reference = velocity + 0.01

    def masked(velocity):
        arrays = {"velocity_reference": reference, "token_mask": mask}
        return _objective(velocity, case, config, **arrays)

    sliced_case = {name: value[:, 2:] for name, value in case.items()}
    loss, metrics = _objective(
        velocity[:, 2:], sliced_case, config, velocity_reference=reference[:, 2:]
    )
    run = jax.jit(jax.value_and_grad(masked, has_aux=True))
    (masked_loss, masked_metrics), gradient = run(jnp.asarray(velocity))
    np.testing.assert_allclose(masked_loss, loss, rtol=1e-5)
    for ours, theirs in zip(masked_metrics, metrics, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, :2], 0.0)


def test_half_precision_velocities_differ_in_float32():
    case, velocity = _case(11, 0.05)
    low = {**case, "velocity_old": jnp.asarray(case["velocity_old"], jnp.bfloat16)}
    loss, metrics = _objective(jnp.asarray(velocity, jnp.bfloat16), low)
    assert loss.dtype == jnp.float32 and all(m.dtype == jnp.float32 for m in metrics)
    same = _objective(low["velocity_old"], low)[1]
    np.testing.assert_array_equal(same.log_ratio, 0.0)


def test_rollout_mismatch_is_on_the_scale_of_the_ratio():
    case, velocity = _case(12, 0.01)
    coefficients = _coefficients()
    moments = dynamics.step_moments(coefficients, jnp.asarray(case["x"]), jnp.asarray(velocity))
    arrays = {name: jnp.asarray(value) for name, value in case.items()}
    ours = objective.rollout_mismatch("velocity", moments.mean, coefficients=coefficients, **arrays)
    _, metrics = _objective(velocity, case)
    np.testing.assert_allclose(ours.log_ratio, metrics.log_ratio, rtol=1e-3, atol=1e-6)
    old = dynamics.step_moments(coefficients, arrays["x"], arrays["velocity_old"])
    expected = np.abs(moments.mean - old.mean).mean(axis=(1, 2)) / coefficients.std
    np.testing.assert_allclose(ours.distance, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": "sequence"},
        {"clip_low": 0.0},
        {"clip_high": -1.0},
        {"kl_weight": -0.1},
        {"kl_half_life": 0.0},
    ],
)
def test_unusable_configs_are_named(change):
    with pytest.raises(ValueError, match="please"):
        dataclasses.replace(objective.ObjectiveConfig(), **change)


def test_kl_without_a_reference_is_refused():
    case, velocity = _case()
    with pytest.raises(ValueError, match="please pass velocity_reference"):
        _objective(velocity, case, objective.ObjectiveConfig(kl_weight=0.1))

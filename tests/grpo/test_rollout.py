"""Rollouts: one program, noise by group and candidate, nothing by device or batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.grpo import rollout as module
from sl_jax.grpo.rollout import Rollout

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def traces():
    return []


@pytest.fixture(scope="module")
def rollout(bench, traces):
    """A rollout that notes each time that its program is traced."""
    rows = module.modulation_rows

    def noted(*args):
        traces.append(args)
        return rows(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "modulation_rows", noted)
        yield Rollout(bench.pipeline, bench.config, bench.layout)


def _close(first, second):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), first, second
    )


def test_one_program_serves_every_window_position(bench, rollout, traces):
    finals = []
    for start in (0, 1, 2):
        candidates = rollout(bench.adapter, bench.pictures(), start, bench.grid)
        assert list(candidates.window.index) == [start, start + 1]
        finals.append(np.asarray(candidates.latents))
    # Another adapter and other pictures are other arguments of the same program, too.
    rollout(bench.fresh, bench.pictures(1), 0, bench.grid)
    assert len(traces) == 1
    assert not np.allclose(finals[0], finals[1], atol=1e-2)


def test_candidates_of_a_group_share_all_before_the_window(bench, rollout):
    window = rollout(bench.adapter, bench.pictures(), 1, bench.grid).window
    x, x_next = (
        np.asarray(field[0]).reshape(bench.groups, bench.config.group_size, -1)
        for field in (window.x, window.x_next)
    )
    assert np.array_equal(x[:, 0], x[:, 1])
    assert len(np.unique(x[:, 0, 0])) == bench.groups
    noise = (x_next - np.asarray(window.mean[0]).reshape(x.shape)) / window.std[0]
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_steps_draw_noise_of_their_own(bench, rollout):
    window = rollout(bench.adapter, bench.pictures(), 1, bench.grid).window
    noise = (window.x_next - window.mean) / window.std[:, None, None, None]
    first, second = np.asarray(noise).reshape(2, -1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert np.array_equal(window.x[1], window.x_next[0])


def test_a_group_does_not_depend_on_its_batch(bench, rollout):
    one, other = bench.pictures(), bench.pictures(1)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([b[:3], a[:5]]), one, other)
    alone = rollout(bench.adapter, one, 1, bench.grid)
    among = rollout(bench.adapter, mixed, 1, bench.grid)
    size = bench.config.group_size
    _close(alone.latents[: 5 * size], among.latents[3 * size :])
    _close(alone.window.x_next[:, : 5 * size], among.window.x_next[:, 3 * size :])


def test_latents_do_not_depend_on_the_devices(bench, wide_bench, rollout):
    assert len(wide_bench.layout.mesh.devices.flat) == 8
    wide = Rollout(wide_bench.pipeline, wide_bench.config, wide_bench.layout)
    found = wide(wide_bench.adapter, wide_bench.pictures(), 1, wide_bench.grid)
    wanted = rollout(bench.adapter, bench.pictures(), 1, bench.grid)
    _close(found.latents, wanted.latents)
    _close(found.window, wanted.window)


def test_steps_outside_the_window_go_as_configured(bench, rollout):
    """After it; and before it, where the candidates of a group share them."""
    config = dataclasses.replace(bench.config, ode_method="heun")
    other = Rollout(bench.pipeline, config, bench.layout)
    from_first, from_second = (
        [rolled(bench.adapter, bench.pictures(), start, bench.grid) for rolled in (rollout, other)]
        for start in (0, 1)
    )
    euler, heun = from_first
    _close(heun.window, euler.window)
    assert np.abs(heun.latents - euler.latents).max() > 1e-3
    euler, heun = from_second
    assert np.abs(heun.window.x[0] - euler.window.x[0]).max() > 1e-3


@pytest.mark.slow
def test_independent_candidates_share_nothing(bench):
    config = dataclasses.replace(bench.config, group_noise="independent")
    rolled = Rollout(bench.pipeline, config, bench.layout)
    window = rolled(bench.adapter, bench.pictures(), 0, bench.grid).window
    x = np.asarray(window.x[0]).reshape(bench.groups, config.group_size, -1)
    assert abs(np.corrcoef(x[:, 0].ravel(), x[:, 1].ravel())[0, 1]) < 0.05


def test_a_measurement_may_share_noise_where_the_run_does_not(bench):
    """And by the run's own program where it does."""
    shared = Rollout(bench.pipeline, bench.config, bench.layout)
    assert shared.with_shared_noise is shared
    config = dataclasses.replace(bench.config, group_noise="independent")
    other = Rollout(bench.pipeline, config, bench.layout).with_shared_noise
    assert other._config == bench.config and other.group_size == bench.config.group_size


@pytest.mark.slow
@pytest.mark.parametrize("group_noise", ["shared", "independent"])
def test_the_size_of_a_batch_changes_nothing(bench, group_noise):
    config = dataclasses.replace(bench.config, group_noise=group_noise, ode_method="heun")
    rolled = Rollout(bench.pipeline, config, bench.layout)
    pictures = bench.pictures()
    whole = rolled(bench.adapter, pictures, 1, bench.grid)
    halves = [
        rolled(bench.adapter, jax.tree.map(lambda x, p=part: x[p], pictures), 1, bench.grid)
        for part in (slice(0, 4), slice(4, 8))
    ]
    _close(whole.latents, jnp.concatenate([half.latents for half in halves]))
    _close(whole.window.x, jnp.concatenate([half.window.x for half in halves], axis=1))


@pytest.mark.parametrize(
    ("group_noise", "wide"),
    [("shared", False), pytest.param("independent", True, marks=pytest.mark.slow)],
)
def test_large_candidates_one_by_one_are_those_of_all_together(
    bench, wide_bench, group_noise, wide
):
    """One at a time, of every group, as those of large pictures are."""
    chosen = wide_bench if wide else bench
    config = dataclasses.replace(chosen.config, group_noise=group_noise, ode_method="heun")
    together, apart = (Rollout(chosen.pipeline, config, chosen.layout) for _ in range(2))
    assert not together.one_by_one(bench.grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_TOKENS", 0)
        assert apart.one_by_one(bench.grid)
        found = apart(chosen.adapter, chosen.pictures(), 1, chosen.grid)
    wanted = together(chosen.adapter, chosen.pictures(), 1, chosen.grid)
    _close(found.latents, wanted.latents)
    _close(found.window, wanted.window)
    _close(found.condition, wanted.condition)
    assert found.finite.all() and found.latents.sharding == wanted.latents.sharding


def test_layers_come_in_order_without_frame_zero(bench, rollout):
    latents = rollout(bench.adapter, bench.pictures(), 1, bench.grid).latents
    layers = rollout.decode(latents, bench.grid).layers
    assert layers.shape == (bench.groups * bench.config.group_size, 2, 32, 16, 4)
    tokens = bench.grid.frame_tokens
    changed = latents.at[:, :tokens].set(9.0)  # frame 0 is the whole picture
    assert np.array_equal(layers, rollout.decode(changed, bench.grid).layers)
    swapped = jnp.concatenate(
        [latents[:, :tokens], latents[:, 2 * tokens :], latents[:, tokens : 2 * tokens]], 1
    )
    assert np.array_equal(layers[:, ::-1], rollout.decode(swapped, bench.grid).layers)

"""A run that is not well says so, and stops where it does not recover."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from sl_jax.grpo.config import HealthConfig
from sl_jax.grpo.health import IN_A_ROW, Health
from sl_jax.training.health import NotFiniteError


def _advantages(effective=1, tied=0):
    return [SimpleNamespace(effective_groups=effective, tied_groups=tied)]


def test_updates_in_a_row_are_counted_over_epochs_and_restarts():
    health = Health(HealthConfig(not_finite=3))
    counts = [health.look(u, _advantages())[IN_A_ROW] for u in ([True, False], [False, None])]
    assert counts == [1, 2]
    health.require()
    again = Health(HealthConfig(not_finite=3))
    again.restore(health.position())
    assert again.look([False], _advantages())[IN_A_ROW] == 3
    with pytest.raises(NotFiniteError, match=r"3 updates in a row .* not_finite .* checkpoint"):
        again.require()
    assert again.look([True, None], _advantages())[IN_A_ROW] == 0
    again.require()


def test_a_good_update_after_too_many_that_are_not_finite_does_not_undo_them():
    """Within an epoch, whether or not they began in the one before, and a run went on between."""
    health = Health(HealthConfig(not_finite=3))
    assert health.look([True, False, False], _advantages())[IN_A_ROW] == 2
    health.require()
    again = Health(HealthConfig(not_finite=3))
    again.restore(health.position())
    assert again.look([False, True, False], _advantages())[IN_A_ROW] == 3
    with pytest.raises(NotFiniteError, match="3 updates"):
        again.require()
    assert again.position()["not_finite"] == 1
    assert again.look([False, True], _advantages())[IN_A_ROW] == 2
    again.require()


@pytest.mark.parametrize(("last", "tries"), [([], 1), ([True], 3)])
def test_started_again_a_run_has_the_tries_that_its_last_update_left(last, tries):
    health = Health(HealthConfig(not_finite=3))
    health.look([False, False, False, *last], _advantages())
    with pytest.raises(NotFiniteError, match="3 updates"):
        health.require()
    again = Health(HealthConfig(not_finite=3))
    again.restore(health.position())
    for number in range(1, tries + 1):
        again.look([False], _advantages())
        with pytest.raises(NotFiniteError) if number == tries else contextlib.nullcontext():
            again.require()


def test_started_again_a_run_is_not_ended_by_an_epoch_without_updates():
    health = Health(HealthConfig(not_finite=2))
    health.look([False, False], _advantages())
    again = Health(HealthConfig(not_finite=2))
    again.restore(health.position())
    assert again.look([None, None], _advantages())[IN_A_ROW] == 2
    again.require()
    again.look([False], _advantages())
    with pytest.raises(NotFiniteError, match="3 updates"):
        again.require()


def test_rewards_without_spread_are_said_once_per_time(caplog):
    health = Health(HealthConfig(tied_epochs=2))
    said = []
    for effective, tied in ((0, 4), (0, 4), (0, 4), (1, 3), (0, 4), (0, 4), (0, 0)):
        health.warn(health.look([None], _advantages(effective, tied)))
        said.append("rewards have differed" in caplog.text)
        caplog.clear()
    assert said == [False, True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("metric", "name"),
    [("learner/kl_old/all", "kl"), ("learner/clip_fraction/all", "clip_fraction")],
)
def test_drift_is_said_when_it_begins(caplog, metric, name):
    health, said = Health(HealthConfig(kl=0.1, clip_fraction=0.1)), []
    for value in (0.05, 0.2, 0.3, 0.05, 0.2, np.nan):
        health.warn({metric: value})
        said.append(f"config.health.{name} = 0.1" in caplog.text)
        caplog.clear()
    assert said == [False, True, False, False, True, False]

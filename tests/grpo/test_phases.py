"""Seconds, shares and rates of the phases of an epoch."""

from types import SimpleNamespace

import pytest

from sl_jax.grpo import phases as module
from sl_jax.grpo.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def _bar():
    return SimpleNamespace(n=0, total=9, set_description=lambda text: None)


def test_phases_that_are_met_again_add_up(clock):
    phases = Phases(_bar(), peak=100.0)
    for name, end in (("rollout", 2.0), ("learning", 5.0), ("rollout", 8.0)):
        phases.begin(name)
        phases.computed(50.0)
        clock.seconds = end
    found = phases.finish()
    assert found["seconds/rollout"] == 5 and found["seconds/learning"] == 3
    assert found["seconds/all"] == 8
    assert found["share/rollout"] == 5 / 8
    assert found["device/tflops/all"] == pytest.approx(150 / 8 / 1e12)
    assert found["device/mfu/rollout"] == pytest.approx(100 / 5 / 100)
    assert found["device/mfu/learning"] == pytest.approx(50 / 3 / 100)
    assert found["device/mfu/all"] == pytest.approx(150 / 8 / 100)
    assert phases.finish() == {"seconds/all": 0.0}


def test_without_a_known_peak_there_is_no_share_of_it(clock):
    phases = Phases(_bar())
    phases.begin("rollout")
    phases.computed(1e12)
    clock.seconds = 1.0
    found = phases.finish()
    assert found["device/tflops/rollout"] == 1
    assert not [name for name in found if "mfu" in name]

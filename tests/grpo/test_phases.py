"""Seconds, shares and rates of the phases of an epoch."""

from types import SimpleNamespace

import pytest

from sl_jax.grpo import phases as module
from sl_jax.grpo.phases import Phases, Work
from sl_jax.training.status import Unwatched


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def _bar(shown=None):
    show = [].append if shown is None else shown.append
    return SimpleNamespace(n=0, total=9, set_description=show)


def test_phases_that_are_met_again_add_up(clock):
    phases = Phases(_bar(), peak=100.0)
    for name, end in (("rollout", 2.0), ("learning", 5.0), ("rollout", 8.0)):
        phases.begin(name)
        phases.computed(Work(50.0, 30.0, 4))
        clock.seconds = end
    found = phases.finish()
    assert found["seconds/rollout"] == 5 and found["seconds/learning"] == 3
    assert found["seconds/all"] == 8
    assert found["share/rollout"] == 5 / 8
    assert found["device/tflops/all"] == pytest.approx(150 / 8 / 1e12)
    assert found["device/mfu/rollout"] == pytest.approx(100 / 5 / 100)
    assert found["device/mfu/learning"] == pytest.approx(50 / 3 / 100)
    assert found["device/mfu/all"] == pytest.approx(150 / 8 / 100)
    assert found["device/tokens_per_second/rollout"] == pytest.approx(60 / 5)
    assert found["device/tokens_per_second/all"] == pytest.approx(90 / 8)
    assert found["device/candidates_per_second/learning"] == pytest.approx(4 / 3)
    assert found["device/candidates_per_second/all"] == pytest.approx(12 / 8)
    assert phases.finish() == {"seconds/all": 0.0}


def test_without_a_known_peak_there_is_no_share_of_it(clock):
    phases = Phases(_bar())
    phases.begin("rollout")
    phases.computed(Work(1e12))
    clock.seconds = 1.0
    found = phases.finish()
    assert found["device/tflops/rollout"] == 1
    assert not [name for name in found if "mfu" in name or "per_second" in name]


def test_bar_and_status_tell_what_is_done_and_waited_for(clock):
    class Watching(Unwatched):
        told = ()

        def begin(self, phase):
            self.told += (phase,)

        def wait(self, reason):
            self.told += (f"waits: {reason}",)

    shown, status = [], Watching()
    phases = Phases(_bar(shown), status=status)
    phases.begin("judging")
    phases.wait("waiting for the judge")
    phases.wait("")
    phases.begin("learning")
    assert status.told == ("judging", "waits: waiting for the judge", "waits: ", "learning")
    assert shown == [
        *("epoch 1 · judging", "epoch 1 · waiting for the judge", "epoch 1 · judging"),
        "epoch 1 · learning",
    ]

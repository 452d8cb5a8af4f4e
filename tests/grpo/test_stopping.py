"""Updates of an epoch end early where the policy has gone too far, in all processes alike."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged
from small_run import Phases

from sl_jax.grpo import epoch
from sl_jax.grpo.config import (
    AdvantageConfig,
    GrpoConfig,
    HealthConfig,
    LearnerConfig,
    RolloutConfig,
    StopConfig,
)
from sl_jax.grpo.learner import StepReport, UpdateReport
from sl_jax.grpo.metrics import beyond
from sl_jax.grpo.objective import Mismatch, ObjectiveConfig, ObjectiveMetrics
from sl_jax.parallel.interrupts import Terminated
from sl_jax.parallel.processes import Processes

UPDATES = 4


def _report(log_ratio, weight=(0.5, 0.25, 0.0)):
    """Of one step and three samples, the last of which has no weight."""
    values = np.asarray(log_ratio, np.float32)
    zero = np.zeros_like(values)
    known = {
        "log_ratio": values,
        "clipped_low": (values < -0.1).astype(np.float32),
        "clipped_high": (values > 0.1).astype(np.float32),
        "kl_old": values**2,
    }
    objective = ObjectiveMetrics(
        **{name: known.get(name, zero) for name in ObjectiveMetrics._fields}
    )
    return StepReport(np.int32(1), objective, Mismatch(zero, zero), np.asarray(weight))


@pytest.mark.parametrize(
    ("field", "value"), [("kl", 0.03), ("clip_fraction", 2 / 3), ("log_ratio", 0.5 / 3)]
)
def test_each_bound_is_of_a_mean_over_weights(field, value):
    reports = [_report([-0.2, 0.1, 9.0])]
    assert beyond(StopConfig(**{field: 0.99 * value}), reports)
    assert not beyond(StopConfig(**{field: 1.01 * value}), reports)
    assert not beyond(StopConfig(), reports)


class Learner:
    """Moves by a log ratio of 0.02 with each update, and keeps what it was told."""

    def __init__(self):
        self.seen, self.kl_left, self.advantages = [], [], []

    def update(self, state, scored, old, kl_left, *, donate, too_far, between):
        assert (old is None) == (state.adapter.lora["a"][0] == 0) == (not donate)
        self.kl_left.append(kl_left)
        self.advantages += [batch.advantage for batch in scored]
        moved = float(state.adapter.lora["a"][0])
        report = _report([moved] * 3)
        between()
        self.seen.append(moved)
        if too_far is not None and too_far([report]):
            return state, UpdateReport([report], [], None, stopped=True)
        adapter = SimpleNamespace(lora={"a": jnp.full(2, moved + 0.02)})
        changed = SimpleNamespace(adapter=adapter, updates=state.updates + 1, skipped=0)
        return changed, UpdateReport([report], [], None)

    def work(self, scored, old):
        return 1.0


def _epoch(
    monkeypatch,
    learner,
    stop,
    processes=None,
    *,
    number=0,
    reward=(0, 0.25, 0.5, 0.75),
    **fields,
):
    config = GrpoConfig(
        *("", "", 1),
        rollout=RolloutConfig(groups=UPDATES, batch_groups=1, group_size=4),
        learner=LearnerConfig(updates=UPDATES, stop=stop),
        **fields,
    )
    shared = {0: judged(reward, group_id="0")}
    judging = SimpleNamespace(
        metrics=dict, collect=lambda *args: [], share=lambda *args: dict(shared)
    )
    parts = SimpleNamespace(
        config=config,
        rollout=SimpleNamespace(table=lambda grid: None),
        learner=learner,
        judging=judging,
        stream=SimpleNamespace(quarantined={}),
        processes=processes or Processes(),
    )
    batch = epoch.Rolled(None, [("picture", "")], None, None, np.ones((1, 4), bool), {})
    monkeypatch.setattr(epoch, "roll_out", lambda *args: batch)
    monkeypatch.setattr(epoch, "record", lambda *args: None)
    adapter = SimpleNamespace(lora={"a": jnp.zeros(2)})
    state = SimpleNamespace(adapter=adapter, updates=jnp.int32(0), skipped=jnp.int32(0))
    return epoch.Epochs(parts).run(state, number, Phases())


@pytest.mark.parametrize(("bound", "applied"), [(0.03, 2), (0.05, 3), (None, 4), (0.01, 1)])
def test_the_update_that_is_too_far_and_all_after_it_are_left_out(monkeypatch, bound, applied):
    learner = Learner()
    state, metrics = _epoch(monkeypatch, learner, StopConfig(log_ratio=bound))
    assert int(state.updates) == applied
    # The one that found out was computed; later ones were not.
    assert len(learner.seen) == min(applied + 1, UPDATES)
    assert metrics["learner/stopped_updates"] == UPDATES - applied
    assert metrics["learner/log_ratio/all"] == pytest.approx(learner.seen[-1])
    # All groups are judged and counted.
    assert metrics["judge/groups"] == UPDATES


class Apart(Learner):
    """Finds that the rollout took other steps than it does."""

    def update(self, *args, **how):
        state, told = super().update(*args, **how)
        apart = [step.mismatch._replace(log_ratio=np.ones(3)) for step in told.steps]
        steps = [s._replace(mismatch=m) for s, m in zip(told.steps, apart, strict=True)]
        return state, told._replace(steps=steps)


@pytest.mark.parametrize(
    ("learner", "fields", "said"),
    [
        (Learner, {"reward": (1.0, 1.0, 1.0, 1.0)}, "no group's rewards have differed"),
        (Learner, {"health": HealthConfig(kl=1e-5)}, "more than config.health.kl = 1e-05"),
        (Apart, {}, "differ at step 1 of the sampler by a log ratio of 1.0e+00"),
    ],
)
def test_an_epoch_warns_of_what_is_wrong_with_it(monkeypatch, caplog, learner, fields, said):
    well = {"health": HealthConfig(tied_epochs=1, kl=1.0)}
    _epoch(monkeypatch, Learner(), StopConfig(), **well)
    assert caplog.text == ""
    _epoch(monkeypatch, learner(), StopConfig(), **well | fields)
    assert said in caplog.text.replace("\n", " ")


class Follower(Processes):
    """A process whose main one decides otherwise."""

    def __init__(self, decision):
        super().__init__()
        self._decision, self.told = decision, []

    def from_main(self, what, value):
        self.told.append((what, value))
        return self._decision


@pytest.mark.parametrize("decision", [True, False])
def test_the_main_process_decides_for_all(monkeypatch, caplog, decision):
    processes = Follower(decision)
    state, _ = _epoch(monkeypatch, Learner(), StopConfig(log_ratio=0.03), processes)
    assert int(state.updates) == (0 if decision else UPDATES)
    assert ("nothing was learned" in caplog.text) == decision
    assert [what for what, _ in processes.told] == ["bounds of an update"] * (1 if decision else 4)


class Stopped(Processes):
    """A process that hears of another's SIGTERM between the micro-batches of the second update."""

    def all_gather(self, what, value=None, error=None):
        self.heard = [*getattr(self, "heard", []), what]
        if self.heard.count("learning") == 2:
            raise Terminated
        return super().all_gather(what, value, error)


def test_signals_come_between_micro_batches(monkeypatch):
    learner = Learner()
    with pytest.raises(Terminated):
        _epoch(monkeypatch, learner, StopConfig(), Stopped())
    assert len(learner.seen) == 1


@pytest.mark.parametrize(("number", "left"), [(0, 1.0), (10, 0.5), (20, 0.25)])
def test_the_weight_of_the_kl_is_that_of_the_epoch(monkeypatch, number, left):
    learner = Learner()
    objective = ObjectiveConfig(kl_weight=0.1, kl_half_life=10)
    _epoch(monkeypatch, learner, StopConfig(), number=number, objective=objective)
    assert learner.kl_left == [pytest.approx(left)] * UPDATES


@pytest.mark.parametrize(
    ("advantage", "divided_by"),
    [(AdvantageConfig("none"), 1), (AdvantageConfig("group", std_floor=2.0), 2)],
    ids=["none", "floor"],
)
def test_advantages_are_those_of_the_configuration(monkeypatch, advantage, divided_by):
    learner = Learner()
    _epoch(monkeypatch, learner, StopConfig(), advantage=advantage)
    centred = np.array([-0.375, -0.125, 0.125, 0.375])
    np.testing.assert_allclose(learner.advantages, [centred / divided_by] * UPDATES)

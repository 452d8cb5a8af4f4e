"""`max_staleness` 1: an epoch's candidates are under way before the updates of the one before."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import GROUPS, Phases, opened

from sl_jax.grpo.config import LearnerConfig, RolloutConfig
from sl_jax.grpo.epoch import Epochs
from sl_jax.grpo.learner import Learner, Scored, StaleState, UpdateReport
from sl_jax.grpo.metrics import learner_metrics
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Rollout
from sl_jax.training.optimizer import OptimizerConfig

EPOCHS = 4


@pytest.fixture
def run(tmp_path):
    with opened(tmp_path) as parts:
        yield parts


class State(SimpleNamespace):
    def replace(self, **changes):
        return State(**vars(self) | changes)


def _state(number, sampler=None):
    """The state of that many epochs; its adapter is told by its weights."""
    adapter = SimpleNamespace(lora={"a": jnp.full(1, number)})
    return State(
        adapter=adapter,
        sampler=adapter if sampler is None else sampler,
        updates=jnp.int32(2 * number),
        skipped=jnp.int32(0),
    )


def _number(adapter):
    return None if adapter is None else round(2 * float(adapter.lora["a"][0])) / 2


class Watch:
    """A rollout and a learner that note whose adapter they see, in the order of events."""

    def __init__(self, run):
        self.events, self.learned = [], []
        self._rollout = run.rollout

    def __call__(self, adapter, pictures, start, grid):
        self.events.append(("roll out", _number(adapter)))
        return self._rollout(adapter, pictures, start, grid)

    def decode(self, latents, grid):
        return self._rollout.decode(latents, grid)

    def work(self, *args):
        return 1.0

    def table(self, grid):
        return None

    def update(self, state, scored, old, kl_left, *, donate, too_far, between):
        self.events.append(("update", _number(state.adapter), _number(old), donate))
        self.learned.append(np.stack([batch.candidates.latents for batch in scored]))
        moved = SimpleNamespace(lora={"a": state.adapter.lora["a"] + 0.5})
        return state.replace(adapter=moved, updates=state.updates + 1), UpdateReport([], [], None)


def _stale(run, **changes):
    """Parts of a run of several epochs, of two rollout batches and two updates each."""
    rollout = RolloutConfig(groups=2 * GROUPS, batch_groups=GROUPS, max_staleness=1)
    settings = {"rollout": rollout, "learner": LearnerConfig(updates=2), "epochs": EPOCHS}
    parts = SimpleNamespace(**vars(run))
    parts.config = dataclasses.replace(run.config, **settings | changes)
    parts.rollout = parts.learner = Watch(run)
    return parts


def _updates(watch):
    return [event for event in watch.events if event[0] == "update"]


def test_each_epoch_is_rolled_out_before_the_updates_of_the_one_before(run):
    parts = _stale(run)
    epochs, state, staleness = Epochs(parts), _state(0), []
    for epoch in range(EPOCHS):
        state, metrics = epochs.run(state, epoch, Phases())
        staleness.append(metrics["rollout/staleness"])
        assert _number(state.sampler) == epoch and _number(state.adapter) == epoch + 1
    assert staleness == [0, 1, 1, 1]
    first = [("roll out", 0)] * 4 + [("update", 0, None, False), ("update", 0.5, 0, True)]
    others = [
        event
        for epoch in range(1, EPOCHS)
        for event in (
            *[("roll out", epoch)] * (2 if epoch + 1 < EPOCHS else 0),
            # The state that the epoch began with is nobody's to donate: its adapter samples.
            ("update", epoch, epoch - 1, False),
            ("update", epoch + 0.5, epoch - 1, True),
        )
    ]
    assert parts.learner.events == first + others


@pytest.mark.parametrize("cut", [1, 2, EPOCHS])
def test_a_run_that_goes_on_rolls_out_the_same_again(run, cut):
    """Even where pictures are refused while others, drawn before, are under way."""
    whole = _stale(run, epochs=EPOCHS + 1)
    refused = {example.picture_id for example in next(whole.stream).examples[:2]}
    beginning = {"stream": whole.stream.state() | {"step": 0}}

    def lived(parts, first, last, state, position):
        """The state and the position after some epochs."""
        parts.stream.close()
        parts.judge.refused = refused
        epochs = Epochs(parts)
        epochs.restore(position)
        for epoch in range(first, last):
            state, _ = epochs.run(state, epoch, Phases())
        return state, epochs.position()

    end, place = lived(whole, 0, EPOCHS + 1, _state(0), beginning)
    assert set(run.stream.quarantined) == refused
    before = _stale(run, epochs=cut if cut == EPOCHS else EPOCHS + 1)
    state, position = lived(before, 0, cut, _state(0), beginning)
    after = _stale(run, epochs=EPOCHS + 1)
    again, place_again = lived(after, cut, EPOCHS + 1, state, position)
    assert place_again == place and _number(again.adapter) == _number(end.adapter)
    assert _number(again.sampler) == _number(end.sampler)
    updates = _updates(after.learner)
    assert updates == _updates(whole.learner)[2 * cut :]
    # After its first epoch the run does what the undisturbed one does, and asks no more of it.
    shared = after.learner.events[after.learner.events.index(updates[1]) :]
    assert shared == whole.learner.events[-len(shared) :]
    assert len(whole.learner.learned) == 2 * (EPOCHS + 1)
    pairs = zip(after.learner.learned, whole.learner.learned[2 * cut :], strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


def test_samples_outside_the_trust_region_have_no_say(bench):
    """In the first update already: the policy has moved since they were drawn."""
    config = dataclasses.replace(bench.config, max_staleness=1)
    rollout = Rollout(bench.pipeline, config, bench.layout)
    candidates = rollout(bench.fresh, bench.pictures(), 1, bench.grid)
    advantage = np.random.default_rng(0).normal(size=16)
    scored = Scored(
        candidates, rollout.table(bench.grid), advantage, np.full(16, 1 / 16), bench.grid
    )

    learner = Learner(
        *(bench.pipeline, bench.adapter, config),
        ObjectiveConfig(clip_low=1e-9, clip_high=1e-9),
        *(OptimizerConfig(1e-3), LearnerConfig(micro_batch=16), bench.layout),
    )
    start = learner.start(bench.adapter)
    assert isinstance(start, StaleState)
    state, report = learner.update(start, [scored], bench.fresh)
    assert all(np.all(step.objective.log_ratio != 0) for step in report.steps)
    assert all(np.all(step.objective.truncated == 1) for step in report.steps)
    assert float(report.gradient_norm) == 0
    assert learner_metrics([report])["learner/truncated_share"] == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, state.sampler, bench.adapter))

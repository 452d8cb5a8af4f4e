"""Updates: what they change, what they leave, and what they do not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sl_jax.flow.sampler import WindowSteps
from sl_jax.grpo.config import LearnerConfig
from sl_jax.grpo.learner import Learner, Scored
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rollout import Candidates, Rollout
from sl_jax.inference.sampling import Condition
from sl_jax.training.optimizer import OptimizerConfig

SAMPLES = 16


def _learner(bench, micro_batch=16, **objective):
    return Learner(
        bench.pipeline,
        bench.adapter,
        bench.config,
        ObjectiveConfig(**objective),
        OptimizerConfig(1e-3, clip_norm=1e9),
        LearnerConfig(micro_batch=micro_batch),
        bench.layout,
    )


def _scored(bench, candidates):
    """Candidates with random advantages; one sample has no weight."""
    weight = np.full(SAMPLES, 1 / (SAMPLES - 1))
    weight[3] = 0
    advantage = np.random.default_rng(0).normal(size=SAMPLES)
    rollout = Rollout(bench.pipeline, bench.config, bench.layout)
    return Scored(candidates, rollout.table(bench.grid), advantage, weight, bench.grid)


def _rolled(bench):
    rollout = Rollout(bench.pipeline, bench.config, bench.layout)
    return _scored(bench, rollout(bench.adapter, bench.pictures(), 1, bench.grid))


@pytest.fixture(scope="module")
def scored(bench):
    """Made up: to learn from, any steps will do."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    tokens, frame, steps = bench.grid.generated_tokens, bench.grid.frame_tokens, 2
    x = draw(steps, SAMPLES, tokens, 64)
    x_next = 0.9 * x + 0.3 * draw(*x.shape)
    window = WindowSteps(x, x_next, 0.9 * x, jnp.full(steps, 0.3), jnp.arange(1, 1 + steps))
    lengths = jnp.asarray(rng.integers(2, 6, SAMPLES), jnp.int32)
    condition = Condition(draw(SAMPLES, frame, 64), draw(SAMPLES, 5, 64), lengths)
    return _scored(bench, Candidates(x[0], window, condition, jnp.ones(SAMPLES, bool)))


@pytest.fixture(scope="module")
def learner(bench):
    return _learner(bench)


def _gradient(state):
    """The gradient of the first update, from Adam's first moment."""
    return jax.tree.map(lambda mu: np.asarray(mu) / 0.1, optax.tree.get(state.optimizer, "mu"))


def _norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def _same(first, second):
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), first, second)
    return all(jax.tree.leaves(equal))


def _close(found, wanted):
    def check(a, b):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    jax.tree.map(check, found, wanted)


def _log_ratios(reports, steps):
    """[steps, samples], from reports in the order of steps and micro-batches."""
    return np.concatenate([r.objective.log_ratio for r in reports]).reshape(steps, -1)


def test_programs_are_there_before_any_state(bench):
    learner = _learner(bench)
    changed, _ = learner.trace_apply(learner.abstract).out_info
    found, wanted = (
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        for tree in (changed.lora, bench.adapter.lora)
    )
    assert found == wanted


def test_one_update_makes_better_samples_more_likely(bench, scored, learner):
    state, _ = learner.update(learner.start(bench.adapter), [scored])
    _, report = learner.update(state, [scored], bench.adapter)
    moved = _log_ratios(report.steps, steps=2)
    assert moved.shape == (2, SAMPLES)
    assert np.all(scored.weight @ (scored.advantage * moved).T > 0)
    assert np.corrcoef(scored.advantage, moved.mean(axis=0))[0, 1] > 0.5


def test_only_the_adapter_is_differentiated_and_optimized(bench, scored, learner):
    before = jax.tree.map(np.asarray, bench.pipeline.params)
    state, report = learner.update(learner.start(bench.adapter), [scored])
    assert _same(bench.pipeline.params, before)
    weights = sum(x.size for x in jax.tree.leaves(state.adapter.lora))
    counts = 2  # of Adam and of the schedule
    optimizer = sum(x.size for x in jax.tree.leaves(state.optimizer))
    assert optimizer == 2 * weights + counts
    step = next(learner._steps(scored, 0))
    velocity, vjp = learner.velocity(bench.adapter, step, scored.table, bench.grid)
    (cotangent,) = jax.eval_shape(vjp, velocity)
    assert jax.tree.map(np.shape, cotangent) == jax.tree.map(np.shape, bench.adapter.lora)
    gradient = _gradient(state)
    assert report.gradient_norm == pytest.approx(_norm(gradient), rel=1e-5)
    assert [int(index) for index, _ in report.gradient_norms] == [1, 2]
    parts = [float(norm) for _, norm in report.gradient_norms]
    assert min(parts) > 0 and max(parts) <= _norm(gradient) + min(parts) <= sum(parts) + min(parts)
    assert _same(state.adapter.lora_scale, bench.adapter.lora_scale)
    assert _same(state.initial, bench.adapter)


def test_the_average_follows_the_adapter(bench, scored, learner):
    start = learner.start(bench.adapter)
    state, _ = learner.update(start, [scored])
    wanted = jax.tree.map(
        lambda a, b: 0.9 * np.asarray(a) + 0.1 * np.asarray(b),
        bench.adapter.lora,
        state.adapter.lora,
    )
    _close(state.ema.lora, wanted)
    assert not _same(state.ema.lora, bench.adapter.lora)


def test_the_epochs_state_outlives_its_updates(bench, scored, learner):
    """An epoch that is cut short goes on from the state that it began with."""
    start = learner.start(bench.adapter)
    kept = jax.tree.map(np.array, start)
    state, _ = learner.update(start, [scored])
    state, _ = learner.update(state, [scored], start.adapter, donate=True)
    assert _same(start, kept)
    assert int(state.updates) == 2 and int(start.updates) == 0


def test_what_is_raised_between_micro_batches_ends_the_update_and_leaves_the_state(bench, scored):
    learner, calls = _learner(bench, micro_batch=4), []

    def between():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    state = learner.start(bench.adapter)
    with pytest.raises(KeyboardInterrupt):
        learner.update(state, [scored], donate=True, between=between)
    interrupted, _ = learner.update(state, [scored], between=between)
    undisturbed, _ = learner.update(state, [scored])
    assert len(calls) == 3 + SAMPLES // 4 * bench.config.window_size
    assert _same(interrupted, undisturbed)


def test_a_non_finite_update_changes_nothing_but_its_count(bench, scored, learner):
    start = learner.start(bench.adapter)
    kept = jax.tree.map(np.array, start)
    advantage = scored.advantage.copy()
    advantage[5] = np.nan
    state, _ = learner.update(start, [scored._replace(advantage=advantage)])
    assert int(state.skipped) == 1 and int(state.updates) == 0
    assert _same(state.replace(skipped=kept.skipped), kept)
    state, _ = learner.update(state, [scored])
    assert int(state.skipped) == 1 and int(state.updates) == 1
    assert not _same(state.adapter, bench.adapter)


def test_without_weights_nothing_changes(bench, scored, learner):
    start = learner.start(bench.adapter)
    unjudged = scored._replace(weight=np.zeros(SAMPLES))
    state, report = learner.update(start, [unjudged])
    assert state is start and report.steps == [] and report.gradient_norm is None


def test_an_update_that_is_too_far_is_not_applied(bench, scored, learner):
    state, _ = learner.update(learner.start(bench.adapter), [scored])
    seen = []

    def too_far(reports):
        seen.append(_log_ratios(reports, steps=2))
        return len(seen) == 1

    kept = jax.tree.map(np.array, state)
    stopped, report = learner.update(state, [scored], bench.adapter, donate=True, too_far=too_far)
    assert stopped is state and _same(stopped, kept)
    assert report.stopped and report.gradient_norm is None and len(report.steps) == 2
    changed, report = learner.update(state, [scored], bench.adapter, too_far=too_far)
    assert not report.stopped and int(changed.updates) == 2
    assert np.array_equal(*seen) and np.abs(seen[0]).max() > 0


def test_a_sample_without_weight_has_no_say(bench, scored, learner):
    advantage = scored.advantage.copy()
    advantage[3] += 7
    first, second = (
        learner.update(learner.start(bench.adapter), [batch])[0]
        for batch in (scored, scored._replace(advantage=advantage))
    )
    assert _same(first.adapter, second.adapter)


def test_the_kl_from_the_base_is_zero_where_b_is_zero(bench, scored):
    """The reference is the base without adapter; a fresh adapter computes the base exactly."""
    learner = _learner(bench, kl_weight=0.5)
    state, report = learner.update(learner.start(bench.fresh), [scored])
    assert not any(np.any(step.objective.kl_reference) for step in report.steps)
    _, report = learner.update(state, [scored], bench.fresh)
    assert all(np.all(step.objective.kl_reference > 0) for step in report.steps)


def test_what_is_left_of_the_kl_weight_holds(bench, scored):
    def gradient(kl_left, **objective):
        learner = _learner(bench, **objective)
        state, _ = learner.update(learner.start(bench.adapter), [scored], kl_left=kl_left)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(_gradient(state))])

    left, given = gradient(0.25, kl_weight=800.0), gradient(1.0, kl_weight=200.0)
    np.testing.assert_allclose(left, given, rtol=1e-5, atol=1e-9)
    assert np.abs(left - gradient(1.0, kl_weight=800.0)).max() > 1e-2 * np.abs(given).max()
    np.testing.assert_allclose(gradient(0.0, kl_weight=800.0), gradient(1.0), rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def rolled(bench, wide_bench):
    """Each setting with what it rolled out itself."""
    return {"one": (bench, _rolled(bench)), "eight": (wide_bench, _rolled(wide_bench))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ({}, [("one", 8), ("one", 2), ("eight", 8)]),
        ({"kl_weight": 0.1, "ratio": "plain"}, [("one", 8), ("eight", 4)]),
    ],
)
def test_neither_devices_nor_micro_batches_change_an_update(rolled, objective, settings):
    found = []
    for devices, micro_batch in settings:
        bench, batch = rolled[devices]
        learner = _learner(bench, micro_batch, **objective)
        state = learner.start(bench.adapter)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, _ = learner.update(state, [batch])
        first = _gradient(state)
        state, report = learner.update(state, [batch], bench.adapter)
        # Everything stays laid out over the devices as it was; reports are known everywhere.
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
        told = report._replace(stopped=None)  # a bool of Python's
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(told))
        found.append((first, jax.tree.map(np.asarray, state.adapter.lora)))
    for gradient, lora in found[1:]:
        _close(gradient, found[0][0])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), lora, found[0][1]
        )


def test_two_batches_are_one_update(bench, scored, learner):
    halves = [scored._replace(weight=scored.weight / 2)] * 2
    whole, split = (
        learner.update(learner.start(bench.adapter), batches)[0] for batches in ([scored], halves)
    )
    _close(_gradient(split), _gradient(whole))
    assert int(split.updates) == 1


def test_frame_zero_may_be_left_out(bench, scored):
    """What was drawn there is then no reason for any update; elsewhere it is."""
    config = dataclasses.replace(bench.config, train_frames="layers")
    learner = Learner(
        *(bench.pipeline, bench.adapter, config, ObjectiveConfig(), OptimizerConfig(1e-3)),
        *(LearnerConfig(micro_batch=16), bench.layout),
    )
    window, first = scored.candidates.window, bench.grid.frame_tokens

    def updated(x_next):
        candidates = scored.candidates._replace(window=window._replace(x_next=x_next))
        start = learner.start(bench.adapter)
        batch = scored._replace(candidates=candidates)
        return learner.update(start, [batch])[0].adapter

    whole = updated(window.x_next)
    assert _same(updated(window.x_next.at[:, :, :first].add(1.0)), whole)
    assert not _same(updated(window.x_next.at[:, :, first:].add(1.0)), whole)


def test_weights_of_all_steps_sum_to_one(bench, scored, learner):
    numbers = range(bench.config.window_size)
    weights = [np.asarray(s.weight) for number in numbers for s in learner._steps(scored, number)]
    assert len(weights) == len(numbers)
    assert np.sum(weights) == pytest.approx(1)

"""Candidates that are not finite: nothing is learned from them, and nothing spoiled by them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged
from test_spoiled import NAME, example, keep, read

from sl_jax.grpo import epoch
from sl_jax.grpo.config import GrpoConfig, LearnerConfig, RolloutConfig
from sl_jax.grpo.learner import Learner, Scored, UpdateReport
from sl_jax.grpo.metrics import learner_metrics
from sl_jax.grpo.objective import ObjectiveConfig
from sl_jax.grpo.rolling import Rolled, rollout_keys
from sl_jax.grpo.rollout import Rollout
from sl_jax.parallel.processes import Processes
from sl_jax.training.optimizer import OptimizerConfig

SPOILED = 2  # group


@pytest.fixture(scope="module")
def rollout(bench):
    return Rollout(bench.pipeline, bench.config, bench.layout)


@pytest.fixture(scope="module")
def spoiled(bench, rollout):
    """Candidates, of which those of one group come from a prompt that is nan."""
    pictures = bench.pictures()
    text = pictures.text.at[SPOILED, 0].set(jnp.nan)
    return rollout(bench.adapter, pictures._replace(text=text), 1, bench.grid)


def _of_spoiled(bench):
    size = bench.config.group_size
    return np.repeat(np.arange(bench.groups) == SPOILED, size)


def test_they_are_noticed_and_the_others_stay(bench, rollout, spoiled):
    whole = rollout(bench.adapter, bench.pictures(), 1, bench.grid)
    out = _of_spoiled(bench)
    assert np.array_equal(spoiled.finite, ~out) and np.all(whole.finite)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole))
    assert np.isnan(np.asarray(spoiled.latents)[out]).all()
    assert np.array_equal(np.asarray(spoiled.latents)[~out], np.asarray(whole.latents)[~out])
    assert np.array_equal(spoiled.window.mean[:, ~out], whole.window.mean[:, ~out])


def test_a_picture_that_is_not_finite_is_noticed(bench, rollout, spoiled):
    out = _of_spoiled(bench)
    decoded = rollout.decode(spoiled.latents, bench.grid)
    assert np.array_equal(decoded.finite, ~out)
    assert not np.any(np.asarray(decoded.layers)[out])  # the judge sees the same everywhere


def test_the_others_are_learned_from(bench, rollout, spoiled):
    objective = ObjectiveConfig(kl_weight=0.1)
    learner = Learner(
        *(bench.pipeline, bench.adapter, bench.config, objective, OptimizerConfig(1e-3)),
        *(LearnerConfig(micro_batch=16), bench.layout),
    )
    weight = np.where(_of_spoiled(bench), 0, 1 / 14)
    advantage = np.random.default_rng(0).normal(size=16) * (weight > 0)
    scored = Scored(spoiled, rollout.table(bench.grid), advantage, weight, bench.grid)
    state = learner.start(bench.adapter)
    state, first = learner.update(state, [scored])
    state, second = learner.update(state, [scored], bench.adapter)
    assert (int(state.updates), int(state.skipped)) == (2, 0)
    metrics = learner_metrics([first, second])
    assert all(np.isfinite(value) for value in metrics.values())
    # They do not count as a mismatch either.
    assert metrics["learner/mismatch_log_ratio/all"] < 1e-3


def test_what_is_kept_repeats_the_rollout(tmp_path, bench, rollout):
    """Of the real model, where a prompt is not finite: to the last bit, group by group."""
    pictures, size = bench.pictures(), bench.config.group_size
    examples = tuple(example(s, np.asarray(pictures.pixels[s])) for s in range(bench.groups))
    keys = jax.random.wrap_key_data(jnp.asarray(rollout_keys(5, 7, examples)))
    text = pictures.text.at[SPOILED, 1, 60:].set(jnp.nan)
    pictures = pictures._replace(text=text, keys=keys)
    candidates = rollout(bench.adapter, pictures, 1, bench.grid)
    finite = np.asarray(candidates.finite).reshape(bench.groups, size)
    assert finite.sum() == 14 and not finite[SPOILED].any()
    rolled = Rolled(SimpleNamespace(examples=examples), [], candidates, bench.grid, finite, {})
    names = keep(tmp_path, [rolled], skipped=True, groups=bench.groups)
    assert len(names) == bench.groups

    again = bench.pictures(seed=1)
    for name in names:
        told, kept = read(tmp_path, name)
        slot = told["slot"]
        key = jax.random.wrap_key_data(jnp.asarray(told["key"], jnp.uint32))
        again = again._replace(
            pixels=again.pixels.at[slot].set(kept["picture"]),
            text=again.text.at[slot].set(kept["text"][0]),
            text_lengths=pictures.text_lengths,
            keys=again.keys.at[slot].set(key),
        )
        assert bool(told["told_not_finite"]) == (slot == SPOILED)
        assert all(c["finite"] == (slot != SPOILED) for c in told["candidates"])
    (found,) = read(tmp_path, NAME)[0]["told_not_finite"]
    assert found == {"field": "text", "count": 4, "of": 5 * 64, "first": [1, 60]}
    repeated = rollout(bench.adapter, again, told["window"][0], bench.grid)
    for name in names:
        told, kept = read(tmp_path, name)
        rows = slice(told["slot"] * size, (told["slot"] + 1) * size)
        assert np.array_equal(kept["latents"], repeated.latents[rows], equal_nan=True)
        assert np.array_equal(kept["mean"], repeated.window.mean[:, rows], equal_nan=True)


@pytest.mark.parametrize("left", [0, 1, 4])
def test_an_epoch_counts_them_and_gives_them_no_weight(monkeypatch, caplog, left):
    """With fewer than two that are finite a group has nothing to compare."""
    finite = np.ones((4, 4), bool)
    finite[SPOILED, left:] = False
    updates = []

    def update(state, scored, old, kl_left, **how):
        updates.append(np.concatenate([batch.weight for batch in scored]).reshape(-1, 4))
        return state, UpdateReport([], [], None)

    parts = SimpleNamespace(
        config=GrpoConfig(
            *("", "", 1),
            rollout=RolloutConfig(groups=4, batch_groups=2, group_size=4),
            learner=LearnerConfig(updates=1),
        ),
        rollout=SimpleNamespace(table=lambda grid: None),
        learner=SimpleNamespace(update=update, work=lambda *args: 1.0),
        judging=SimpleNamespace(
            metrics=dict,
            collect=lambda *args: [],
            share=lambda *args: dict(enumerate(_judged())),
        ),
        stream=SimpleNamespace(quarantined={}),
        processes=Processes(),
    )
    batches, told = iter(finite.reshape(2, 2, 4)), [("picture", "")] * 2
    monkeypatch.setattr(
        epoch, "roll_out", lambda *args: epoch.Rolled(None, told, None, None, next(batches), {})
    )
    monkeypatch.setattr(epoch, "record", lambda *args: None)
    kept = []
    monkeypatch.setattr(epoch, "keep_spoiled", lambda parts, number, update: kept.append(update))
    state = SimpleNamespace(
        adapter=SimpleNamespace(lora={"a": jnp.ones(2)}), updates=jnp.int32(0), skipped=jnp.int32(0)
    )
    phases = SimpleNamespace(begin=lambda name: None, wait=None, computed=lambda work: None)
    _, metrics = epoch.Epochs(parts).run(state, 0, phases)
    (weight,) = updates
    assert np.array_equal(weight > 0, finite & (finite.sum(1, keepdims=True) > 1))
    assert metrics["rollout/not_finite"] == 4 - left
    assert metrics["judge/valid_share"] == finite.mean()
    assert ("not finite" in caplog.text) == (left < 4)
    assert [update.skipped for update in kept] == [False]
    assert metrics["learner/not_finite_in_a_row"] == 0  # of updates


def _judged():
    """Scores of four groups, as the judge gave them."""
    return [judged(np.arange(4) / 4, group_id=f"{number}") for number in range(4)]

"""Supervised stages: stopped and resumed is the same as never stopped, to the last bit."""

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from live_buffers import buffers_of

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.parallel.mesh import MeshConfig, make_mesh
from sl_jax.parallel.processes import ALONE
from sl_jax.training.health import NotFiniteError
from sl_jax.training.metrics import LogConfig, MetricsWriter, read_metrics
from sl_jax.training.optimizer import OptimizerConfig
from sl_jax.training.pools import indices
from sl_jax.training.supervised import (
    FlowBatch,
    Stage,
    StageConfig,
    StageState,
    flow_loss,
    open_stage,
)

STEPS = 30
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(24, 3)).astype(np.float32)
TARGETS = INPUTS @ np.array([1.0, -2.0, 0.5], np.float32)


def _loss(params, frozen, batch, key):
    x, y = batch
    error = x @ params["w"] + params["b"] - y - 0.1 * jax.random.normal(key, y.shape)
    return jnp.mean(error**2), {"mse": jnp.mean(error**2)}


def _batches(step):
    chosen = indices(5, step, 8, len(INPUTS))
    return "all", (INPUTS[chosen], TARGETS[chosen])


def _params():
    return {"w": jnp.zeros(3), "b": jnp.zeros(())}


class _Stopped(Exception):
    pass


_CONFIG = StageConfig(
    steps=STEPS,
    optimizer=OptimizerConfig(0.15, warmup_steps=3, decay_steps=STEPS),
    ema=0.9,
    log_every=5,
    eval_every=10,
    checkpoint_every=5,
)


def _run(folder, stop=None, batches=_batches):
    """One process' share of a stage: from where the folder stands, up to `stop` or the end."""

    def read(step):
        if step == stop:
            raise _Stopped
        return batches(step)

    held_out = [("all", (INPUTS, TARGETS))]
    with ALONE.open(), open_stage(_CONFIG, {"all": _loss}, folder, 1, LogConfig()) as stage:
        return stage.run(stage.start(_params()), read, held_out, "toy")


class Whole(NamedTuple):
    """An undisturbed stage, with the arrays that each checkpoint was given."""

    state: StageState
    records: list
    folder: Path
    saved: dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, saved = tmp_path_factory.mktemp("whole"), {}
    save = RunCheckpoints.save

    def noted(self, step, tree, record=None):
        save(self, step, tree, record)
        saved[step] = jax.tree.map(np.array, tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", noted)
        state = _run(folder)
    return Whole(state, list(read_metrics(folder)), folder, saved)


def _assert_same(state, other):
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), state, other)
    assert all(jax.tree.leaves(equal))


def test_it_learns(whole):
    np.testing.assert_allclose(whole.state.trained["w"], [1.0, -2.0, 0.5], atol=0.6)
    held_out = [r["toy/held_out_mse"] for r in whole.records if "toy/held_out_mse" in r]
    assert len(held_out) == 3 and held_out[-1] < 0.5 * held_out[0]
    assert not np.array_equal(whole.state.ema["w"], whole.state.trained["w"])
    assert int(whole.state.step) == STEPS


def test_stopped_and_resumed_is_the_same(tmp_path, whole):
    for stop in (12, 23):  # between checkpoints, which come every 5 updates
        with pytest.raises(_Stopped):
            _run(tmp_path, stop)
    _assert_same(_run(tmp_path), whole.state)
    assert list(read_metrics(tmp_path)) == whole.records


@pytest.mark.parametrize("stop", [12, 20])  # between checkpoints, and at one
def test_ctrl_c_finishes_the_update_and_saves_it(tmp_path, whole, stop):
    interrupted = []

    def batches(step):
        if step == stop and not interrupted:
            interrupted.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return _batches(step)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, batches=batches)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == stop
    checkpoints.close()
    _assert_same(_run(tmp_path), whole.state)


def test_ctrl_c_in_an_update_comes_through_after_it(tmp_path, whole, monkeypatch):
    update = Stage._update

    def interrupting(self, loss):
        updated = update(self, loss)

        def traced(*given):  # traced once, in the middle of the first update
            os.kill(os.getpid(), signal.SIGINT)
            return updated(*given)

        return traced

    monkeypatch.setattr(Stage, "_update", interrupting)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == 1
    checkpoints.close()


def _spoiled(*steps):
    def batches(step):
        kind, (x, y) = _batches(step)
        return kind, (np.where(step in steps, np.nan, x).astype(np.float32), y)

    return batches


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, caplog):
    """In the middle, and at a checkpoint."""
    state = _run(tmp_path, batches=_spoiled(14, 16))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert (int(state.step), int(state.skipped), int(state.in_a_row)) == (STEPS, 2, 0)
    assert np.linalg.norm(state.trained["w"] - np.array([1.0, -2.0, 0.5])) < 1.0
    assert caplog.text.count("is not finite and is skipped") == 2
    assert "Update 15 is not finite" in caplog.text
    records = [r for r in read_metrics(tmp_path) if "toy/mse" in r]
    assert [r["toy/skipped_updates"] for r in records] == [0, 0, 1, 2, 2, 2]
    assert all(np.isfinite(r["toy/mse"]) for r in records)  # of the finite updates

    with contextlib.closing(RunCheckpoints(tmp_path / "checkpoints")) as checkpoints:
        _, kept, _ = checkpoints.restore(state, 30)
    _assert_same(kept, state)


def test_skipped_parameters_are_those_of_before(tmp_path):
    with pytest.raises(_Stopped):
        _run(tmp_path, stop=5)
    before = _latest(tmp_path)
    with pytest.raises(_Stopped):
        _run(tmp_path, stop=7, batches=_spoiled(5, 6))
    after = _latest(tmp_path)
    assert (int(after.step), int(after.skipped), int(after.in_a_row)) == (7, 2, 2)
    for name in ("trained", "ema", "optimizer"):
        _assert_same(getattr(after, name), getattr(before, name))


def _latest(folder):
    """The state in the newest checkpoint."""
    with contextlib.closing(RunCheckpoints(folder / "checkpoints")) as checkpoints:
        stage = Stage(_CONFIG, {"all": _loss}, checkpoints, None, seed=1)
        return stage.start(_params())


def test_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path):
    """At the fifth, or while the one after it is computed; the next one decides what follows."""
    bad = _spoiled(*range(12, STEPS))
    with pytest.raises(NotFiniteError, match=r"5 updates in a row .* lower optimizer.learning_ra"):
        _run(tmp_path, batches=bad)
    stopped = _latest(tmp_path)
    assert (int(stopped.step), int(stopped.skipped)) == (18, 6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stopped))
    with pytest.raises(NotFiniteError, match="7 updates in a row"):
        _run(tmp_path, batches=bad)
    state = _run(tmp_path)
    assert (int(state.step), int(state.skipped), int(state.in_a_row)) == (STEPS, 8, 0)


def test_the_loss_is_a_mean_over_all_examples(whole, tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    config = StageConfig(steps=STEPS, optimizer=OptimizerConfig(0.1))

    def loss(params, frozen, batch, key):
        return jnp.mean(batch[0]), {"mean": jnp.mean(batch[0])}

    stage = Stage(config, {"all": loss}, checkpoints, None, seed=1)
    batches = [("all", (values,)) for values in np.split(np.arange(7.0), [3, 6])]
    assert stage._evaluate(whole.state, batches, "toy") == {"toy/held_out_mean": 3.0}
    assert stage._evaluate(whole.state, [], "toy") == {}
    filled = [
        ("all", FlowBatch(jnp.full((2, 1), mean), jnp.zeros((2, 1)), fresh=fresh))
        for mean, fresh in ((1.0, 2), (4.0, 1))
    ]
    assert stage._evaluate(whole.state, filled, "toy") == {"toy/held_out_mean": 2.0}
    checkpoints.close()


def test_copies_are_not_in_the_loss_of_a_flow():
    """Those that fill up the last batch of held-out examples."""
    loss = flow_loss(lambda trained, frozen, x, t, batch: trained * x, 1.0, "uniform")
    target = jax.random.normal(jax.random.key(1), (4, 3, 2))

    def found(target, fresh):
        batch = FlowBatch(target, target[:, :1], fresh=fresh)
        return float(loss(2.0, None, batch, jax.random.key(0))[0])

    other = target.at[2:].add(1)
    assert found(target, 2) == found(other, 2)
    assert found(target, 3) != found(other, 3)
    assert found(target, None) == pytest.approx(found(target, 4), rel=1e-6)


def test_a_finished_stage_does_nothing_more(whole):
    _assert_same(_run(whole.folder, stop=0), whole.state)


def test_every_checkpoint_holds_its_own_update(whole):
    """Updates donate their arrays: what is saved must not change while it is written."""
    checkpoints = RunCheckpoints(whole.folder / "checkpoints")
    for step in (25, 30):
        _assert_same(checkpoints.restore(whole.state, step)[1], whole.saved[step])
    checkpoints.close()


@pytest.mark.parametrize(("batch", "total"), [(4, 12), (5, 12), (12, 12), (7, 3)])
def test_each_epoch_sees_every_example_once(batch, total):
    steps = batch * total  # a whole number of epochs
    drawn = np.concatenate([indices(3, step, batch, total) for step in range(steps // batch * 2)])
    epochs = drawn[: len(drawn) // total * total].reshape(-1, total)
    assert len(epochs) > 1
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(total), (len(epochs), 1)))
    assert len(np.unique(epochs, axis=0)) > 1


def test_the_order_is_a_function_of_seed_and_update():
    assert np.array_equal(indices(3, 7, 4, 50), indices(3, 7, 4, 50))
    assert not np.array_equal(indices(3, 7, 4, 50), indices(4, 7, 4, 50))
    assert not np.array_equal(indices(3, 7, 4, 50), indices(3, 8, 4, 50))


def test_a_resumed_stage_holds_as_much_as_a_fresh_one(tmp_path, monkeypatch):
    """At an update, parameters, their average and two moments; while restoring, nothing."""
    size, updates, restored = 12_347, [], []
    restore = RunCheckpoints.restore
    config = StageConfig(steps=4, optimizer=OptimizerConfig(0.1), eval_every=9, checkpoint_every=9)
    losses = {"all": lambda params, frozen, batch, key: (jnp.sum(params["w"] ** 2), {})}

    def restoring(self, like):
        restored.append(len(buffers_of(size)))
        return restore(self, like)

    def batches(step):
        updates.append(len(buffers_of(size)))
        if updates == [4, 4]:
            raise _Stopped
        return "all", None

    def run():
        trained = {"w": jnp.ones(size)}  # which the caller holds on to
        with open_stage(config, losses, tmp_path, 1, LogConfig()) as stage:
            stage.run(stage.start(trained), batches, [], "toy")

    monkeypatch.setattr(RunCheckpoints, "restore", restoring)
    with ALONE.open():
        with pytest.raises(_Stopped):
            run()
        run()
    assert restored == [0] and updates == [4] * 5


def test_on_a_mesh_everything_stays_where_its_parameters_are(tmp_path):
    mesh = make_mesh(MeshConfig())
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))
    trained = {"w": jax.device_put(jnp.ones((8, 3)), spread)}
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    config = StageConfig(steps=2, optimizer=OptimizerConfig(0.1))
    losses = {"all": lambda params, frozen, batch, key: (jnp.sum(params["w"] ** 2), {})}
    stage = Stage(config, losses, checkpoints, MetricsWriter(tmp_path), seed=1, mesh=mesh)
    state = stage.start(trained)
    for _ in range(2):
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 3)]
        assert len(leaves) == 4 and all(leaf.sharding == spread for leaf in leaves)
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
        state = stage.run(state, lambda step: ("all", None), [], "toy")
    checkpoints.close()

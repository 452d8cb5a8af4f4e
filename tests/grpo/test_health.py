"""A run that is not well says so, keeps what shows why, and stops where it does not recover."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sl_jax.data.buckets import Bucket
from sl_jax.data.loader import Example
from sl_jax.flow.sampler import WindowSteps
from sl_jax.grpo.config import HealthConfig
from sl_jax.grpo.health import IN_A_ROW, Health, NotFiniteError, Spoiled, keep_spoiled
from sl_jax.grpo.rolling import Rolled
from sl_jax.grpo.rollout import Candidates
from sl_jax.parallel.mesh import MeshConfig, make_mesh


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


GROUPS, SIZE = 4, 2


@pytest.fixture
def batch():
    """A batch on four devices, of which this process holds all; candidate 5 is not finite."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])

    def placed(shape, *spec):
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    samples = GROUPS * SIZE
    steps = [placed((3, samples, 6, 4), None, "fsdp") for _ in range(3)]
    window = WindowSteps(*steps, placed((3,)), np.arange(3))
    finite = np.ones((GROUPS, SIZE), bool)
    finite[2, 1] = False
    examples = tuple(
        Example(
            np.full((16, 16, 3), slot, np.uint8),
            "a caption",
            "p",
            f"id{slot}",
            2,
            Bucket(16, 16),
            7,
            slot,
        )
        for slot in range(GROUPS)
    )
    candidates = Candidates(placed((samples, 6, 4), "fsdp"), window, None, finite.ravel())
    return Rolled(SimpleNamespace(examples=examples), [], candidates, None, finite, {})


def _kept(tmp_path, batch, skipped=False, kept=8, epoch=12):
    parts = SimpleNamespace(
        folder=tmp_path,
        config=SimpleNamespace(
            health=HealthConfig(kept=kept), rollout=SimpleNamespace(batch_groups=GROUPS)
        ),
    )
    worth = np.arange(2 * GROUPS * SIZE, dtype=np.float32).reshape(-1, SIZE)
    advantages = SimpleNamespace(advantage=worth, weight=worth / 10)
    keep_spoiled(parts, epoch, Spoiled([batch, batch], advantages, skipped))
    return sorted(path.name for path in tmp_path.rglob("*.npz"))


def test_a_group_that_is_not_finite_can_be_looked_at(tmp_path, batch):
    other = batch._replace(finite=np.ones((GROUPS, SIZE), bool))
    assert _kept(tmp_path, other) == []
    assert _kept(tmp_path, batch) == ["epoch_000012_step_7_slot_2.npz"]
    kept = np.load(tmp_path / "not_finite" / "epoch_000012_step_7_slot_2.npz")
    assert (str(kept["picture_id"]), str(kept["caption"]), int(kept["slot"])) == (
        "id2",
        "a caption",
        2,
    )
    assert kept["finite"].tolist() == [True, False] and (kept["picture"] == 2).all()
    rows = slice(4, 6)
    assert np.array_equal(kept["latents"], np.asarray(batch.candidates.latents)[rows])
    assert np.array_equal(kept["x_next"], np.asarray(batch.candidates.window.x_next)[:, rows])
    assert kept["advantage"].tolist() == [12, 13]  # of the second batch, over the first


def test_all_groups_of_a_skipped_update_are_kept_up_to_a_number(tmp_path, batch):
    assert len(_kept(tmp_path, batch, skipped=True, kept=3)) == 3
    assert len(_kept(tmp_path, batch, skipped=True, kept=3, epoch=13)) == 3
    assert len(_kept(tmp_path, batch, skipped=True, kept=6, epoch=13)) == 6


def test_processes_that_keep_at_the_same_time_keep_no_more_than_that(tmp_path, batch, monkeypatch):
    """Another one writes, under a name before, between the look and the writing."""
    savez = np.savez_compressed

    def meanwhile(file, **arrays):
        savez(file, **arrays)
        (tmp_path / "not_finite" / "epoch_000001_step_1_slot_0.npz").write_bytes(b"another's")

    monkeypatch.setattr(np, "savez_compressed", meanwhile)
    assert _kept(tmp_path, batch, kept=1) == ["epoch_000001_step_1_slot_0.npz"]


def test_what_cannot_be_written_whole_is_not_there(tmp_path, batch, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "replace", _full)
    with pytest.raises(OSError, match="no space"):
        _kept(tmp_path, batch)
    assert list((tmp_path / "not_finite").glob("*.npz")) == []


def _full(path, target):
    raise OSError("no space")

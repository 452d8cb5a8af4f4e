"""What is kept of candidates and updates that are not finite shows what they were, and where."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sl_jax.data.buckets import Bucket
from sl_jax.data.loader import Example
from sl_jax.flow.sampler import WindowSteps
from sl_jax.grpo.config import GrpoConfig, HealthConfig, RolloutConfig
from sl_jax.grpo.learner import UpdateReport
from sl_jax.grpo.rolling import Rolled, rollout_keys
from sl_jax.grpo.rollout import Candidates
from sl_jax.grpo.spoiled import Spoiled, clear_up, keep_spoiled
from sl_jax.inference.sampling import Condition
from sl_jax.parallel.mesh import MeshConfig, make_mesh

GROUPS, SIZE = 4, 2
NAME = "epoch_000012_step_7_slot_2"


def example(slot, picture=None):
    """The picture of a slot of step 7."""
    picture = np.full((16, 16, 3), slot, np.uint8) if picture is None else picture
    bucket = Bucket(*picture.shape[:2])
    return Example(picture, "a caption", "p", f"id{slot}", 2, bucket, 7, slot)


@pytest.fixture
def batch():
    """A batch on four devices, of which this process holds all; candidate 5 is not finite."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])

    def placed(shape, *spec, dtype=np.float32, spoiled=()):
        array = np.random.default_rng(0).normal(size=shape).astype(dtype)
        array[spoiled] = np.inf if spoiled else array[spoiled]
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    samples = GROUPS * SIZE
    states = (samples, 6, 4)
    x, mean = (placed((3, *states), None, "fsdp") for _ in range(2))
    x_next = placed((3, *states), None, "fsdp", spoiled=(1, 5, slice(2, 4), 3))
    window = WindowSteps(x, x_next, mean, placed((3,)), np.arange(4, 7))
    text = placed((samples, 5, 8), "fsdp", dtype=jnp.bfloat16)
    condition = Condition(placed((samples, 3, 4), "fsdp"), text, None)
    finite = np.ones((GROUPS, SIZE), bool)
    finite[2, 1] = False
    latents = placed(states, "fsdp", spoiled=(5,))
    candidates = Candidates(latents, window, condition, finite.ravel())
    pictures = SimpleNamespace(examples=tuple(map(example, range(GROUPS))))
    return Rolled(pictures, [], candidates, None, finite, {})


def keep(folder, batches, skipped=False, kept=8, epoch=12, report=None, groups=GROUPS):
    """The names of what is there after `keep_spoiled`."""
    rollout = RolloutConfig(groups=len(batches) * groups, batch_groups=groups, max_staleness=1)
    config = GrpoConfig("", "", 20, rollout=rollout, health=HealthConfig(kept=kept), seed=5)
    worth = np.arange(len(batches) * groups * SIZE, dtype=np.float32).reshape(-1, SIZE)
    worth[0, 0] = np.nan
    advantages = SimpleNamespace(advantage=worth, weight=worth / 10)
    parts = SimpleNamespace(folder=folder, config=config)
    keep_spoiled(parts, epoch, Spoiled(batches, advantages, skipped, report))
    names = [sorted(path.stem for path in folder.rglob(f"*.{end}")) for end in ("npz", "json")]
    assert names[0] == names[1]
    return names[0]


def read(folder, name=NAME):
    """What is told of a group, and its arrays."""
    path = folder / "not_finite" / name
    told = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    return told, np.load(path.with_suffix(".npz"), allow_pickle=False)


def test_a_group_that_is_not_finite_can_be_looked_at(tmp_path, batch):
    other = batch._replace(finite=np.ones((GROUPS, SIZE), bool))
    assert keep(tmp_path, [other, other]) == []
    assert keep(tmp_path, [other, batch]) == [NAME]
    told, kept = read(tmp_path)
    assert (kept["picture"] == 2).all() and kept["picture"].shape == (16, 16, 3)
    candidates, rows = batch.candidates, slice(4, 6)
    assert np.array_equal(kept["latents"], candidates.latents[rows])
    for name in ("x", "x_next", "mean"):
        assert np.array_equal(kept[name], getattr(candidates.window, name)[:, rows])
    assert np.array_equal(kept["picture_latents"][0], candidates.condition.picture[4])
    assert np.array_equal(kept["text"][0], candidates.condition.text[4].astype(np.float32))
    expected = {"picture_id": "id2", "caption": "a caption", "path": "p", "layers": 2, "seed": 5}
    expected |= {"step": 7, "slot": 2, "window": [4, 5, 6], "epoch": 12, "update_skipped": False}
    expected |= {"sampled_by_the_adapter_after_epoch": 10, "advantage": [12, 13]}
    assert told.items() >= expected.items()
    assert told["key"] == rollout_keys(5, 7, [example(2)])[0].tolist()


def test_where_what_is_not_finite_is_said(tmp_path, batch):
    norms = [(jnp.int32(4), jnp.float32(0.5)), (jnp.int32(5), jnp.float32(np.nan))]
    keep(tmp_path, [batch], report=UpdateReport([], norms, None))
    told, _ = read(tmp_path)
    assert told["gradient_norm_by_sampling_step"] == {"4": 0.5, "5": None}
    assert told["told_not_finite"] == []
    well, ill = told["candidates"]
    assert well == {"finite": True, "not_finite": []} and not ill["finite"]
    assert ill["not_finite"] == [
        {"field": "latents", "count": 24, "of": 24, "first": [0, 0]},
        {"field": "x_next", "sampling_step": 5, "count": 2, "of": 24, "first": [2, 3]},
    ]


def test_what_only_the_decoder_made_not_finite(tmp_path, batch):
    finite = np.ones((GROUPS, SIZE), bool)
    finite[1, 0] = False
    (name,) = keep(tmp_path, [batch._replace(finite=finite)])
    told, _ = read(tmp_path, name)
    assert told["candidates"][0] == {"finite": False, "not_finite": [{"field": "decoded pixels"}]}


def test_all_groups_of_a_skipped_update_are_kept_up_to_a_number(tmp_path, batch):
    both = [batch, batch._replace(pictures=SimpleNamespace(examples=()))]
    assert len(keep(tmp_path, both, skipped=True, kept=3)) == 3
    assert len(keep(tmp_path, both, skipped=True, kept=3, epoch=13)) == 3
    assert len(keep(tmp_path, both, skipped=True, kept=6, epoch=13)) == 6


def test_processes_that_keep_at_the_same_time_keep_no_more_than_that(tmp_path, batch, monkeypatch):
    """Another one writes, under a name before, between the look and the writing."""
    savez = np.savez_compressed

    def meanwhile(file, **arrays):
        savez(file, **arrays)
        for end in ("npz", "json"):
            (tmp_path / "not_finite" / f"epoch_000001_step_1_slot_0.{end}").write_bytes(b"{}")

    monkeypatch.setattr(np, "savez_compressed", meanwhile)
    assert keep(tmp_path, [batch], kept=1) == ["epoch_000001_step_1_slot_0"]


def test_processes_that_hold_one_group_may_both_write_it(tmp_path, batch, monkeypatch):
    """As where a part of a batch is on devices of several: another comes between, each time."""
    kind, moved = type(tmp_path), []
    replace = kind.replace

    def slowly(path, target):
        moved.append(target)
        if len(moved) == 1:
            keep(tmp_path, [batch])
        return replace(path, target)

    monkeypatch.setattr(kind, "replace", slowly)
    assert keep(tmp_path, [batch]) == [NAME]
    assert len(moved) == 4 and len(list((tmp_path / "not_finite").iterdir())) == 2


def test_what_cannot_be_written_whole_is_not_there(tmp_path, batch, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "replace", _full)
    with pytest.raises(OSError, match="no space"):
        keep(tmp_path, [batch])
    kept = tmp_path / "not_finite"
    assert list(kept.iterdir()) == []
    (kept / f".{'0a' * 16}.partial").touch()  # of a process that was killed while it wrote
    (kept / ".ipynb_checkpoints").mkdir()
    others = [".epochs.swp", ".nfs00000000000012ab", f"{NAME}.json", f"{NAME}.npz"]
    for name in others:
        (kept / name).touch()
    clear_up(tmp_path)
    left = sorted(path.name for path in kept.iterdir())
    assert left == sorted([".ipynb_checkpoints", *others])


def _full(path, target):
    raise OSError("no space")

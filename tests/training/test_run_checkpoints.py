"""Checkpoints of a run: whole or absent, the newest readable one first."""

import logging
import resource
import shutil
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.orbax import RunCheckpoints


def _tree(value):
    return {"a": jnp.full((4, 3), value), "n": jnp.int32(value)}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints 1, 2 and 3."""
    checkpoints = RunCheckpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, _tree(step), {"position": step * 10})
    checkpoints.close()
    return tmp_path


def _damage(folder, how):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if how == "truncated":
            path.write_bytes(path.read_bytes()[:5])
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "gone":
            path.unlink()
        elif how == "garbled" and path.stat().st_size:
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def _restored(folder):
    checkpoints = RunCheckpoints(folder)
    try:
        return checkpoints.restore(_tree(0))
    finally:
        checkpoints.close()


def test_the_newest_comes_back(folder):
    step, tree, record = _restored(folder)
    assert (step, record) == (3, {"position": 30})
    assert np.array_equal(tree["a"], _tree(3)["a"]) and int(tree["n"]) == 3


def test_without_room_nothing_is_begun(folder, monkeypatch):
    checkpoints = RunCheckpoints(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40))
    with pytest.raises(CheckpointError, match=r"takes 0\.0 MB, and 0\.0 MB are free; .* make room"):
        checkpoints.save(4, _tree(4))
    checkpoints.close()
    assert not list(folder.glob("4*"))
    assert _restored(folder)[0] == 3


@pytest.fixture
def small_files():
    """Until the test ends, no file grows beyond 20 kB: as on a disk that somebody else fills."""
    hook, limits = sys.unraisablehook, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sys.unraisablehook = hook
    logging.getLogger("asyncio").setLevel(logging.NOTSET)


def test_a_save_that_fails_in_the_background_is_one_error(folder, small_files):
    noise = np.random.default_rng(0).normal(size=(100, 1000))  # compression does not help
    checkpoints = RunCheckpoints(folder)
    checkpoints.save(4, {"a": jnp.asarray(noise), "n": jnp.int32(4)})
    with pytest.raises(
        CheckpointError, match=r"cannot be written to .*; those before it are whole"
    ):
        checkpoints.wait()
    assert _restored(folder)[0] == 3


def test_the_last_few_are_kept(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, _tree(step))
    checkpoints.wait()
    assert checkpoints.latest == 5
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


@pytest.mark.parametrize("how", ["truncated", "empty", "gone", "garbled"])
def test_a_damaged_one_is_passed_over_with_an_error(folder, how, caplog):
    _damage(folder / "3", how)
    with caplog.at_level(logging.ERROR, "sl_jax"):
        step, tree, record = _restored(folder)
    assert (step, int(tree["n"]), record) == (2, 2, {"position": 20})
    assert "Checkpoint 3" in caplog.text and "damaged" in caplog.text


def test_a_damaged_step_can_be_saved_again(folder):
    for _ in range(2):  # damaged twice, too
        _damage(folder / "3", "truncated")
        checkpoints = RunCheckpoints(folder)
        assert checkpoints.restore(_tree(0))[0] == 2
        checkpoints.save(3, _tree(33))
        checkpoints.close()
        assert int(_restored(folder)[1]["n"]) == 33
    assert (folder / "damaged-3").is_dir()


def test_nothing_readable(folder):
    for step in (1, 2, 3):
        _damage(folder / str(step), "truncated")
    with pytest.raises(CheckpointError, match=r"no readable checkpoint among \[3, 2, 1\]"):
        _restored(folder)
    # Storage that fails for a while must not cost the checkpoints.
    assert {"1", "2", "3"} <= {path.name for path in folder.iterdir()}


def test_a_step_of_ones_choice(folder):
    checkpoints = RunCheckpoints(folder)
    assert int(checkpoints.restore(_tree(0), 1)[1]["n"]) == 1
    assert checkpoints.latest == 3
    checkpoints.close()

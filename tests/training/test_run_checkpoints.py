"""Checkpoints of a run: whole or absent, the newest readable one first."""

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.checkpoints import orbax
from sl_jax.checkpoints.adapters import read_adapter, save_adapter_checkpoint
from sl_jax.checkpoints.disk import storage_failed
from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.models.lora import Adapter
from sl_jax.parallel.processes import ProcessError, Processes


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


DAMAGES = ("truncated", "empty", "gone", "garbled", "null")


def _damage(folder, how):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if how == "truncated":
            path.write_bytes(path.read_bytes()[:5])
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "gone":
            path.unlink()
        elif how == "null":
            path.write_text("null")
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


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The step appears in the background, when it is whole: Orbax then renames it."""
    begun, disk, rename = threading.Event(), threading.Event(), os.rename

    def slowly(source, target, **options):
        if Path(target) == tmp_path / "1":
            begun.set()
            assert disk.wait(60), "who saves waits for what is saved"
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", slowly)
    with contextlib.closing(RunCheckpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, _tree(1))
        assert begun.wait(60)
        assert not (tmp_path / "1").exists() and list(tmp_path.glob("1.*"))
        disk.set()
        checkpoints.wait()
        assert (tmp_path / "1").is_dir() and not list(tmp_path.glob("1.*"))


def test_without_room_nothing_is_begun(folder, monkeypatch):
    checkpoints = RunCheckpoints(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40))
    with pytest.raises(CheckpointError, match=r"takes 0\.0 MB, and 0\.0 MB are free; .* make room"):
        checkpoints.save(4, _tree(4))
    checkpoints.close()
    assert not list(folder.glob("4*"))
    assert _restored(folder)[0] == 3


@pytest.mark.parametrize(
    ("taken", "advice"),
    [
        (lambda folder: folder.write_text("a file"), "take away what is in the way"),
        (lambda folder: folder.symlink_to("nowhere"), "take away what is in the way"),
        (lambda folder: (folder / ".lock").mkdir(parents=True), "take away what is in the way"),
        (lambda folder: _lock_elsewhere(folder), "see to it that this path leads somewhere"),
    ],
)
def test_what_is_in_the_way_is_not_taken_for_a_full_disk(tmp_path, taken, advice):
    taken(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=rf"Please {advice}; the same command"):
        RunCheckpoints(tmp_path / "checkpoints")


def _lock_elsewhere(folder):
    folder.mkdir()
    (folder / ".lock").symlink_to("nowhere/.lock")


class Second(Processes):
    """The second of two processes, which hears of no errors."""

    def __init__(self, told):
        super().__init__(1, 2)
        self._told_by_main = told

    def all_gather(self, what, value=None, error=None):
        return [self._told_by_main if what == "looking for room" else value, value]


@pytest.mark.parametrize(("told", "own"), [(40, 1 << 40), (1 << 40, 40)])
def test_whether_there_is_room_the_main_process_decides(folder, monkeypatch, told, own):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=own))
    checkpoints = RunCheckpoints(folder, processes=Second(told))
    with pytest.raises(CheckpointError) if told < own else contextlib.nullcontext():
        checkpoints.save(4, _tree(4))
    checkpoints.close()
    assert (folder / "4").exists() == (told > own)


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
    with (
        pytest.raises(CheckpointError, match=r"cannot be written to .*; those before it are whole"),
        contextlib.closing(RunCheckpoints(folder)) as checkpoints,
    ):
        checkpoints.save(4, {"a": jnp.asarray(noise), "n": jnp.int32(4)})
        checkpoints.wait()
    assert _restored(folder)[0] == 3


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("an argument is wrong"), ValueError),
        (ValueError("UNKNOWN: Error writing: [os_error_code='116']"), CheckpointError),
        (ValueError("UNAVAILABLE: Error writing, CURL error"), CheckpointError),
        (ValueError("while writing: No space left on device"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
    ],
)
def test_a_defect_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, raised, told):
    def save(*args, **kwargs):
        raise raised

    with contextlib.closing(RunCheckpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", save)
        with pytest.raises(told) as found:
            checkpoints.save(1, _tree(1))
    assert (found.type, found.value is raised) == (told, told is ValueError)


def test_the_last_few_are_kept(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, _tree(step))
    checkpoints.wait()
    assert checkpoints.latest == 5
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_passed_over_with_an_error(folder, how, caplog):
    _damage(folder / "3", how)
    with caplog.at_level(logging.ERROR, "sl_jax"):
        step, tree, record = _restored(folder)
    assert (step, int(tree["n"]), record) == (2, 2, {"position": 20})
    assert "Checkpoint 3" in caplog.text and "damaged" in caplog.text


@pytest.mark.parametrize("heals", [False, True])
@pytest.mark.parametrize("name", ["tree/manifest.ocdbt", "record/metadata"])
def test_storage_that_fails_is_asked_again_and_no_damage(folder, monkeypatch, name, heals):
    """Of TensorStore, and of Python: a file that leads to itself is an error of the system."""
    path, aside, found, asked = folder / "3" / name, folder / "aside", orbax._found, []
    path.rename(aside)
    path.symlink_to(path)

    def noted(*given):
        asked.append(given)
        if heals and len(asked) == 2:
            aside.rename(path)
        return found(*given)

    monkeypatch.setattr(orbax, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(orbax, "_found", noted)
    if heals:
        assert _restored(folder)[0] == 3
    else:
        with pytest.raises(OSError, match=r"is left as it is: .*symbolic links.*/3'") as raised:
            _restored(folder)
        assert raised.value.errno == errno.ELOOP
    assert len(asked) == (2 if heals else 3)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (OSError(errno.EIO, "x"), True),
        (PermissionError(errno.EACCES, "x"), True),
        (TimeoutError(errno.ETIMEDOUT, "x"), True),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (OSError("broken data stream"), False),
        (ValueError("UNKNOWN: Error reading: Stale file handle [os_error_code='116']"), True),
        (ValueError("UNAVAILABLE: Error reading, CURL error"), True),
        (ValueError("NOT_FOUND: Error opening [os_error_code='2']"), False),
        (ValueError("DATA_LOSS: CRC-32C checksum verification failed"), False),
        (KeyError("UNAVAILABLE: a name"), False),
    ],
)
def test_what_is_of_the_storage(error, failed):
    assert storage_failed(error) == failed
    wrapped = Exception("of no kind")
    wrapped.__cause__ = error
    assert storage_failed(wrapped) == failed


def test_late_answers_of_a_failure_are_no_tracebacks(tmp_path, monkeypatch):
    """TensorStore's, to an event loop that is closed by then; all else is told as before."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(2):
        RunCheckpoints(tmp_path).close()
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=None)
    others = [
        SimpleNamespace(exc_value=late.exc_value, object=test_no_flipped_bit_goes_unnoticed),
        SimpleNamespace(exc_value=RuntimeError("no loop"), object=None),
    ]
    for unraisable in (late, *others):
        sys.unraisablehook(unraisable)
    assert told == others


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Orbax itself takes the numbers for what they are not."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(50, 40)).astype(np.float32)  # compression leaves it as it is
    checkpoints = RunCheckpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.asarray(noise * step), "n": jnp.int32(step)})
    checkpoints.wait()
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    passed_over = 0
    for place in (sizes.sum() * rng.random(12)).astype(int):
        number = int(np.searchsorted(np.cumsum(sizes), place, "right"))
        whole = files[number].read_bytes()
        flipped = bytearray(whole)
        flipped[place - sizes[:number].sum()] ^= 1 << rng.integers(8)
        files[number].write_bytes(flipped)
        step, tree, _ = checkpoints.restore({"a": jnp.asarray(noise), "n": jnp.int32(0)})
        assert np.array_equal(tree["a"], noise * step) and int(tree["n"]) == step
        if step == 1:
            passed_over += 1
            (tmp_path / "damaged-2").rename(tmp_path / "2")
            checkpoints._manager.reload()
        files[number].write_bytes(whole)
    checkpoints.close()
    assert passed_over >= 8  # the rest hit what nobody reads, such as notes of Orbax


@pytest.fixture
def adapter(tmp_path):
    """A checkpoint of an adapter of noise, which compression leaves as it is."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((500, 16), (16, 500)))
    made = Adapter({"proj_out": {"a": a, "b": b}}, {"proj_out": {"scale": np.float32(2)}})
    save_adapter_checkpoint(tmp_path, made)
    return tmp_path


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("part", ["", "tree", "record"])
def test_a_damaged_adapter_is_said_to_be(adapter, part, how):
    read_adapter(adapter)
    _damage(adapter / "0" / part, how)
    with pytest.raises(CheckpointError, match="0 is damaged: "):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("raised", "told"), [(Exception, CheckpointError), (RuntimeError, RuntimeError)]
)
def test_errors_of_no_kind_are_damage_and_others_are_not(adapter, monkeypatch, raised, told):
    """The former is what Orbax raises of an array that cannot be decoded."""

    def restore(*args, **kwargs):
        raise raised("no array")

    monkeypatch.setattr(orbax.ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(told, match="no array"):
        read_adapter(adapter)


def test_no_adapter_with_flipped_bits_is_taken_for_the_saved_one(adapter):
    saved, rng, refused = read_adapter(adapter).modules["proj_out"], np.random.default_rng(1), 0
    arrays = [p for p in (adapter / "0").rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    for place in rng.random(12):
        file = rng.choice(arrays)
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[int(place * len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        try:
            found = read_adapter(adapter).modules["proj_out"]
        except CheckpointError as error:
            assert "0 is damaged: " in str(error)
            refused += 1
        else:
            assert np.array_equal(found.down, saved.down) and np.array_equal(found.up, saved.up)
        file.write_bytes(whole)
    assert refused >= 10


def test_a_tensor_that_differs_is_named(folder, monkeypatch, caplog):
    made = orbax.checksums
    monkeypatch.setattr(orbax, "checksums", lambda tree: made(tree) | {"a": "0" * 16})
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        _restored(folder)
    assert "Checkpoint 3" in caplog.text
    assert "damaged and is passed over: a differ" in caplog.text.replace("\n", " ")


def test_what_one_process_cannot_read_all_pass_over(folder):
    """The other's disk, or its part of the arrays, is to blame."""
    others = iter(["no such file", None])
    processes = SimpleNamespace(
        is_main=True,
        all_gather=lambda what, mine: [mine, next(others) if "what was read" in what else mine],
        together=lambda what: contextlib.nullcontext(),
    )
    checkpoints = RunCheckpoints(folder, processes=processes)
    assert checkpoints.restore(_tree(0))[0] == 2
    checkpoints.close()
    assert (folder / "damaged-3").is_dir()


@pytest.mark.parametrize("theirs", [[], [1, 2], [1, 2, 4]])
def test_processes_that_see_different_checkpoints_do_not_go_on(folder, theirs):
    """As on a drive that has not settled; nothing is held or changed."""
    processes = SimpleNamespace(
        is_main=True,
        all_gather=lambda what, mine: [mine, theirs],
        together=lambda what: contextlib.nullcontext(),
    )
    with pytest.raises(
        ProcessError, match=r"see different checkpoints \(\[\[1, 2, 3\], \[.*settle"
    ):
        RunCheckpoints(folder, processes=processes)
    assert _restored(folder)[0] == 3


def test_checkpoints_without_checksums_are_taken_as_they_are(folder, caplog):
    """Of a version that made none."""
    path = folder / "3" / "record" / "metadata"
    path.write_text(json.dumps({"position": 30}))
    assert _restored(folder)[0] == 3
    assert "has no checksums" in caplog.text


@pytest.mark.parametrize("name", ["record", "reward", "checksums", "checksum"])
def test_a_record_with_a_flipped_name_is_damaged(folder, name):
    """And not one of a version that had no such names."""
    path = folder / "3" / "record" / "metadata"
    text = path.read_text()
    assert f'"{name}"' in text
    path.write_text(text.replace(f'"{name}"', f'"{name[:-1]}~"'))
    assert _restored(folder)[0] == 2


def test_the_best_is_kept_beside_the_last(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    rewards = {1: 0.5, 2: 0.7, 3: None, 4: 0.6, 5: float("nan"), 6: 0.7, 7: None, 8: 0.1}
    kept = []
    for step, reward in rewards.items():
        checkpoints.save(step, _tree(step), {"position": step}, reward)
        checkpoints.wait()
        kept.append(sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()))
        if step == 5:  # of which a new process knows what the old one did
            checkpoints.close()
            checkpoints = RunCheckpoints(tmp_path, keep=2)
            assert checkpoints.best == (2, 0.7)
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    assert checkpoints.best == (6, 0.7) and checkpoints.latest == 8
    assert checkpoints.restore(_tree(0), 6)[2] == {"position": 6}
    checkpoints.close()
    assert RunCheckpoints(tmp_path / "none").best is None


def test_what_a_kill_left_half_written_is_removed(folder):
    remains = folder / "4.orbax-checkpoint-tmp-123"
    shutil.copytree(folder / "3", remains)
    assert _restored(folder)[0] == 3
    assert not remains.exists()


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


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"a": jnp.zeros((4, 5)), "n": jnp.int32(0)}, r"a is \(4, 3\) there and \(4, 5\) here"),
        ({"a": jnp.zeros((4, 3))}, r"n is \(\) there and missing here"),
        (_tree(0) | {"b": jnp.zeros(2)}, r"b is missing there and \(2,\) here"),
    ],
)
def test_checkpoints_of_another_configuration_are_not_damaged(folder, like, said, caplog):
    with (
        contextlib.closing(RunCheckpoints(folder)) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=f"checkpoints of another configuration: {said}; please use the conf",
        ),
    ):
        checkpoints.restore(like)
    assert caplog.text == ""
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2", "3"]


def test_one_of_another_configuration_is_passed_over_for_one_that_fits(folder):
    shutil.rmtree(folder / "3")
    with contextlib.closing(RunCheckpoints(folder)) as checkpoints:
        checkpoints.save(3, {"a": jnp.zeros((4, 5)), "n": jnp.int32(0)})
    assert _restored(folder)[0] == 2
    assert (folder / "damaged-3").is_dir()


@pytest.mark.parametrize("path", ["gs://bucket/run/checkpoints", "/a/b"])
def test_a_bucket_is_not_below_the_current_folder(path):
    assert os.fspath(orbax._absolute(path)) == path
    assert os.fspath(orbax._absolute("a")) == os.path.abspath("a")


def test_a_step_of_ones_choice(folder):
    checkpoints = RunCheckpoints(folder)
    assert int(checkpoints.restore(_tree(0), 1)[1]["n"]) == 1
    assert checkpoints.latest == 3
    checkpoints.close()


@pytest.mark.parametrize("left", [True, False])
def test_remains_may_vanish_while_they_are_removed(folder, monkeypatch, left):
    """A file of them, or all of them: TensorStore may still be at it."""
    remains = folder / "4.orbax-checkpoint-tmp-123"
    remains.mkdir()
    kind = type(orbax.epath.Path(folder))
    remove, calls = kind.rmtree, []

    def rmtree(path):
        calls.append(path)
        if len(calls) > 1 or not left:
            remove(path)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, "No such file", "manifest.ocdbt.__lock")

    monkeypatch.setattr(kind, "rmtree", rmtree)
    with contextlib.closing(RunCheckpoints(folder)) as checkpoints:
        assert checkpoints.latest == 3
    assert not remains.exists() and len(calls) == 1 + left

"""Records of a run: one JSON line each, and none twice."""

import importlib.util
import math
import os
import resource
import shutil
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bucket import Bucket
from event_files import read_events, read_files
from tensorboardX.proto.event_pb2 import SessionLog

from sl_jax.parallel.processes import ALONE
from sl_jax.training import event_files
from sl_jax.training.configuration import LOG, broken
from sl_jax.training.metrics import LogConfig, MetricsWriter, open_metrics, read_metrics


def _write(folder, resume_from, steps):
    writer = MetricsWriter(folder, resume_from)
    for step in steps:
        writer.scalars(step, {"loss": step / 2, "count": np.int64(step)})
    writer.close()


def test_records_come_back(tmp_path):
    _write(tmp_path, 0, [1, 2])
    assert list(read_metrics(tmp_path)) == [
        {"step": 1, "loss": 0.5, "count": 1.0},
        {"step": 2, "loss": 1.0, "count": 2.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    _write(tmp_path, 0, [1, 2, 3, 4])
    _write(tmp_path, 3, [3, 4, 5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_a_crash_cut_off(tmp_path):
    _write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    _write(tmp_path, 3, [3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


DAMAGED = [
    *(b"", b"garbage", b"\0\0\0", b'{"step": 3, "\xff": 1}', b"3", b"[]", b"{}", b"[" * 100_000),
    *(b'{"step": "3"}', b'{"step": 3, "loss": "x"}', b'{"step": 3, "lo{"step": 3, "loss": 1.5}'),
]


def test_damaged_lines_are_passed_over_with_one_warning(tmp_path, caplog):
    _write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, *DAMAGED, second, b""]))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"Damaged lines of {path} are passed over: {len(DAMAGED)}, the first of them line 2."
    ]
    _write(tmp_path, 3, [3])
    caplog.clear()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert caplog.text == ""


def test_a_run_that_begins_anew_keeps_what_it_told(tmp_path, caplog):
    _write(tmp_path, 0, [0])  # before the first epoch: nothing was trained
    assert caplog.text == ""
    told = []
    for number in (1, 2):
        _write(tmp_path, 0, [0, 1, 2])
        told.append((tmp_path / "metrics.jsonl").read_bytes())
        assert len(list(tmp_path.glob("metrics.before-*"))) == number - 1
    _write(tmp_path, 0, [0])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    assert [(tmp_path / f"metrics.before-{n}.jsonl").read_bytes() for n in (1, 2)] == told
    assert caplog.text.count("There is no checkpoint to go on from, though") == 2


@pytest.mark.parametrize("lost", [1, 10])
def test_a_file_that_is_cut_off_while_the_run_writes_it_loses_no_other_line(tmp_path, lost):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": step / 2})
        path = tmp_path / "metrics.jsonl"
        if step == 2:
            os.truncate(path, path.stat().st_size - lost)
    assert {record["step"] for record in read_metrics(tmp_path)} == {1, 3} | {2} - {2 * (lost > 1)}


def test_what_is_not_finite_is_null(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, {"a": math.nan, "b": -math.inf, "c": 1})
    writer.close()
    assert list(read_metrics(tmp_path)) == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert caplog.text == ""  # TensorBoard complains of every one that it is given


def test_records_in_a_bucket_whose_objects_cannot_be_appended_to(tmp_path, monkeypatch):
    Bucket.install(tmp_path, monkeypatch)
    _write("gs://bucket/run", 0, [1, 2, 3])
    _write("gs://bucket/run", 3, [3, 4])
    assert [record["step"] for record in read_metrics("gs://bucket/run")] == [1, 2, 3, 4]
    assert (tmp_path / "bucket" / "run" / "metrics.jsonl").read_text().count("\n") == 4


def test_tensorboard_in_a_bucket_begins_another_object_before_one_gets_large(tmp_path, monkeypatch):
    """Each is written whole with all that is added: a long run would write more and more."""
    Bucket.install(tmp_path, monkeypatch)
    monkeypatch.setattr(event_files, "_ENOUGH", 1000)
    steps = range(50)
    _write("gs://bucket/run", 0, steps)
    folder = tmp_path / "bucket" / "run"
    sizes = [path.stat().st_size for path in (folder / "tensorboard").iterdir()]
    assert len(sizes) > 2 and max(sizes) < 1100
    assert read_events(folder)["loss"] == [(step, step / 2) for step in steps]


def test_after_a_restart_tensorboard_leaves_out_what_is_done_again(tmp_path, monkeypatch):
    """The start of a session in the first file of the resumed run, and in none that follows it."""
    Bucket.install(tmp_path, monkeypatch)
    monkeypatch.setattr(event_files, "_ENOUGH", 1000)
    _write("gs://bucket/run", None, range(5))
    _write("gs://bucket/run", 3, range(3, 50))
    before, resumed, *others = [
        [event.step for event in events if event.session_log.status == SessionLog.START]
        for events in read_files(tmp_path / "bucket" / "run")
    ]
    assert before == [] and resumed == [3]
    assert len(others) > 1 and not any(others)


def test_a_record_is_framed_as_tensorflow_does(tmp_path):
    """Checksums are CRC-32C, whose value of these digits is known, turned and shifted."""
    checksum = 0xE3069283
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF

    class Digits:
        def SerializeToString(self):
            return b"123456789"

    length, _, content, last = struct.unpack("<QI9sI", event_files._framed(Digits()))
    assert (length, content, last) == (9, b"123456789", masked)


@pytest.mark.parametrize("ahead", [-1, 0, 1, 1000])
def test_the_newest_file_is_the_last_that_tensorboard_reads(tmp_path, ahead):
    """Also after one of an earlier version, and one of a host whose clock was ahead."""
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    names = [f"events.out.tfevents.{int(time.time()) + ahead}.host"]
    (folder / names[0]).touch()
    for _ in range(3):
        MetricsWriter(tmp_path)
        (name,) = {path.name for path in folder.iterdir()} - {*names}
        names.append(name)
    assert names == sorted(names)


def test_a_record_that_is_written_in_part_is_taken_back(tmp_path):
    """As on a disk that is full for a while."""
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, {"loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.scalars(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    writer.scalars(2, {"loss": 1.5})
    assert read_events(tmp_path)["loss"] == [(1, 0.5), (2, 1.5)]


def test_what_tensorboard_does_not_get_is_an_error_of_the_run(tmp_path):
    writer = MetricsWriter(tmp_path)
    shutil.rmtree(tmp_path / "tensorboard")
    with pytest.raises(FileNotFoundError):
        writer.scalars(1, {"loss": 0.5})


def test_no_records(tmp_path):
    assert list(read_metrics(tmp_path)) == []


class FakeWandb:
    """Stands for the package of Weights & Biases; notes what it is told."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def Image(self, pixels, caption):
        return (pixels.tolist(), caption)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_get_the_same_numbers_in_one_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with open_metrics(tmp_path / "run", step, LogConfig("layers")) as writer:
            writer.scalars(step, {"loss": step / 2})
    assert fake.logged == [(1, {"loss": 0.5}), (2, {"loss": 1.0})]
    assert fake.finished == 2
    first, second = fake.started
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("layers", "run", "allow")
    with open_metrics(tmp_path / "other", 0, LogConfig("layers")):
        assert fake.started[2]["id"] != first["id"]
    with open_metrics(tmp_path / "none", 0, LogConfig()) as writer:
        writer.scalars(1, {"loss": 1.0})
    assert len(fake.started) == 3


def test_weights_and_biases_get_pictures_with_what_is_said_of_them(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path / "run", 0, LogConfig("layers"))
    pixels = np.zeros((1, 1, 3), np.uint8)
    writer.picture(4, "judged/0", pixels, "a table")
    writer.picture(4, "held_out/a", pixels)
    writer.close()
    black = [[[0, 0, 0]]]
    assert fake.logged == [
        (4, {"judged/0": (black, "a table")}),
        (4, {"held_out/a": (black, None)}),
    ]


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = broken(SimpleNamespace(log=LogConfig("layers")), LOG)
    assert "config.log.wandb is 'layers'" in problem and "pip install '.[wandb]'" in problem
    assert list(broken(SimpleNamespace(log=LogConfig()), LOG)) == []


def test_metrics_are_closed_after_an_error(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(MetricsWriter, "close", lambda writer: closed.append(writer))
    with pytest.raises(ZeroDivisionError), open_metrics(tmp_path, 0, LogConfig(), ALONE):
        raise ZeroDivisionError
    assert len(closed) == 1


def test_tensorboard_gets_scalars_pictures_and_texts(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    writer = MetricsWriter(tmp_path)
    writer.scalars(2, {"evaluation/psnr": 31.5})
    writer.picture(2, "evaluation/0", pixels)
    writer.picture(3, "judged/0", pixels, "| A | 0.5 |")
    writer.close()
    found = read_events(tmp_path)
    assert found["evaluation/psnr"] == [(2, 31.5)]
    for name, step in (("evaluation/0", 2), ("judged/0", 3)):
        ((told, picture),) = found[name]
        assert told == step and np.array_equal(picture, pixels)
    assert found["judged/0.text"] == [(3, "| A | 0.5 |")]
    assert "evaluation/0.text" not in found

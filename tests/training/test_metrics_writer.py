"""Records of a run: one JSON line each, and none twice."""

import importlib.util
import io
import json
import math
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from bucket import Bucket
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sl_jax.parallel.processes import ALONE
from sl_jax.training import metrics
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


def test_damage_elsewhere_is_not_passed_over(tmp_path):
    _write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(json.JSONDecodeError):
        list(read_metrics(tmp_path))


def test_what_is_not_finite_is_null(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, {"a": math.nan, "b": -math.inf, "c": 1})
    writer.close()
    assert list(read_metrics(tmp_path)) == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert caplog.text == ""  # TensorBoard complains of every one that it is given


def test_records_in_a_bucket_whose_objects_cannot_be_appended_to(tmp_path, monkeypatch):
    Bucket.install(tmp_path, monkeypatch)
    board = SimpleNamespace(add_scalar=lambda *args: None, close=lambda: None)
    monkeypatch.setattr(metrics, "SummaryWriter", lambda *args, **kwargs: board)
    _write("gs://bucket/run", 0, [1, 2, 3])
    _write("gs://bucket/run", 3, [3, 4])
    assert [record["step"] for record in read_metrics("gs://bucket/run")] == [1, 2, 3, 4]
    assert (tmp_path / "bucket" / "run" / "metrics.jsonl").read_text().count("\n") == 4


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


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = broken(SimpleNamespace(log=LogConfig("layers")), LOG)
    assert "config.log.wandb is 'layers'" in problem and "sl_jax[wandb]" in problem
    assert list(broken(SimpleNamespace(log=LogConfig()), LOG)) == []


def test_metrics_are_closed_after_an_error(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(MetricsWriter, "close", lambda writer: closed.append(writer))
    with pytest.raises(ZeroDivisionError), open_metrics(tmp_path, 0, LogConfig(), ALONE):
        raise ZeroDivisionError
    assert len(closed) == 1


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    """What a reader of the event file finds: records of length, checksum, message, checksum."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    writer = MetricsWriter(tmp_path)
    writer.scalars(2, {"evaluation/psnr": 31.5})
    writer.picture(2, "evaluation/0", pixels)
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, values = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        values |= {value.tag: (event.step, value) for value in event.summary.value}
        content = content[16 + length :]
    step, scalar = values["evaluation/psnr"]
    assert step == 2 and scalar.simple_value == 31.5
    step, picture = values["evaluation/0"]
    shown = Image.open(io.BytesIO(picture.image.encoded_image_string))
    assert step == 2 and np.array_equal(np.asarray(shown.convert("RGB")), pixels)

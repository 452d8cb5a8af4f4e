"""Records of a run: one JSON line each, and none twice."""

import json
import math

import numpy as np
import pytest

from sl_jax.training.metrics import MetricsWriter, read_metrics


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


def test_no_records(tmp_path):
    assert list(read_metrics(tmp_path)) == []

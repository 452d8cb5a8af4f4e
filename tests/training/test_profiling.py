"""Traces over the steps that were asked for."""

import jax.numpy as jnp
import pytest

from sl_jax.parallel.processes import Processes
from sl_jax.training.configuration import ConfigError
from sl_jax.training.profiling import Profiler, Span, span


def test_what_the_flag_means():
    assert span("") is None and span("2:3") == Span(2, 3)


@pytest.mark.parametrize("text", ["2", "a:b", "1:0", "-1:2", "1:2:3"])
def test_what_it_does_not_mean(text):
    with pytest.raises(ConfigError, match="--profile"):
        span(text)


def test_a_trace_of_the_span_and_of_nothing_else(tmp_path, monkeypatch):
    from sl_jax.training import profiling

    told = []
    start, stop = profiling.jax.profiler.start_trace, profiling.jax.profiler.stop_trace
    monkeypatch.setattr(
        "jax.profiler.start_trace", lambda folder: (told.append("start"), start(folder))
    )
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: (told.append("stop"), stop()))
    profiler = Profiler(Span(1, 2), tmp_path)
    for step in range(5):
        profiler.at(step)
        told.append(step)
        jnp.ones(8).sum().block_until_ready()
    profiler.close()
    assert told == [0, "start", 1, 2, "stop", 3, 4]
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_run_that_ends_within_the_span_leaves_what_there_is(tmp_path):
    profiler = Profiler(Span(0, 9), tmp_path)
    profiler.at(0)
    profiler.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_processes_of_one_host_do_not_write_over_each_other(tmp_path):
    for index in range(2):
        profiler = Profiler(Span(0, 1), tmp_path, Processes(index, count=2))
        profiler.at(0)
        profiler.close()
    for index in range(2):  # a folder of logs to TensorBoard, each
        assert list(tmp_path.glob(f"profile/process_{index}/plugins/profile/*/*.xplane.pb"))


def test_no_trace_unless_asked(tmp_path):
    profiler = Profiler(None, tmp_path)
    profiler.at(0)
    profiler.close()
    assert not any(tmp_path.iterdir())

"""One run at a time writes to a folder, and none has to clear up after one that was killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sl_jax.checkpoints import lock
from sl_jax.checkpoints.lock import InUseError, sole_writer
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.parallel.processes import ProcessError, Processes

HOLDER = """
import sys, time
from sl_jax.checkpoints.lock import sole_writer
with sole_writer(sys.argv[1]):
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process, which writes to `tmp_path` and is not waited for."""
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def test_a_second_run_is_told_who_runs_and_touches_nothing(tmp_path, holder):
    live = tmp_path / "4.orbax-checkpoint-tmp-1"
    live.mkdir()
    found = (
        rf"{tmp_path} is written to by process {holder.pid} on \S+, since 2\S+Z, .* another config"
    )
    with pytest.raises(InUseError, match=found):
        RunCheckpoints(tmp_path)
    assert live.is_dir()


def test_a_run_that_was_killed_holds_nothing(tmp_path, holder):
    """Its file is still there."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, {"a": np.zeros(3)})
    assert f'"process": {os.getpid()}' in (tmp_path / ".lock").read_text()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_one_that_is_about_to_end_is_waited_for(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_PATIENCE", 60.0)
    threading.Timer(0.5, holder.kill).start()
    began = time.monotonic()
    with sole_writer(tmp_path):
        assert time.monotonic() - began > 0.4
    assert caplog.text.count("waiting for its end") == 1


def test_of_many_who_want_it_one_at_a_time_has_it(tmp_path):
    """Also while holders remove the file that others have open."""
    held, most = [], []

    def work():
        for _ in range(20):
            with sole_writer(tmp_path):
                held.append(1)
                most.append(len(held))
                held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    pause, lock._LOOK = lock._LOOK, 0.0
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lock._LOOK = pause
    assert len(most) == 80 and set(most) == {1}


def test_the_main_process_alone_holds_it(tmp_path, holder):
    class Second(Processes):
        def all_gather(self, what, value=None, error=None):
            assert error is None
            raise ProcessError("process 0 cannot go on: InUseError")

    with pytest.raises(ProcessError, match="process 0 cannot go on"):
        RunCheckpoints(tmp_path, processes=Second(1, 2))


def test_a_drive_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with sole_writer(tmp_path):
        assert f"The drive of {tmp_path} has no locks" in caplog.text


def test_stores_have_none(tmp_path):
    with sole_writer("gs://bucket/run/checkpoints"):
        pass

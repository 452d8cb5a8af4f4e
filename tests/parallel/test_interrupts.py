"""Interrupts come through where they do no harm, and SIGTERM in the time that is left."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sl_jax.parallel import interrupts as module
from sl_jax.parallel.interrupts import Interrupts, OthersGoneError, Terminated
from sl_jax.training.console import ending_in_a_line

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.fixture
def interrupts():
    """Of a process alone."""
    before = [signal.getsignal(number) for number, _ in KINDS]
    found = Interrupts(True, "Process 0")
    with found.open(60.0):
        yield found
    assert [signal.getsignal(number) for number, _ in KINDS] == before
    assert found._time_is_up is None and found.received == 0


@pytest.mark.parametrize(("number", "error"), KINDS)
def test_one_process_alone_is_interrupted_where_it_is(interrupts, number, error):
    with pytest.raises(KeyboardInterrupt) as raised:
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert type(raised.value) is error


@pytest.mark.parametrize(("number", "error"), KINDS)
def test_what_belongs_together_is_finished_first(interrupts, number, error):
    done = []
    with pytest.raises(KeyboardInterrupt) as raised, interrupts.held():
        with interrupts.held():
            os.kill(os.getpid(), number)
            done.append(1)
        done.append(2)
    assert done == [1, 2] and type(raised.value) is error


def test_without_an_interrupt_nothing_is_raised(interrupts):
    with interrupts.held():
        pass
    with pytest.raises(ZeroDivisionError), interrupts.held():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_was_raised_is_not_raised_again(interrupts):
    """What is saved after an interrupt is saved in such a block."""
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    with interrupts.held():
        pass


def test_every_run_of_a_process_has_its_own_grace(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(module, "end_now", lambda message, code: ended.set())
    interrupts = Interrupts(True, "Process 0")
    for grace in (60.0, 0.05):
        assert not ended.is_set()
        with pytest.raises(Terminated), interrupts.open(grace):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                assert ended.wait(0.5 if grace > 1 else 30) == (grace < 1)


def test_of_several_processes_a_second_ctrl_c_alone_is_raised(caplog):
    interrupts = Interrupts(False, "Process 3")
    with interrupts.open(60.0):
        for _ in range(2):  # schedulers repeat it
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM
        deadline = time.monotonic() + 60
        while "Process 3 got SIGTERM: all stop at their next exchange" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_a_garbage_collection_it_is_noted(interrupts):
    def callback(phase, info):
        if phase == "stop":
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.insert(1, callback)
    gc.collect()
    gc.callbacks.remove(callback)
    assert interrupts.received == signal.SIGINT


def test_other_threads_get_no_signals():
    problems = []

    def work():
        try:
            with Interrupts(True, "Process 0").open(60.0):
                pass
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(Terminated, 143, "Terminated."), (KeyboardInterrupt, 130, "Stopped.")],
)
def test_the_exit_code_tells_who_wanted_the_end(capsys, error, code, said):
    with pytest.raises(SystemExit) as ended, ending_in_a_line((), "epoch"):
        raise error
    assert ended.value.code == code
    assert (
        f"{said} The same command goes on after the last complete epoch" in capsys.readouterr().out
    )


def test_the_impatient_stop_nothing_of_the_end(tmp_path):
    """Ctrl-C again, once "Stopped." is said: in what runs at exit, and where finalizers run."""
    program = """
import atexit, signal
from sl_jax.training.console import ending_in_a_line
atexit.register(lambda: [signal.raise_signal(signal.SIGINT), print("tidied up")])
with ending_in_a_line((), "epoch"):
    raise KeyboardInterrupt
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (130, "")
    assert ended.stdout.startswith("\nStopped. ") and ended.stdout.endswith("tidied up\n")


def test_where_another_process_was_killed_the_same_command_goes_on(capsys):
    with pytest.raises(SystemExit) as ended, ending_in_a_line((RuntimeError,), "epoch"):
        raise OthersGoneError("process 0 is gone; please start all again")
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("OthersGoneError: process 0 is gone; please start")


def test_the_program_ends_when_the_grace_is_over():
    """Whatever it hangs in, and without waiting for it."""
    program = """
import signal, time
from sl_jax.parallel import interrupts as module
from sl_jax.parallel.interrupts import Interrupts
with Interrupts(False, "Process 0").open(0.2):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(600)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 143
    assert "The 0.2 s of grace are over" in ended.stderr and "newest checkpoint" in ended.stderr

"""How a command ends where its user can do something about it."""

import errno
import os
import ssl

import pytest
from jax.errors import JaxRuntimeError

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.parallel.interrupts import OthersGoneError, Terminated
from sl_jax.parallel.processes import ProcessError
from sl_jax.training.console import ending_in_a_line, exit_code


def test_an_expected_error_ends_in_its_message():
    with pytest.raises(SystemExit) as end, ending_in_a_line((OSError,), "update"):
        raise FileNotFoundError("no such folder; please make it")
    assert end.value.code == "FileNotFoundError: no such folder; please make it"


@pytest.mark.parametrize("name", [None, "run/metrics.jsonl"])
def test_an_error_of_the_system_names_a_path_and_what_to_do(name):
    with pytest.raises(SystemExit) as end, ending_in_a_line((), "update", "run"):
        raise OSError(errno.ENOSPC, "full", name)
    place = name or "run"
    assert end.value.code.startswith(f"OSError: {place}: No space left on device; please free")


def test_other_errors_are_told_whole_and_have_a_code_of_their_own(capsys):
    with pytest.raises(SystemExit) as end, ending_in_a_line((OSError,), "update"):
        raise ZeroDivisionError
    assert end.value.code == 70
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "ZeroDivisionError" in told


class ClientOSError(OSError):
    """As a network library has one, with whatever number its reason has."""


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ConnectionError("the server has gone"),
        TimeoutError(),
        OSError(errno.ETIMEDOUT, "timed out"),
        OSError(errno.ESTALE, "stale file handle", "run/metrics.jsonl"),
        OSError(errno.EIO, "input/output error"),
        ssl.SSLError(errno.EPERM, "bad record"),  # the number of one of its own
        ClientOSError(errno.EACCES, "Cannot connect to host"),
        ClientOSError("no answer"),
    ],
    ids=repr,
)
def test_what_may_pass_by_starts_again(error, capsys):
    with pytest.raises(SystemExit) as end, ending_in_a_line((), "epoch", "run"):
        raise error
    assert end.value.code == 70
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and str(error) in told


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG, errno.EDQUOT])
def test_what_a_user_can_put_right_does_not(number):
    with pytest.raises(SystemExit) as end, ending_in_a_line((), "epoch", "run"):
        raise OSError(number, os.strerror(number))
    assert f": run: {os.strerror(number)}; please " in end.value.code


@pytest.mark.parametrize(
    "told",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\n  Buffers:\n  many",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in space hbm.",
        "RESOURCE_EXHAUSTED: Attempting to allocate 1.00G. That was not possible. 512M are free.",
    ],
)
def test_a_device_that_is_too_small_ends_in_a_line_with_advice(told):
    with (
        pytest.raises(SystemExit) as end,
        ending_in_a_line((), "epoch", "run", "config.batch") as code_of,
    ):
        raise JaxRuntimeError(told)
    first = told.splitlines()[0]
    assert end.value.code == f"JaxRuntimeError: {first}; please lower config.batch"
    assert code_of(JaxRuntimeError(told)) == 1
    assert code_of(JaxRuntimeError("RESOURCE_EXHAUSTED: too many requests")) == 70
    assert code_of(JaxRuntimeError("INTERNAL: out of memory, or of patience")) == 70


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (OSError(errno.ESTALE, "stale file handle"), 70),
        (ValueError("UNAVAILABLE: Error writing, CURL error"), 70),  # as TensorStore's are
        (OSError(errno.ENOSPC, "full"), 1),
        (ValueError("UNKNOWN: Error writing: [os_error_code='28']"), 1),
        (OSError("it takes 9 MB, and 3 MB are free"), 1),
        (ClientOSError("no model of this name"), 1),  # as the hub's are
        (KeyError("a tensor"), 1),
        (None, 1),
    ],
    ids=repr,
)
def test_what_caused_an_expected_error_may_pass_by(cause, code, capsys):
    line = "CheckpointError: a checkpoint cannot be written"
    with pytest.raises(SystemExit) as end, ending_in_a_line((CheckpointError,), "epoch"):
        raise CheckpointError("a checkpoint cannot be written") from cause
    if code == 1:
        assert end.value.code == line
    else:
        assert (end.value.code, capsys.readouterr().err) == (code, f"{line}\n")


@pytest.mark.parametrize("code", [70, 143])
def test_who_ends_because_of_another_ends_with_its_code(code, capsys):
    with pytest.raises(SystemExit) as end, ending_in_a_line((ProcessError,), "epoch"):
        raise ProcessError("process 1 stopped: ZeroDivisionError", code)
    assert end.value.code == code
    assert capsys.readouterr().err == "ProcessError: process 1 stopped: ZeroDivisionError\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProcessError("they run different programs; please start all with one version"), 1),
        (FileNotFoundError("gs://bucket/run"), 1),
        (KeyError("x"), 1),
        (IndexError(), 70),
        (OthersGoneError(), 143),
        (Terminated(), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_codes(error, code):
    assert exit_code(error, (KeyError,)) == code


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end, ending_in_a_line((OSError,), "update"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "The same command goes on after the last complete update" in capsys.readouterr().out

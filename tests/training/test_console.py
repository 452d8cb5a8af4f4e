"""How a command ends where its user can do something about it."""

import errno

import pytest

from sl_jax.training.console import ending_in_a_line


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


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end, ending_in_a_line((OSError,), "update"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "The same command goes on after the last complete update" in capsys.readouterr().out

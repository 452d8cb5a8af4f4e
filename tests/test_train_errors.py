"""Errors of the system end a training run in one line that names a path."""

import errno
import os

import pytest

from sl_jax import train
from sl_jax.grpo.config import GrpoConfig
from sl_jax.training.console import ending_in_a_line


def _ended(workdir):
    config = GrpoConfig(str(workdir), "tiny", 1)
    expected = train._EXPECTED
    with pytest.raises(SystemExit) as ended, ending_in_a_line(expected, "epoch", str(workdir)):
        train.run(config)
    assert isinstance(ended.value.code, str)  # printed, with exit code 1
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


def test_a_work_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    assert str(tmp_path / "run") in _ended(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("names", [True, False])
def test_a_disk_that_takes_nothing(tmp_path, monkeypatch, number, names):
    """Writing to an open file fails without the file's name."""
    file = [str(tmp_path / "run" / "some.file")] if names else []

    def claim(*args):
        raise OSError(number, os.strerror(number), *file)

    monkeypatch.setattr("sl_jax.grpo.run.work.claim", claim)
    told = _ended(tmp_path / "run")
    place = (file or [str(tmp_path / "run")])[0]
    assert f"{place}: {os.strerror(number)}; please" in told

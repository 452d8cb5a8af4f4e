"""Runs that are killed go on as if they had not been; `tests/soak/kills.py` does it fifty times."""

import signal
import time

import numpy as np
import pytest
from runner import LIMIT, MINIMAL, Runner, differences, draw_kill, left_by

pytestmark = pytest.mark.slow

PHASES = ("rollout", "judging", "learning", "checkpointing", "exporting")
SEED = 8


@pytest.fixture(scope="module")
def one(random_checkpoint, tmp_path_factory):
    """Runs of one process."""
    return Runner(random_checkpoint, tmp_path_factory.mktemp("one"), MINIMAL, devices=1)


@pytest.fixture(scope="module")
def two(random_checkpoint, tmp_path_factory):
    """Runs of two processes, with half of every batch each."""
    return Runner(random_checkpoint, tmp_path_factory.mktemp("two"), MINIMAL, devices=2)


@pytest.fixture(scope="module")
def undisturbed(one, tmp_path_factory):
    """What a run of one process leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    one(folder)
    return left_by(folder / "run")


@pytest.fixture(scope="module")
def undisturbed_two(two, tmp_path_factory):
    """What a run of two processes leaves."""
    folder = tmp_path_factory.mktemp("undisturbed_two")
    two(folder, ((), ()))
    return left_by(folder / "run")


def test_a_run_killed_in_five_phases_ends_as_one_that_was_not(one, undisturbed, tmp_path):
    """All of it to the last bit: two runs of one seed are one run."""
    rng = np.random.default_rng(SEED)
    for phase in PHASES:
        one(tmp_path, kills=[draw_kill(rng, phase)], code=-signal.SIGKILL)
    one(tmp_path)
    assert differences(left_by(tmp_path / "run"), undisturbed) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_both_go_on(
    two, undisturbed_two, tmp_path, killed
):
    kills = [None, None]
    kills[killed] = draw_kill(np.random.default_rng(SEED + killed), "learning")
    kills[killed]["number"] += 8  # with checkpoints behind them
    since = []

    def wait(started):
        assert started[killed].wait(LIMIT) == -signal.SIGKILL
        since.append(time.monotonic())
        assert started[1 - killed].wait(LIMIT)
        since.append(time.monotonic())

    codes = [1, 1]
    codes[killed] = -signal.SIGKILL
    said, _ = two(tmp_path, ((), ()), kills=kills, code=codes, meanwhile=wait)
    assert since[1] - since[0] < 150  # by the other's signs of life, 60 s; on a busy machine
    assert f"process {killed}" in said[1 - killed] and "please start all again" in said[1 - killed]
    said, _ = two(tmp_path, ((), ()))
    assert "Going on after epoch" in said[0]
    assert differences(left_by(tmp_path / "run"), undisturbed_two) == []

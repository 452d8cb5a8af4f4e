"""Runs that are killed go on as if they had not been; `tests/soak/kills.py` does it fifty times.

So do those whose disk fails, and those that stopped for what is not finite.
"""

import json
import re
import signal
import time
from contextlib import closing

import numpy as np
import pytest
from runner import (
    IN_FLIGHT,
    LIMIT,
    MINIMAL,
    PREFLIGHT,
    SERVED,
    Runner,
    differences,
    draw_kill,
    left_by,
)

from sl_jax.checkpoints.orbax import find_step
from sl_jax.parallel.interrupts import UNEXPECTED
from sl_jax.scoring.cache import AnswerCache
from sl_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow

PHASES = ("rollout", "judging", "learning", "checkpointing", "exporting")
SEED = 8


@pytest.fixture(scope="module")
def one(random_checkpoint, judge_token, tmp_path_factory):
    """Runs of one process, which soon have a checkpoint to go on from."""
    settings, folder = MINIMAL | {"checkpoint.every": 1}, tmp_path_factory.mktemp("one")
    return Runner(random_checkpoint, folder, settings, devices=1, token=judge_token)


@pytest.fixture(scope="module")
def undisturbed(one, tmp_path_factory):
    """What a run of one process leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    one(folder)
    return left_by(folder / "run")


def test_a_run_killed_in_five_phases_ends_as_one_that_was_not(one, undisturbed, servers, tmp_path):
    """All of it to the last bit: two runs of one seed are one run, whoever judges.

    The server, which is paid for every answer, is asked again only what was in flight at a kill;
    and every request is in the budget, which holds over restarts.
    """
    rng, (served, _) = np.random.default_rng(SEED), servers
    served.judge.latency = 0.02
    for number, phase in enumerate(PHASES):
        kill = draw_kill(rng, phase)
        said, _ = one(tmp_path, ((served,),), SERVED, kills=[kill], code=-signal.SIGKILL)
        assert ("Going on after epoch" in said[0]) == (number > 0)
    said, _ = one(tmp_path, ((served,),), SERVED)
    # The last kill may have come when all was written.
    assert "Going on after epoch" in said[0] or "This run is finished" in said[0]
    assert differences(left_by(tmp_path / "run"), undisturbed) == []
    asked = served.judge.asked
    again = asked.total() - len(asked) - PREFLIGHT * len(PHASES)
    assert 0 <= again <= IN_FLIGHT * len(PHASES), again
    with closing(AnswerCache(tmp_path / "run" / "judge.sqlite3")) as ledger:
        counted, _ = ledger.spent()
    assert 0 <= counted - asked.total() <= IN_FLIGHT * len(PHASES), counted


# Runs a command on a small disk of its own at $0; when the command stops itself, so does the disk.
ON_A_DISK = """
mount -t tmpfs -o size=16m disk "$0" || exit 77
"$@" & child=$!
until grep -q 'State:.T' /proc/$child/status 2>&1; do
  kill -0 $child || exit 1
  sleep 0.05
done
{fault}
kill -CONT $child
wait $child
code=$?
rm -f "$0/filler"
cp -r "$0" "$0.left"
exit $code
"""
DISKS = {
    # What is open may be written on, as where a mount changes; new files may not.
    "read-only": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
    "full": 'head -c 64M /dev/zero >"$0/filler"',
}


@pytest.mark.parametrize("kind", DISKS)
def test_a_run_whose_disk_fails_says_so_and_goes_on(one, undisturbed, tmp_path, kind):
    """On real ones: each in a mount namespace of its own, which the kernel has to allow."""
    run, left = tmp_path / "run", tmp_path / "run.left"
    run.mkdir()
    stop = {"phase": "learning", "number": 6, "delay": 0, "signal": "SIGSTOP"}
    script = ON_A_DISK.format(fault=DISKS[kind])
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, str(run)]
    (said,), _ = one(tmp_path, kills=[stop], inside=inside, code=1)
    *_, last = said.strip().splitlines()
    assert re.match(r"\w+Error: ", last) and str(run) in last, said
    assert re.search({"read-only": "read-only", "full": "no space"}[kind], last, re.I), said
    assert "Traceback" not in said
    run.rmdir()
    left.rename(run)
    saved = int(find_step(run).name)
    assert saved >= 1
    (said,), _ = one(tmp_path)
    assert f"Going on after epoch {saved}" in said
    assert differences(left_by(run), undisturbed) == []


def test_two_processes_of_which_one_is_stopped_or_killed_end_as_two_that_were_not(
    random_checkpoint, tmp_path
):
    """SIGTERM to one in an update, SIGKILL to one and to the other, whose checkpoint is damaged.

    Nobody waits for ever, and all go on from the same checkpoint.
    """
    settings = MINIMAL | {"epochs": 5, "checkpoint.every": 2, "evaluation.every": 5}
    settings |= {"learner.updates": 1, "learner.micro_batch": 2}
    runner = Runner(random_checkpoint, tmp_path, settings, devices=2)
    both, lost = ((), ()), {"lost": 30.0}
    runner(tmp_path / "whole", both)

    folder = tmp_path / "stopped"
    learning = {"phase": "learning", "number": 1, "delay": 0.01}
    kills = [None, learning | {"signal": "SIGTERM", "pace": 3.0}]
    said, _ = runner(folder, both, kills=kills, code=143)
    assert "got SIGTERM: all stop at their next exchange" in said[1]
    assert said[1].count("A micro-batch") < 4  # of an update
    assert all("goes on after the last complete epoch" in text for text in said)
    assert find_step(folder / "run").name == "1"

    saving = {"phase": "checkpointing", "number": 0, "delay": 0.05}
    # The last epoch's, since the save after the fourth waits until that after the second is whole.
    for killed, moment in ((1, learning | {"number": 3}), (0, saving)):
        kills = [None, None]
        kills[killed] = moment
        since = []

        def wait(started, killed=killed, since=since):
            assert started[killed].wait(LIMIT) == -signal.SIGKILL
            since.append(time.monotonic())
            since.append(started[1 - killed].wait(LIMIT))
            since.append(time.monotonic())
            raise _Ended

        with pytest.raises(_Ended):
            runner(folder, both, kills=kills, meanwhile=wait, faults=lost)
        before, code, after = since
        assert after - before < 300  # 30 s without a sign of life; on a busy machine
        told = (folder / f"printed_{1 - killed}.txt").read_text()
        if code == -signal.SIGABRT:  # JAX noticed first, or while the process was ending
            assert "another task died" in told, told
        elif code == UNEXPECTED:  # the other was gone in the middle of a collective
            assert f"Process {killed} does not stop at the same place" in told, told
        else:
            assert code == 143 and f"OthersGoneError: process {killed}" in told, told
            assert "they go on from the newest checkpoint" in told
    whole = sorted(_whole_steps(folder / "run"), reverse=True)
    assert len(whole) >= 2, told
    newest, before = whole[:2]
    for path in (folder / "run" / "checkpoints" / str(newest)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    said, _ = runner(folder, both)
    assert all(f"Checkpoint {newest}" in text and "is passed over" in text for text in said)
    assert f"Going on after epoch {before}." in said[0]
    assert (folder / "run" / "checkpoints" / f"damaged-{newest}").is_dir()
    assert differences(left_by(folder / "run"), left_by(tmp_path / "whole" / "run")) == []


def test_what_is_not_finite_in_one_process_all_leave_out_and_stop_for(random_checkpoint, tmp_path):
    """First a prompt, then the gradients of all further updates, in process 1 alone."""
    settings = MINIMAL | {"epochs": 5, "checkpoint.every": 100, "evaluation.every": 5}
    settings |= {"learner.updates": 1, "health.not_finite": 2}
    runner = Runner(random_checkpoint, tmp_path, settings, devices=2)
    spoiled = {"process": 1, "prompt": [2, 1], "update": 2}  # both of them in the second epoch
    said, _ = runner(tmp_path, ((), ()), faults={"spoiled": spoiled}, code=1)
    for text in said:
        assert "NotFiniteError: 2 updates in a row were not finite" in text
    assert find_step(tmp_path / "run").name == "4"
    told = json.loads((tmp_path / "run/not_finite/epoch_000002_step_2_slot_1.json").read_text())
    assert told["told_not_finite"][0]["field"] == "text" and not told["update_skipped"]
    kept = sorted((tmp_path / "run" / "not_finite").glob("epoch_000003_*.json"))
    assert len(kept) == 4  # all groups of the update
    told = json.loads(kept[0].read_text())
    assert told["update_skipped"] and set(told["gradient_norm_by_sampling_step"].values()) == {None}

    said, (first, second) = runner(tmp_path, ((), ()))
    assert "Going on after epoch 4." in said[0]
    assert all(first[name].tobytes() == second[name].tobytes() for name in first.files)
    _, *records = read_metrics(tmp_path / "run")
    assert [r["rollout/not_finite"] for r in records] == [0, 2, 0, 0, 0]
    assert [r["learner/updates"] for r in records] == [1, 2, 2, 2, 3]
    assert [r["learner/skipped_updates"] for r in records] == [0, 0, 1, 2, 2]


def _whole_steps(run):
    return [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]


class _Ended(Exception):
    """Both processes have come to their ends."""

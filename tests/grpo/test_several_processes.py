"""Two real processes with four devices each train the adapter of one with eight.

They do so with judges of their own, of which some fail; and where one cannot go on, both stop.
"""

import random
import signal
import time

import jax
import numpy as np
import pytest
from conftest import Bench
from runner import LIMIT, Runner
from test_mesh_shapes import assert_close, results

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.scoring.records import read_records
from sl_jax.training.metrics import read_metrics

SETTINGS = {
    "epochs": 2,
    "data.buckets": ((32, 32),),
    "data.eval_fraction": 0.2,
    "rollout.groups": 8,
    "rollout.batch_groups": 4,
    "rollout.group_size": 4,
    "rollout.steps": 4,
    "rollout.window_range": (0, 3),
    "rollout.window_size": 2,
    "learner.micro_batch": 16,
    "lora.rank": 4,
    # With random weights every candidate would meet the vetoes, and nothing be learned.
    "rewards": (("judge", 1.0),),
    "evaluation.pictures": 5,
    "evaluation.batch": 4,
    "evaluation.steps": 2,
    "evaluation.every": 2,
    "evaluation.shown": 3,
    "checkpoint.every": 100,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "judge.model": "embedded-precise",
    "judge.key_env": "TEST_JUDGE_TOKEN",
    "judge.cool_down.first": 0.1,
    "judge.cool_down.longest": 0.2,
    "judge.patience": 0.5,
    "judge.min_valid": 1.0,
}


MESH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def runner(random_checkpoint, judge_token, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    options = {"devices": 8, "pictures": 24, "token": judge_token}
    return Runner(random_checkpoint, folder, SETTINGS, **options)


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """The work directory and the adapter of one process, which judges by itself."""
    folder = tmp_path_factory.mktemp("one")
    _, (adapter,) = runner(folder, ((),))
    return folder / "run", adapter


def _assert_same(workdir, adapters, whole):
    """Processes have one adapter, to the last bit, which is that of one process."""
    first, *others = adapters
    names = whole[1].files
    for other in others:
        assert all(first[name].tobytes() == other[name].tobytes() for name in names)
    distance = np.concatenate([np.abs(first[name] - whole[1][name]).ravel() for name in names])
    assert np.mean(distance > 1e-5) < 0.01
    # Adam makes steps of full size, here 1e-3, out of gradients that are hardly more than zero.
    assert distance.max() < 2e-4
    mine, theirs = (
        {(r.epoch, r.scores.group_id): r for r in read_records(path / "judge")}
        for path in (workdir, whole[0])
    )
    assert mine.keys() == theirs.keys() and len(mine) == 16
    for key, record in mine.items():
        assert record.picture_id == theirs[key].picture_id and record.scores.valid.all()
    metrics, expected = (list(read_metrics(path)) for path in (workdir, whole[0]))
    assert [m["step"] for m in metrics] == [m["step"] for m in expected] == [0, 1, 2]
    for found, right in zip(metrics, expected, strict=True):
        for name in ("evaluation/reward", "evaluation/psnr", "judge/reward_mean"):
            assert found.get(name) == pytest.approx(right.get(name), abs=5e-3), name


def _latest(workdir):
    checkpoints = RunCheckpoints(workdir / "checkpoints")
    try:
        return checkpoints.latest
    finally:
        checkpoints.close()


def _misbehave(judge, share, seed):
    """HTTP 500 and no JSON in turn, in this share of its answers; returns those."""
    answer, draw, done = judge.answer, random.Random(seed), []

    async def answered(request):
        if draw.random() >= share:
            return await answer(request)
        done.append("garbage" if len(done) % 2 else "500")
        if done[-1] == "500":
            raise ArithmeticError("for the test")
        return "as an artist, I think"

    judge.answer = answered
    return done


@pytest.fixture(scope="module")
def wanted(random_checkpoint, quick_compilation):
    """Samples, losses and gradient of one process with eight devices."""
    return results(Bench(random_checkpoint, **MESH))


@pytest.mark.slow
def test_two_processes_with_partly_failing_judges_train_the_adapter_of_one(
    runner, whole, wanted, four_servers, tmp_path
):
    """And have its samples, losses and gradient, to float32 rounding, in an update before that."""
    a, b, c, d = four_servers
    faults = [_misbehave(served.judge, 0.5, seed) for seed, served in enumerate((b, d))]
    also = {"profile": "1:1", "measured": {"model": str(runner.model), "mesh": MESH}}
    _, adapters = runner(tmp_path, ([a, b], [c, d]), faults=also)
    assert len(adapters) == 2
    for index in range(2):
        found = np.load(tmp_path / f"results_{index}.npz")
        leaves, structure = jax.tree.flatten(wanted)
        told = jax.tree.unflatten(structure, [found[f"arr_{n}"] for n in range(len(leaves))])
        jax.tree.map(assert_close, told, wanted)
    _assert_same(tmp_path / "run", adapters, whole)
    # Each process asked its own servers, and met both kinds of failure.
    assert all(served.judge.asked.total() > 0 for served in four_servers)
    assert all({"500", "garbage"} <= set(done) for done in faults), faults
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"judge.sqlite3", "judge_1.sqlite3", "report.html", "adapter", "judge"} <= written
    endpoints = {
        int(name.rpartition(":")[2])
        for record in read_records(tmp_path / "run" / "judge")
        for name in record.scores.endpoints
    }
    traces = sorted((tmp_path / "run" / "profile").glob("*/plugins/profile/*/*.xplane.pb"))
    assert [path.parents[3].name for path in traces] == ["process_0", "process_1"]
    assert {a.port, c.port} <= endpoints <= {served.port for served in four_servers}


@pytest.mark.slow
def test_when_the_judge_of_one_is_gone_all_wait_and_stop_and_one_alone_goes_on(
    runner, whole, four_servers, tmp_path
):
    a, b, *_ = four_servers
    b.judge.dies_after = 40  # in the second epoch
    said, adapters = runner(tmp_path, ([a], [b]), {"judge.max_wait": 4.0}, code=1)
    assert adapters == []
    for text in said:
        # It said what it waits for before it stopped, and whose judge it is.
        waiting, _, end = text.partition("JudgeUnavailableError")
        assert "Waiting for the judge, 4 s at most: " in waiting and "process 1: " in waiting
        assert "process 1: " in end and "4 s" in end and str(b.port) in end
    assert _latest(tmp_path / "run") == 1
    b.thread.join(10)
    b.start()
    said, adapters = runner(tmp_path, ([a, b],))
    assert "Going on after epoch 1." in said[0]
    _assert_same(tmp_path / "run", adapters, whole)


# Decisions that all must take alike; after its first update the policy is beyond the bound.
VARIANTS = {
    "learner.stop.log_ratio": 1e-9,
    "rollout.guidance": 2.0,
    "rollout.max_staleness": 1,
    "rollout.window_order": "sliding",
}


@pytest.mark.slow
def test_an_interrupt_of_one_stops_all_with_the_last_complete_epoch(runner, tmp_path):
    """Here in a run of variants, which then goes on, with what was under way, to its end."""
    workdir = tmp_path / "run"

    def interrupt(started):
        deadline = time.monotonic() + LIMIT
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):  # epochs 0 and 1
            assert all(process.poll() is None for process in started)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started[1].send_signal(signal.SIGINT)

    said, adapters = runner(tmp_path, ((), ()), VARIANTS, code=130, meanwhile=interrupt)
    assert adapters == [] and not (workdir / "report.html").exists()
    assert "Process 1 got SIGINT: all stop at their next exchange" in said[1]
    assert all("goes on after the last complete epoch" in text for text in said)
    assert _latest(workdir) == 1
    said, (first, second) = runner(tmp_path, ((), ()), VARIANTS)
    assert "Going on after epoch 1." in said[0]
    assert all(first[name].tobytes() == second[name].tobytes() for name in first.files)
    _, *records = read_metrics(workdir)
    assert [r["rollout/staleness"] for r in records] == [0, 1]
    assert [r["learner/stopped_updates"] for r in records] == [1, 2]
    assert [r["learner/updates"] for r in records] == [1, 1]


@pytest.mark.slow
def test_processes_with_other_configurations_are_refused(runner, tmp_path):
    own = ({}, {"lora.rank": 5, "judge.concurrency": 2})
    said, _ = runner(tmp_path, ((), ()), own=own, code=1)
    for text in said:
        assert "ConfigError: process 1 has another configuration than process 0" in text
        assert "config.lora.rank: 4 in process 0, 5 in process 1" in text
        assert "concurrency" not in text  # which each may choose
    assert not (tmp_path / "run").exists()

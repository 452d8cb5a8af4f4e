"""Two real processes with four devices each train the adapter of one with eight."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sl_jax.data import write_designs
from sl_jax.scoring.records import read_records
from sl_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("one_process.py")
DEVICES = 8
LIMIT = 900  # seconds, on a busy machine
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
    "judge.min_valid": 1.0,
}


def _configuration(**fields):
    config = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"]("tiny").to_dict()
    for path, value in {**SETTINGS, **fields}.items():
        *parents, name = path.split(".")
        here = config
        for parent in parents:
            here = here[parent]
        here[name] = value
    return config


def _trained(count, folder, **fields):
    """The work directory of a run of so many processes, and the adapter as each has it."""
    folder.mkdir()
    workdir = folder / "run"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        # On a busy machine devices wait for each other longer than XLA's 40 s.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={LIMIT}",
    }
    given = {
        "folder": str(folder),
        "devices": DEVICES // count,
        "config": _configuration(workdir=str(workdir), **fields),
    }
    started, printed = [], [folder / f"printed_{index}.txt" for index in range(count)]
    for index, text in enumerate(printed):
        distributed = {"join": "off"}
        if count > 1:
            distributed = {"coordinator": address, "processes": count, "process": index}
        arguments = folder / f"arguments_{index}.json"
        arguments.write_text(json.dumps(given | {"distributed": distributed}))
        with text.open("w") as file:
            command = [sys.executable, str(PROGRAM), str(arguments)]
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            )
    try:
        codes = [process.wait(LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * count, "\n\n".join(text.read_text()[-5000:] for text in printed)
    return workdir, [np.load(folder / f"adapter_{index}.npz") for index in range(count)]


def _assert_same(workdir, adapters, whole, wanted):
    first, other = adapters
    names = wanted.files
    assert all(np.array_equal(first[name], other[name]) for name in names)
    distance = np.concatenate([np.abs(first[name] - wanted[name]).ravel() for name in names])
    assert np.mean(distance > 1e-5) < 0.01
    # Adam makes steps of full size, here 1e-3, out of gradients that are hardly more than zero.
    assert distance.max() < 2e-4
    mine, theirs = (
        {(r.epoch, r.scores.group_id): r for r in read_records(folder / "judge")}
        for folder in (workdir, whole)
    )
    assert mine.keys() == theirs.keys() and len(mine) == 16
    for key, record in mine.items():
        assert record.picture_id == theirs[key].picture_id and record.scores.valid.all()
    metrics, expected = (list(read_metrics(folder)) for folder in (workdir, whole))
    assert [m["step"] for m in metrics] == [m["step"] for m in expected] == [0, 1, 2]
    for found, right in zip(metrics, expected, strict=True):
        for name in ("evaluation/reward", "evaluation/psnr", "judge/reward_mean"):
            assert found.get(name) == pytest.approx(right.get(name), abs=5e-3), name


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(random_checkpoint, tmp_path):
    write_designs(tmp_path / "pictures", "B", range(24), 32, 3)
    fields = {"model": str(random_checkpoint), "data.path": str(tmp_path / "pictures")}
    whole, (wanted,) = _trained(1, tmp_path / "one", **fields)
    workdir, adapters = _trained(2, tmp_path / "two", **fields)
    _assert_same(workdir, adapters, whole, wanted)
    assert (workdir / "report.html").exists() and (workdir / "adapter").is_dir()

"""`launch/slurm.sbatch` under Slurm for real: one node of it on this machine, started by the test.

Two tasks train with the judge of another job; one of them is killed, and the job is requeued.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from services import LIMIT, free_ports, wait_for

from sl_jax.data import write_designs
from sl_jax.scoring.records import read_records

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
TOKEN = "a-token-of-the-test"
pytestmark = pytest.mark.system

# Without cgroups, and with more cores than the machine may have: tasks share them.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=localhost CPUs=16 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The tiny configuration, smaller.
SETTINGS = {
    "epochs": "3",
    "data.buckets": "((32, 32),)",
    "data.eval_fraction": "0.2",
    "rollout.groups": "4",
    "rollout.batch_groups": "2",
    "rollout.group_size": "4",
    "rollout.steps": "4",
    "rollout.window_size": "2",
    "rollout.window_range": "(0, 3)",
    "learner.micro_batch": "8",
    "evaluation.every": "3",
    "evaluation.pictures": "4",
    "evaluation.batch": "4",
    "evaluation.steps": "2",
    "evaluation.shown": "1",
    "checkpoint.every": "1",
    "judge.model": "embedded-precise",
    "judge.key_env": "JUDGE_TOKEN",
}


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, f"{name} is missing: please install slurm-wlm and munge, as .ci/run does"
    return found


class Slurm:
    """Its daemons in the foreground, each a child of the test, with all files in one folder."""

    def __init__(self, place: Path):
        assert os.getuid() == 0, "the daemons of Slurm start jobs as their owners: please be root"
        self.place = place
        self.environment = os.environ | {
            "SLURM_CONF": str(place / "slurm.conf"),
            "VENV": sys.prefix,
            "JUDGE_TOKEN": TOKEN,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "LINGER": "5",
        }
        self.environment.pop("XLA_FLAGS", None)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in PROGRAMS:
            program(name)
        key, ports = self.place / "munge.key", free_ports(2)
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        text = CONFIGURATION.format(place=self.place, ports=ports)
        (self.place / "slurm.conf").write_text(text)
        (self.place / "state").mkdir()
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        named = [f"--{flag}={self.place}/munge.{end}" for flag, end in files.items()]
        self._daemon("munged", "--foreground", "--force", *named)
        wait_for("munge", (self.place / "munge.socket").exists, 60)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D", "-N", "localhost")
        wait_for("a node", lambda: self.node().startswith("idle"), 120)

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.place / f"{name}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    [program(name), *arguments], env=self.environment, stdout=log, stderr=log
                )
            )

    def stop(self) -> None:
        """Ends the jobs, and then the daemons."""
        with contextlib.suppress(subprocess.CalledProcessError, TimeoutError):
            self.call("scancel", "--full", "--signal=KILL", "--user=root")
            self.call("scancel", "--user=root")
            wait_for("the end of all jobs", lambda: not self.call("squeue", "--noheader"), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, **variables: str) -> str:
        """What a program of Slurm prints."""
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            cwd=ROOT,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> int:
        """The number of a job: options of sbatch, then the script and its arguments."""
        output = f"--output={self.place}/%j.log"
        small = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=100")
        return int(self.call("sbatch", "--parsable", output, *small, *words, **variables))

    def node(self) -> str:
        return subprocess.run(
            [program("sinfo"), "--noheader", "--format=%t"],
            env=self.environment,
            capture_output=True,
            text=True,
        ).stdout

    def said(self, job: int) -> str:
        log = self.place / f"{job}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def shown(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: int) -> bool:
        return self.shown(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def goes_on(self, job: int) -> None:
        """Returns when a job that is being requeued has come to its end."""
        wait_for("the requeue", lambda: self.shown(job)["Restarts"] == "1" or self.ended(job))
        # Slurm lets it wait for two minutes, to be sure that its script has ended, and knows it.
        wait_for("the end of the script", lambda: not self.processes(job))
        time.sleep(2)
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")
        wait_for("the end", lambda: self.ended(job))

    def processes(self, job: int) -> dict[int, tuple[str, dict[str, str]]]:
        """Command and environment of what runs for a job."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                lines = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                told = dict(line.split("=", 1) for line in lines if "=" in line)
                if told.get("SLURM_JOB_ID") == str(job):
                    found[int(place.name)] = ((place / "cmdline").read_text(), told)
        return found

    def tasks(self, job: int) -> dict[int, int]:
        """Processes of the training by the number of their task."""
        return {
            int(told["SLURM_PROCID"]): number
            for number, (command, told) in self.processes(job).items()
            if command.startswith(f"{sys.prefix}/bin/python\0-m\0sl_jax.train")
        }


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    place = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: it holds Unix sockets
    running = Slurm(place)
    try:
        running.start()
        yield running
    except TimeoutError as error:
        for log in sorted(place.glob("*.log")):
            error.add_note(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        running.stop()
        shutil.rmtree(place, ignore_errors=True)


def fields(**changed: str) -> list[str]:
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    return [f"--config.{name}={value}" for name, value in settings.items()]


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_killed_task_requeues_the_job_which_gives_the_adapter_of_one_process(slurm, tmp_path):
    write_designs(tmp_path / "the pictures", "B", range(12), 32, 3)
    common = ["--config=configs/grpo.py:tiny", f"--config.data.path={tmp_path / 'the pictures'}"]
    (port,) = free_ports(1)
    serve = f"exec {sys.executable} -m sl_jax.judge --port={port} --token_env=JUDGE_TOKEN"
    judge = slurm.submit("--job-name=judge", f"--wrap={serve}")
    run = tmp_path / "run"
    job = slurm.submit(
        *("--ntasks-per-node=2", "launch/slurm.sbatch", *common, f"--config.workdir={run}"),
        *fields(distributed__cpu_devices="1"),
        JUDGE_JOB=str(judge),
        JUDGE_PORT=str(port),
    )
    saved = run / "checkpoints" / "1"
    wait_for("a checkpoint", lambda: saved.exists() or slurm.ended(job))
    tasks = slurm.tasks(job)
    assert set(tasks) == {0, 1}, slurm.said(job)
    os.kill(tasks[1], signal.SIGKILL)
    slurm.goes_on(job)
    said = slurm.said(job)
    assert slurm.shown(job)["JobState"] == "COMPLETED", said
    assert "The tasks ended with status 137: requeued" in said
    assert said.count("2 processes with 2 devices have joined.") == 2
    assert re.search(r"Going on after epoch [12]\.", said)
    endpoints = {name for r in read_records(run / "judge") for name in r.scores.endpoints}
    assert endpoints == {f"localhost:{port}"}

    alone = tmp_path / "alone"
    one = [sys.executable, "-m", "sl_jax.train", *common, f"--config.workdir={alone}"]
    done = subprocess.run(
        [*one, *fields(distributed__cpu_devices="2")],
        cwd=ROOT,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    mine, theirs = adapter_of(run), adapter_of(alone)
    assert mine.keys() == theirs.keys()
    distance = np.concatenate([np.abs(mine[name] - theirs[name]).ravel() for name in mine])
    # Adam makes steps of full size, here 1e-3, out of the few gradients that are hardly more than
    # zero, whose sign is that of their rounding.
    trained = np.concatenate([array.ravel() for array in theirs.values()])
    assert np.mean(distance > 1e-5) < 0.01
    assert np.linalg.norm(distance) < 1e-3 * np.linalg.norm(trained)


def test_what_cannot_run_is_not_requeued(slurm, tmp_path):
    job = slurm.submit(
        *("--ntasks-per-node=2", "launch/slurm.sbatch", "--config=configs/grpo.py:tiny"),
        *(f"--config.workdir={tmp_path / 'run'}", "--config.lora.rank=0"),
    )
    nothing = slurm.submit("--ntasks-per-node=2", "launch/slurm.sbatch")
    over = slurm.submit("--wrap=true")
    wait_for("the end of a job", lambda: slurm.ended(over))
    waits = slurm.submit(
        *("--ntasks-per-node=2", "launch/slurm.sbatch", "--config=configs/grpo.py:tiny"),
        JUDGE_JOB=str(over),
    )
    for number, words in (
        (job, "config.lora.rank"),
        (nothing, "There is nothing to train"),
        (waits, f"The judge's job {over} is over"),
    ):
        wait_for("the end", lambda number=number: slurm.ended(number))
        shown = slurm.shown(number)
        assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0"), slurm.said(number)
        assert words in slurm.said(number)


@pytest.fixture
def stub(slurm, tmp_path) -> Callable[[str], dict[str, str]]:
    """Makes an environment whose Python is a script: variables for a job that trains with it."""

    def made(script: str) -> dict[str, str]:
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!/bin/bash\n{script}\n")
        python.chmod(0o755)
        return {"VENV": str(python.parents[1])}

    return made


# The first start trains until it is told to stop, the second one ends.
TRAINS = """
trap "echo saved; exit 143" TERM
trap "echo saved; exit 130" INT
echo "trains $* from ${SLURM_RESTART_COUNT:-0}"
[ -n "$SLURM_RESTART_COUNT" ] || while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("stop", "saved", "state"),
    [
        (("--signal=TERM",), 2, "COMPLETED"),  # as the end of the time limit sends it
        (("--full", "--signal=TERM"), 0, "COMPLETED"),  # srun is told as well, and kills them
        (("--signal=INT",), 2, "FAILED"),
        ((), None, "CANCELLED"),  # they may save, but need not come to it
    ],
)
def test_who_stops_a_job_decides_whether_it_goes_on(slurm, stub, stop, saved, state):
    words = ("--ntasks-per-node=2", "launch/slurm.sbatch", "--config=a file", "--config.epochs=2")
    job = slurm.submit(*words, **stub(TRAINS))
    told = "trains -m sl_jax.train --config=a file --config.epochs=2 --config.distributed.grace=110"
    wait_for("both tasks", lambda: slurm.said(job).count(f"{told} from 0") == 2)
    slurm.call("scancel", *stop, str(job))
    if state == "COMPLETED":
        slurm.goes_on(job)
    wait_for("the end", lambda: slurm.ended(job) and not slurm.processes(job))
    time.sleep(2)  # in which it could be requeued
    said, shown = slurm.said(job), slurm.shown(job)
    again = state == "COMPLETED"
    assert saved is None or said.count("saved") == saved
    assert said.count(f"{told} from 1") == 2 * again
    assert (shown["JobState"], shown["Restarts"]) == (state, str(int(again)))


def test_a_job_that_is_killed_too_often_fails(slurm, stub):
    job = slurm.submit(
        *("--ntasks-per-node=2", "launch/slurm.sbatch", "--config=x"),
        **stub("kill -9 $$"),
        RESTARTS="0",
    )
    wait_for("the end", lambda: slurm.ended(job))
    assert slurm.shown(job)["JobState"] == "FAILED"
    assert "status 137; requeued 0 times already, so not again" in slurm.said(job)

"""Whether processes join, from flags and environment."""

import logging
import os
import subprocess
import sys

import jax
import pytest

from sl_jax.parallel import joining
from sl_jax.parallel.joining import DistributedConfig, joined
from sl_jax.parallel.processes import ProcessError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, False),  # not in srun
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_the_environment_decides_unless_it_is_said(environment, several):
    assert joining._several(DistributedConfig(), environment) == several
    assert joining._several(DistributedConfig("on"), environment)
    assert not joining._several(DistributedConfig("off"), environment)
    assert joining._several(DistributedConfig("auto", "host:1", 2, 1), environment)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1", "processes": 2}, "please give both"),
        ({"coordinator": "a:1", "process": 0}, "please give both"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "process is 2 of 2"),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "process is -1 of 2"),
        ({"processes": 2, "process": 1}, "coordinator is empty"),
        ({"coordinator": "host"}, "HOST:PORT"),
    ],
)
def test_values_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**given)


def test_one_process_does_not_ask_for_others(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked for others")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name in (*SLURM, "JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with joined(DistributedConfig()) as processes:
        assert (processes.index, processes.count) == (0, 1)


def test_a_tpu_host_without_metadata_works_alone(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sl_jax")

    def refuse():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(joining, "_on_cloud_tpu", lambda environment: True)
    with joined(DistributedConfig()) as processes:
        assert processes.count == 1
    assert "works alone" in caplog.text
    with joined(DistributedConfig("off")) as processes:
        assert processes.count == 1


def test_processes_that_do_not_find_each_other_say_what_to_give(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no answer")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with (
        pytest.raises(ProcessError, match=r"no answer.*config\.distributed\.coordinator"),
        joined(DistributedConfig("on", "host:1", 2, 0)),
    ):
        pass


def test_the_grace_is_that_of_the_configuration():
    """SIGTERM has been noticed, but what is saved then hangs."""
    program = """
import signal, time
from sl_jax.parallel.interrupts import Terminated
from sl_jax.parallel.joining import DistributedConfig, joined
with joined(DistributedConfig("off", grace=0.2)):
    try:
        signal.raise_signal(signal.SIGTERM)
    except Terminated:
        time.sleep(600)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 143
    assert "The 0.2 s of grace are over" in ended.stderr


@pytest.mark.parametrize(("flags", "count"), [("", 3), (f"{joining._CPU_DEVICES_FLAG}=2", 2)])
def test_a_cpu_counts_as_so_many_devices(flags, count):
    """In a process of its own: devices are counted once."""
    program = (
        "import jax; from sl_jax.parallel.joining import DistributedConfig, joined\n"
        "with joined(DistributedConfig('off', cpu_devices=3)): print(jax.device_count())"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == count

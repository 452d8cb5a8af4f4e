"""How the processes of a run find each other: from flags, or from the environment."""

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import jax
from jax.errors import JaxRuntimeError

from sl_jax.imaging.words import counted
from sl_jax.parallel.interrupts import GRACE, OthersGoneError
from sl_jax.parallel.processes import CodeOf, ProcessError, Processes, unexpected

_log = logging.getLogger(__name__)

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

_CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_MOST_CPU_DEVICES = 4096


@dataclass(frozen=True)
class DistributedConfig:
    """Whether and how several processes join.

    Attributes:
        join: "auto" joins where `coordinator` is given, or where the environment says that there
            are several processes (TPU pod, GKE, SLURM, Open MPI, JAX_COORDINATOR_ADDRESS); "on" and
            "off" decide it.
        coordinator: HOST:PORT of process 0, the same in all; empty to take it from the environment.
        processes: their number; None to take it from the environment.
        process: this process, from 0; None to take it from the environment.
        cpu_devices: as how many devices the CPU of a process without accelerators counts. Not all
            that XLA computes there is spread over cores; several devices share them better. Where
            XLA_FLAGS names a number, that one holds.
        grace: seconds from SIGTERM to the end of the program, in which it saves; a little less than
            the scheduler gives.

    Raises:
        ValueError: the values do not fit each other.
    """

    join: Literal["auto", "on", "off"] = "auto"
    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    cpu_devices: int = 1
    grace: float = GRACE

    def __post_init__(self) -> None:
        if (self.processes is None) != (self.process is None):
            raise ValueError(
                f"processes is {self.processes} and process {self.process}; please give both, or "
                "neither where the environment knows them"
            )
        if self.processes is not None and not 0 <= self.process < self.processes:
            raise ValueError(
                f"process is {self.process} of {self.processes}; please number processes from 0"
            )
        if self.processes is not None and not self.coordinator:
            raise ValueError(
                "coordinator is empty; please give HOST:PORT of process 0, the same in all"
            )
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"coordinator is {self.coordinator!r}; please give it as HOST:PORT")
        if not 1 <= self.cpu_devices <= _MOST_CPU_DEVICES:
            raise ValueError(
                f"cpu_devices is {self.cpu_devices}; please give 1 or more, at most "
                f"{_MOST_CPU_DEVICES}"
            )
        if not 0 < self.grace <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"grace is {self.grace}; please give more than 0 seconds, at most "
                f"{threading.TIMEOUT_MAX:.0f}"
            )


@contextmanager
def joined(config: DistributedConfig, code_of: CodeOf = unexpected) -> Iterator[Processes]:
    """The processes of the run, once they have found each other; before anything asks for devices.

    If the block ends in an error here, the other processes are told, and stop, all with the exit
    code of this one, which `code_of` tells.

    Raises:
        ProcessError: the coordinator cannot be reached, or is not known.
    """
    if _CPU_DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if _several(config, os.environ):
        _initialize(config)
    elif config.join == "auto" and _on_cloud_tpu(os.environ):
        _initialize_tpu()
    index, count = jax.process_index(), jax.process_count()
    store = _Coordinator() if count > 1 else None
    if count > 1:
        _mark_messages(index)
        devices = counted(jax.device_count(), "device")
        _log.info("%d processes with %s have joined.", count, devices)
    with Processes(index, count, store, code_of).open(config.grace) as processes:
        yield processes


def _several(config: DistributedConfig, environment: Mapping[str, str]) -> bool:
    if config.join != "auto":
        return config.join == "on"
    return bool(
        config.coordinator
        or environment.get("JAX_COORDINATOR_ADDRESS")
        or environment.get("MEGASCALE_COORDINATOR_ADDRESS")
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or (all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and environment["OMPI_COMM_WORLD_SIZE"] != "1")
    )


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Whether there are TPU chips: JAX, once imported, sets the variable where there are none."""
    wanted = "tpu" in environment.get("JAX_PLATFORMS", "tpu")
    skipped = "TPU_SKIP_MDS_QUERY" in environment
    return wanted and not skipped and importlib.util.find_spec("libtpu") is not None


def _initialize(config: DistributedConfig) -> None:
    try:
        jax.distributed.initialize(
            config.coordinator or None,
            num_processes=config.processes,
            process_id=config.process,
        )
    except (ValueError, RuntimeError, JaxRuntimeError) as error:
        raise ProcessError(
            f"the processes did not find each other ({error}); please give "
            "--config.distributed.coordinator=HOST:PORT, --config.distributed.processes=COUNT and "
            "--config.distributed.process=INDEX, or --config.distributed.join=off for one process"
        ) from error


def _initialize_tpu() -> None:
    """Joins the hosts of a TPU slice, one or many; what they are, their metadata say."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        _log.info("No metadata of a TPU slice (%s): this process works alone.", error)


def _mark_messages(index: int) -> None:
    """Messages name their process; of the others than the main one only warnings are shown."""
    own = logging.getLogger("sl_jax")

    def marked(record: logging.LogRecord) -> bool:
        record.msg = f"[{index}] {record.msg}"
        return True

    for handler in own.handlers:
        handler.addFilter(marked)
    if index:
        own.setLevel(logging.WARNING)


class _Coordinator:
    """The key-value store of `jax.distributed`."""

    def __init__(self) -> None:
        # There is no public way to it; orbax-checkpoint takes the same one.
        from jax._src import distributed

        self._client = distributed.global_state.client

    def put(self, name: str, value: bytes) -> None:
        """As `Store`."""
        with _reached():
            self._client.key_value_set_bytes(name, value, allow_overwrite=True)

    def get(self, name: str, seconds: float) -> bytes | None:
        """As `Store`."""
        with _reached():
            try:
                return self._client.blocking_key_value_get_bytes(name, max(int(1000 * seconds), 1))
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
                    return None
                raise

    def delete(self, name: str) -> None:
        """As `Store`."""
        with _reached():
            self._client.key_value_delete(name)


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except JaxRuntimeError as error:
        raise OthersGoneError(
            f"process 0, which the others meet at, is gone ({error}); please start all again"
        ) from error

"""How a run stands: `status.json` in its work directory, for people and programs that watch it.

The main process writes it, on a thread of its own, whole each time; `python -m sl_jax.train
--status=WORKDIR` prints it. Writing it never holds training up, and failing to write it never ends
a run.
"""

import collections
import dataclasses
import datetime
import json
import logging
import os
import reprlib
import socket
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from etils import epath

import sl_jax
from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.disk import write_whole
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.orbax import find_step
from sl_jax.imaging.words import printable
from sl_jax.parallel.interrupts import Terminated
from sl_jax.parallel.processes import Processes
from sl_jax.training.configuration import fits

_log = logging.getLogger(__name__)

FILE = "status.json"
State = Literal["running", "waiting", "finished", "stopped"]

# By whether the folder is remote: seconds after which the status is written again though nothing
# has changed, and least seconds between two writings.
_TIMES = {False: (10.0, 0.5), True: (60.0, 10.0)}
_KEPT = 5  # warnings
_EPOCHS = 20  # that the pace is a mean of
_STALE = 5  # heartbeats that may be missed, and
_GRACE = 60.0  # seconds besides, of clocks that differ and hosts that are busy
# What reading anything but a status ends in.
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Warned:
    """A warning of the run."""

    time: str
    text: str


@dataclass(frozen=True)
class Status:
    """What `status.json` holds. Times are UTC, as in 2026-11-28T03:01:24Z; None is not known yet.

    Attributes:
        state: "running"; "waiting", as for a judge; "finished"; "stopped". A process that was
            killed leaves what it was.
        reason: what it waits for, or why it stopped.
        phase: what the run does: loading, evaluating, rollout, decoding, encoding, judging,
            learning, recording, checkpointing, reporting.
        phase_since: when that began.
        epoch: complete epochs.
        of: epochs of the whole run.
        updates: of the adapter.
        reward: mean of the last epoch.
        held_out: mean reward of the last evaluation.
        seconds_per_epoch: mean of the last 20 epochs since this start, evaluations and checkpoints
            included; after the first one, which compiles, that one alone.
        seconds_left: to the end of the run at this pace.
        judge: numbers of the pool of servers when the last epoch was complete, as in `pool/…` of
            the metrics: those that are up, requests that wait, requests and tokens so far,
            latencies; {} before that, and for a judge in process.
        last_checkpoint: epoch of the newest complete one; the same command goes on there.
        warnings: the last five.
        warned: how many there were since this start.
        started, updated: when this start began, and when this was written.
        heartbeat: seconds after which it is written again though nothing has changed.
        host, pid: of the main process.
        processes: of the run.
        version: of sl_jax.
    """

    state: State
    of: int
    started: str
    updated: str
    host: str
    pid: int
    heartbeat: float
    processes: int
    version: str
    reason: str = ""
    phase: str = "loading"
    phase_since: str | None = None
    epoch: int = 0
    updates: int | None = None
    reward: float | None = None
    held_out: float | None = None
    seconds_per_epoch: float | None = None
    seconds_left: float | None = None
    judge: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    last_checkpoint: int | None = None
    warnings: tuple[Warned, ...] = ()
    warned: int = 0


class StatusError(ValueError):
    """There is no status to read; the message says where it was looked for."""


def read_status(workdir: epath.PathLike) -> Status:
    """The status of the run in a work directory, local or gs://.

    Raises:
        StatusError: none is there, or it cannot be read.
    """
    path = epath.Path(workdir) / FILE
    try:
        told = json.loads(path.read_text())
        warnings = tuple(_made(Warned, entry) for entry in told.pop("warnings"))
        status = _made(Status, told | {"warnings": warnings})
        _require_sense(status)
    except FileNotFoundError as error:
        raise StatusError(
            f"there is no {path}; please name the work directory of a run that was started"
        ) from error
    except OSError as error:
        raise StatusError(f"{path} cannot be read: {error.strerror or error}") from error
    except _NONSENSE as error:
        raise StatusError(
            f"{path} is no status of this version's: {printable(str(error))}"
        ) from error
    return status


def _made(kind: type, told: Mapping[str, Any]) -> Any:
    """A dataclass of what a file holds, whose values are of the kinds that its fields have."""
    for name, wanted in typing.get_type_hints(kind).items():
        if name in told and not fits(told[name], wanted):
            raise TypeError(f"{name} is {reprlib.repr(told[name])}")
    return kind(**told)


def _require_sense(status: Status) -> None:
    """Raises ValueError where a value has the right type, and still is none that a run writes."""
    for name, value in status.judge.items():
        # Tokens are more than 32 bits count.
        if not fits(value, float | None) or (value is not None and not 0 <= value < 2**63):
            raise ValueError(f"judge's {name} is {reprlib.repr(value)}")
    for name, value in vars(status).items():
        if isinstance(value, int) and not 0 <= value < 2**31:
            raise ValueError(f"{name} is {reprlib.repr(value)}")
    for moment in (status.started, status.updated, status.phase_since):
        if moment is not None and datetime.datetime.fromisoformat(moment).tzinfo is None:
            raise ValueError(f"{moment} has no time zone")


def require_none_lost(workdir: epath.PathLike) -> None:
    """Makes sure that a run without checkpoints never had any, so that it may begin anew.

    Raises:
        CheckpointError: its status tells of one.
    """
    try:
        told = read_status(workdir)
    except StatusError:
        return
    if told.last_checkpoint is not None:
        raise CheckpointError(
            f"the checkpoints of {workdir} are gone, the last of them after epoch "
            f"{told.last_checkpoint}; please put them back, or choose another config.workdir. To "
            f"train anew in this one, delete its {FILE} first"
        )


def age(status: Status, now: datetime.datetime) -> float:
    """Seconds since a status was written; 0 where the clocks of hosts differ the other way."""
    written = datetime.datetime.fromisoformat(status.updated)
    return max(0.0, (now - written).total_seconds())


def looks_dead(status: Status, now: datetime.datetime) -> str:
    """Why a run that calls itself alive can hardly be; empty where it may well be."""
    if status.state in ("finished", "stopped"):
        return ""
    if status.host == socket.gethostname() and not _exists(status.pid):
        return f"process {status.pid} is no more"
    silent = age(status, now)
    if silent > _STALE * status.heartbeat + _GRACE:
        return f"silent for {silent:.0f} s, and it should write every {status.heartbeat:.0f} s"
    return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


class Unwatched:
    """Takes what a status is told, and tells nobody: of processes that are not the main one."""

    def begin(self, phase: str) -> None:
        """The run does something else now; it waits for nothing."""

    def wait(self, reason: str) -> None:
        """The run waits; with an empty reason, it does not any more."""

    def begin_epochs(self, epoch: int) -> None:
        """So many epochs are complete, and the next one begins."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """An epoch is complete; what stands of it in the metrics."""

    @property
    def pace(self) -> tuple[float, float] | None:
        """Seconds per epoch, and to the end of the run; None before the first one is complete."""
        return None


UNWATCHED = Unwatched()


class StatusFile(Unwatched):
    """Writes the status of a run whenever it changes, and every so often."""

    def __init__(self, folder: epath.Path, of: int, processes: int = 1):
        """Begins with "loading".

        Args:
            folder: the work directory.
            of: epochs of the whole run.
            processes: of the run.
        """
        self._folder = folder
        heartbeat, self._pause = _TIMES[is_remote(folder)]
        now = _now()
        self._status = Status(
            *("running", of, now, now, socket.gethostname(), os.getpid(), heartbeat),
            *(processes, sl_jax.__version__),
            phase_since=now,
        )
        self._lock = threading.Lock()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._clock = _Clock(of)
        self._said = False
        self._handler = _Warnings(self._warn)
        logging.getLogger("sl_jax").addHandler(self._handler)
        self._changed.set()
        self._thread = threading.Thread(target=self._write_on, name="status", daemon=True)
        self._thread.start()

    def begin(self, phase: str) -> None:
        self._change(state="running", reason="", phase=phase, phase_since=_now())

    def wait(self, reason: str) -> None:
        self._change(state="waiting" if reason else "running", reason=reason)

    def begin_epochs(self, epoch: int) -> None:
        self._clock.start(epoch)
        self._change(epoch=epoch)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        self._clock.tick()
        per_epoch, left = self._clock.pace
        held_out = metrics.get("evaluation/reward", self._status.held_out)
        pool = {n.removeprefix("pool/"): v for n, v in metrics.items() if n.startswith("pool/")}
        updates = metrics.get("learner/updates")
        self._change(
            epoch=self._clock.epoch,
            updates=None if updates is None else int(updates),
            reward=metrics.get("judge/reward_mean"),
            held_out=held_out,
            seconds_per_epoch=round(per_epoch, 3),
            seconds_left=round(left, 1),
            judge=pool,
        )

    @property
    def pace(self) -> tuple[float, float] | None:
        return self._clock.pace

    def close(self, state: State, reason: str = "") -> None:
        """Writes the end, and nothing after it."""
        logging.getLogger("sl_jax").removeHandler(self._handler)
        done = {"phase": "", "phase_since": None} if state == "finished" else {}
        self._change(state=state, reason=reason, **done)
        self._closing.set()
        self._changed.set()
        self._thread.join()
        self._write()

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._status = dataclasses.replace(self._status, **fields)
        self._changed.set()

    def _warn(self, text: str) -> None:
        with self._lock:
            kept = (*self._status.warnings, Warned(_now(), text))[-_KEPT:]
            warned = self._status.warned + 1
            self._status = dataclasses.replace(self._status, warnings=kept, warned=warned)
        self._changed.set()

    def _write_on(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(self._status.heartbeat)
            self._changed.clear()
            if not self._closing.is_set():
                self._write()
            self._closing.wait(self._pause)

    def _write(self) -> None:
        with self._lock:
            status = self._status
        path = self._folder / FILE
        try:
            newest = newest_checkpoint(self._folder)
            status = dataclasses.replace(status, updated=_now(), last_checkpoint=newest)
            write_whole(path, json.dumps(_finite(dataclasses.asdict(status)), indent=1) + "\n")
        except Exception as error:  # stores have errors of their own, and none may end a run
            with self._lock:  # the last is written from another thread
                said, self._said = self._said, True
            if not said:
                _log.warning("%s cannot be written, and tells nothing new: %s", path, error)


@contextmanager
def watched(folder: epath.Path, of: int, processes: Processes) -> Iterator[Unwatched]:
    """The status of a run, from here to its end, whatever that is.

    Args:
        folder: the work directory.
        of: epochs of the whole run.
        processes: of the run; the main one writes.
    """
    if not processes.is_main:
        yield UNWATCHED
        return
    status = StatusFile(folder, of, processes.count)
    try:
        yield status
    except BaseException as error:
        status.close("stopped", _reason(error))
        raise
    status.close("finished")


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Clock:
    """How fast epochs follow each other since this start."""

    def __init__(self, of: int):
        self._of, self.epoch = of, 0
        self._began = time.monotonic()
        self._ends: collections.deque[float] = collections.deque(maxlen=_EPOCHS + 1)

    def start(self, epoch: int) -> None:
        self.epoch, self._began = epoch, time.monotonic()

    def tick(self) -> None:
        self.epoch += 1
        self._ends.append(time.monotonic())

    @property
    def pace(self) -> tuple[float, float] | None:
        if not self._ends:
            return None
        first, last, count = self._ends[0], self._ends[-1], len(self._ends) - 1
        seconds = (last - first) / count if count else last - self._began
        return seconds, seconds * (self._of - self.epoch)


class _Warnings(logging.Handler):
    """Hands on the texts of warnings and errors."""

    def __init__(self, told: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told(record.getMessage())


def newest_checkpoint(folder: epath.Path) -> int | None:
    """The epoch of the newest complete checkpoint in a work directory."""
    found = find_step(folder)
    return None if found is None else int(found.name)


def _finite(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

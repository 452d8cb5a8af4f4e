"""The processes of a run: how they find each other, keep in step, and share a batch.

Large arrays travel between devices, inside compiled programs. Small values of the hosts (scores,
names, errors) travel through the key-value store of `jax.distributed`'s coordinator: each exchange
has a number and a name, so that a process that is elsewhere in the program is noticed, waiting is
said, and a process that stopped is not waited for. One process alone takes the same path, with
nobody to wait for.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import serialization
from jax.sharding import Mesh, NamedSharding

from sl_jax.parallel.interrupts import (
    GRACE,
    REFUSED,
    TERMINATED,
    UNEXPECTED,
    Interrupts,
    OthersGoneError,
    end_now,
)
from sl_jax.parallel.mesh import BATCH_AXES, batch_shards, replicated

_log = logging.getLogger(__name__)

_PREFIX = "sl_jax"
_CHUNK = 1 << 20  # bytes per entry of the store
_LOOK = 5.0  # seconds between looks at whether a process that is waited for has stopped
_SAID = 30.0  # seconds of waiting after which it is said, then after twice as long, and so on
_FAREWELL = 60.0  # seconds that a process that stops gives the others to save with it
_BEAT = 5.0  # seconds between signs of life
_LOST = 60.0  # seconds without one after which a process counts as killed
_DONE = -1  # the last one
_LEAVING, _GONE = "leaving", "gone"  # what a process says why under: it may save yet; it is out


class ProcessError(RuntimeError):
    """Another process stopped, or is somewhere else in the program.

    Attributes:
        code: exit code of a program that ends in it: that of the process which stopped first, so
            that what starts runs again is told one thing by all.
    """

    def __init__(self, message: str, code: int = REFUSED):
        super().__init__(message)
        self.code = code


CodeOf = Callable[[BaseException], int]
"""The exit code that the program ends with after an error."""


def unexpected(error: BaseException) -> int:
    """The exit code where nothing is known of what is expected."""
    return error.code if isinstance(error, ProcessError) else UNEXPECTED


class Store(Protocol):
    """Bytes by name, seen by all processes; names are paths."""

    def put(self, name: str, value: bytes) -> None:
        """Sets a value, also over an earlier one."""
        ...

    def get(self, name: str, seconds: float) -> bytes | None:
        """The value, as soon as it is there; None if it is not within `seconds`."""
        ...

    def delete(self, name: str) -> None:
        """Removes a value and all that are below it."""
        ...


class Processes:
    """All processes of a run, seen from this one.

    Values that they tell each other are numbers, texts, None, numpy arrays, and lists and dicts
    (by texts) of these. Calls are made by all processes in the same order.

    Args:
        index: of this process; 0 is the main one, which writes what is written once.
        count: of all.
        store: what they share; one process alone needs none.
        code_of: tells what an error of this process ends it with; then the others end so, too.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        store: Store | None = None,
        code_of: CodeOf = unexpected,
    ):
        self.index, self.count = index, count
        self._store, self._code_of = store, code_of
        self._number = 0
        self._interrupts = Interrupts(count == 1, f"Process {index}")
        self._ending = _LEAVING  # what of another process ends waiting for it

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def all_gather(self, what: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """The values of all processes, by process.

        Args:
            what: names the exchange, for messages and to notice a process that is elsewhere.
            value: of this process.
            error: why this process cannot go on; then none does, and the caller raises it.

        Raises:
            ProcessError: another process has an error, has stopped, or is elsewhere.
            KeyboardInterrupt: a process was interrupted; raised in all at the same exchange, or
                where the `uninterrupted` block that it is in is done.
            Terminated: likewise, by SIGTERM.
        """
        reason = None if error is None else _told(error)
        mine = {
            "what": what,
            "value": value,
            "error": reason,
            "code": None if error is None else self._code_of(error),
            "signal": int(self._interrupts.received),
        }
        entries = self._exchanged(what, mine)
        if error is None:
            _require_agreement(entries, self.index)
            received = {entry["signal"] for entry in entries} - {0}
            if received:
                self._interrupts.come_through(max(received))  # SIGTERM, if it is among them
        return [entry["value"] for entry in entries]

    def to_main(self, what: str, value: Any) -> list[Any]:
        """The values of all processes, in the main process; nothing elsewhere, where none waits."""
        self._number += 1
        if not self.is_main:
            self._put(f"{self._number}/{self.index}", value)
            return []
        others = [
            self._awaited(f"{self._number}/{index}", index, what) for index in range(1, self.count)
        ]
        self._forget()
        return [value, *others]

    def from_main(self, what: str, value: Any) -> Any:
        """The main process's value, in all."""
        return self.all_gather(what, value if self.is_main else None)[0]

    def barrier(self, what: str) -> None:
        """Returns when all processes are here."""
        self.all_gather(what)

    def together(self, what: str) -> AbstractContextManager[None]:
        """A block whose error in one process ends it in all, at its end."""
        return _Together(self, what)

    def leave(self, error: BaseException, place: int) -> bool:
        """Tells the others that this process stops; they then stop too, when they hear of it.

        Args:
            error: why.
            place: how far it is.

        Returns:
            Whether all stop, at the same place: what takes all of them can then still be done.
        """
        self._tell(_LEAVING, error, place)
        if self.count > 1:
            _log.warning(
                "Process %d stops (%s); it waits for the others, %.0f s at most, to save together.",
                *(self.index, _told(error), _FAREWELL),
            )
        deadline = time.monotonic() + _FAREWELL
        last = self._number
        for index in set(range(self.count)) - {self.index}:
            told = self._farewell(index, max(deadline - time.monotonic(), 0.1))
            if told.get("place") != place:
                _log.error(
                    "Process %d does not stop at the same place: nothing is saved, and the run "
                    "will go on from its newest checkpoint.",
                    index,
                )
                return False
            last = max(last, told["exchange"])
        self._number = last  # past an exchange that others were waiting in
        self._ending = _GONE  # that all are leaving, all know
        return True

    @contextmanager
    def open(self, grace: float = GRACE) -> Iterator["Processes"]:
        """While it lasts, an interrupt of one process comes through in all, at once.

        Interrupts are Ctrl-C and SIGTERM. One is held back until the next exchange; a second Ctrl-C
        comes through where it is. One process alone is interrupted where it is. If the block ends
        in an error, the others are told, and do not wait.

        A process that was killed tells nobody. The next one in the ring notices that it shows no
        sign of life any more, and ends all: what they wait for never comes.

        Args:
            grace: seconds from SIGTERM after which the program ends, whether it has saved or not.
        """
        with self._interrupts.open(grace):
            try:
                with self._watched():
                    yield self
            except BaseException as error:
                for ending in {self._ending, _GONE}:
                    self._tell(ending, error, -1)
                raise

    def uninterrupted(self) -> AbstractContextManager[None]:
        """A block that interrupts come through after, not in.

        In all processes alike: those that an exchange in it told of come through at its end, later
        ones at the next exchange.
        """
        return self._interrupts.held()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Signs of life, given and watched for in the background while the block lasts."""
        if self.count == 1:
            yield
            return
        over = threading.Event()
        self._put(f"alive/{self.index}", 0)
        threading.Thread(target=self._watch, args=(over,), daemon=True).start()
        try:
            yield
        finally:
            over.set()
        self._put(f"alive/{self.index}", _DONE)

    def _watch(self, over: threading.Event) -> None:
        watched, beat = (self.index + 1) % self.count, 0
        last, since = None, time.monotonic()
        while not over.wait(_BEAT):
            beat += 1
            try:
                self._put(f"alive/{self.index}", beat)
                sign, lost = self._get(f"alive/{watched}", 0.0), self._get("lost", 0.0)
                if sign != last or sign == _DONE:
                    last, since = sign, time.monotonic()
                elif time.monotonic() - since > _LOST:
                    told = self._farewell(watched, 0.0)
                    reason = told.get("reason", "it was killed, or its host was")
                    lost = [f"process {watched} is gone ({reason})", told.get("code", TERMINATED)]
                    self._put("lost", lost)
            except OthersGoneError as error:
                lost = [str(error), TERMINATED]
            if lost and not over.is_set():
                reason, code = lost
                end_now(
                    f"OthersGoneError: {reason}. Process {self.index} ends too; please start all "
                    "again: they go on from the newest checkpoint.",
                    code,
                )

    def _exchanged(self, what: str, mine: Any) -> list[Any]:
        """By way of the main process, so that there are as many messages as processes."""
        self._number += 1
        number = self._number
        if not self.is_main:
            self._put(f"{number}/{self.index}", mine)
            return self._awaited(f"{number}/all", 0, what)
        others = [self._awaited(f"{number}/{index}", index, what) for index in range(1, self.count)]
        if others:
            self._put(f"{number}/all", [mine, *others])
        self._forget()
        return [mine, *others]

    def _forget(self) -> None:
        """Who has sent something to this exchange has read everything of the one before."""
        if self.count > 1:
            self._store.delete(f"{_PREFIX}/{self._number - 1}")

    def _tell(self, ending: str, error: BaseException, place: int) -> None:
        if self.count > 1:
            told = {"reason": _told(error), "code": self._code_of(error)}
            told |= {"place": place, "exchange": self._number}
            self._put(f"{ending}/{self.index}", told)

    def _farewell(self, index: int, seconds: float) -> dict[str, Any]:
        """What a process said when it stopped; empty if it said nothing."""
        return self._get(f"{_LEAVING}/{index}", seconds) or {}

    def _awaited(self, name: str, index: int, what: str) -> Any:
        started, said = time.monotonic(), _SAID
        while (value := self._get(name, _LOOK)) is None:
            if told := self._get(f"{self._ending}/{index}", 0.0):
                raise ProcessError(f"process {index} stopped: {told['reason']}", told["code"])
            waited = time.monotonic() - started
            if waited >= said:
                _log.warning(
                    "Process %d has waited %.0f s for process %d: %s.",
                    *(self.index, waited, index, what),
                )
                said *= 2
        return value

    def _put(self, name: str, value: Any) -> None:
        content = serialization.msgpack_serialize({"value": value})
        path = f"{_PREFIX}/{name}"
        parts = [content[at : at + _CHUNK] for at in range(0, len(content), _CHUNK)]
        for number, part in enumerate(parts[1:], 1):
            self._store.put(f"{path}/part/{number}", part)
        self._store.put(f"{path}/first", len(parts).to_bytes(4, "big") + parts[0])

    def _get(self, name: str, seconds: float) -> Any:
        """None if it is not there in time."""
        path = f"{_PREFIX}/{name}"
        first = self._store.get(f"{path}/first", seconds)
        if first is None:
            return None
        count = int.from_bytes(first[:4], "big")
        rest = [self._store.get(f"{path}/part/{number}", _FAREWELL) for number in range(1, count)]
        if None in rest:
            raise ProcessError(f"a message of {count} parts, {name}, did not arrive whole")
        return serialization.msgpack_restore(b"".join([first[4:], *rest]))["value"]


ALONE = Processes()  # this process, where a run has no others


class _Together(AbstractContextManager):
    def __init__(self, processes: Processes, what: str):
        self._processes, self._what = processes, what

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, Exception):
            self._processes.all_gather(self._what, error=error)


def _require_agreement(entries: Sequence[Mapping[str, Any]], mine: int) -> None:
    """Checks that the entries of an exchange are of one place in the program, without an error.

    An error comes first: it may have taken its process past an exchange that the others are in.

    Raises:
        ProcessError: they are not.
    """
    for index, entry in enumerate(entries):
        if entry["error"] is not None:
            told = f"process {index} cannot go on: {entry['error']}"
            raise ProcessError(told, entry["code"])
    what = entries[mine]["what"]
    for index, entry in enumerate(entries):
        if entry["what"] != what:
            raise ProcessError(
                f"process {index} is at '{entry['what']}' while process {mine} is at '{what}': "
                "they run different programs; please start all with one version"
            )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


class BatchRows(NamedTuple):
    """Rows of a batch, by process.

    Attributes:
        held: rows that are on devices of this process, in order.
        judged: those of them that it judges: the lowest process of all that hold a row does.
    """

    held: tuple[int, ...]
    judged: tuple[int, ...]


def batch_rows(mesh: Mesh, size: int, process: int) -> BatchRows:
    """Which of the `size` rows of a batch, split over data × fsdp, a process has.

    Raises:
        ValueError: processes share some rows but not all of them, or the rows are not split evenly.
    """
    shards = batch_shards(mesh)
    if size % shards:
        raise ValueError(f"{size} rows cannot be split over data × fsdp = {shards} parts")
    holders = _holders(mesh)
    for one in set(holders):
        for other in set(holders):
            if one != other and one & other:
                raise ValueError(
                    f"processes {sorted(one)} and {sorted(other)} would hold different parts of a "
                    "batch but have a process in common; please choose sizes of data, fsdp and "
                    "tensor × sequence of which one divides, or is a multiple of, the number of "
                    "devices per process"
                )
    each = size // shards

    def rows(chosen: Sequence[int]) -> tuple[int, ...]:
        return tuple(row for shard in chosen for row in range(shard * each, (shard + 1) * each))

    return BatchRows(
        rows([shard for shard, processes in enumerate(holders) if process in processes]),
        rows([shard for shard, processes in enumerate(holders) if process == min(processes)]),
    )


def _holders(mesh: Mesh) -> list[frozenset[int]]:
    """The processes that hold each part of a batch."""
    axes = [mesh.axis_names.index(name) for name in BATCH_AXES]
    devices = np.moveaxis(mesh.devices, axes, range(len(axes)))
    parts = devices.reshape(batch_shards(mesh), -1)
    return [frozenset(device.process_index for device in part) for part in parts]


def from_local(local: np.ndarray, sharding: NamedSharding, rows: int) -> jax.Array:
    """A global array from the rows that each process holds, in order; `rows` are all of them."""
    local = np.asarray(local)
    return jax.make_array_from_process_local_data(sharding, local, (rows, *local.shape[1:]))


def from_everywhere(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array of values that every process knows whole, and places its own shards of."""
    values = np.asarray(values)
    return jax.make_array_from_process_local_data(sharding, values, values.shape)


def to_local(array: jax.Array) -> np.ndarray:
    """The rows of a global array that devices of this process hold, in order, each once.

    Raises:
        ValueError: it is sharded over other axes than the first.
    """
    blocks: dict[int, Any] = {}
    for shard in array.addressable_shards:
        if shard.data.shape[1:] != array.shape[1:]:
            raise ValueError(f"{array.shape} is sharded as {array.sharding}; only rows may be")
        blocks.setdefault(shard.index[0].start or 0, shard.data)
    jax.block_until_ready(blocks)  # which an interrupt ends; copying waits it out
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def to_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Global arrays as whole numpy arrays in every process, one after the other."""
    gather = _gather(mesh)
    return jax.tree.map(lambda leaf: np.asarray(gather(leaf)), tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))

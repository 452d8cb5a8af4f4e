"""Ctrl-C and SIGTERM, which come through where they do no harm."""

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

_log = logging.getLogger(__name__)

GRACE = 25.0  # seconds from SIGTERM; Kubernetes, spot machines and SLURM give 30
# Exit code, as shells and schedulers report it: the same command goes on. Also where another
# process was killed.
TERMINATED = 128 + signal.SIGTERM
STOPPED = 128 + signal.SIGINT  # likewise, after Ctrl-C
UNEXPECTED = 70  # exit code of an error that nobody expected (EX_SOFTWARE of sysexits.h)
REFUSED = 1  # of one that says what its user has to do
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.05  # seconds until an interrupt that was dropped is sent again


class Terminated(KeyboardInterrupt):
    """SIGTERM: who lent the machine wants it back (preemption, maintenance, a scheduler)."""


class OthersGoneError(RuntimeError):
    """Another process was killed; nothing is wrong with this one, and all may start again."""


class Interrupts:
    """SIGINT (Ctrl-C) and SIGTERM of this process.

    Args:
        at_once: whether they are raised where the program is; otherwise they are only noted, and a
            second Ctrl-C alone is raised.
        label: of the process, for messages.
    """

    def __init__(self, at_once: bool, label: str):
        self.received = 0
        """The signal that came, or 0."""
        self._at_once, self._label = at_once, label
        self._held = self._collecting = False
        self._raised = self._due = 0  # signals; the latter when what is held back is done
        self._time_is_up: threading.Timer | None = None

    @contextmanager
    def open(self, grace: float) -> Iterator[None]:
        """While it lasts, signals come here; in the main thread, which alone gets any.

        What is raised in a garbage collection is dropped, and JAX has a callback there: a signal
        that comes then is only noted.

        Args:
            grace: seconds from SIGTERM after which the program ends, whatever it is at.
        """
        listens = threading.current_thread() is threading.main_thread()
        self._grace = grace
        before = {n: signal.signal(n, self.take) for n in (_SIGNALS if listens else ())}
        gc.callbacks.insert(0, self._collection_begins)
        gc.callbacks.append(self._collection_ends)
        try:
            yield
        finally:
            self.received = self._raised = 0
            if self._time_is_up:
                self._time_is_up.cancel()
                self._time_is_up = None
            gc.callbacks.remove(self._collection_begins)
            gc.callbacks.remove(self._collection_ends)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds back what comes until the block is done, then lets it through.

        What belongs together, such as a record and the state that it describes, is written in such
        a block.
        """
        if self._held:  # the outer block lets it through
            yield
            return
        self._held, self._due = True, 0
        try:
            yield
        finally:
            self._held = False
        if self._due:
            self.come_through(self._due)

    def come_through(self, number: int) -> None:
        """Raises a signal, here or where what is held back is done; there only once."""
        if not self._held:
            self._raised = number
            raise error_of(number)
        if number != self._raised:
            self._due = number

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        again, self.received = self.received and number == signal.SIGINT, number
        if number == signal.SIGTERM and self._time_is_up is None:
            self._time_is_up = threading.Timer(self._grace, self._give_up)
            self._time_is_up.daemon = True
            self._time_is_up.start()
        if (self._at_once or (again and not self._held)) and not self._collecting:
            self.come_through(number)
        if not self._at_once:
            told = (self._label, signal.Signals(number).name)
            _tell("%s got %s: all stop at their next exchange.", *told)

    def _give_up(self) -> None:
        end_now(
            f"The {self._grace:g} s of grace are over and not everything is saved: the same "
            "command goes on from the newest checkpoint.",
            TERMINATED,
        )

    def _collection_begins(self, phase: str, info: Mapping[str, Any]) -> None:
        self._collecting |= phase == "start"

    def _collection_ends(self, phase: str, info: Mapping[str, Any]) -> None:
        self._collecting &= phase != "stop"


def _tell(*message: str) -> None:
    """Warns on a thread of its own: the main one may hold a lock that a log's handler takes."""
    threading.Thread(target=_log.warning, args=message, daemon=True).start()


def error_of(number: int) -> KeyboardInterrupt:
    """What a signal is raised as."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def send_again(dropped: "sys.UnraisableHookArgs") -> None:
    """For `sys.unraisablehook`: an interrupt that came where Python drops what is raised.

    That is in a garbage collection, where JAX has a callback, and in other finalizers. It is sent
    once more, to come through where it can.
    """
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads: the program has come to its end
        timer.start()


def ignore_more() -> None:
    """Lets Ctrl-C do nothing from here on: the program is ending, and the impatient repeat it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop(message: str, code: int = STOPPED) -> NoReturn:
    """Ends the program after an interrupt, with a message and an exit code."""
    ignore_more()
    print(f"\n{message}", flush=True)
    sys.exit(code)


def end_now(message: str, code: int) -> None:
    """Ends the program from any thread, whatever the main one waits for."""
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(code)

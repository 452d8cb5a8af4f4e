"""What a run prints: its own messages, above its progress bars; of libraries, warnings only."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from absl import logging as absl_logging
from jax.errors import JaxRuntimeError
from tqdm import tqdm

from sl_jax.checkpoints.disk import disk_problem, may_pass
from sl_jax.imaging.words import printable
from sl_jax.parallel.interrupts import (
    REFUSED,
    STOPPED,
    TERMINATED,
    UNEXPECTED,
    OthersGoneError,
    Terminated,
    stop,
)
from sl_jax.parallel.processes import CodeOf, ProcessError


class _AboveBars(logging.Handler):
    """Prints so that progress bars stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Of errors in Orbax's threads the message: `checkpoints.orbax` raises them where it waits."""
    if "orbax" in record.pathname:
        record.exc_info = None
    return True


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record), keep="\n\t")
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def set_up_logging() -> None:
    """Shows messages of sl_jax from level INFO, of everything else from WARNING."""
    # transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_logger().addFilter(_without_traceback)
    handler = _AboveBars()
    handler.setFormatter(_Format())
    own = logging.getLogger("sl_jax")
    own.handlers = [handler]
    own.setLevel(logging.INFO)
    own.propagate = False


@contextmanager
def ending_in_a_line(
    expected: tuple[type[Exception], ...],
    unit: str,
    folder: str = "",
    smaller: str = "config.batch",
) -> Iterator[CodeOf]:
    """Ends the program with a message, not a traceback, where its user can do something about it.

    What it yields tells the exit code of an error, for the other processes of the run.

    Args:
        expected: errors that say what to do; exit code 1, or 70 if a network or a device that
            failed has caused them. Those of the system that a user can do something about, such as
            a full disk, are expected as well: path and advice are added; and those of devices whose
            memory is too small. All others, also those of networks, are shown whole; exit code 70.
        unit: what a run that was stopped is whole after: "epoch", "update"; exit code 130 after
            Ctrl-C, 143 after SIGTERM, or where another process was killed.
        folder: what the run writes to: the path of errors that know none.
        smaller: what to lower where a device's memory does not do.
    """
    try:
        yield partial(exit_code, expected=expected)
    except Exception as error:
        code = exit_code(error, expected)
        if code == UNEXPECTED and not isinstance(error, (ProcessError, *expected)):
            traceback.print_exc()
            sys.exit(code)
        told = str(error) if isinstance(error, expected) else _told(error, folder, smaller)
        line = f"{type(error).__name__}: {told}"
        if code == REFUSED:
            sys.exit(line)
        print(line, file=sys.stderr, flush=True)
        sys.exit(code)
    except Terminated:
        stop(f"Terminated. The same command goes on after the last complete {unit}.", TERMINATED)
    except KeyboardInterrupt:
        stop(f"Stopped. The same command goes on after the last complete {unit}.")


def exit_code(error: BaseException, expected: tuple[type[Exception], ...]) -> int:
    """What a program ends with after an error: what starts runs again goes by it.

    Args:
        error: that ends it.
        expected: as `ending_in_a_line` takes it.
    """
    if isinstance(error, ProcessError):
        return error.code
    if isinstance(error, (Terminated, OthersGoneError)):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, expected):
        return UNEXPECTED if may_pass(error.__cause__) else REFUSED
    # Libraries for networks have classes of their own, with numbers that need not be the system's.
    of_files = isinstance(error, OSError) and type(error).__module__ == "builtins"
    known = of_files and not may_pass(error)
    return REFUSED if known or _is_out_of_memory(error) else UNEXPECTED


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device: XLA's words differ with what it asked for, and with the hardware."""
    told = str(error)
    return (
        isinstance(error, JaxRuntimeError)
        and "RESOURCE_EXHAUSTED" in told
        and re.search("memory|allocat", told, re.IGNORECASE) is not None
    )


def _told(error: Exception, folder: str, smaller: str) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return disk_problem(error, folder)
    if _is_out_of_memory(error):
        return f"{str(error).splitlines()[0]}; please lower {smaller}"
    return str(error)

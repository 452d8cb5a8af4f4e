"""What a run prints: its own messages, above its progress bars; of libraries, warnings only."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from absl import logging as absl_logging
from tqdm import tqdm

from sl_jax.checkpoints.disk import disk_problem
from sl_jax.imaging.words import printable
from sl_jax.parallel.interrupts import TERMINATED, UNEXPECTED, OthersGoneError, Terminated, stop


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
    expected: tuple[type[Exception], ...], unit: str, folder: str = ""
) -> Iterator[None]:
    """Ends the program with a message, not a traceback, where its user can do something about it.

    Args:
        expected: errors that say what to do; exit code 1. Errors of the system, such as a full
            disk, are expected as well: path and advice are added. All others are shown whole; exit
            code 70.
        unit: what a run that was stopped is whole after: "epoch", "update"; exit code 130 after
            Ctrl-C, 143 after SIGTERM, or where another process was killed.
        folder: what the run writes to: the path of errors that know none.
    """
    try:
        yield
    except OthersGoneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(TERMINATED)
    except expected as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        told = str(error) if error.errno is None else disk_problem(error, folder)
        sys.exit(f"{type(error).__name__}: {told}")
    except Exception:  # to tell it from those: what starts runs again has hope
        traceback.print_exc()
        sys.exit(UNEXPECTED)
    except Terminated:
        stop(f"Terminated. The same command goes on after the last complete {unit}.", TERMINATED)
    except KeyboardInterrupt:
        stop(f"Stopped. The same command goes on after the last complete {unit}.")

"""Who writes to a folder: one run at a time.

The lock is advisory and the kernel's (flock): it is gone with the process that holds it, however
that ends, and nothing is left to clear up. Shared drives have it where they pass it on, as NFS 4
does; stores like gs:// have none.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from etils import epath

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.errors import CheckpointError

_log = logging.getLogger(__name__)

_FILE = ".lock"
_PATIENCE = 30.0  # seconds; a run that got SIGTERM may still be saving
_LOOK = 0.2  # seconds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(CheckpointError):
    """Another process writes to the folder."""


@contextmanager
def sole_writer(folder: epath.PathLike) -> Iterator[None]:
    """Keeps other processes from writing to a local folder, made if need be, while it lasts.

    Of one that is remote, or on a drive without locks, nothing is known; the latter is said.

    Raises:
        InUseError: another process writes there, and did not end soon.
        OSError: nothing can be written there.
    """
    if is_remote(folder):
        yield
        return
    path = Path(folder) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path)
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that fails: unlocked, the file means nothing
            path.unlink()  # by its holder alone; see `_open`
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the file, which is locked and says by whom."""
    deadline, said = time.monotonic() + _PATIENCE, False
    while (descriptor := _open(path)) is None:
        if time.monotonic() > deadline:
            raise InUseError(
                f"{path.parent} is written to by {_holder(path)}, and one run at a time can be; "
                "please let that one end, or choose another config.workdir"
            )
        if not said:
            _log.warning("%s is written to by %s; waiting for its end.", path.parent, _holder(path))
            said = True
        time.sleep(_LOOK)
    mine = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    return descriptor


def _open(path: Path) -> int | None:
    """The descriptor of the file, locked; None if another process has it locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            _log.warning(
                "The drive of %s has no locks (%s): please take care that no two runs write there.",
                *(path.parent, os.strerror(error.errno)),
            )
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # of a holder that removed it in between


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """In words."""
    try:
        told = json.loads(path.read_text())
        return f"process {told['process']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just beginning, or ending
        return "another process"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

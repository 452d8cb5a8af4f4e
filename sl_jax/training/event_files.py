"""TensorBoard's event files, written in step with the run.

The messages are tensorboardX's, the writers are not. `SummaryWriter` and `EventFileWriter` write
from a thread, where an error is nobody's and leaves the run waiting for ever. `EventsWriter` and
`RecordWriter`, which those two use, name a file by the second and empty the one that is there, so
that a restart within a second loses what was written before it; in a bucket they need another
package than the rest, and upload all that they ever wrote, each time.
"""

import contextlib
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from sl_jax.checkpoints.byte_ranges import is_remote

_VERSION = "brain.Event:2"  # from which on TensorBoard heeds where a session starts
_SECOND = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
_ENOUGH = 4 * 2**20  # bytes of an object


class EventFiles:
    """Adds to what TensorBoard shows of a folder.

    Locally, one file grows. Objects of a bucket cannot be appended to: there, one is written anew
    with all that is added, until it holds 4 MiB and another is begun, so that a long run writes no
    more each time than a short one.
    """

    def __init__(self, folder: epath.PathLike, purge_step: int | None = None):
        """Begins a file.

        Args:
            folder: made if missing; local or remote.
            purge_step: of earlier files, TensorBoard leaves out this step and those after it.

        Raises:
            OSError: it cannot be written.
        """
        self._folder = epath.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = f"{socket.gethostname()}.{os.getpid()}"
        self._name = f"events.out.tfevents.{_next_second(self._folder):010d}.{writer}"
        self._number = 0
        self._object = b""  # what is in that of a bucket
        records = _framed(Event(file_version=_VERSION))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            records += _framed(Event(step=purge_step, session_log=start))
        self._write(records)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers, which are written on return.

        Raises:
            OSError: nothing is added.
        """
        self._add(step, (summary.scalar(name, value) for name, value in values.items()))

    def picture(self, step: int, name: str, pixels: np.ndarray, text: str) -> None:
        """Adds a uint8 [H, W, 3] picture and, if there is any, a text (Markdown) of its name.

        Raises:
            OSError: nothing is added.
        """
        shown = [summary.image(name, pixels, dataformats="HWC")]
        if text:
            shown.append(summary.text(name, text))
        self._add(step, shown)

    def _add(self, step: int, summaries: Iterable[Summary]) -> None:
        values = [value for summary in summaries for value in summary.value]
        self._write(_framed(Event(step=step, summary=Summary(value=values))))

    def _write(self, records: bytes) -> None:
        path = self._folder / f"{self._name}.{self._number:06d}"
        if not is_remote(path):
            _append(path, records)
            return
        path.write_bytes(self._object + records)
        self._object += records
        if len(self._object) > _ENOUGH:
            self._number += 1
            self._object = _framed(Event(file_version=_VERSION))


def _next_second(folder: epath.Path) -> int:
    """This second, or the one after that of the newest file, if a clock was ahead or time is short.

    TensorBoard reads files in the order of their names, and no more of one once it has a later one.
    """
    files = folder.iterdir() if folder.is_dir() else ()  # a bucket has no empty folders
    named = (_SECOND.match(path.name) for path in files)
    return max([int(time.time()), *(int(found[1]) + 1 for found in named if found)])


def _append(path: epath.Path, records: bytes) -> None:
    """Appends all or nothing: behind a part of a record, TensorBoard can read no other."""
    before = path.stat().length if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(records)
    except OSError:
        with contextlib.suppress(OSError):  # what failed first is what is to be told
            os.truncate(path, before)
        raise


def _framed(event: Event) -> bytes:
    """A record as TensorFlow writes it: length and message, each with its checksum."""
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return b"".join((length, sums[0], content, sums[1]))

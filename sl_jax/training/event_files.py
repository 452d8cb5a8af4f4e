"""TensorBoard's event files, written in step with the run.

The messages are tensorboardX's. Its own writer is not used: it writes from a thread, where an error
is nobody's and leaves the run waiting for ever, and in a bucket all that it ever wrote, each time.
"""

import socket
import struct
import time
from collections.abc import Iterable

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from sl_jax.checkpoints.byte_ranges import is_remote

_VERSION = "brain.Event:2"
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
        """
        self._folder = epath.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and no more once it has a later one.
        self._name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}"
        self._number = 0
        self._held = bytearray(_framed(Event(file_version=_VERSION)))  # not written yet, or remote
        if purge_step is not None:
            for event in (
                Event(step=purge_step, file_version=_VERSION),
                Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
            ):
                self._held += _framed(event)
        self._write()

    def add(self, step: int, summaries: Iterable[Summary]) -> None:
        """Adds what the functions of `tensorboardX.summary` make; it is written on return."""
        values = [value for summary in summaries for value in summary.value]
        self._held += _framed(Event(step=step, summary=Summary(value=values)))
        self._write()

    def _write(self) -> None:
        path = self._folder / f"{self._name}.{self._number:06d}"
        if not is_remote(path):
            with path.open("ab") as file:
                file.write(self._held)
            self._held.clear()
            return
        path.write_bytes(bytes(self._held))
        if len(self._held) > _ENOUGH:
            self._number += 1
            self._held = bytearray(_framed(Event(file_version=_VERSION)))


def _framed(event: Event) -> bytes:
    """A record as TensorFlow writes it: length and message, each with its checksum."""
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return b"".join((length, sums[0], content, sums[1]))

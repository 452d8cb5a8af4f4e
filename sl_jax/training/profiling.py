"""Traces of JAX's profiler over some steps of a run."""

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from sl_jax.parallel.processes import ALONE, Processes
from sl_jax.training.configuration import ConfigError

_log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Steps of a run that a trace is made of: from `start`, counted from 0, so many."""

    start: int
    steps: int


def span(text: str) -> Span | None:
    """The steps that START:STEPS means; None for "".

    Raises:
        ConfigError: it is no such text.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):([1-9]\d*)", text)
    if not found:
        raise ConfigError(
            f"--profile={text} is not understood; please give the first step, counted from 0, and "
            "how many, such as --profile=2:1"
        )
    return Span(int(found[1]), int(found[2]))


class Profiler:
    """Traces the steps of a span and leaves them in `profile` in the work directory.

    TensorBoard's profile plugin, XProf and Perfetto read them. Of several processes each has a
    folder of its own there, `process_INDEX`: the profiler names files by time and host alone.
    """

    def __init__(self, wanted: Span | None, workdir: epath.PathLike, processes: Processes = ALONE):
        self._wanted, self._folder = wanted, epath.Path(workdir) / "profile"
        if processes.count > 1:
            self._folder /= f"process_{processes.index}"
        self._local: str | None = None

    def at(self, step: int) -> None:
        """To be called before each step, and after the last one."""
        if self._wanted is None:
            return
        first, last = self._wanted.start, self._wanted.start + self._wanted.steps
        if self._local is None and first <= step < last:
            self._local = tempfile.mkdtemp(prefix="sl_jax_profile_")
            jax.profiler.start_trace(self._local)
        elif self._local is not None and step >= last:
            self.close()

    def close(self) -> None:
        """Ends the trace if there is one; later steps are not traced any more."""
        if self._local is None:
            return
        jax.profiler.stop_trace()
        for file in Path(self._local).rglob("*"):
            if file.is_file():  # the work directory may be on a bucket, which the profiler is not
                place = self._folder / file.relative_to(self._local).as_posix()
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read_bytes())
        shutil.rmtree(self._local)
        self._local = self._wanted = None
        _log.info("Profile: %s", self._folder)

"""Where numbers of a run go: TensorBoard, one JSON line per record, and Weights & Biases."""

import itertools
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from etils import epath

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.disk import write_whole
from sl_jax.parallel.processes import ALONE, Processes

_log = logging.getLogger(__name__)

FILE = "metrics.jsonl"

# How the names begin of what the clock, the hardware and the judge's servers decide; all else a
# repeated run repeats, and so does one that was killed and went on.
CLOCKED = (
    *("seconds/", "share/", "device/", "pool/"),
    *("judge/asks_per_answer", "judge/seconds", "judge/tokens"),
)


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides the work directory.

    Attributes:
        wandb: project of Weights & Biases; "" for none. The package's own environment variables
            say the rest: WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE=offline.
    """

    wandb: str = ""


class RunMetrics(Protocol):
    """What takes the numbers of a run."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records numbers at `step`."""
        ...


@contextmanager
def open_metrics(
    folder: epath.PathLike, resume_from: int, log: LogConfig, processes: Processes = ALONE
) -> Iterator[RunMetrics]:
    """The metrics of a run, which its main process alone writes; closed at the end.

    Args:
        folder: as for `MetricsWriter`, as `resume_from`.
        log: where else they go.
        processes: of the run; all of them record in step.
    """
    writer = None
    with processes.together("opening the metrics"):
        if processes.is_main:
            writer = MetricsWriter(folder, resume_from, log)
    try:
        yield _Together(writer, processes)
    finally:
        if writer:
            writer.close()


class _Together:
    def __init__(self, writer: "MetricsWriter | None", processes: Processes):
        self._writer, self._processes = writer, processes

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        with self._processes.together("writing metrics"):
            if self._writer:
                self._writer.scalars(step, values)


class MetricsWriter:
    """Writes scalars and pictures of a run to `directory`.

    `metrics.jsonl` is the record that reports read; TensorBoard event files and Weights & Biases,
    if `log` names a project, get the same. After a restart, records at or beyond `resume_from` are
    dropped first, so that no step stands twice; where a run begins anew, with 0, all that it had
    are set aside, with a warning.

    Objects of a bucket cannot be appended to: there, each record writes all of `metrics.jsonl`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        resume_from: int | None = None,
        log: LogConfig = LogConfig(),
    ):
        # TensorBoard's library loads PyTorch where that is installed: what reads metrics, and the
        # processes that write none, need not wait for it.
        from sl_jax.training.event_files import EventFiles

        self._directory = epath.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / FILE
        records = list(read_metrics(directory))
        if resume_from == 0 and any(record["step"] > 0 for record in records):
            _set_aside(self._path)
        kept = [r for r in records if resume_from is None or r["step"] < resume_from]
        lines = [json.dumps(record) + "\n" for record in kept]
        self._lines = lines if is_remote(self._directory) else None
        write_whole(self._path, "".join(lines))  # so that a kill here loses nothing
        self._board = EventFiles(self._directory / "tensorboard", resume_from)
        self._wandb = _wandb_run(self._directory, log.wandb) if log.wandb else None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records numbers at `step`; values that are not finite are kept as null in JSON."""
        numbers = {name: float(value) for name, value in values.items()}
        record = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._board.scalars(step, {name: x for name, x in record.items() if x is not None})
        line = json.dumps({"step": step, **record}) + "\n"
        if self._lines is None:
            _append(self._path, line)
        else:
            self._lines.append(line)
            self._path.write_text("".join(self._lines))
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray, text: str = "") -> None:
        """Shows a uint8 [H, W, 3] picture, and under its name a text (Markdown) about it."""
        self._board.picture(step, name, pixels, text)
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(pixels, caption=text or None)}, step=step)

    def close(self) -> None:
        """Ends the run of Weights & Biases; all else is written already."""
        if self._wandb:
            self._wandb.finish()


def _wandb_run(folder: epath.Path, project: str) -> Any:
    """The run of Weights & Biases of a work directory; it passes over steps that it has already."""
    import wandb

    noted = folder / "wandb_id"
    if not noted.exists():
        noted.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        id=noted.read_text(),
        name=folder.name,
        resume="allow",
        dir=None if is_remote(folder) else os.fspath(folder),  # None: the current one
    )


def repeatable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record a repeated run repeats, to the last bit."""
    return {name: value for name, value in record.items() if not name.startswith(CLOCKED)}


def read_metrics(directory: epath.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a run.

    Lines that are no records, as a fault of the disk leaves them, are passed over with one warning;
    a last line that a crash cut off, or that is being written, without.
    """
    path = epath.Path(directory) / FILE
    if not path.exists():
        return
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _record(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                damaged.append(number)
    if damaged:
        _log.warning(
            "Damaged lines of %s are passed over: %d, the first of them line %d.",
            *(path, len(damaged), damaged[0]),
        )


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds, if that is a step and its numbers."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    numbers = all(value is None or type(value) in (int, float) for value in found.values())
    return found if numbers else None


def _set_aside(path: epath.Path) -> None:
    """Keeps a run's records under another name, the first that is free."""
    names = (f"metrics.before-{number}.jsonl" for number in itertools.count(1))
    aside = next(p for name in names if not (p := path.with_name(name)).exists())
    path.replace(aside)
    _log.warning(
        "There is no checkpoint to go on from, though %s tells of earlier training: it begins "
        "anew, and what it told is kept as %s.",
        *(path, aside),
    )


def _append(path: epath.Path, line: str) -> None:
    """Appends a line; behind one without an end, it begins another."""
    with open(path, "ab+") as file:  # epath's has no mode that reads, too
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())

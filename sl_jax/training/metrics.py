"""Where numbers of a run go: TensorBoard and one JSON line per record."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes scalars and pictures of a run to `directory`.

    `metrics.jsonl` is the record that reports read; TensorBoard event files hold the same. After a
    restart, records at or beyond `resume_from` are dropped first, so that no step stands twice.
    """

    def __init__(self, directory: epath.PathLike, resume_from: int | None = None):
        self._directory = epath.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / "metrics.jsonl"
        kept = [
            r for r in read_metrics(directory) if resume_from is None or r["step"] < resume_from
        ]
        partial = self._directory / "metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self._path)  # at once, so that a kill here loses nothing
        self._board = SummaryWriter(
            str(self._directory / "tensorboard"), purge_step=resume_from, flush_secs=30
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records numbers at `step`; values that are not finite are kept as null in JSON."""
        numbers = {name: float(value) for name, value in values.items()}
        record = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        for name, value in record.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows a uint8 [H, W, 3] picture in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes everything."""
        self._board.close()


def read_metrics(directory: epath.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a run; a last line that was cut off by a crash is passed over."""
    path = epath.Path(directory) / "metrics.jsonl"
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise

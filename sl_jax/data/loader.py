"""The stream of training pictures, whose position is part of a checkpoint, and the held-out set."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from sl_jax.checkpoints.disk import storage_failed
from sl_jax.data._schedule import Schedule
from sl_jax.data.buckets import Bucket
from sl_jax.data.folder import FolderError, PictureIndex, PictureRecord
from sl_jax.data.pictures import PictureError, PictureLimits, resize_to, shown
from sl_jax.data.tfds_pictures import open_record
from sl_jax.imaging.words import counted

_log = logging.getLogger(__name__)
_ENDLESS = 1 << 60
_RETRY_SECONDS = (0.2, 1.0)


@dataclass(frozen=True, eq=False)
class Example:
    """One picture to decompose.

    Attributes:
      picture: uint8 [bucket.height, bucket.width, 3], stretched to its bucket.
      caption: "" if there is none.
      path: the file.
      picture_id: short hash of the file's content.
      layers: number of layers L to decompose it into.
      bucket: its shape.
      step: the training step that it belongs to; 0 in an `EvalSet`.
      slot: its place in the step, counted over all processes; its place in an `EvalSet`.
    """

    picture: UInt8[np.ndarray, "height width 3"]
    caption: str
    path: str
    picture_id: str
    layers: int
    bucket: Bucket
    step: int
    slot: int

    @property
    def is_blank(self) -> bool:
        """Whether it stands for no picture at all; see `EvalBatch`."""
        return not self.picture_id


@dataclass(frozen=True)
class StepPlan:
    """What one step is made of, before a file is opened: the same in every process.

    Attributes:
      step: number of the step, from 0.
      bucket: shape of all its pictures.
      layers: number of layers L of all its pictures.
      records: the pictures of all processes, by slot.
    """

    step: int
    bucket: Bucket
    layers: int
    records: tuple[PictureRecord, ...]


@dataclass(frozen=True, eq=False)
class StepPictures:
    """One step's pictures for this process; bucket and layers are the same in every process."""

    step: int
    bucket: Bucket
    layers: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class EvalBatch:
    """Held-out pictures of one bucket and one L.

    Attributes:
      bucket: shape of all of them.
      layers: L of all of them.
      rows: the rows of the batch that were asked for.
      examples: one per row; a blank one, of no picture, where the batch is not full or the picture
        cannot be read.
    """

    bucket: Bucket
    layers: int
    rows: tuple[int, ...]
    examples: tuple[Example, ...]


class TrainStream(Iterator[StepPictures]):
    """Endless training steps of pictures, read ahead in background threads.

    Step n is a function of (index, settings, n) alone. All processes see the same bucket and L at
    step n, and each gets the pictures of its slots; joined by slot, they are the same for any
    number of processes and threads. Buckets are drawn in proportion to their pictures; within a
    bucket every picture comes once before any comes again, in a new order each time. A bucket with
    fewer pictures than `groups` repeats them within a step.

    A file that cannot be read any more, or has another content, is replaced by another picture of
    its bucket, chosen by the step and the slot, and is reported in `failures`; one that was
    quarantined likewise.

    Not to be shared between threads; `close` ends the reading ahead.
    """

    def __init__(
        self,
        index: PictureIndex,
        *,
        groups: int,
        layers: Sequence[int] = (3, 4),
        layer_weights: Sequence[float] | None = None,
        seed: int = 0,
        slots: Sequence[int] | None = None,
        threads: int | None = None,
        prefetch_steps: int = 1,
    ):
        """Prepares the stream at step 0; nothing is read before the first `next`.

        Args:
          index: the pictures.
          groups: pictures per step over all processes.
          layers: the values that L is drawn from, once per step.
          layer_weights: their relative weights; equal by default.
          seed: non-negative; another seed is another order.
          slots: the places in a step, from 0 up to `groups`, whose pictures this process reads;
            all by default.
          threads: reading threads; default: the number of cores, at most 16. 0 reads nothing ahead.
          prefetch_steps: how many steps' pictures are read ahead.

        Raises:
          ValueError: an argument is out of range; the message names it and its value.
          FolderError: the index is empty.
        """
        if not index.records:
            raise FolderError(f"no pictures to train on in {shown(index.folder)}")
        self._slots = _checked_slots(groups, slots)
        weights = _check_layers(layers, layer_weights)
        if seed < 0:
            raise ValueError(f"seed = {seed}; please use 0 or more")
        self._limits = index.limits
        self._layers, self._layer_weights = tuple(layers), weights
        self._buckets = tuple(index.by_bucket)
        # By content, so that renaming pictures changes nothing.
        self._records = tuple(
            tuple(sorted(index.by_bucket[bucket], key=lambda record: record.content_hash))
            for bucket in self._buckets
        )
        self._schedule = Schedule([len(rows) for rows in self._records], groups, weights, seed)
        self._groups = groups
        self._threads = min(os.cpu_count() or 1, 16) if threads is None else threads
        self._prefetch_steps = prefetch_steps
        settings = repr((index.fingerprint, groups, self._layers, weights, seed))
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.plan = functools.lru_cache(maxsize=8)(self._plan)
        self._quarantined: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._lock = threading.Lock()
        self._step = 0
        self._items: grain.DatasetIterator[Example] | None = None

    @property
    def step(self) -> int:
        """Number of the step that `next` gives."""
        return self._step

    @property
    def passes(self) -> float:
        """How many times the pictures have been gone through, on average."""
        return self._step * self._groups / sum(map(len, self._records))

    @property
    def shapes(self) -> tuple[tuple[Bucket, int], ...]:
        """Every (bucket, L) that a step can have: the programs that training compiles."""
        possible = dict.fromkeys(itertools.compress(self._layers, self._layer_weights))
        return tuple(itertools.product(self._buckets, possible))

    @property
    def failures(self) -> Mapping[str, str]:
        """Path → reason of the files that this process could not read, or found changed."""
        return dict(self._failures)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Picture id → reason of the pictures that are not drawn any more."""
        return dict(self._quarantined)

    def _plan(self, step: int) -> StepPlan:
        """What step `step` is made of (before replacements), without reading a picture."""
        bucket, layers = self._schedule.shape(step)
        rows = self._records[bucket]
        return StepPlan(
            step=step,
            bucket=self._buckets[bucket],
            layers=self._layers[layers],
            records=tuple(rows[number] for number in self._schedule.pictures(step)),
        )

    def __next__(self) -> StepPictures:
        if self._items is None:
            self._items = self._read_from(self._step)
        plan = self.plan(self._step)
        examples = tuple(next(self._items) for _ in self._slots)
        self._step += 1
        return StepPictures(
            step=plan.step,
            bucket=plan.bucket,
            layers=plan.layers,
            # Some may have been quarantined since they were read.
            examples=tuple(
                self._load(example.step, example.slot)
                if example.picture_id in self._quarantined
                else example
                for example in examples
            ),
        )

    def replace(self, example: Example, reason: str) -> Example:
        """Quarantines a picture and returns the one that takes its place in its step."""
        self.quarantine({example.picture_id: reason})
        return self._load(example.step, example.slot)

    def quarantine(self, pictures: Mapping[str, str]) -> None:
        """Draws these pictures no more.

        In a run of several processes, each calls this at the same step with the pictures of all,
        so that a checkpoint, which one process writes, holds them all.

        Args:
          pictures: picture id → reason.
        """
        for picture_id, reason in pictures.items():
            if picture_id not in self._quarantined:
                _log.warning("picture %s is not drawn any more: %s", picture_id, reason)
        self._quarantined = {**self._quarantined, **pictures}

    def state(self) -> dict[str, Any]:
        """The position, for a checkpoint: JSON-able, the same in every process.

        Restored into a stream with the same pictures and settings, whatever its number of
        processes and threads, it continues with the very steps that this stream would give.
        """
        return {
            "step": self._step,
            "fingerprint": self.fingerprint,
            "quarantined": dict(sorted(self._quarantined.items())),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that `state` gave.

        With other pictures or settings than when it was taken, which is logged as a warning, the
        steps are numbered on but differ from those that would have come.

        Raises:
          ValueError: `state` is not such a position.
        """
        try:
            step, fingerprint = int(state["step"]), str(state["fingerprint"])
            quarantined = {str(key): str(reason) for key, reason in state["quarantined"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a position of a picture stream: {state!r}") from error
        if step < 0:
            raise ValueError(f"a picture stream cannot be at step {step}")
        if fingerprint != self.fingerprint:
            _log.warning(
                "the pictures, or the settings of their order, are not those of the checkpoint: "
                "going on at step %d with %s in a new order",
                step,
                counted(sum(map(len, self._records)), "picture"),
            )
        self.close()
        self._step = step
        self._quarantined = quarantined

    def close(self) -> None:
        """Stops reading ahead; `next` starts it again at the current step."""
        if self._items is not None:
            self._items.close()
            self._items = None

    def _read_from(self, step: int) -> grain.DatasetIterator[Example]:
        ahead = len(self._slots) * self._prefetch_steps if self._threads else 0
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        slots = _Slots(self, step, self._slots)
        return iter(grain.MapDataset.source(slots).to_iter_dataset(options))

    def _load(self, step: int, slot: int) -> Example:
        """The slot's picture, or the first substitute that can be read and is not quarantined."""
        plan = self.plan(step)
        for record in self._candidates(plan, slot):
            if record.picture_id in self._quarantined:
                continue
            try:
                return _example(record, plan.layers, step, slot, self._limits)
            except PictureError as error:
                self._note_failure(record, error)
        count = len(self._records[self._buckets.index(plan.bucket)])
        raise FolderError(
            f"none of the {count} pictures of bucket {plan.bucket} can be used any more: "
            f"{len(self._failures)} could not be read, {len(self._quarantined)} are quarantined; "
            "please look at the folder and resume"
        )

    def _candidates(self, plan: StepPlan, slot: int) -> Iterator[PictureRecord]:
        yield plan.records[slot]
        rows = self._records[self._buckets.index(plan.bucket)]
        present = {record.picture_id for record in plan.records}
        order = [rows[i] for i in self._schedule.substitutes(plan.step, slot, len(rows))]
        yield from (record for record in order if record.picture_id not in present)
        yield from (record for record in order if record.picture_id in present)

    def _note_failure(self, record: PictureRecord, error: PictureError) -> None:
        with self._lock:
            known = record.path in self._failures
            self._failures[record.path] = error.reason
        if not known:
            _log.warning("%s; another picture takes its place", error)


class EvalSet(Sequence[Example]):
    """Held-out pictures in a fixed order, each with a fixed number of layers.

    Which pictures, their order and their L follow from their contents: files may be renamed, and
    added pictures move no L. Pictures are read when they are asked for.
    """

    def __init__(
        self, index: PictureIndex, *, layers: Sequence[int] = (3, 4), count: int | None = None
    ):
        """Chooses the pictures.

        Args:
          index: the held-out pictures.
          layers: the values of L; each picture has one of them.
          count: use this many at most; all by default.

        Raises:
          FolderError: the index is empty.
          ValueError: `layers` or `count` is out of range.
        """
        if not index.records:
            raise FolderError(
                f"no held-out pictures in {shown(index.folder)}; please name a folder of them as "
                "eval_data, or raise eval_fraction"
            )
        _check_layers(layers, None)
        if count is not None and count < 1:
            raise ValueError(f"count = {count}; please use 1 or more")
        self._limits = index.limits
        self._layers = tuple(layers)
        ordered = sorted(index.records, key=lambda record: record.content_hash)
        self.records = tuple(ordered[:count])
        self._failures: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> Example:
        """Reads one picture.

        Raises:
          IndexError: there is no such position.
          PictureError: the file cannot be read any more, or has another content.
        """
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of an evaluation set of {len(self)}")
        position %= len(self)
        record = self.records[position]
        return _example(record, self.layers_of(record), 0, position, self._limits)

    def __iter__(self) -> Iterator[Example]:
        """The pictures that can be read; `failures` names the others."""
        return self._readable(range(len(self)))

    @property
    def failures(self) -> Mapping[str, str]:
        """Path → reason of the files that could not be read."""
        return dict(self._failures)

    def layers_of(self, record: PictureRecord) -> int:
        """The number of layers that a picture is decomposed into."""
        return self._layers[int(record.content_hash[-8:], 16) % len(self._layers)]

    def batches(self, size: int, rows: Sequence[int] | None = None) -> Iterator[EvalBatch]:
        """All pictures in batches of `size` rows, each of one bucket and one L.

        Args:
          size: of every batch; the last ones of a shape are filled up with blanks.
          rows: read these rows of each batch; all by default.
        """
        if size < 1:
            raise ValueError(f"size = {size}; please use 1 or more")
        rows = tuple(range(size) if rows is None else rows)
        positions: dict[tuple[Bucket, int], list[int]] = {}
        for position, record in enumerate(self.records):
            shape = (record.bucket, self.layers_of(record))
            positions.setdefault(shape, []).append(position)
        for bucket, layers in sorted(positions):
            here = positions[bucket, layers]
            for start in range(0, len(here), size):
                batch = here[start : start + size]
                wanted = {row: batch[row] for row in rows if row < len(batch)}
                read = {e.slot: e for e in self._readable(list(wanted.values()))}
                blank = _blank(bucket, layers)
                chosen = tuple(read.get(wanted.get(row, -1), blank) for row in rows)
                yield EvalBatch(bucket, layers, rows, chosen)

    def _readable(self, positions: Sequence[int]) -> Iterator[Example]:
        for position in positions:
            try:
                example = self[position]
            except PictureError as error:
                path = self.records[position].path
                if path not in self._failures:
                    _log.warning("%s; left out of the evaluation", error)
                self._failures[path] = error.reason
            else:
                yield example


class _Slots:
    """The stream's slots of this process from a step on, as a random-access source for grain."""

    def __init__(self, stream: TrainStream, first_step: int, slots: Sequence[int]):
        self._stream = stream
        self._first_step = first_step
        self._slots = slots

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, position: int) -> Example:
        step, offset = divmod(int(position), len(self._slots))
        return self._stream._load(self._first_step + step, self._slots[offset])

    def __repr__(self) -> str:
        return f"pictures from step {self._first_step} on"


def _blank(bucket: Bucket, layers: int) -> Example:
    picture = np.zeros((bucket.height, bucket.width, 3), np.uint8)
    return Example(picture, "", "", "", layers, bucket, step=0, slot=0)


def _example(
    record: PictureRecord, layers: int, step: int, slot: int, limits: PictureLimits
) -> Example:
    picture = resize_to(_open_patiently(record, limits), record.bucket)
    return Example(
        picture=picture,
        caption=record.caption,
        path=record.path,
        picture_id=record.picture_id,
        layers=layers,
        bucket=record.bucket,
        step=step,
        slot=slot,
    )


def _open_patiently(
    record: PictureRecord, limits: PictureLimits
) -> UInt8[np.ndarray, "height width 3"]:
    """Opens a picture, again after a pause where storage fails rather than the picture."""
    for pause in _RETRY_SECONDS:
        try:
            return open_record(record.path, limits, record.content_hash)
        except PictureError as error:
            if not _may_pass(error.__cause__):
                raise
        time.sleep(pause)
    return open_record(record.path, limits, record.content_hash)


def _may_pass(cause: BaseException | None) -> bool:
    """True for errors of the system that may go away by themselves."""
    return storage_failed(cause) and not isinstance(cause, PermissionError)


def _checked_slots(groups: int, slots: Sequence[int] | None) -> tuple[int, ...]:
    if groups < 1:
        raise ValueError(f"groups = {groups}; please use 1 or more")
    chosen = tuple(range(groups) if slots is None else slots)
    rising = sorted(set(chosen)) == list(chosen)
    if not chosen or not rising or chosen[0] < 0 or chosen[-1] >= groups:
        raise ValueError(
            f"slots = {chosen}; please give one or more, rising, from 0 to {groups - 1}"
        )
    return chosen


def _check_layers(
    layers: Sequence[int], layer_weights: Sequence[float] | None
) -> tuple[float, ...]:
    """The weights of the choices, once both are found to be usable."""
    if not layers or not all(isinstance(count, int) and count >= 1 for count in layers):
        raise ValueError(f"layers = {layers!r}; please give one or more positive whole numbers")
    weights = tuple(float(weight) for weight in layer_weights or (1.0,) * len(layers))
    usable = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) != len(layers) or not usable or not sum(weights) > 0:
        raise ValueError(
            f"layer_weights = {layer_weights!r}; please give one finite weight ≥ 0 for each of "
            f"the {len(layers)} layer choices, not all of them 0"
        )
    return weights

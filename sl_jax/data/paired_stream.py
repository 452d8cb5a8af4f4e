"""Batches of designs with their true layers, addressed by update number, read ahead in threads."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sl_jax import imaging
from sl_jax.data._schedule import Schedule
from sl_jax.data.buckets import Bucket, nearest_bucket
from sl_jax.data.canvas import merge_to
from sl_jax.data.folder import FolderError
from sl_jax.data.paired import PairedData, PairedDesign
from sl_jax.data.pictures import PictureError, resize_to, shown

_log = logging.getLogger(__name__)


class PairedShape(NamedTuple):
    """What all designs of a batch have in common; `layers` counts the background."""

    bucket: Bucket
    layers: int


class PairedBatch(NamedTuple):
    """Designs of one shape.

    Attributes:
      frames: straight RGBA: the opaque picture, then its layers back to front.
      captions: one per design; "" if there is none.
      fresh: the batch's first so many rows, over all processes, are new ones, and those behind
        them copies; None where nobody counts.
    """

    frames: UInt8[np.ndarray, "b layers_1 h w 4"]
    captions: tuple[str, ...]
    fresh: int | None = None


class PairedStream:
    """Update number → batch: a function of (data, settings, number) alone, endless.

    Designs are stretched to their nearest bucket; those with more than `max_layers` layers are
    merged to so many (`canvas.merge_to`), those with fewer than `min_layers` are not used. A shape
    is drawn in proportion to its designs; within it each comes once before any comes again. A
    design that cannot be read any more is replaced by another of its shape, and logged once.
    """

    def __init__(
        self,
        data: PairedData,
        buckets: Sequence[Bucket],
        *,
        batch: int,
        min_layers: int = 2,
        max_layers: int = 8,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        threads: int | None = None,
    ):
        """Prepares the stream; nothing is read yet.

        Args:
          data: the designs.
          buckets: static shapes.
          batch: designs per update over all processes.
          min_layers, max_layers: range of the numbers of layers; 1 ≤ min_layers ≤ max_layers.
          seed: non-negative; another seed is another order.
          rows: the rows of a batch that this process reads; all by default.
          threads: reading threads; default: the number of cores, at most 16.

        Raises:
          FolderError: no design has enough layers.
        """
        groups: dict[PairedShape, list[PairedDesign]] = collections.defaultdict(list)
        for design in sorted(data, key=lambda design: design.content_hash):
            if design.layers >= min_layers:
                bucket = nearest_bucket(buckets, design.height, design.width)
                groups[PairedShape(bucket, min(design.layers, max_layers))].append(design)
        if not groups:
            raise FolderError(
                f"none of the {len(data)} designs in {shown(data.where)} has {min_layers} layers "
                "or more; please add some, or lower data.min_layers"
            )
        self.shapes = tuple(sorted(groups))
        self.used = sum(map(len, groups.values()))
        self._groups = [tuple(groups[shape]) for shape in self.shapes]
        self._schedule = Schedule([len(group) for group in self._groups], batch, [1.0], seed)
        self._batch = batch
        self._rows = tuple(range(batch) if rows is None else rows)
        self._pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 16))
        self._ahead: dict[int, list[Future[tuple[np.ndarray, str]]]] = {}
        self._failed: set[str] = set()

    def __call__(self, step: int) -> tuple[PairedShape, PairedBatch]:
        """The batch of an update; the next one's is read in the meantime."""
        self._ahead = {
            number: self._ahead.get(number) or self._started(number) for number in (step, step + 1)
        }
        number, _ = self._schedule.shape(step)
        return self.shapes[number], _stacked([future.result() for future in self._ahead[step]])

    def in_order(self) -> Iterator[tuple[PairedShape, PairedBatch]]:
        """Every design, in batches; the last of a shape is filled up with copies of its first."""
        for shape, group in zip(self.shapes, self._groups, strict=True):
            for start in range(0, len(group), self._batch):
                chosen = [group[(start + row) % len(group)] for row in self._rows]
                read = self._pool.map(lambda d, s=shape, g=group: self._read(s, [d, *g]), chosen)
                fresh = min(len(group) - start, self._batch)
                yield shape, _stacked(list(read))._replace(fresh=fresh)

    def close(self) -> None:
        """Ends the reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _started(self, step: int) -> list[Future[tuple[np.ndarray, str]]]:
        number, _ = self._schedule.shape(step)
        group, picks = self._groups[number], self._schedule.pictures(step)
        candidates = (
            [picks[row], *self._schedule.substitutes(step, row, len(group))] for row in self._rows
        )
        return [
            self._pool.submit(self._read, self.shapes[number], [group[i] for i in order])
            for order in candidates
        ]

    def _read(
        self, shape: PairedShape, candidates: Sequence[PairedDesign]
    ) -> tuple[np.ndarray, str]:
        """Frames and caption of the first design that can be read."""
        for design in candidates:
            try:
                layers = merge_to(design.read(), shape.layers)
            except PictureError as error:
                if design.name not in self._failed:
                    self._failed.add(design.name)
                    _log.warning("%s; another design takes its place", error)
                continue
            return with_picture(layers, shape.bucket), design.caption
        raise FolderError(f"none of the designs of {shape.bucket} can be read any more")


def with_picture(
    layers: UInt8[np.ndarray, "l h w 4"], size: tuple[int, int]
) -> UInt8[np.ndarray, "l_1 height width 4"]:
    """Layers at a size, behind the opaque picture that they are together at that size.

    Args:
      layers: straight RGBA, back to front.
      size: (height, width) to stretch them to.
    """
    stretched = np.stack([resize_to(layer, size) for layer in layers])
    picture = np.full((1, *size, 4), 255, np.uint8)
    picture[0, ..., :3] = imaging.recompose(stretched)
    return np.concatenate([picture, stretched])


def _stacked(read: Sequence[tuple[np.ndarray, str]]) -> PairedBatch:
    frames, captions = zip(*read, strict=True)
    return PairedBatch(np.stack(frames), tuple(captions))

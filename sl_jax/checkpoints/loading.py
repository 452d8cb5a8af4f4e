"""Parameters from checkpoint tensors: straight into the shards that this process holds.

Every shard is one buffer on the host, into which threads write its rows; it goes to its devices
before the next one is begun. Rows of a stacked parameter are written where they belong in the
stack, so that nothing is stacked a second time.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from sl_jax.checkpoints.naming import Source, to_parameter
from sl_jax.checkpoints.tensor_files import TensorFiles
from sl_jax.parallel.host_array import Bounds, HostArray, places_of

_REQUESTS = 16  # to a remote store at a time
_COPIES = 8  # threads at most that copy from mapped memory
_CHUNK = 64 * 2**20  # bytes per request
_TILE = 128  # rows of a transposition at a time: they stay in the processor's cache
_SHOWN = 2**28  # bytes from which on there is a bar
_LOG_SECONDS = 30.0  # between its lines in a log file


class Loader:
    """Fills parameters from the tensors of a folder, with a progress bar. A context manager.

    Args:
        files: the tensors.
        leaves: all parameters that will be loaded, for the bar's total.
        exchange: whether equal shares of a tensor's rows are read, and exchanged between devices,
            where shards are scattered over all rows; None does so where devices of several
            processes share an array.
    """

    def __init__(self, files: TensorFiles, leaves: Iterable[Any], exchange: bool | None = None):
        self._files = files
        self._exchange = exchange
        workers = _REQUESTS if files.is_remote else min(_COPIES, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, "load")
        total = sum(map(_bytes, leaves))
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=f"loading {files.folder.name}",
            disable=total < _SHOWN or jax.process_index() > 0,
            mininterval=0.2 if sys.stderr.isatty() else _LOG_SECONDS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._bar.close()

    def load(self, source: Source, leaf: Any, on_host: bool = False) -> jax.Array | HostArray:
        """The parameter that `source` fills, of `leaf`'s shape, dtype and, if any, sharding."""
        sharding = getattr(leaf, "sharding", None)
        if on_host:
            shards = self._filled(source, leaf, list(places_of(leaf.shape, sharding)))
            return HostArray(leaf.shape, leaf.dtype, sharding, shards)
        if sharding is None:
            whole = tuple((0, size) for size in leaf.shape)
            return jax.numpy.asarray(self._filled(source, leaf, [whole])[whole])
        exchange = self._exchange
        if exchange is None:
            exchange = not sharding.is_fully_addressable
        rows = by_rows(source, leaf.shape, sharding) if exchange else None
        if rows is None:
            return self._placed(source, leaf, sharding)
        read = self._placed(source, leaf, rows)
        placed = jax.block_until_ready(jax.jit(_same, out_shardings=sharding)(read))
        read.delete()
        return placed

    def _placed(self, source: Source, leaf: Any, sharding: Sharding) -> jax.Array:
        places = places_of(leaf.shape, sharding)
        # What lies in remote rows together is fetched together, though it takes a buffer for each.
        groups = [list(places)] if self._files.is_remote else [[bounds] for bounds in places]
        arrays: list[jax.Array] = []
        for group in groups:
            buffers = self._filled(source, leaf, group)
            for bounds in group:
                buffer = buffers.pop(bounds)
                copies = [jax.device_put(buffer, device) for device in places[bounds]]
                arrays += jax.block_until_ready(copies)
                del buffer
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    def _filled(
        self, source: Source, leaf: Any, group: Sequence[Bounds]
    ) -> dict[Bounds, np.ndarray]:
        buffers = {b: np.empty([end - begin for begin, end in b], leaf.dtype) for b in group}
        if len(leaf.shape) == len(to_parameter_shape(source)):
            rows = [(source.names[0], list(buffers.items()))]
        else:
            rows = [
                (
                    name,
                    [
                        (bounds[1:], buffer[layer - bounds[0][0]])
                        for bounds, buffer in buffers.items()
                        if bounds[0][0] <= layer < bounds[0][1]
                    ],
                )
                for layer, name in enumerate(source.names)
            ]
        jobs = [self._pool.submit(self._fill, source, *row) for row in rows if row[1]]
        try:
            for job in jobs:
                self._bar.update(job.result())
        finally:
            for job in jobs:
                job.cancel()
        return buffers

    def _fill(self, source: Source, name: str, parts: list[tuple[Bounds, np.ndarray]]) -> int:
        """Writes parts of one tensor to where they belong; how many bytes that were."""
        if source.layout in ("linear", "same"):
            if source.layout == "linear":
                parts = [(bounds[::-1], target.T) for bounds, target in parts]
            self._fill_by_rows(name, parts)
        else:
            tensor = to_parameter(self._files.read(name), source.layout)
            for bounds, target in parts:
                target[...] = tensor[tuple(itertools.starmap(slice, bounds))]
        return sum(target.nbytes for _, target in parts)

    def _fill_by_rows(self, name: str, parts: list[tuple[Bounds, np.ndarray]]) -> None:
        step = max(1, _CHUNK // max(1, self._files.row_bytes(name)))
        for begin, end in _merged(bounds[0] for bounds, _ in parts):
            for first in range(begin, end, step):
                self._fill_some_rows(name, first, min(first + step, end), parts)

    def _fill_some_rows(
        self, name: str, first: int, last: int, parts: list[tuple[Bounds, np.ndarray]]
    ) -> None:
        rows = self._files.read(name, (slice(first, last),))
        for (own, *others), target in parts:
            low, high = max(first, own[0]), min(last, own[1])
            if low < high:
                chosen = (slice(low - first, high - first), *itertools.starmap(slice, others))
                _copy(target[low - own[0] : high - own[0]], rows[chosen])


def by_rows(source: Source, shape: tuple[int, ...], sharding: Sharding) -> NamedSharding | None:
    """The sharding in which every shard is one range of bytes of each tensor; None if it need not.

    A linear layer's tensor is (outputs, inputs), so that a shard of its inputs is a part of every
    row. The mesh axes of the inputs then split the outputs as well; None also if they cannot.
    """
    if source.layout != "linear" or not isinstance(sharding, NamedSharding):
        return None
    *lead, inputs, outputs = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    named = {*_axes(outputs), *_axes(inputs)}
    axes = tuple(axis for axis in sharding.mesh.axis_names if axis in named)
    if inputs is None or shape[-1] % math.prod(sharding.mesh.shape[axis] for axis in axes):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*lead, None, axes))


def to_parameter_shape(source: Source) -> tuple[int, ...]:
    """Shape of one row of the parameter that `source` fills."""
    return to_parameter(np.broadcast_to(np.int8(0), source.shape), source.layout).shape


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of ranges, as ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _axes(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else (names or ())


def _same(x: jax.Array) -> jax.Array:
    return x


def _bytes(leaf: Any) -> int:
    """Bytes of a parameter's shards that this process holds, copies counted once."""
    sharding = getattr(leaf, "sharding", None)
    shards = 1 if sharding is None else len(places_of(leaf.shape, sharding))
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return shards * math.prod(shape) * np.dtype(leaf.dtype).itemsize


def _copy(target: np.ndarray, part: np.ndarray) -> None:
    if target.dtype == part.dtype:  # Numpy copies integers faster than the smaller floats.
        kind = np.dtype(f"u{target.itemsize}")
        target, part = target.view(kind), part.view(kind)
    for first in range(0, len(target), _TILE):
        target[first : first + _TILE] = part[first : first + _TILE]

"""Arrays that stay in the memory of the hosts and visit the devices a few rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class HostArray:
    """An array of which every process keeps the shards of its own devices, as numpy arrays.

    Attributes:
        shape, dtype: of the whole.
        sharding: over the devices that it visits; the first axis must be whole for `rows`.
        shards: this process's, by (begin, end) on every axis; one for all devices that share it.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding
    shards: Mapping[Bounds, np.ndarray]

    def rows(self, first: int, stop: int) -> jax.Array:
        """Rows first … stop − 1 of the first axis, on the devices. All processes call together."""
        places = places_of(self.shape, self.sharding)
        arrays = [
            jax.device_put(self.shards[bounds][first:stop], device)
            for bounds, devices in places.items()
            for device in devices
        ]
        shape = (stop - first, *self.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, arrays)

    def whole(self) -> jax.Array:
        """All of it on the devices."""
        return self.rows(0, self.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes that this process keeps."""
        return sum(shard.nbytes for shard in self.shards.values())


def places_of(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> dict[Bounds, list[jax.Device]]:
    """The devices of this process, by the part of the array that they hold."""
    places: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        places.setdefault(bounds, []).append(device)
    return places

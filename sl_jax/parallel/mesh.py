"""The device mesh and the rule table that lays arrays out over it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axis of a parameter or an activation → mesh axis.
DEFAULT_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("tokens", "sequence"),
    ("attention_tokens", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("modulation", "tensor"),
    ("layers", None),
)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be −1 and takes the devices that are left.

    Attributes:
        data: replicas of the whole model; batches are split over data × fsdp.
        fsdp: shards of the parameters along their input features.
        tensor: shards of heads and MLP features.
        sequence: shards of the token axis.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes for a number of devices.

        Raises:
            ValueError: the sizes do not multiply to `devices`.
        """
        sizes = [self.data, self.fsdp, self.tensor, self.sequence]
        fixed = math.prod(s for s in sizes if s != -1)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {self}: sizes must be positive, at most one of them −1")
        if devices % fixed or (-1 not in sizes and fixed != devices):
            raise ValueError(
                f"mesh {self}: sizes multiply to {fixed}, which does not fit {devices} devices; "
                "please set one axis to −1, or choose sizes whose product is the device count"
            )
        data, fsdp, tensor, sequence = (devices // fixed if s == -1 else s for s in sizes)
        return data, fsdp, tensor, sequence


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and sequence over all (or the given) devices."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if list(devices) == jax.devices():
        return jax.make_mesh(shape, AXES, axis_types=auto)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of arrays whose batch axis follows `leading` unsharded axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class Layout:
    """Lays arrays out over a mesh by the logical names of their axes.

    An axis whose size its mesh axes do not divide is left whole.
    """

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Constrains an activation inside a jitted program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, axes))

    def parts(self, axis: str) -> int:
        """Into how many parts the mesh splits the axes of this name."""
        return self._size(dict(self.rules).get(axis))

    def _size(self, names: str | tuple[str, ...] | None) -> int:
        parts = (names,) if isinstance(names, str) else (names or ())
        return math.prod(self.mesh.shape[part] for part in parts)

    def on_shards(
        self,
        function: Callable[..., jax.Array],
        arrays: Sequence[jax.Array],
        axes: Sequence[tuple[str | None, ...]],
    ) -> jax.Array:
        """Maps a function over the devices, each with its parts of the arrays.

        For kernels that the compiler cannot split. An array that is whole along a mesh axis is
        given to all devices of that axis, which then compute the same.

        Args:
            function: of one array for each of `arrays`; its result has the first one's shape.
            arrays: laid out by `axes` before they are split.
            axes: for each array the names of its axes.

        Returns:
            The results of all devices, laid out like the first array.
        """
        specs = tuple(
            self.sharding(x.shape, names).spec for x, names in zip(arrays, axes, strict=True)
        )
        # What a kernel returns is not annotated with the mesh axes over which it varies.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return mapped(*arrays)

    def sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        """The sharding of an array of `shape` whose axes have these names."""
        table = dict(self.rules)
        spec = [table.get(name) if name else None for name in axes]
        for axis, names in enumerate(spec):
            if shape[axis] % self._size(names):
                spec[axis] = None
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def abstract(self, boxed: Any) -> Any:
        """Shapes with shardings, from an `eval_shape` tree whose leaves carry axis names."""
        specs = nn.get_partition_spec(boxed)
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=self.sharding(
                    leaf.shape, (*spec, *(None,) * (len(leaf.shape) - len(spec)))
                ),
            ),
            nn.unbox(boxed),
            specs,
        )

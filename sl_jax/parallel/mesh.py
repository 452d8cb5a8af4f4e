"""The device mesh and the rule table that lays arrays out over it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axis = Literal["data", "fsdp", "tensor", "sequence"]
AXES: tuple[Axis, ...] = get_args(Axis)
BATCH_AXES: tuple[Axis, ...] = ("data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axes that one array may have together.
TOGETHER = (
    ("layers", "embed", "heads"),
    ("layers", "embed", "mlp"),
    ("layers", "embed", "modulation"),
    ("batch", "tokens", "heads"),
)
_WHOLE: Rules = (("attention_tokens", None),)  # each query attends to all keys


@dataclass(frozen=True)
class RulesConfig:
    """Logical axis of parameters and activations → mesh axes that split it; () leaves it whole.

    Keys and values have all tokens on every device, whatever splits the queries.

    Attributes:
        batch: mesh axes over which the samples of activations are split; what comes into and out
            of a program is split over data × fsdp.
        tokens: those for the tokens of activations, and so for attention's queries.
        embed: those for the channels between blocks, in parameters.
        heads: those for attention's heads, in activations and in the projections' parameters.
        mlp: those for the hidden channels of MLPs, in parameters.
        modulation: those for the scales and shifts that are computed from the time, in parameters.
        layers: those for the blocks, whose parameters are stacked.

    Raises:
        ValueError: a mesh axis would split two axes of one array.
    """

    batch: tuple[Axis, ...] = BATCH_AXES
    tokens: tuple[Axis, ...] = ("sequence",)
    embed: tuple[Axis, ...] = ("fsdp",)
    heads: tuple[Axis, ...] = ("tensor",)
    mlp: tuple[Axis, ...] = ("tensor",)
    modulation: tuple[Axis, ...] = ("tensor",)
    layers: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        for names in TOGETHER:
            used = Counter(axis for name in names for axis in getattr(self, name))
            if twice := [axis for axis, times in used.items() if times > 1]:
                where = [name for name in names if twice[0] in getattr(self, name)]
                raise ValueError(
                    f"{' and '.join(where)} would split one array by {twice[0]!r} twice; please "
                    "name each mesh axis once for the axes that stand together: "
                    f"{', '.join(names)}"
                )

    @property
    def table(self) -> Rules:
        """The rules as `Layout` takes them."""
        return _WHOLE + tuple((f.name, _entry(getattr(self, f.name))) for f in fields(self))


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Of a `PartitionSpec`."""
    return axes[0] if len(axes) == 1 else axes or None


DEFAULT_RULES = RulesConfig().table


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be −1 and takes the devices that are left.

    Attributes:
        data: replicas of the whole model; batches are split over data × fsdp.
        fsdp: shards of the parameters along their input features.
        tensor: shards of heads and MLP features.
        sequence: shards of the token axis.
        rules: which axes of arrays they split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    rules: RulesConfig = field(default_factory=RulesConfig, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, as given."""
        return {axis: getattr(self, axis) for axis in AXES}

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes for a number of devices.

        Raises:
            ValueError: the sizes do not multiply to `devices`.
        """
        sizes = list(self.sizes.values())
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


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> "Layout":
    """The configured rules on `make_mesh`."""
    return Layout(make_mesh(config, devices), config.rules.table)


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

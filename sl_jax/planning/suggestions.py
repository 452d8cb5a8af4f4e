"""Which meshes are worth compiling for."""

from collections.abc import Callable, Iterator, Sequence

from sl_jax.parallel.mesh import MeshConfig
from sl_jax.planning.roofline import Plan
from sl_jax.planning.topologies import PlanError, Topology
from sl_jax.training.configuration import ConfigError

_TRIED = 3
_SHARE = 0.75  # of a chip's memory that weights and optimizer may take


def meshes(
    slice_: Topology,
    check: Callable[[MeshConfig], object],
    resident: Callable[[MeshConfig], int],
) -> list[MeshConfig]:
    """At most three meshes: those that split tensors least, and then those that keep most copies.

    Args:
        slice_: the chips.
        check: raises `ConfigError` for a mesh that the configuration does not allow.
        resident: bytes of weights and optimizer on each chip.

    Raises:
        PlanError: the configuration allows none, or weights and optimizer are too large for all.
    """
    found: list[MeshConfig] = []
    least: int | None = None
    mistake: ConfigError | None = None
    for mesh in _by_promise(slice_.chips):
        try:
            check(mesh)
        except ConfigError as error:
            mistake = error
            continue
        needed = resident(mesh)
        least = needed if least is None else min(least, needed)
        if needed <= _SHARE * slice_.chip.hbm:
            found.append(mesh)
        if len(found) == _TRIED:
            break
    if not found:
        if least is None:
            raise PlanError(
                f"no mesh of the {slice_.chips} chips of {slice_.name} goes with the "
                f"configuration; with the last one: {mistake}"
            ) from mistake
        raise PlanError(
            f"no mesh of {slice_.name} leaves room to compute: weights and optimizer take at least "
            f"{least / 2**30:.1f} of {slice_.chip.hbm / 2**30:.1f} GiB per chip; please plan for "
            "more chips"
        )
    return found


def _by_promise(chips: int) -> Iterator[MeshConfig]:
    """Tensor splits talk most; copies of the weights over `data` talk least but need room."""
    powers = [2**power for power in range(9) if chips % 2**power == 0]
    for tensor in powers[:4]:
        for data in reversed([size for size in powers if chips % (size * tensor) == 0]):
            yield MeshConfig(data=data, fsdp=chips // (tensor * data), tensor=tensor)


def best(plans: Sequence[Plan]) -> Plan:
    """The fastest that fits; if none does, the one that lacks least."""
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.forecast().epoch_seconds)
    return min(plans, key=lambda plan: plan.most.needed)

"""What a plan is made of: the programs of a job, how often they run, and what else is in memory."""

import math
from typing import Any, NamedTuple

import jax


class Phase(NamedTuple):
    """One compiled program of an epoch.

    Attributes:
        name: for people.
        traced: the program.
        calls: how often an epoch runs it.
        trips: of its loops whose length is not fixed: how often each is expected to run, in order.
        held: pytree of everything that is on the devices while it runs, as shapes with shardings,
            but its arguments.
    """

    name: str
    traced: jax.stages.Traced
    calls: float
    trips: tuple[float, ...]
    held: Any


class Workload(NamedTuple):
    """What an epoch of a run does, whatever the hardware.

    Attributes:
        epochs: of the run.
        updates: of the optimizer, per epoch.
        groups: pictures per epoch.
        group_size: candidates per picture.
        judge_calls: requests to the judge per group.
        judge_concurrency: groups in flight.
    """

    epochs: int
    updates: int
    groups: int
    group_size: int
    judge_calls: int
    judge_concurrency: int


def bytes_per_chip(tree: Any) -> int:
    """Bytes that arrays (or their shapes with shardings) take on each device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return math.prod(shape) * 8
    return math.prod(shape) * leaf.dtype.itemsize

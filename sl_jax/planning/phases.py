"""What a plan is made of: the programs of a job, how often they run, and what else is in memory."""

import math
import re
from collections.abc import Generator
from typing import Any, NamedTuple

import jax


class Phase(NamedTuple):
    """One compiled program of an epoch.

    Attributes:
        name: for people.
        traced: the program.
        calls: how often an epoch runs it.
        trips: of its outermost loops whose length is not fixed: how often each is expected to run.
        loops: of all loops in which chips talk: a pattern of paths in the program ("jit(f)/…", see
            `planning.hlo`), and how often what lies there runs for each time the loop is met.
        held: pytree of everything that is on the devices while it runs, as shapes with shardings,
            but its arguments.
        weights: bytes of the base's weights that every chip's products read, all runs of loops
            together: each chip reads them whole, though it keeps a part.
        quick: whether the compiler may save itself the search for the fastest instructions, which
            for convolutions takes it minutes and moves memory by little.
    """

    name: str
    traced: jax.stages.Traced
    calls: float
    trips: tuple[float, ...]
    loops: tuple[tuple[str, float], ...]
    held: Any
    weights: float
    quick: bool = False

    def times(self, path: str) -> float:
        """How often an instruction of this path runs."""
        return math.prod(times for pattern, times in self.loops if re.search(pattern, path))


# Phases one after the other, of which a later one may depend on where the compiler has put what an
# earlier one returns: those shardings are sent, or None where it refused, which ends the chain.
Phases = Generator[Phase, Any, None]


class Workload(NamedTuple):
    """What a run does, whatever the hardware.

    Attributes:
        epochs: of the run.
        updates: of the optimizer, per epoch.
        groups: pictures per epoch.
        group_size: candidates per picture.
        judge_calls: requests to the judge per group.
        evaluations: forward passes of one sample for the held-out pictures, per epoch on average,
            that before the first one included.
        rollouts: forward passes of one sample for the candidates, per epoch; with guidance each
            pass, here and there, is two.
    """

    epochs: int
    updates: int
    groups: int
    group_size: int
    judge_calls: int
    evaluations: float
    rollouts: float


def bytes_per_chip(tree: Any) -> int:
    """Bytes that arrays (or their shapes with shardings) take on each device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return math.prod(shape) * 8
    return math.prod(shape) * leaf.dtype.itemsize

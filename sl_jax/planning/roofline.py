"""A plan: for each phase of an epoch its memory, its traffic, and the least time that it takes.

The time is a roofline: arithmetic, memory and links each at their peak rate, the slowest of them
counts. A run takes longer; how much longer is what a measurement on the hardware tells.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from sl_jax.planning.compiled import (
    Memory,
    OutOfMemory,
    compile_program,
    memory,
    return_freed_memory,
)
from sl_jax.planning.hlo import sent_bytes
from sl_jax.planning.phases import Phase, Phases, Workload, bytes_per_chip
from sl_jax.planning.topologies import Topology
from sl_jax.planning.work import count_work

_COMPILERS = 2  # at a time; each takes up to a gigabyte of memory


class PhasePlan(NamedTuple):
    """One program on one chip.

    Attributes:
        name: of the phase.
        calls: per epoch.
        memory: None where the compiler refused the program.
        refused: why, if so.
        held: bytes of what else is in memory.
        flops, hbm, sent: operations, bytes to and from memory and bytes to other chips, per call.
        collectives: the last by kind.
    """

    name: str
    calls: float
    memory: Memory | None
    refused: OutOfMemory | None
    held: int
    flops: float
    hbm: float
    collectives: dict[str, float]

    @property
    def needed(self) -> float:
        """Bytes on a chip while it runs."""
        return self.held + (self.memory.total if self.memory else self.refused.needed)

    @property
    def sent(self) -> float:
        """Bytes to other chips, per call."""
        return sum(self.collectives.values())

    def times(self, slice_: Topology) -> dict[str, float]:
        """Seconds per call that arithmetic, memory and links take at their peak rates."""
        chip = slice_.chip
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.hbm / chip.bandwidth,
            "links": self.sent / slice_.ici,
        }

    def seconds(self, slice_: Topology) -> float:
        """Per epoch, by the slowest of them."""
        return self.calls * max(self.times(slice_).values())


class Forecast(NamedTuple):
    """A whole run at its roofline.

    Attributes:
        epoch_seconds: rollout, decoding and learning.
        evaluation_seconds: per epoch on average.
        hours: of the run.
        judge_calls: of the run.
        pictures_per_second: candidates that the judge pool must score so that nobody waits for it.
        calls_per_second: its requests for that.
    """

    epoch_seconds: float
    evaluation_seconds: float
    hours: float
    judge_calls: int
    pictures_per_second: float
    calls_per_second: float


class JudgePool(NamedTuple):
    """How fast a replica of the judge is.

    Attributes:
        seconds: that a call takes, as a run's preflight measures it, with as many at a time as
        concurrency: a replica takes.
    """

    seconds: float
    concurrency: int

    def replicas(self, calls_per_second: float) -> int:
        """How many keep up with so many calls."""
        return max(1, math.ceil(calls_per_second * self.seconds / self.concurrency))


class Plan(NamedTuple):
    """What a configuration takes on a slice.

    Attributes:
        resident: bytes per chip that are there all the time, by name.
        micro_batch: samples that the learner takes at a time, over all chips.
        pool: the judge, if it is known.
    """

    slice: Topology
    mesh: dict[str, int]
    resident: dict[str, int]
    phases: tuple[PhasePlan, ...]
    workload: Workload
    micro_batch: int
    pool: JudgePool | None = None

    @property
    def most(self) -> PhasePlan:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def fits(self) -> bool:
        """Whether every phase does, and the compiler agrees."""
        return not self.refused and self.most.needed <= self.slice.chip.hbm

    @property
    def refused(self) -> tuple[str, ...]:
        """The phases that the compiler refused; what would come after them is not planned."""
        return tuple(phase.name for phase in self.phases if phase.refused)

    def forecast(self) -> Forecast | None:
        """The run's time and what it asks of the judge; None where a phase was refused."""
        if self.refused:
            return None
        return forecast(self.workload, {p.name: p.seconds(self.slice) for p in self.phases})


def forecast(work: Workload, seconds: Mapping[str, float]) -> Forecast:
    """The forecast of a run from the seconds that an epoch spends in each of its phases."""
    epoch = sum(seconds.values())
    evaluation = seconds["rollout"] * work.evaluations / work.rollouts
    candidates, calls = work.groups * work.group_size, work.groups * work.judge_calls
    return Forecast(
        epoch,
        evaluation,
        work.epochs * (epoch + evaluation) / 3600,
        work.epochs * calls,
        candidates / epoch,
        calls / epoch,
    )


def plan_phases(
    chains: Sequence[Phases], slice_: Topology, quick: bool = False
) -> tuple[PhasePlan, ...]:
    """Compiles all phases for the slice, chains beside each other; in the chains' order.

    Args:
        chains: of phases.
        slice_: the chips.
        quick: whether all may be compiled with the least effort, as `Phase.quick` says of one.
    """
    with ThreadPoolExecutor(_COMPILERS) as pool:
        plans = list(pool.map(lambda chain: _planned_chain(chain, slice_, quick), chains))
    return tuple(plan for chain in plans for plan in chain)


def _planned_chain(phases: Phases, slice_: Topology, quick: bool) -> list[PhasePlan]:
    plans: list[PhasePlan] = []
    phase = next(phases, None)
    while phase is not None:
        plan, shardings = _planned(phase, slice_, quick)
        plans.append(plan)
        return_freed_memory()
        try:
            phase = phases.send(shardings)
        except StopIteration:
            phase = None
    return plans


def _planned(phase: Phase, slice_: Topology, quick: bool) -> tuple[PhasePlan, Any]:
    """The plan of a phase, and the shardings of its results; None where the compiler refused.

    The program itself is let go of, so that no two of a chain take memory here.
    """
    found = compile_program(phase.traced, quick or phase.quick)
    refused = isinstance(found, OutOfMemory)
    work = count_work(phase.traced, phase.trips)
    plan = PhasePlan(
        phase.name,
        phase.calls,
        None if refused else memory(found),
        found if refused else None,
        bytes_per_chip(phase.held),
        work.flops / slice_.chips,
        work.bytes / slice_.chips + phase.weights,
        {} if refused else sent_bytes(found.as_text(), phase.times),
    )
    return plan, None if refused else found.output_shardings

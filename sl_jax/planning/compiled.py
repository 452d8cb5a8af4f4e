"""What the compiler says of a program: its memory on a chip, or by how much it is too large."""

import contextlib
import ctypes
import re
from typing import NamedTuple

import jax
from jax.errors import JaxRuntimeError

from sl_jax.planning.topologies import PlanError

_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


class Memory(NamedTuple):
    """Bytes of one program on each chip.

    Attributes:
        arguments: inputs.
        temporaries: what it needs in between.
        output: results that take no input's place.
    """

    arguments: int
    temporaries: int
    output: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries + self.output


class OutOfMemory(NamedTuple):
    """A program that the compiler refused for its size.

    Attributes:
        needed: bytes per chip.
        available: bytes per chip.
        message: of the compiler.
    """

    needed: float
    available: float
    message: str


def compile_program(
    traced: jax.stages.Traced, quick: bool = False
) -> jax.stages.Compiled | OutOfMemory:
    """Compiles for the devices of the arguments' shardings.

    Args:
        traced: the program.
        quick: with the least effort to make it fast.

    Raises:
        PlanError: the compiler failed, and not for want of memory.
    """
    try:
        return traced.lower().compile(_LEAST_EFFORT if quick else None)
    except JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            reason = " ".join(str(error).split())[:300]
            raise PlanError(
                f"the compiler failed on a program of this configuration: {reason}; another mesh, "
                "micro-batch or version of libtpu may do"
            ) from error
        return found


def return_freed_memory() -> None:
    """Hands the system what compilers have freed, which the C library would keep."""
    with contextlib.suppress(AttributeError):  # of another library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(message: str) -> OutOfMemory | None:
    """What a compiler's message says about too little memory; None if it is about something else.

    Understands "Used 17.90G of 15.75G hbm" and "the total memory required for HLO temporaries
    (17.90G) exceeds available HBM (15.75G)".
    """
    if "RESOURCE_EXHAUSTED" not in message and "CompileTimeHbmOom" not in message:
        return None
    text = " ".join(message.split())
    for pattern in (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds .{{0,40}}\({_SIZE}\)"):
        if match := re.search(pattern, text):
            used, used_unit, limit, limit_unit = match.groups()
            return OutOfMemory(
                float(used) * _UNITS[used_unit], float(limit) * _UNITS[limit_unit], text[:400]
            )
    return None


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program takes; donated inputs are counted once."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
    )

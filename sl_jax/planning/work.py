"""What a traced program computes and reads, counted from its matrix products and convolutions.

XLA's own count takes the body of a loop once and knows nothing of what kernels compute inside. Here
scans count as often as they run, loops of open length by the trips that are expected of them, and
Pallas kernels by their grid. Elementwise operations are left out: beside products they are few, and
they are fused with what they follow.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class Work(NamedTuple):
    """Of all devices together.

    Attributes:
        flops: floating-point operations; a multiplication and an addition are two.
        bytes: that products, convolutions and kernels read and write, each array once.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """This and another one, so many times."""
        return Work(self.flops + times * other.flops, self.bytes + times * other.bytes)


def count_work(traced: jax.stages.Traced, trips: tuple[float, ...] = ()) -> Work:
    """The work of one run of a program.

    What several devices compute alike, each for itself, inside a `shard_map`, counts for each.

    Args:
        traced: the program.
        trips: of its outermost `while` loops, in order.
    """
    left = iter(trips)
    return _counted(traced.jaxpr.jaxpr, lambda: next(left, 1.0))


def _counted(jaxpr: Jaxpr, trips: Callable[[], float]) -> Work:
    total = Work()
    for equation in jaxpr.eqns:
        for part, times in _parts(equation, trips):
            total = total.plus(part, times)
    return total


def _parts(equation: Any, trips: Callable[[], float]) -> Iterator[tuple[Work, float]]:
    """What an equation consists of, and how often each part runs."""
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        yield Work(_product(equation), _touched(equation)), 1.0
    elif name == "conv_general_dilated":
        yield Work(_convolution(equation), _touched(equation)), 1.0
    elif name == "scan":
        yield _counted(parameters["jaxpr"].jaxpr, trips), parameters["length"]
    elif name == "while":
        # Its place in the order is taken before loops inside it ask for theirs.
        times = trips()
        yield _counted(parameters["body_jaxpr"].jaxpr, lambda: 1.0), times
    elif name == "cond":
        branches = [_counted(branch.jaxpr, trips) for branch in parameters["branches"]]
        yield max(branches, key=lambda work: work.flops), 1.0
    elif name == "pallas_call":
        # Inside, arrays are blocks in the chip's fast memory.
        steps = math.prod(parameters["grid_mapping"].grid)
        yield Work(steps * _counted(parameters["jaxpr"], trips).flops, _touched(equation)), 1.0
    elif name == "shard_map":
        yield _counted(parameters["jaxpr"], trips), parameters["mesh"].size
    else:
        for inner in _inner(parameters):
            yield _counted(inner, trips), 1.0


def _inner(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """Programs that an equation calls; of the rules for derivatives only what runs forward."""
    for name, value in parameters.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"):
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _touched(equation: Any) -> float:
    arrays = [v.aval for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")]
    return float(sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays))


def _product(equation: Any) -> float:
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    right_free = math.prod(right) / math.prod(left[axis] for axis in (*contracted, *batched))
    return 2.0 * math.prod(left) * right_free


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    output = equation.outvars[0].aval.shape
    layout = equation.params["dimension_numbers"]
    features = kernel[layout.rhs_spec[0]]
    return 2.0 * math.prod(output) * math.prod(kernel) / features

"""Floating-point operations of a traced program, from its matrix products and convolutions.

XLA's own count takes the body of a loop once and knows nothing of what kernels compute inside. Here
scans count as often as they run, loops of open length by the trips that are expected of them, and
Pallas kernels by their grid. Elementwise operations are left out: beside products they are few.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(traced: jax.stages.Traced, trips: tuple[float, ...] = ()) -> float:
    """FLOPs of all devices together; a multiplication and an addition are two.

    What several devices compute alike, each for itself, inside a `shard_map`, counts for each.

    Args:
        traced: the program.
        trips: of its outermost `while` loops, in order.
    """
    left = iter(trips)
    return _counted(traced.jaxpr.jaxpr, lambda: next(left, 1.0))


def _counted(jaxpr: Jaxpr, trips: Callable[[], float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += parameters["length"] * _counted(parameters["jaxpr"].jaxpr, trips)
        elif name == "while":
            # Its place in the order is taken before loops inside it ask for theirs.
            times = trips()
            total += times * _counted(parameters["body_jaxpr"].jaxpr, lambda: 1.0)
        elif name == "cond":
            total += max(_counted(branch.jaxpr, trips) for branch in parameters["branches"])
        elif name == "pallas_call":
            steps = math.prod(parameters["grid_mapping"].grid)
            total += steps * _counted(parameters["jaxpr"], trips)
        elif name == "shard_map":
            total += parameters["mesh"].size * _counted(parameters["jaxpr"], trips)
        else:
            total += sum(_counted(inner, trips) for inner in _inner(parameters))
    return total


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

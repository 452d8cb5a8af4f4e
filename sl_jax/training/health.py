"""Updates that are not finite: left out on all devices alike, counted, and in a row a run's end."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class NotFiniteError(RuntimeError):
    """Too many updates in a row were not finite."""


@dataclass(frozen=True)
class StageHealthConfig:
    """When a supervised stage is not well, and stops.

    Attributes:
        not_finite: updates in a row that are not finite, after which it stops with a checkpoint.
    """

    not_finite: int = 5


def where_finite(norm: Float[Array, ""], changed: Any, before: Any) -> Any:
    """What an update has changed, or a tree like it from before, if its gradient is not finite.

    Args:
        norm: of the gradient over all devices: whatever in it is not finite, it is not either.
        changed, before: trees of arrays.
    """
    finite = jnp.isfinite(norm)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), changed, before)

"""The σ grid that sampling steps through, and the σ distribution that supervised training draws.

σ is the share of noise in x_σ = (1 − σ)·x₀ + σ·ε: 1 is pure noise, 0 is data. A grid is shifted
towards noise by μ, which grows with the picture: large pictures spend more of their steps at high
noise. Behaviour follows diffusers' FlowMatchEulerDiscreteScheduler as the layered Qwen-Image
pipeline calls it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

TimeShiftType = Literal["linear", "exponential"]
SigmaDistribution = Literal["uniform", "logit_normal"]

_ArrayT = TypeVar("_ArrayT", np.ndarray, jax.Array)
_BASE_TOKENS = 256  # condition tokens of a 256 × 256 picture, where μ is 1
_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def shift_mu(condition_tokens: int) -> float:
    """The pipeline's μ for a picture of that many condition tokens: √(tokens / 256).

    Tokens are packed ones, (h/16)·(w/16): 16 tokens give 0.25, 1,600 tokens (640 × 640) give 2.5.
    """
    if condition_tokens < 1:
        raise ValueError(f"condition_tokens is {condition_tokens}; please pass at least 1")
    return math.sqrt(condition_tokens / _BASE_TOKENS)


def shift_sigmas(
    sigmas: _ArrayT, mu: float | jax.Array, time_shift_type: TimeShiftType = "linear"
) -> _ArrayT:
    """Shifts σ in (0, 1]: m / (m + 1/σ − 1), with m = μ (linear) or e^μ (exponential).

    Monotone, and 1 stays exactly 1. Takes NumPy or JAX arrays of any shape.
    """
    factor = _shift_factor(mu, time_shift_type)
    return factor / (factor + (1.0 / sigmas - 1.0))


def sigma_grid(
    steps: int,
    mu: float,
    time_shift_type: TimeShiftType = "linear",
    shift_terminal: float | None = None,
) -> Float32[np.ndarray, "steps+1"]:
    """The σ of every step, descending from exactly 1 and closed by 0: float32, steps + 1 values.

    The pipeline's grid: steps points evenly spaced from 1 down to 1/steps, shifted by μ. With
    `shift_terminal` the grid is stretched, 1 held fast, so that its last value before the 0 is
    `shift_terminal` (plain Qwen-Image: 0.02; the layered model: none).

    Raises ValueError for steps < 1, for a linear μ that is not positive, and for a `shift_terminal`
    outside [0, 1) or with a single step, which has nothing to stretch.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; please sample with at least 1 step")
    if not math.isfinite(mu) or (time_shift_type == "linear" and mu <= 0):
        raise ValueError(f"μ is {mu}; please give a finite shift, above 0 where it is linear")
    # float32 throughout, as in diffusers: the grid then equals the reference's to the last bit.
    sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)
    sigmas = shift_sigmas(sigmas, float(mu), time_shift_type)
    if shift_terminal:
        sigmas = _stretch_to_terminal(sigmas, shift_terminal)
    return np.append(sigmas, np.float32(0.0)).astype(np.float32)


def draw_sigmas(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    mu: float | Float[Array, "..."],
    *,
    distribution: SigmaDistribution = "uniform",
) -> Float32[Array, "..."]:
    """Draws σ in (0, 1] for supervised flow matching: the sampling grid's density, made continuous.

    A uniform draw, shifted linearly by μ, has the density of an infinitely fine `sigma_grid`. For
    `logit_normal` (Stable Diffusion 3, arXiv 2403.03206, section 3.1) it is sigmoid(z) that is
    shifted, z ~ N(0, 1). `mu` may be one value or one per sample, and must broadcast to `shape`.
    """
    if distribution == "uniform":
        base = 1.0 - jax.random.uniform(key, shape, jnp.float32)
    elif distribution == "logit_normal":
        base = jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32))
    else:
        raise ValueError(
            f"σ distribution {distribution!r} is unknown; please use 'uniform' or 'logit_normal'"
        )
    return shift_sigmas(base, mu)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a checkpoint's scheduler_config.json says about its σ grid.

    Without `use_dynamic_shifting` the fixed `shift` takes the place of μ (linear).
    """

    use_dynamic_shifting: bool = False
    shift: float = 1.0
    time_shift_type: TimeShiftType = "exponential"
    shift_terminal: float | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads scheduler_config.json; raises ValueError where it asks for another kind of grid."""
        on = [name for name in _UNSUPPORTED if config.get(name)]
        if on:
            raise ValueError(
                f"scheduler_config.json sets {', '.join(on)}, which this sampler does not "
                "implement; please set them to false or use the checkpoint's own file"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in config.items() if name in known}
        # Public files write "no terminal" as false, 0 or null.
        values["shift_terminal"] = values.get("shift_terminal") or None
        result = cls(**values)
        _shift_factor(1.0, result.time_shift_type)
        return result

    def sigmas(
        self, steps: int, condition_tokens: int, mu: float | None = None
    ) -> Float32[np.ndarray, "steps+1"]:
        """The grid for a picture of that many condition tokens, or for a given μ."""
        if mu is None:
            mu = shift_mu(condition_tokens) if self.use_dynamic_shifting else self.shift
        shift_type = self.time_shift_type if self.use_dynamic_shifting else "linear"
        return sigma_grid(steps, mu, shift_type, self.shift_terminal)


def _shift_factor(mu: float | jax.Array, time_shift_type: str) -> float | jax.Array:
    if time_shift_type == "linear":
        return mu
    if time_shift_type == "exponential":
        return jnp.exp(mu) if isinstance(mu, jax.Array) else math.exp(mu)
    raise ValueError(
        f"time_shift_type {time_shift_type!r} is unknown; please use 'linear' or 'exponential'"
    )


def _stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    if not 0.0 < terminal < 1.0:
        raise ValueError(f"shift_terminal is {terminal}; please give a value in (0, 1) or None")
    if len(sigmas) < 2:
        raise ValueError(
            "shift_terminal needs at least 2 steps; please raise steps or set it to None"
        )
    data_share = 1.0 - sigmas
    return 1.0 - data_share / (data_share[-1] / (1.0 - terminal))

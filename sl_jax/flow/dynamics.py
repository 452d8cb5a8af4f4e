"""One step of the policy: the Gaussian from which the next latents are drawn.

Every dynamics here has a mean that is linear in the latents x and the velocity v, and a noise whose
spread depends on the step alone. With t = σ_i, t' = σ_{i+1}, dt = t' − t < 0 and noise level a:

    x' = k_x·x + k_v·v + s·ε,    ε ~ N(0, 1)

| dynamics    | k_x                | k_v                         | s            | source          |
| ----------- | ------------------ | --------------------------- | ------------ | --------------- |
| `flow_sde`  | 1 + q²/(2t)·dt     | (1 + q²(1−t)/(2t))·dt       | q·√(−dt)     | arXiv 2505.05470|
| `dance_sde` | the same, q = a    | the same, q = a             | a·√(−dt)     | arXiv 2505.07818|
| `cps`       | (1−t') + c         | (1−t)·c − t·(1−t')          | t'·sin(aπ/2) | Flow-CPS        |
| `ode`       | 1                  | dt                          | 0            | Euler           |

For `flow_sde` q = a·√(t/(1−t)), where a first step at t = 1 puts σ_1 in the place of t in that
denominator only. For `cps` c = √(t'² − s²) = t'·|cos(aπ/2)|. Rewriting DanceGRPO's
(x − (1−t)·x̂₀)/t² as (x + (1−t)·v)/t shows that it is `flow_sde` with another q.

The two SDEs keep the ODE's marginals in the limit of many steps. `cps` keeps them at any number of
steps if the data are one point. Broader data it narrows, the more the noisier, and in the limit
too: it mixes the mean of the data, given x, with that of the noise, and both vary less than what
they are means of.

All functions are float32, take traced or plain σ, either one for the batch (scalar) or one per
sample ([B]), and run over latents [B, N, C]: N packed tokens of C channels. Those that average take
an optional `token_mask`, so that only trained tokens count.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

Stochastic = Literal["flow_sde", "dance_sde", "cps"]  # which draw noise, and can be trained
Dynamics = Literal[Stochastic, "ode"]
DYNAMICS: tuple[Dynamics, ...] = get_args(Dynamics)

Latents = Float[Array, "batch tokens channels"]
TokenMask = Bool[Array, "*#batch tokens"] | Float[Array, "*#batch tokens"]
PerStep = Float32[Array, "*#batch"]


class StepCoefficients(NamedTuple):
    """x' = k_x·x + k_v·v + std·ε; each a scalar or one value per sample. dt is σ' − σ, below 0."""

    k_x: PerStep
    k_v: PerStep
    std: PerStep
    dt: PerStep


class StepMoments(NamedTuple):
    """The Gaussian of one step: its mean [B, N, C] and its std, a scalar or [B]."""

    mean: Float32[Array, "batch tokens channels"]
    std: PerStep


def step_coefficients(
    dynamics: Dynamics,
    sigma: PerStep | float,
    sigma_next: PerStep | float,
    sigma_max: PerStep | float,
    noise_level: Float[Array, ""] | float,
) -> StepCoefficients:
    """The coefficients of one step from σ to σ' < σ.

    `sigma_max` is σ_1, the grid's second value: only `flow_sde` looks at it, and only where σ = 1.
    With `noise_level` 0 every dynamics is exactly Euler's step: k_x = 1, k_v = dt, std = 0.
    """
    t, t_next = jnp.asarray(sigma, jnp.float32), jnp.asarray(sigma_next, jnp.float32)
    level = jnp.asarray(noise_level, jnp.float32)
    dt = t_next - t
    if dynamics == "ode":
        return StepCoefficients(jnp.ones_like(dt), dt, jnp.zeros_like(dt), dt)
    if dynamics == "flow_sde":
        denominator = 1.0 - jnp.where(t == 1.0, jnp.asarray(sigma_max, jnp.float32), t)
        return _sde_coefficients(level * jnp.sqrt(t / denominator), t, dt)
    if dynamics == "dance_sde":
        return _sde_coefficients(level * jnp.ones_like(t), t, dt)
    if dynamics == "cps":
        return _cps_coefficients(level, t, t_next, dt)
    raise ValueError(f"dynamics {dynamics!r} is unknown; please use one of {', '.join(DYNAMICS)}")


def step_moments(coefficients: StepCoefficients, x: Latents, velocity: Latents) -> StepMoments:
    """Mean and std of x' given latents and velocity [B, N, C]; computed in float32."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    mean = _over_latents(coefficients.k_x) * x + _over_latents(coefficients.k_v) * velocity
    return StepMoments(mean, coefficients.std)


def next_latents(moments: StepMoments, noise: Latents) -> Float32[Array, "batch tokens channels"]:
    """x' = mean + std·ε for standard normal noise ε [B, N, C]."""
    return moments.mean + _over_latents(moments.std) * noise


def step_noise(x_next: Latents, moments: StepMoments) -> Float32[Array, "batch tokens channels"]:
    """ε = (x' − mean)/std: the noise that carried the mean to x'. std must not be 0."""
    return (x_next.astype(jnp.float32) - moments.mean) / _over_latents(moments.std)


def cps_public_ratio(
    noise: Latents,
    mean_delta: Latents,
    std: PerStep | float,
    token_mask: TokenMask | None = None,
) -> Float32[Array, " batch"]:
    """The log ratio that public Flow-CPS code trains with, per sample; for comparison only.

    That code takes −(x' − mean)² as log-probability, without 1/(2s²) and the constants, so that its
    log ratio is 2s·mean(ε·Δ) − mean(Δ²), for Δ = mean_θ − mean_old and ε = (x' − mean_old)/s: the
    exact one scaled by 2s², which fades as t' falls.
    """
    return 2.0 * std * latent_mean(noise * mean_delta, token_mask) - latent_mean(
        mean_delta**2, token_mask
    )


def latent_mean(values: Latents, token_mask: TokenMask | None = None) -> Float32[Array, " batch"]:
    """Mean per sample over the scalars of its trained tokens: [B, N, C] → [B], float32.

    `token_mask` is 1 at trained tokens and 0 elsewhere, [N] or [B, N]; None trains all. Every
    sample needs at least one trained token.
    """
    per_token = jnp.mean(values.astype(jnp.float32), axis=-1)
    if token_mask is None:
        return jnp.mean(per_token, axis=-1)
    mask = jnp.broadcast_to(token_mask.astype(jnp.float32), per_token.shape)
    return jnp.sum(jnp.where(mask > 0, per_token, 0.0), axis=-1) / jnp.sum(mask, axis=-1)


def latent_count(values: Latents, token_mask: TokenMask | None = None) -> PerStep:
    """D, the number of trained scalars of a sample: a scalar, or [B] if the mask is per sample."""
    tokens, channels = values.shape[-2:]
    if token_mask is None:
        return jnp.float32(tokens * channels)
    return jnp.sum(token_mask.astype(jnp.float32), axis=-1) * channels


def _sde_coefficients(q: jax.Array, t: jax.Array, dt: jax.Array) -> StepCoefficients:
    drift = q**2 / (2.0 * t)
    return StepCoefficients(
        k_x=1.0 + drift * dt,
        k_v=(1.0 + drift * (1.0 - t)) * dt,
        std=q * jnp.sqrt(-dt),
        dt=dt,
    )


def _cps_coefficients(
    level: jax.Array, t: jax.Array, t_next: jax.Array, dt: jax.Array
) -> StepCoefficients:
    angle = level * (jnp.pi / 2)
    # 1 − |cos| by half angles: exactly 0 without noise, where 1 − cos would round.
    lost = 2.0 * jnp.minimum(jnp.sin(angle / 2) ** 2, jnp.cos(angle / 2) ** 2)
    return StepCoefficients(
        k_x=1.0 - t_next * lost,
        k_v=dt - t_next * (1.0 - t) * lost,
        std=t_next * jnp.sin(angle),
        dt=dt,
    )


def _over_latents(coefficient: PerStep) -> jax.Array:
    """Gives a per-sample [B] coefficient the axes to broadcast over [B, N, C]; scalars stay."""
    return coefficient[:, None, None] if jnp.ndim(coefficient) == 1 else coefficient

"""The clipped policy objective of one trained step, from velocities.

With Δ = mean_θ − mean_old = k_v·δv, δv = v_θ − v_old, ε = (x' − mean_old)/s, and means over the D
trained scalars of a sample, the log ratio is one of

| ratio              | log ratio                    | source                                       |
| ------------------ | ---------------------------- | -------------------------------------------- |
| `plain`            | mean(ε·Δ)/s − mean(Δ²)/(2s²) | Flow-GRPO (arXiv 2505.05470): difference of  |
|                    |                              | two log-probabilities, below 0 on average    |
| `guard`            | mean(ε·Δ)                    | RatioNorm of GRPO-Guard (arXiv 2510.22319)   |
| `velocity`         | √D·mean(ε·δv)·sign(k_v)      | ours: spread rms(δv) at any step, schedule,  |
|                    |                              | resolution and number of layers              |
| `cps_public_ratio` | 2s·mean(ε·Δ) − mean(Δ²)      | public Flow-CPS code; for comparison only    |

`guard`, `velocity` and `cps_public_ratio` measure how far the policy moved along the noise that
was drawn; they are not importance weights.

Public clip ranges are 1e-6 to 1e-4, where float32 cannot hold a ratio near 1 and two
log-probabilities cannot be subtracted. So everything here starts from δv, and the ratio r is
carried as its excess r − 1 = expm1(log ratio). Where v_θ equals v_old to the last bit, Δ and the
excess are exactly 0, and the gradient is that of −A·log ratio.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sl_jax.flow import dynamics
from sl_jax.flow.dynamics import Latents, StepCoefficients, TokenMask

Ratio = Literal["plain", "guard", "velocity", "cps_public_ratio"]
RATIOS: tuple[Ratio, ...] = get_args(Ratio)

PerSample = Float32[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """How samples become a loss. All fields are static.

    Attributes:
        ratio: what compares new and old policy: "plain" (Flow-GRPO), "guard" (GRPO-Guard), or
            "velocity", which spreads as the velocity changes, whatever step, size and layers.
        clip_low, clip_high: the ratio leaves the range 1 − clip_low … 1 + clip_high without
            gradient if the advantage would push it further.
        advantage_limit: advantages are cut to ± this.
        log_ratio_limit: log ratios are cut to ± this; beyond it the gradient is 0.
        kl_weight: β of the KL term in the first epoch; 0 leaves it out.
        kl_half_life: epochs in which `kl_weight` halves; None keeps it.
        inverse_dt_weight: whether each step's clipped objective, not its KL, is weighed by 1/(−dt).
    """

    ratio: Ratio = "velocity"
    clip_low: float = 1e-2
    clip_high: float = 1e-2
    advantage_limit: float = 5.0
    log_ratio_limit: float = 20.0
    kl_weight: float = 0.0
    kl_half_life: float | None = None
    inverse_dt_weight: bool = False

    def __post_init__(self) -> None:
        if self.ratio not in RATIOS:
            raise ValueError(
                f"ratio {self.ratio!r} is unknown; please use one of {', '.join(RATIOS)}"
            )
        for name in ("clip_low", "clip_high", "advantage_limit", "log_ratio_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; please give a positive value")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; please give 0 or a positive value")
        if self.kl_half_life is not None and not self.kl_half_life > 0:
            raise ValueError(
                f"kl_half_life is {self.kl_half_life}; please give None or a positive number of "
                "epochs"
            )

    def kl_left(self, epoch: int) -> float:
        """The share of `kl_weight` that an epoch, counted from 0, still has."""
        return 1.0 if self.kl_half_life is None else 0.5 ** (epoch / self.kl_half_life)


class ObjectiveMetrics(NamedTuple):
    """What each sample did, [B]; average with the sample weights, over steps or per step index.

    Fractions are 0 or 1 per sample. The mean ratio is 1 + the mean of `ratio_excess`, and its std
    is the excess's, both without the rounding that 1 would bring. `surrogate_gain` is the clipped
    objective without its constant −A: 0 at the first update, below 0 where the policy improves.
    `truncated` is 1 outside the clip range, where truncation takes the gradient away.
    `kl_old` is the exact KL of this Gaussian step from the policy that rolled out, `kl_approx`
    half the squared log ratio, as public code logs it; `kl_reference` is 0 without a reference.
    """

    log_ratio: PerSample
    ratio_excess: PerSample
    clipped_low: PerSample
    clipped_high: PerSample
    truncated: PerSample
    saturated: PerSample
    surrogate_gain: PerSample
    policy_loss: PerSample
    kl_old: PerSample
    kl_approx: PerSample
    kl_reference: PerSample


class Mismatch(NamedTuple):
    """How far the rollout's program is from the learner's on the same step, per sample [B].

    `distance` is mean(|mean_rollout − mean_learner|)/s; `log_ratio` is the same difference on the
    scale of the clip range: when its size nears the range, clipping acts on rounding.
    """

    distance: PerSample
    log_ratio: PerSample


def policy_objective(
    velocity: Latents,
    *,
    velocity_old: Latents,
    x: Latents,
    x_next: Latents,
    coefficients: StepCoefficients,
    advantage: Float[Array, " batch"],
    weight: Float[Array, " batch"],
    config: ObjectiveConfig,
    velocity_reference: Latents | None = None,
    kl_left: Float32[Array, ""] | float = 1.0,
    truncate: bool = False,
    token_mask: TokenMask | None = None,
) -> tuple[Float32[Array, ""], ObjectiveMetrics]:
    """The loss of B (sample, step) pairs, to be minimised over `velocity`, and its metrics.

    Args:
      velocity: v_θ(x), [B, N, C]; the gradient flows through this argument alone.
      velocity_old: the learner's own velocity at the same x before the epoch's updates. With one
        update per epoch pass `velocity` itself: its gradient is stopped here.
      x, x_next: the step's latents before and after, float32, as the rollout stored them.
      coefficients: of the step, scalars or [B] (`sl_jax.flow.dynamics.step_coefficients`).
      advantage: A, [B].
      weight: [B], normalised by the caller over all pairs of the update, in all micro-batches and
        on all devices: the losses of the parts then sum to the loss of the whole.
      velocity_reference: the reference policy's velocity; needed if `kl_weight` is not 0.
      kl_left: the share of `kl_weight` that holds now, see `ObjectiveConfig.kl_left`.
      truncate: whether pairs whose ratio has left the clip range have no gradient, whichever way
        their advantage would push them: for samples that may be outside from the start.
      token_mask: 1 at trained tokens, [N] or [B, N].

    Returns Σ weight·(w·max(−A·r, −A·clip(r)) + β·KL) with w = 1 or 1/(−dt), and KL =
    mean(Δ_ref²)/(2s²), which is exact for one Gaussian step.
    """
    if velocity_reference is None and config.kl_weight:
        raise ValueError("kl_weight is not 0; please pass velocity_reference")
    velocity_old = jax.lax.stop_gradient(velocity_old)
    noise = jax.lax.stop_gradient(
        dynamics.step_noise(x_next, dynamics.step_moments(coefficients, x, velocity_old))
    )
    delta = _difference(velocity, velocity_old)
    raw = log_ratio(config.ratio, noise, delta, coefficients, token_mask)
    limited = jnp.clip(raw, -config.log_ratio_limit, config.log_ratio_limit)
    advantage = jnp.clip(
        advantage.astype(jnp.float32), -config.advantage_limit, config.advantage_limit
    )
    excess = jnp.expm1(limited)
    clipped_low = (excess < -config.clip_low).astype(jnp.float32)
    clipped_high = (excess > config.clip_high).astype(jnp.float32)
    gain = clipped_surrogate(excess, advantage, config.clip_low, config.clip_high, truncate)

    reference_kl = jnp.zeros_like(gain)
    if velocity_reference is not None:
        reference_delta = _difference(velocity, jax.lax.stop_gradient(velocity_reference))
        reference_kl = step_kl(reference_delta, coefficients, token_mask)
    step_weight = 1.0 / -coefficients.dt if config.inverse_dt_weight else 1.0
    policy_loss = step_weight * (gain - advantage)
    kl_weight = config.kl_weight * kl_left
    loss = jnp.sum(weight * (policy_loss + kl_weight * reference_kl))

    metrics = ObjectiveMetrics(
        log_ratio=limited,
        ratio_excess=excess,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        truncated=truncate * (clipped_low + clipped_high),
        saturated=(jnp.abs(raw) > config.log_ratio_limit).astype(jnp.float32),
        surrogate_gain=gain,
        policy_loss=policy_loss,
        kl_old=step_kl(delta, coefficients, token_mask),
        kl_approx=0.5 * limited**2,
        kl_reference=reference_kl,
    )
    return loss, jax.lax.stop_gradient(metrics)


def log_ratio(
    kind: Ratio,
    noise: Latents,
    velocity_delta: Latents,
    coefficients: StepCoefficients,
    token_mask: TokenMask | None = None,
) -> PerSample:
    """The log ratio [B] for noise ε and velocity difference δv, both [B, N, C]; not limited."""
    k_v, std = coefficients.k_v, coefficients.std
    # Δ = k_v·δv, so that every moment of Δ is one of δv times a factor of the step.
    along_noise = dynamics.latent_mean(noise * velocity_delta, token_mask)
    if kind == "velocity":
        count = dynamics.latent_count(velocity_delta, token_mask)
        return jnp.sqrt(count) * along_noise * jnp.sign(k_v)
    if kind == "guard":
        return k_v * along_noise
    if kind == "plain":
        return k_v * along_noise / std - step_kl(velocity_delta, coefficients, token_mask)
    if kind == "cps_public_ratio":
        mean_delta = jnp.reshape(k_v, (-1, 1, 1)) * velocity_delta
        return dynamics.cps_public_ratio(noise, mean_delta, std, token_mask)
    raise ValueError(f"ratio {kind!r} is unknown; please use one of {', '.join(RATIOS)}")


def clipped_surrogate(
    ratio_excess: PerSample,
    advantage: PerSample,
    clip_low: float,
    clip_high: float,
    truncate: bool = False,
) -> PerSample:
    """max(−A·r, −A·clip(r)) + A per sample, for r − 1 = `ratio_excess`: the objective's change.

    The constant A is left out so that a change of 1e-7 survives float32; gradients are the
    objective's own. With `truncate` it is −A·clip(r) + A, without the larger one of the two.
    """
    clipped = jnp.clip(ratio_excess, -clip_low, clip_high)
    if truncate:
        return -advantage * clipped
    return jnp.maximum(-advantage * ratio_excess, -advantage * clipped)


def step_kl(
    velocity_delta: Latents,
    coefficients: StepCoefficients,
    token_mask: TokenMask | None = None,
) -> PerSample:
    """mean(Δ²)/(2s²) for Δ = k_v·δv: the KL of two policies' Gaussian steps, per trained scalar.

    Public code divides by 2q² or by nothing instead, so that its β does not carry over.
    """
    squares = dynamics.latent_mean(velocity_delta**2, token_mask)
    return squares * (coefficients.k_v / coefficients.std) ** 2 / 2.0


def rollout_mismatch(
    kind: Ratio,
    mean_rollout: Latents,
    *,
    velocity_old: Latents,
    x: Latents,
    x_next: Latents,
    coefficients: StepCoefficients,
    token_mask: TokenMask | None = None,
) -> Mismatch:
    """Compares the rollout's stored mean with the learner's mean at the same x; see `Mismatch`."""
    moments = dynamics.step_moments(coefficients, x, velocity_old)
    delta = mean_rollout.astype(jnp.float32) - moments.mean
    velocity_delta = delta / jnp.reshape(coefficients.k_v, (-1, 1, 1))
    noise = dynamics.step_noise(x_next, moments)
    return Mismatch(
        distance=dynamics.latent_mean(jnp.abs(delta), token_mask) / coefficients.std,
        log_ratio=log_ratio(kind, noise, velocity_delta, coefficients, token_mask),
    )


def _difference(velocity: Latents, other: Latents) -> Float32[Array, "batch tokens channels"]:
    return velocity.astype(jnp.float32) - other.astype(jnp.float32)

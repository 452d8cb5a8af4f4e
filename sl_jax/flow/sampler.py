"""Sampling: the ODE alone, and rollouts with a window of stochastic steps.

A velocity function is called as `velocity_fn(x, index)`: x are float32 latents [B, N, C], index is
the int32 position in the σ grid at which to evaluate (0 … steps − 1), and the result is v = ε − x₀,
of x's shape in any float dtype. Everything else that the model needs is closed over.

One loop serves every segment of a trajectory. Its bounds and the window's position are traced, and
its body holds a single call of the velocity function: one compiled program, with one copy of the
model in it, covers every window position and both evaluations of a Heun step.

Noise is drawn from one key per sample, folded with the step: a sample's trajectory depends neither
on who shares its batch nor on the number of devices, given JAX's default (threefry) keys.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from sl_jax.flow import dynamics as flow_dynamics
from sl_jax.flow.dynamics import Dynamics, Latents

OdeMethod = Literal["euler", "heun"]
VelocityFn = Callable[[Latents, Int32[Array, ""]], Latents]
Index = Int32[Array, ""] | int

_INITIAL_NOISE = np.uint32(2**32 - 1)  # folded into a key where steps fold 0, 1, 2, …


class WindowSteps(NamedTuple):
    """The stochastic steps of a rollout, W of them: what training needs to take them up again."""

    x: Float32[Array, "window batch tokens channels"]
    x_next: Float32[Array, "window batch tokens channels"]
    mean: Float32[Array, "window batch tokens channels"]
    std: Float32[Array, " window"]
    index: Int32[Array, " window"]


class Trajectory(NamedTuple):
    """A finished rollout: x₀ [B, N, C] and its stochastic window."""

    final: Float32[Array, "batch tokens channels"]
    window: WindowSteps


class _Heun(NamedTuple):
    """What Heun keeps between the two evaluations of a step."""

    corrects: Bool[Array, ""]  # whether the coming evaluation is the second one
    start: Latents
    velocity: Latents


class _State(NamedTuple):
    step: Int32[Array, ""]
    x: Latents
    heun: _Heun | None
    window: WindowSteps | None


class _Noise(NamedTuple):
    """The stochastic window; `size` and `dynamics` are static, the rest may be traced."""

    dynamics: Dynamics
    level: Float[Array, ""] | float
    start: Index
    size: int
    keys: PRNGKeyArray


def initial_noise(
    keys: PRNGKeyArray, tokens: int, channels: int
) -> Float32[Array, "batch tokens channels"]:
    """Latents at σ = 1, one draw per key [B]; independent of the noise that `rollout` draws."""
    return _normal(keys, _INITIAL_NOISE, (tokens, channels))


def sample(
    velocity_fn: VelocityFn,
    x: Latents,
    sigmas: Float32[Array, "steps+1"],
    method: OdeMethod = "euler",
) -> Float32[Array, "batch tokens channels"]:
    """Integrates the ODE from σ_0 to 0 and returns x₀.

    Heun evaluates a second time at σ_{i+1} and averages, but for the last step, where σ_{i+1} is 0
    and the velocity is unknown: 2·steps − 1 evaluations in all (Stable-Layers: 50 steps, 99).
    """
    return integrate(velocity_fn, x, sigmas, 0, jnp.shape(sigmas)[0] - 1, method)


def integrate(
    velocity_fn: VelocityFn,
    x: Latents,
    sigmas: Float32[Array, "steps+1"],
    first: Index,
    stop: Index,
    method: OdeMethod = "euler",
) -> Float32[Array, "batch tokens channels"]:
    """The ODE's steps first … stop − 1, from x at σ_first to x at σ_stop; bounds may be traced."""
    return _run(velocity_fn, x, sigmas, first, stop, method, None).x


def rollout_prefix(
    velocity_fn: VelocityFn,
    x: Latents,
    sigmas: Float32[Array, "steps+1"],
    *,
    window_start: Index,
    ode_method: OdeMethod = "euler",
) -> Float32[Array, "batch tokens channels"]:
    """The ODE steps before the window, from initial noise to x at σ_{window_start}.

    A group whose candidates share their initial noise computes this once, with one sample, repeats
    the result for its candidates and goes on with `rollout` from there.
    """
    return integrate(velocity_fn, x, sigmas, 0, window_start, ode_method)


def rollout(
    velocity_fn: VelocityFn,
    x: Latents,
    sigmas: Float32[Array, "steps+1"],
    *,
    dynamics: Dynamics,
    noise_level: Float[Array, ""] | float,
    window_start: Index,
    window_size: int,
    keys: PRNGKeyArray,
    ode_method: OdeMethod = "euler",
    first: Index = 0,
    stop: Index | None = None,
) -> Trajectory:
    """ODE steps, the stochastic window, ODE steps.

    `keys` is one per sample, [B]; step i draws from fold_in(key, i). `window_size` is static,
    `window_start` may be traced. Ask `validate_window` first: nothing here checks the range.

    Steps may be left to another call: this one takes steps first … stop − 1, to the last by
    default, from x at σ_first; both bounds may be traced. Of stochastic steps that it does not
    take, the trajectory's window holds nothing of use.
    """
    noise = _Noise(dynamics, noise_level, window_start, window_size, keys)
    stop = jnp.shape(sigmas)[0] - 1 if stop is None else stop
    state = _run(velocity_fn, x, sigmas, first, stop, ode_method, noise)
    return Trajectory(state.x, state.window)


def window_starts(window_range: tuple[int, int], window_size: int) -> range:
    """Where a window may start so that its steps lie in window_range = (first, stop), end excluded.

    Flow-GRPO-Fast's convention: size 2 within (0, 5) starts at 0, 1, 2 or 3.
    """
    first, stop = window_range
    return range(first, stop - window_size + 1)


def evaluations(
    steps: int, window_start: float, window_size: int, ode_method: OdeMethod
) -> tuple[float, float]:
    """How often a rollout asks for a velocity: before its window, and from it on.

    Args:
        steps: of the σ grid.
        window_start: may be an average over several.
        window_size: stochastic steps, which take one velocity each, like the last step to σ = 0.
        ode_method: of the others.
    """
    after = steps - window_start
    if ode_method == "euler":
        return window_start, after
    return 2 * window_start, 2 * after - window_size - 1


def validate_window(
    dynamics: Dynamics,
    sigmas: Sequence[float] | Float[np.ndarray, "steps+1"],
    *,
    window_range: tuple[int, int],
    window_size: int,
    noise_level: float,
) -> None:
    """Checks on the host that every window in the range can be trained; raises ValueError if not.

    A stochastic step needs a positive, finite noise std: the ODE has none, nor has the last step of
    `cps`, and noise level 0 removes it everywhere.
    """
    steps = len(sigmas) - 1
    first, stop = window_range
    if (
        window_size < 1
        or not 0 <= first < stop <= steps
        or not window_starts(window_range, window_size)
    ):
        raise ValueError(
            f"a window of {window_size} steps does not fit into steps {first} to {stop - 1} of "
            f"{steps}; please give a range within 0 to {steps} that holds at least the window"
        )
    if dynamics == "cps" and not 0 < noise_level <= 1:
        raise ValueError(
            f"cps with noise level {noise_level}: please choose it in (0, 1], where 1 replaces all "
            "of a step's noise"
        )
    grid = np.asarray(sigmas, np.float32)
    std = np.asarray(
        flow_dynamics.step_coefficients(
            dynamics, grid[first:stop], grid[first + 1 : stop + 1], grid[1], noise_level
        ).std
    )
    silent = [first + i for i, value in enumerate(std) if not (np.isfinite(value) and value > 0)]
    if silent:
        raise ValueError(
            f"{dynamics} with noise level {noise_level} draws no noise at step "
            f"{', '.join(map(str, silent))} of {steps}, which therefore cannot be trained; please "
            "end the window's range earlier, raise the noise level or choose other dynamics"
        )


def _run(
    velocity_fn: VelocityFn,
    x: Latents,
    sigmas: Float32[Array, "steps+1"],
    first: Index,
    stop: Index,
    method: OdeMethod,
    noise: _Noise | None,
) -> _State:
    """Steps first … stop − 1: stochastic in the noise window, along the ODE elsewhere."""
    if method not in ("euler", "heun"):
        raise ValueError(f"ODE method {method!r} is unknown; please use 'euler' or 'heun'")
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def evaluate(state: _State) -> _State:
        second = state.heun.corrects.astype(jnp.int32) if method == "heun" else 0
        velocity = velocity_fn(state.x, state.step + second).astype(jnp.float32)
        if noise is None:
            return _ode_update(state, velocity, sigmas)
        in_window = (state.step >= noise.start) & (state.step < noise.start + noise.size)
        return jax.lax.cond(
            in_window,
            lambda: _stochastic_update(state, velocity, sigmas, noise),
            lambda: _ode_update(state, velocity, sigmas),
        )

    return jax.lax.while_loop(
        lambda state: state.step < stop, evaluate, _first_state(x, first, method, noise)
    )


def _first_state(x: Latents, first: Index, method: OdeMethod, noise: _Noise | None) -> _State:
    x = jnp.asarray(x, jnp.float32)
    heun = _Heun(jnp.bool_(False), x, x) if method == "heun" else None
    window = None
    if noise is not None:
        # Overwritten step by step; made from x so that they are laid out over devices like x.
        states = jnp.broadcast_to(x, (noise.size, *x.shape))
        scalars = jnp.zeros(noise.size)
        window = WindowSteps(states, states, states, scalars, scalars.astype(jnp.int32))
    return _State(jnp.asarray(first, jnp.int32), x, heun, window)


def _ode_update(state: _State, velocity: Latents, sigmas: jax.Array) -> _State:
    sigma_next = sigmas[state.step + 1]
    dt = sigma_next - sigmas[state.step]
    if state.heun is None:
        return state._replace(step=state.step + 1, x=state.x + dt * velocity)
    corrects, start, first_velocity = state.heun
    predicted = state.x + dt * velocity
    corrected = start + dt * (0.5 * (first_velocity + velocity))
    finished = corrects | (sigma_next == 0.0)
    return state._replace(
        step=state.step + finished.astype(jnp.int32),
        x=jnp.where(corrects, corrected, predicted),
        heun=_Heun(~finished, state.x, velocity),
    )


def _stochastic_update(
    state: _State, velocity: Latents, sigmas: jax.Array, noise: _Noise
) -> _State:
    step = state.step
    coefficients = flow_dynamics.step_coefficients(
        noise.dynamics, sigmas[step], sigmas[step + 1], sigmas[1], noise.level
    )
    moments = flow_dynamics.step_moments(coefficients, state.x, velocity)
    draw = _normal(noise.keys, step, state.x.shape[1:])
    x_next = flow_dynamics.next_latents(moments, draw)
    record = WindowSteps(state.x, x_next, moments.mean, moments.std, step)
    window = jax.tree.map(
        lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, step - noise.start, 0),
        state.window,
        record,
    )
    return state._replace(step=step + 1, x=x_next, window=window)


def _normal(keys: PRNGKeyArray, step: Index, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """One standard normal draw of that shape per key, for one step."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)
    )(keys)

"""Sampling candidates: from pictures to final latents, with the trained steps kept."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from sl_jax.checkpoints.pipeline import Pipeline
from sl_jax.flow import sampler
from sl_jax.grpo.config import RolloutConfig
from sl_jax.grpo.phases import Work
from sl_jax.inference.modulation import ModulationTables
from sl_jax.inference.sampling import (
    Condition,
    Decoded,
    Guidance,
    decode_layers,
    modulation_rows,
    picture_latents,
    velocity_function,
)
from sl_jax.models.flops import sequence_tokens, velocity_flops
from sl_jax.models.lora import Adapter
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.modulation import ModulationTable
from sl_jax.models.rope import LatentGrid
from sl_jax.parallel.mesh import Layout, batch_sharding, replicated

# Of one group in one pass of the model. More are no faster on accelerators, and take their memory.
_MOST_TOKENS = 16_384


class Pictures(NamedTuple):
    """The groups of one rollout batch.

    Attributes:
        pixels: source pictures.
        text, text_lengths: prompts, see `Condition`.
        keys: one random key per group, independent of batch and devices.
    """

    pixels: UInt8[Array, "n h w 3"]
    text: Float[Array, "n s e"]
    text_lengths: Int[Array, " n"] | None
    keys: PRNGKeyArray


class Candidates(NamedTuple):
    """A finished rollout of n groups with G candidates each, B = n·G samples in group order.

    Attributes:
        latents: x₀ of all frames.
        window: the stochastic steps.
        condition: of every sample.
        finite: whether all of this is finite. Known to every process.
    """

    latents: Float[Array, "b n c"]
    window: sampler.WindowSteps
    condition: Condition
    finite: Bool[Array, " b"]


class Rollout:
    """The compiled rollout: one program per bucket and number of layers, for any window position.

    Pictures are encoded by a program of their own, one per bucket. Small candidates are sampled
    all together, large ones one of every group at a time. What the rollout returns is split by
    samples over data × fsdp, whole groups to each part. Sampled noise depends on each group's key
    and the candidate's number alone.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        config: RolloutConfig,
        layout: Layout,
        guidance: Guidance | None = None,
    ):
        self._pipeline = pipeline
        self._guidance = guidance
        self._tables = ModulationTables(pipeline)
        self._config = config
        self._layout = layout
        rows, steps = (batch_sharding(layout.mesh, leading) for leading in (0, 1))
        whole = replicated(layout.mesh)
        window = sampler.WindowSteps(x=steps, x_next=steps, mean=steps, std=whole, index=whole)
        self._encode = jax.jit(partial(picture_latents, pipeline.vae), out_shardings=rows)
        self._sample = jax.jit(
            self._program,
            static_argnames="grid",
            out_shardings=Candidates(rows, window, rows, whole),
        )
        self._decode = jax.jit(
            partial(decode_layers, pipeline.vae, devices=layout.mesh.size),
            static_argnames="grid",
            out_shardings=Decoded(rows, whole),
        )

    @property
    def group_size(self) -> int:
        """Candidates of every picture."""
        return self._config.group_size

    @cached_property
    def with_shared_noise(self) -> "Rollout":
        """The same, but for groups that share their initial noise; itself, where they do."""
        if self._config.group_noise == "shared":
            return self
        config = dataclasses.replace(self._config, group_noise="shared")
        return Rollout(self._pipeline, config, self._layout, self._guidance)

    def table(self, grid: LatentGrid) -> ModulationTable:
        """The σ grid of a bucket and its modulation, which learning from the rollout shares."""
        config = self._config
        return self._tables(
            self._pipeline.scheduler.sigmas(config.steps, grid.frame_tokens, config.shift)
        )

    def __call__(
        self, adapter: Adapter, pictures: Pictures, window_start: int, grid: LatentGrid
    ) -> Candidates:
        """Samples `group_size` candidates of every picture."""
        groups = Condition(
            self._encode(self._pipeline.vae_params, pictures.pixels),
            pictures.text,
            pictures.text_lengths,
        )
        return self._sample(
            self._pipeline.params,
            adapter,
            groups,
            pictures.keys,
            self.table(grid),
            jnp.int32(window_start),
            self._guidance,
            grid=grid,
        )

    def decode(self, latents: Float[Array, "b n c"], grid: LatentGrid) -> Decoded:
        """Layers of every sample; which are finite is known to every process."""
        return self._decode(self._pipeline.vae_params, latents, grid=grid)

    def work(self, candidates: Candidates, window_start: int, grid: LatentGrid) -> Work:
        """What sampling the candidates asks of the transformer."""
        rows, text_tokens = candidates.condition.text.shape[:2]
        velocities = sampled_velocities(self._config, rows // self.group_size, window_start)
        velocities *= 1 if self._guidance is None else 2
        model = self._pipeline.model.config
        return sampling_work(model, velocities, grid, text_tokens)._replace(candidates=rows)

    def trace_encode(self, pixels: UInt8[Array, "n h w 3"]) -> jax.stages.Traced:
        """The program that encodes pictures; for this and the next two, arguments may be shapes."""
        return self._encode.trace(self._pipeline.vae_params, pixels)

    def trace(
        self,
        adapter: Adapter,
        groups: Condition,
        keys: PRNGKeyArray,
        table: ModulationTable,
        grid: LatentGrid,
    ) -> jax.stages.Traced:
        """The program that samples candidates of encoded pictures."""
        whole = replicated(self._layout.mesh)
        window_start = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        told = (groups, keys, table, window_start, self._guidance)
        return self._sample.trace(self._pipeline.params, adapter, *told, grid=grid)

    def trace_decode(self, latents: Float[Array, "b n c"], grid: LatentGrid) -> jax.stages.Traced:
        """The program that decodes."""
        return self._decode.trace(self._pipeline.vae_params, latents, grid=grid)

    def _program(
        self,
        params: Any,
        adapter: Adapter,
        groups: Condition,
        keys: PRNGKeyArray,
        table: ModulationTable,
        window_start: Int[Array, ""],
        guidance: Guidance | None,
        *,
        grid: LatentGrid,
    ) -> Candidates:
        model, variables = self._pipeline.model, adapter.variables()
        rows = modulation_rows(model, params, variables, table)
        told = {"rows": rows, "grid": grid, "guidance": guidance}
        velocity = partial(velocity_function, model, params, variables, **told)
        sampled = self._one_by_one if self.one_by_one(grid) else self._together
        trajectory = sampled(velocity, groups, keys, table.sigmas, window_start, grid)
        condition = groups.repeat(self._config.group_size)
        finite = _finite(trajectory, condition)
        return Candidates(trajectory.final, trajectory.window, condition, finite)

    def one_by_one(self, grid: LatentGrid) -> bool:
        """Whether the candidates of a group are sampled one at a time."""
        tokens = grid.generated_tokens + grid.frame_tokens
        return self._config.group_size * tokens > _MOST_TOKENS

    def _together(
        self,
        velocity: Callable[[Condition], sampler.VelocityFn],
        groups: Condition,
        group_keys: PRNGKeyArray,
        sigmas: Float[Array, " steps_1"],
        window_start: Int[Array, ""],
        grid: LatentGrid,
    ) -> sampler.Trajectory:
        """All candidates in one pass of the model, after what those of a group share."""
        config = self._config
        shared = config.group_noise == "shared"
        keys = _candidate_keys(group_keys, config.group_size).T.ravel()
        x = self._noise(group_keys if shared else keys, groups, grid)
        if shared:  # up to the window candidates are equal: one stands for its group
            with jax.named_scope("prefix"):
                x = sampler.rollout_prefix(
                    velocity(groups),
                    x,
                    sigmas,
                    window_start=window_start,
                    ode_method=config.ode_method,
                )
            x = self._spread(jnp.repeat(x, config.group_size, axis=0))
        samples = groups.repeat(config.group_size)
        with jax.named_scope("window"):
            first = window_start if shared else 0
            return self._rolled(velocity(samples), x, sigmas, window_start, keys, first)

    def _one_by_one(
        self,
        velocity: Callable[[Condition], sampler.VelocityFn],
        groups: Condition,
        group_keys: PRNGKeyArray,
        sigmas: Float[Array, " steps_1"],
        window_start: Int[Array, ""],
        grid: LatentGrid,
    ) -> sampler.Trajectory:
        """One candidate of every group at a time, in turns of one loop.

        What candidates share takes the first turn, so that the program has one copy of the model.
        """
        config = self._config
        shared = config.group_noise == "shared"
        keys = _candidate_keys(group_keys, config.group_size)
        if shared:
            keys = jnp.concatenate([group_keys[None], keys])  # of a turn that draws nothing
        prefix = (jnp.arange(len(keys)) == 0) & shared
        velocity_fn = velocity(groups)

        def turn(x: Array, told: tuple[Array, PRNGKeyArray]) -> tuple[Array, sampler.Trajectory]:
            prefix, keys = told
            start = x if shared else self._noise(keys, groups, grid)
            first = jnp.where(prefix, 0, window_start) if shared else 0
            stop = jnp.where(prefix, window_start, config.steps)
            found = self._rolled(velocity_fn, start, sigmas, window_start, keys, first, stop)
            return jnp.where(prefix, found.final, x), found

        with jax.named_scope("candidates"):
            x = self._noise(group_keys, groups, grid)
            _, found = jax.lax.scan(turn, x, (prefix, keys))
        if shared:
            found = jax.tree.map(lambda turns: turns[1:], found)
        return _by_group(found)

    def _rolled(
        self,
        velocity_fn: sampler.VelocityFn,
        x: Float[Array, "b n c"],
        sigmas: Float[Array, " steps_1"],
        window_start: Int[Array, ""],
        keys: PRNGKeyArray,
        first: Int[Array, ""] | int = 0,
        stop: Int[Array, ""] | None = None,
    ) -> sampler.Trajectory:
        config = self._config
        return sampler.rollout(
            velocity_fn,
            x,
            sigmas,
            dynamics=config.dynamics,
            noise_level=config.noise_level,
            window_start=window_start,
            window_size=config.window_size,
            keys=keys,
            ode_method=config.ode_method,
            first=first,
            stop=stop,
        )

    def _noise(self, keys: PRNGKeyArray, groups: Condition, grid: LatentGrid) -> Array:
        channels = groups.picture.shape[-1]
        return self._spread(sampler.initial_noise(keys, grid.generated_tokens, channels))

    def _spread(self, x: Array) -> Array:
        return self._layout(x, ("batch", None, None))


def sampled_velocities(config: RolloutConfig, groups: int, window_start: float) -> float:
    """How many velocities of one sample the candidates of so many groups take, without guidance.

    Up to the window, whose start may be an average over several, one sample stands for a group
    whose candidates share their noise.
    """
    before, after = sampler.evaluations(
        config.steps, window_start, config.window_size, config.ode_method
    )
    different = 1 if config.group_noise == "shared" else config.group_size
    return groups * (before * different + after * config.group_size)


def sampling_work(
    model: MMDiTConfig, velocities: float, grid: LatentGrid, text_tokens: int
) -> Work:
    """What so many velocities of one shape ask of the transformer."""
    return Work(
        velocities * velocity_flops(model, grid, text_tokens),
        velocities * sequence_tokens(grid, text_tokens),
    )


def _candidate_keys(keys: PRNGKeyArray, count: int) -> PRNGKeyArray:
    """Keys [count, n] of the candidates of n groups, from the groups' own."""
    candidate = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return jax.vmap(candidate, in_axes=(None, 0))(keys, jnp.arange(count))


def _by_group(turns: sampler.Trajectory) -> sampler.Trajectory:
    """Trajectories of one candidate of every group each, [G, …, n, ·, ·], as one in group order."""

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)  # [..., n, G, ·, ·]
        return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])

    window = turns.window
    states = (joined(states) for states in (window.x, window.x_next, window.mean))
    return sampler.Trajectory(
        joined(turns.final), sampler.WindowSteps(*states, window.std[0], window.index[0])
    )


def _finite(trajectory: sampler.Trajectory, condition: Condition) -> Bool[Array, " b"]:
    """Which samples are finite in all that is kept of them."""
    window = trajectory.window
    values = (trajectory.final, condition.picture, condition.text)  # [B, ·, ·]
    steps = (window.x, window.x_next, window.mean)  # [W, B, ·, ·]
    return jnp.stack(
        [jnp.isfinite(x).all(axis=(1, 2)) for x in values]
        + [jnp.isfinite(x).all(axis=(0, 2, 3)) for x in steps]
    ).all(axis=0)

"""Sampling candidates: from pictures to final latents, with the trained steps kept."""

from functools import partial
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
    Guidance,
    each_layer,
    modulation_rows,
    picture_latents,
    velocity_function,
)
from sl_jax.models.codec import to_uint8
from sl_jax.models.flops import sequence_tokens, velocity_flops
from sl_jax.models.lora import Adapter
from sl_jax.models.modulation import ModulationTable
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, denormalize_latents
from sl_jax.parallel.mesh import Layout, batch_sharding, replicated


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
        finite: whether all of this was finite; of samples that were not, zeros stand here, so that
            the learner, which gives them no weight, meets no nan. Known to every process.
    """

    latents: Float[Array, "b n c"]
    window: sampler.WindowSteps
    condition: Condition
    finite: Bool[Array, " b"]


class Decoded(NamedTuple):
    """Layers of every sample, back to front, without frame 0, which is the whole picture again.

    Attributes:
        layers: straight RGBA.
        finite: whether the pixels were, before they were rounded. Known to every process.
    """

    layers: UInt8[Array, "b l h w 4"]
    finite: Bool[Array, " b"]


class Rollout:
    """The compiled rollout: one program per bucket and number of layers, for any window position.

    What it returns is split by samples over data × fsdp, whole groups to each part.
    Sampled noise depends on each group's key and the candidate's number alone.
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
        self._sample = jax.jit(
            self._program,
            static_argnames="grid",
            out_shardings=Candidates(rows, window, rows, whole),
        )
        self._decode = jax.jit(
            partial(_decoded, pipeline.vae, layout.mesh.size),
            static_argnames="grid",
            out_shardings=Decoded(rows, whole),
        )

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
        return self._sample(
            self._pipeline.params,
            self._pipeline.vae_params,
            adapter,
            pictures,
            self.table(grid),
            jnp.int32(window_start),
            self._guidance,
            grid=grid,
        )

    def decode(self, latents: Float[Array, "b n c"], grid: LatentGrid) -> Decoded:
        """Layers of every sample."""
        return self._decode(self._pipeline.vae_params, latents, grid=grid)

    def work(self, candidates: Candidates, window_start: int, grid: LatentGrid) -> Work:
        """What sampling the candidates asks of the transformer."""
        config = self._config
        rows, text_tokens = candidates.condition.text.shape[:2]
        before, after = sampler.evaluations(
            config.steps, window_start, config.window_size, config.ode_method
        )
        sampled = rows // config.group_size if config.group_noise == "shared" else rows
        velocities = before * sampled + after * rows
        velocities *= 1 if self._guidance is None else 2
        return Work(
            velocities * velocity_flops(self._pipeline.model.config, grid, text_tokens),
            velocities * sequence_tokens(grid, text_tokens),
            rows,
        )

    def trace(
        self, adapter: Adapter, pictures: Pictures, table: ModulationTable, grid: LatentGrid
    ) -> jax.stages.Traced:
        """The program that samples; for this and the next, arguments may be shapes."""
        whole = replicated(self._layout.mesh)
        window_start = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        weights = (self._pipeline.params, self._pipeline.vae_params, adapter)
        rest = (table, window_start, self._guidance)
        return self._sample.trace(*weights, pictures, *rest, grid=grid)

    def trace_decode(self, latents: Float[Array, "b n c"], grid: LatentGrid) -> jax.stages.Traced:
        """The program that decodes."""
        return self._decode.trace(self._pipeline.vae_params, latents, grid=grid)

    def _program(
        self,
        params: Any,
        vae_params: Any,
        adapter: Adapter,
        pictures: Pictures,
        table: ModulationTable,
        window_start: Int[Array, ""],
        guidance: Guidance | None,
        *,
        grid: LatentGrid,
    ) -> Candidates:
        config, model, vae = self._config, self._pipeline.model, self._pipeline.vae
        variables = adapter.variables()
        rows = modulation_rows(model, params, variables, table)
        groups = Condition(
            picture_latents(vae, vae_params, pictures.pixels),
            pictures.text,
            pictures.text_lengths,
        )
        samples = groups.repeat(config.group_size)
        keys = jax.vmap(lambda key: _candidate_keys(key, config.group_size))(pictures.keys).ravel()
        told = {"rows": rows, "grid": grid, "guidance": guidance}
        velocity = partial(velocity_function, model, params, variables, **told)
        shared = config.group_noise == "shared"
        x = self._spread(
            sampler.initial_noise(
                pictures.keys if shared else keys, grid.generated_tokens, samples.picture.shape[-1]
            )
        )
        stochastic = sampler.rollout
        if shared:  # up to the window candidates are equal: one stands for its group
            with jax.named_scope("prefix"):
                x = sampler.rollout_prefix(
                    velocity(groups),
                    x,
                    table.sigmas,
                    window_start=window_start,
                    ode_method=config.ode_method,
                )
            x = self._spread(jnp.repeat(x, config.group_size, axis=0))
            stochastic = sampler.rollout_window
        with jax.named_scope("window"):
            trajectory = stochastic(
                velocity(samples),
                x,
                table.sigmas,
                dynamics=config.dynamics,
                noise_level=config.noise_level,
                window_start=window_start,
                window_size=config.window_size,
                keys=keys,
                ode_method=config.ode_method,
            )
        return _without_spoiled(trajectory, samples)

    def _spread(self, x: Array) -> Array:
        return self._layout(x, ("batch", None, None))


def _candidate_keys(key: PRNGKeyArray, count: int) -> PRNGKeyArray:
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(count))


def _without_spoiled(trajectory: sampler.Trajectory, condition: Condition) -> Candidates:
    """The candidates, with zeros in place of all that belongs to one that is not finite."""
    window = trajectory.window
    values = (trajectory.final, condition.picture, condition.text)  # [B, ·, ·]
    steps = (window.x, window.x_next, window.mean)  # [W, B, ·, ·]
    finite = jnp.stack(
        [jnp.isfinite(x).all(axis=(1, 2)) for x in values]
        + [jnp.isfinite(x).all(axis=(0, 2, 3)) for x in steps]
    ).all(axis=0)
    latents, picture, text, x, x_next, mean = (
        jnp.where(finite[:, None, None], value, 0) for value in (*values, *steps)
    )
    return Candidates(
        latents,
        window._replace(x=x, x_next=x_next, mean=mean),
        condition._replace(picture=picture, text=text),
        finite,
    )


def _decoded(
    vae: Vae, devices: int, params: Any, latents: Float[Array, "b n c"], *, grid: LatentGrid
) -> Decoded:
    def frames(x: Float[Array, "k i j z"]) -> tuple[Array, Array]:
        raw = denormalize_latents(x, vae.config)
        pixels = vae.apply({"params": params}, raw, method="decode")
        return to_uint8(pixels), jnp.isfinite(pixels).all(axis=(1, 2, 3))

    layers, finite = each_layer(frames, latents, grid, devices)
    return Decoded(layers, finite.all(axis=1))

"""Pictures in, layers out: one compiled program per bucket, number of layers and sampler."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sl_jax.checkpoints.pipeline import Pipeline
from sl_jax.flow.sampler import OdeMethod, initial_noise, sample
from sl_jax.inference.sampling import (
    Condition,
    decode_layers,
    modulation_table,
    picture_latents,
    velocity_function,
)
from sl_jax.models.lora import Adapter
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid


class Decomposer:
    """Samples layers of pictures from a loaded pipeline, by the ODE."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._program = jax.jit(self._sampled, static_argnames=("grid", "method"))

    def __call__(
        self,
        pictures: UInt8[Array, "b h w 3"],
        text: Float[Array, "b s e"],
        text_lengths: Int[Array, " b"] | None,
        keys: PRNGKeyArray,
        *,
        layers: int,
        steps: int,
        method: OdeMethod = "heun",
        shift: float | None = None,
        adapter: Adapter | None = None,
    ) -> UInt8[Array, "b l h w 4"]:
        """Straight RGBA layers of every picture, back to front.

        Args:
            pictures: sides must be multiples of 16.
            text, text_lengths: prompts, see `Condition`.
            keys: one per picture; a picture's layers depend on its own key alone.
            layers: L.
            steps, method: of the sampler; Heun evaluates twice per step but for the last.
            shift: μ of the σ grid; None takes the checkpoint's own rule.
            adapter: None samples the base.
        """
        _, height, width, _ = pictures.shape
        grid = LatentGrid(layers, height // PACKED_PIXELS, width // PACKED_PIXELS)
        sigmas = self._pipeline.scheduler.sigmas(steps, grid.frame_tokens, shift)
        noise = initial_noise(keys, grid.generated_tokens, self._pipeline.model.config.in_channels)
        return self._program(
            self._pipeline.params,
            self._pipeline.vae_params,
            adapter.variables() if adapter else {},
            pictures,
            text,
            text_lengths,
            noise,
            jnp.asarray(sigmas),
            grid=grid,
            method=method,
        )

    def _sampled(
        self,
        params: Any,
        vae_params: Any,
        variables: Any,
        pictures: Array,
        text: Array,
        text_lengths: Array | None,
        noise: Array,
        sigmas: Array,
        *,
        grid: LatentGrid,
        method: OdeMethod,
    ) -> Array:
        model, vae = self._pipeline.model, self._pipeline.vae
        condition = Condition(picture_latents(vae, vae_params, pictures), text, text_lengths)
        table = modulation_table(model, params, variables, sigmas)
        velocity = partial(velocity_function, model, params, variables, table=table, grid=grid)
        latents = sample(velocity(condition), noise, sigmas, method)
        return decode_layers(vae, vae_params, latents, grid)

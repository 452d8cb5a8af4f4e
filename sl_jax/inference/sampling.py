"""From pictures to layers: what rollout, learner, evaluation and `decompose` have in common."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from sl_jax.flow.sampler import VelocityFn
from sl_jax.models.codec import decode_frames, encode_frames, opaque
from sl_jax.models.mmdit import MMDiT
from sl_jax.models.modulation import Modulation, ModulationTable, time_modules
from sl_jax.models.packing import pack, unpack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae

_LARGE_FRAME = 1600  # tokens, of 640 × 640 pixels
_MOST_FRAMES = 16  # more are no faster, on CPUs


class Condition(NamedTuple):
    """What the model is told about B samples.

    Attributes:
        picture: packed latents of the source picture.
        text: hidden states of the prompt.
        text_lengths: valid tokens per prompt; None if none is padding.
    """

    picture: Float[Array, "b m c"]
    text: Float[Array, "b s e"]
    text_lengths: Int[Array, " b"] | None

    def repeat(self, times: int) -> "Condition":
        """Each sample `times` in a row."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


def picture_latents(
    vae: Vae, params: Any, pictures: UInt8[Array, "b h w 3"]
) -> Float[Array, "b m c"]:
    """Packed, normalised latents of opaque pictures."""
    latents = encode_frames(vae, params, opaque(pictures)).astype(jnp.float32)
    return pack(latents[:, None])


def decode_layers(
    vae: Vae, params: Any, latents: Float[Array, "b n c"], grid: LatentGrid
) -> UInt8[Array, "b l h w 4"]:
    """Straight RGBA layers, back to front, without frame 0; see `each_layer`."""
    return each_layer(lambda x: decode_frames(vae, params, x), latents, grid)


def each_layer(
    decode: Callable[[Float[Array, "k i j z"]], Any],
    latents: Float[Array, "b n c"],
    grid: LatentGrid,
    devices: int | None = None,
) -> Any:
    """What `decode` makes of the layers, [b, l, …]; frame 0, the whole picture again, is dropped.

    Few frames are decoded at a time, so that memory grows neither with the number of layers nor
    with the batch: of one layer so many samples as devices that split the batch may be, and of
    small frames as many more as have the tokens of a large one.
    Programs for other devices than this process has are told their number.
    """
    frames = unpack(latents, grid.height, grid.width)[:, 1:]
    batch, layers, *shape = frames.shape
    on_each = max(1, min(_LARGE_FRAME // grid.frame_tokens, _MOST_FRAMES))
    together = math.gcd(batch, (devices or jax.device_count()) * on_each)
    # Samples of one step are far from each other, and so on different devices.
    steps = jnp.moveaxis(frames.reshape(together, -1, *shape), 1, 0)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, layers, *x.shape[2:]),
        jax.lax.map(decode, steps),
    )


def modulation_rows(
    model: MMDiT, params: Any, adapter: Mapping[str, Any], table: ModulationTable
) -> Modulation:
    """The rows of a table; of one without rows computed here, from `params` and `adapter`.

    Raises:
        ValueError: the rows are known, but not with this adapter, which changes them.
    """
    if table.rows is None:
        return model.apply({"params": params, **adapter}, table.sigmas[:-1], method="modulate")
    adapted = time_modules(adapter.get("lora", {}))
    if adapted:
        raise ValueError(
            f"the adapter changes {', '.join(adapted)}, which the table of the base's modulation "
            "does not know; please name the adapter when the pipeline is loaded"
        )
    return table.rows


def velocity_function(
    model: MMDiT,
    params: Any,
    adapter: Mapping[str, Any],
    condition: Condition,
    rows: Modulation,
    grid: LatentGrid,
) -> VelocityFn:
    """(x, index into the σ grid) → velocity, float32, for the samples of `condition`.

    Args:
        adapter: collections from `Adapter.variables`; empty for the base model.
        rows: from `modulation_rows` with the same parameters and adapter.
    """

    def velocity(x: Float[Array, "b n c"], index: Int[Array, ""]) -> Float[Array, "b n c"]:
        return model.apply(
            {"params": params, **adapter},
            x,
            condition.picture,
            condition.text,
            condition.text_lengths,
            rows.at(index),
            grid,
        ).astype(jnp.float32)

    return velocity

"""From pictures to layers: what rollout, learner, evaluation and `decompose` have in common."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from sl_jax.flow.sampler import VelocityFn
from sl_jax.models.codec import encode_frames, opaque, to_uint8
from sl_jax.models.mmdit import MMDiT
from sl_jax.models.modulation import Modulation, ModulationTable, time_modules
from sl_jax.models.packing import pack, unpack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, denormalize_latents

GUIDANCE_SCOPE = "guidance"  # of the loop over prompts, in a program's paths

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


class Guidance(NamedTuple):
    """Classifier-free guidance with a negative prompt ("true CFG" in diffusers' pipelines).

    It doubles the cost of every velocity; see `guided`.

    Attributes:
        scale: 1 changes nothing; the base model's README uses 4.
        text, text_lengths: negative prompts, as in `Condition`; one may stand for all samples.
        normalize: keep the norm, as the base model's README does.
    """

    scale: Float[Array, ""] | float
    text: Float[Array, "b s e"]
    text_lengths: Int[Array, " b"] | None
    normalize: Bool[Array, ""] | bool = True


class Decoded(NamedTuple):
    """Layers of every sample, back to front, without frame 0, which is the whole picture again.

    Attributes:
        layers: straight RGBA; transparent black where pixels are not finite.
        finite: whether the pixels were, before they were rounded.
    """

    layers: UInt8[Array, "b l h w 4"]
    finite: Bool[Array, " b"]


def guided(
    wanted: Float[Array, "b n c"], unwanted: Float[Array, "b n c"], guidance: Guidance
) -> Float[Array, "b n c"]:
    """v = v₋ + scale · (v₊ − v₋), for velocities v₊ by the prompt and v₋ by the negative one.

    With `normalize` each token's v is scaled to the norm of its v₊ over the packed channels. The
    gradient flows through both velocities, and through the norms.
    """
    mixed = unwanted + guidance.scale * (wanted - unwanted)
    norm = _norm(mixed)
    factor = _norm(wanted) / jnp.where(norm > 0, norm, 1.0)
    return mixed * jnp.where(guidance.normalize, factor, 1.0)


def picture_latents(
    vae: Vae, params: Any, pictures: UInt8[Array, "b h w 3"]
) -> Float[Array, "b m c"]:
    """Packed, normalised latents of opaque pictures."""
    latents = encode_frames(vae, params, opaque(pictures)).astype(jnp.float32)
    return pack(latents[:, None])


def decode_layers(
    vae: Vae,
    params: Any,
    latents: Float[Array, "b n c"],
    grid: LatentGrid,
    devices: int | None = None,
) -> Decoded:
    """Layers, and whether they are finite; arguments as for `each_layer`."""

    def frames(x: Float[Array, "k i j z"]) -> tuple[Array, Array]:
        raw = denormalize_latents(x, vae.config)
        pixels = vae.apply({"params": params}, raw, method="decode")
        finite = jnp.isfinite(pixels)
        return to_uint8(jnp.where(finite, pixels, -1)), finite.all(axis=(1, 2, 3))

    layers, finite = each_layer(frames, latents, grid, devices)
    return Decoded(layers, finite.all(axis=1))


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
    guidance: Guidance | None = None,
) -> VelocityFn:
    """(x, index into the σ grid) → velocity, float32, for the samples of `condition`.

    Args:
        adapter: collections from `Adapter.variables`; empty for the base model.
        rows: from `modulation_rows` with the same parameters and adapter.
        guidance: None follows the prompt alone.
    """

    def by_prompt(x: Array, index: Array, text: Array, text_lengths: Array | None) -> Array:
        modulation, variables = rows.at(index), {"params": params, **adapter}
        told = (condition.picture, text, text_lengths, modulation, grid)
        return model.apply(variables, x, *told).astype(jnp.float32)

    def velocity(x: Float[Array, "b n c"], index: Int[Array, ""]) -> Float[Array, "b n c"]:
        if guidance is None:
            return by_prompt(x, index, condition.text, condition.text_lengths)
        with jax.named_scope(GUIDANCE_SCOPE):  # Prompts take turns: the model is there once.
            wanted, unwanted = jax.lax.map(
                lambda prompts: by_prompt(x, index, *prompts), _both_prompts(condition, guidance)
            )
        return guided(wanted, unwanted, guidance)

    return velocity


def _both_prompts(
    condition: Condition, guidance: Guidance
) -> tuple[Float[Array, "2 b s e"], Int[Array, "2 b"]]:
    """Prompts and negative ones of all samples, padded to one length, with their lengths."""
    samples = len(condition.text)
    texts = condition.text, guidance.text
    lengths = [
        jnp.full(len(text), text.shape[1], jnp.int32) if known is None else known
        for text, known in zip(texts, (condition.text_lengths, guidance.text_lengths), strict=True)
    ]
    longest = max(text.shape[1] for text in texts)
    padded = [jnp.pad(text, ((0, 0), (0, longest - text.shape[1]), (0, 0))) for text in texts]
    return (
        jnp.stack([jnp.broadcast_to(text, (samples, *text.shape[1:])) for text in padded]),
        jnp.stack([jnp.broadcast_to(known, samples) for known in lengths]),
    )


def _norm(velocity: Float[Array, "b n c"]) -> Float[Array, "b n 1"]:
    """Over the channels; where all are 0 its gradient is 0."""
    squares = jnp.sum(velocity**2, axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)

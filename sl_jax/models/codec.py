"""RGBA frames ↔ normalised latents, as the sampling pipeline does it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from sl_jax.models.vae import Vae, denormalize_latents, normalize_latents


def to_unit_range(pixels: UInt8[Array, "*b c"]) -> Float[Array, "*b c"]:
    """uint8 to float32 in [−1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pixels: Float[Array, "*b c"]) -> UInt8[Array, "*b c"]:
    """[−1, 1] to uint8, rounded (the public release truncates)."""
    return jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def opaque(picture: UInt8[Array, "*b 3"]) -> UInt8[Array, "*b 4"]:
    """An RGB picture with alpha 255, as the model is conditioned on it."""
    return jnp.concatenate([picture, jnp.full_like(picture[..., :1], 255)], axis=-1)


def encode_frames(
    vae: Vae, params: Any, frames: UInt8[Array, "b h w 4"]
) -> Float[Array, "b i j z"]:
    """Normalised mode of the posterior of each frame."""
    posterior = vae.apply({"params": params}, to_unit_range(frames), method="encode")
    return normalize_latents(posterior.mean, vae.config)


def decode_frames(
    vae: Vae, params: Any, latents: Float[Array, "b i j z"]
) -> UInt8[Array, "b h w 4"]:
    """Straight RGBA frames of normalised latents."""
    raw = denormalize_latents(latents, vae.config)
    return to_uint8(vae.apply({"params": params}, raw, method="decode"))

"""Latent frames ↔ the token sequence of the MMDiT."""

from jaxtyping import Array, Float

PATCH = 2


def pack(latents: Float[Array, "b f h w c"]) -> Float[Array, "b n c4"]:
    """2 × 2 patches of latent frames as tokens: frame-major, then rows, then columns.

    Channels of a token are ordered (c, row in patch, column in patch), as the checkpoint expects:
    [B, F, h, w, 16] gives [B, F·(h/2)·(w/2), 64]. Height and width must be even.
    """
    batch, frames, height, width, channels = latents.shape
    patches = latents.reshape(
        batch, frames, height // PATCH, PATCH, width // PATCH, PATCH, channels
    )
    return patches.transpose(0, 1, 2, 4, 6, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Float[Array, "b n c4"], height: int, width: int) -> Float[Array, "b f h2 w2 c"]:
    """The inverse of `pack` for frames of `height` × `width` tokens."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, -1, height, width, channels // PATCH**2, PATCH, PATCH)
    return patches.transpose(0, 1, 2, 5, 3, 6, 4).reshape(
        batch, -1, height * PATCH, width * PATCH, channels // PATCH**2
    )

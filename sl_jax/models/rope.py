"""Rotary position embedding of Qwen-Image-Layered (layer index, height, width).

Behaviour of `QwenEmbedLayer3DRope` in diffusers 0.42. Tables are built with numpy while a
program is traced: they depend on static shapes only and end up as constants.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

PACKED_PIXELS = 16  # picture pixels along a side of one token: spatial factor 8, patches of 2

_THETA = 10000.0


class LatentGrid(NamedTuple):
    """Static shape of a packed sequence: `layers` + 1 generated frames of `height` × `width`.

    Frame 0 is the whole picture again, frames 1 … `layers` are the layers back to front. Height
    and width count packed tokens, that is 16 picture pixels each.
    """

    layers: int
    height: int
    width: int

    @classmethod
    def of_pixels(cls, layers: int, height: int, width: int) -> "LatentGrid":
        """Of pictures of `height` × `width` pixels, multiples of 16."""
        return cls(layers, height // PACKED_PIXELS, width // PACKED_PIXELS)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def generated_tokens(self) -> int:
        """Tokens of the frames that the model generates."""
        return (self.layers + 1) * self.frame_tokens


class RopeTable(NamedTuple):
    """Cosines and sines, float32 [tokens, head_dim / 2]; tokens ordered [image, text]."""

    cos: np.ndarray
    sin: np.ndarray


def layer3d_rope(grid: LatentGrid, text_tokens: int, axes: tuple[int, int, int]) -> RopeTable:
    """Angles for the generated frames, the condition frame and the text, in this order.

    Generated frame i has layer index i, the condition frame −1; heights and widths are centred.
    Text token j stands at m + j on all three axes, m = max(h // 2, w // 2, layers + 1).

    Args:
        grid: packed sequence.
        text_tokens: length of the (padded) text.
        axes: channels of the head given to layer, height and width; they sum to head_dim.
    """
    frames = np.array([*range(grid.layers + 1), -1])
    rows = np.arange(grid.height) - (grid.height - grid.height // 2)
    columns = np.arange(grid.width) - (grid.width - grid.width // 2)
    image = np.stack(np.meshgrid(frames, rows, columns, indexing="ij"), -1).reshape(-1, 3)
    start = max(grid.height // 2, grid.width // 2, grid.layers + 1)
    text = np.repeat(np.arange(start, start + text_tokens)[:, None], 3, axis=1)
    positions = np.concatenate([image, text]).astype(np.float32)
    angles = [positions[:, i, None] * _frequencies(size) for i, size in enumerate(axes)]
    angle = np.concatenate(angles, axis=1)
    return RopeTable(np.cos(angle), np.sin(angle))


def _frequencies(channels: int) -> np.ndarray:
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    return (1.0 / np.power(np.float32(_THETA), exponents)).astype(np.float32)


def rotate(x: Float[Array, "b s h d"], table: RopeTable) -> Float[Array, "b s h d"]:
    """Rotates adjacent channel pairs of `x` in float32; the result has the dtype of `x`."""
    cos, sin = jnp.asarray(table.cos)[:, None, :], jnp.asarray(table.sin)[:, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)

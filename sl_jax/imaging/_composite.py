"""Compositing of straight-alpha RGBA layers: "over", flattening, checkerboards.

Pictures may be uint8 in 0…255 or floating point in 0…1; the arithmetic is float32.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8

_LIGHT, _DARK = 255, 204
_PIXELS_AT_A_TIME = 2**22  # in float32 they take sixteen times their bytes


def to_unit(picture: Shaped[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """A picture as float32 in [0, 1]; uint8 is divided by 255, floats are taken as they are.

    Raises:
      TypeError: for any dtype that is neither uint8 nor floating point.
    """
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) * np.float32(1 / 255)
    if np.issubdtype(picture.dtype, np.floating):
        return picture.astype(np.float32, copy=False)
    raise TypeError(
        f"a picture of dtype {picture.dtype}: please pass uint8 (0…255) or floats (0…1)"
    )


def to_uint8(picture: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Floats in [0, 1] as uint8, clipped and rounded to the nearest level."""
    return np.rint(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)


def over_premultiplied(
    layers: Shaped[np.ndarray, "*batch layers height width 4"],
) -> tuple[
    Float32[np.ndarray, "*batch height width 3"], Float32[np.ndarray, "*batch height width 1"]
]:
    """Composites back to front over transparent black.

    With c_i the straight colour and a_i the alpha of layer i, from i = 0 (the background):
    C ← C·(1 − a_i) + c_i·a_i and A ← A·(1 − a_i) + a_i.

    Returns:
      The premultiplied colour C and the alpha A, both in [0, 1].
    """
    _check_rgba(layers, "layers height width 4", 4)
    layers = to_unit(layers)
    color = np.zeros(layers.shape[:-4] + layers.shape[-3:-1] + (3,), np.float32)
    alpha = np.zeros((*color.shape[:-1], 1), np.float32)
    for index in range(layers.shape[-4]):
        layer = layers[..., index, :, :, :]
        a = layer[..., 3:]
        color = color * (1 - a) + layer[..., :3] * a
        alpha = alpha * (1 - a) + a
    return color, alpha


def over(
    layers: Shaped[np.ndarray, "*batch layers height width 4"],
) -> Float32[np.ndarray, "*batch height width 4"]:
    """The composite of a stack, back to front, as one straight-alpha picture in [0, 1].

    A = 1 − Π(1 − a_i); colour = C / A where A > 0, and 0 elsewhere, C being the premultiplied
    colour of `over_premultiplied`.
    """
    color, alpha = over_premultiplied(layers)
    straight = np.divide(color, alpha, out=np.zeros_like(color), where=alpha > 0)
    return np.concatenate([np.minimum(straight, 1.0), alpha], axis=-1)


def flatten(
    rgba: Shaped[np.ndarray, "*batch height width 4"], background: int = 255
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """A straight-alpha picture over a grey level: c·a + background/255·(1 − a), rounded."""
    _check_rgba(rgba, "height width 4", 3)
    flat = np.empty((*rgba.shape[:-1], 3), np.uint8)
    height = rgba.shape[-3]
    rows = max(1, _PIXELS_AT_A_TIME * height // max(1, math.prod(rgba.shape[:-1])))
    for top in range(0, height, rows):
        band = to_unit(rgba[..., top : top + rows, :, :])
        alpha = band[..., 3:]
        shown = band[..., :3] * alpha + np.float32(background / 255) * (1 - alpha)
        flat[..., top : top + rows, :, :] = to_uint8(shown)
    return flat


def recompose(
    layers: Shaped[np.ndarray, "*batch layers height width 4"], background: int = 255
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """What the layers show together: "over", then over a grey level (white), rounded once."""
    color, alpha = over_premultiplied(layers)
    return to_uint8(color + np.float32(background / 255) * (1 - alpha))


@functools.lru_cache(maxsize=32)
def _checkerboard(height: int, width: int, cell: int) -> UInt8[np.ndarray, "height width 3"]:
    parity = (np.arange(height)[:, None] // cell + np.arange(width)[None] // cell) % 2
    board = np.where(parity == 0, _LIGHT, _DARK).astype(np.uint8)
    board = np.repeat(board[..., None], 3, axis=-1)
    board.flags.writeable = False
    return board


def checkerboard(height: int, width: int, cell: int = 8) -> UInt8[np.ndarray, "height width 3"]:
    """White and light grey squares of `cell` pixels; the square at the origin is white.

    The array is read-only (boards are cached): copy it before drawing on it.
    """
    if cell < 1:
        raise ValueError(f"cell = {cell}: please pass a square size of at least 1 pixel")
    return _checkerboard(height, width, cell)


def on_checkerboard(
    rgba: Shaped[np.ndarray, "*batch height width 4"], cell: int = 8
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """A straight-alpha picture over a checkerboard, which makes transparency visible."""
    _check_rgba(rgba, "height width 4", 3)
    board = to_unit(checkerboard(rgba.shape[-3], rgba.shape[-2], cell))
    rgba = to_unit(rgba)
    alpha = rgba[..., 3:]
    return to_uint8(rgba[..., :3] * alpha + board * (1 - alpha))


def _check_rgba(array: Shaped[np.ndarray, "*shape"], wanted: str, axes: int) -> None:
    if array.ndim < axes or array.shape[-1] != 4:
        raise ValueError(f"shape {array.shape}: please pass RGBA as [..., {wanted}]")

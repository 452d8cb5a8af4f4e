"""Fills of procedural designs: scalar fields between two colours.

A texture maps the coordinates of a patch to weights in [0, 1]: 0 is the first colour of a pair, 1
the second. A factory draws the proportions of one texture.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sl_jax.data._draws import Draws
from sl_jax.data._shapes import length


class Patch(NamedTuple):
    """Where a texture is wanted.

    Attributes:
      x, y: float64 [h, w], coordinates in which the object's unit circle has radius 1 (for a
        backdrop: the short side of the canvas has length 2).
      depth: float64 [h, w], signed distance to the outline in the same unit, negative inside.
      pixels: pixels per unit, for antialiasing.
    """

    x: np.ndarray
    y: np.ndarray
    depth: np.ndarray
    pixels: float


Texture = Callable[[Patch], np.ndarray]
TextureFactory = Callable[[Draws], Texture]


def edge(distance: np.ndarray, pixels: float) -> np.ndarray:
    """Coverage in [0, 1] of the inside of an outline, antialiased over one pixel."""
    return np.clip(0.5 - distance * pixels, 0.0, 1.0)


def smooth(t: np.ndarray) -> np.ndarray:
    """The cubic step from 0 to 1 over t in [0, 1]."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def linear(draws: Draws) -> Texture:
    """A gradient along a line."""
    (cosine, sine), reach = draws.direction(), draws.uniform(0.75, 1.1)
    return lambda p: np.clip(0.5 + (p.x * cosine + p.y * sine) / (2.0 * reach), 0.0, 1.0)


def radial(draws: Draws) -> Texture:
    """A gradient outward from a point away from the middle."""
    (cosine, sine), away = draws.direction(), draws.uniform(0.2, 0.7)
    reach = draws.uniform(1.1, 1.6)
    cx, cy = cosine * away, sine * away
    return lambda p: smooth(length(p.x - cx, p.y - cy) / reach)


def waves(draws: Draws) -> Texture:
    """Broad soft bands."""
    (cosine, sine), period, phase = draws.direction(), draws.uniform(0.8, 1.6), draws.unit()

    def weights(p: Patch) -> np.ndarray:
        u = (p.x * cosine + p.y * sine) / period + phase
        return smooth(np.abs(u - np.floor(u) - 0.5) * 2.0)

    return weights


def clouds(draws: Draws) -> Texture:
    """Soft value noise in two octaves."""
    coarse, fine = draws.lattice(8, 8), draws.lattice(8, 8)
    frequency = draws.uniform(1.0, 1.8)
    sx, sy = draws.uniform(0.0, 8.0), draws.uniform(0.0, 8.0)

    def weights(p: Patch) -> np.ndarray:
        u, v = p.x * frequency + sx, p.y * frequency + sy
        low = value_noise(coarse, u, v)
        high = value_noise(fine, u * 2.0, v * 2.0)
        return smooth((low * 0.7 + high * 0.3 - 0.2) / 0.6)

    return weights


def value_noise(lattice: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A lattice of values, repeated over the plane and smoothly interpolated at (u, v)."""
    rows, columns = lattice.shape
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = smooth(u - u0), smooth(v - v0)
    column, row = u0.astype(np.int64) % columns, v0.astype(np.int64) % rows
    column1, row1 = (column + 1) % columns, (row + 1) % rows
    top = lattice[row, column] * (1.0 - fu) + lattice[row, column1] * fu
    bottom = lattice[row1, column] * (1.0 - fu) + lattice[row1, column1] * fu
    return top * (1.0 - fv) + bottom * fv


def split(draws: Draws) -> Texture:
    """Two halves along a line near the middle."""
    (cosine, sine), shift = draws.direction(), draws.uniform(-0.3, 0.3)
    return lambda p: edge(p.x * cosine + p.y * sine - shift, p.pixels)


def rim(draws: Draws) -> Texture:
    """A band along the outline in the second colour."""
    width = draws.uniform(0.12, 0.24)
    return lambda p: edge(-width - p.depth, p.pixels)


def core(draws: Draws) -> Texture:
    """A smaller disc in the second colour inside the shape."""
    (cosine, sine), away, radius = (
        draws.direction(),
        draws.uniform(0.0, 0.3),
        draws.uniform(0.3, 0.5),
    )
    cx, cy = cosine * away, sine * away
    return lambda p: edge(length(p.x - cx, p.y - cy) - radius, p.pixels)


def stripes(draws: Draws) -> Texture:
    """Sharp parallel bars."""
    (cosine, sine), period = draws.direction(), draws.uniform(0.6, 1.0)
    phase, share = draws.unit(), draws.uniform(0.35, 0.6)
    return lambda p: _bars((p.x * cosine + p.y * sine) / period + phase, share, p.pixels * period)


def checks(draws: Draws) -> Texture:
    """A checkerboard at any angle."""
    (cosine, sine), period = draws.direction(), draws.uniform(0.9, 1.4)
    phase_u, phase_v = draws.unit(), draws.unit()

    def weights(p: Patch) -> np.ndarray:
        u = (p.x * cosine + p.y * sine) / period + phase_u
        v = (p.y * cosine - p.x * sine) / period + phase_v
        across, along = _bars(u, 0.5, p.pixels * period), _bars(v, 0.5, p.pixels * period)
        return across + along - 2.0 * across * along

    return weights


def dots(draws: Draws) -> Texture:
    """Discs on a square grid at any angle."""
    (cosine, sine), period = draws.direction(), draws.uniform(0.7, 1.0)
    phase_u, phase_v, radius = draws.unit(), draws.unit(), draws.uniform(0.24, 0.38)

    def weights(p: Patch) -> np.ndarray:
        u = (p.x * cosine + p.y * sine) / period + phase_u
        v = (p.y * cosine - p.x * sine) / period + phase_v
        u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
        return edge(length(u, v) - radius, p.pixels * period)

    return weights


def chevrons(draws: Draws) -> Texture:
    """Zigzag bars."""
    (cosine, sine), period = draws.direction(), draws.uniform(0.7, 1.1)
    phase, slope = draws.unit(), draws.uniform(0.5, 0.9)

    def weights(p: Patch) -> np.ndarray:
        u = (p.y * cosine - p.x * sine) / (2.0 * period)
        zigzag = np.abs(u - np.floor(u) - 0.5) * 2.0 * slope
        v = (p.x * cosine + p.y * sine) / period + zigzag + phase
        return _bars(v, 0.5, p.pixels * period)

    return weights


def grain(draws: Draws) -> Texture:
    """Rough noise of high contrast."""
    lattice, frequency = draws.lattice(16, 16), draws.uniform(2.2, 3.6)

    def weights(p: Patch) -> np.ndarray:
        noise = value_noise(lattice, p.x * frequency, p.y * frequency)
        return np.clip((noise - 0.3) / 0.4, 0.0, 1.0)

    return weights


def _bars(u: np.ndarray, share: float, pixels: float) -> np.ndarray:
    """Antialiased bars of period 1 in `u`, each `share` wide; `pixels` per period."""
    return edge(np.abs(u - np.floor(u) - 0.5) - share / 2.0, pixels)

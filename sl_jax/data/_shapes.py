"""Outlines of procedural designs, as signed distance fields.

A shape is a function of two coordinate arrays that returns, at each point, the distance to the
outline, negative inside. It lies within the unit circle. A factory draws the proportions of one
shape. Distances give antialiased edges, soft shadows and rims alike without a blur.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt

import numpy as np

from sl_jax.data._draws import Draws, circle

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
ShapeFactory = Callable[[Draws], Shape]
Point = tuple[float, float]


def length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean length, rounded alike everywhere (unlike `np.hypot`)."""
    return np.sqrt(x * x + y * y)


def segment(x: np.ndarray, y: np.ndarray, start: Point, end: Point) -> np.ndarray:
    """Unsigned distance to a line segment."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    px, py = x - start[0], y - start[1]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    return length(px - along * ex, py - along * ey)


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to an upright rectangle about the origin."""
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    outside = length(np.maximum(dx, 0.0), np.maximum(dy, 0.0))
    return outside + np.minimum(np.maximum(dx, dy), 0.0)


def polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[Point]) -> np.ndarray:
    """Signed distance to a simple polygon: nearest edge, sign by the even-odd rule."""
    start = np.array(corners)[:, :, None, None]
    end = np.roll(start, -1, axis=0)
    ax, ay, bx, by = start[:, 0], start[:, 1], end[:, 0], end[:, 1]
    ex, ey = bx - ax, by - ay
    px, py = x - ax, y - ay
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    dx, dy = px - along * ex, py - along * ey
    nearest = np.sqrt((dx * dx + dy * dy).min(axis=0))
    rises = by > ay
    crosses = ((ay > y) != (by > y)) & ((ex * py > px * ey) != rises)
    inside = np.logical_xor.reduce(crosses, axis=0)
    return np.where(inside, -nearest, nearest)


def _rounded_polygon(corners: Sequence[Point], radius: float) -> Shape:
    """A polygon shrunk about the origin and grown again by `radius`, which rounds its corners."""
    small = [(cx * (1.0 - radius), cy * (1.0 - radius)) for cx, cy in corners]
    return lambda x, y: polygon(x, y, small) - radius


def disc(draws: Draws) -> Shape:
    """A filled circle."""
    return lambda x, y: length(x, y) - 1.0


def ellipse(draws: Draws) -> Shape:
    """An ellipse, 0.5 to 0.8 as high as wide (first-order distance)."""
    ratio = draws.uniform(0.5, 0.8)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        scaled = length(x, y / ratio)
        slope = length(x, y / (ratio * ratio))
        return scaled * (scaled - 1.0) / (slope + 1e-6)

    return distance


def rounded_rectangle(draws: Draws) -> Shape:
    """A rectangle with rounded corners, 0.5 to 1 as high as wide."""
    ratio, rounding = draws.uniform(0.5, 1.0), draws.uniform(0.1, 0.45)
    width = 0.98 / sqrt(1.0 + ratio * ratio)
    height = width * ratio
    radius = rounding * height
    return lambda x, y: box(x, y, width - radius, height - radius) - radius


def pill(draws: Draws) -> Shape:
    """A bar with round ends."""
    radius = draws.uniform(0.32, 0.5)
    reach = 1.0 - radius
    return lambda x, y: segment(x, y, (-reach, 0.0), (reach, 0.0)) - radius


def ring(draws: Draws) -> Shape:
    """A circle with a round hole."""
    half = draws.uniform(0.2, 0.29)
    return lambda x, y: np.abs(length(x, y) - (1.0 - half)) - half


def regular_polygon(draws: Draws) -> Shape:
    """A triangle, pentagon or hexagon with softened corners."""
    count = draws.choice((3, 3, 5, 6))
    corners = [circle(index / count) for index in range(count)]
    return _rounded_polygon(corners, draws.uniform(0.05, 0.2))


def star(draws: Draws) -> Shape:
    """A star of four to seven points with softened corners."""
    count, waist = draws.choice((4, 5, 5, 6, 7)), draws.uniform(0.48, 0.62)
    corners = []
    for index in range(count):
        corners.append(circle(index / count))
        cosine, sine = circle((index + 0.5) / count)
        corners.append((cosine * waist, sine * waist))
    return _rounded_polygon(corners, draws.uniform(0.04, 0.1))


def arch(draws: Draws) -> Shape:
    """A doorway: a box with a round top, standing upright before rotation."""
    width = draws.uniform(0.5, 0.62)

    middle = width - 0.98

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        walls = np.maximum(np.abs(x) - width, y - 0.78)
        return np.where(y < middle, length(x, y - middle) - width, walls)

    return distance


def cross(draws: Draws) -> Shape:
    """A plus sign."""
    width = draws.uniform(0.27, 0.4)
    return lambda x, y: np.minimum(box(x, y, 0.9, width), box(x, y, width, 0.9))


def crescent(draws: Draws) -> Shape:
    """A disc with a bite taken by another disc."""
    away, radius = draws.uniform(0.45, 0.65), draws.uniform(0.65, 0.8)
    return lambda x, y: np.maximum(length(x, y) - 1.0, radius - length(x - away, y))


def blob(draws: Draws) -> Shape:
    """Three or four discs melted together (polynomial smooth minimum)."""
    count = draws.choice((3, 4))
    discs = []
    for index in range(count):
        cosine, sine = circle((index + draws.uniform(0.0, 0.5)) / count)
        away = draws.uniform(0.3, 0.45)
        discs.append((cosine * away, sine * away, draws.uniform(0.32, 0.48)))

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        melted = _disc_at(x, y, discs[0])
        for other in discs[1:]:
            melted = _melt(melted, _disc_at(x, y, other), 0.3)
        return melted

    return distance


def _disc_at(x: np.ndarray, y: np.ndarray, disc_: tuple[float, float, float]) -> np.ndarray:
    return length(x - disc_[0], y - disc_[1]) - disc_[2]


def _melt(first: np.ndarray, second: np.ndarray, reach: float) -> np.ndarray:
    """The minimum of two distances, rounded off where they differ by less than `reach`."""
    overlap = np.maximum(reach - np.abs(first - second), 0.0)
    return np.minimum(first, second) - overlap * overlap / (4.0 * reach)


def heart(draws: Draws) -> Shape:
    """A square on its corner with a disc on each upper side."""
    side, root = 0.5, 0.7071067811865476
    lift = draws.uniform(0.0, 0.06)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        square = box((x + y) * root, (y - x) * root, side, side)
        lobes = length(np.abs(x) - side * root, y + side * root - lift) - side
        return np.minimum(square, lobes)

    return distance


def flower(draws: Draws) -> Shape:
    """Four to six round petals about a middle."""
    count, radius = draws.choice((4, 5, 6)), draws.uniform(0.36, 0.42)
    away = 0.98 - radius
    petals = [(c * away, s * away, radius) for c, s in (circle(i / count) for i in range(count))]

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest = length(x, y) - 0.5
        for petal in petals:
            nearest = np.minimum(nearest, _disc_at(x, y, petal))
        return nearest

    return distance


def arrow(draws: Draws) -> Shape:
    """A thick arrow."""
    shaft, neck = draws.uniform(0.2, 0.32), draws.uniform(-0.1, 0.2)
    upper = [(0.95, 0.0), (neck, 0.75), (neck, shaft), (-0.88, shaft)]
    corners = upper + [(cx, -cy) for cx, cy in reversed(upper[1:])]
    return _rounded_polygon(corners, draws.uniform(0.02, 0.08))


def bolt(draws: Draws) -> Shape:
    """A lightning bolt."""
    waist = draws.uniform(0.1, 0.22)
    half = [
        (0.35, -0.9),
        (0.05, -waist),
        (0.6, -waist),
        (-0.35, 0.9),
        (-0.05, waist),
        (-0.6, waist),
    ]
    return _rounded_polygon(half, draws.uniform(0.03, 0.1))


# Strokes of letter-like signs in a box of half side 1: runs of joined points.
_SIGNS: tuple[tuple[tuple[Point, ...], ...], ...] = (
    (((-1, -1), (1, -1)), ((0, -1), (0, 1))),
    (((-1, -1), (-1, 1), (1, 1)),),
    (((-1, -1), (-1, 1)), ((1, -1), (1, 1)), ((-1, 0), (1, 0))),
    (((-1, -1), (1, -1), (-1, 1), (1, 1)),),
    (((-1, -1), (0, 1), (1, -1)),),
    (((-1, 1), (-1, -1), (1, 1), (1, -1)),),
    (((1, -1), (-1, -1), (-1, 1), (1, 1)), ((-1, 0), (0.6, 0))),
    (((-1, -1), (-1, 1), (1, 1), (1, -1)),),
)


def sign(draws: Draws) -> Shape:
    """A letter-like sign of thick round strokes."""
    runs, radius = draws.choice(_SIGNS), draws.uniform(0.19, 0.26)
    width = draws.uniform(0.42, 0.56)
    height = 1.0 - radius - 0.22

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest = np.full(x.shape, 9.0)
        for run in runs:
            points = [(cx * width, cy * height) for cx, cy in run]
            for start, end in pairwise(points):
                nearest = np.minimum(nearest, segment(x, y, start, end))
        return nearest - radius

    return distance

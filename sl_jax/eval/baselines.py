"""Decompositions that need no model: the floor under every table.

Each takes a flat picture, uint8 [H, W, 3], and the number of layers L ≥ 1 with the background, and
returns uint8 [L, H, W, 4] straight RGBA, back to front. All three give the picture back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from sl_jax.data.procedural import canonical_order

Baseline = Callable[[np.ndarray, int], np.ndarray]
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


def all_in_background(picture: np.ndarray, layers: int) -> np.ndarray:
    """The picture as background, and L − 1 blank layers."""
    stack = _blank(picture, layers)
    stack[0] = _opaque(picture)
    return stack


def copies(picture: np.ndarray, layers: int) -> np.ndarray:
    """The whole picture, opaque, in every layer."""
    stack = _blank(picture, layers)
    stack[:] = _opaque(picture)
    return stack


def colour_components(
    picture: np.ndarray, layers: int, colours: int = 8, min_area: float = 1 / 256
) -> np.ndarray:
    """Connected areas of one colour as layers, what they hid filled from around.

    The picture is reduced to `colours` colours by median cut. Of its 8-connected components of one
    colour that cover at least `min_area` of the picture, the one with the most pixels on the
    border (then the larger) is the background, and the L − 1 largest others become layers: the
    picture's own colours, opaque, in the canonical order of the procedural designs. Everything
    else stays in the background, whose holes take the colour of the nearest pixel that belongs to
    a large component and to no layer. Layers that find no component stay blank at the end.

    Args:
      colours: size of the median-cut palette, 1..256.
      min_area: smallest share of the picture that a component must cover.

    Source: baseline of this project; palette by Pillow's `quantize`, without dithering.
    """
    stack = all_in_background(picture, layers)
    components = _components(picture, colours, min_area)
    if layers == 1 or len(components) < 2:
        return stack
    background = max(components, key=lambda component: (component.border, component.area))
    movable = [component for component in components if component is not background]
    chosen = sorted(movable, key=lambda component: -component.area)[: layers - 1]
    objects = np.stack([_opaque(picture) * part.mask[..., None] for part in chosen])
    stack[1 : len(chosen) + 1] = objects[list(canonical_order(objects))]

    hole = np.any([component.mask for component in chosen], axis=0)
    solid = np.any([component.mask for component in components], axis=0) & ~hole
    nearest = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
    stack[0][hole] = stack[0][tuple(axis[hole] for axis in nearest)]
    return stack


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "all in background": all_in_background,
        "copies": copies,
        "colour components": colour_components,
    }
)
"""Every baseline by the name that tables give it."""


class _Component(NamedTuple):
    """A connected area: bool [H, W], its pixels, and its pixels on the picture's border."""

    mask: np.ndarray
    area: int
    border: int


def _components(picture: np.ndarray, colours: int, min_area: float) -> list[_Component]:
    palette = Image.fromarray(picture).quantize(
        colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    indices = np.asarray(palette)
    rim = np.ones(indices.shape, bool)
    rim[1:-1, 1:-1] = False
    found = []
    for colour in np.unique(indices):
        labels, _ = ndimage.label(indices == colour, structure=_EIGHT_NEIGHBOURS)
        areas = np.bincount(labels.ravel())
        areas[0] = 0  # what has another colour
        for label in np.flatnonzero(areas >= max(min_area * indices.size, 1)):
            mask = labels == label
            found.append(_Component(mask, int(areas[label]), int((mask & rim).sum())))
    return found


def _blank(picture: np.ndarray, layers: int) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or layers < 1:
        raise ValueError(
            "a baseline needs a uint8 [H, W, 3] picture and at least one layer, got "
            f"{picture.dtype} {list(picture.shape)} and {layers}; please flatten over white first"
        )
    return np.zeros((layers, *picture.shape[:2], 4), np.uint8)


def _opaque(picture: np.ndarray) -> np.ndarray:
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    return np.concatenate([picture, alpha], axis=-1)

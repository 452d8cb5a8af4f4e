"""Elements of a design as full-canvas RGBA layers, and stacks brought to a number of layers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sl_jax import imaging

_BORDER = 2  # transparent pixels around an element: its edges then fade over one pixel
_LARGEST = 4  # times the canvas: the most that an element is resized to


@dataclass(frozen=True, eq=False)
class Element:
    """A picture that is placed on a canvas.

    Attributes:
      picture: uint8 [h, w, 4], straight RGBA, stretched to `width` and `height`.
      left, top: corner of the unrotated picture in canvas pixels, from the canvas's upper left.
      width, height: in canvas pixels, above 0.
      angle: degrees, clockwise, about the picture's centre.
      opacity: factor of its alpha, 0 to 1.
    """

    picture: UInt8[np.ndarray, "h w 4"]
    left: float
    top: float
    width: float
    height: float
    angle: float = 0.0
    opacity: float = 1.0


def place(
    element: Element, canvas: tuple[float, float], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 4"]:
    """An element as a layer.

    Args:
      element: what to place.
      canvas: (height, width) of the design, in its own pixels.
      size: (height, width) of the layer, in pixels; the canvas is stretched to it.

    Returns:
      uint8 [height, width, 4], straight RGBA; transparent outside of the element.
    """
    down, across = size[0] / canvas[0], size[1] / canvas[1]
    picture = _fitted(
        element.picture, element.height * down, element.width * across, _LARGEST * max(size)
    )
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)), mode="edge")
    for rim in (padded[:_BORDER], padded[-_BORDER:], padded[:, :_BORDER], padded[:, -_BORDER:]):
        rim[..., 3] = 0
    # From a point of the layer back to one of the picture.
    centre = (element.left + element.width / 2, element.top + element.height / 2)
    back = (
        _moved(_BORDER, _BORDER)
        @ _scaled(width / element.width, height / element.height)
        @ _moved(element.width / 2, element.height / 2)
        @ _turned(-np.deg2rad(element.angle))
        @ _moved(-centre[0], -centre[1])
        @ _scaled(1 / across, 1 / down)
    )
    placed = Image.fromarray(padded).transform(
        (size[1], size[0]),
        Image.Transform.AFFINE,
        tuple(back[:2].ravel().tolist()),
        Image.Resampling.BILINEAR,
    )
    layer = np.array(placed)
    layer[..., 3] = np.rint(layer[..., 3] * np.clip(element.opacity, 0.0, 1.0))
    layer[layer[..., 3] == 0] = 0
    return layer


def as_stack(
    layers: Sequence[UInt8[np.ndarray, "h w 4"]], size: tuple[int, int]
) -> UInt8[np.ndarray, "l h w 4"]:
    """Placed elements, back to front, as a stack with an opaque background.

    The canvas is white. Layers that are all transparent are left out, and so are those below an
    opaque one that fills the canvas, which nobody sees. What then lies lowest is the background: on
    its own where it covers the whole canvas (alpha > 0 everywhere), painted on the white;
    otherwise the white is the background. The stack recomposes to the picture of all the elements.

    Args:
      layers: uint8 [h, w, 4] each, straight RGBA.
      size: (height, width).
    """
    shown = [layer for layer in layers if layer[..., 3].any()]
    for position in reversed(range(len(shown))):
        if (shown[position][..., 3] == 255).all():
            shown = shown[position:]
            break
    white = np.full((*size, 4), 255, np.uint8)
    if shown and (shown[0][..., 3] > 0).all():
        white[..., :3] = imaging.recompose(shown[0][None])
        shown = shown[1:]
    return np.stack([white, *shown])


def merge_to(layers: UInt8[np.ndarray, "l h w 4"], most: int) -> UInt8[np.ndarray, "capped h w 4"]:
    """A stack of at most so many layers, which recomposes to the same picture.

    As long as there are too many, the two neighbours above the background that cover the least
    together (pixels with alpha > 0 in either; of equals the lower) become one layer. With `most` 1
    all becomes the background.

    Args:
      layers: straight RGBA, back to front.
      most: at least 1.

    Raises:
      ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"a stack cannot be merged to {most} layers; please use 1 or more")
    stack = list(layers)
    if most == 1:
        stack = [_merged(stack)] if len(stack) > 1 else stack
    covers = [layer[..., 3] > 0 for layer in stack]
    while len(stack) > most:
        areas = [np.count_nonzero(lower | upper) for lower, upper in itertools.pairwise(covers[1:])]
        lower = 1 + int(np.argmin(areas))
        stack[lower : lower + 2] = [_merged(stack[lower : lower + 2])]
        covers[lower : lower + 2] = [covers[lower] | covers[lower + 1]]
    return np.stack(stack)


def content_hash(pixels: UInt8[np.ndarray, "*shape"]) -> str:
    """SHA-256 of a picture's or a stack's shape and pixels, in hexadecimal."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _merged(layers: Sequence[np.ndarray]) -> np.ndarray:
    return np.rint(imaging.over(np.stack(layers)) * 255).astype(np.uint8)


def _fitted(picture: np.ndarray, height: float, width: float, longest: int) -> np.ndarray:
    """The picture about as large as it will be shown: placing it then skips or spreads no pixels.

    Of an element far larger than the canvas little is seen; it is kept to `longest`.
    """
    size = tuple(min(max(round(length), 1), longest) for length in (height, width))
    if size == picture.shape[:2]:
        return picture
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image)


def _moved(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _scaled(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def _turned(radians: float) -> np.ndarray:
    """Clockwise where y grows downwards."""
    cos, sin = np.cos(radians), np.sin(radians)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float64)

"""Layers of Photoshop documents, read as full-canvas RGBA."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from psd_tools import PSDImage
from psd_tools.api.adjustments import AdjustmentLayer
from psd_tools.constants import BlendMode

from sl_jax.data.canvas import as_stack
from sl_jax.data.pictures import PictureError, PictureLimits, check_file, reason_of
from sl_jax.imaging.decoding import DECODER_ERRORS

_DEFAULT_LIMITS = PictureLimits()
_PLAIN = (BlendMode.NORMAL, BlendMode.PASS_THROUGH)
_MOST_PIXELS = 2**29  # of all layers together; two gigabytes


class PsdInfo(NamedTuple):
    """A document that can be used.

    Attributes:
      height, width: of the canvas in pixels.
      layers: number of layers that `open_psd` returns.
      content_hash: SHA-256 of the file, in hexadecimal.
    """

    height: int
    width: int
    layers: int
    content_hash: str


def open_psd(
    path: str | os.PathLike[str], limits: PictureLimits = _DEFAULT_LIMITS
) -> UInt8[np.ndarray, "layers height width 4"]:
    """The visible layers of a document, back to front, the background first (`canvas.as_stack`).

    Groups are opened; the opacity of one with a single layer counts for that. Masks of pixels,
    clipping and shapes of layers are drawn as psd-tools draws them. A document whose layers do not
    simply lie over one another (another blend mode than Normal, an adjustment; a group with a mask,
    effects or clipped layers, or one that lets through what is below several layers) is refused: no
    stack of plain layers is that picture.

    Args:
      path: local or remote (gs://…).
      limits: what to refuse.

    Returns:
      uint8 [L, H, W, 4], straight RGBA.

    Raises:
      PictureError: the document cannot be read or has no such layers; says why.
    """
    return _layers(path, _read(path, limits), limits)


def psd_info(path: str | os.PathLike[str], limits: PictureLimits = _DEFAULT_LIMITS) -> PsdInfo:
    """What `open_psd` would return, after it has been tried.

    Raises:
      PictureError: as `open_psd`.
    """
    content = _read(path, limits)
    layers = _layers(path, content, limits)
    return PsdInfo(*layers.shape[1:3], len(layers), hashlib.sha256(content).hexdigest())


def _read(path: str | os.PathLike[str], limits: PictureLimits) -> bytes:
    try:
        check_file(path, limits)
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise PictureError(path, reason_of(error)) from error


def _layers(path: str | os.PathLike[str], content: bytes, limits: PictureLimits) -> np.ndarray:
    try:
        document = PSDImage.open(io.BytesIO(content))
        _check_canvas(path, document, limits)
        size = document.height, document.width
        leaves = list(_leaves(document, 1.0))
        _check_layers([layer for layer, _ in leaves], size, limits)
        drawn = [_drawn(layer, opacity, size) for layer, opacity in leaves]
    except PictureError:
        raise
    except _Refused as error:
        raise PictureError(path, str(error)) from error
    except DECODER_ERRORS as error:
        raise PictureError(path, f"no readable Photoshop document: {reason_of(error)}") from error
    if not drawn:
        raise PictureError(path, "it has no visible layers")
    return as_stack(drawn, size)


class _Refused(ValueError):
    """A layer that no plain layer stands for."""


def _check_canvas(path: str | os.PathLike[str], document: Any, limits: PictureLimits) -> None:
    pixels, short = document.width * document.height, min(document.width, document.height)
    if pixels > limits.max_pixels or short < limits.min_side:
        raise PictureError(path, f"its canvas of {document.width}x{document.height} is no picture")


def _check_layers(layers: Sequence[Any], size: tuple[int, int], limits: PictureLimits) -> None:
    """Refuses, before anything is unpacked, what would take more memory than any use of it."""
    if len(layers) * size[0] * size[1] > _MOST_PIXELS:
        raise _Refused(f"its {len(layers)} layers have more than {_MOST_PIXELS} pixels together")
    for layer in layers:
        if layer.width * layer.height > limits.max_pixels:
            raise _Refused(f"layer {layer.name!r} declares {layer.width}x{layer.height} pixels")


def _leaves(group: Any, opacity: float) -> Iterator[tuple[Any, float]]:
    """Visible layers without children, back to front, with the opacity of their groups."""
    for layer in group:
        if not layer.visible or layer.clipping:  # clipped ones are drawn with their base
            continue
        if layer.blend_mode not in _PLAIN:
            raise _Refused(f"layer {layer.name!r} blends as {layer.blend_mode.name.lower()}")
        if isinstance(layer, AdjustmentLayer):
            raise _Refused(f"layer {layer.name!r} adjusts those below ({layer.kind})")
        if layer.is_group():
            leaves = list(_leaves(layer, opacity * layer.opacity / 255))
            if problem := _of_the_whole(layer, len(leaves)):
                raise _Refused(f"group {layer.name!r} {problem}")
            yield from leaves
        else:
            yield layer, opacity


def _of_the_whole(group: Any, leaves: int) -> str | None:
    """What a group does to all its layers together, so that none of them shows it alone."""
    if group.has_mask() or group.has_vector_mask():
        return "is masked"
    if group.has_effects():
        return "has effects"
    if group.has_clip_layers():
        return "has layers clipped to it"
    if group.opacity < 255 and leaves > 1:
        return f"fades {leaves} layers as one"
    return None


def _drawn(
    layer: Any, opacity: float, size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 4"]:
    """One layer on the whole canvas; `opacity` is that of its groups."""
    height, width = size
    canvas = Image.new("RGBA", (width, height))
    plain = layer.kind == "pixel" and not (
        layer.has_mask()
        or layer.has_vector_mask()
        or layer.has_effects()
        or layer.has_clip_layers()
    )
    if plain:
        picture = layer.topil(apply_icc=False) if layer.has_pixels() else None
        if picture is not None:
            canvas.paste(picture.convert("RGBA"), (layer.left, layer.top))
        opacity *= layer.opacity / 255 * layer.fill_opacity / 255
    else:
        picture = layer.composite(viewport=(0, 0, width, height), force=True, apply_icc=False)
        canvas = canvas if picture is None else picture.convert("RGBA")
    pixels = np.array(canvas)
    pixels[..., 3] = np.rint(pixels[..., 3] * opacity)
    return pixels

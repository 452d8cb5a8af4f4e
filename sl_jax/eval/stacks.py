"""Stacks of layers as folders of PNG files in the LayerD layout: 0000.png, 0001.png, …"""

from __future__ import annotations

import io
import re

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sl_jax.data.pictures import PictureError, PictureLimits, has_alpha, open_rgba, shown

# Any shape that a model is shown at 640 pixels: the short side is then 16 or more.
LIMITS = PictureLimits(min_side=1, max_aspect=40.0)
_LAYER = re.compile(r"(\d+)\.png", re.IGNORECASE)


class StackError(ValueError):
    """A folder that is no stack of layers; the message says why, in a few words."""


def read_stack(folder: epath.PathLike) -> UInt8[np.ndarray, "l h w 4"]:
    """The layers in a folder, straight RGBA, back to front.

    Raises:
      StackError: there is no folder, a number is missing, a file cannot be read or has another
        size, or a layer above the background has no alpha channel.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise StackError("there is no such folder")
    files = {
        int(match[1]): path for path in folder.iterdir() if (match := _LAYER.fullmatch(path.name))
    }
    if not files:
        raise StackError("no layers in it; they should be named 0000.png, 0001.png, …")
    if missing := sorted(set(range(len(files))) - set(files)):
        raise StackError(f"layer {missing[0]:04d}.png is missing")
    layers = []
    for number in range(len(files)):
        layers.append(_layer(files[number], number))
        if layers[-1].shape != layers[0].shape:
            raise StackError(
                f"{shown(files[number].name)} is {_size(layers[-1])}, and {files[0].name} "
                f"{_size(layers[0])}"
            )
    return np.stack(layers)


def check_alpha(path: epath.PathLike) -> None:
    """Makes sure that a file of a layer above the background has an alpha channel.

    Without one the layer would hide everything behind it.

    Raises:
      StackError: it has none, or cannot be read.
    """
    name = shown(epath.Path(path).name)
    try:
        transparent = has_alpha(path, LIMITS)
    except PictureError as error:
        raise StackError(f"{name}: {error.reason}") from error
    if not transparent:
        raise StackError(f"{name} has no alpha; layers above the background should be RGBA")


def write_stack(folder: epath.PathLike, layers: UInt8[np.ndarray, "l h w 4"]) -> None:
    """Writes layers as `read_stack` reads them; files of an earlier stack are removed."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _LAYER.fullmatch(path.name):
            path.unlink()
    for number, layer in enumerate(layers):
        content = io.BytesIO()
        Image.fromarray(layer).save(content, "PNG", compress_level=3)
        (folder / f"{number:04d}.png").write_bytes(content.getvalue())


def _layer(path: epath.Path, number: int) -> UInt8[np.ndarray, "h w 4"]:
    if number:
        check_alpha(path)
    try:
        return open_rgba(path, LIMITS)
    except PictureError as error:
        raise StackError(f"{shown(path.name)}: {error.reason}") from error


def _size(layer: np.ndarray) -> str:
    return f"{layer.shape[1]}×{layer.shape[0]}"

"""Procedural designs as files: flat pictures to train on without layers, or layered folders."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from PIL import Image

from sl_jax.data.procedural import make_design


def write_designs(
    folder: str | os.PathLike[str],
    family: str,
    seeds: Iterable[int],
    size: int | tuple[int, int],
    layers: int | Sequence[int],
    *,
    with_layers: bool = False,
) -> tuple[str, ...]:
    """Fills a folder with procedural designs.

    Flat pictures are written as PNG and JPEG in turn, as picture folders hold both. With
    `with_layers` each design is a folder of its layers as PNG, which `LayeredFolder` reads.

    Args:
      folder: local or remote; made if it is not there. Files of the same names are overwritten.
      family: a key of `procedural.FAMILIES`.
      seeds: one design each; the name of a design holds its family and its seed.
      size: side in pixels, or (height, width).
      layers: number of layers with the background, or several numbers to take in turn.
      with_layers: write the layers, not the flat picture.

    Returns:
      The paths of the pictures, or of the designs' folders.

    Raises:
      ValueError: as `make_design`.
    """
    root = epath.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    counts = (layers,) if isinstance(layers, int) else tuple(layers)
    written = []
    for position, seed in enumerate(seeds):
        design = make_design(family, seed, size, counts[position % len(counts)])
        path = root / f"{family}-{seed:06d}"
        if with_layers:
            path.mkdir(parents=True, exist_ok=True)
            for number, layer in enumerate(design.layers):
                (path / f"{number:04d}.png").write_bytes(_encoded(layer, "PNG"))
        else:
            encoding = "JPEG" if position % 2 else "PNG"
            path = root / f"{path.name}.{'jpg' if position % 2 else 'png'}"
            path.write_bytes(_encoded(design.flat, encoding))
        written.append(os.fspath(path))
    return tuple(written)


def _encoded(pixels: np.ndarray, encoding: str) -> bytes:
    buffer = io.BytesIO()
    # quality and subsampling are JPEG's; PNG ignores them.
    Image.fromarray(pixels).save(buffer, encoding, quality=95, subsampling=0)
    return buffer.getvalue()

"""The folder that a decomposed picture leaves: PNGs named as in the release, a PSD and a JSON.

source.png      the picture as the model saw it
composite.png   all layers together again, to compare with it
layer_0.png …   layers, back to front; 0 is the background
layers.psd      the same as layers of a Photoshop document, with transparency
layers.json     how they were made, and what is on each layer; written last
"""

import io
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sl_jax.checkpoints.disk import write_whole
from sl_jax.checkpoints.psd import save_psd
from sl_jax.imaging import (
    bounding_box,
    coverage,
    flatten,
    is_blank,
    l1,
    over,
    psnr,
    recompose,
    to_uint8,
)
from sl_jax.imaging.words import readable_json

RECORD = "layers.json"

_FILE = re.compile(r"source\.png|composite\.png|layer_\d+\.png|layers\.psd|\.layers\.json\.partial")
_LAYER_FOLDER = re.compile(r"layer_\d+")

_log = logging.getLogger(__name__)


def write_outputs(
    folder: epath.PathLike,
    source: UInt8[np.ndarray, "h w 4"],
    layers: UInt8[np.ndarray, "l h w 4"],
    record: Mapping[str, Any],
    *,
    transparent: bool,
) -> None:
    """Writes all files of one picture; an interrupted call leaves no `layers.json`.

    Args:
        folder: made if needed; see `clear_outputs` for one with an earlier decomposition.
        source: the frame that was decomposed.
        layers: straight RGBA, back to front.
        record: what to put into `layers.json` besides the description of the layers.
        transparent: layers and composite keep their alpha in the PNGs; otherwise they lie on white.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    opaque = bool((source[..., 3] == 255).all())
    _save_png(folder / "source.png", source[..., :3] if opaque else source)
    together = to_uint8(over(layers)) if transparent else recompose(layers)
    _save_png(folder / "composite.png", together)
    names = layer_names(len(layers))
    for name, layer in zip(names, layers, strict=True):
        _save_png(folder / f"{name}.png", layer if transparent else flatten(layer))
    save_psd(folder / "layers.psd", layers, names)
    content = dict(record) | description(source, layers)
    write_whole(folder / RECORD, readable_json(content, indent=2) + "\n")


def clear_outputs(folder: epath.PathLike) -> None:
    """Removes what `write_outputs` left in a folder, and in those of layers in it.

    Other files stay, with the folders that they are in.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        return
    (folder / RECORD).unlink(missing_ok=True)  # from here on it is not complete
    for path in list(folder.iterdir()):
        if _LAYER_FOLDER.fullmatch(path.name) and path.is_dir():
            clear_outputs(path)
        elif _FILE.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def read_record(folder: epath.PathLike) -> dict[str, Any] | None:
    """The content of `layers.json`; None if there is none, or a damaged one, which warns."""
    path = epath.Path(folder) / RECORD
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        _log.warning("%s is damaged (%s); the picture is decomposed again", path, error)
        return None
    return content if isinstance(content, dict) else None


def layer_names(count: int) -> list[str]:
    """Names of layers in PSDs, and of PNGs without ending."""
    return [f"layer_{index}" for index in range(count)]


def description(
    source: UInt8[np.ndarray, "h w 4"], layers: UInt8[np.ndarray, "l h w 4"]
) -> dict[str, Any]:
    """What `layers.json` says about the result.

    Returns:
        `width` and `height` in pixels; `layers`, one entry each, with `file`, `coverage` (share of
        visible pixels, 0 to 1), `bounding_box` of the visible pixels (left, top, right, bottom,
        ends exclusive; null if there are none) and `blank` (next to nothing visible); and
        `recomposition`, the difference of all layers together from the source, both over white:
        `l1` (mean, 0 to 1) and `psnr` (dB; null if there is none).
    """
    shown, seen = recompose(layers), flatten(source)
    ratio = psnr(shown, seen)
    return {
        "width": layers.shape[2],
        "height": layers.shape[1],
        "layers": [
            {
                "file": f"{name}.png",
                "coverage": float(coverage(layer[..., 3])),
                "bounding_box": _box(layer[..., 3]),
                "blank": bool(is_blank(layer[..., 3])),
            }
            for name, layer in zip(layer_names(len(layers)), layers, strict=True)
        ],
        "recomposition": {"l1": l1(shown, seen), "psnr": ratio if np.isfinite(ratio) else None},
    }


def _box(alpha: UInt8[np.ndarray, "h w"]) -> dict[str, int] | None:
    box = bounding_box(alpha)
    if box is None:
        return None
    top, left, bottom, right = box
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def _save_png(path: epath.Path, pixels: UInt8[np.ndarray, "h w c"]) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    path.write_bytes(content.getvalue())

"""Layers as a Photoshop document, which image editors open as a stack of real layers."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from psd_tools import PSDImage

from sl_jax.imaging import recompose


class _Document(PSDImage):
    """A document that is saved with the merged picture it was made from.

    psd-tools would render another one, which leaves the transparency of RGB documents out.
    """

    def is_updated(self) -> bool:
        return False


def save_psd(
    path: epath.PathLike, layers: UInt8[np.ndarray, "l h w 4"], names: Sequence[str]
) -> None:
    """Writes a stack, back to front, as pixel layers with transparency.

    Every layer covers the whole canvas and keeps its pixels exactly, those of alpha 0 too. The
    merged picture, which previews show, is the stack over white.

    Args:
        path: local or remote (gs://…).
        layers: straight RGBA, back to front; at most 30,000 pixels a side, the format's limit.
        names: one per layer, any text of up to 255 characters.

    Raises:
        ValueError: not one name per layer.
    """
    document = _Document.frompil(Image.fromarray(recompose(layers)))
    for layer, name in zip(layers, names, strict=True):
        # Set afterwards: the setter stores any text, the constructor MacRoman only.
        document.create_pixel_layer_from_array(layer).name = name
    content = io.BytesIO()
    document.save(content)
    epath.Path(path).write_bytes(content.getvalue())

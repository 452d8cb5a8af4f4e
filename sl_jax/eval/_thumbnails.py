"""Pictures small enough to travel inside a page, as data URLs."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_LOSSLESS_PIXELS = 128 * 128  # up to this size PNG costs little


def data_url(picture: np.ndarray, max_side: int) -> str:
    """A picture as a data URL, its longer side reduced to at most `max_side` pixels.

    PNG up to 128 × 128, above it JPEG for opaque pictures and WebP for those with alpha.

    Args:
      picture: uint8 [H, W, 3] or straight RGBA [H, W, 4].
      max_side: pixels; smaller pictures keep their size.
    """
    if picture.shape[-1] == 4 and picture[..., 3].min() == 255:
        picture = picture[..., :3]
    image = _reduced(Image.fromarray(np.ascontiguousarray(picture)), max_side)
    if image.width * image.height <= _LOSSLESS_PIXELS:
        data, kind = _encode(image, "PNG", optimize=True), "png"
    elif image.mode == "RGB":
        data, kind = _encode(image, "JPEG", quality=88), "jpeg"
    else:
        data, kind = _encode(image, "WEBP", quality=82, alpha_quality=90, method=2), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _reduced(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.size)
    # Pillow scales RGBA premultiplied, so colours under alpha 0 do not shine through at edges.
    return image.resize(size, Image.Resampling.LANCZOS)


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()

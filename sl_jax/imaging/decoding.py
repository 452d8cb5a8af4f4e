"""What decoding pictures of unknown origin has to reckon with."""

import struct
import zlib

from PIL import Image, ImageCms

# What parsers of pictures and documents raise on hostile bytes. There is no common base class
# below Exception.
DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    ImageCms.PyCMSError,
    struct.error,
    zlib.error,
)

# A progressive JPEG is decoded once per scan; encoders write about ten.
_MAX_JPEG_SCANS = 200


def check_scans(image: Image.Image) -> None:
    """Refuses JPEGs whose thousands of scans would each be a pass over the whole picture.

    Args:
        image: opened, and not decoded yet.

    Raises:
        ValueError: it is such a one.
    """
    if image.format not in ("JPEG", "MPO"):
        return
    file = image.fp
    position = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while chunk := file.read(1 << 20):
        # The marker FF DA cannot occur inside compressed data, where FF is always stuffed.
        scans += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:]
    file.seek(position)
    if scans > _MAX_JPEG_SCANS:
        raise ValueError(f"{scans} scans in a JPEG, at most {_MAX_JPEG_SCANS} are read")

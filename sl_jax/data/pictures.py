"""Reading one picture file into uint8 pixels, whatever it holds and however broken it is.

Every way a file can fail ends in a `PictureError` that names the file and the reason. Size limits
are checked against the header, before any pixel is decoded, so a small file that declares a huge
picture costs nothing. Of an animation or a multi-page file the first frame counts. ICC profiles
are not applied.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

from sl_jax.imaging.decoding import DECODER_ERRORS, check_scans
from sl_jax.imaging.words import printable

Result = TypeVar("Result")

# Pillow refuses twice its MAX_IMAGE_PIXELS by itself; no limit of ours may promise more.
_PILLOW_CEILING = 2 * 89_478_485

# Formats that Pillow lists but that are not read here: EPS and WMF run another program, FITS is
# unpacked without a bound by some versions of Pillow, the others have no decoder at all.
_NOT_READ = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})

# Formats with a signature that cannot be met by chance; only these are tried on a file whose name
# does not claim to be a picture.
_UNMISTAKABLE = frozenset(
    {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "TIFF", "WEBP"}
)

# Larger files are not held as a whole, since many threads read at a time.
_HELD_BYTES = 32 * 2**20

# Pictures above this many pixels are decoded one after another by one thread of their own. That
# bounds the memory of all threads; a lock would not: allocators keep freed memory per thread.
_LARGE_PIXELS = 16_000_000
_large_reader = ThreadPoolExecutor(1, thread_name_prefix="large-pictures")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


class PictureError(ValueError):
    """A file that is not used as a picture.

    Attributes:
      path: the file, as it was given.
      reason: why, in a few words on one line.
      unidentified: True if the file is in no format that is read here at all.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, *, unidentified: bool = False):
        super().__init__(f"{shown(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason
        self.unidentified = unidentified


@dataclass(frozen=True)
class PictureLimits:
    """What counts as an absurd picture.

    Attributes:
      max_pixels: largest width × height that a header may declare, at most 178,956,970.
      min_side: shortest side, in pixels, that is accepted.
      max_aspect: longest over shortest side.
      max_bytes: largest file.
    """

    max_pixels: int = 64_000_000
    min_side: int = 16
    max_aspect: float = 4.0
    max_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _PILLOW_CEILING:
            raise ValueError(
                f"max_pixels = {self.max_pixels}; please use 1 to {_PILLOW_CEILING}, "
                "above which Pillow refuses to read"
            )
        if self.min_side < 1:
            raise ValueError(f"min_side = {self.min_side}; please use 1 or more")
        if not self.max_aspect >= 1:
            raise ValueError(f"max_aspect = {self.max_aspect}; please use 1.0 or more")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes = {self.max_bytes}; please use 1 or more")


_DEFAULT_LIMITS = PictureLimits()


@dataclass(frozen=True)
class FetchedFile:
    """A file that is read once, though more than one thing is asked about it; see `fetch_file`.

    Attributes:
      path: the file, as it was given.
      content: its bytes; None where they are too many to be held.
    """

    path: str | os.PathLike[str]
    content: bytes | None

    @functools.cached_property
    def sha256(self) -> str:
        """Of the bytes, in hexadecimal.

        Raises:
          PictureError: the file cannot be read any more.
        """
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        try:
            with epath.Path(self.path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise PictureError(self.path, reason_of(error)) from error


Source = str | os.PathLike[str] | FetchedFile


def fetch_file(
    path: str | os.PathLike[str], limits: PictureLimits = _DEFAULT_LIMITS
) -> FetchedFile:
    """Reads a whole file, in one request if it is remote, for the functions below.

    Raises:
      PictureError: it cannot be read, or is larger than the limits allow.
    """
    try:
        small = check_file(path, limits) <= _HELD_BYTES
        return FetchedFile(path, epath.Path(path).read_bytes() if small else None)
    except OSError as error:
        raise PictureError(path, reason_of(error)) from error


def open_picture(
    path: Source, limits: PictureLimits = _DEFAULT_LIMITS
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads a picture as RGB: upright by its EXIF orientation, alpha flattened over white.

    16-bit greys are scaled to 8 bits with rounding. 32-bit integers and floats, whose files do not
    say what white is, are taken as 0…1, 0…255 or 0…65535, whichever is the first to hold all their
    values, else stretched from their smallest to their largest value. CMYK is converted without
    its profile.

    Args:
      path: a local or remote (gs://…) file, fetched or not, in any format that Pillow reads,
        except EPS and WMF (which run another program) and FITS.
      limits: what to refuse.

    Returns:
      uint8 [H, W, 3], writable, contiguous.

    Raises:
      PictureError: the file cannot be read, is not a picture, or is outside the limits.
    """

    def rgb(image: Image.Image) -> np.ndarray:
        return _pixels(image, _over_white(_eight_bit(image)))

    return _read(path, limits, lambda image: _decode(image, rgb))


def open_rgba(
    path: Source, limits: PictureLimits = _DEFAULT_LIMITS
) -> UInt8[np.ndarray, "height width 4"]:
    """Reads a picture as straight RGBA; alpha is 255 where the file has none.

    Arguments, conversions and errors are those of `open_picture`.
    """
    return _read(path, limits, lambda image: _decode(image, to_rgba))


def has_alpha(path: Source, limits: PictureLimits = _DEFAULT_LIMITS) -> bool:
    """Whether a picture can hold transparency, by its header.

    Raises:
      PictureError: as `open_picture`.
    """
    return _read(path, limits, lambda image: image.has_transparency_data)


def to_rgba(image: Image.Image) -> UInt8[np.ndarray, "height width 4"]:
    """The pixels of an image in memory, by the conversions of `open_rgba`."""
    return _pixels(image, _eight_bit(image).convert("RGBA"))


def picture_size(
    path: Source,
    limits: PictureLimits = _DEFAULT_LIMITS,
    *,
    decode: bool = False,
    trust_name: bool = True,
) -> tuple[int, int]:
    """(height, width) of a picture as `open_picture` would return it.

    Args:
      path: the file.
      limits: what to refuse.
      decode: also decode the pixels, which finds truncated and corrupt files. It costs about 10 ms
        a megapixel, less for JPEG; without it only the header is read.
      trust_name: False tries only formats whose signature cannot be met by chance: for files whose
        name does not say that they are pictures.

    Raises:
      PictureError: as `open_picture`.
    """

    def upright_size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if decode:
            # JPEGs unpack to an eighth of their size: as thorough, faster, and small.
            image.draft(None, (width // 8, height // 8))
            orientation = _decode(image, functools.partial(_orientation, whole=True))
        else:
            # PNG's own method would decode the whole picture to look for a late EXIF chunk.
            orientation = _orientation(image, whole=False)
        return (width, height) if orientation >= 5 else (height, width)

    return _read(path, limits, upright_size, trust_name=trust_name)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for messages: bytes that are not UTF-8 and control characters are escaped."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def check_file(path: str | os.PathLike[str], limits: PictureLimits = _DEFAULT_LIMITS) -> int:
    """Size in bytes of a file that may be opened: a pipe, for one, would block.

    Raises:
      PictureError: it is none, is empty, or is larger than the limits allow.
      OSError: it cannot be looked at.
    """
    if "://" in os.fspath(path):
        size = epath.Path(path).stat().length
    else:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise PictureError(path, "a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(path, "not a regular file")
        size = status.st_size
    if size == 0:
        raise PictureError(path, "empty file (0 bytes)")
    if size > limits.max_bytes:
        raise PictureError(path, f"{size} bytes; the limit max_bytes is {limits.max_bytes}")
    return size


def reason_of(error: BaseException) -> str:
    """One line for a decoder's or the file system's error."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "declares more pixels than Pillow decodes"
    if isinstance(error, MemoryError):
        return "too little memory to decode it"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = " ".join(printable(str(error) or type(error).__name__).split())
    return f"cannot be decoded: {text[:160]}"


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Lower-case file name endings, with the dot, that claim to be a picture."""
    Image.init()
    containers = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF"}
    pillow = {end for end, name in Image.registered_extensions().items() if name not in containers}
    # Not read, but named among the skipped rather than passed over in silence.
    others = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr"}
    return frozenset(pillow | others)


def resize_to(
    picture: UInt8[np.ndarray, "height width channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resizes to (height, width) with LANCZOS, stretching and never cropping.

    Args:
      picture: uint8 [H, W, 3], or straight RGBA [H, W, 4] (filtered premultiplied, so that no
        colour bleeds out of transparent pixels).
      size: (height, width), each at least 1.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image, np.uint8)


def area_size(height: int, width: int, area: int = 640 * 640) -> tuple[int, int]:
    """(height, width) near a given area at the picture's aspect ratio, in multiples of 32.

    The rule of the Qwen-Image-Layered pipeline of diffusers (its areas are 640² and 1024²), but a
    side is never below 32.
    """
    ratio = width / height
    ideal_width = math.sqrt(area * ratio)
    return _multiple(ideal_width / ratio, 32), _multiple(ideal_width, 32)


def longest_side_size(height: int, width: int, side: int = 640) -> tuple[int, int]:
    """(height, width) with the longest side `side`, in multiples of 16 and at least 16.

    The rule of the Stable-Layers release.
    """
    scale = side / max(height, width)
    return _multiple(height * scale, 16), _multiple(width * scale, 16)


def _multiple(length: float, unit: int) -> int:
    """Nearest multiple by Python's `round` (halves to even), at least one unit."""
    return max(round(length / unit), 1) * unit


@functools.cache
def _formats(trust_name: bool) -> tuple[str, ...]:
    Image.init()
    return tuple(
        name for name in Image.ID if name not in _NOT_READ and (trust_name or name in _UNMISTAKABLE)
    )


def _read(
    source: Source,
    limits: PictureLimits,
    use: Callable[[Image.Image], Result],
    *,
    trust_name: bool = True,
) -> Result:
    """Hands the opened image to `use` if it is within its limits; all errors are PictureErrors."""
    path = source.path if isinstance(source, FetchedFile) else source
    try:
        with (
            _open_file(source, limits) as file,
            Image.open(file, formats=_formats(trust_name)) as image,
        ):
            _check_size(path, image, limits)
            return use(image)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        reason = "not a picture in a format that is read here"
        raise PictureError(path, reason, unidentified=True) from error
    except DECODER_ERRORS as error:
        raise PictureError(path, reason_of(error)) from error


def _open_file(source: Source, limits: PictureLimits) -> BinaryIO:
    path = source
    if isinstance(source, FetchedFile):
        if source.content is not None:
            return io.BytesIO(source.content)
        path = source.path
    check_file(path, limits)
    return epath.Path(path).open("rb")


def _decode(image: Image.Image, use: Callable[[Image.Image], Result]) -> Result:
    """Decodes the pixels, hands the image to `use`, and frees them."""

    def run() -> Result:
        try:
            image.load()
            return use(image)
        finally:
            image.close()  # now, not when the caller lets go of the image

    check_scans(image)
    large = math.prod(image.size) > _LARGE_PIXELS
    return _large_reader.submit(run).result() if large else run()


def _check_size(path: str | os.PathLike[str], image: Image.Image, limits: PictureLimits) -> None:
    width, height = image.size
    short, long = sorted((width, height))
    if width * height > limits.max_pixels:
        raise PictureError(
            path, f"declares {width}x{height} pixels; the limit max_pixels is {limits.max_pixels}"
        )
    if short < limits.min_side:
        raise PictureError(
            path, f"{width}x{height} pixels; the limit min_side is {limits.min_side}"
        )
    if long > short * limits.max_aspect:
        raise PictureError(
            path,
            f"{width}x{height} is {long / short:.1f}:1; the limit max_aspect is "
            f"{limits.max_aspect:g}",
        )


def _orientation(image: Image.Image, *, whole: bool) -> int:
    """EXIF orientation 1 … 8; 1 where the EXIF block is missing, broken or out of range."""
    try:
        exif = image.getexif() if whole else Image.Image.getexif(image)
        value = exif.get(_ORIENTATION_TAG, 1)
    except DECODER_ERRORS:
        return 1
    # Pillow turns TIFFs itself, and reports their size as already turned.
    if image.format == "TIFF" or not isinstance(value, int) or not 1 <= value <= 8:
        return 1
    return value


def _pixels(source: Image.Image, flat: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of an 8-bit image, turned as its source says."""
    orientation = _orientation(source, whole=True)
    upright = flat.transpose(_TURNS[orientation]) if orientation in _TURNS else flat
    return np.array(upright, np.uint8)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image as RGB, or as RGBA if it may hold transparency."""
    if image.mode.startswith("I;16"):
        return _grey16(image)
    if image.mode in ("I", "F"):
        return Image.fromarray(_wide_grey(image)).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _grey16(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _wide_grey(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """32-bit integers or floats as 8-bit grey; `open_picture` says by which rule."""
    values = _finite(np.asarray(image).astype(np.float32))
    low, high = float(values.min()), float(values.max())
    if image.format == "PPM":
        # Netpbm defines white: 65535 once Pillow has scaled the integers, 1.0 for PFM floats.
        low, high = 0.0, 65535.0 if image.mode == "I" else 1.0
    elif low >= 0:
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next((white for white in whites if high <= white), high)
    span = high - low if high > low else 1.0
    return np.rint(np.clip((values - low) / span, 0.0, 1.0) * 255.0).astype(np.uint8)


def _finite(values: Shaped[np.ndarray, "height width"]) -> Shaped[np.ndarray, "height width"]:
    """NaN becomes 0, infinities the largest and smallest finite value."""
    usable = values[np.isfinite(values)]
    low, high = (float(usable.min()), float(usable.max())) if usable.size else (0.0, 0.0)
    # Far beyond any picture, and its square still a float32.
    bound = 1e18
    return np.nan_to_num(np.clip(values, max(low, -bound), min(high, bound)), nan=0.0)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("Lab colours could not be converted")
    return converted


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return canvas

"""One zoo of hostile files, which every entry for pictures goes through.

Each file says what is to become of it: used, refused wherever it is met, or refused where only
pictures of reasonable size are wanted.
"""

import contextlib
import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

SIDE = (24, 32)  # height and width of what is whole

# Every mode of Pillow that a file format keeps, with one that does.
MODES = {
    "1": "png",
    "L": "png",
    "LA": "png",
    "P": "gif",
    "PA": "png",
    "RGB": "jpg",
    "RGBA": "webp",
    "RGBX": "tif",
    "RGBa": "tif",
    "CMYK": "jpg",
    "YCbCr": "tif",
    "LAB": "tif",
    "HSV": "tif",
    "I": "tif",
    "F": "tif",
    "I;16": "png",
    "I;16B": "tif",
}
# What cannot be read by anybody: name → beginning of the reason.
BROKEN = {
    "zero bytes.png": "empty file (0 bytes)",
    "junk.jpg": "not a picture in a format that is read here",
    "truncated.png": "cannot be decoded",
    "truncated.jpg": "cannot be decoded",
    "truncated.gif": "cannot be decoded",
    "truncated.webp": "cannot be decoded",
    "truncated.tif": "cannot be decoded",
    "bomb by size.png": "declares more pixels than Pillow decodes",
    "bomb below Pillow's limit.png": "declares 9000x9000 pixels; the limit max_pixels is",
    "bomb in the text.png": "cannot be decoded",
    "bomb of scans.jpg": "cannot be decoded: 1001 scans",
    "pipe.png": "not a regular file",
    "socket.png": "not a regular file",
    "endless.png": "not a regular file",
    "loop.png": "Too many levels of symbolic links",
    "dangling.png": "No such file or directory",
    "postscript.eps": "not a picture in a format that is read here",
    "phone.heic": "not a picture in a format that is read here",
    "\x1b[31mred\x07.png": "empty file (0 bytes)",
}
# Whole, and of a shape that is no picture to train on; 15,000 : 1 is refused everywhere.
ABSURD = {
    "one pixel.png": "1x1 pixels; the limit min_side is",
    "strip.png": "30000x2",
    "wide.png": "400x20 is 20.0:1; the limit max_aspect is",
}
LATIN = os.fsdecode(b"caf\xe9.png")  # a name that is no UTF-8
EXIF = {
    "nothing": b"Exif\0\0",
    "cut": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    "turned 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    "a loop": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x08\0\0\0",
    "bytes": b"Exif\0\0" + bytes(range(256)),
}


def pixels(seed: int, height: int = SIDE[0], width: int = SIDE[1]) -> np.ndarray:
    """Noise, which no format makes small."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def good(seed: int = 0, **size) -> bytes:
    """A PNG file without any fault."""
    return encoded(Image.fromarray(pixels(seed, **size)), "PNG")


def encoded(image: Image.Image, form: str, **options) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says to be so large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 300)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def contents() -> dict[str, bytes]:
    """Name → content of every regular file of the zoo."""
    found = {
        "zero bytes.png": b"",
        "\x1b[31mred\x07.png": b"",
        "junk.jpg": b"\0" * 500,
        "phone.heic": b"\0\0\0\x18ftypheic" + b"\0" * 100,
        "postscript.eps": encoded(Image.fromarray(pixels(1)), "EPS"),
        "bomb by size.png": declared(60_000, 60_000),
        "bomb below Pillow's limit.png": declared(9_000, 9_000),
        "bomb in the text.png": _with_text(zlib.compress(b"a" * 20_000_000)),
        "bomb of scans.jpg": _with_scans(1000),
        "one pixel.png": good(2, height=1, width=1),
        "strip.png": good(3, height=2, width=30_000),
        "wide.png": good(4, height=20, width=400),
        "wrong ending.jpg": good(5),
        LATIN: good(6),
    }
    for end, form in (("jpg", "JPEG"), ("gif", "GIF"), ("webp", "WEBP"), ("tif", "TIFF")):
        found[f"truncated.{end}"] = encoded(Image.fromarray(pixels(7, 64, 64)), form)
    found["truncated.png"] = good(7)
    for name in [name for name in found if name.startswith("truncated")]:
        found[name] = found[name][: len(found[name]) // 2]
    frames = [Image.fromarray(pixels(8 + i)) for i in range(4)]
    for end, form in (("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF")):
        options = {"save_all": True, "append_images": frames[1:]}
        found[f"animated.{end}"] = encoded(frames[0], form, **options)
    for number, (kind, exif) in enumerate(EXIF.items()):
        image = Image.fromarray(pixels(20 + number))
        found[f"exif with {kind}.jpg"] = encoded(image, "JPEG", exif=exif)
    for number, (mode, end) in enumerate(MODES.items()):
        found[f"mode {mode}.{end}"] = _of_mode(mode, end, 40 + number)
    return found


def _of_mode(mode: str, end: str, seed: int) -> bytes:
    form = Image.registered_extensions()[f".{end}"]
    if mode.startswith("I;16"):
        values = np.random.default_rng(seed).integers(0, 65536, SIDE).astype(np.uint16)
        data = values.astype(">u2").tobytes() if mode == "I;16B" else values.tobytes()
        return encoded(Image.frombytes(mode, SIDE[::-1], data), form)
    image = Image.fromarray(pixels(seed))
    if mode in ("HSV", "PA", "RGBa", "LAB"):  # written as what a format knows
        known = {"HSV": "RGB", "PA": "P", "RGBa": "RGBA", "LAB": "LAB"}[mode]
        image = Image.new("LAB", SIDE[::-1], (136, 208, 195)) if mode == "LAB" else image
        return encoded(image if mode == "LAB" else image.convert(known), form)
    # Pillow before 13 reads no YCbCr that is not compressed.
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    return encoded(image.convert(mode), form, **options)


def _with_text(compressed: bytes) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"Comment\0\0" + compressed)
    return encoded(Image.fromarray(pixels(9)), "PNG", pnginfo=info)


def _with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(Image.fromarray(pixels(10)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    return data[:start] + data[start:-2] * (count + 2 - scans) + data[-2:]


USED = frozenset(contents()) - set(BROKEN) - set(ABSURD)


def populate(folder: Path) -> Path:
    """Writes the zoo into a folder, with a caption of each unusual kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    _socket(folder / "socket.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    for name in ("a", "b"):  # two links to a folder above are as many paths as leaves of a tree
        (folder / name).symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "wrong ending.txt")
    (folder / "animated.txt").symlink_to("/dev/zero")
    (folder / "metadata.jsonl").write_text("[" * 100_000 + '\n{"file_name": "../../x.png"}\n')
    return folder


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


@contextlib.contextmanager
def as_nobody():
    """Permissions bind no superuser: step down while they are tested."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)

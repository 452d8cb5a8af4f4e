"""Picture files of every mode and every way to be broken."""

import hashlib
import io
import os
import random
import struct
import threading
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, PngImagePlugin

from sl_jax.data import pictures
from sl_jax.data.pictures import (
    PictureError,
    PictureLimits,
    fetch_file,
    open_picture,
    open_rgba,
    picture_size,
    resize_to,
    shown,
)

HEIGHT, WIDTH = 24, 32
Image.init()  # some plugins make pictures when they are imported, which tests here forbid


def gradient(height=HEIGHT, width=WIDTH):
    """uint8 RGB in which every orientation differs."""
    ys, xs = np.mgrid[:height, :width]
    channels = (xs * 255 // (width - 1), ys * 255 // (height - 1), (xs + ys) * 2)
    return np.stack(channels, axis=-1).astype(np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def over_white(rgba):
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def with_alpha():
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    return np.dstack([gradient(), alpha])


@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "tif", "ppm", "tga", "qoi", "pcx", "sgi", "dds", "ico"]
)
def test_lossless_formats_give_the_same_pixels(tmp_path, suffix):
    options = {"sizes": [(WIDTH, HEIGHT)]} if suffix == "ico" else {}
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(gradient()), **options)
    picture = open_picture(path)
    assert picture.dtype == np.uint8 and picture.flags.writeable and picture.flags.c_contiguous
    np.testing.assert_array_equal(picture, gradient())
    assert picture_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "jp2", "gif"])
def test_lossy_formats_come_close(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(gradient()))
    error = np.abs(open_picture(path).astype(int) - gradient())
    assert error.mean() < 12


def test_alpha_is_flattened_over_white_with_exact_rounding(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(with_alpha()))
    np.testing.assert_array_equal(open_picture(path), over_white(with_alpha()))
    np.testing.assert_array_equal(open_rgba(path), with_alpha())


def test_opaque_pictures_get_full_alpha(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(gradient()))
    rgba = open_rgba(path)
    np.testing.assert_array_equal(rgba[..., :3], gradient())
    assert (rgba[..., 3] == 255).all()


def test_grey_with_alpha(tmp_path):
    rgba = with_alpha()
    path = save(tmp_path / "a.png", Image.fromarray(rgba[..., [0, 3]], "LA"))
    np.testing.assert_array_equal(open_rgba(path), rgba[..., [0, 0, 0, 3]])
    np.testing.assert_array_equal(open_picture(path), over_white(rgba[..., [0, 0, 0, 3]]))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    path = save(tmp_path / "a.png", image)
    np.testing.assert_array_equal(open_picture(path), np.asarray(image.convert("RGB")))


def test_palette_with_a_transparent_entry(tmp_path):
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = save(tmp_path / "a.png", image, transparency=1)
    picture = open_picture(path)
    assert set(map(tuple, picture[indices == 0])) == {(255, 0, 0)}
    assert set(map(tuple, picture[indices == 1])) == {(255, 255, 255)}
    assert set(map(tuple, open_rgba(path)[indices == 2])) == {(0, 0, 255, 255)}


def test_palette_with_alpha_per_entry(tmp_path):
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([0, 0, 0])
    path = save(tmp_path / "a.png", image, transparency=bytes([51]))
    assert (open_picture(path) == 204).all()


def test_colour_key_transparency(tmp_path):
    pixels = gradient()
    pixels[:4] = (10, 20, 30)
    path = save(tmp_path / "a.png", Image.fromarray(pixels), transparency=(10, 20, 30))
    picture = open_picture(path)
    assert (picture[:4] == 255).all()
    np.testing.assert_array_equal(picture[4:], pixels[4:])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_rounded(tmp_path, suffix):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(values))
    expected = np.rint(values / 257).astype(np.uint8)
    picture = open_picture(path)
    for channel in range(3):
        np.testing.assert_array_equal(picture[..., channel], expected)


def test_big_endian_16_bit_tiff(tmp_path):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    path = save(tmp_path / "a.tif", Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2")))
    np.testing.assert_array_equal(
        open_picture(path)[..., 0], np.rint(values / 257).astype(np.uint8)
    )


@pytest.mark.parametrize(("channels", "colour"), [(3, 2), (4, 6), (2, 4)])
def test_16_bit_colour_and_alpha(tmp_path, channels, colour):
    """PNG's types RGB, RGBA and grey with alpha, of which the decoder keeps the upper byte."""
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, channels))
    path = tmp_path / "a.png"
    path.write_bytes(
        png_bytes(values.astype(">u2").tobytes(), WIDTH * 2 * channels, depth=16, colour=colour)
    )
    places = {3: [0, 1, 2], 4: [0, 1, 2, 3], 2: [0, 0, 0, 1]}[channels]
    rgba = open_rgba(path)
    assert np.abs(rgba[..., : len(places)] - values[..., places] / 257).max() <= 1
    flat = rgba[..., :3] if channels == 3 else over_white(rgba)
    np.testing.assert_array_equal(open_picture(path), flat)


def test_16_bit_grey_with_a_transparent_level(tmp_path):
    values = np.full((HEIGHT, WIDTH), 1000, np.uint16)
    values[:5] = 40_000
    data = png_bytes(values.astype(">u2").tobytes(), WIDTH * 2, depth=16, colour=0)
    header = data.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(data[:header] + chunk(b"tRNS", struct.pack(">H", 40_000)) + data[header:])
    picture = open_picture(path)
    assert (picture[:5] == 255).all() and (picture[5:] == round(1000 / 257)).all()


def test_dark_16_bit_netpbm_stays_dark(tmp_path):
    values = np.full((HEIGHT, WIDTH), 200, ">u2")
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + values.tobytes())
    assert (open_picture(path) == 1).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.5, 1.0), (0, 128, 255)),
        ((0.0, 51.0, 255.0), (0, 51, 255)),
        ((0.0, 257.0, 65535.0), (0, 1, 255)),
        ((-1.0, 0.0, 1.0), (0, 128, 255)),
        ((0.0, np.nan, 0.5), (0, 0, 128)),
        ((0.0, 1.0, np.inf), (0, 255, 255)),
        ((np.nan, np.nan, np.nan), (0, 0, 0)),
        ((-3e38, 0.0, 3e38), (0, 128, 255)),
    ],
)
def test_float_tiff(tmp_path, values, expected):
    pixels = np.repeat(np.float32([values]), 20, axis=0).repeat(10, axis=1)
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    assert tuple(open_picture(path)[0, ::10, 0]) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0, 51, 255), (0, 51, 255)), ((0, 257, 65535), (0, 1, 255)), ((-5, 0, 5), (0, 128, 255))],
)
def test_32_bit_integer_tiff(tmp_path, values, expected):
    pixels = np.repeat(np.int32([values]), 20, axis=0).repeat(10, axis=1)
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    assert tuple(open_picture(path)[0, ::10, 0]) == expected


# Pillow before 13 reads no YCbCr that is not compressed.
OLD = int(PIL.__version__.partition(".")[0]) < 13
TIFF = {"YCbCr": {"compression": "tiff_lzw"}} if OLD else {}


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces(tmp_path, mode):
    colour = {"CMYK": (0, 255, 255, 0), "YCbCr": (76, 85, 255), "LAB": (136, 208, 195)}[mode]
    path = save(tmp_path / "a.tif", Image.new(mode, (WIDTH, HEIGHT), colour), **TIFF.get(mode, {}))
    red, green, blue = open_picture(path)[3, 3].astype(int)
    assert red > 230 and green < 25 and blue < 25


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)), quality=100)
    assert np.abs(open_picture(path)[0, 0].astype(int) - (0, 255, 255)).max() < 8


def test_hsv_by_way_of_conversion():
    """No file format carries HSV, premultiplied modes or padded palettes; a plugin may."""
    image = Image.fromarray(gradient())
    np.testing.assert_allclose(
        np.asarray(pictures._eight_bit(image.convert("HSV"))).astype(int), gradient(), atol=12
    )
    rgba = Image.fromarray(with_alpha())
    back = np.asarray(pictures._eight_bit(rgba.convert("RGBa")))
    np.testing.assert_array_equal(back[..., 3], with_alpha()[..., 3])
    for mode in ("PA", "La", "RGBX"):
        source = rgba.convert("LA").convert(mode) if mode != "RGBX" else image.convert(mode)
        assert pictures._eight_bit(source).mode in ("RGB", "RGBA")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(
        tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options
    )
    assert (open_picture(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    upright = gradient()
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
    path = save(
        tmp_path / f"a.{suffix}",
        Image.fromarray(np.ascontiguousarray(stored)),
        exif=exif.tobytes(),
        **options.get(suffix, {}),
    )
    picture = open_picture(path)
    assert np.abs(picture.astype(int) - upright).max() <= (12 if suffix == "jpg" else 0)
    for decode in (False, True):
        assert picture_size(path, decode=decode) == (HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # value 99
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # a string
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x08\0\0\0",  # IFD loop
        b"Exif\0\0" + bytes(range(256)),
    ],
)
def test_odd_exif_leaves_the_picture_upright(tmp_path, exif):
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=exif)
    assert open_picture(path).shape == (HEIGHT, WIDTH, 3)
    assert picture_size(path) == (HEIGHT, WIDTH)


def test_wrong_extension_is_read_by_content(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), format="PNG")
    np.testing.assert_array_equal(open_picture(path), gradient())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(rows, stride, *, size=(WIDTH, HEIGHT), depth=8, colour=2):
    lines = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def reason_of(path, **limits):
    with pytest.raises(PictureError) as caught:
        open_picture(path, PictureLimits(**limits))
    assert caught.value.path == os.fspath(path)
    assert shown(path) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "qoi", "tga"])
def test_truncated(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = save(
        tmp_path / f"a.{suffix}", Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert reason_of(path).startswith(("cannot be decoded", "not a picture"))
    with pytest.raises(PictureError):
        picture_size(path, decode=True)


def test_zero_bytes_and_junk(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    assert reason_of(tmp_path / "empty.png") == "empty file (0 bytes)"
    assert reason_of(tmp_path / "text.png") == "not a picture in a format that is read here"


def test_declared_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    for size in ((9_000, 9_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)):
        path.write_bytes(png_bytes(b"\0" * 300, 300, size=size))
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        assert "pixels" in reason_of(path)


def test_compressed_metadata_bomb(tmp_path):
    bomb = zlib.compress(b"a" * 20_000_000)
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"Comment\0\0" + bomb)
    path = save(tmp_path / "a.png", Image.fromarray(gradient()), pnginfo=info)
    assert reason_of(path).startswith("cannot be decoded")


def test_progressive_jpeg_with_endless_scans(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), progressive=True)
    assert open_picture(path).shape == (HEIGHT, WIDTH, 3)
    data = path.read_bytes()
    start = data.rindex(b"\xff\xda")
    path.write_bytes(data[:start] + data[start:-2] * 1000 + data[-2:])
    assert "scans in a JPEG" in reason_of(path)
    with pytest.raises(PictureError, match="scans in a JPEG"):
        picture_size(path, decode=True)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "1x1 pixels; the limit min_side is 16"),
        ((30_000, 2), "30000x2 pixels; the limit min_side is 16"),
        ((160, 32), "160x32 is 5.0:1; the limit max_aspect is 4"),
        ((32, 160), "32x160 is 5.0:1"),
    ],
)
def test_absurd_sizes(tmp_path, size, reason):
    path = save(tmp_path / "a.png", Image.new("RGB", size))
    assert reason_of(path).startswith(reason)


def test_limits_are_configurable_and_inclusive(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (160, 32)))
    assert open_picture(path, PictureLimits(max_aspect=5, max_pixels=160 * 32)).size
    assert "max_pixels is 5119" in reason_of(path, max_aspect=5, max_pixels=160 * 32 - 1)
    assert "max_bytes is 20" in reason_of(path, max_bytes=20)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_pixels", 0), ("max_pixels", 10**9), ("min_side", 0), ("max_aspect", 0.5)],
)
def test_wrong_limits_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        PictureLimits(**{field: value})


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_of(tmp_path / "folder.png") == "a folder, not a file"
    assert reason_of(tmp_path / "pipe.png") == "not a regular file"
    assert reason_of("/dev/zero") == "not a regular file"
    assert "symbolic links" in reason_of(tmp_path / "loop.png")
    assert reason_of(tmp_path / "dangling.png") == "No such file or directory"
    assert reason_of(tmp_path / "missing.png") == "No such file or directory"


def test_postscript_is_not_handed_to_another_program(tmp_path):
    path = save(tmp_path / "a.eps", Image.fromarray(gradient()))
    assert reason_of(path) == "not a picture in a format that is read here"


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    with open(path, "wb") as file:
        file.write(png_bytes(gradient().tobytes(), WIDTH * 3))
    name = os.fsdecode(path)
    np.testing.assert_array_equal(open_picture(name), gradient())
    assert shown(name).endswith("caf\\xe9\\n.png")
    shown(name).encode("utf-8")


FORMATS = ("png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "tga", "psd", "ico", "avif")


@pytest.mark.filterwarnings("ignore")  # Pillow warns about some of the damage it meets
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_bytes_never_escape_as_another_error(tmp_path, suffix):
    fuzz(tmp_path, suffix, cases=8, seed=1)


MORE_FORMATS = ("pcx", "sgi", "ppm", "qoi", "dds", "im", "msp", "xbm", "icns", "mpo")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", (*FORMATS, *MORE_FORMATS))
def test_many_damaged_files(tmp_path, suffix):
    fuzz(tmp_path, suffix, cases=60, seed=2)


def fuzz(folder, suffix, cases, seed):
    rng = random.Random(seed)
    clean = sample_bytes(suffix)
    path = folder / f"a.{suffix}"
    for _ in range(cases):
        data = bytearray(clean)
        for _ in range(rng.choice((1, 4, 40))):
            # Headers are where parsers go wrong.
            reach = len(data) if rng.random() < 0.5 else min(len(data), 200)
            data[rng.randrange(reach)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            picture = open_picture(path, PictureLimits(max_pixels=1_000_000))
        except PictureError as error:
            assert error.reason
        else:
            assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def sample_bytes(suffix):
    image = Image.fromarray(gradient())
    if suffix == "psd":  # a flat raw composite
        planes = gradient().transpose(2, 0, 1).tobytes()
        head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, HEIGHT, WIDTH, 8, 3)
        return head + struct.pack(">IIIH", 0, 0, 0, 0) + planes
    if suffix in ("msp", "xbm"):
        image = image.convert("1")
    if suffix == "icns":
        image = image.resize((32, 32))
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[f".{suffix}"])
    return buffer.getvalue()


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_LARGE_PIXELS", 100)
    path = save(tmp_path / "a.png", Image.fromarray(gradient()))
    running, most = [], []
    original = pictures._eight_bit

    def watched(image):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.01)
        running.pop()
        return original(image)

    monkeypatch.setattr(pictures, "_eight_bit", watched)
    threads = [threading.Thread(target=open_picture, args=(path,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 6 and max(most) == 1
    # A failure inside gives the place back.
    path.write_bytes(path.read_bytes()[:-40])
    for _ in range(2):
        assert reason_of(path)


def test_header_alone_does_not_decode(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"a.{end}", Image.fromarray(gradient())) for end in ("png", "jpg")]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for path in paths:
        assert picture_size(path) == (HEIGHT, WIDTH)


def test_resize_stretches_and_keeps_transparent_colour_out():
    picture = resize_to(gradient(), (48, 16))
    assert picture.shape == (48, 16, 3)
    expected = Image.fromarray(gradient()).resize((16, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(picture, np.asarray(expected))
    np.testing.assert_array_equal(resize_to(gradient(), (HEIGHT, WIDTH)), gradient())
    layer = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    layer[..., 1] = 255  # green, transparent
    layer[:, : WIDTH // 2] = (255, 0, 0, 255)
    small = resize_to(layer, (12, 15))
    assert (small[small[..., 3] > 8][:, 1] <= 3).all()


def test_fetched_files_are_read_once(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.fromarray(with_alpha()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    large = fetch_file(path)
    monkeypatch.setattr(pictures, "_HELD_BYTES", 10)
    small, large = large, fetch_file(path)
    assert large.content is None and large.sha256 == digest
    np.testing.assert_array_equal(open_rgba(large), with_alpha())
    path.unlink()
    assert small.sha256 == digest and picture_size(small, decode=True) == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(open_rgba(small), with_alpha())
    with pytest.raises(PictureError, match="No such file"):
        open_rgba(large)
    with pytest.raises(PictureError, match="No such file"):
        fetch_file(path)

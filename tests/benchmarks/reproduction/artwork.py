"""Family C: designs out of distribution, composed from artwork that packages carry.

    pip download --no-deps --dest WHEELS arcade==3.3.3 scikit-image==0.26.0 scikit-learn==1.9.1
    python tests/benchmarks/reproduction/artwork.py --wheels WHEELS --output DESIGNS --count 256

Backdrops are crops of photographs (scikit-image, scikit-learn), objects are sprites with their own
alpha (arcade, drawn by Kenney, CC0). The wheels are read as archives, never installed, and nothing
of them is kept in the repository: designs are composed anew, the same on every machine.

Layers are in the canonical order of `sl_jax.data.procedural`: the opaque backdrop, then objects by
area, the largest furthest back, each with 1.25 times the area of the next and at least 60 % of
itself unoccluded. `python -m sl_jax.evaluate --data=DESIGNS` reads them.
"""

import argparse
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

_SPRITES = "arcade/resources/assets/images"
_ROOMS = ("items", "enemies", "space_shooter", "alien", "animated_characters")
_PHOTOGRAPHS = {
    "scikit_image": (
        *("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png"),
        *("skimage/data/rocket.jpg", "skimage/data/motorcycle_left.png", "skimage/data/gravel.png"),
        *("skimage/data/grass.png", "skimage/data/brick.png", "skimage/data/retina.jpg"),
        *("skimage/data/ihc.png", "skimage/data/hubble_deep_field.jpg"),
    ),
    "scikit_learn": ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
}
_LEAST_SIDE = 24  # pixels of a sprite's content; smaller ones are blots
_LEAST_FILL = 0.3  # of a sprite's box
_CROP = (0.35, 0.9)  # of a photograph's short side
_LARGEST = (0.12, 0.24)  # area of the largest object, of the picture's
_RATIO = (1.35, 2.4)  # between neighbours' areas
_AREA_GAP, _VISIBLE, _CONTRAST = 1.25, 0.6, 0.12
_ATTEMPTS = 400


class Artwork(NamedTuple):
    """What designs are composed of.

    Attributes:
        sprites: RGBA pictures, cut to what they show.
        photographs: RGB pictures.
    """

    sprites: tuple[Image.Image, ...]
    photographs: tuple[Image.Image, ...]


class Composition(NamedTuple):
    """One design.

    Attributes:
        layers: uint8 [layers, size, size, 4], straight RGBA, back to front.
        photograph: number of the one that the backdrop is a crop of.
    """

    layers: np.ndarray
    photograph: int


def read_artwork(wheels: Path) -> Artwork:
    """Sprites and photographs from the wheels of a folder, in the order of their names.

    Raises:
        FileNotFoundError: a wheel is not there; the message says how to get it.
    """
    with _wheel(wheels, "arcade") as archive:
        sprites = [
            sprite
            for name in sorted(archive.namelist())
            if name.endswith(".png") and _room(name) in _ROOMS
            for sprite in _cut_out(_opened(archive, name).convert("RGBA"))
        ]
    photographs = []
    for package, names in _PHOTOGRAPHS.items():
        with _wheel(wheels, package) as archive:
            photographs += [_opened(archive, name).convert("RGB") for name in names]
    return Artwork(tuple(sprites), tuple(photographs))


def compose(artwork: Artwork, seed: int, size: int, layers: int) -> Composition:
    """One design.

    Raises:
        ValueError: no composition was found, as with very many layers.
    """
    generator = np.random.default_rng((0xC, seed))
    for _ in range(_ATTEMPTS):
        found = _attempt(artwork, generator, size, layers - 1)
        if found is not None:
            return found
    raise ValueError(f"no design of {layers} layers was found; please ask for fewer")


def name_of(seed: int) -> str:
    """What a design's folder is called."""
    return f"C-{seed:06d}"


def write_designs(
    artwork: Artwork, folder: Path, seeds: Sequence[int], size: int, layers: int
) -> None:
    """Folders `C-SEED` with the layers `0000.png` …, as `sl_jax.evaluate` reads them."""
    for seed in seeds:
        target = folder / name_of(seed)
        target.mkdir(parents=True, exist_ok=True)
        for number, layer in enumerate(compose(artwork, seed, size, layers).layers):
            Image.fromarray(layer).save(target / f"{number:04d}.png")


def _room(name: str) -> str:
    """The folder of a sprite's kind; empty for other files."""
    path = PurePosixPath(name)
    return path.relative_to(_SPRITES).parts[0] if path.is_relative_to(_SPRITES) else ""


def _wheel(folder: Path, package: str) -> zipfile.ZipFile:
    found = sorted(folder.glob(f"{package}-*.whl"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no wheel of {package}; please fetch it with "
            f"pip download --no-deps --dest {folder} {package.replace('_', '-')}"
        )
    return zipfile.ZipFile(found[0])


def _opened(archive: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(name)))


def _cut_out(sprite: Image.Image) -> Iterator[Image.Image]:
    """The part of a sprite that shows something, if that is large and full enough."""
    box = sprite.getchannel("A").getbbox()
    if box is None:
        return
    content = sprite.crop(box)
    fill = np.asarray(content.getchannel("A"), float).mean() / 255
    if min(content.size) >= _LEAST_SIDE and fill >= _LEAST_FILL:
        yield content


def _attempt(
    artwork: Artwork, generator: np.random.Generator, size: int, objects: int
) -> Composition | None:
    """One attempt; None if an object finds no place or does not stand out."""
    stack = np.zeros((objects + 1, size, size, 4), np.uint8)
    photograph = int(generator.integers(len(artwork.photographs)))
    stack[0, ..., :3] = _backdrop(artwork.photographs[photograph], generator, size)
    stack[0, ..., 3] = 255
    flat = Image.fromarray(stack[0])
    masks: list[np.ndarray] = []
    area = generator.uniform(*_LARGEST) * size * size
    for number in range(1, objects + 1):
        layer = _placed(artwork, generator, size, area)
        mask = layer[..., 3] >= 128
        if not _fits(mask, masks) or not _stands_out(layer, mask, np.asarray(flat)):
            return None
        masks.append(mask)
        stack[number] = layer
        flat = Image.alpha_composite(flat, Image.fromarray(layer))
        area = np.count_nonzero(mask) / generator.uniform(*_RATIO)
    return Composition(stack, photograph)


def _backdrop(photograph: Image.Image, generator: np.random.Generator, size: int) -> np.ndarray:
    side = round(min(photograph.size) * generator.uniform(*_CROP))
    left, top = (int(generator.integers(whole - side + 1)) for whole in photograph.size)
    crop = photograph.resize((size, size), Image.LANCZOS, (left, top, left + side, top + side))
    return np.asarray(crop)


def _placed(artwork: Artwork, generator: np.random.Generator, size: int, area: float) -> np.ndarray:
    """uint8 [size, size, 4]: a sprite of about so many pixels, turned, somewhere on the canvas."""
    sprite = artwork.sprites[generator.integers(len(artwork.sprites))]
    if generator.random() < 0.5:
        sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(generator.uniform(-30, 30), Image.BICUBIC, expand=True)
    filled = np.asarray(sprite.getchannel("A"), float).sum() / 255
    scale = np.sqrt(area / filled)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    sprite = sprite.resize((width, height), Image.LANCZOS)
    left, top = (
        int(generator.integers(-side // 8, size - side + side // 8 + 1))
        if side < size
        else (size - side) // 2
        for side in (width, height)
    )
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(sprite, (left, top))
    layer = np.array(canvas)
    layer[layer[..., 3] == 0] = 0
    return layer


def _fits(mask: np.ndarray, masks: Sequence[np.ndarray]) -> bool:
    """Whether canonical order and visibility hold with `mask` in front of `masks`."""
    area = np.count_nonzero(mask)
    if area == 0 or (masks and np.count_nonzero(masks[-1]) < _AREA_GAP * area):
        return False
    covered = mask
    for other in reversed(masks):
        if np.count_nonzero(other & ~covered) < _VISIBLE * np.count_nonzero(other):
            return False
        covered = covered | other
    return True


def _stands_out(layer: np.ndarray, mask: np.ndarray, behind: np.ndarray) -> bool:
    difference = np.abs(layer[mask][:, :3].astype(float) - behind[mask][:, :3]).mean() / 255
    return bool(difference >= _CONTRAST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.count)
    write_designs(read_artwork(given.wheels), given.output, seeds, given.size, given.layers)


if __name__ == "__main__":
    main()

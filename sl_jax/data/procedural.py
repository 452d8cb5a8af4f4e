"""Seeded procedural designs with true layers, for training and testing decomposition.

A design is a backdrop and a few objects that occlude one another. The flat picture is what a
decomposition model sees; the layers are what it must find. Designs are drawn by this file's own
rasteriser from exactly rounded operations only, so a (family, seed, layers) triple means the same
pixels on every machine, and the same composition at every size of equal proportions.

**Canonical order.** Layer 0 is the opaque backdrop. Objects follow by area, the largest furthest
back; the area of an object counts the pixels of its layer with alpha ≥ 128 (shadows stay below),
and equal areas go by the topmost, then leftmost such pixel. This is also the order of painting.
Near ties are avoided: compositions are decided on the coverage of the outlines at short side 64,
where each object must have 1.25 times the area of the next one and also *show* 1.15 times what the
next one shows. The counts of finished layers differ from that by the antialiased and shadowed
outline, by a few percent. So the flat picture determines the order of its layers.

**Families** (`FAMILIES`) are rows of a table. A has gradients, soft textures, plain shapes and soft
shadows, in light colours. B is shifted: stripes, checks, dots and noise, other shapes, bright on
dark colours, more occlusion, and hard shadows or none.

Shadows belong to the layer of the object that casts them. Every object differs in colour from
what lies behind its outline and stays visible by the family's `visible` share or more.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import numpy as np

from sl_jax.data import _shapes, _textures
from sl_jax.data._draws import Draws
from sl_jax.data._shapes import Shape, ShapeFactory
from sl_jax.data._textures import Patch, Texture, TextureFactory, edge, smooth

Colour = tuple[float, float, float]
Range = tuple[float, float]

MAX_LAYERS = 8
_LAYOUT_SIDE = 64  # compositions are decided at this short side, whatever the size asked for
_AREA_GAP = 1.25
_SHOWN_GAP = 1.15
_CONTRAST = 0.2
_ATTEMPTS = 200
# Area of the largest object (the short side squared is 1) and the largest ratio between
# neighbours, by number of objects: the smallest keeps about 15 % of the side.
_LADDERS = {
    1: ((0.07, 0.22), 1.0),
    2: ((0.10, 0.24), 3.0),
    3: ((0.11, 0.23), 2.1),
    4: ((0.12, 0.22), 1.75),
    5: ((0.13, 0.20), 1.6),
    6: ((0.13, 0.19), 1.48),
    7: ((0.13, 0.18), 1.42),
}
_MIN_RATIO = 1.35
_MAX_RADIUS = 0.34


@dataclass(frozen=True)
class Palette:
    """Ranges of hue, saturation and value that colours are drawn from, all in 0..1.

    Attributes:
      saturation, value: of the first colour, whose hue is free.
      hue_shift: how far the second colour's hue lies from the first's, either way.
      value_shift: how far its value lies from the first's, either way.
    """

    saturation: Range
    value: Range
    hue_shift: Range
    value_shift: Range


@dataclass(frozen=True)
class Shadow:
    """Ranges of a shadow: chance of one, alpha, blur and offset (in short sides)."""

    chance: float
    alpha: Range
    blur: Range
    offset: Range


@dataclass(frozen=True)
class Family:
    """What one family of designs is made of.

    Attributes:
      stream: number that keeps the families' random streams apart.
      shapes, fills: of objects; repeated entries are drawn more often.
      backdrops, veils: textures of the backdrop: the base and what is laid over it.
      veil: range of the veil's strength in 0..1.
      shading: largest change of brightness across an object.
      backdrop, objects: colours.
      shadow: shadows.
      overlap: chance that an object is placed to overlap one behind it.
      least_overlap: share of its area that then lies over objects behind, at least.
      patience: failed attempts after which objects no longer need to overlap.
      reach: how far it then lies from the other's centre, in radii of that.
      visible: smallest share of an object's area that stays unoccluded.
      overhang: how far an object may leave the canvas, in its own radii.
    """

    stream: int
    shapes: tuple[ShapeFactory, ...]
    fills: tuple[TextureFactory, ...]
    backdrops: tuple[TextureFactory, ...]
    veils: tuple[TextureFactory, ...]
    veil: Range
    shading: float
    backdrop: Palette
    objects: Palette
    shadow: Shadow
    overlap: float
    least_overlap: float
    patience: int
    reach: Range
    visible: float
    overhang: float


FAMILIES = {
    "A": Family(
        stream=0xA,
        shapes=(
            _shapes.disc,
            _shapes.ellipse,
            _shapes.rounded_rectangle,
            _shapes.rounded_rectangle,
            _shapes.pill,
            _shapes.ring,
            _shapes.regular_polygon,
            _shapes.star,
            _shapes.arch,
        ),
        fills=(
            _textures.linear,
            _textures.linear,
            _textures.radial,
            _textures.clouds,
            _textures.split,
            _textures.rim,
            _textures.core,
        ),
        backdrops=(_textures.linear, _textures.linear, _textures.radial, _textures.waves),
        veils=(_textures.clouds, _textures.clouds, _textures.waves, _textures.radial),
        veil=(0.25, 0.7),
        shading=0.14,
        backdrop=Palette((0.15, 0.6), (0.55, 1.0), (0.06, 0.22), (0.08, 0.3)),
        objects=Palette((0.4, 1.0), (0.35, 1.0), (0.04, 0.2), (0.15, 0.45)),
        shadow=Shadow(0.9, (0.22, 0.4), (0.05, 0.1), (0.012, 0.035)),
        overlap=0.7,
        least_overlap=0.15,
        patience=24,
        reach=(0.5, 1.15),
        visible=0.6,
        overhang=0.0,
    ),
    "B": Family(
        stream=0xB,
        shapes=(
            _shapes.cross,
            _shapes.crescent,
            _shapes.blob,
            _shapes.blob,
            _shapes.heart,
            _shapes.flower,
            _shapes.arrow,
            _shapes.bolt,
            _shapes.sign,
            _shapes.sign,
        ),
        fills=(
            _textures.stripes,
            _textures.checks,
            _textures.dots,
            _textures.chevrons,
            _textures.grain,
        ),
        backdrops=(
            _textures.stripes,
            _textures.checks,
            _textures.dots,
            _textures.chevrons,
            _textures.grain,
        ),
        veils=(_textures.linear, _textures.radial, _textures.grain),
        veil=(0.2, 0.6),
        shading=0.1,
        backdrop=Palette((0.3, 0.85), (0.15, 0.5), (0.0, 0.12), (0.1, 0.2)),
        objects=Palette((0.05, 0.65), (0.55, 1.0), (0.05, 0.3), (0.15, 0.35)),
        shadow=Shadow(0.4, (0.3, 0.45), (0.004, 0.012), (0.02, 0.045)),
        overlap=0.9,
        least_overlap=0.45,
        patience=5,
        reach=(0.2, 0.9),
        visible=0.5,
        overhang=0.12,
    ),
}


@dataclass(frozen=True, eq=False)
class Design:
    """One design with its true layers.

    Attributes:
      layers: uint8 [L, H, W, 4], straight RGBA, back to front in canonical order; layer 0 is
        opaque; RGB is 0 wherever alpha is 0.
      family: name of its family.
      seed: the seed it was made from.
    """

    layers: np.ndarray
    family: str
    seed: int

    @property
    def flat(self) -> np.ndarray:
        """uint8 [H, W, 3]: the layers over one another, as a model sees the design."""
        return flatten(self.layers)


def flatten(layers: np.ndarray) -> np.ndarray:
    """Layers over one another, in integers so that no machine rounds differently.

    Args:
      layers: uint8 [L, H, W, 4], straight RGBA, back to front, layer 0 opaque.

    Returns:
      uint8 [H, W, 3].
    """
    below = layers[0, ..., :3].astype(np.int64) * 255
    for layer in layers[1:]:
        alpha = layer[..., 3:].astype(np.int64)
        below = (
            below * (255 - alpha) + layer[..., :3].astype(np.int64) * (255 * alpha) + 127
        ) // 255
    return ((below + 127) // 255).astype(np.uint8)


def canonical_order(layers: np.ndarray) -> tuple[int, ...]:
    """Indices that put object layers into canonical order (see the head of this file).

    Args:
      layers: uint8 [L, H, W, 4], straight RGBA, without the backdrop.

    Returns:
      Indices into `layers`, the furthest back first. Layers with no pixel of alpha ≥ 128 go last.
    """
    return tuple(sorted(range(len(layers)), key=lambda index: _order_key(layers[index])))


def _order_key(layer: np.ndarray) -> tuple[int, int, int]:
    rows, columns = np.nonzero(layer[..., 3] >= 128)
    if not rows.size:
        return 0, 0, 0
    return -rows.size, int(rows.min()), int(columns.min())


def make_design(
    family: str, seed: int, size: int | tuple[int, int] = 64, layers: int = 3
) -> Design:
    """Makes one design; the same arguments give the same pixels everywhere.

    Args:
      family: a key of `FAMILIES`.
      seed: non-negative.
      size: side in pixels, or (height, width), each at least 16. The same seed at sizes of equal
        proportions is the same design, drawn finer.
      layers: number of layers with the backdrop, 1 to 8.

    Returns:
      The design.

    Raises:
      ValueError: an argument is out of range; the message says what is possible.
    """
    style, shape = _checked(family, seed, size, layers)
    draws = Draws((style.stream, layers, seed))
    layout = _layout_shape(shape)
    for attempt in range(_ATTEMPTS):
        if attempt == style.patience:
            style = replace(style, overlap=0.0)
        sketch = _compose(style, draws, layout, layers - 1, shrink=1.0 / (1.0 + 0.06 * attempt))
        if sketch is not None:
            pixels = sketch.layers if layout == shape else _render(sketch, shape)
            return Design(layers=pixels, family=family, seed=seed)
    raise RuntimeError(
        f"no composition found for family {family}, seed {seed}, size {shape}, {layers} layers; "
        "please use fewer layers or a size closer to square"
    )


def _checked(
    family: str, seed: int, size: int | tuple[int, int], layers: int
) -> tuple[Family, tuple[int, int]]:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; please use one of {sorted(FAMILIES)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; please use 0 or more")
    shape = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(shape) < 16:
        raise ValueError(f"size {shape} is too small; please use at least 16 pixels a side")
    if not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"{layers} layers; please use 1 to {MAX_LAYERS}")
    return FAMILIES[family], shape


def _layout_shape(shape: tuple[int, int]) -> tuple[int, int]:
    short = min(shape)
    height, width = ((side * _LAYOUT_SIDE * 2 + short) // (2 * short) for side in shape)
    return height, width


class _Body(NamedTuple):
    """A shape at its place: centre and radius in short sides, rotation as (cosine, sine)."""

    shape: Shape
    x: float
    y: float
    radius: float
    cosine: float
    sine: float


class _Cast(NamedTuple):
    """A shadow: alpha, blur width and offset (in short sides)."""

    alpha: float
    blur: float
    x: float
    y: float


class _Paint(NamedTuple):
    """A fill: weights between two colours, then a change of brightness along a direction."""

    texture: Texture
    first: Colour
    second: Colour
    shade_x: float
    shade_y: float


class _Backdrop(NamedTuple):
    """The base texture between two colours, and a veil of a third over it."""

    base: Texture
    veil: Texture
    strength: float
    colours: tuple[Colour, Colour, Colour]


class _Object(NamedTuple):
    body: _Body
    paint: _Paint
    cast: _Cast | None


class _Sketch(NamedTuple):
    """A decided composition, and its layers at layout resolution."""

    backdrop: _Backdrop
    objects: tuple[_Object, ...]
    layers: np.ndarray


class _Window(NamedTuple):
    """A crop of the canvas and a body's coordinates and outline in it."""

    rows: slice
    columns: slice
    patch: Patch
    cover: np.ndarray


def _compose(
    style: Family, draws: Draws, shape: tuple[int, int], count: int, shrink: float
) -> _Sketch | None:
    """One attempt at a composition; None if an object found no place or no colour."""
    backdrop = _draw_backdrop(style, draws)
    painted = _backdrop_pixels(backdrop, shape)
    layers = np.zeros((count + 1, *shape, 4), np.uint8)
    layers[0, ..., :3], layers[0, ..., 3] = _bytes(painted), 255
    bodies: list[_Body] = []
    masks: list[np.ndarray] = []
    objects: list[_Object] = []
    light = draws.direction()
    for index, area in enumerate(_areas(draws, count, shrink)):
        placed = _place(style, draws, shape, area, bodies, masks)
        if placed is None:
            return None
        body, mask, window = placed
        paint = _choose_paint(style, draws, painted[window.rows, window.columns], window)
        if paint is None:
            return None
        bodies.append(body)
        masks.append(mask)
        objects.append(_Object(body, paint, _draw_cast(style.shadow, draws, light)))
        where = _paint_object(objects[-1], layers[index + 1])
        painted[where] = _over(layers[index + 1][where], painted[where])
    return _Sketch(backdrop, tuple(objects), layers)


def _areas(draws: Draws, count: int, shrink: float) -> list[float]:
    """Target areas of the objects, largest first, in squared short sides."""
    if not count:
        return []
    (low, high), steepest = _LADDERS[count]
    areas = [draws.uniform(low, high) * shrink]
    for _ in range(count - 1):
        areas.append(areas[-1] / draws.uniform(_MIN_RATIO, steepest))
    return areas


def _place(
    style: Family,
    draws: Draws,
    shape: tuple[int, int],
    area: float,
    bodies: list[_Body],
    masks: list[np.ndarray],
) -> tuple[_Body, np.ndarray, _Window] | None:
    """A shape and a place for it in front of `bodies` that keeps order and visibility."""
    overlapping = bool(bodies) and draws.chance(style.overlap)
    for _ in range(14):
        outline = draws.choice(style.shapes)(draws)
        radius = _radius_for(outline, area)
        if radius > _MAX_RADIUS:
            continue
        x, y = _draw_centre(
            style, draws, shape, radius, draws.choice(bodies) if overlapping else None
        )
        body = _Body(outline, x, y, radius, *draws.direction())
        window = _window(body, shape, 0.0)
        mask = np.zeros(shape, bool)
        mask[window.rows, window.columns] = window.cover >= 0.5
        if _fits(style, mask, masks, overlapping):
            return body, mask, window
    return None


def _radius_for(outline: Shape, area: float) -> float:
    """The radius at which `outline` has the wanted area."""
    steps = (np.arange(24) + 0.5) / 12.0 - 1.0
    filled = int(np.count_nonzero(outline(*np.meshgrid(steps, steps)) < 0.0)) / 144.0
    return sqrt(area / filled)


def _draw_centre(
    style: Family,
    draws: Draws,
    shape: tuple[int, int],
    radius: float,
    target: _Body | None,
) -> tuple[float, float]:
    """A centre that keeps the body on the canvas; near the rim of `target` if one is given."""
    short = min(shape)
    margin = radius * (0.95 - style.overhang)
    width, height = shape[1] / short, shape[0] / short
    if target is None:
        return draws.uniform(margin, width - margin), draws.uniform(margin, height - margin)
    cosine, sine = draws.direction()
    away = target.radius * draws.uniform(*style.reach) + radius * draws.uniform(0.0, 0.35)
    x, y = target.x + cosine * away, target.y + sine * away
    return min(max(x, margin), width - margin), min(max(y, margin), height - margin)


def _fits(style: Family, mask: np.ndarray, masks: list[np.ndarray], overlapping: bool) -> bool:
    """Whether `mask` in front of `masks` keeps canonical order, visibility and overlap."""
    area = int(np.count_nonzero(mask))
    if not masks:
        return area > 0
    if int(np.count_nonzero(masks[-1])) < _AREA_GAP * area:
        return False
    covered, shown_in_front = mask, area
    for other in reversed(masks):
        shown = int(np.count_nonzero(other & ~covered))
        full = int(np.count_nonzero(other))
        if shown < style.visible * full or shown < _SHOWN_GAP * shown_in_front:
            return False
        covered, shown_in_front = covered | other, shown
    if not overlapping:
        return True
    behind = np.logical_or.reduce(masks)
    return int(np.count_nonzero(mask & behind)) >= style.least_overlap * area


def _window(body: _Body, shape: tuple[int, int], margin: float) -> _Window:
    """The crop that holds `body` and `margin` (in short sides) around it."""
    short = min(shape)
    reach = (body.radius + margin) * short + 1.0
    column0, column1 = _span(body.x * short, reach, shape[1])
    row0, row1 = _span(body.y * short, reach, shape[0])
    x, y = _local(body, (row0, row1, column0, column1), short, 0.0, 0.0)
    pixels = body.radius * short
    depth = body.shape(x, y)
    patch = Patch(x, y, depth, pixels)
    return _Window(slice(row0, row1), slice(column0, column1), patch, edge(depth, pixels))


def _span(centre: float, reach: float, limit: int) -> tuple[int, int]:
    low = min(max(int(centre - reach), 0), limit - 1)
    return low, min(max(int(centre + reach) + 1, low + 1), limit)


def _local(
    body: _Body, crop: tuple[int, int, int, int], short: int, shift_x: float, shift_y: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the crop's pixel centres in the body's own frame, moved by a shift."""
    row0, row1, column0, column1 = crop
    dx = ((np.arange(column0, column1) + 0.5) / short - (body.x + shift_x)) / body.radius
    dy = ((np.arange(row0, row1) + 0.5) / short - (body.y + shift_y)) / body.radius
    x = dx[None, :] * body.cosine + dy[:, None] * body.sine
    y = dy[:, None] * body.cosine - dx[None, :] * body.sine
    return x, y


def _draw_backdrop(style: Family, draws: Draws) -> _Backdrop:
    base, veil = draws.choice(style.backdrops)(draws), draws.choice(style.veils)(draws)
    hue = draws.unit()
    first, second = _pair(style.backdrop, draws, hue)
    _, third = _pair(style.backdrop, draws, hue)
    return _Backdrop(base, veil, draws.uniform(*style.veil), (first, second, third))


def _backdrop_pixels(backdrop: _Backdrop, shape: tuple[int, int]) -> np.ndarray:
    """float64 [h, w, 3] in 0..1."""
    height, width = shape
    short = min(shape)
    x, y = np.meshgrid(
        (np.arange(width) * 2.0 + 1.0 - width) / short,
        (np.arange(height) * 2.0 + 1.0 - height) / short,
    )
    patch = Patch(x, y, np.maximum(np.abs(x), np.abs(y)) - 1.0, short / 2.0)
    first, second, third = backdrop.colours
    mixed = _mix(backdrop.base(patch), first, second)
    veil = (backdrop.veil(patch) * backdrop.strength)[..., None]
    return mixed + (np.array(third) - mixed) * veil


def _choose_paint(
    style: Family, draws: Draws, behind: np.ndarray, window: _Window
) -> _Paint | None:
    """A fill that differs from what lies behind the outline; None if no colours were found."""
    texture = draws.choice(style.fills)(draws)
    cosine, sine = draws.direction()
    shading = draws.uniform(0.3, 1.0) * style.shading
    band = (window.cover >= 0.5) & (window.patch.depth * window.patch.pixels > -4.0)
    weights, x, y = texture(window.patch)[band], window.patch.x[band], window.patch.y[band]
    behind = behind[band]
    for _ in range(10):
        first, second = _pair(style.objects, draws, draws.unit())
        paint = _Paint(texture, first, second, cosine * shading, sine * shading)
        difference = np.abs(_paint_pixels(paint, weights, x, y) - behind)
        distance = difference[:, 0] * 0.3 + difference[:, 1] * 0.5 + difference[:, 2] * 0.2
        if int(np.count_nonzero(distance >= _CONTRAST)) >= 0.85 * len(weights):
            return paint
    return None


def _paint_pixels(paint: _Paint, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 [..., 3] in 0..1, for texture weights at the body's own coordinates."""
    shade = 1.0 + x * paint.shade_x + y * paint.shade_y
    return np.minimum(_mix(weights, paint.first, paint.second) * shade[..., None], 1.0)


def _draw_cast(shadow: Shadow, draws: Draws, light: tuple[float, float]) -> _Cast | None:
    if not draws.chance(shadow.chance):
        return None
    offset = draws.uniform(*shadow.offset)
    alpha, blur = draws.uniform(*shadow.alpha), draws.uniform(*shadow.blur)
    return _Cast(alpha, blur, light[0] * offset, light[1] * offset)


def _paint_object(item: _Object, layer: np.ndarray) -> tuple[slice, slice]:
    """Draws an object and its shadow into an empty layer, uint8 [h, w, 4]; says where."""
    shape = (layer.shape[0], layer.shape[1])
    body, cast = item.body, item.cast
    margin = cast.blur + abs(cast.x) + abs(cast.y) if cast else 0.0
    window = _window(body, shape, margin)
    patch = window.patch
    colour = _paint_pixels(item.paint, item.paint.texture(patch), patch.x, patch.y)
    alpha = window.cover
    if cast:
        crop = (window.rows.start, window.rows.stop, window.columns.start, window.columns.stop)
        distance = body.shape(*_local(body, crop, min(shape), cast.x, cast.y)) * body.radius
        fall = smooth(0.5 - distance / (2.0 * cast.blur)) * cast.alpha
        alpha = window.cover + fall * (1.0 - window.cover)
        colour = colour * (window.cover / np.maximum(alpha, 1e-6))[..., None]
    target = layer[window.rows, window.columns]
    target[..., 3] = _bytes(alpha)
    target[..., :3] = _bytes(colour) * (target[..., 3:] > 0)
    return window.rows, window.columns


def _render(sketch: _Sketch, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [L, h, w, 4]: a decided composition at another resolution."""
    layers = np.zeros((len(sketch.objects) + 1, *shape, 4), np.uint8)
    layers[0, ..., :3], layers[0, ..., 3] = _bytes(_backdrop_pixels(sketch.backdrop, shape)), 255
    for item, layer in zip(sketch.objects, layers[1:], strict=True):
        _paint_object(item, layer)
    return layers


def _over(layer: np.ndarray, painted: np.ndarray) -> np.ndarray:
    alpha = layer[..., 3:] / 255.0
    return painted * (1.0 - alpha) + (layer[..., :3] / 255.0) * alpha


def _mix(weights: np.ndarray, first: Colour, second: Colour) -> np.ndarray:
    low = np.array(first)
    return low + weights[..., None] * (np.array(second) - low)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _pair(palette: Palette, draws: Draws, hue: float) -> tuple[Colour, Colour]:
    """A colour of the given hue and a related one."""
    saturation, value = draws.uniform(*palette.saturation), draws.uniform(*palette.value)
    other_hue = hue + draws.sign() * draws.uniform(*palette.hue_shift) + 1.0
    other_saturation = draws.uniform(*palette.saturation)
    shift = draws.sign() * draws.uniform(*palette.value_shift)
    low, high = palette.value
    other_value = value + shift if low <= value + shift <= high else value - shift
    other_value = min(max(other_value, 0.0), 1.0)
    return (
        _from_hsv(hue, saturation, value),
        _from_hsv(other_hue - int(other_hue), other_saturation, other_value),
    )


def _from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB in 0..1 from hue (turns), saturation and value."""

    def channel(offset: float) -> float:
        k = offset + hue * 6.0
        k = k - 6.0 * int(k / 6.0)
        return value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0))

    return channel(5.0), channel(3.0), channel(1.0)

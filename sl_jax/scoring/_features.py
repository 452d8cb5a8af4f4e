"""Penalties that the embedded judge reads off the pixels of a candidate.

Each is continuous in the pixels (components aside), near 0 for a clean decomposition and of order 1
for a gross flaw. Notation, per pixel: α_i and P_i, alpha and premultiplied colour of layer i
(0 = background, which counts as shown on white: B = P_0 + 1 − α_0; the others are objects);
w_i = α_i·Π_{j>i}(1 − α_j), its visible share; S, the source; R, the recomposition; ∇, forward
differences along both axes; ⟨·⟩, the mean over pixels; u = exp(−max₃ₓ₃|∇S|²/0.02), near 1 where the
source has no edge. Arrays are planar ([..., H, W]), which numpy sums fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from scipy import ndimage

from sl_jax.scoring.request import Seen

_EDGE = 0.02
_MATTE = 0.1
_ALIKE = 0.05
_STEEP = 0.3
_GRAIN = 0.04
_LEVELS = 4
_TINY = 1e-6

Plane = Float32[np.ndarray, "height width"]
Planes = Float32[np.ndarray, "*planes height width"]


class Penalties(NamedTuple):
    """Penalties of one candidate, each a float of 0 or more.

    Attributes:
      recomposition: ⟨|S − R|⟩ over the channels.
      unlike: mean of |S − R| where objects show: things that look like nothing in the source.
      stained: the same where the background shows.
      missing: ⟨max(0, |S − R| − 0.06)⟩ times the number of blank objects.
      noise: roughness (difference from the 3 × 3 mean) of layers beyond that of the source and of
        matte edges nearby, summed over layers; n + 20·n² of it, which makes light of a little.
      partial: ⟨4·α·(1 − α)⟩ summed over objects; spared are dark pixels of low alpha (shadows),
        pixels that other objects fill up, crisp edges, and grain, which is noise.
      misaligned: share of |∇α|² of objects that lies where the source has no edge.
      unmatted: share of |∇S|² that lies where no visible matte has an edge.
      hole: ⟨1 − α_0⟩.
      ghost: |∇B·∇S| under objects, relative to |∇S|².
      fill: ⟨|B − B̂|⟩ under objects at a quarter of the resolution, B̂ being B filled in smoothly
        from where it shows; 1 at a difference of 0.1.
      unlifted: |∇B·∇S| where the background shows, relative to |∇S|²: content left in it.
      sheet: excess of an object's mean alpha over 0.35: copies of the picture.
      duplicate: overlap min(α_i, α_j)³ of pairs of objects in equal colours, relative to the
        smaller.
      cut: −∇α_i·∇α_j of pairs of objects where the source has no edge: one thing in two layers.
      lumped: share of blank objects times the evidence that another layer holds several things
        or the background holds things.
      idle: share of blank objects times `unmatted` beyond 0.03: blank layers while edges of the
        source have no matte.
      smear: 4·w_i·w_j of pairs of objects in equal colours, relative to the objects' area.
      mixed: how little the source's colour tells which layer shows a pixel, beyond 0.1, which soft
        edges and shadows amount to: Σ_i Σ_c p_ic·(1 − p_ic / Σ_j p_jc), p_ic being the share of
        Σw_i² on pixels whose colour in the source is c, of 4 × 4 × 4 colours. 0 where no two layers
        share a colour, L − 1 where all show the same ones: a layer that holds another's part
        shares that one's colours.
      varied: share of the source's colour variance that is left within layers, beyond 0.15, which
        textures amount to: Σ_i Σ w_i²·|S − μ_i|² / Σ|S − μ|², μ_i and μ being means. Layers that
        hold several things, or parts of others'.
      astray: what of that lies off each layer's *colour line*, the first principal axis of its
        colours, beyond 0.02: a shaded, textured or two-coloured thing spreads along one line (Omer
        and Werman, Color lines, CVPR 2004), several things along several.
      scattered: alpha outside each object's largest component, relative to all of it.
      truncated: −∇α_i·∇α_j of pairs where the source has an edge: things cut off by what
        covers them.
      buried: the largest hidden share of an object, 1 − Σw_i / Σα_i, beyond 0.4: layers that nobody
        sees, and layers that swallow the ones behind.
    """

    recomposition: float
    unlike: float
    stained: float
    missing: float
    noise: float
    partial: float
    misaligned: float
    unmatted: float
    hole: float
    ghost: float
    fill: float
    unlifted: float
    sheet: float
    duplicate: float
    cut: float
    lumped: float
    idle: float
    smear: float
    mixed: float
    varied: float
    astray: float
    scattered: float
    truncated: float
    buried: float


class _Slopes(NamedTuple):
    """Forward differences of planes, 0 at the far edges."""

    x: Planes
    y: Planes

    def dot(self, other: _Slopes) -> Planes:
        """∇a·∇b, without summing over planes."""
        return self.x * other.x + self.y * other.y


class _Scene(NamedTuple):
    """A candidate with what several penalties need.

    Attributes:
      source: S [3, H, W].
      colors: P of all layers [L, 3, H, W].
      alphas: α of all layers [L, H, W].
      front: Π_{j>i}(1 − α_j) for every layer [L, H, W].
      ground: B [3, H, W].
      source_slopes: ∇S.
      matte_slopes: ∇α of the objects [L − 1, H, W].
      source_energy: |∇S|², summed over channels [H, W].
      total: Σ|∇S|², kept from 0.
      unsupported: u [H, W].
      blank: how blank each object is, 0…1 [L − 1].
    """

    source: Planes
    colors: Planes
    alphas: Planes
    front: Planes
    ground: Planes
    source_slopes: _Slopes
    matte_slopes: _Slopes
    source_energy: Plane
    total: float
    unsupported: Plane
    blank: np.ndarray

    @property
    def mattes(self) -> Planes:
        """α of the objects."""
        return self.alphas[1:]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs (i, j), i > j, of objects."""
        return [(i, j) for i in range(len(self.mattes)) for j in range(i)]


def penalties(seen: Seen) -> Penalties:
    """All penalties of one candidate.

    Args:
      seen: as `read_candidate` or `read_grid` recover it; pictures longer than 128 pixels are
        first averaged down by a whole factor, which keeps edge widths comparable.
    """
    scene, error = _scene(_reduced(seen))
    missing = float(scene.blank.sum() * np.maximum(error - 0.06, 0).mean())
    partial, misaligned, unmatted = _alpha_penalties(scene)
    hole, ghost, fill, unlifted = _background_penalties(scene)
    duplicate, cut, smear, truncated = _pair_penalties(scene)
    scattered, several = _content_penalties(scene)
    mixed, varied, astray = _color_penalties(scene)
    mass = scene.mattes.mean((1, 2))
    return Penalties(
        recomposition=float(error.mean()),
        unlike=_mean_under(error, 1 - scene.front[0]),
        stained=_mean_under(error, scene.front[0]),
        missing=missing,
        noise=_noise(scene),
        partial=partial,
        misaligned=misaligned,
        unmatted=unmatted,
        hole=hole,
        ghost=ghost,
        fill=fill,
        unlifted=unlifted,
        sheet=float(np.square(np.clip((mass - 0.35) / 0.45, 0, None)).sum()),
        duplicate=duplicate,
        cut=cut,
        lumped=float(scene.blank.mean() * (several + unlifted)) if len(mass) else 0.0,
        idle=float(scene.blank.mean() * max(0.0, unmatted - 0.03)) if len(mass) else 0.0,
        smear=smear,
        mixed=mixed,
        varied=varied,
        astray=astray,
        scattered=scattered,
        truncated=truncated,
        buried=_buried(scene),
    )


def _reduced(seen: Seen, longest: int = 128) -> Seen:
    return shrunk(seen, -(-max(seen.source.shape[:2]) // longest))


def shrunk(seen: Seen, factor: int) -> Seen:
    """Averages squares of `factor` pixels; what is left over at the far edges is cut off."""
    if factor == 1:
        return seen
    height, width = (max(1, side // factor) for side in seen.source.shape[:2])

    def shrink(x: np.ndarray, axis: int) -> np.ndarray:
        cut = x[(slice(None),) * axis + (slice(height * factor), slice(width * factor))]
        shape = (*x.shape[:axis], height, cut.shape[axis] // height, width)
        return cut.reshape(*shape, cut.shape[axis + 1] // width, *x.shape[axis + 2 :]).mean(
            (axis + 1, axis + 3), dtype=np.float32
        )

    return Seen(
        shrink(seen.source, 0),
        shrink(seen.recomposition, 0),
        shrink(seen.color, 1),
        shrink(seen.alpha, 1),
    )


def _scene(seen: Seen) -> tuple[_Scene, Plane]:
    source = np.ascontiguousarray(seen.source.transpose(2, 0, 1))
    colors = np.ascontiguousarray(seen.color.transpose(0, 3, 1, 2))
    alphas = seen.alpha
    front = np.ones_like(alphas)
    for index in range(len(alphas) - 2, -1, -1):
        front[index] = front[index + 1] * (1 - alphas[index + 1])
    slopes = _slopes(source)
    energy = slopes.dot(slopes).sum(0)
    scene = _Scene(
        source=source,
        colors=colors,
        alphas=alphas,
        front=front,
        ground=colors[0] + (1 - alphas[0]),
        source_slopes=slopes,
        matte_slopes=_slopes(alphas[1:]),
        source_energy=energy,
        total=float(energy.sum()) + 1e-4 * energy.size,
        unsupported=np.exp(_widest(energy) * np.float32(-1 / _EDGE)),
        blank=np.exp(-np.square(alphas[1:].mean((1, 2)) / 0.01)),
    )
    return scene, np.abs(seen.source - seen.recomposition).mean(-1)


def _mean_under(error: Plane, weight: Plane) -> float:
    """Mean of `error` where `weight` is; less than that where it is on hardly a pixel."""
    return float((error * weight).sum() / (weight.sum() + 0.01 * weight.size))


def _noise(scene: _Scene) -> float:
    """Roughness that neither the source nor a matte's edge accounts for."""
    slopes = scene.matte_slopes
    edges = np.sqrt(slopes.dot(slopes).max(0)) - 0.25 if len(scene.mattes) else 0.0
    explained = np.maximum(_rough(scene.source).max(0), edges)
    excess = np.maximum(_rough(scene.colors).max(1), _rough(scene.alphas)) - _widest(explained)
    noise = float(np.clip(excess, 0, 0.3).mean((1, 2)).sum())
    return noise * (1 + 20 * noise)


def _alpha_penalties(scene: _Scene) -> tuple[float, float, float]:
    """`partial`, `misaligned` and `unmatted`."""
    mattes, size = scene.mattes, scene.source_energy.size
    bright = np.minimum(1, scene.colors[1:].max(1) / (0.3 * mattes + 0.01))
    shadow = (1 - bright) * np.clip((0.6 - mattes) * 5, 0, 1)
    others = mattes.sum(0) - mattes
    alone = np.clip(1 - others / (1 - mattes + 0.01), 0, 1)
    steep = scene.matte_slopes.dot(scene.matte_slopes)
    soft = 1 / (1 + np.square(_widest(steep) * np.float32(1 / _STEEP)))
    quiet = 1 / (1 + np.square(_mean3(_rough(mattes)) * np.float32(1 / _GRAIN)))
    spared = (1 - shadow) * alone * soft * quiet
    partial = float((mattes * (1 - mattes) * spared).sum()) * 4 / size
    shown = steep * scene.front[1:]
    outer = shown.copy()  # edges against the background: those between objects are cuts
    for i, j in scene.pairs:
        against = _against(scene, i, j)
        outer[i] -= against
        outer[j] -= against
    loose = float((np.maximum(outer, 0) * scene.unsupported).sum())
    bare = np.exp(_widest(shown.sum(0)) * np.float32(-1 / _MATTE))
    unmatted = float((bare * scene.source_energy).sum()) / scene.total
    return partial, loose / (float(shown.sum()) + 1e-3 * size), unmatted


def _background_penalties(scene: _Scene) -> tuple[float, float, float, float]:
    """`hole`, `ghost`, `fill` and `unlifted`."""
    shows = scene.front[0]
    aligned = np.abs(_mean3(_slopes(scene.ground).dot(scene.source_slopes).sum(0)))
    unlifted = float((shows * aligned).sum())
    known = np.square(np.square(shows))
    expected = _inpainted(np.concatenate([scene.ground * known, known[None]]))
    hidden = _quartered(np.concatenate([scene.ground * (1 - shows), (1 - shows)[None]]))
    difference = np.abs(hidden[:-1] - expected * hidden[-1:])
    return (
        float((1 - scene.alphas[0]).mean()),
        (float(aligned.sum()) - unlifted) / scene.total,
        10 * float(difference.mean()),
        unlifted / scene.total,
    )


def _pair_penalties(scene: _Scene) -> tuple[float, float, float, float]:
    """`duplicate`, `cut`, `smear` and `truncated`."""
    mattes, size = scene.mattes, scene.source_energy.size
    straight = scene.colors[1:] / (mattes[:, None] + 0.02)
    visible = mattes * scene.front[1:]
    areas = mattes.sum((1, 2)) + 0.01 * size
    duplicate = cut = smear = opposed = 0.0
    for i, j in scene.pairs:
        alike = np.exp(np.square(straight[i] - straight[j]).sum(0) * np.float32(-1 / _ALIKE))
        joint = np.minimum(mattes[i], mattes[j]) ** 3 * alike
        duplicate += float(joint.sum()) / float(min(areas[i], areas[j]))
        against = _against(scene, i, j)
        opposed += float(against.sum())
        cut += float((against * scene.unsupported).sum())
        smear += 4 * float((visible[i] * visible[j] * alike).sum())
    edges = float(scene.matte_slopes.dot(scene.matte_slopes).sum()) + 1e-3 * size
    covered = float((1 - scene.front[0]).sum()) + 0.01 * size
    return duplicate, cut / edges, smear / covered, (opposed - cut) / edges


def _color_penalties(scene: _Scene) -> tuple[float, float, float]:
    """`mixed`, `varied` and `astray`."""
    colors = scene.source.reshape(3, -1).astype(np.float64)
    shown = np.square(scene.alphas * scene.front).reshape(len(scene.alphas), -1)
    spreads = np.stack([_principal(colors, weights) for weights in shown])
    total = float(_principal(colors, np.ones_like(colors[0])).sum()) + 1e-3 * colors.shape[1]
    varied, astray = float(spreads.sum()) / total, float(spreads[:, :-1].sum()) / total
    return (
        max(0.0, _impurity(scene.source, shown) - 0.1),
        max(0.0, varied - 0.15),
        max(0.0, astray - 0.02),
    )


def _impurity(source: Planes, shown: Float32[np.ndarray, "layers pixels"]) -> float:
    """Gini impurity of the layers, equal in weight but for specks, given the source's colour."""
    levels = np.minimum((source * _LEVELS).astype(np.intp), _LEVELS - 1)
    colors = np.ravel_multi_index(tuple(levels), (_LEVELS,) * 3).ravel()
    counts = np.stack([np.bincount(colors, weights, _LEVELS**3) for weights in shown])
    shares = counts / (counts.sum(1, keepdims=True) + 0.005 * colors.size)
    return float((shares * (1 - shares / (shares.sum(0) + _TINY))).sum())


def _principal(
    colors: Float[np.ndarray, "3 pixels"], weights: Float[np.ndarray, " pixels"]
) -> Float[np.ndarray, " 3"]:
    """Weighted sums of squares of colours about their mean, by principal axis, least first."""
    centered = colors - (colors @ weights / (weights.sum() + _TINY))[:, None]
    return np.linalg.eigvalsh((centered * weights) @ centered.T)


def _buried(scene: _Scene) -> float:
    """How much more than usual the most hidden object is hidden, 0…1; specks hardly count."""
    mattes = scene.mattes
    hidden = (mattes * (1 - scene.front[1:])).sum((1, 2))
    shares = hidden / (mattes.sum((1, 2)) + 0.005 * scene.source_energy.size)
    return float(np.clip((shares - 0.4) / 0.6, 0, None).max(initial=0.0))


def _content_penalties(scene: _Scene) -> tuple[float, float]:
    """`scattered`, and the evidence (0…1) that a layer holds several things."""
    stray = 0.0
    for matte in scene.mattes:
        labelled, found = ndimage.label(matte > 0.4)
        if found > 1:
            masses = np.bincount(labelled.ravel(), weights=matte.ravel())[1:]
            stray += float(masses.sum() - masses.max())
    scattered = stray / (float(scene.mattes.sum()) + 0.01 * scene.source_energy.size)
    if float(scene.blank.sum()) < 1e-3:  # then nothing is missing from any layer
        return scattered, 0.0
    return scattered, min(1.0, max(0.0, 4 * (_inner_share(scene) - 0.06)) + 2 * scattered)


def _inner_share(scene: _Scene) -> float:
    """Share of |∇S|² inside objects, Σ α²·|∇(P/α)|², at about 8 × 8 pixels.

    So coarse, textures are averaged out, and differences between things are left.
    """
    parts = np.concatenate([scene.colors[1:], scene.mattes[:, None], scene.front[1:, None]], axis=1)
    coarse = _coarse(parts)
    colors, mattes, front = coarse[:, :3], coarse[:, 3:4], coarse[:, 4]
    color_slopes, matte_slopes = _slopes(colors), _slopes(mattes)
    inner = _Slopes(
        mattes * color_slopes.x - colors * matte_slopes.x,
        mattes * color_slopes.y - colors * matte_slopes.y,
    )
    source = _slopes(_coarse(scene.source))
    total = float(source.dot(source).sum()) + 1e-4 * front[0].size
    return float((inner.dot(inner).sum(1) * front).sum()) / total


def _against(scene: _Scene, i: int, j: int) -> Plane:
    """max(0, −∇α_i·∇α_j): one matte ends where another begins."""
    x, y = scene.matte_slopes
    return np.maximum(0, -(x[i] * x[j] + y[i] * y[j]))


def _slopes(planes: Planes) -> _Slopes:
    slopes = _Slopes(np.zeros_like(planes), np.zeros_like(planes))
    np.subtract(planes[..., 1:], planes[..., :-1], out=slopes.x[..., :-1])
    np.subtract(planes[..., 1:, :], planes[..., :-1, :], out=slopes.y[..., :-1, :])
    return slopes


def _mean3(planes: Planes) -> Planes:
    """3 × 3 means; the outermost rows and columns are averaged along one axis or not at all."""
    rows = planes.copy()
    rows[..., 1:-1, :] += planes[..., :-2, :] + planes[..., 2:, :]
    rows[..., 1:-1, :] *= np.float32(1 / 3)
    both = rows.copy()
    both[..., 1:-1] += rows[..., :-2] + rows[..., 2:]
    both[..., 1:-1] *= np.float32(1 / 3)
    return both


def _rough(planes: Planes) -> Planes:
    return np.abs(planes - _mean3(planes))


def _widest(planes: Planes) -> Planes:
    """3 × 3 maxima."""
    rows = planes.copy()
    np.maximum(rows[..., :-1, :], planes[..., 1:, :], out=rows[..., :-1, :])
    np.maximum(rows[..., 1:, :], planes[..., :-1, :], out=rows[..., 1:, :])
    both = rows.copy()
    np.maximum(both[..., :-1], rows[..., 1:], out=both[..., :-1])
    np.maximum(both[..., 1:], rows[..., :-1], out=both[..., 1:])
    return both


def _halved(planes: Planes) -> Planes:
    """2 × 2 means; an odd last row or column is repeated."""
    height, width = planes.shape[-2:]
    if height % 2 or width % 2:
        rest = [(0, 0)] * (planes.ndim - 2) + [(0, height % 2), (0, width % 2)]
        planes = np.pad(planes, rest, mode="edge")
    rows = planes[..., ::2, :] + planes[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)


def _doubled(planes: Planes, shape: tuple[int, int]) -> Planes:
    """Linear interpolation to twice the size, cut to `shape`."""
    rows = _interleaved(planes, axis=-2)
    return _interleaved(rows, axis=-1)[..., : shape[0], : shape[1]]


def _interleaved(planes: Planes, axis: int) -> Planes:
    moved = np.moveaxis(planes, axis, -1)
    out = np.empty((*moved.shape, 2), np.float32)
    out[...] = 0.75 * moved[..., None]
    out[..., 1:, 0] += 0.25 * moved[..., :-1]
    out[..., :1, 0] += 0.25 * moved[..., :1]
    out[..., :-1, 1] += 0.25 * moved[..., 1:]
    out[..., -1:, 1] += 0.25 * moved[..., -1:]
    return np.moveaxis(out.reshape(*moved.shape[:-1], -1), -1, axis)


def _quartered(planes: Planes) -> Planes:
    return _halved(_halved(planes))


def _coarse(planes: Planes) -> Planes:
    """Halved until the short side is at most 12."""
    while min(planes.shape[-2:]) > 12:
        planes = _halved(planes)
    return planes


def _inpainted(planes: Planes) -> Planes:
    """Smoothly filled colours at a quarter of the resolution, by push–pull over a pyramid.

    Args:
      planes: colours times a weight in 0…1, small where they are unknown, and the weight last.
    """
    levels = [_quartered(planes)]
    while min(levels[-1].shape[1:]) > 2:
        levels.append(_halved(levels[-1]))
    coarsest = levels.pop()
    sums = coarsest.sum((1, 2), keepdims=True)
    filled = np.broadcast_to(sums[:-1] / (sums[-1:] + _TINY), coarsest[:-1].shape)
    for level in reversed(levels):
        filled = level[:-1] + (1 - level[-1:]) * _doubled(filled, level.shape[1:])
    return filled

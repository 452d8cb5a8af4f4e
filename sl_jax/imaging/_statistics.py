"""Statistics of RGBA layers that judges and metrics share; none needs a reference.

Every function takes uint8 (0…255) or floats (0…1). `alpha` is [..., H, W]; leading axes are a
batch unless stated otherwise. Thresholds are alphas in 0…1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped
from scipy import ndimage

from sl_jax.imaging._composite import to_unit

# Below it a pixel counts as transparent: 8 levels of 255 are invisible on paper and on screens.
TRANSPARENT = 8 / 255
# From here on a pixel counts as a layer's own content.
SOLID = 0.5


def coverage(
    alpha: Shaped[np.ndarray, "*batch height width"], threshold: float = TRANSPARENT
) -> Float[np.ndarray, "*batch"]:
    """Share of pixels whose alpha exceeds the threshold, in 0…1."""
    return (to_unit(alpha) > threshold).mean(axis=(-2, -1))


def bounding_box(
    alpha: Shaped[np.ndarray, "height width"], threshold: float = TRANSPARENT
) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) around alpha > threshold, ends exclusive; None if nothing is."""
    mask = to_unit(alpha) > threshold
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def is_blank(
    alpha: Shaped[np.ndarray, "*batch height width"],
    threshold: float = TRANSPARENT,
    share: float = 1e-3,
) -> np.ndarray:
    """Whether no more than `share` of the pixels exceed the threshold; bool of the batch shape."""
    return coverage(alpha, threshold) <= share


def bleed(
    rgba: Shaped[np.ndarray, "*batch height width 4"], threshold: float = TRANSPARENT
) -> Float[np.ndarray, "*batch"]:
    """Colour variance where alpha ≈ 0.

    With M the pixels of alpha ≤ threshold: mean over R, G, B of Var_M(c), c the straight colour
    in 0…1; 0 where M is empty. It lies in 0…0.25. A clean layer has one flat colour where it
    shows nothing.
    """
    rgba = to_unit(rgba)
    mask = (rgba[..., 3:] <= threshold).astype(np.float32)
    count = np.maximum(mask.sum(axis=(-3, -2)), 1.0)
    mean = (rgba[..., :3] * mask).sum(axis=(-3, -2)) / count
    centred = (rgba[..., :3] - mean[..., None, None, :]) * mask
    return (np.square(centred).sum(axis=(-3, -2)) / count).mean(axis=-1)


def bimodality(alpha: Shaped[np.ndarray, "*batch height width"]) -> Float[np.ndarray, "*batch"]:
    """1 − mean(4·a·(1 − a)): 1 for a matte of zeros and ones, 0 for alpha 1/2 everywhere."""
    alpha = to_unit(alpha)
    return 1 - (4 * alpha * (1 - alpha)).mean(axis=(-2, -1))


def premultiplied(
    rgba: Shaped[np.ndarray, "*batch height width 4"],
) -> Float32[np.ndarray, "*batch height width 4"]:
    """(c·a, a) in 0…1: equal exactly when two layers look equal over every background."""
    rgba = to_unit(rgba)
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


def layer_distances(
    layers: Shaped[np.ndarray, "layers height width 4"],
) -> Float[np.ndarray, "layers layers"]:
    """Pairwise distance of layers relative to what they show.

    d_ij = Σ|p_i − p_j| / Σ max(p_i, p_j) over pixels and the four premultiplied channels, in
    0…1: 0 for equal layers, 1 for layers that share nothing; 0 between two empty layers.
    """
    p = premultiplied(layers).reshape(len(layers), -1)
    distances = np.zeros((len(p), len(p)), np.float32)
    for i in range(len(p)):
        for j in range(i):
            joint = np.maximum(p[i], p[j]).sum()
            gap = np.abs(p[i] - p[j]).sum()
            distances[i, j] = distances[j, i] = gap / joint if joint > 0 else 0.0
    return distances


def duplicates(
    layers: Shaped[np.ndarray, "layers height width 4"], tolerance: float = 0.1
) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j), i < j, of layers that show nearly the same; blank layers are no duplicates."""
    distances = layer_distances(layers)
    blank = is_blank(layers[..., 3])
    return tuple(
        (i, j)
        for i in range(len(layers))
        for j in range(i + 1, len(layers))
        if distances[i, j] <= tolerance and not (blank[i] or blank[j])
    )


def component_areas(
    alpha: Shaped[np.ndarray, "height width"], threshold: float = SOLID
) -> Int[np.ndarray, " components"]:
    """Areas in pixels, largest first, of the 8-connected components of alpha > threshold."""
    labelled, count = ndimage.label(to_unit(alpha) > threshold, structure=np.ones((3, 3)))
    return np.sort(np.bincount(labelled.ravel(), minlength=count + 1)[1:])[::-1]


def fragments(
    alpha: Shaped[np.ndarray, "height width"],
    threshold: float = SOLID,
    smallest: float = 0.05,
) -> int:
    """Components smaller than `smallest` times the layer's largest component."""
    areas = component_areas(alpha, threshold)
    return int((areas < smallest * areas[0]).sum()) if areas.size else 0


def l1(first: Shaped[np.ndarray, "*shape"], second: Shaped[np.ndarray, "*shape"]) -> float:
    """Mean |first − second| over everything, in 0…1."""
    return float(np.abs(to_unit(first) - to_unit(second)).mean())


def psnr(first: Shaped[np.ndarray, "*shape"], second: Shaped[np.ndarray, "*shape"]) -> float:
    """10·log10(1 / mean squared error) in dB on 0…1; infinite for equal pictures."""
    error = float(np.square(to_unit(first) - to_unit(second)).mean(dtype=np.float64))
    return float("inf") if error == 0 else -10 * float(np.log10(error))

"""What can be said of a decomposition without knowing the true layers.

None of these alone makes a good decomposition: all content in the background recomposes
perfectly. They are sanity checks beside the reference-based protocols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sl_jax import imaging

# Two pictures that differ only by rounding to 8 bits have a mean squared error of 1/12 level²;
# beyond it there is nothing to measure, and an infinite PSNR would swallow every mean.
PSNR_CEILING = 10 * math.log10(12 * 255**2)


@dataclass(frozen=True)
class ReferenceFree:
    """Reference-free measures of one decomposition.

    Attributes:
      psnr: of the recomposition against the source, dB, at most PSNR_CEILING (58.9).
      recomposition_l1: mean |recomposition − source|, 0..1.
      blank_rate: share of layers that show nothing. A spare layer at the end is blank by design.
      duplicate_rate: share of layers that show nearly what a layer behind them shows.
      fragment_rate: share of layers with crumbs: connected components of less than 5 % of the
        layer's largest.
      bleed: colour variance where alpha ≈ 0, mean over layers, 0..0.25.
      bimodality: 1 − mean(4·α·(1 − α)), mean over layers, 0..1; 1 is a matte without half tones.
    """

    psnr: float
    recomposition_l1: float
    blank_rate: float
    duplicate_rate: float
    fragment_rate: float
    bleed: float
    bimodality: float


def reference_free(layers: np.ndarray, source: np.ndarray) -> ReferenceFree:
    """Measures one decomposition against its source picture alone.

    Args:
      layers: uint8 [L, H, W, 4] straight RGBA, back to front, L ≥ 1.
      source: uint8 [H, W, 3], the picture that was decomposed.

    Raises:
      ValueError: if the picture sizes differ or there is no layer.
    """
    if len(layers) == 0 or layers.shape[1:3] != source.shape[:2]:
        raise ValueError(
            f"layers {list(layers.shape)} do not belong to a source {list(source.shape)}; please "
            "pass at least one layer of the source's height and width"
        )
    recomposition = imaging.recompose(layers)
    alpha = layers[..., 3]
    copies = {later for _, later in imaging.duplicates(layers)}
    return ReferenceFree(
        psnr=min(imaging.psnr(recomposition, source), PSNR_CEILING),
        recomposition_l1=imaging.l1(recomposition, source),
        blank_rate=float(np.mean(imaging.is_blank(alpha))),
        duplicate_rate=len(copies) / len(layers),
        fragment_rate=float(np.mean([imaging.fragments(matte) > 0 for matte in alpha])),
        bleed=float(np.mean(imaging.bleed(layers))),
        bimodality=float(np.mean(imaging.bimodality(alpha))),
    )

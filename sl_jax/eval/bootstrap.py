"""Confidence intervals by the bootstrap over pictures.

The percentile bootstrap (Efron 1979): pictures are drawn with replacement as often as there are
pictures, the mean is taken, and the interval holds the central share of many such means. Pictures
are the unit: several seeds or samples of one picture are not independent, so they are averaged
within the picture first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2_000_000  # drawn indices held in memory at once


class Interval(NamedTuple):
    """A mean and its confidence interval; `count` pictures stand behind it.

    low and high are nan with fewer than two pictures, and all three with none.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0 (False where it is nan)."""
        return self.low > 0 or self.high < 0


def interval(
    values: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean over pictures with its bootstrap interval.

    Args:
      values: [pictures] or [pictures, repeats]; repeats are averaged within their picture. nan
        marks what was not measured: it is left out, and a picture with nothing measured too.
      level: central share of the resampled means that the interval holds, 0 < level < 1.
      resamples: number of bootstrap means.
      seed: the same seed and number of pictures resample the same pictures.

    Raises:
      ValueError: for other shapes or levels.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; 0.95 is usual")
    pictures = _per_picture(values)
    count = len(pictures)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(pictures.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    means = _resampled_means(pictures, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), count)


def paired_difference(
    after: ArrayLike,
    before: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of after − before over pictures that both models saw, with its interval.

    Differences are taken element by element before anything is resampled, so that what makes a
    picture hard for both cancels. Shapes and nan as in `interval`; an element counts only where
    both were measured.

    Raises:
      ValueError: if the shapes differ.
    """
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    if after.shape != before.shape:
        raise ValueError(
            f"paired values need the same pictures and seeds, got shapes {after.shape} and "
            f"{before.shape}; please keep the common pictures of both, in one order"
        )
    return interval(after - before, level=level, resamples=resamples, seed=seed)


def _per_picture(values: ArrayLike) -> np.ndarray:
    """float64 [pictures measured]: mean over repeats, nan left out."""
    array = np.asarray(values, np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise ValueError(f"values must be [pictures] or [pictures, repeats], got {array.shape}")
    measured = ~np.isnan(array)
    kept = measured.any(axis=1)
    sums = np.where(measured, array, 0.0).sum(axis=1)
    return sums[kept] / measured.sum(axis=1)[kept]


def _resampled_means(pictures: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(pictures))
    means = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(pictures))
        means.append(pictures[rng.integers(0, len(pictures), shape)].mean(axis=1))
    return np.concatenate(means)

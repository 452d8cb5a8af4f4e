"""Aspect buckets: the few static picture shapes that programs are compiled for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sl_jax.data.pictures import longest_side_size

UNIT = 16  # pixels a token covers on each side: VAE factor 8 × patch 2

# width : height of `standard_buckets`
STANDARD_ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))


class Bucket(NamedTuple):
    """A static picture shape in pixels; both sides are multiples of 16."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_buckets(
    sizes: Iterable[Sequence[int]], field: str = "buckets", unit: int = UNIT
) -> tuple[Bucket, ...]:
    """Checks a configured list of sizes.

    Args:
      sizes: (height, width) pairs in pixels.
      field: name of the config field, for messages.
      unit: every side must be a multiple of this.

    Returns:
      The buckets in the given order.

    Raises:
      ValueError: no sizes, one that is not a pair of positive multiples of `unit`, or one that
        occurs twice; the message names the field and the value.
    """
    buckets: list[Bucket] = []
    for position, size in enumerate(sizes):
        name = f"{field}[{position}] = {size!r}"
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"{name}; please give a (height, width) pair, such as (640, 480)")
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in size):
            raise ValueError(f"{name}; please give both sides as whole numbers of pixels")
        if not all(side > 0 and side % unit == 0 for side in size):
            nearest = tuple(max(round(side / unit), 1) * unit for side in size)
            raise ValueError(
                f"{name}; both sides must be positive multiples of {unit}, such as {nearest}"
            )
        bucket = Bucket(*size)
        if bucket in buckets:
            raise ValueError(f"{name} is there twice; please remove one")
        buckets.append(bucket)
    if not buckets:
        raise ValueError(f"{field} is empty; please give at least one (height, width)")
    return tuple(buckets)


def standard_buckets(
    side: int = 640, aspects: Iterable[tuple[float, float]] = STANDARD_ASPECTS
) -> tuple[Bucket, ...]:
    """Buckets whose longest side is `side`, for usual aspect ratios.

    Args:
      side: longest side in pixels, a positive multiple of 16.
      aspects: (width, height) proportions. Those that round to the same shape, as they do at small
        sizes, give one bucket.

    Raises:
      ValueError: `side` is not a positive multiple of 16.
    """
    if side <= 0 or side % UNIT:
        raise ValueError(f"side = {side}; please use a positive multiple of {UNIT}, such as 640")
    sizes = (longest_side_size(height, width, side) for width, height in aspects)
    return make_buckets(dict.fromkeys(sizes))


def nearest_bucket(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket that stretches a picture least.

    The distance is |log(aspect of the picture / aspect of the bucket)|. Among buckets of one
    aspect ratio the one nearest in area wins, then the first in order.
    """
    aspect, area = math.log(width / height), math.log(width * height)

    def distance(bucket: Bucket) -> tuple[float, float]:
        stretch = abs(aspect - math.log(bucket.width / bucket.height))
        # Rounded: equal aspects must tie whatever the last bit of their logarithms.
        return round(stretch, 9), round(abs(area - math.log(bucket.width * bucket.height)), 9)

    return min(buckets, key=distance)

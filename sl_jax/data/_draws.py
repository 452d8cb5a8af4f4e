"""Seeded numbers that are the same on every machine and under every numpy version.

Procedural designs must not differ by one bit between machines. Three things could make them
differ, and none is used: numpy's distribution methods (their streams may change between versions,
while the raw output of a bit generator may not), the maths library's sine, power and logarithm
(their last bit differs between platforms), and sums whose order depends on the processor. What is
left, the four operations, square root, floor and comparisons, is exact under IEEE 754.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

_TAU = 6.283185307179586
_BLOCK = 256


class Draws:
    """A stream of seeded draws.

    Args:
      entropy: non-negative integers that name the stream; equal integers give equal streams.
    """

    def __init__(self, entropy: Sequence[int]) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(entropy)))
        self._block: list[float] = []

    def unit(self) -> float:
        """The next number in [0, 1), in steps of 2^-53."""
        if not self._block:
            self._block = _to_unit(self._bits.random_raw(_BLOCK)).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.unit() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of `items`, each equally likely."""
        return items[int(self.unit() * len(items))]

    def sign(self) -> float:
        """-1.0 or 1.0."""
        return 1.0 if self.chance(0.5) else -1.0

    def direction(self) -> tuple[float, float]:
        """A point of the unit circle, as (cosine, sine)."""
        return circle(self.unit())

    def lattice(self, rows: int, columns: int) -> np.ndarray:
        """float64 [rows, columns] of numbers in [0, 1)."""
        return _to_unit(self._bits.random_raw(rows * columns)).reshape(rows, columns)


def circle(turn: float) -> tuple[float, float]:
    """(cosine, sine) of `turn` full turns, from a polynomial, to about 1e-9."""
    quarter = int(turn * 4.0 + 0.5)
    angle = (turn - quarter * 0.25) * _TAU
    square = angle * angle
    sine = angle * (
        1.0 - square / 6.0 * (1.0 - square / 20.0 * (1.0 - square / 42.0 * (1.0 - square / 72.0)))
    )
    cosine = 1.0 - square / 2.0 * (
        1.0 - square / 12.0 * (1.0 - square / 30.0 * (1.0 - square / 56.0 * (1.0 - square / 90.0)))
    )
    rotations = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))
    return rotations[quarter % 4]


def _to_unit(raw: np.ndarray) -> np.ndarray:
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

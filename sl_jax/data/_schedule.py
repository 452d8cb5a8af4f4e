"""Which pictures, which bucket and how many layers each training step has: pure arithmetic.

Everything here is a function of (seed, numbers of pictures, step), the same in every process and
on every machine: randomness is the raw bit stream of Philox, which numpy keeps stable, never its
derived distributions, which it may change.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import numpy as np

_BLOCK = 1024  # steps whose draws are made together
_KEPT_PASSES = 4  # reading ahead crosses into the next pass while this one is still asked for
_DRAW, _SHUFFLE, _REPLACE = range(3)  # streams of one seed


class Schedule:
    """Draws for each step one bucket, one number of layers, and the pictures of that bucket.

    A bucket is drawn in proportion to the number of its pictures. Within a bucket, pictures come
    in passes: each pass holds every picture once, in a new order, and a step that crosses from one
    pass to the next repeats none if the bucket has enough of them.
    """

    def __init__(
        self, sizes: Sequence[int], groups: int, layer_weights: Sequence[float], seed: int
    ):
        """Arguments: pictures per bucket, pictures per step, weights of the layer choices."""
        self._edges = _edges(sizes)
        self._layer_edges = _edges(layer_weights)
        self._seed = seed
        self._groups = groups
        self._passes = [
            _Passes(size, groups, (seed, _SHUFFLE, bucket)) for bucket, size in enumerate(sizes)
        ]
        # [k] counts, for each bucket, the steps before block k that have it.
        self._counts = [np.zeros(len(sizes), np.int64)]
        self._lock = threading.Lock()
        self._draws = functools.lru_cache(maxsize=8)(self._draw_block)

    def shape(self, step: int) -> tuple[int, int]:
        """(bucket number, layer choice number) of a step."""
        block, offset = divmod(step, _BLOCK)
        buckets, layers = self._draws(block)
        return int(buckets[offset]), int(layers[offset])

    def pictures(self, step: int) -> list[int]:
        """Numbers of the pictures, within the step's bucket, in the order of the step's slots."""
        block, offset = divmod(step, _BLOCK)
        buckets, _ = self._draws(block)
        bucket = buckets[offset]
        with self._lock:
            earlier = self._count_before(block)[bucket] + int((buckets[:offset] == bucket).sum())
            first = int(earlier) * self._groups
            return self._passes[bucket].take(first, self._groups)

    def substitutes(self, step: int, slot: int, count: int) -> list[int]:
        """All `count` pictures of a bucket in the order in which they may stand in for a slot's."""
        start = int(_raw((self._seed, _REPLACE, step, slot), 1)[0] % np.uint64(count))
        return [(start + offset) % count for offset in range(count)]

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        uniform = _uniform(_raw((self._seed, _DRAW, block), 2 * _BLOCK))
        return (
            np.searchsorted(self._edges, uniform[:_BLOCK], side="right"),
            np.searchsorted(self._layer_edges, uniform[_BLOCK:], side="right"),
        )

    def _count_before(self, block: int) -> np.ndarray:
        while len(self._counts) <= block:
            buckets, _ = self._draws(len(self._counts) - 1)
            added = np.bincount(buckets, minlength=len(self._passes))
            self._counts.append(self._counts[-1] + added)
        return self._counts[block]


class _Passes:
    """Endless shuffled passes over `size` pictures, cut into steps of `groups`."""

    def __init__(self, size: int, groups: int, key: tuple[int, ...]):
        self._size = size
        self._groups = groups
        self._key = key
        # Every so many passes, a pass begins with a step and does not depend on the one before;
        # with fewer pictures than a step has, none does.
        self._independent = groups // math.gcd(size, groups) if size >= groups else 1
        self._kept: dict[int, np.ndarray] = {}

    def take(self, first: int, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            number, start = divmod(first + len(taken), self._size)
            taken += self._pass(number)[start : start + count - len(taken)].tolist()
        return taken

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._kept:
            start = number
            while start % self._independent and start - 1 not in self._kept:
                start -= 1
            for current in range(start, number + 1):
                order = self._shuffled(current)
                if current % self._independent:
                    order = self._apart(order, self._kept[current - 1], current)
                self._kept[current] = order
                if len(self._kept) > _KEPT_PASSES:
                    del self._kept[next(iter(self._kept))]
        return self._kept[number]

    def _apart(self, order: np.ndarray, previous: np.ndarray, number: int) -> np.ndarray:
        """Moves pictures back that would meet themselves in the step that crosses the passes."""
        tail = number * self._size % self._groups
        free = np.flatnonzero(~np.isin(order, previous[self._size - tail :]))
        head = free[: self._groups - tail]
        return np.concatenate([order[head], np.delete(order, head)])

    def _shuffled(self, number: int) -> np.ndarray:
        return np.argsort(_raw((*self._key, number), self._size), kind="stable")


def _raw(key: tuple[int, ...], count: int) -> np.ndarray:
    """uint64 [count], a function of the key."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _uniform(raw: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return (raw >> np.uint64(11)) * 2.0**-53


def _edges(weights: Sequence[float]) -> np.ndarray:
    """Inner boundaries of the intervals of [0, 1) whose lengths are proportional to the weights."""
    total = np.cumsum(np.asarray(weights, np.float64))
    return total[:-1] / total[-1]

"""Checksums of arrays, computed on their devices, however they are laid out there."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, str]:
    """Path of each array in a tree → 16 hex digits, which depend on every bit and its place.

    Sums of integers, which have no order: any mesh and any number of processes, which call this
    together, get the same. They are made against damage, not against forgery. Arrays have at most
    four bytes an element.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    sums = jax.device_get(_sums([jnp.asarray(leaf) for leaf in leaves]))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(names, sums, strict=True)}


@jax.jit
def _sums(leaves: Iterable[Array]) -> UInt32[Array, "leaves 2"]:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf: Array) -> UInt32[Array, " 2"]:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool else leaf
    words = jax.lax.bitcast_convert_type(bits, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = _places(leaf.shape)
    # An odd weight for each place: a word that changes alone always shows.
    weighted = words * (2 * place + 1)
    return jnp.stack([jnp.sum(weighted), jnp.sum(_mixed(words + _mixed(place)))])


def _places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The number of each element, from 0, modulo 2³²."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % (1 << 32))
        place += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection in which every bit changes half of the others (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

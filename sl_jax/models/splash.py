"""Splash attention, JAX's flash attention in Pallas for TPUs, where only padded keys are masked.

No table of scores is ever in memory: a tile of them lives on the core, from bfloat16 products
that accumulate in float32. Kernels: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

_LANES = 128


class BlockLimits(NamedTuple):
    """Largest tiles of the kernels, in tokens; multiples of 128.

    The defaults leave half of the 16 MB that a kernel may use on a v5e to the compiler: at head
    size 128 the forward pass keeps 1,024 queries with 2,048 keys on the core, the backward pass
    512 with 2,048, and both make scores for 512 keys at a time. Large query tiles save reading
    keys again, large key tiles save partial sums of the queries' gradient.

    Attributes:
        query: queries of a tile in the forward pass, half of it in the backward pass.
        key: keys of a tile.
        scores: keys of a tile for which scores exist at one time.
        fused: key tiles up to which the backward pass is one kernel. It needs five products of
            the scores' size where two kernels need seven, but holds a copy of the queries'
            gradient for each key tile.
    """

    query: int = 1024
    key: int = 2048
    scores: int = 512
    fused: int = 8


def splash_attention(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    key_lengths: Int[Array, " b"] | None,
    *,
    limits: BlockLimits = BlockLimits(),  # noqa: B008 (immutable)
    interpret: bool = False,
) -> Float[Array, "b s h d"]:
    """Softmax attention, scaled by 1/√d, over the first `key_lengths` keys of each sample.

    Any numbers of queries and keys are padded to whole tiles, and what that adds is masked or cut
    off; every query needs one valid key.

    Args:
        query, key, value: projected tokens; any head size.
        key_lengths: valid keys per sample, at least 1, or None where all are.
        limits: the largest tiles.
        interpret: computes what the kernels would, on any platform and slowly.
    """
    queries, heads, size = query.shape[1:]
    keys = key.shape[1]
    blocks = block_sizes(queries, keys, limits)
    padded_queries, padded_keys = (
        _round_up(queries, blocks.block_q),
        _round_up(keys, blocks.block_kv),
    )
    mask = kernels.MultiHeadMask([kernels.FullMask((padded_queries, padded_keys))] * heads)
    kernel = kernels.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    scaled = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    arrays = (
        _heads_first(scaled, padded_queries),
        _heads_first(key, padded_keys),
        _heads_first(value, padded_keys),
    )
    if key_lengths is None and padded_keys == keys:
        out = jax.vmap(kernel)(*arrays)
    else:
        lengths = jnp.full(query.shape[:1], keys) if key_lengths is None else key_lengths
        padding = (jnp.arange(padded_keys) >= lengths[:, None]).astype(jnp.int32)
        segments = kernels.SegmentIds(jnp.zeros(padded_queries, jnp.int32), padding)
        axes = (0, 0, 0, kernels.SegmentIds(None, 0))
        out = jax.vmap(kernel, axes)(*arrays, segments)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def block_sizes(
    queries: int,
    keys: int,
    limits: BlockLimits = BlockLimits(),  # noqa: B008 (immutable)
) -> kernels.BlockSizes:
    """Tiles for so many tokens: those that need the least padding, then the largest.

    With the default limits, for as many queries as keys:

    | tokens | queries of a tile, forward and backward | keys | padded to | backward kernels |
    | --- | --- | --- | --- | --- |
    | 336 | 384, 384 | 384 | 384, 384 | 1 |
    | 2,912 | 1,024, 512 | 1,536 | 3,072, 3,072 | 1 |
    | 9,620 | 512, 512 | 2,048 | 9,728, 10,240 | 1 |
    | 10,112 | 1,024, 512 | 2,048 | 10,240, 10,240 | 1 |
    | 25,088 | 512, 512 | 1,024 | 25,088, 25,600 | 2 |
    """
    half = limits.query // 2
    query = _block(queries, limits.query, 2 * _LANES if queries > half else _LANES)
    key = _block(keys, limits.key, limits.scores if keys > limits.scores else _LANES)
    scores = min(key, limits.scores)
    fused = -(-keys // key) <= limits.fused
    backward = query // 2 if query > half else query
    return kernels.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=scores,
        block_q_dkv=backward,
        block_kv_dkv=key,
        block_kv_dkv_compute=scores,
        block_q_dq=None if fused else backward,
        block_kv_dq=None if fused else scores,
        use_fused_bwd_kernel=fused,
    )


def _block(length: int, largest: int, step: int) -> int:
    """The tile of half the largest size to the largest that pads least; the larger of equals."""
    if length <= largest:
        return _round_up(length, step)
    candidates = range(_round_up(largest // 2, step), largest + 1, step)
    return min(candidates, key=lambda block: (_round_up(length, block), -block))


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _heads_first(x: Float[Array, "b s h d"], length: int) -> Float[Array, "b h s d"]:
    """Zeros behind the tokens up to `length` of them."""
    padded = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    return jnp.swapaxes(padded, 1, 2)

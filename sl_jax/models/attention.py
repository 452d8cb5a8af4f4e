"""Joint attention over [image, text] tokens with padded text at the end."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["xla", "cudnn"]


def attend(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    key_lengths: Int[Array, " b"] | None,
    implementation: Implementation,
) -> Float[Array, "b s h d"]:
    """Softmax attention, scaled by 1/√d, over the first `key_lengths` keys of each sample.

    Args:
        query, key, value: projected tokens.
        key_lengths: valid keys per sample (the rest is padding, masked as keys only; padded
            queries are computed), or None where nothing is padded.
        implementation: "xla" runs anywhere; "cudnn" is flash attention on NVIDIA GPUs (bf16).
    """
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation=implementation
    )


def default_implementation(platform: str, dtype: Any) -> Implementation:
    """The fastest implementation for a device platform ("cpu", "gpu" or "tpu") and compute dtype.

    cuDNN's flash attention takes 16-bit floats only.
    """
    fused = platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2
    return "cudnn" if fused else "xla"

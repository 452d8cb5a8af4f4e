"""Joint attention over [image, text] tokens with padded text at the end."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["xla", "cudnn", "splash"]
Axes = tuple[str | None, ...]

_QUERY: Axes = ("batch", "tokens", "heads", None)
_KEY: Axes = ("batch", "attention_tokens", "heads", None)


class Shards(Protocol):
    """How arrays lie on a mesh, by the logical names of their axes: `parallel.mesh.Layout`."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Constrains an array to its layout."""

    def parts(self, axis: str) -> int:
        """Into how many parts the mesh splits an axis."""

    def on_shards(
        self, function: Callable[..., Array], arrays: Sequence[Array], axes: Sequence[Axes]
    ) -> Array:
        """Maps `function` over the devices' own parts; the result lies like the first array."""


@dataclass(frozen=True)
class Attention:
    """Softmax attention, scaled by 1/√d, on one device or on a mesh.

    On a mesh batch and heads are split, and queries over its axis of tokens, each part of them
    with all keys. Kernels cannot be split by the compiler: they run on each device's own part.

    Attributes:
        implementation: "xla" runs anywhere, and keeps the scores of all pairs of tokens in memory;
            "cudnn" (NVIDIA GPUs) and "splash" (TPUs) are flash attention.
        shards: the mesh, or None to leave the layout to the compiler.
        interpret: splash is computed by its definition, slowly and on any platform: for tests.
    """

    implementation: Implementation = "xla"
    shards: Shards | None = None
    interpret: bool = False

    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        key_lengths: Int[Array, " b"] | None,
    ) -> Float[Array, "b s h d"]:
        """Attention to the first `key_lengths` keys of each sample.

        Args:
            query, key, value: projected tokens.
            key_lengths: valid keys per sample, at least 1 (the rest is padding, masked as keys
                only; padded queries are computed), or None where nothing is padded.
        """
        attend = partial(_attend, self.implementation, self.interpret)
        if self.shards is None:
            return attend(query, key, value, key_lengths)
        query = self.shards(query, _QUERY)
        key, value = (self.shards(x, _KEY) for x in (key, value))
        if self.implementation == "xla":
            return attend(query, key, value, key_lengths)
        queries = query.shape[1]
        padding = -queries % self.shards.parts("tokens")
        query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
        arrays, axes = [query, key, value], [_QUERY, _KEY, _KEY]
        if key_lengths is not None:
            arrays, axes = [*arrays, key_lengths], [*axes, ("batch",)]
        return self.shards.on_shards(attend, arrays, axes)[:, :queries]


def _attend(
    implementation: Implementation,
    interpret: bool,
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    key_lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b s h d"]:
    if implementation == "splash":
        # Pallas takes a while to import, and only TPUs want it.
        from sl_jax.models.splash import splash_attention

        return splash_attention(query, key, value, key_lengths, interpret=interpret)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation=implementation
    )


def choose_implementation(
    wanted: str, platform: str, dtype: Any, head_size: int
) -> tuple[Implementation, str]:
    """The implementation for a mesh's devices, and why it is a slow one where it is.

    The platform is that of the devices that will compute, which need not be the host's: programs
    are also compiled for accelerators that are not there.

    Args:
        wanted: "auto" for the platform's flash attention where it fits, and else "xla"; or an
            implementation.
        platform: "cpu", "gpu" or "tpu".
        dtype: compute dtype.
        head_size: channels of one head.

    Raises:
        ValueError: `wanted` is unknown, or does not run there.
    """
    known = typing.get_args(Implementation)
    if wanted not in ("auto", *known):
        raise ValueError(f"attention is {wanted!r}; please use one of auto, {', '.join(known)}")
    dtype = jnp.dtype(dtype)
    if wanted != "auto":
        if problem := _unsuited(wanted, platform, dtype, head_size):
            raise ValueError(
                f"attention is {wanted!r}, but {problem}; please use 'auto', which chooses by "
                "the devices' platform, the dtype and the head size"
            )
        return wanted, ""
    fused: dict[str, Implementation] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    if platform not in fused:
        return "xla", ""
    problem = _unsuited(fused[platform], platform, dtype, head_size)
    if fused[platform] == "splash" and dtype != jnp.bfloat16:
        problem = f"splash multiplies in bfloat16, and the dtype is {dtype.name}"
    return ("xla", problem) if problem else (fused[platform], "")


def _unsuited(wanted: str, platform: str, dtype: jnp.dtype, head_size: int) -> str:
    """What keeps an implementation from computing this; empty if nothing does."""
    if wanted == "splash":
        if platform != "tpu":
            return f"splash runs on TPUs, and the devices' platform is {platform}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"splash takes bfloat16 or float32, and the dtype is {dtype.name}"
    if wanted == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"cudnn runs on NVIDIA GPUs, and the devices' platform is {platform}"
        if dtype.itemsize != 2:
            return f"cudnn takes 16-bit floats, and the dtype is {dtype.name}"
        if head_size % 8 or head_size > 128:
            return f"cudnn takes heads of 8, 16, … 128 channels, and these have {head_size}"
    return ""

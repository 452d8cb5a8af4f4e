"""The Qwen-Image(-Layered) autoencoder, for single frames, channels last.

The published network is a causal *video* autoencoder. A single frame sees zeros in its past, so
of every causal 3-D kernel only the last temporal tap reaches the result, and the ``time_conv`` of
the resamplers never runs: what is left is the 2-D network below, with no approximation.
Behaviour as in diffusers 0.42 (``AutoencoderKLQwenImage``), which is the oracle of the tests.

Parameter names follow the checkpoint's tensor names by one rule:

* dots separate path parts, and a list index joins the part before it:
  ``encoder.down_blocks.3.resample.1.weight`` is ``encoder/down_blocks_3/resample_1/kernel``;
* a convolution's ``weight`` is ``kernel`` of shape (kh, kw, in, out): from a 5-D causal weight
  (out, in, t, kh, kw) the last tap ``[:, :, -1]``, then both kinds as (out, in, kh, kw) transposed
  by (2, 3, 1, 0); ``bias`` stays;
* a norm's ``gamma``, (C, 1, 1) or (C, 1, 1, 1), is ``scale`` of shape (C,);
* tensors under ``time_conv`` have no parameter here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_LOGVAR_RANGE = (-30.0, 20.0)
_NORM_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The autoencoder's shape: the fields of ``vae/config.json`` under their own names.

    ``dataclasses.asdict`` gives the file's content back (without its ``_class_name``).

    Attributes:
      base_dim: channels at full resolution; ``dim_mult`` multiplies it, one entry per resolution.
      z_dim: channels of the latent.
      num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
      attn_scales: must be empty (the published code cannot run attention there either).
      temperal_downsample: (so spelled in the file) one entry per halving of the picture's sides;
        whether time is halved too changes nothing for single frames.
      dropout: must be 0.
      input_channels: 3 for RGB, 4 for RGBA.
      latents_mean: per-channel mean of the raw latents, ``z_dim`` numbers.
      latents_std: per-channel standard deviation of the raw latents, ``z_dim`` positive numbers.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    input_channels: int = 3
    attn_scales: tuple[float, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("base_dim", "z_dim", "num_res_blocks", "input_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae config: {name} is {getattr(self, name)}; give at least 1")
        if self.attn_scales:
            raise ValueError(
                f"vae config: attn_scales is {list(self.attn_scales)}, but attention is supported "
                "in the middle blocks only; please use a checkpoint with attn_scales []"
            )
        if self.dropout:
            raise ValueError(f"vae config: dropout is {self.dropout}; only 0 is supported")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"vae config: dim_mult has {len(self.dim_mult)} entries, so temperal_downsample "
                f"needs {len(self.dim_mult) - 1}, not {len(self.temperal_downsample)}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"vae config: {name} has {len(getattr(self, name))} entries; "
                    f"give one per latent channel, z_dim = {self.z_dim}"
                )
        if min(self.latents_std) <= 0:
            raise ValueError("vae config: every entry of latents_std must be positive")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Reads the content of a checkpoint's ``vae/config.json``.

        Raises:
          ValueError: a field is missing, unknown or has a value that this network does not support.
            Keys that begin with an underscore are the file's own bookkeeping and are passed over.
        """
        class_name = config.get("_class_name", "AutoencoderKLQwenImage")
        if class_name != "AutoencoderKLQwenImage":
            raise ValueError(
                f"vae config: _class_name is {class_name!r}, not 'AutoencoderKLQwenImage'; "
                "please point to the vae/ folder of a Qwen-Image(-Layered) checkpoint"
            )
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(given.keys() - fields.keys()):
            raise ValueError(f"vae config: unknown fields {unknown}; known are {sorted(fields)}")
        required = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(required - given.keys()):
            raise ValueError(f"vae config: the fields {missing} are missing")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** len(self.temperal_downsample)


class VaePosterior(NamedTuple):
    """A diagonal Gaussian over raw (not normalized) latents, both float32 [B, h, w, z_dim].

    Attributes:
      mean: also the posterior's mode.
      logvar: log variance, clipped to [-30, 20].
    """

    mean: Float[Array, "b h w z"]
    logvar: Float[Array, "b h w z"]


def normalize_latents(latents: Float[Array, "... z"], config: VaeConfig) -> Float[Array, "... z"]:
    """Raw latents to the units that the diffusion model sees: (z - mean) / std per channel."""
    mean = jnp.asarray(config.latents_mean, latents.dtype)
    return (latents - mean) / jnp.asarray(config.latents_std, latents.dtype)


def denormalize_latents(latents: Float[Array, "... z"], config: VaeConfig) -> Float[Array, "... z"]:
    """The inverse of ``normalize_latents``: z * std + mean per channel."""
    std = jnp.asarray(config.latents_std, latents.dtype)
    return latents * std + jnp.asarray(config.latents_mean, latents.dtype)


class _Conv(nn.Module):
    """A 2-D convolution with bias; ``padding`` is ((top, bottom), (left, right))."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
        if self.size == 1:
            return x @ kernel[0, 0] + bias
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding or ((self.size // 2,) * 2,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias


class _Norm(nn.Module):
    """x / |x| over the channels, times sqrt(C) and a learned scale; computed in float32.

    Where |x| is below 1e-12 the gradient with respect to x is taken as zero: its true size, up to
    1e12 per norm, would overflow within a few blocks on an all-zero picture.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), self.param_dtype)
        x = x.astype(jnp.float32)
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        tiny = square <= _NORM_EPS**2
        x = jnp.where(tiny, jax.lax.stop_gradient(x), x)
        inverse = jax.lax.rsqrt(jnp.where(tiny, _NORM_EPS**2, square))
        gain = scale.astype(jnp.float32) * math.sqrt(channels)
        return (x * inverse * gain).astype(self.dtype)


class _Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut."""

    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = _Conv(self.features, size=1, name="conv_shortcut", **types)(x)
        x = _Conv(self.features, name="conv1", **types)(nn.silu(_Norm(name="norm1", **types)(x)))
        x = _Conv(self.features, name="conv2", **types)(nn.silu(_Norm(name="norm2", **types)(x)))
        return x + shortcut


class _Attention(nn.Module):
    """Single-head self-attention over all positions of a frame, with a residual."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, channels = x.shape
        normed = _Norm(name="norm", **types)(x)
        qkv = _Conv(3 * channels, size=1, name="to_qkv", **types)(normed)
        q, k, v = jnp.split(qkv.reshape(batch, height * width, 3 * channels), 3, axis=-1)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(channels), axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + _Conv(channels, size=1, name="proj", **types)(mixed)


class _MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Resnet(x.shape[-1], name="resnets_0", **types)(x)
        x = _Attention(name="attentions_0", **types)(x)
        return _Resnet(x.shape[-1], name="resnets_1", **types)(x)


class _Downsample(nn.Module):
    """Halves both sides: one row and column of zeros at bottom and right, stride-2 convolution."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return _Conv(
            x.shape[-1],
            stride=2,
            padding=((0, 1), (0, 1)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="resample_1",
        )(x)


class _Upsample(nn.Module):
    """Doubles both sides by repetition, then a convolution to half the channels."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(
            x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels)
        ).reshape(batch, 2 * height, 2 * width, channels)
        return _Conv(
            channels // 2, dtype=self.dtype, param_dtype=self.param_dtype, name="resample_1"
        )(x)


class _UpBlock(nn.Module):
    """Resnets at one resolution and, except at the highest, the upsampler to the next."""

    features: int
    resnets: int
    upsample: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i in range(self.resnets):
            x = _Resnet(self.features, name=f"resnets_{i}", **types)(x)
        return _Upsample(name="upsamplers_0", **types)(x) if self.upsample else x


class _Encoder(nn.Module):
    """Pixels to 2 * z_dim channels, before ``quant_conv``."""

    config: VaeConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w z2"]:
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Conv(config.base_dim, name="conv_in", **types)(x)
        index = 0  # the checkpoint numbers resnets and downsamplers in one flat list
        for level, multiplier in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                features = config.base_dim * multiplier
                x = _Resnet(features, name=f"down_blocks_{index}", **types)(x)
                index += 1
            if level < len(config.dim_mult) - 1:
                x = _Downsample(name=f"down_blocks_{index}", **types)(x)
                index += 1
        x = _MidBlock(name="mid_block", **types)(x)
        x = nn.silu(_Norm(name="norm_out", **types)(x))
        return _Conv(2 * config.z_dim, name="conv_out", **types)(x)


class _Decoder(nn.Module):
    """Latents, after ``post_quant_conv``, to pixels, not clamped."""

    config: VaeConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        levels = [config.base_dim * multiplier for multiplier in reversed(config.dim_mult)]
        x = _Conv(levels[0], name="conv_in", **types)(x)
        x = _MidBlock(name="mid_block", **types)(x)
        for i, features in enumerate(levels):
            upsample = i < len(levels) - 1
            block = _UpBlock(
                features, config.num_res_blocks + 1, upsample, name=f"up_blocks_{i}", **types
            )
            x = block(x)
        x = nn.silu(_Norm(name="norm_out", **types)(x))
        return _Conv(config.input_channels, name="conv_out", **types)(x)


class Vae(nn.Module):
    """The autoencoder of Qwen-Image(-Layered) for a batch of single frames.

    Attributes:
      config: shapes, from the checkpoint.
      dtype: what convolutions and activations are computed in; norms and softmax use float32.
      param_dtype: what parameters are created in.
    """

    config: VaeConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = _Encoder(self.config, **types)
        self.quant_conv = _Conv(2 * self.config.z_dim, size=1, **types)
        self.post_quant_conv = _Conv(self.config.z_dim, size=1, **types)
        self.decoder = _Decoder(self.config, **types)

    def encode(self, pixels: Float[Array, "b H W c"]) -> VaePosterior:
        """Encodes frames in [-1, 1] to the posterior over raw latents.

        Args:
          pixels: [B, H, W, input_channels]; H and W multiples of ``config.spatial_factor`` (other
            sides lose the rest at the bottom and the right).

        Returns:
          The posterior at [B, H / factor, W / factor, z_dim], float32. ``normalize_latents`` brings
          its mean to the diffusion model's units.
        """
        moments = self.quant_conv(self.encoder(pixels)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return VaePosterior(mean, jnp.clip(logvar, *_LOGVAR_RANGE))

    def decode(
        self, latents: Float[Array, "b h w z"], *, clamp: bool = True
    ) -> Float[Array, "b H W c"]:
        """Decodes raw (denormalized) latents to frames, float32 [B, h * factor, w * factor, C].

        Args:
          latents: [B, h, w, z_dim].
          clamp: limit the result to [-1, 1], as the published decoder does. Training losses want
            False: outside of the range a clamp has no gradient.
        """
        pixels = self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)
        return jnp.clip(pixels, -1.0, 1.0) if clamp else pixels

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Decodes the mean of the posterior of ``pixels``: every parameter takes part."""
        return self.decode(self.encode(pixels).mean)

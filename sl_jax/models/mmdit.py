"""The MMDiT of Qwen-Image-Layered in Flax Linen.

Sixty double-stream blocks: image and text tokens have weights of their own and meet in one joint
attention. Behaviour of `QwenImageTransformer2DModel` in diffusers 0.42 with `use_layer3d_rope`;
parameter paths mirror its tensor names (see `checkpoints.naming`).

Modulation by time is computed apart from the blocks, see `models.modulation`: `modulate` maps times
to a `Modulation`, `__call__` takes one. Each works without the parameters that the other uses.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sl_jax.models.attention import Attention
from sl_jax.models.lora import LoRADense
from sl_jax.models.modulation import Modulation
from sl_jax.models.packing import PATCH
from sl_jax.models.rope import LatentGrid, RopeTable, layer3d_rope, rotate

_EPS = 1e-6
_TIME_CHANNELS = 256


@dataclass(frozen=True)
class MMDiTConfig:
    """`transformer/config.json` of the checkpoint; names as there."""

    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    use_layer3d_rope: bool = True
    use_additional_t_cond: bool = True
    zero_cond_t: bool = False
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        if not self.use_layer3d_rope or self.zero_cond_t or self.guidance_embeds:
            raise ValueError(
                "only the layered variant of the MMDiT is implemented: please use a checkpoint "
                "with use_layer3d_rope true, zero_cond_t false and guidance_embeds false, not "
                f"{self.use_layer3d_rope}, {self.zero_cond_t}, {self.guidance_embeds}"
            )
        if self.patch_size != PATCH:
            raise ValueError(
                f"patch_size is {self.patch_size}, but latents are packed in patches of {PATCH}; "
                "please use a Qwen-Image-Layered checkpoint"
            )
        odd = any(size % 2 for size in self.axes_dims_rope)
        if odd or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} must be even and sum to attention_head_dim "
                f"{self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Channels of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
        """Reads config.json; keys that start with an underscore are diffusers' own.

        A checkpoint's file, which names its class, means diffusers' default by what it leaves out:
        plain Qwen-Image lacks the switches of the layered variant, which are then off.

        Raises:
            ValueError: a key is missing, or one is present that this model does not know.
        """
        switches = ("use_layer3d_rope", "use_additional_t_cond") if "_class_name" in config else ()
        given = dict.fromkeys(switches, False) | {
            k: v
            for k, v in config.items()
            if not k.startswith("_") and k != "pooled_projection_dim"
        }
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(fields))
        missing = sorted(
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and name not in given
        )
        if unknown or missing:
            raise ValueError(f"transformer config: unknown keys {unknown}, missing keys {missing}")
        given["axes_dims_rope"] = tuple(given.get("axes_dims_rope", cls.axes_dims_rope))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, with diffusers' class name."""
        return {"_class_name": "QwenImageTransformer2DModel", **dataclasses.asdict(self)}


Constrain = Callable[[Array, tuple[str | None, ...]], Array]


def unconstrained(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Leaves the layout to the compiler."""
    del axes
    return x


class MMDiT(nn.Module):
    """Velocity network v_θ(x, t, condition, text).

    Attributes:
        config: sizes.
        attention: joint attention, which may have a mesh of its own to split itself over.
        remat: "none", "block" (recompute everything inside a block) or "dots" (keep the results
            of matrix products).
        constrain: lays an activation out over devices by the logical names of its axes.
        dtype: compute dtype.
        param_dtype: storage dtype of the base parameters.
    """

    config: MMDiTConfig
    attention: Attention = Attention()
    remat: str = "none"
    constrain: Constrain = unconstrained
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.time_text_embed = _TimeEmbedding(
            config.width, config.use_additional_t_cond, name="time_text_embed", **types
        )
        stacked = nn.vmap(
            _BlockModulation,
            in_axes=None,
            axis_size=config.num_layers,
            variable_axes={"params": 0, "lora": 0, "lora_scale": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.modulation = stacked(config.width, name="modulation", **types)
        self.norm_out = _OutputModulation(config.width, name="norm_out", **types)
        self.img_in = LoRADense(config.width, (None, "embed"), name="img_in", **types)
        self.txt_norm = RMSNorm(name="txt_norm", param_dtype=self.param_dtype)
        self.txt_in = LoRADense(config.width, (None, "embed"), name="txt_in", **types)
        self.blocks = nn.scan(
            _rematerialised(_Block, self.remat),
            length=config.num_layers,
            in_axes=(0, nn.broadcast, nn.broadcast),
            variable_axes={"params": 0, "lora": 0, "lora_scale": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.attention, self.constrain, name="blocks", **types)
        self.proj_out = LoRADense(
            config.patch_size**2 * config.out_channels, ("embed", None), name="proj_out", **types
        )

    def modulate(self, t: Float[Array, " b"]) -> Modulation:
        """Modulation at times `t` in [0, 1] (σ of the flow; 1 is noise)."""
        silu = nn.silu(self.time_text_embed(t))
        image, text = self.modulation(silu)
        return Modulation(image, text, self.norm_out(silu))

    def __call__(
        self,
        latents: Float[Array, "b n c"],
        condition: Float[Array, "b m c"],
        text: Float[Array, "b s e"],
        text_lengths: Int[Array, " b"] | None,
        modulation: Modulation,
        grid: LatentGrid,
    ) -> Float[Array, "b n c"]:
        """Velocity of the generated frames.

        Args:
            latents: packed latents of the layers + 1 generated frames, frame-major.
            condition: packed latents of the picture to decompose.
            text: hidden states of the text encoder.
            text_lengths: valid text tokens per sample; None if none is padding.
            modulation: from `modulate`, for this batch or broadcast over it.
            grid: static shape of the packed sequence.
        """
        image = self.img_in(jnp.concatenate([latents, condition], axis=1))
        words = self.txt_in(self.txt_norm(text).astype(self.dtype))
        rope = layer3d_rope(grid, text.shape[1], self.config.axes_dims_rope)
        lengths = None if text_lengths is None else text_lengths + image.shape[1]
        image = self.constrain(image, ("batch", "tokens", None))
        (image, _), _ = self.blocks(
            (image, words), (modulation.image, modulation.text), rope, lengths
        )
        image = image[:, : grid.generated_tokens]
        scale, shift = (modulation.output[:, i, None] for i in range(2))
        return self.proj_out(layer_norm(image) * (1 + scale) + shift)

    def initialise(
        self,
        latents: Float[Array, "b n c"],
        condition: Float[Array, "b m c"],
        text: Float[Array, "b s e"],
        t: Float[Array, " b"],
        grid: LatentGrid,
    ) -> Float[Array, "b n c"]:
        """Touches every parameter once: the method for `Module.init`, and for a direct forward."""
        return self(latents, condition, text, None, self.modulate(t), grid)


def _rematerialised(block: type[nn.Module], remat: str) -> Any:
    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if remat == "none":
        return block
    if remat not in policies:
        raise ValueError(f"remat is {remat!r}; please use one of none, {', '.join(policies)}")
    return nn.remat(block, policy=policies[remat], prevent_cse=False)


class _TimeEmbedding(nn.Module):
    width: int
    flagged: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = time_sinusoids(t).astype(self.dtype)
        x = _Embedder(self.width, name="timestep_embedder", **types)(x)
        if self.flagged:
            flag = nn.Embed(2, self.width, name="addition_t_embedding", **types)
            x = x + flag(jnp.zeros(t.shape, jnp.int32))
        return x


class _Embedder(nn.Module):
    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.silu(LoRADense(self.width, (None, "embed"), name="linear_1", **types)(x))
        return LoRADense(self.width, ("embed", None), name="linear_2", **types)(x)


def time_sinusoids(t: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """Sinusoids of 1000·t, cosines first, float32 (the reference's `Timesteps`)."""
    half = _TIME_CHANNELS // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    # Rounded where the reference rounds: at 1000·t one unit in the last place is 6e-5 of an angle.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = 1000.0 * (t.astype(jnp.float32)[:, None] * frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class _BlockModulation(nn.Module):
    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, silu: Float[Array, "b d"]) -> tuple[Array, Array]:
        def project(name: str) -> Array:
            dense = LoRADense(
                6 * self.width,
                ("embed", "modulation"),
                name=name,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            return dense(silu).reshape(-1, 6, self.width)

        return project("img_mod_1"), project("txt_mod_1")


class _OutputModulation(nn.Module):
    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, silu: Float[Array, "b d"]) -> Float[Array, "b 2 d"]:
        dense = LoRADense(
            2 * self.width,
            ("embed", "modulation"),
            name="linear",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return dense(silu).reshape(-1, 2, self.width)


class _Block(nn.Module):
    config: MMDiTConfig
    attention: Attention
    constrain: Constrain
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b n d"], Float[Array, "b s d"]],
        modulation: tuple[Float[Array, "b 6 d"], Float[Array, "b 6 d"]],
        rope: RopeTable,
        key_lengths: Int[Array, " b"] | None,
    ) -> tuple[tuple[Array, Array], None]:
        image, text = streams
        image_mod, text_mod = ([m[:, i, None] for i in range(6)] for m in modulation)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = _JointAttention(self.config, self.attention, name="attn", **types)
        image_update, text_update = attention(
            _modulated(image, image_mod[0], image_mod[1]),
            _modulated(text, text_mod[0], text_mod[1]),
            rope,
            key_lengths,
        )
        image = image + image_mod[2] * image_update
        text = text + text_mod[2] * text_update
        image = image + image_mod[5] * _FeedForward(name="img_mlp", **types)(
            _modulated(image, image_mod[3], image_mod[4])
        )
        text = text + text_mod[5] * _FeedForward(name="txt_mlp", **types)(
            _modulated(text, text_mod[3], text_mod[4])
        )
        return (self.constrain(image, ("batch", "tokens", None)), text), None


class _JointAttention(nn.Module):
    config: MMDiTConfig
    attention: Attention
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b s d"],
        rope: RopeTable,
        key_lengths: Int[Array, " b"] | None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b s d"]]:
        tokens = image.shape[1]

        def joined(image_name: str, text_name: str) -> Array:
            return jnp.concatenate(
                [self._heads(image, image_name), self._heads(text, text_name)], 1
            )

        def normed(x: Array, image_name: str, text_name: str) -> Array:
            parts = self._norm(x[:, :tokens], image_name), self._norm(x[:, tokens:], text_name)
            return rotate(jnp.concatenate(parts, 1), rope)

        query = normed(joined("to_q", "add_q_proj"), "norm_q", "norm_added_q")
        key = normed(joined("to_k", "add_k_proj"), "norm_k", "norm_added_k")
        value = joined("to_v", "add_v_proj")
        out = self.attention(query, key, value, key_lengths)
        out = out.reshape(*out.shape[:2], -1)
        return (
            self._dense("to_out_0", ("heads", "embed"))(out[:, :tokens]),
            self._dense("to_add_out", ("heads", "embed"))(out[:, tokens:]),
        )

    def _heads(self, x: Array, name: str) -> Float[Array, "b s h d"]:
        y = self._dense(name, ("embed", "heads"))(x)
        return y.reshape(*y.shape[:2], -1, self.config.attention_head_dim)

    def _dense(self, name: str, axes: tuple[str, str]) -> LoRADense:
        return LoRADense(
            self.config.width, axes, name=name, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def _norm(self, x: Array, name: str) -> Array:
        return RMSNorm(name=name, param_dtype=self.param_dtype)(x)


class _FeedForward(nn.Module):
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        x = nn.gelu(_Projection(4 * width, name="net_0", **types)(x), approximate=True)
        return LoRADense(width, ("mlp", "embed"), name="net_2", **types)(x)


class _Projection(nn.Module):
    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return LoRADense(self.features, ("embed", "mlp"), name="proj", **types)(x)


class RMSNorm(nn.Module):
    """x / √(mean x² + 1e-6) · scale over the last axis, in float32; result in the dtype of x."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _EPS)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """LayerNorm without affine, eps 1e-6, in float32; result in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _EPS)
    return y.astype(x.dtype)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    return layer_norm(x) * (1 + scale) + shift

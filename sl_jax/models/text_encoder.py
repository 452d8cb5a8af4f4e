"""The language model of Qwen2.5-VL in Flax Linen: what turns a prompt into hidden states.

Behaviour of `Qwen2_5_VLTextModel` in transformers for pure text, where the three axes of the
multimodal rotary embedding hold the same positions and it equals the ordinary one. Parameter paths
mirror the tensor names of the checkpoint (see `checkpoints.naming`). The vision tower and the
output head are no part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_PLAIN_ROPE = ("default", "mrope")


@dataclass(frozen=True)
class TextEncoderConfig:
    """`text_encoder/config.json` of the checkpoint; names as there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TextEncoderConfig":
        """Reads config.json, flat as on the hub or with the language model under `text_config`.

        Raises:
            ValueError: a value is missing (the defaults of the reference class are those of the
                72 B model, so none are assumed), or asks for what this model does not implement.
        """
        given = {**config, **config.get("text_config", {})}
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        given = {"rope_theta": rope.get("rope_theta"), **given}
        _refuse_variants(given, rope)
        names = [f.name for f in fields(cls)]
        missing = [name for name in names if given.get(name) is None]
        if missing:
            raise ValueError(
                f"text encoder config: missing {missing}; please use the config.json of a "
                "Qwen2.5-VL checkpoint"
            )
        return cls(**{name: given[name] for name in names})


def _refuse_variants(config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = [
        (config.get("use_sliding_window"), "use_sliding_window is true"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act is {config.get('hidden_act')!r}"),
        (kind not in _PLAIN_ROPE, f"the rotary embedding is scaled by {kind!r}"),
    ]
    found = [text for wrong, text in problems if wrong]
    if found:
        raise ValueError(
            f"text encoder config: {', '.join(found)}; only full attention, silu and an unscaled "
            "rotary embedding are implemented"
        )


class TextEncoder(nn.Module):
    """Hidden states of tokens after the last norm (`hidden_states[-1]` of the reference).

    Attributes:
        config: sizes.
        dtype: compute dtype; norms, rotation and softmax are in float32.
        param_dtype: storage dtype of the parameters.
    """

    config: TextEncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s e"]:
        """Encodes token ids, at positions 0…s−1.

        Padding stands at the end: attention is causal, so that it reaches no valid token, and
        needs no mask. What comes out at padded positions is to be ignored.
        """
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(1.0), (None, "embed")
            ),
            name="embed_tokens",
            **types,
        )(tokens)
        layers = nn.scan(
            _Layer,
            length=config.num_hidden_layers,
            in_axes=nn.broadcast,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers", **types)
        x, _ = layers(x, _rope(config, tokens.shape[1]))
        return _RMSNorm(config.rms_norm_eps, self.param_dtype, name="norm")(x)


def _rope(config: TextEncoderConfig, length: int) -> tuple[Float[Array, "s 1 d"], ...]:
    """Cosines and sines of positions 0…length−1 in float32; both halves of a head are alike."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # Rounded where the reference rounds: far positions magnify the last place of a frequency.
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    angles = np.concatenate([angles, angles], axis=-1)[:, None].astype(np.float64)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotate(
    x: Float[Array, "b s h d"], rope: tuple[Float[Array, "s 1 d"], ...]
) -> Float[Array, "b s h d"]:
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


class _Layer(nn.Module):
    config: TextEncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s e"], rope: tuple[Array, ...]
    ) -> tuple[Float[Array, "b s e"], None]:
        eps, types = (
            self.config.rms_norm_eps,
            {"dtype": self.dtype, "param_dtype": self.param_dtype},
        )
        y = _RMSNorm(eps, self.param_dtype, name="input_layernorm")(x)
        x = x + _Attention(self.config, name="self_attn", **types)(y, rope)
        y = _RMSNorm(eps, self.param_dtype, name="post_attention_layernorm")(x)
        return x + _SwiGLU(self.config, name="mlp", **types)(y), None


class _Attention(nn.Module):
    """Causal grouped-query attention: each key head serves a run of query heads."""

    config: TextEncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s e"], rope: tuple[Array, ...]) -> Float[Array, "b s e"]:
        config = self.config

        def heads(count: int, name: str) -> Array:
            project = _dense(self, count * config.head_dim, ("embed", "heads"), name, bias=True)
            return project(x).reshape(*x.shape[:2], count, config.head_dim)

        query = _rotate(heads(config.num_attention_heads, "q_proj"), rope)
        key = _rotate(heads(config.num_key_value_heads, "k_proj"), rope)
        value = heads(config.num_key_value_heads, "v_proj")
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
        return _dense(self, config.hidden_size, ("heads", "embed"), "o_proj")(out.reshape(x.shape))


class _SwiGLU(nn.Module):
    config: TextEncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b s e"]:
        inner = self.config.intermediate_size
        gate = nn.silu(_dense(self, inner, ("embed", "mlp"), "gate_proj")(x))
        up = _dense(self, inner, ("embed", "mlp"), "up_proj")(x)
        return _dense(self, self.config.hidden_size, ("mlp", "embed"), "down_proj")(gate * up)


class _RMSNorm(nn.Module):
    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b s e"]:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def _dense(
    parent: Any, features: int, axes: tuple[str, str], name: str, bias: bool = False
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dtype=parent.dtype,
        param_dtype=parent.param_dtype,
        name=name,
    )

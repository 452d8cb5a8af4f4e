"""Low-rank adapters as Flax collections beside the frozen base (LoRA, arXiv 2106.09685).

`LoRADense` is an ordinary dense layer over `params`. Where the collections `lora` (trained,
float32: a (in, r) and b (r, out)) and `lora_scale` (alpha / r, not trained) hold variables at its
path, it adds scale · (x a) b. Without them it computes the base. Blocks stacked by `nn.scan` carry
a leading layer axis in every collection, so ranks padded with zeros and a scale per layer express
any PEFT adapter exactly.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float

ATTENTION_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
MLP_TARGETS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
DEFAULT_TARGETS = ATTENTION_TARGETS + MLP_TARGETS


class LoRADense(nn.Module):
    """Dense layer over the last axis with an optional low-rank update.

    Attributes:
        features: output size.
        axes: logical axis names of the kernel (input, output).
        dtype: compute dtype; both base and adapter are cast to it.
        param_dtype: storage dtype of kernel and bias.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.xavier_uniform(), self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
            (self.features,),
            self.param_dtype,
        )
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a = self.get_variable("lora", "a").astype(self.dtype)
            # Scaled before it is rounded: alpha / rank itself need not exist in bfloat16.
            b = self.get_variable("lora", "b") * self.get_variable("lora_scale", "scale")
            y = y + _expand(x @ a, b.astype(self.dtype))
        return y


@jax.custom_vjp
def _expand(reduced: Float[Array, "*b r"], b: Float[Array, "r o"]) -> Float[Array, "*b o"]:
    """reduced @ b, with a gradient that transposes the narrow operand.

    JAX's own for `b` sums over the rows of a wide cotangent standing on the left: on CPUs XLA
    copies all of it into another order first, and the backward pass of a block takes twice as long.
    """
    return reduced @ b


def _expand_forward(reduced: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return reduced @ b, (reduced, b)


def _expand_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    reduced, b = kept
    rows = tuple(range(reduced.ndim - 1))
    return cotangent @ b.T, jax.lax.dot_general(reduced, cotangent, ((rows, rows), ((), ())))


_expand.defvjp(_expand_forward, _expand_backward)


@dataclass(frozen=True)
class LoRAConfig:
    """What a fresh adapter looks like.

    Attributes:
        rank: inner size r, at least 1.
        alpha: the update is scaled by alpha / rank.
        targets: module names in PEFT's notation; a module is adapted when its dotted name equals
            a target or ends with ".target".
    """

    rank: int = 64
    alpha: float = 128.0
    targets: Sequence[str] = DEFAULT_TARGETS


@struct.dataclass
class Adapter:
    """The two adapter collections of a model, as one pytree.

    Attributes:
        lora: {path: {"a": (layers?, in, r), "b": (layers?, r, out)}} in float32, trained.
        lora_scale: {path: {"scale": (layers?,)}} in float32, constant.
    """

    lora: Mapping[str, Any]
    lora_scale: Mapping[str, Any]

    def variables(self) -> dict[str, Any]:
        """Collections to pass to `Module.apply` beside `params`."""
        return {"lora": self.lora, "lora_scale": self.lora_scale}


def target_paths(params: Mapping[str, Any], targets: Sequence[str]) -> list[tuple[str, ...]]:
    """Paths of the dense layers of `params` that `targets` name, sorted.

    Raises:
        ValueError: there is no target, or one matches nothing; the message lists what would match.
    """
    dense = {
        path[:-1]: _dotted(path[:-1])
        for path in traverse_util.flatten_dict(params)
        if path[-1] == "kernel"
    }
    if not targets:
        raise ValueError(
            "an adapter needs at least one target; "
            f"please choose among {sorted(set(dense.values()))}"
        )
    found: set[tuple[str, ...]] = set()
    for target in targets:
        hits = {p for p, name in dense.items() if name == target or name.endswith("." + target)}
        if not hits:
            raise ValueError(
                f"adapter target {target!r} matches no linear layer of the model; "
                f"please choose among {sorted(set(dense.values()))}"
            )
        found |= hits
    return sorted(found)


def _dotted(path: tuple[str, ...]) -> str:
    return re.sub(r"(to_out|net|_mod)_(\d+)", r"\1.\2", ".".join(path))


def init_adapter(key: Array, params: Mapping[str, Any], config: LoRAConfig) -> Adapter:
    """A fresh adapter: a Kaiming-uniform (PEFT's default, bound 1/√in), b zero.

    The update is therefore exactly zero. `params` may hold arrays or `jax.ShapeDtypeStruct`s.
    """
    flat = traverse_util.flatten_dict(params)
    lora: dict[tuple[str, ...], Array] = {}
    scales: dict[tuple[str, ...], Array] = {}
    for number, path in enumerate(target_paths(params, config.targets)):
        *layers, inputs, outputs = flat[(*path, "kernel")].shape
        bound = inputs**-0.5
        draw = jax.random.uniform(
            jax.random.fold_in(key, number),
            (*layers, inputs, config.rank),
            minval=-bound,
            maxval=bound,
        )
        lora[(*path, "a")] = draw
        lora[(*path, "b")] = jnp.zeros((*layers, config.rank, outputs), jnp.float32)
        scales[(*path, "scale")] = jnp.full(tuple(layers), config.alpha / config.rank, jnp.float32)
    return Adapter(traverse_util.unflatten_dict(lora), traverse_util.unflatten_dict(scales))

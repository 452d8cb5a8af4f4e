"""Adapters: which modules they reach, and what they add to them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import abstract_params
from sl_jax.models.lora import (
    DEFAULT_TARGETS,
    Adapter,
    LoRAConfig,
    LoRADense,
    init_adapter,
    target_paths,
)
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid

torch.set_num_threads(1)

CONFIG = MMDiTConfig(2, 16, 2, 12, axes_dims_rope=(4, 6, 6))
SHAPES = nn.unbox(abstract_params(MMDiT(CONFIG)))
# Every way in which PEFT users name linear layers of this model.
NAMES = (
    *DEFAULT_TARGETS,
    *("img_mod.1", "txt_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear", "linear"),
    *("attn.to_q", "net.2", "net.0.proj", "proj", "linear_1", "timestep_embedder.linear_2"),
)


def dense_output(x, dtype=jnp.float32, **collections):
    layer = LoRADense(collections["params"]["kernel"].shape[1], ("embed", "mlp"), dtype=dtype)
    return layer.apply(collections, x)


def random_layer(draw, inputs=24, outputs=40, rank=3):
    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    return {
        "params": {"kernel": normal(inputs, outputs), "bias": normal(outputs)},
        "lora": {"a": normal(inputs, rank), "b": normal(rank, outputs)},
        "lora_scale": {"scale": jnp.float32(0.75)},
    }


def leaves(tree):
    return traverse_util.flatten_dict(tree)


@given(st.sets(st.sampled_from(NAMES), min_size=1))
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
def test_any_targets_reach_the_modules_that_peft_reaches(targets):
    with torch.device("meta"):
        oracle = QwenImageTransformer2DModel(
            **{k: v for k, v in CONFIG.to_dict().items() if not k.startswith("_")}
        )
        inject_adapter_in_model(LoraConfig(r=3, target_modules=sorted(targets)), oracle)
    wanted = {
        name.replace(".default", ""): tuple(tensor.shape)
        for name, tensor in oracle.named_parameters()
        if "lora_" in name
    }
    adapter = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), SHAPES, LoRAConfig(3, 6.0, sorted(targets)))
    )
    found = {}
    for path, leaf in leaves(adapter.lora).items():
        module, letter = MMDIT.module(path[:-1]), path[-1].upper()
        count = leaf.shape[0] if leaf.ndim == 3 else 1
        names = {f"{module.format(i)}.lora_{letter}.weight" for i in range(count)}
        found |= dict.fromkeys(names, leaf.shape[-1:-3:-1])
        assert leaf.dtype == jnp.float32
    assert found == wanted


@pytest.mark.parametrize("target", ["to_x", "to_out_0", "to_", "blocks.attn", "to_out0", "norm_q"])
def test_a_target_that_matches_nothing_lists_the_choices(target):
    with pytest.raises(ValueError, match=f"adapter target {re.escape(repr(target))}") as error:
        target_paths(SHAPES, ("to_q", target))
    for choice in ("blocks.attn.to_out.0", "blocks.img_mlp.net.0.proj", "modulation.img_mod.1"):
        assert choice in str(error.value)


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match=r"at least one target; please choose .*attn\.to_q"):
        target_paths(SHAPES, ())


def test_a_fresh_adapter_draws_like_peft():
    adapter = init_adapter(jax.random.key(0), SHAPES, LoRAConfig(4, 6.0, ("to_q", "net.2")))
    for path, leaf in leaves(adapter.lora).items():
        if path[-1] == "b":
            assert not leaf.any()
            continue
        bound = leaf.shape[1] ** -0.5
        assert 0.97 * bound < np.abs(leaf).max() <= bound
        assert abs(float(leaf.std()) - bound / 3**0.5) < 0.1 * bound
        assert np.abs(leaf[0] - leaf[1]).max() > 0.1 * bound
    draws = [leaf for path, leaf in leaves(adapter.lora).items() if path[-1] == "a"]
    assert len({leaf.ravel()[0].item() for leaf in draws}) == len(draws)
    for leaf in leaves(adapter.lora_scale).values():
        np.testing.assert_array_equal(leaf, np.full(2, 1.5, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_the_collection_the_layer_computes_the_base(dtype):
    draw = np.random.default_rng(0)
    layer = random_layer(draw)
    x = jnp.asarray(draw.normal(size=(5, 24)), jnp.float32)
    base = dense_output(x, dtype, params=layer["params"])
    kernel, bias = (layer["params"][name].astype(dtype) for name in ("kernel", "bias"))
    assert base.dtype == dtype
    np.testing.assert_array_equal(base, x.astype(dtype) @ kernel + bias)
    layer["lora"]["b"] = jnp.zeros_like(layer["lora"]["b"])
    np.testing.assert_array_equal(dense_output(x, dtype, **layer), base)


def test_the_update_is_scale_times_a_b():
    draw = np.random.default_rng(1)
    layer = random_layer(draw)
    x = jnp.asarray(draw.normal(size=(5, 24)), jnp.float32)
    weights = [np.asarray(layer["lora"][name], np.float64) for name in "ab"]
    update = dense_output(x, **layer) - dense_output(x, params=layer["params"])
    np.testing.assert_allclose(update, 0.75 * x @ weights[0] @ weights[1], atol=1e-4)


def test_a_scale_between_two_bfloat16_numbers_is_kept():
    """100 / 48 is 2.0833; the nearest bfloat16, 2.078, would shrink every update by 0.24 %."""
    draw = np.random.default_rng(2)
    layer = random_layer(draw, 64, 512, 16)
    layer["params"] = jax.tree.map(jnp.zeros_like, layer["params"])
    layer["lora_scale"] = {"scale": jnp.float32(100 / 48)}
    x = jnp.asarray(draw.normal(size=(64, 64)), jnp.float32)
    exact = np.asarray(dense_output(x, **layer), np.float64)
    rounded = np.asarray(dense_output(x, jnp.bfloat16, **layer), np.float64)
    assert abs((rounded * exact).sum() / (exact * exact).sum() - 1) < 5e-4


def test_a_float32_adapter_of_a_bfloat16_layer_has_float32_gradients():
    draw = np.random.default_rng(3)
    layer = random_layer(draw)
    x = jnp.asarray(draw.normal(size=(16, 24)), jnp.float32)

    def gradient(dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), layer["params"])

        def loss(lora):
            return dense_output(x, dtype, **layer | {"params": params, "lora": lora}).sum()

        return jax.grad(loss)(layer["lora"])

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    for name in "ab":
        assert rounded[name].dtype == jnp.float32
        error = np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name])
        assert 1e-5 < error < 1e-2


def test_a_fresh_adapter_leaves_the_model_as_it_is():
    """To the last bit; and every module that has one adds something as soon as b is not zero."""
    dtype = jnp.bfloat16
    model = MMDiT(CONFIG, dtype=dtype, param_dtype=dtype)
    draw = np.random.default_rng(4)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), dtype), SHAPES)
    config = LoRAConfig(2, 4.0, (*DEFAULT_TARGETS, "img_mod.1", "img_in", "proj_out"))
    adapter = init_adapter(jax.random.key(0), params, config)
    sizes = ((4, 64), (2, 64), (3, 12))
    inputs = [draw.normal(size=(1, *size)).astype(np.float32) for size in sizes]
    inputs += [np.array([0.5], np.float32), LatentGrid(1, 1, 2)]

    def velocity(variables):
        return model.apply({"params": params, **variables}, *inputs, method="initialise")

    compiled = jax.jit(velocity, compiler_options={"xla_backend_optimization_level": 0})
    base = compiled({})
    np.testing.assert_array_equal(compiled(adapter.variables()), base)
    for path in target_paths(SHAPES, config.targets):
        lora = leaves(adapter.lora)
        # The text of the last block reaches nothing but through keys and values: change the first.
        first = (0,) if lora[(*path, "b")].ndim == 3 else ()
        lora[(*path, "b")] = lora[(*path, "b")].at[first].set(1.0)
        changed = Adapter(traverse_util.unflatten_dict(lora), adapter.lora_scale)
        assert (compiled(changed.variables()) != base).any(), path

"""Attention on meshes of eight devices: the numbers of one device, from parts of the work."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.models.attention import Attention
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

SHAPES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]


def layout_of(sizes):
    return Layout(make_mesh(MeshConfig(*sizes)))


@pytest.fixture(scope="module")
def inputs():
    """Eight samples of an odd number of tokens, eight heads; valid keys; cotangent."""
    draw = np.random.default_rng(0)
    tensors = [draw.normal(size=(8, 13, 8, 4)).astype(np.float32) for _ in range(4)]
    return *tensors, draw.integers(1, 14, 8).astype(np.int32)


def run(attention, query, key, value, cotangent, lengths):
    """Result and gradients."""

    # Compiling takes longer than computing here.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def attend(*tokens):
        out, transposed = jax.vjp(lambda *x: attention(*x, lengths), *tokens)
        return out, *transposed(jnp.asarray(cotangent))

    return [np.asarray(x) for x in attend(query, key, value)]


@pytest.fixture(scope="module")
def wanted(inputs):
    return run(Attention(), *inputs)


def assert_same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_axes_that_do_not_divide(inputs):
    """Three samples and five heads on two parts each: whole on every device, and counted once."""
    inputs = *(x[:3, :, :5] for x in inputs[:4]), inputs[4][:3]
    attention = Attention("splash", layout_of((1, 2, 2, 2)), interpret=True)
    assert_same(run(attention, *inputs), run(Attention(), *inputs))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["splash", "xla"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_every_mesh(sizes, implementation, inputs, wanted):
    attention = Attention(implementation, layout_of(sizes), interpret=True)
    assert_same(run(attention, *inputs), wanted)


def test_parts_of_an_axis():
    layout = layout_of((2, 2, 1, 2))
    axes = ("batch", "tokens", "heads", "attention_tokens")
    assert [layout.parts(axis) for axis in axes] == [4, 2, 1, 1]


def test_each_device_sees_its_parts():
    layout = layout_of((2, 1, 2, 2))
    seen = []

    def add(x, y):
        seen.append((x.shape, y.shape))
        return x + y

    x, y = np.arange(48.0).reshape(6, 2, 4), np.arange(6.0).reshape(6, 1, 1)
    axes = [("batch", "tokens", "heads"), ("batch", None, None)]
    found = jax.jit(lambda *arrays: layout.on_shards(add, arrays, axes))(x, y)
    assert seen == [((3, 1, 2), (3, 1, 1))]
    np.testing.assert_array_equal(found, x + y)
    assert found.sharding.is_equivalent_to(layout.sharding(x.shape, axes[0]), 3)

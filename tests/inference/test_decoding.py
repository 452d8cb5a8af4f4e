"""Decoding many layers: few frames at a time, each as if it were alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sl_jax.inference import sampling
from sl_jax.inference.sampling import decode_layers, each_layer
from sl_jax.models.codec import decode_frames
from sl_jax.models.packing import pack, unpack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh

CONFIG = VaeConfig(8, 16, (1, 1), 1, (False,), (0.1,) * 16, (0.9,) * 16, 4)


@pytest.fixture(scope="module")
def autoencoder():
    vae = Vae(CONFIG)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
    draw = np.random.default_rng(0)
    return vae, jax.tree.map(lambda x: draw.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def test_frames_are_what_a_whole_batch_gives(autoencoder):
    """To the last bit, for batches that the devices divide and others."""
    vae, params = autoencoder
    decode = jax.jit(functools.partial(decode_frames, vae))
    for batch in (8, 3):
        frames = np.random.default_rng(batch).normal(size=(batch, 3, 4, 6, 16)).astype(np.float32)
        found = jax.jit(functools.partial(decode_layers, vae), static_argnames="grid")(
            params, pack(frames), grid=LatentGrid(2, 2, 3)
        )
        wanted = np.stack([decode(params, frames[:, layer]) for layer in (1, 2)], axis=1)
        assert wanted.std() > 20
        np.testing.assert_array_equal(found.layers, wanted)
        assert found.finite.all()


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_grows_neither_with_layers_nor_with_the_batch(autoencoder, devices, monkeypatch):
    monkeypatch.setattr(sampling, "_LARGE_FRAME", 64)  # so that frames of 64 tokens are alone
    vae, params = autoencoder
    sharding = batch_sharding(make_mesh(MeshConfig(), jax.devices()[:devices]))
    decode = jax.jit(
        functools.partial(decode_layers, vae), static_argnames="grid", out_shardings=sharding
    )

    def program(batch, layers):
        grid = LatentGrid(layers, 8, 8)
        shape = batch, grid.generated_tokens, 64
        latents = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        return decode.lower(params, latents, grid=grid).compile()

    one, many = program(8, 1), program(32, 3)
    used = [compiled.memory_analysis().temp_size_in_bytes for compiled in (one, many)]
    assert used[1] < 2 * used[0]
    assert not re.search("all-gather|all-to-all|collective-permute", many.as_text())


@pytest.mark.parametrize(("side", "together"), [(40, 1), (28, 2), (4, 16)])
def test_small_frames_are_decoded_together(side, together):
    seen = []

    def decode(frames):
        seen.append(len(frames))
        return frames

    latents = np.random.default_rng(0).normal(size=(64, 2 * side * side, 64)).astype(np.float32)
    grid = LatentGrid(1, side, side)
    found = jax.jit(lambda x: each_layer(decode, x, grid, devices=2))(latents)
    assert seen == [2 * together]  # so many on each of the two devices
    np.testing.assert_array_equal(found[:, 0], unpack(latents, side, side)[:, 1])

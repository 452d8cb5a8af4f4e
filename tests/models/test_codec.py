"""Pixels ↔ latents ↔ tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sl_jax.inference.sampling import Condition, decode_layers, picture_latents
from sl_jax.models.codec import decode_frames, encode_frames, opaque, to_uint8, to_unit_range
from sl_jax.models.packing import pack, unpack
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, VaeConfig

torch.set_num_threads(1)

LEVELS = np.arange(256, dtype=np.uint8)
CONFIG = VaeConfig(4, 4, (1, 1), 1, (False,), (0.5, -1.0, 0.0, 2.0), (2.0, 0.5, 1.0, 4.0), 4)


@pytest.fixture(scope="module")
def autoencoder():
    """An autoencoder of spatial factor 2, which compiles quickly."""
    vae = Vae(CONFIG)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
    draw = np.random.default_rng(0)
    return vae, jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def compiled(function):
    """Compiling takes longer than computing here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def test_every_level_survives():
    np.testing.assert_array_equal(to_uint8(to_unit_range(LEVELS)), LEVELS)
    assert (float(to_unit_range(LEVELS)[0]), float(to_unit_range(LEVELS)[-1])) == (-1.0, 1.0)


def test_pixels_are_rounded_and_clipped():
    between = to_unit_range(LEVELS[:-1]) + jnp.array([[0.4], [0.6]]) / 127.5
    np.testing.assert_array_equal(to_uint8(between), [LEVELS[:-1], LEVELS[1:]])
    np.testing.assert_array_equal(to_uint8(jnp.array([-1.5, -1.0, 1.0, 3.0])), [0, 0, 255, 255])


def test_pixels_equal_diffusers():
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 4), np.uint8)
    processor = VaeImageProcessor(vae_scale_factor=16)
    tensor = processor.preprocess(Image.fromarray(picture), 16, 32)
    np.testing.assert_allclose(
        to_unit_range(picture), tensor[0].permute(1, 2, 0).numpy(), atol=1e-6
    )
    values = torch.empty(1, 4, 16, 32).uniform_(-1.2, 1.2)
    reference = np.asarray(processor.postprocess(values, output_type="pil")[0])
    found = to_uint8(jnp.asarray(values[0].permute(1, 2, 0).numpy()))
    # The two scale in another order: a value within rounding of n + ½ may go either way.
    assert (found != reference).mean() < 1e-2
    np.testing.assert_allclose(found.astype(int), reference.astype(int), atol=1)


def test_opaque_adds_full_alpha():
    picture = np.random.default_rng(1).integers(0, 256, (2, 3, 5, 3), np.uint8)
    found = np.asarray(opaque(picture))
    assert found.dtype == np.uint8 and (found[..., 3] == 255).all()
    np.testing.assert_array_equal(found[..., :3], picture)


@given(*(st.integers(1, 4) for _ in range(4)))
@settings(max_examples=12, deadline=None, database=None, derandomize=True)
def test_packing_equals_diffusers(batch, frames, height, width):
    shape = (batch, frames, 2 * height, 2 * width, 3)
    latents = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tokens = pack(latents)
    reference = QwenImageLayeredPipeline._pack_latents(
        torch.from_numpy(latents.transpose(0, 1, 4, 2, 3).copy()),
        batch,
        3,
        2 * height,
        2 * width,
        frames,
    )
    np.testing.assert_array_equal(tokens, reference.numpy())
    np.testing.assert_array_equal(unpack(tokens, height, width), latents)
    back = QwenImageLayeredPipeline._unpack_latents(
        reference, 16 * height, 16 * width, frames - 1, 8
    )
    np.testing.assert_array_equal(
        unpack(tokens, height, width), back.permute(0, 2, 3, 4, 1).numpy()
    )


def test_pictures_to_tokens(autoencoder):
    """Opaque, encoded, normalised, packed."""
    vae, params = autoencoder
    pictures = np.random.default_rng(2).integers(0, 256, (2, 4, 8, 3), np.uint8)

    @compiled
    def encoded(pictures):
        pixels = to_unit_range(opaque(pictures))
        raw = vae.apply({"params": params}, pixels, method="encode").mean
        latents = encode_frames(vae, params, opaque(pictures))
        return raw, latents, picture_latents(vae, params, pictures)

    raw, latents, tokens = encoded(pictures)
    mean, std = (np.array(x, np.float32) for x in (CONFIG.latents_mean, CONFIG.latents_std))
    np.testing.assert_allclose(latents, (raw - mean) / std, atol=1e-4)
    np.testing.assert_allclose(tokens, pack(latents[:, None]), atol=1e-4)
    assert tokens.dtype == jnp.float32


def test_tokens_to_layers(autoencoder):
    """Unpacked, denormalised, decoded, in order, without the whole picture."""
    vae, params = autoencoder
    grid = LatentGrid(2, 1, 3)
    latents = np.random.default_rng(3).normal(size=(2, 3, 2, 6, 4)).astype(np.float32)

    @compiled
    def decoded(latents):
        layers, _ = decode_layers(vae, params, pack(latents), grid)
        frames = latents[:, 1:].reshape(4, 2, 6, 4)
        raw = frames * np.float32(CONFIG.latents_std) + np.float32(CONFIG.latents_mean)
        pixels = vae.apply({"params": params}, raw, method="decode")
        return layers, decode_frames(vae, params, frames), to_uint8(pixels)

    layers, frames, pixels = (np.asarray(x, int) for x in decoded(latents))
    assert layers.shape == (2, 2, 4, 12, 4)
    np.testing.assert_allclose(frames, pixels, atol=1)
    np.testing.assert_allclose(layers.reshape(frames.shape), frames, atol=1)
    assert np.ptp(layers, axis=1).max() > 30


def test_repeated_conditions_stand_side_by_side():
    condition = Condition(jnp.arange(2.0)[:, None, None], jnp.arange(2.0)[:, None, None], None)
    repeated = condition.repeat(3)
    np.testing.assert_array_equal(repeated.picture[:, 0, 0], [0, 0, 0, 1, 1, 1])
    assert repeated.text_lengths is None
    lengths = condition._replace(text_lengths=jnp.array([4, 7])).repeat(2).text_lengths
    np.testing.assert_array_equal(lengths, [4, 4, 7, 7])

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
    return vae, vae.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]


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


def test_latents_are_normalised(autoencoder):
    vae, params = autoencoder
    frames = np.random.default_rng(2).integers(0, 256, (2, 4, 6, 4), np.uint8)
    latents = encode_frames(vae, params, frames)
    raw = vae.apply({"params": params}, to_unit_range(frames), method="encode").mean
    mean, std = (np.array(x, np.float32) for x in (CONFIG.latents_mean, CONFIG.latents_std))
    np.testing.assert_allclose(latents, (raw - mean) / std, atol=1e-5)
    pixels = vae.apply({"params": params}, latents * std + mean, method="decode")
    np.testing.assert_array_equal(decode_frames(vae, params, latents), to_uint8(pixels))


def test_layers_come_back_in_order_without_the_whole_picture(autoencoder):
    vae, params = autoencoder
    grid = LatentGrid(2, 1, 3)
    latents = np.random.default_rng(3).normal(size=(2, 3, 2, 6, 4)).astype(np.float32)
    layers = decode_layers(vae, params, pack(latents), grid)
    assert layers.shape == (2, 2, 4, 12, 4) and layers.dtype == jnp.uint8
    for layer in range(2):
        frame = decode_frames(vae, params, jnp.asarray(latents[:, layer + 1]))
        np.testing.assert_allclose(layers[:, layer].astype(int), frame.astype(int), atol=1)
    assert np.ptp(np.asarray(layers, int), axis=1).max() > 3


def test_conditions_are_opaque_pictures_in_tokens(autoencoder):
    vae, params = autoencoder
    picture = np.random.default_rng(4).integers(0, 256, (2, 4, 8, 3), np.uint8)
    frames = encode_frames(vae, params, opaque(picture))
    np.testing.assert_allclose(
        picture_latents(vae, params, picture), pack(frames[:, None]), atol=1e-6
    )


def test_repeated_conditions_stand_side_by_side():
    condition = Condition(jnp.arange(2.0)[:, None, None], jnp.arange(2.0)[:, None, None], None)
    repeated = condition.repeat(3)
    np.testing.assert_array_equal(repeated.picture[:, 0, 0], [0, 0, 0, 1, 1, 1])
    assert repeated.text_lengths is None
    lengths = condition._replace(text_lengths=jnp.array([4, 7])).repeat(2).text_lengths
    np.testing.assert_array_equal(lengths, [4, 4, 7, 7])

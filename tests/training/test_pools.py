"""Training examples: which ones an update sees, and what is done to them."""

import jax
import numpy as np

from sl_jax.data.procedural import make_design
from sl_jax.imaging import recompose
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.training import pools
from sl_jax.training.pools import FramePool, LatentPool, augmented, indices, recoloured
from sl_jax.training.supervised import fresh_params

RNG = np.random.default_rng(0)


def _frames(count, alpha):
    frames = RNG.integers(1, 255, (count, 8, 8, 4), np.uint8)
    frames[..., 3] = alpha
    return frames


def test_each_epoch_sees_every_example_once():
    seen = np.concatenate([indices(3, step, 8, 24) for step in range(6)])
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert list(seen[:24]) != list(seen[24:])


def test_half_of_a_batch_are_pictures_and_an_update_is_always_the_same():
    pool = FramePool(_frames(5, 255), _frames(9, 128), 8, seed=1)
    kind, batch = pool(4)
    alphas = batch.pixels[:, 0, 0, 3]
    assert kind == "frames"
    assert (alphas == 1).sum() == 4
    np.testing.assert_array_equal(batch.pixels, pool(4)[1].pixels)
    assert not np.array_equal(batch.pixels, pool(5)[1].pixels)


def test_augmentation_moves_pixels_and_colours_but_keeps_mattes_and_what_is_invisible():
    frames = _frames(4, 255)
    frames[:, :4, :, 3] = 0
    frames[:, :4, :, :3] = 0
    looks = set()
    for seed in range(200):
        out = augmented(frames, np.random.default_rng(seed))
        assert out.shape == (8, 8, 4)
        assert out.dtype == np.uint8
        assert (out[..., 3] == 0).mean() == 0.5
        assert not out[out[..., 3] == 0].any()
        looks.add(out.tobytes())
        shown = np.sort(out[out[..., 3] > 0][:, :3].ravel())
        plain = np.sort(frames[0, 4:, :, :3].ravel())
        mosaic = np.sort(frames[:, ::2, ::2][:, 2:, :, :3].ravel())
        known = (plain, 255 - plain[::-1], mosaic, 255 - mosaic[::-1])
        assert any(np.array_equal(shown, colours) for colours in known)
    assert len(looks) > 60


def test_recoloured_layers_recompose_to_the_recoloured_picture():
    layers = make_design("A", 3, 32, 3).layers
    opaque = np.concatenate([recompose(layers), np.full((32, 32, 1), 255, np.uint8)], -1)
    changed = 0
    for seed in range(20):
        made = recompose(recoloured(layers, np.random.default_rng(seed)))
        wanted = recoloured(opaque, np.random.default_rng(seed))[..., :3]
        assert np.abs(made.astype(int) - wanted).max() <= 1
        changed += not np.array_equal(wanted, opaque[..., :3])
    assert changed > 5


def test_held_out_examples_are_all_there():
    grid = LatentGrid(1, 1, 1)
    latents = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1).repeat(2, 1)
    batches = LatentPool({grid: latents}, batch=2, seed=0).held_out()
    assert [len(batch.target) for _, batch in batches] == [2, 2, 1]
    seen = np.concatenate([batch.picture[:, 0, 0] for _, batch in batches])
    np.testing.assert_array_equal(seen, np.arange(5))


def _encoder(seed):
    vae = Vae(VaeConfig(4, 16, (1, 2, 2, 2), 1, (False, True, True), (0.1,) * 16, (0.9,) * 16, 4))
    pixels = np.zeros((1, 16, 16, 4), np.float32)
    return pools.Encoder(vae, fresh_params(vae, jax.random.key(seed), pixels))


def test_latents_are_kept_per_autoencoder(tmp_path, monkeypatch):
    drawn = []

    def draw(family, seeds, size, layers):
        drawn.append(seeds)
        return np.stack([make_design(family, seed, size, layers).layers for seed in seeds])

    monkeypatch.setattr(pools, "draw_designs", draw)
    data = pools.DesignsConfig("A", 16, (2,))

    def latents(encoder):
        return pools.cached_latents(tmp_path, encoder, data, 2, 0, 3, False)

    first, other = latents(_encoder(0)), latents(_encoder(1))
    assert first.shape == (3, 3, 1, 64) and not np.array_equal(first, other)
    assert len(drawn) == 2
    np.testing.assert_array_equal(latents(_encoder(0)), first)
    np.testing.assert_array_equal(latents(_encoder(1)), other)
    assert len(drawn) == 2

"""Training examples: which ones an update sees, and what is done to them."""

import numpy as np

from sl_jax.data.procedural import make_design
from sl_jax.imaging import recompose
from sl_jax.training.pools import FramePool, augmented, indices, recoloured

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

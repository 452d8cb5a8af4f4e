"""Training examples: which ones an update sees, and what is done to them."""

import numpy as np

from sl_jax.training.pools import FramePool, augmented, indices

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

"""Compositing against the scalar definition and against Pillow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sl_jax import imaging

_stacks = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.just(4))
)


def _over_by_hand(layers: np.ndarray) -> np.ndarray:
    x = layers.astype(np.float64) / 255
    out = np.zeros(x.shape[1:])
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            color, alpha = np.zeros(3), 0.0
            for layer in x:
                a = layer[row, column, 3]
                color = color * (1 - a) + layer[row, column, :3] * a
                alpha = alpha * (1 - a) + a
            out[row, column] = [*(color / alpha if alpha else color), alpha]
    return out


@settings(max_examples=40, deadline=None)
@given(_stacks)
def test_over_is_the_definition(layers):
    result = imaging.over(layers)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, _over_by_hand(layers), atol=2e-6)
    np.testing.assert_allclose(imaging.over(layers / 255.0), result, atol=2e-6)


def test_over_takes_leading_axes():
    layers = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 6, 4), np.uint8)
    result = imaging.over(layers)
    assert result.shape == (2, 3, 5, 6, 4)
    np.testing.assert_array_equal(result[1, 2], imaging.over(layers[1, 2]))


@settings(max_examples=40, deadline=None)
@given(_stacks)
def test_flatten_and_recompose_agree_with_pillow(layers):
    canvas = Image.new("RGBA", (layers.shape[2], layers.shape[1]), (255, 255, 255, 255))
    first = canvas.copy()
    first.alpha_composite(Image.fromarray(layers[0]))
    flat = imaging.flatten(layers[0]).astype(int)
    assert np.abs(flat - np.asarray(first)[..., :3]).max() <= 1
    for layer in layers:
        canvas.alpha_composite(Image.fromarray(layer))
    together = imaging.recompose(layers).astype(int)
    assert np.abs(together - np.asarray(canvas)[..., :3]).max() <= len(layers)
    assert np.abs(together - imaging.flatten(imaging.over(layers))).max() <= 1


def test_an_opaque_stack_shows_its_top_and_an_empty_one_shows_the_ground():
    layers = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 4), np.uint8)
    layers[..., 3] = 255
    np.testing.assert_array_equal(imaging.recompose(layers), layers[-1, ..., :3])
    layers[..., 3] = 0
    assert (imaging.recompose(layers) == 255).all()
    assert (imaging.flatten(layers[0], background=0) == 0).all()


def test_checkerboard_and_transparency():
    board = imaging.checkerboard(5, 7, cell=2)
    assert board.shape == (5, 7, 3)
    assert board[0, 0, 0] == board[1, 1, 0] == board[2, 2, 0] == 255
    assert board[0, 2, 0] == board[3, 1, 0] == 204
    rgba = np.zeros((5, 7, 4), np.uint8)
    np.testing.assert_array_equal(imaging.on_checkerboard(rgba, cell=2), board)
    rgba[...] = (10, 20, 30, 255)
    assert (imaging.on_checkerboard(rgba) == (10, 20, 30)).all()


def test_wrong_pictures_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        imaging.over(np.zeros((1, 2, 2, 4), np.int64))
    with pytest.raises(ValueError, match="RGBA"):
        imaging.over(np.zeros((2, 2, 4), np.uint8))
    with pytest.raises(ValueError, match="RGBA"):
        imaging.flatten(np.zeros((2, 2, 3), np.uint8))

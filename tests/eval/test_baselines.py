"""Baselines: what each layer must hold, on pictures drawn for it."""

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.eval.baselines import BASELINES, all_in_background, colour_components, copies

SKY, RED, GREEN = (40, 90, 200), (220, 30, 30), (30, 200, 60)


def poster() -> np.ndarray:
    """32 × 32 sky with a 10 × 12 red block, a 6 × 6 green block and a red dot of 2 pixels."""
    picture = np.empty((32, 32, 3), np.uint8)
    picture[:] = SKY
    picture[4:14, 4:16] = RED
    picture[20:26, 20:26] = GREEN
    picture[30, 2:4] = RED
    return picture


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_baseline_gives_the_picture_back(name, layers):
    noise = np.random.default_rng(0).integers(0, 256, (19, 23, 3), np.uint8)
    for picture in (poster(), noise, poster()[:1, :1]):
        stack = BASELINES[name](picture, layers)
        assert stack.shape == (layers, *picture.shape[:2], 4) and stack.dtype == np.uint8
        np.testing.assert_array_equal(imaging.recompose(stack), picture)


def test_all_in_background():
    stack = all_in_background(poster(), 3)
    np.testing.assert_array_equal(stack[0, ..., :3], poster())
    assert (stack[0, ..., 3] == 255).all() and not stack[1:].any()


def test_copies():
    stack = copies(poster(), 3)
    assert (stack[..., 3] == 255).all()
    for layer in stack:
        np.testing.assert_array_equal(layer[..., :3], poster())


def test_colour_components_largest_first_with_filled_background():
    stack = colour_components(poster(), 4)
    red, green = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    red[4:14, 4:16] = green[20:26, 20:26] = True
    for layer, mask, colour in ((stack[1], red, RED), (stack[2], green, GREEN)):
        np.testing.assert_array_equal(layer[..., 3], 255 * mask)
        assert (layer[mask, :3] == colour).all() and not layer[~mask].any()
    assert not stack[3].any()  # the red dot is below the smallest area
    hidden = red | green
    assert (stack[0][hidden] == (*SKY, 255)).all()
    np.testing.assert_array_equal(stack[0][~hidden, :3], poster()[~hidden])


def test_colour_components_keeps_only_as_many_as_there_is_room_for():
    stack = colour_components(poster(), 2)
    assert stack[1, 8, 8, 3] == 255 and stack[1, 22, 22, 3] == 0
    assert tuple(stack[0, 22, 22, :3]) == GREEN


def test_smallest_area_decides_what_is_a_component():
    assert colour_components(poster(), 4, min_area=2 / 1024)[3, 30, 2, 3] == 255
    assert not colour_components(poster(), 4, min_area=0.06)[2].any()


def test_background_is_what_lies_on_the_border_even_if_smaller():
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[2:30, 2:30] = RED  # 784 of 1024 pixels
    stack = colour_components(picture, 2)
    assert (stack[1, 2:30, 2:30, 3] == 255).all() and stack[1, ..., 3].sum() == 255 * 784
    assert (stack[0] == 255).all()


def test_plain_picture_and_single_layer():
    plain = np.full((8, 8, 3), 77, np.uint8)
    assert not colour_components(plain, 3)[1:].any()
    np.testing.assert_array_equal(colour_components(poster(), 1)[0, ..., :3], poster())


def test_holes_take_the_nearest_large_component_not_specks():
    picture = poster()
    picture[3, 4:16] = GREEN  # 12 pixels above the red block: too small to be a component
    stack = colour_components(picture, 2, min_area=20 / 1024)
    assert (stack[0][4:14, 4:16] == (*SKY, 255)).all()


@pytest.mark.parametrize(
    ("picture", "layers"),
    [(np.zeros((4, 4, 4), np.uint8), 2), (np.zeros((4, 4, 3)), 2), (np.zeros((4, 4, 3), "u1"), 0)],
)
def test_wrong_input_is_refused(picture, layers):
    with pytest.raises(ValueError, match="flatten over white"):
        colour_components(picture, layers)

"""Elements on a canvas: position, size, rotation, opacity; stacks capped by merging."""

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.data.canvas import Element, as_stack, merge_to, place


def _block(height, width, colour=(200, 30, 60, 255)):
    return np.full((height, width, 4), colour, np.uint8)


def test_an_element_lies_where_it_is_put():
    layer = place(Element(_block(3, 5), 4, 2, 5, 3), (10, 12), (10, 12))
    wanted = np.zeros((10, 12, 4), np.uint8)
    wanted[2:5, 4:9] = (200, 30, 60, 255)
    assert np.array_equal(layer, wanted)


def test_an_element_is_stretched_to_its_size_and_the_canvas_to_the_layer():
    layer = place(Element(_block(2, 2), 8, 4, 16, 8), (40, 80), (20, 40))
    covered = layer[..., 3] > 127
    assert covered[2:6, 4:12].all()
    assert covered.sum() == 4 * 8


def test_a_reduced_element_keeps_its_mean():
    fine = np.indices((64, 64)).sum(0) % 2 * 255
    board = np.dstack([fine] * 3 + [np.full_like(fine, 255)]).astype(np.uint8)
    layer = place(Element(board, 0, 0, 64, 64), (64, 64), (8, 8))
    assert np.abs(layer[..., :3].astype(int) - 128).max() < 12


@pytest.mark.parametrize("angle", [90.0, -270.0, 450.0])
def test_a_quarter_turn_is_clockwise_about_the_centre(angle):
    picture = _block(2, 6, (0, 0, 0, 255))
    picture[:, 4:] = (255, 0, 0, 255)  # the right end
    layer = place(Element(picture, 3, 5, 6, 2, angle), (12, 12), (12, 12))
    wanted = np.zeros((12, 12), bool)
    wanted[3:9, 5:7] = True  # 6 high, 2 wide, about (6, 6)
    assert np.array_equal(layer[..., 3] > 127, wanted)
    assert (layer[7:9, 5:7, 0] > 200).all()  # right turned clockwise is below
    assert (layer[3:6, 5:7, 0] < 50).all()


def test_opacity_scales_alpha_and_leaves_colours():
    layer = place(Element(_block(4, 4, (10, 20, 30, 200)), 0, 0, 4, 4, 0, 0.25), (4, 4), (4, 4))
    assert np.array_equal(layer, _block(4, 4, (10, 20, 30, 50)))


def test_what_lies_outside_of_the_canvas_is_cut_off():
    layer = place(Element(_block(8, 8), -4, -4, 8, 8), (6, 6), (6, 6))
    assert np.count_nonzero(layer[..., 3]) == 16
    assert layer[3, 3, 3] == 255


def test_a_stack_has_an_opaque_background_and_no_unseen_layers():
    tint, blank, hidden = _block(4, 4, (0, 0, 255, 128)), _block(4, 4, (9, 9, 9, 0)), _block(4, 4)
    shape = np.zeros((4, 4, 4), np.uint8)
    shape[1, 1] = (0, 255, 0, 255)
    assert np.array_equal(
        as_stack([hidden, blank, _block(4, 4, (1, 2, 3, 255)), shape], (4, 4)),
        np.stack([_block(4, 4, (1, 2, 3, 255)), shape]),
    )
    painted = as_stack([tint, shape], (4, 4))
    assert len(painted) == 2 and (painted[0, ..., 3] == 255).all()
    assert painted[0, 0, 0].tolist() == [127, 127, 255, 255]
    on_white = as_stack([shape], (4, 4))
    assert (on_white[0] == 255).all() and np.array_equal(on_white[1], shape)
    assert as_stack([], (4, 4)).shape == (1, 4, 4, 4)


def _stack(count, seed=0):
    rng = np.random.default_rng(seed)
    layers = np.zeros((count, 12, 12, 4), np.uint8)
    layers[0] = (40, 80, 120, 255)
    for layer in layers[1:]:
        top, left = rng.integers(0, 9, 2)
        layer[top : top + 3, left : left + 3] = (*rng.integers(0, 256, 3), rng.integers(60, 256))
    return layers


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_merging_keeps_the_picture(most):
    layers = _stack(7)
    capped = merge_to(layers, most)
    assert len(capped) == min(most, 7)
    whole, again = (imaging.recompose(x).astype(int) for x in (layers, capped))
    assert np.abs(whole - again).max() <= 2
    assert most == 1 or np.array_equal(capped[0], layers[0])


def test_the_least_neighbours_become_one():
    layers = np.zeros((4, 10, 10, 4), np.uint8)
    layers[0] = 255
    layers[1, :8] = (1, 1, 1, 255)
    layers[2, :2, :2] = (2, 2, 2, 255)
    layers[3, 9, 9] = (3, 3, 3, 255)
    capped = merge_to(layers, 3)
    assert np.array_equal(capped[1], layers[1])
    assert np.array_equal(capped[2], layers[2] + layers[3])


def test_no_layers_cannot_be_asked_for():
    with pytest.raises(ValueError, match="1 or more"):
        merge_to(_stack(3), 0)

"""Statistics of layers on pictures whose answers are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from sl_jax import imaging


def _square(top=2, left=3, size=4, side=16, color=(200, 50, 30)) -> np.ndarray:
    layer = np.zeros((side, side, 4), np.uint8)
    layer[top : top + size, left : left + size] = (*color, 255)
    return layer


def test_coverage_and_box():
    layer = _square()
    assert imaging.coverage(layer[..., 3]) == pytest.approx(16 / 256)
    assert imaging.bounding_box(layer[..., 3]) == (2, 3, 6, 7)
    assert imaging.bounding_box(np.zeros((4, 4), np.uint8)) is None
    both = np.stack([layer, np.zeros_like(layer)])
    np.testing.assert_array_equal(imaging.is_blank(both[..., 3]), [False, True])


def test_bleed_is_the_colour_variance_of_transparent_pixels():
    layer = _square()
    assert imaging.bleed(layer) == 0
    layer[:8, :, :3] = 255
    layer[2:6, 3:7, 3] = 255
    hidden = layer[..., 3] == 0
    expected = (layer[..., :3] / 255.0)[hidden].var(axis=0).mean()
    assert imaging.bleed(layer) == pytest.approx(expected, rel=1e-5)
    layer[..., 3] = 255
    assert imaging.bleed(layer) == 0


def test_bimodality():
    assert imaging.bimodality(_square()[..., 3]) == pytest.approx(1)
    assert imaging.bimodality(np.full((3, 3), 0.5)) == pytest.approx(0)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, (3, 4, 5, 4)))
def test_distances_are_symmetric_bounded_and_blind_to_hidden_colour(layers):
    distances = imaging.layer_distances(layers)
    np.testing.assert_array_equal(distances, distances.T)
    assert (np.diag(distances) == 0).all()
    assert ((distances >= 0) & (distances <= 1 + 1e-6)).all()
    layers[0, ..., 3] = 0
    layers[1, ..., 3] = 0
    assert imaging.layer_distances(layers)[0, 1] == 0


def test_duplicates_are_found_and_blanks_are_none():
    a, b = _square(), _square(top=8)
    near = a.copy()
    near[..., :3] = np.maximum(near[..., :3], 3)
    blank = np.zeros_like(a)
    assert imaging.duplicates(np.stack([a, b, near, blank, blank])) == ((0, 2),)


def test_components():
    alpha = _square()[..., 3] + _square(top=10, size=3)[..., 3]
    alpha[15, 15] = 255
    np.testing.assert_array_equal(imaging.component_areas(alpha), [16, 9, 1])
    assert imaging.fragments(alpha, smallest=0.1) == 1
    assert imaging.fragments(np.zeros_like(alpha)) == 0
    diagonal = np.eye(4) * 255
    np.testing.assert_array_equal(imaging.component_areas(diagonal.astype(np.uint8)), [4])


def test_errors():
    a, b = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert imaging.l1(a, b) == pytest.approx(0.2)
    assert imaging.psnr(a, b) == pytest.approx(-20 * np.log10(0.2))
    assert imaging.psnr(a, a) == float("inf")

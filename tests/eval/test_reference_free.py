"""Reference-free measures on stacks whose numbers can be written down."""

import numpy as np
import pytest

from sl_jax.eval.reference_free import PSNR_CEILING, ReferenceFree, reference_free


def canvas(colour=(0, 0, 0), alpha=0, size=20) -> np.ndarray:
    layer = np.zeros((size, size, 4), np.uint8)
    layer[..., :3], layer[..., 3] = colour, alpha
    return layer


def test_clean_decomposition():
    background, square = canvas((0, 0, 255), 255), canvas()
    square[5:15, 5:15] = (255, 0, 0, 255)
    source = background[..., :3].copy()
    source[5:15, 5:15] = (255, 0, 0)
    result = reference_free(np.stack([background, square]), source)
    assert result == ReferenceFree(
        psnr=PSNR_CEILING,
        recomposition_l1=0.0,
        blank_rate=0.0,
        duplicate_rate=0.0,
        fragment_rate=0.0,
        bleed=0.0,
        bimodality=1.0,
    )


def test_recomposition_error_in_decibels():
    # Every value is off by 51 of 255: L1 = 0.2, PSNR = −20·log10(0.2) = 13.98 dB.
    result = reference_free(canvas((100, 100, 100), 255)[None], np.full((20, 20, 3), 151, np.uint8))
    assert result.recomposition_l1 == pytest.approx(0.2, abs=1e-6)
    assert result.psnr == pytest.approx(13.9794, abs=1e-3)


def test_ceiling_is_the_rounding_to_eight_bits():
    assert pytest.approx(58.92, abs=5e-3) == PSNR_CEILING


def test_rates_are_shares_of_all_layers():
    background = canvas((9, 99, 199), 255)
    crumbs = canvas()
    crumbs[2:12, 2:12] = (255, 255, 0, 255)
    crumbs[16, 16] = (255, 255, 0, 255)  # 1 of 100 pixels
    layers = np.stack([background, background, crumbs, canvas()])
    result = reference_free(layers, background[..., :3])
    assert (result.blank_rate, result.duplicate_rate, result.fragment_rate) == (0.25, 0.25, 0.25)


def test_blank_layers_are_no_duplicates_of_each_other():
    layers = np.stack([canvas((9, 9, 9), 255), canvas(), canvas()])
    result = reference_free(layers, layers[0, ..., :3])
    assert result.blank_rate == pytest.approx(2 / 3)
    assert result.duplicate_rate == 0.0


def test_bleed_and_bimodality_by_hand():
    # Layer 1 is transparent and half white, half black: variance 1/4 in each channel; layer 0 is
    # opaque. Means over two layers.
    noisy = canvas()
    noisy[:10, :, :3] = 255
    result = reference_free(
        np.stack([canvas((5, 5, 5), 255), noisy]), np.full((20, 20, 3), 5, "u1")
    )
    assert result.bleed == pytest.approx(0.125, abs=1e-6)
    assert result.bimodality == 1.0
    # Alpha 51/255 = 0.2 everywhere: 1 − 4·0.2·0.8 = 0.36.
    half = reference_free(canvas((255, 255, 255), 51)[None], np.full((20, 20, 3), 255, np.uint8))
    assert half.bimodality == pytest.approx(0.36, abs=1e-6)


@pytest.mark.parametrize("layers", [np.zeros((0, 4, 4, 4), "u1"), np.zeros((1, 4, 5, 4), "u1")])
def test_layers_must_fit_the_source(layers):
    with pytest.raises(ValueError, match="at least one layer"):
        reference_free(layers, np.zeros((4, 4, 3), np.uint8))

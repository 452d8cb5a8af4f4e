"""PSD files as psd-tools reads them back."""

import numpy as np
import pytest
from psd_tools import PSDImage

from sl_jax.checkpoints.psd import save_psd
from sl_jax.imaging import flatten, recompose

NAMES = ("layer_0", "text: “Ünïcode”, 漢字", "", "layer_0")


def _stack(height: int, width: int) -> np.ndarray:
    layers = np.random.default_rng(0).integers(0, 256, (4, height, width, 4), dtype=np.uint8)
    layers[0, ..., 3] = 255
    layers[2, ..., 3] = 0
    return layers


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 75), (1, 7)])
def test_layers_read_back_identically(tmp_path, height, width):
    layers = _stack(height, width)
    save_psd(tmp_path / "layers.psd", layers, NAMES)
    document = PSDImage.open(tmp_path / "layers.psd")
    assert document.size == (width, height)
    assert [layer.name for layer in document] == list(NAMES)
    for read, layer in zip(document, layers, strict=True):
        assert read.kind == "pixel" and read.is_visible() and not read.has_mask()
        assert read.bbox == (0, 0, width, height)
        picture = read.topil()
        assert picture.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(picture), layer)


def test_the_merged_picture_is_the_stack_over_white(tmp_path):
    layers = _stack(24, 40)[1:]
    save_psd(tmp_path / "layers.psd", layers, NAMES[1:])
    document = PSDImage.open(tmp_path / "layers.psd")
    merged = document.topil()
    assert merged.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(merged), recompose(layers))
    rendered = flatten(np.asarray(document.composite(force=True)))
    assert np.abs(rendered.astype(int) - recompose(layers)).max() <= 1


def test_every_layer_has_a_name(tmp_path):
    with pytest.raises(ValueError):
        save_psd(tmp_path / "layers.psd", _stack(8, 8), NAMES[:3])
    assert not (tmp_path / "layers.psd").exists()

"""Photoshop documents as paired layers."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from psd_tools.api.layers import Group
from psd_tools.constants import BlendMode

from sl_jax.checkpoints.psd import save_psd
from sl_jax.data import psd
from sl_jax.data.pictures import PictureError, PictureLimits
from sl_jax.data.psd import open_psd, psd_info


def _stack(height=20, width=28):
    layers = np.zeros((3, height, width, 4), np.uint8)
    layers[0] = (40, 80, 120, 255)
    layers[1, 3:9, 4:12] = (200, 10, 10, 255)
    layers[2, 6:15, 8:20] = (10, 200, 10, 130)
    return layers


def _document(tmp_path, change, size=(28, 20)):
    """A document of a backdrop and a small layer at (5, 4), 10 by 6, after `change`."""
    document = PSDImage.new("RGB", size)
    backdrop = document.create_pixel_layer(Image.new("RGBA", size, (40, 80, 120, 255)), "backdrop")
    small = document.create_pixel_layer(
        Image.new("RGBA", (10, 6), (200, 10, 10, 255)), "small", top=4, left=5
    )
    change(document, backdrop, small)
    content = io.BytesIO()
    document.save(content)
    path = tmp_path / "design.psd"
    path.write_bytes(content.getvalue())
    return path


def _opaque(layer):
    return np.argwhere(layer[..., 3] > 0).min(0).tolist(), np.argwhere(layer[..., 3] > 0).max(0)


def test_a_saved_stack_is_read_back(tmp_path):
    layers = _stack()
    save_psd(tmp_path / "a.psd", layers, ["a", "b", "c"])
    assert np.array_equal(open_psd(tmp_path / "a.psd"), layers)
    info = psd_info(tmp_path / "a.psd")
    assert info[:3] == (20, 28, 3) and len(info.content_hash) == 64


def test_documents_that_would_take_all_memory_are_refused(tmp_path, monkeypatch):
    """By what they declare, before anything is unpacked."""
    monkeypatch.setattr(psd, "_drawn", lambda *_: pytest.fail("unpacked"))
    path = _document(tmp_path, lambda *_: None)
    with pytest.raises(PictureError, match="layer 'backdrop' declares 600x500 pixels"):
        grown = tmp_path / "grown.psd"
        content = path.read_bytes()
        rectangle = struct.pack(">4i", 0, 0, 20, 28)
        assert rectangle in content
        grown.write_bytes(content.replace(rectangle, struct.pack(">4i", 0, 0, 500, 600)))
        open_psd(grown, PictureLimits(max_pixels=100_000))
    monkeypatch.setattr(psd, "_MOST_PIXELS", 2 * 20 * 28 - 1)
    with pytest.raises(PictureError, match="its 2 layers have more than 1119 pixels together"):
        open_psd(path)


def test_a_small_layer_lies_where_it_is_and_keeps_its_opacity(tmp_path):
    def change(document, backdrop, small):
        small.opacity = 102

    layer = open_psd(_document(tmp_path, change))[1]
    assert np.array_equal(layer[4:10, 5:15], np.full((6, 10, 4), (200, 10, 10, 102), np.uint8))
    assert np.count_nonzero(layer[..., 3]) == 60


def test_groups_are_opened_and_hidden_layers_left_out(tmp_path):
    def change(document, backdrop, small):
        inner = document.create_pixel_layer(Image.new("RGBA", (4, 4), (0, 0, 250, 255)), "inner")
        faded = Group.group_layers(layers=[inner], name="faded", parent=document)
        faded.opacity = 51
        Group.group_layers(layers=[small, faded], name="both", parent=document)
        hidden = document.create_pixel_layer(Image.new("RGBA", (9, 9), (9, 9, 9, 255)), "hidden")
        hidden.visible = False

    layers = open_psd(_document(tmp_path, change))
    assert len(layers) == 3
    assert layers[1, 4, 5].tolist() == [200, 10, 10, 255]
    assert layers[2, 0, 0].tolist() == [0, 0, 250, 51]


def test_a_mask_cuts_once(tmp_path):
    def change(document, backdrop, small):
        mask = np.zeros((6, 10), np.uint8)
        mask[:, :5] = 255
        small.remove_mask()
        small.create_mask(Image.fromarray(mask), top=4, left=5)
        small.opacity = 128

    layer = open_psd(_document(tmp_path, change))[1]
    assert np.unique(layer[4:10, 5:10, 3]).tolist() == [128]
    assert np.count_nonzero(layer[..., 3]) == 30


def test_what_plain_layers_cannot_say_is_refused(tmp_path):
    def change(document, backdrop, small):
        small.blend_mode = BlendMode.MULTIPLY

    with pytest.raises(PictureError, match="'small' blends as multiply"):
        open_psd(_document(tmp_path, change))


def _grouped(tmp_path, change=lambda document, group: None):
    def grouped(document, backdrop, small):
        inner = document.create_pixel_layer(Image.new("RGBA", (8, 8), (0, 0, 250, 255)), "inner")
        change(document, Group.group_layers(layers=[small, inner], name="both", parent=document))

    return _document(tmp_path, grouped)


def _faded(document, group):
    group.opacity = 128


def _base_of_clipping(document, group):
    above = document.create_pixel_layer(Image.new("RGBA", (9, 9), (9, 9, 9, 255)), "above")
    above.clipping = True


@pytest.mark.parametrize(
    ("change", "told"),
    [(_faded, "fades 2 layers as one"), (_base_of_clipping, "has layers clipped to it")],
)
def test_what_a_group_does_to_all_its_layers_is_refused(tmp_path, change, told):
    """It would be in none of them."""
    with pytest.raises(PictureError, match=f"group 'both' {told}"):
        open_psd(_grouped(tmp_path, change))

    def unseen(document, group):
        change(document, group)
        group.visible = False

    assert len(open_psd(_grouped(tmp_path, unseen))) == 1


@pytest.mark.parametrize(
    ("part", "told"),
    [("mask", "is masked"), ("vector_mask", "is masked"), ("effects", "has effects")],
)
def test_a_group_with_what_psd_tools_reads_but_does_not_write(tmp_path, monkeypatch, part, told):
    path = _grouped(tmp_path)
    assert len(open_psd(path)) == 3
    monkeypatch.setattr(Group, f"has_{part}", lambda group: True)
    with pytest.raises(PictureError, match=f"group 'both' {told}"):
        open_psd(path)


def test_a_broken_or_absurd_document_is_refused(tmp_path):
    path = _document(tmp_path, lambda *_: None)
    with pytest.raises(PictureError, match="28x20"):
        open_psd(path, PictureLimits(min_side=32))
    (tmp_path / "cut.psd").write_bytes(path.read_bytes()[:400])
    (tmp_path / "text.psd").write_bytes(b"no picture at all")
    for name in ("cut.psd", "text.psd", "missing.psd"):
        with pytest.raises(PictureError):
            open_psd(tmp_path / name)

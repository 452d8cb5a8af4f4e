"""One reader for designs with layers, wherever they are; what is left out is named."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from sl_jax.checkpoints.psd import save_psd
from sl_jax.data import FolderError, PictureError, write_designs
from sl_jax.data.paired import is_paired, open_paired
from sl_jax.data.procedural import make_design


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("designs")
    write_designs(folder, "A", range(6), 32, (2, 3), with_layers=True)
    (folder / "A-000001.txt").write_text("a caption")
    return folder


def test_a_layer_folder(folder, tmp_path):
    assert is_paired(folder)
    data = open_paired(folder)
    assert [design.layers for design in data] == [2, 3, 2, 3, 2, 3]
    assert data[1].caption == "a caption" and (data[1].height, data[1].width) == (32, 32)
    assert np.array_equal(data[1].read(), make_design("A", 1, 32, 3).layers)
    assert not is_paired(tmp_path)


def test_photoshop_files(tmp_path):
    layers = make_design("A", 1, 32, 3).layers
    for name in ("b.psd", "twin.psd", "inner/c.PSD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        changed = layers.copy()
        changed[1, 0, 0] = (1, 2, 3, 255 if "c" in name else 250)
        save_psd(tmp_path / name, changed, ["x"] * 3)
    (tmp_path / "broken.psd").write_bytes(b"8BPS nothing")
    (tmp_path / "b.txt").write_text("two boxes")
    data = open_paired(tmp_path)
    assert [design.name for design in data] == ["b.psd", "inner/c.PSD"]
    assert data[0].caption == "two boxes" and data[0].layers == 3
    assert np.array_equal(data[0].read()[2], layers[2])
    reasons = dict(data.skipped)
    assert set(reasons) == {"broken.psd", "twin.psd"} and "same content" in reasons["twin.psd"]
    assert "broken.psd" in data.summary()
    assert is_paired(tmp_path) and is_paired(tmp_path / "b.psd")
    assert len(open_paired(tmp_path / "b.psd")) == 1


def test_parts_by_content(folder):
    data = open_paired(folder)
    training, held_out = data.split(0.5)
    assert len(training) + len(held_out) == len(data)
    assert {d.name for d in training.without(held_out)} == {d.name for d in training}
    assert len(data.without(held_out)) == len(training)
    fewer = dataclasses.replace(data, designs=data.designs[1:])  # which moves no other one
    assert {d.name for d in fewer.split(0.5)[1]} == {d.name for d in held_out} - {data[0].name}
    with pytest.raises(ValueError, match="eval_fraction"):
        data.split(1.0)


def test_what_cannot_be_used_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "A-000000" / "0001.png").write_bytes(b"")
    Image.new("RGBA", (8, 8)).save(tmp_path / "some" / "A-000002" / "0001.png")
    data = open_paired(tmp_path / "some", max_layers=2)
    assert [design.name for design in data] == ["A-000004"]
    assert len(data.skipped) == 5
    shutil.rmtree(tmp_path / "some" / "A-000004")
    with pytest.raises(PictureError):
        data[0].read()


def test_nothing_there_is_one_clear_error(tmp_path):
    with pytest.raises(FolderError, match="please give a folder of designs"):
        open_paired(tmp_path)
    with pytest.raises(FolderError, match="no folder"):
        open_paired(tmp_path / "nowhere")

"""Folders of paired layers, and procedural designs written as files."""

import numpy as np
import pytest
from PIL import Image

from sl_jax.data.buckets import standard_buckets
from sl_jax.data.designs import write_designs
from sl_jax.data.folder import FolderError, scan_folder
from sl_jax.data.layered import LayeredFolder
from sl_jax.data.pictures import PictureError, open_picture
from sl_jax.data.procedural import make_design


def write(folder, count=3, size=(32, 48), seed=0):
    """A design of random layers; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = np.random.default_rng(seed).integers(0, 256, (count, *size, 4), np.uint8)
    for number, layer in enumerate(layers):
        Image.fromarray(layer).save(folder / f"{number:04d}.png")
    return layers


def reasons(folder):
    return {entry.name: entry.reason for entry in folder.skipped}


def _only(path):
    """The layers of the only design."""
    folder = LayeredFolder.scan(path)
    (record,) = folder.records
    return folder.read(record)


def test_layers_are_read_back_to_front(tmp_path):
    expected = {name: write(tmp_path / name, seed=seed) for seed, name in enumerate("cab")}
    (tmp_path / "a.txt").write_text("the first")
    folder = LayeredFolder.scan(tmp_path)
    assert [record.name for record in folder.records] == ["a", "b", "c"]
    for record in folder.records:
        layers = folder.read(record)
        assert layers.dtype == np.uint8
        np.testing.assert_array_equal(layers, expected[record.name])
    assert [record.caption for record in folder.records] == ["the first", "", ""]


def test_more_than_ten_layers_are_ordered_by_number(tmp_path):
    layers = write(tmp_path / "a", count=12)
    for number in range(12):
        (tmp_path / "a" / f"{number:04d}.png").rename(tmp_path / "a" / f"{number}.png")
    np.testing.assert_array_equal(_only(tmp_path), layers)


def test_layers_without_alpha_are_opaque(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a" / "0000.png")
    assert (_only(tmp_path) == (255, 0, 0, 255)).all()


def test_broken_designs_are_skipped_by_name(tmp_path):
    write(tmp_path / "good")
    write(tmp_path / "nested" / "good", seed=9)
    write(tmp_path / "gap")
    (tmp_path / "gap" / "0001.png").unlink()
    write(tmp_path / "sizes")
    Image.new("RGBA", (16, 16)).save(tmp_path / "sizes" / "0001.png")
    write(tmp_path / "empty")
    open(tmp_path / "empty" / "0002.png", "wb").close()
    write(tmp_path / "short")
    data = (tmp_path / "short" / "0001.png").read_bytes()
    (tmp_path / "short" / "0001.png").write_bytes(data[: len(data) // 2])
    write(tmp_path / "tall", count=9)
    write(tmp_path / "twin")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(data)
    folder = LayeredFolder.scan(tmp_path, max_layers=8)
    assert [record.name for record in folder.records] == ["good", "nested/good"]
    skipped = reasons(folder)
    assert skipped.pop("short").startswith("0001.png: cannot be decoded")
    assert skipped == {
        "gap": "layer 0001.png is missing",
        "sizes": "0001.png differs in size from 0000.png",
        "empty": "0002.png: empty file (0 bytes)",
        "tall": "9 layers; the limit max_layers is 8",
        "twin": "same content as good",
    }
    assert all(name in folder.summary() for name in skipped)


def test_no_designs_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(FolderError, match=r"no folder .*NAME/0000\.png"):
        LayeredFolder.scan(tmp_path / "nowhere")
    Image.new("RGB", (32, 32)).save(tmp_path / "0000.png")
    with pytest.raises(FolderError, match=r"no layered design among 1 file; .*NAME/0000\.png"):
        LayeredFolder.scan(tmp_path)


def test_layers_that_change_after_the_scan(tmp_path):
    write(tmp_path / "a")
    folder = LayeredFolder.scan(tmp_path)
    Image.new("RGBA", (40, 40)).save(tmp_path / "a" / "0001.png")
    with pytest.raises(PictureError, match=r"0001\.png: its size has changed"):
        folder.read(folder.records[0])


def test_written_designs_are_a_picture_folder(tmp_path):
    paths = write_designs(tmp_path / "flat", "A", range(3, 9), 64, (3, 4))
    index = scan_folder(tmp_path / "flat", standard_buckets(64))
    assert sorted(record.path for record in index) == sorted(paths) and not index.skipped
    assert [path.rsplit(".")[-1] for path in paths] == ["png", "jpg"] * 3
    np.testing.assert_array_equal(open_picture(paths[0]), make_design("A", 3, 64, 3).flat)
    error = np.abs(open_picture(paths[1]).astype(int) - make_design("A", 4, 64, 4).flat)
    assert 0 < error.mean() < 3


def test_written_layers_are_a_layered_folder(tmp_path):
    paths = write_designs(tmp_path, "A", (7, 8), (32, 48), 3, with_layers=True)
    folder = LayeredFolder.scan(tmp_path)
    assert [record.paths[0].rpartition("/")[0] for record in folder.records] == list(paths)
    for record, seed in zip(folder.records, (7, 8), strict=True):
        truth = make_design("A", seed, (32, 48), 3).layers
        np.testing.assert_array_equal(folder.read(record), truth)

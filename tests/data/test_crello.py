"""Crello: parquet files with the public schema, made into a dataset and read back."""

import sys

import numpy as np
import pytest
from crello_files import GREEN, RED, design, write_split

from sl_jax import imaging
from sl_jax.data import FolderError, Skipped, make_buckets
from sl_jax.data.crello import RowError, compose, designs, parquet_files, prepare_crello
from sl_jax.data.paired import is_paired, open_paired
from sl_jax.data.sources import scan_pictures
from sl_jax.data.tfds_pictures import open_record, parse_named, scan_tfds


@pytest.fixture(scope="module")
def crello(tmp_path_factory):
    """A folder as the hub has it, with one broken design."""
    folder = tmp_path_factory.mktemp("crello")
    broken = design("broken")
    broken["image"][1] = {"bytes": b"no picture", "path": None}
    write_split(folder / "data", "train", [design("b", 2), broken], 0, 2)
    write_split(folder / "data", "train", [design("a"), design("c", 3)], 1, 2)
    write_split(folder / "data", "validation", [design("v", 4)])
    write_split(folder / "data", "test", [design("t", 5), design("twin", 5)])
    return folder


def test_elements_are_composed_where_the_dataset_puts_them():
    layers = compose(design("a"), 1024)
    assert layers.shape == (3, 60, 80, 4)
    assert (layers[0] == (250, 240, 230, 255)).all()
    wanted = np.zeros((60, 80, 4), np.uint8)
    wanted[5:15, 10:30] = RED
    assert np.array_equal(layers[1], wanted)
    wanted[:] = 0
    wanted[22:46, 38:46] = (*GREEN[:3], 128)  # 8 wide, 24 high, about (42, 34)
    assert np.array_equal(layers[2], wanted)


def test_large_canvases_are_reduced():
    layers = compose(design("a"), 40)
    assert layers.shape == (3, 30, 40, 4)
    covered = layers[1, ..., 3] > 127
    assert covered.sum() == pytest.approx(50, abs=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canvas_width": 0}, "canvas_width is 0"),
        ({"opacity": [1.0]}, "differ in length"),
        ({"left": [0.0, float("nan"), 0.0]}, "element 1 has no position"),
        ({"image": [None] * 3}, "element 0 has no picture"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(RowError, match=message):
        compose(design("a") | change, 64)


def test_it_is_built_and_read_without_tensorflow(crello):
    data = open_paired(f"crello:{crello}")
    assert [one.name for one in data] == ["a", "b", "c"]
    assert [skip.name for skip in data.skipped] == ["broken"]
    assert "element 1 is no PNG, JPEG or WebP" in data.skipped[0].reason
    second = data[1]
    assert (second.height, second.width, second.layers) == (60, 80, 3)
    assert second.caption == "Title of b"
    assert np.array_equal(second.read(), compose(design("b", 2), 1024))
    assert "tensorflow" not in sys.modules


def test_splits_are_the_datasets_own_and_twins_are_seen(crello):
    assert [d.name for d in open_paired(f"crello:{crello}#validation")] == ["v"]
    test = open_paired(f"crello:{crello}#test")
    assert [d.name for d in test] == ["t"]
    assert test.skipped == (Skipped("twin", "same content as t"),)
    with pytest.raises(FolderError, match="has train, validation, test"):
        open_paired(f"crello:{crello}#testing")


def test_its_pictures_are_an_index_like_a_folders(crello):
    buckets = make_buckets([(64, 64), (48, 64)])
    index = scan_pictures(f"crello:{crello}#train", buckets)
    assert len(index) == 3
    assert len(index.skipped) == 1
    record = index.records[0]
    assert (record.height, record.width, record.bucket) == (60, 80, buckets[1])
    assert record.caption.startswith("Title of")
    wanted = imaging.recompose(compose(design("b", 2), 1024))
    assert np.array_equal(open_record(record.path), wanted)
    hashes = {one.content_hash for one in open_paired(f"crello:{crello}")}
    assert {r.content_hash for r in index} == hashes  # so that both hold the same out
    training, held_out = index.split(0.5)
    assert len(training) + len(held_out) == 3


def test_any_tfds_dataset_with_an_image_is_pictures(crello, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(crello / "tfds"))
    prepare_crello(str(crello), crello / "tfds")
    import tensorflow_datasets as tfds

    monkeypatch.setattr(
        tfds,
        "builder",
        lambda name, **_: _Ready(tfds.builder_from_directory(crello / "tfds" / name)),
    )
    index = scan_tfds("tfds:crello/5.1.0#test", make_buckets([(64, 64)]))
    assert len(index) == 1 and index.records[0].path.startswith("tfds:crello/5.1.0#test@")
    with pytest.raises(FolderError, match="has no layers"):
        open_paired("tfds:crello/5.1.0#test")


class _Ready:
    def __init__(self, builder):
        self.info, self.as_data_source = builder.info, builder.as_data_source

    def download_and_prepare(self):
        pass


def test_an_unknown_tfds_dataset_is_said():
    with pytest.raises(FolderError, match="tfds:no_such_dataset#train cannot be opened"):
        scan_tfds("tfds:no_such_dataset", make_buckets([(64, 64)]))


def test_names_of_datasets_are_no_paths():
    assert parse_named("crello") == ("crello", "", "train")
    assert parse_named("crello:gs://bucket/crello#test") == ("crello", "gs://bucket/crello", "test")
    assert parse_named("tfds:flowers/x:1.0.0") == ("tfds", "flowers/x:1.0.0", "train")
    assert parse_named("/data/crello") is None and parse_named("crellos") is None
    with pytest.raises(FolderError, match="names no dataset"):
        parse_named("tfds:")
    assert is_paired("crello") and not is_paired("tfds:flowers")


def test_damaged_or_other_files_end_in_one_clear_error(tmp_path):
    with pytest.raises(FolderError, match="no folder"):
        parquet_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match="no parquet file of a split"):
        parquet_files(tmp_path / "empty")
    write_split(tmp_path / "cut", "train", [design("a")])
    path = next((tmp_path / "cut").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FolderError, match="no whole parquet file"):
        prepare_crello(tmp_path / "cut", tmp_path / "cut_tfds")
    labels = {"canvas_width": {"names": ["60"], "_type": "ClassLabel"}}
    write_split(tmp_path / "old", "train", [design("a")], metadata=labels)
    with pytest.raises(FolderError, match="revision before 5"):
        prepare_crello(tmp_path / "old", tmp_path / "old_tfds")
    with pytest.raises(FolderError, match="delete the folder"):
        designs(tmp_path / "cut_tfds", "train")

"""Batches of designs with layers: a function of the update's number alone."""

import dataclasses

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.data import FolderError, PictureError, make_buckets, write_designs
from sl_jax.data.paired import PairedData, open_paired
from sl_jax.data.paired_stream import PairedStream, with_picture

BUCKETS = make_buckets([(32, 32), (32, 48)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("designs")
    write_designs(folder / "a", "A", range(6), 32, (2, 3, 4), with_layers=True)
    write_designs(folder / "b", "B", range(3), (32, 48), (3,), with_layers=True)
    (folder / "a" / "A-000000.txt").write_text("the first")
    return open_paired(folder)


def _stream(data, **options):
    return PairedStream(data, BUCKETS, **({"batch": 2, "max_layers": 3} | options))


def test_a_batch_is_one_shape_and_begins_with_the_picture(data):
    stream = _stream(data)
    assert set(stream.shapes) == {((32, 32), 2), ((32, 32), 3), ((32, 48), 3)}
    assert stream.used == 9
    seen = set()
    for step in range(12):
        shape, batch = stream(step)
        seen.add(shape)
        assert batch.frames.shape == (2, shape.layers + 1, *shape.bucket, 4)
        for frames in batch.frames:
            assert np.array_equal(frames[0, ..., :3], imaging.recompose(frames[1:]))
            assert (frames[0, ..., 3] == 255).all()
    assert seen == set(stream.shapes)


def test_an_update_is_the_same_whenever_and_by_however_many_it_is_read(data):
    one, other = _stream(data, seed=3), _stream(data, seed=3, threads=1)
    parts = [_stream(data, seed=3, rows=[row]) for row in (0, 1)]
    for step in (5, 0, 6):
        (shape, batch), (same_shape, same) = one(step), other(step)
        assert shape == same_shape and np.array_equal(batch.frames, same.frames)
        joined = np.concatenate([part(step)[1].frames for part in parts])
        assert np.array_equal(joined, batch.frames)
    different = _stream(data, seed=4)
    assert any(one(s)[0] != different(s)[0] for s in range(20))


def test_every_design_comes_in_order_once(data):
    batches = list(_stream(data).in_order())
    assert [len(batch.frames) for _, batch in batches] == [2] * len(batches)
    captions = [caption for _, batch in batches for caption in batch.captions]
    assert captions.count("the first") == 1
    filled = [batch for shape, batch in batches if shape == ((32, 48), 3)]  # three, up to four
    assert [batch.fresh for batch in filled] == [2, 1]
    assert sum(batch.fresh for _, batch in batches) == len(data)
    parts = [_stream(data, rows=[row]).in_order() for row in (0, 1)]
    assert [[batch.fresh for _, batch in part] for part in parts] == [
        [b.fresh for _, b in batches]
    ] * 2


def test_designs_with_too_few_layers_are_not_used(data):
    assert {shape.layers for shape in _stream(data, min_layers=3).shapes} == {3}
    with pytest.raises(FolderError, match="9 layers or more"):
        _stream(data, min_layers=9, max_layers=9)


def test_a_design_that_cannot_be_read_any_more_is_replaced(data, caplog):
    def broken():
        raise PictureError("gone.png", "no such file")

    designs = tuple(
        dataclasses.replace(d, read=broken) if d.name == "b/B-000001" else d for d in data
    )
    stream = _stream(PairedData("here", designs), seed=1)
    for step in range(12):
        _, batch = stream(step)
        assert len(batch.frames) == 2
    assert sum("another design takes its place" in r.message for r in caplog.records) == 1


def test_layers_are_stretched_before_the_picture_is_made():
    layers = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 4), dtype=np.uint8)
    frames = with_picture(layers, (16, 32))
    assert frames.shape == (4, 16, 32, 4)
    assert np.array_equal(frames[0, ..., :3], imaging.recompose(frames[1:]))

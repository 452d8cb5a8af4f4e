"""Folders of pictures: what is found, what is written, what is kept, and what noise they get."""

import collections
import errno
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from PIL import Image
from psd_tools import PSDImage

from sl_jax.checkpoints.disk import disk_problem, require_writable
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.data import FolderError, longest_side_size, pictures
from sl_jax.imaging import flatten, over, recompose, to_uint8
from sl_jax.inference import folder, outputs
from sl_jax.inference.decomposer import Sampling
from sl_jax.inference.folder import Job, decompose_pictures, find_pictures
from sl_jax.inference.sampling import Decoded

SAMPLING = Sampling(layers=3, steps=1, size=32)
FILES = {"source.png", "composite.png", "layers.psd", "layers.json"}


class FakeDecomposer:
    """Layers that show which key and frame they are made of; remembers what it was asked.

    Attributes:
        spoiled: pairs of a call, from 1, and the row in it whose layers are not finite.
    """

    def __init__(self):
        self.calls, self.spoiled = [], ()

    def decoded(self, frames, keys, sampling, batch):
        self.calls.append((frames.shape[:3], batch))
        made = [self.stack(f, k, sampling) for f, k in zip(frames, keys, strict=True)]
        finite = [(len(self.calls), row) not in self.spoiled for row in range(len(frames))]
        return Decoded(np.stack(made), np.array(finite))

    @staticmethod
    def stack(frame, key, sampling):
        seed = jax.random.key_data(key)
        noise = np.random.default_rng(np.asarray(seed)).integers(
            0, 256, (sampling.layers, *frame.shape), dtype=np.uint8
        )
        noise[0] = frame
        noise[-1, ..., 3] = 0
        return noise


def _picture(path: Path, height: int, width: int, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., : len(mode)]).save(path)
    return path


def _decompose(where, output, spoiled=(), **settings):
    fake = FakeDecomposer()
    fake.spoiled = spoiled
    job = Job(epath.Path(output), **({"sampling": SAMPLING} | settings))
    outcome = decompose_pictures(find_pictures(str(where)), job, lambda: fake)
    return outcome, fake


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_of_one_picture(tmp_path):
    path = _picture(tmp_path / "photo.png", 30, 64)
    outcome, _ = _decompose(path, tmp_path / "out")
    folder = tmp_path / "out" / "photo"
    assert [str(f) for f in outcome.written] == [str(folder)] and not outcome.problems
    assert {f.name for f in folder.iterdir()} == FILES | {f"layer_{i}.png" for i in range(3)}
    frame = SAMPLING.frame(np.asarray(Image.open(path).convert("RGBA")))
    layers = FakeDecomposer.stack(frame, jax.random.key(42), SAMPLING)
    np.testing.assert_array_equal(_read(folder / "source.png"), frame[..., :3])
    np.testing.assert_array_equal(_read(folder / "composite.png"), recompose(layers))
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(_read(folder / f"layer_{index}.png"), flatten(layer))
    document = PSDImage.open(folder / "layers.psd")
    assert [layer.name for layer in document] == ["layer_0", "layer_1", "layer_2"]
    for read, layer in zip(document, layers, strict=True):
        np.testing.assert_array_equal(np.asarray(read.topil()), layer)


def test_transparent_pictures_keep_alpha(tmp_path):
    path = _picture(tmp_path / "photo.png", 32, 32, mode="RGBA")
    area = Sampling(layers=3, steps=1, size=32, resize="area")
    _decompose(path, tmp_path / "out", sampling=area, transparent=True)
    folder = tmp_path / "out" / "photo"
    frame = _read(path)
    layers = FakeDecomposer.stack(frame, jax.random.key(42), area)
    np.testing.assert_array_equal(_read(folder / "source.png"), frame)
    np.testing.assert_array_equal(_read(folder / "composite.png"), to_uint8(over(layers)))
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(_read(folder / f"layer_{index}.png"), layer)


def test_record(tmp_path):
    layers = np.zeros((3, 20, 40, 4), np.uint8)
    layers[0] = 255
    layers[1, 4:9, 10:30] = (255, 255, 255, 200)
    layers[2, 0, 0] = (255, 255, 255, 8)
    source = np.full((20, 40, 4), 255, np.uint8)
    source[:10, :, :3] = 204
    outputs.write_outputs(tmp_path, source, layers, {"picture": "x.png"}, transparent=False)
    record = json.loads((tmp_path / "layers.json").read_text())
    assert record["picture"] == "x.png"
    assert (record["width"], record["height"]) == (40, 20)
    box = {"left": 10, "top": 4, "right": 30, "bottom": 9}
    whole = {"left": 0, "top": 0, "right": 40, "bottom": 20}
    assert record["layers"] == [
        {"file": "layer_0.png", "coverage": 1.0, "bounding_box": whole, "blank": False},
        {"file": "layer_1.png", "coverage": 0.125, "bounding_box": box, "blank": False},
        {"file": "layer_2.png", "coverage": 0.0, "bounding_box": None, "blank": True},
    ]
    assert record["recomposition"]["l1"] == pytest.approx(0.1)
    assert record["recomposition"]["psnr"] == pytest.approx(-10 * np.log10(0.02), abs=1e-4)
    source[...] = 255
    assert outputs.description(source, layers)["recomposition"] == {"l1": 0.0, "psnr": None}


def test_names_that_are_no_text(tmp_path):
    bad, good = _picture(tmp_path / "in" / "a\udcff.png", 32, 32), tmp_path / "in" / "b.png"
    _picture(good, 32, 32)
    assert not _decompose(tmp_path / "in", tmp_path / "out")[0].problems
    record = json.loads((tmp_path / "out" / bad.stem / "layers.json").read_text())
    assert record["picture"].endswith("a\udcff.png")
    again, _ = _decompose(tmp_path / "in", tmp_path / "out")
    assert len(again.kept) == 2 and not again.written
    other, _ = _decompose(tmp_path / "in", tmp_path / "out", seed=1)
    assert all("\\xff" in str(p) and "\udcff" not in str(p) for p in other.problems[:1])
    assert len(other.problems) == 2


def test_seed_is_the_place_among_the_inputs(tmp_path):
    for index, name in enumerate(["a", "b", "c", "d"]):
        _picture(tmp_path / "in" / f"{name}.png", 32, 16 if index % 2 else 32, index)
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    outcome, fake = _decompose(tmp_path / "in", tmp_path / "out", seed=7, batch=2, transparent=True)
    assert [problem.path for problem in outcome.problems] == [str(tmp_path / "in" / "b.png")]
    assert sorted(f.name for f in outcome.written) == ["a", "c", "d"]
    assert sorted(fake.calls) == [((1, 32, 16), 2), ((2, 32, 32), 2)]
    for index, name in ((0, "a"), (2, "c"), (3, "d")):
        frame = SAMPLING.frame(
            np.asarray(Image.open(tmp_path / "in" / f"{name}.png").convert("RGBA"))
        )
        layers = FakeDecomposer.stack(frame, jax.random.key(7 + index), SAMPLING)
        np.testing.assert_array_equal(_read(tmp_path / "out" / name / "layer_1.png"), layers[1])
        record = outputs.read_record(tmp_path / "out" / name)
        assert record["settings"]["seed"] == 7 + index


def test_complete_pictures_are_kept(tmp_path):
    for index, name in enumerate("abc"):
        _picture(tmp_path / "in" / f"{name}.png", 32, 32, index)
    _decompose(tmp_path / "in", tmp_path / "out")
    marks = {name: tmp_path / "out" / name / "composite.png" for name in "abc"}
    for mark in marks.values():
        mark.write_bytes(b"mine")
    (tmp_path / "out" / "b" / "layers.json").unlink()
    (tmp_path / "out" / "c" / "layers.json").write_text('{"picture": ')
    outcome, fake = _decompose(tmp_path / "in", tmp_path / "out")
    assert [f.name for f in outcome.kept] == ["a"]
    assert sorted(f.name for f in outcome.written) == ["b", "c"]
    assert marks["a"].read_bytes() == b"mine" != marks["b"].read_bytes()
    outcome, fake = _decompose(tmp_path / "in", tmp_path / "out")
    assert len(outcome.kept) == 3 and not fake.calls
    outcome, _ = _decompose(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert len(outcome.written) == 3 and marks["a"].read_bytes() != b"mine"


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    path = _picture(tmp_path / "a.png", 32, 32)
    _decompose(path, tmp_path / "out")
    outcome, fake = _decompose(path, tmp_path / "out", seed=43)
    assert not fake.calls and not outcome.kept
    (problem,) = outcome.problems
    assert "seed 42" in str(problem) and "--overwrite" in str(problem)
    _picture(path, 32, 32, seed=1)
    (problem,) = _decompose(path, tmp_path / "out")[0].problems
    assert "another picture" in str(problem)
    fewer = Sampling(layers=2, steps=1, size=32)
    _decompose(path, tmp_path / "out", sampling=fewer, overwrite=True)
    assert not (tmp_path / "out" / "a" / "layer_2.png").exists()


def test_a_layer_is_decomposed_once_more(tmp_path):
    path = _picture(tmp_path / "a.png", 32, 32)
    _decompose(path, tmp_path / "out", transparent=True)
    outcome, fake = _decompose(path, tmp_path / "out", transparent=True, recurse=1)
    assert len(outcome.written) == 1 and len(fake.calls) == 2
    folder = tmp_path / "out" / "a"
    layer = _read(folder / "layer_1.png")
    np.testing.assert_array_equal(_read(folder / "layer_1" / "source.png"), layer)
    inner = FakeDecomposer.stack(layer, jax.random.fold_in(jax.random.key(42), 1), SAMPLING)
    np.testing.assert_array_equal(_read(folder / "layer_1" / "layer_1.png"), inner[1])
    assert outputs.read_record(folder / "layer_1")["layer"] == "layer_1"
    outcome, fake = _decompose(path, tmp_path / "out", transparent=True, recurse=1)
    assert len(outcome.kept) == 1 and not fake.calls
    with pytest.raises(ValueError, match="0 to 2"):
        Job(epath.Path("out"), SAMPLING, recurse=3)


def test_layers_that_are_not_finite_are_a_problem_of_their_picture(tmp_path):
    for index, name in enumerate("abc"):
        _picture(tmp_path / "in" / f"{name}.png", 32, 32, index)
    options = {"batch": 3, "transparent": True}
    outcome, _ = _decompose(tmp_path / "in", tmp_path / "out", {(1, 1)}, **options)
    assert [folder.name for folder in outcome.written] == ["a", "c"]
    (problem,) = outcome.problems
    assert problem.path.endswith("b.png") and "not finite" in problem.reason
    assert not (tmp_path / "out" / "b").exists()
    # What was there stays, and a layer's own layers count as well.
    again = {"recurse": 1, "overwrite": True} | options
    outcome, _ = _decompose(tmp_path / "in", tmp_path / "out", {(1, 0), (2, 2)}, **again)
    assert [folder.name for folder in outcome.written] == ["b"]
    assert [problem.path[-5:] for problem in outcome.problems] == ["a.png", "c.png"]
    assert (tmp_path / "out" / "c" / "composite.png").exists()
    assert not (tmp_path / "out" / "c" / "layer_1").exists()


def test_what_an_earlier_decomposition_left_is_removed(tmp_path):
    path = _picture(tmp_path / "photo.png", 32, 32)
    _decompose(path, tmp_path / "out", transparent=True, recurse=1)
    folder = tmp_path / "out" / "photo"
    (folder / "layer_1" / "notes.txt").write_text("not ours")
    (folder / ".layers.json.partial").write_text("of a process that was killed")
    _decompose(path, tmp_path / "out", overwrite=True, recurse=0, transparent=True)
    assert [file.name for file in (folder / "layer_1").iterdir()] == ["notes.txt"]
    assert (folder / "layer_0").is_dir()
    (folder / "layer_1" / "notes.txt").unlink()
    fewer = Sampling(layers=2, steps=1, size=32)
    _decompose(path, tmp_path / "out", overwrite=True, sampling=fewer)
    assert {f.name for f in folder.iterdir()} == FILES | {"layer_0.png", "layer_1.png"}


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"[]", b'{"settings": 3}', b"{"])
def test_records_of_any_content(tmp_path, content):
    """What is no record is made again; what is one, of other settings, is left alone."""
    path = _picture(tmp_path / "photo.png", 32, 32)
    record = tmp_path / "out" / "photo" / "layers.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    outcome, _ = _decompose(path, tmp_path / "out")
    if content.startswith(b'{"'):
        assert "was made with" in outcome.problems[0].reason and record.read_bytes() == content
    else:
        assert len(outcome.written) == 1 and json.loads(record.read_text())["settings"]


def test_outputs_are_tried_before_anything_is_loaded(tmp_path):
    path = _picture(tmp_path / "photo.png", 32, 32)
    job = Job(epath.Path(tmp_path / "photo.png" / "out"), SAMPLING)
    with pytest.raises(NotADirectoryError) as error:
        decompose_pictures(find_pictures(str(path)), job, lambda: 1 / 0)
    assert disk_problem(error.value, "elsewhere") == (
        f"{path / 'out'}: Not a directory; something else is in its way; please choose another "
        "place"
    )
    require_writable(tmp_path / "new" / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.png"]


def test_disk_problems_name_a_path():
    full = OSError(errno.ENOSPC, "any words")
    assert disk_problem(full, "out") == (
        "out: No space left on device; please free some space, or choose a place on another disk"
    )
    odd = disk_problem(OSError("two\nlines"), "out")
    assert odd == "out: two lines; please check the path, or choose another place"
    network = disk_problem(OSError(-2, "no such host"), "out")  # a number that no file has
    assert network.startswith("out: [Errno -2] no such host; please check")


def test_stores_are_tried_before_anything_is_loaded(tmp_path, monkeypatch):
    """Without the package for them, as most machines are."""

    def absent(name, **_):
        raise ImportError(f"no file system for {name}")

    monkeypatch.setattr("fsspec.filesystem", absent)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for call in (find_pictures, require_writable):
        with pytest.raises(CheckpointError, match=r"pip install -e '\.\[gcs\]'"):
            call("gs://bucket/pictures")
        with pytest.raises(CheckpointError, match="is on no store that is known"):
            call("http://host/pictures")
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_seeds_up_to_32_bits(tmp_path):
    for name in "ab":
        _picture(tmp_path / "in" / f"{name}.png", 32, 32)
    outcome, _ = _decompose(tmp_path / "in", tmp_path / "out", seed=2**32 - 2)
    assert len(outcome.written) == 2
    key = jax.random.wrap_key_data(np.array([0, 2**32 - 1], np.uint32))
    frame = SAMPLING.frame(np.asarray(Image.open(tmp_path / "in" / "b.png").convert("RGBA")))
    layer = FakeDecomposer.stack(frame, key, SAMPLING)[1]
    found = _read(tmp_path / "out" / "b" / "layer_1.png")
    np.testing.assert_array_equal(found, flatten(layer))
    with pytest.raises(ValueError, match="please use 0 to 4294967295"):
        _decompose(tmp_path / "in", tmp_path / "other", seed=2**32 - 1)


def test_files_are_read_once(tmp_path, monkeypatch):
    for index, name in enumerate("abc"):
        _picture(tmp_path / "in" / f"{name}.png", 32, 32, index)
    read = collections.Counter()
    fetch = pictures.fetch_file

    def counted(path, limits):
        read[path.name] += 1
        return fetch(path, limits)

    monkeypatch.setattr(folder, "fetch_file", counted)
    for times in (1, 2):  # to decompose them, and to know that they are the same
        _decompose(tmp_path / "in", tmp_path / "out")
        assert set(read.values()) == {times} and len(read) == 3


def test_a_bad_picture_stops_no_other(tmp_path):
    for index, name in enumerate("abcd"):
        _picture(tmp_path / "in" / f"{name}.png", 32, 32, index)
    whole = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "e.png").symlink_to(tmp_path / "nowhere.png")
    outcome, fake = _decompose(tmp_path / "in", tmp_path / "out", batch=2)
    assert sorted(f.name for f in outcome.written) == ["a", "c", "d"]
    assert [Path(p.path).name for p in outcome.problems] == ["e.png", "b.png"]
    assert [shape[0] for shape, _ in fake.calls] == [2, 1]


def test_nothing_is_loaded_for_bad_pictures_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    outcome = decompose_pictures(
        find_pictures(str(tmp_path)), Job(epath.Path(tmp_path / "out"), SAMPLING), lambda: 1 / 0
    )
    assert len(outcome.problems) == 1


def test_what_is_found(tmp_path):
    for name in ("in/b.png", "in/a.jpg", "in/inner/c.png", "in/[x].png"):
        _picture(tmp_path / name, 8, 8)
    (tmp_path / "in" / "notes.txt").write_text("")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")

    def found(where):
        return [(e.index, e.name) for e in find_pictures(str(tmp_path / where))]

    assert found("in") == [(0, "[x]"), (1, "a"), (2, "b")]
    assert found("in/*.png") == [(0, "[x]"), (1, "b")]
    assert found("in/**/*.png") == [(0, "[x]"), (1, "b"), (2, "c")]
    assert found("i?/[ab].*") == [(0, "a"), (1, "b")]
    assert found("in/[x].png") == [(0, "[x]")]
    for missing in ("in/no.png", "no", "in/*.gif", "no/*"):
        with pytest.raises(FolderError, match="no picture at"):
            found(missing)


def test_equal_names_get_folders_of_their_own(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/b.png", "y/a.png", "y/A.png"):
        _picture(tmp_path / name, 8, 8)
    entries = find_pictures(str(tmp_path / "*" / "*"))
    assert [e.name for e in entries] == ["a.jpg", "1_a.png", "b", "3_A.png", "4_a.png"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("steps", 0),
        ("size", 8),
        ("sampler", "ddim"),
        ("resize", "crop"),
        ("guidance", float("nan")),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


def test_frames_follow_the_size_rule():
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    longest = Sampling(size=64).frame(picture)
    assert longest.shape[:2] == longest_side_size(50, 70, 64) and (longest[..., 3] == 255).all()
    expected = Image.fromarray(flatten(picture)).resize((64, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(longest[..., :3], np.asarray(expected))
    area = Sampling(size=64, resize="area").frame(picture)
    expected = Image.fromarray(picture).resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(area, np.asarray(expected))

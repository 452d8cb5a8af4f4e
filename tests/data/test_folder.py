"""Picture folders: indexing, skipping, captions, held-out split."""

import collections
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hostile_files import as_nobody
from PIL import Image

from sl_jax.data import folder as folder_module
from sl_jax.data.buckets import Bucket, make_buckets, standard_buckets
from sl_jax.data.folder import (
    FolderError,
    is_held_out,
    scan_folder,
)
from sl_jax.data.pictures import PictureLimits
from sl_jax.data.sources import training_and_held_out

BUCKETS = standard_buckets(64)


def write(path, size=(32, 32), seed=0, **options):
    """A noise picture of (height, width); the seed makes its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def fill(folder, count, first=0):
    for seed in range(first, first + count):
        write(folder / f"{seed:04d}.png", seed=seed)
    return folder


def names(index):
    return [record.name for record in index]


def reasons(index):
    return {entry.name: entry.reason for entry in index.skipped}


def test_records_are_sorted_and_complete(tmp_path):
    write(tmp_path / "b.png", (32, 32), seed=1)
    write(tmp_path / "a" / "z.jpg", (30, 40), seed=2)
    write(tmp_path / "a" / "deep" / "x.webp", (40, 30), seed=3)
    write(tmp_path / "B.TIFF", (32, 57), seed=4, format="TIFF")
    index = scan_folder(tmp_path, BUCKETS)
    assert names(index) == ["B.TIFF", "a/deep/x.webp", "a/z.jpg", "b.png"]
    first = index.records[0]
    assert (first.height, first.width) == (32, 57) and first.bucket == Bucket(32, 64)
    assert [record.bucket for record in index.records[1:]] == [(64, 48), (48, 64), (64, 64)]
    for record in index:
        data = Path(record.path).read_bytes()
        assert record.content_hash == hashlib.sha256(data).hexdigest()
        assert record.content_hash.startswith(record.picture_id)
    assert index.skipped == ()
    assert index.by_bucket[Bucket(64, 64)] == (index.records[3],)


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_do_not_matter(tmp_path, threads):
    fill(tmp_path, 20)
    (tmp_path / "bad.png").write_text("x")
    assert scan_folder(tmp_path, BUCKETS, threads=threads) == scan_folder(tmp_path, BUCKETS)


def test_files_that_are_no_pictures_of_their_own(tmp_path):
    """What is broken is in tests/hostile_files.py."""
    good = write(tmp_path / "good.png", (64, 64))
    write(tmp_path / "no extension", (64, 64), seed=9, format="PNG")
    (tmp_path / "README.md").write_text("about these pictures")
    shutil.copy(good, tmp_path / ".hidden.png")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._good.png").write_bytes(b"junk")
    shutil.copy(good, tmp_path / "a copy.png")
    index = scan_folder(tmp_path, BUCKETS)
    assert names(index) == ["a copy.png", "no extension"]
    assert reasons(index) == {"good.png": "same content as a copy.png"}
    assert index.other_files == 1


def test_summary_counts_what_it_does_not_name(tmp_path):
    write(tmp_path / "good.png")
    for number in range(9):
        (tmp_path / f"bad{number}.png").touch()
    summary = scan_folder(tmp_path, BUCKETS).summary(names_per_reason=3)
    assert "9 skipped" in summary
    assert "empty file (0 bytes): bad0.png, bad1.png, bad2.png and 6 more" in summary


def test_linked_folders_are_entered_once(tmp_path):
    write(tmp_path / "outside" / "o.png", seed=1)
    folder = tmp_path / "pictures"
    write(folder / "z" / "p.png", seed=2)
    (folder / "a").symlink_to(folder / "z", target_is_directory=True)
    (folder / "b").symlink_to(tmp_path / "outside", target_is_directory=True)
    (folder / "c").symlink_to(tmp_path / "outside", target_is_directory=True)
    (folder / "z" / "self").symlink_to(".", target_is_directory=True)
    index = scan_folder(folder, BUCKETS)
    assert names(index) == ["b/o.png", "z/p.png"] and not index.skipped


def test_no_permission():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "good.png")
        write(folder / "secret.png", seed=1).chmod(0)
        write(folder / "closed" / "x.png", seed=2)
        (folder / "closed").chmod(0)
        try:
            with as_nobody():
                index = scan_folder(folder, BUCKETS, threads=1)
        finally:
            (folder / "closed").chmod(0o755)
    assert names(index) == ["good.png"]
    assert reasons(index) == {
        "secret.png": "Permission denied",
        "closed": "cannot be listed: Permission denied",
    }


def test_missing_and_empty_folders_say_what_was_looked_for(tmp_path):
    with pytest.raises(FolderError, match=r"no folder .*nowhere; please give a folder of pictures"):
        scan_folder(tmp_path / "nowhere", BUCKETS)
    with pytest.raises(FolderError, match=r"a\.png is not a folder"):
        scan_folder(write(tmp_path / "x" / "a.png"), BUCKETS)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        FolderError, match=r"no usable picture in .*empty: looked .*\.png.* 0 files"
    ):
        scan_folder(empty, BUCKETS)
    (empty / "a.txt").write_text("caption")
    (empty / "b.png").touch()
    with pytest.raises(FolderError, match=r"2 files, 1 of them skipped.*\n.*0 bytes\): b\.png"):
        scan_folder(empty, BUCKETS)


def test_limits_apply(tmp_path):
    write(tmp_path / "a.png", (64, 64))
    write(tmp_path / "b.png", (32, 32))
    index = scan_folder(tmp_path, BUCKETS, limits=PictureLimits(min_side=40))
    assert names(index) == ["a.png"] and "min_side is 40" in reasons(index)["b.png"]


def test_without_verification_only_headers_are_read(tmp_path):
    data = write(tmp_path / "a.png", (64, 64)).read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    assert len(scan_folder(tmp_path, BUCKETS, verify=False)) == 2
    assert len(scan_folder(tmp_path, BUCKETS, verify=True)) == 1


def test_captions(tmp_path):
    for seed, name in enumerate(["a", "b", "c", "d", "e", "sub/f", "g"]):
        write(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "a.txt").write_bytes("\ufeffeine Tür\r\n".encode())
    (tmp_path / "b.png.txt").write_text("long name")
    (tmp_path / "b.txt").write_text("short name")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.txt").write_bytes(b"\0\1\2")
    lines = [
        {"file_name": "a.png", "text": "loses to the text file"},
        {"file_name": "d.png", "caption": " from metadata "},
        {"file_name": "sub/../sub/f.png", "prompt": "nested"},
        {"file_name": "g.png", "text": 5},
        {"text": "nothing"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n" + "[" * 100_000 + "\n"
    (tmp_path / "metadata.jsonl").write_text(text)
    index = scan_folder(tmp_path, BUCKETS)
    assert {record.name: record.caption for record in index} == {
        "a.png": "eine Tür",
        "b.png": "long name",
        "c.png": "caf\ufffd",
        "d.png": "from metadata",
        "e.png": "",
        "sub/f.png": "nested",
        "g.png": "",
    }
    assert set(index.notes) == {
        ("c.txt", "not UTF-8; the wrong bytes were replaced"),
        ("e.txt", "not text"),
        ("metadata.jsonl", 'line 4: "text" is not a string'),
        ("metadata.jsonl", 'line 5: not an object with a "file_name"'),
        ("metadata.jsonl", "line 7: not JSON"),
        ("metadata.jsonl", "line 8: not JSON"),
    }
    assert index.skipped == () and "5 with a caption" in index.summary()


def test_metadata_in_a_folder_inside_is_relative_to_it(tmp_path):
    write(tmp_path / "sub" / "a.png", seed=1)
    write(tmp_path / "a.png", seed=2)
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "inner"}')
    captions = {record.name: record.caption for record in scan_folder(tmp_path, BUCKETS)}
    assert captions == {"a.png": "", "sub/a.png": "inner"}


def test_caption_files_of_absurd_size_are_left(tmp_path):
    write(tmp_path / "a.png")
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 40)
    index = scan_folder(tmp_path, BUCKETS)
    assert index.records[0].caption == "" and "at most" in index.notes[0].reason


def test_added_pictures_move_no_others_in_the_split(tmp_path):
    before = scan_folder(fill(tmp_path, 60), BUCKETS)
    train, held = before.split(0.3)
    assert 5 < len(held) < 35 and len(train) + len(held) == 60
    fill(tmp_path, 40, first=60)
    after_train, after_held = scan_folder(tmp_path, BUCKETS).split(0.3)
    assert set(names(held)) <= set(names(after_held))
    assert set(names(train)) <= set(names(after_train))
    more = scan_folder(tmp_path, BUCKETS).split(0.6)[1]
    assert set(names(after_held)) < set(names(more))


def test_the_split_follows_contents_not_names(tmp_path):
    held = {r.content_hash for r in scan_folder(fill(tmp_path / "a", 30), BUCKETS).split(0.5)[1]}
    for position, path in enumerate(sorted((tmp_path / "a").iterdir(), reverse=True)):
        path.rename(tmp_path / "a" / f"renamed{position}.png")
    renamed = scan_folder(tmp_path / "a", BUCKETS).split(0.5)[1]
    assert {record.content_hash for record in renamed} == held


def test_split_shares():
    hashes = [f"{number * 2654435761 % 2**32:08x}".ljust(64, "0") for number in range(1000)]
    assert not any(is_held_out(content, 0.0) for content in hashes)
    assert abs(sum(is_held_out(content, 0.25) for content in hashes) - 250) < 5
    assert not is_held_out("f" * 64, 0.999) and is_held_out("0" * 64, 1e-9)


def test_a_small_folder_has_a_held_out_picture_too(tmp_path, caplog):
    fill(tmp_path, 3)
    train, held = training_and_held_out(tmp_path, BUCKETS, eval_fraction=1e-9)
    assert (len(train), len(held)) == (2, 1)
    assert held.records[0].content_hash < min(r.content_hash for r in train)
    assert f"{held.records[0].name} is held out" in caplog.text
    again = training_and_held_out(tmp_path, BUCKETS, eval_fraction=1e-9)[1]
    assert names(again) == names(held)
    assert not training_and_held_out(tmp_path, BUCKETS, eval_fraction=0.0)[1]


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.999])
def test_one_picture_cannot_be_trained_on_and_held_out(tmp_path, fraction):
    fill(tmp_path, 1)
    with pytest.raises(FolderError, match=r"one usable picture; .* add pictures, or name another"):
        training_and_held_out(tmp_path, BUCKETS, eval_fraction=fraction)
    assert len(training_and_held_out(tmp_path, BUCKETS, eval_fraction=0.0)[0]) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_wrong_fraction(tmp_path, fraction):
    index = scan_folder(fill(tmp_path, 1), BUCKETS)
    with pytest.raises(ValueError, match="eval_fraction"):
        index.split(fraction)


def test_explicit_eval_data_is_never_trained_on(tmp_path, caplog):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "eval", 4, first=8)
    with caplog.at_level(logging.INFO):
        train, held = training_and_held_out(
            tmp_path / "train", BUCKETS, eval_data=tmp_path / "eval"
        )
    assert names(train) == [f"{number:04d}.png" for number in range(8)]
    assert len(held) == 4
    assert set(reasons(train)) == {"0008.png", "0009.png"}
    assert sum("skipped" in record.message for record in caplog.records) == 2
    shutil.copytree(tmp_path / "train", tmp_path / "same")
    with pytest.raises(FolderError, match="none are left to train on"):
        training_and_held_out(tmp_path / "train", BUCKETS, eval_data=tmp_path / "same")


def test_fraction_by_default_and_one_summary(tmp_path, caplog):
    fill(tmp_path, 30)
    (tmp_path / "bad.png").touch()
    with caplog.at_level(logging.WARNING):
        train, held = training_and_held_out(tmp_path, BUCKETS, eval_fraction=0.3)
    assert len(train) + len(held) == 30 and len(held)
    assert not {r.content_hash for r in train} & {r.content_hash for r in held}
    assert [record.message.count("bad.png") for record in caplog.records] == [1]


def test_fingerprint_is_of_contents_and_buckets(tmp_path):
    index = scan_folder(fill(tmp_path / "a", 3), BUCKETS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "0000.png").rename(tmp_path / "b" / "zz.png")
    assert scan_folder(tmp_path / "b", BUCKETS).fingerprint == index.fingerprint
    assert scan_folder(tmp_path / "a", make_buckets([(32, 32)])).fingerprint != index.fingerprint
    fill(tmp_path / "b", 1, first=77)
    assert scan_folder(tmp_path / "b", BUCKETS).fingerprint != index.fingerprint


def test_remote_folders_go_through_epath(tmp_path):
    """gs:// paths: the same code, with a backend that maps the bucket onto a local folder."""
    fill(tmp_path / "bucket", 2)
    (tmp_path / "bucket" / "0001.txt").write_text("far away")
    (tmp_path / "bucket" / "bad.png").touch()

    def local(original, path, *rest, **options):
        text = os.fspath(path)
        return original(text.replace("gs://bucket", str(tmp_path / "bucket")), *rest, **options)

    functions = ("exists", "isdir", "listdir", "open", "stat")
    with epath.testing.mock_epath(**{name: local for name in functions}):
        index = scan_folder("gs://bucket", BUCKETS)
    assert names(index) == ["0000.png", "0001.png"]
    assert index.records[1].path == "gs://bucket/0001.png"
    assert index.records[1].caption == "far away"
    assert reasons(index) == {"bad.png": "empty file (0 bytes)"}


def test_remote_files_are_read_once_and_at_the_same_time(tmp_path):
    """A store that answers slowly, on many requests at a time."""
    fill(tmp_path / "bucket", 24)
    (tmp_path / "bucket" / "movie.bin").write_bytes(b"\0" * 100)
    opened, waiting, most = collections.Counter(), set(), [0]

    def slow(original, path, *rest, **options):
        me = object()
        waiting.add(me)
        most[0] = max(most[0], len(waiting))
        time.sleep(0.02)
        waiting.discard(me)
        return original(os.fspath(path).replace("gs://bucket", str(tmp_path / "bucket")), *rest)

    def counted(original, path, *rest, **options):
        opened[os.path.basename(path)] += 1
        return slow(original, path, *rest)

    functions = {"exists": slow, "listdir": slow, "stat": slow, "open": counted}

    def is_folder(original, path, *rest):
        folders.append(len(waiting))
        return slow(original, path, *rest)

    folders = []
    with epath.testing.mock_epath(**functions, isdir=is_folder):
        index = scan_folder("gs://bucket", BUCKETS, threads=8)
    assert len(index) == 24 and set(opened.values()) == {1}
    assert most[0] > 4 and max(folders) > 2


def test_a_file_that_vanishes_while_scanning_is_skipped(tmp_path, monkeypatch):
    fill(tmp_path, 3)
    original = folder_module.fetch_file

    def vanishing(path, *rest):
        if path.name == "0001.png":
            path.unlink()
        return original(path, *rest)

    monkeypatch.setattr(folder_module, "fetch_file", vanishing)
    index = scan_folder(tmp_path, BUCKETS)
    assert names(index) == ["0000.png", "0002.png"]
    assert reasons(index) == {"0001.png": "No such file or directory"}


@pytest.mark.slow
def test_memory_is_bounded_by_one_large_picture(tmp_path):
    """Tiny files that unpack to 190 MB each, read by 16 threads."""
    data = io.BytesIO()
    Image.new("RGB", (7900, 7900)).save(data, "PNG")
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(data.getvalue() + bytes([number]))
    # ru_maxrss would not do: a new process inherits the peak of the one that started it.
    program = (
        "import re, sys; from sl_jax.data import scan_folder, standard_buckets; "
        "index = scan_folder(sys.argv[1], standard_buckets(64), threads=16); assert len(index) == "
        "12; print(int(re.search(r'HWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 900

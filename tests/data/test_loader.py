"""The stream of training pictures and the held-out set."""

import collections
import errno
import hashlib
import itertools
import json
import logging
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from sl_jax.data import loader
from sl_jax.data._schedule import Schedule
from sl_jax.data.buckets import Bucket, make_buckets
from sl_jax.data.folder import FolderError, PictureIndex, scan_folder
from sl_jax.data.loader import EvalSet, TrainStream
from sl_jax.data.pictures import PictureError, open_picture, resize_to

BUCKETS = make_buckets([(32, 32), (32, 48), (48, 32)])
SIZES = {BUCKETS[0]: (40, 40), BUCKETS[1]: (40, 60), BUCKETS[2]: (60, 40)}
COUNTS = {BUCKETS[0]: 11, BUCKETS[1]: 5, BUCKETS[2]: 3}


@pytest.fixture
def index(tmp_path):
    rng = np.random.default_rng(0)
    for bucket, count in COUNTS.items():
        for number in range(count):
            pixels = rng.integers(0, 256, (*SIZES[bucket], 3), np.uint8)
            name = f"{bucket}-{number:02d}"
            Image.fromarray(pixels).save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    return scan_folder(tmp_path, BUCKETS)


def stream(index, **options):
    return TrainStream(index, **{"groups": 4, "seed": 3, "threads": 2, **options})


def told(step):
    """A step without its pixels."""
    examples = [(example.slot, example.picture_id, example.layers) for example in step.examples]
    return step.step, step.bucket, step.layers, examples


def take(source, count):
    return [told(next(source)) for _ in range(count)]


def test_a_step_is_one_bucket_one_l_and_the_right_pixels(index):
    records = {record.picture_id: record for record in index}
    with_source = stream(index)
    for number in range(12):
        step = next(with_source)
        assert step.step == number and len(step.examples) == 4
        for slot, example in enumerate(step.examples):
            record = records[example.picture_id]
            assert (example.step, example.slot, example.path) == (number, slot, record.path)
            assert example.bucket == step.bucket == record.bucket
            assert example.layers == step.layers
            assert example.caption == f"caption of {record.name[:-4]}"
            np.testing.assert_array_equal(
                example.picture, resize_to(open_picture(record.path), record.bucket)
            )
            assert example.picture.shape == (*step.bucket, 3)
    with_source.close()


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 5, "prefetch_steps": 3}])
def test_threads_do_not_matter(index, options):
    assert take(stream(index, **options), 15) == take(stream(index), 15)


def test_shares_of_processes_join_to_the_whole(index):
    whole = take(stream(index), 15)
    shares = [stream(index, slots=slots) for slots in ((0, 3), (1, 2))]
    for step, bucket, layers, examples in whole:
        parts = [told(next(share)) for share in shares]
        assert all(part[:3] == (step, bucket, layers) for part in parts)
        assert [len(part[3]) for part in parts] == [2, 2]
        (first, last), (second, third) = (part[3] for part in parts)
        assert [first, second, third, last] == list(examples)


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_restored_streams_continue_exactly(index, stop):
    expected = take(stream(index), 15)
    source = stream(index)
    assert take(source, stop) == expected[:stop]
    state = json.loads(json.dumps(source.state()))
    # Read ahead, another number of processes: nothing of it is in the position.
    other = stream(index, threads=1, prefetch_steps=2)
    take(other, 5)
    other.restore(state)
    assert other.step == stop
    assert take(other, 15 - stop) == expected[stop:]
    # The stream that was stopped goes on, too.
    assert take(source, 15 - stop) == expected[stop:]
    half = stream(index, slots=(2, 3))
    half.restore(state)
    assert told(next(half))[3] == expected[stop][3][2:]


def test_the_order_is_pinned():
    """A change of the order would break every run that is resumed with a newer version."""
    schedule = Schedule([40, 5], groups=8, layer_weights=(1.0, 3.0), seed=7)
    steps = [(schedule.shape(step), schedule.pictures(step)) for step in range(1500)]
    digest = hashlib.sha256(repr(steps).encode()).hexdigest()
    assert steps[0] == ((0, 1), [34, 12, 7, 35, 14, 9, 33, 32])
    assert digest == "3d96c0edf5116225ede960311d336331893de3aa339b35098a88a9446a7017df"


def test_seeds_differ_and_renaming_does_not(index, tmp_path):
    expected = take(stream(index), 6)
    assert take(stream(index, seed=4), 6) != expected
    for position, path in enumerate(sorted(tmp_path.glob("*.png"), reverse=True)):
        path.rename(tmp_path / f"x{position:03d}.png")
    renamed = stream(scan_folder(tmp_path, BUCKETS))
    assert take(renamed, 6) == expected
    assert renamed.fingerprint == stream(index).fingerprint


@pytest.mark.parametrize(("size", "groups"), [(12, 4), (11, 4), (5, 4), (4, 4), (7, 1), (63, 32)])
def test_every_picture_comes_once_a_pass_and_none_twice_a_step(size, groups):
    schedule = Schedule([size], groups, (1.0,), seed=0)
    steps = [schedule.pictures(step) for step in range(3 * size)]
    assert all(len(set(step)) == groups for step in steps)
    flat = list(itertools.chain(*steps))
    passes = [tuple(flat[start : start + size]) for start in range(0, len(flat), size)]
    assert all(sorted(order) == list(range(size)) for order in passes)
    assert len(set(passes)) == len(passes) or size < 6
    # Asked for in another order, by a stream that starts in the middle, they are the same.
    backwards = Schedule([size], groups, (1.0,), seed=0)
    assert [backwards.pictures(step) for step in reversed(range(3 * size))] == steps[::-1]


def test_a_small_bucket_repeats_evenly():
    schedule = Schedule([3], 8, (1.0,), seed=0)
    for step in range(20):
        counts = collections.Counter(schedule.pictures(step))
        # Two whole passes, and the ends of two others.
        assert sum(counts.values()) == 8 and set(counts.values()) <= {2, 3, 4}


def test_buckets_and_layers_come_by_their_weights():
    schedule = Schedule([600, 300, 100], 10, (1.0, 3.0, 0.0), seed=1)
    shapes = [schedule.shape(step) for step in range(4000)]
    buckets = np.bincount([bucket for bucket, _ in shapes]) / 4000
    layers = np.bincount([choice for _, choice in shapes]) / 4000
    np.testing.assert_allclose(buckets, (0.6, 0.3, 0.1), atol=0.03)
    np.testing.assert_allclose(layers, (0.25, 0.75), atol=0.03)


def test_shapes_are_all_that_can_come(index):
    source = stream(index, layers=(2, 3, 5), layer_weights=(1, 1, 0))
    assert set(source.shapes) == {(bucket, count) for bucket in BUCKETS for count in (2, 3)}
    seen = {(source.plan(step).bucket, source.plan(step).layers) for step in range(300)}
    assert seen == set(source.shapes)


def test_plan_reads_nothing_and_tells_the_future(index, monkeypatch):
    source = stream(index)
    plans = [source.plan(step) for step in range(5)]
    for plan, step in zip(plans, take(source, 5), strict=True):
        assert (plan.step, plan.bucket, plan.layers) == step[:3]
        assert [record.picture_id for record in plan.records] == [e[1] for e in step[3]]
    monkeypatch.setattr(loader, "open_record", lambda *_: pytest.fail("read"))
    source.plan(10**6)
    assert source.step == 5 and source.passes == 20 / 19


def test_unreadable_files_are_replaced_deterministically_and_reported(index, caplog):
    clean = take(stream(index, threads=0), 12)
    bad = [record for record in index if record.bucket == BUCKETS[0]][:3]
    os.unlink(bad[0].path)
    open(bad[1].path, "wb").close()
    Image.new("RGB", SIZES[BUCKETS[0]]).save(bad[2].path)
    ids = {record.picture_id for record in bad}
    source = stream(index)
    with caplog.at_level(logging.WARNING):
        first = take(source, 12)
    source.close()
    for record in bad:
        assert sum(record.path in message for message in caplog.messages) == 1
    assert first == take(stream(index, threads=0), 12)
    resumed = stream(index)
    resumed.restore({**stream(index).state(), "step": 6})
    assert take(resumed, 6) == first[6:]
    for before, after in zip(clean, first, strict=True):
        assert before[:3] == after[:3]
        for old, new in zip(before[3], after[3], strict=True):
            if old[1] in ids:  # replaced, by none that the step has already
                assert new[0::2] == old[0::2]
                assert new[1] not in ids | {example[1] for example in before[3]}
            else:
                assert new == old
    assert dict(source.failures) == {
        bad[0].path: "No such file or directory",
        bad[1].path: "empty file (0 bytes)",
        bad[2].path: "changed since the pictures were looked through",
    }


def test_storage_that_stumbles_is_asked_again(index, monkeypatch):
    expected = take(stream(index), 3)
    monkeypatch.setattr(loader, "_RETRY_SECONDS", (0.0, 0.0))
    lock, calls = threading.Lock(), collections.Counter()

    def stumbling(path, limits, _):
        with lock:
            calls[path] += 1
            count = calls[path]
        if count % 3:
            raise PictureError(path, "storage") from OSError(errno.EIO, "storage")
        return open_picture(path, limits)

    monkeypatch.setattr(loader, "open_record", stumbling)
    source = stream(index, threads=1)
    assert take(source, 3) == expected and not source.failures


def test_nothing_left_is_an_error_not_a_hang(index):
    for record in index:
        open(record.path, "wb").close()
    with pytest.raises(FolderError, match=r"none of the \d+ pictures .* could not be read"):
        next(stream(index))


class Counted:
    """Stands in for `open_record` and notes the threads that call it."""

    def __init__(self, monkeypatch):
        self.threads = []
        monkeypatch.setattr(loader, "open_record", self)

    def __call__(self, path, limits, _):
        picture = open_picture(path, limits)
        self.threads.append(threading.current_thread())
        return picture

    def wait_for(self, count):
        deadline = time.monotonic() + 20
        while len(self.threads) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(self.threads) == count


def test_quarantine_replaces_even_what_was_read_ahead(index, monkeypatch):
    counted = Counted(monkeypatch)
    source = stream(index, prefetch_steps=2)
    example = next(source).examples[0]
    counted.wait_for(12)
    victim = source.plan(1).records[2].picture_id
    source.quarantine({victim: "seen on another host"})
    other = source.replace(example, "refused by the judge")
    assert (other.step, other.slot, other.bucket) == (example.step, example.slot, example.bucket)
    assert other.picture_id != example.picture_id and other.layers == example.layers
    state = source.state()
    gone = {victim: "seen on another host", example.picture_id: "refused by the judge"}
    assert state["quarantined"] == gone == source.quarantined
    coming = [source.plan(step) for step in range(1, 30)]
    following = take(source, 29)
    assert any(r.picture_id == example.picture_id for plan in coming for r in plan.records)
    assert not any(e[1] in gone for step in following for e in step[3])
    resumed = stream(index, threads=0)
    resumed.restore(state)
    assert take(resumed, 29) == following
    assert resumed.quarantined == gone


def test_other_pictures_than_the_checkpoints_are_said_and_gone_on_with(index, tmp_path, caplog):
    source = stream(index)
    take(source, 3)
    (tmp_path / "32x32-00.png").unlink()
    other = stream(scan_folder(tmp_path, BUCKETS))
    with caplog.at_level(logging.WARNING):
        other.restore(source.state())
    assert "not those of the checkpoint" in caplog.text
    assert next(other).step == 3
    caplog.clear()
    stream(index).restore(source.state())
    assert not caplog.records


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 1},
        {"step": "x", "fingerprint": "", "quarantined": {}},
        {"step": -1, "fingerprint": "", "quarantined": {}},
        None,
    ],
)
def test_wrong_states_are_refused(index, state):
    source = stream(index)
    with pytest.raises(ValueError, match="picture stream"):
        source.restore(state)
    assert source.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups = 0"),
        ({"slots": ()}, r"slots = \(\)"),
        ({"slots": (1, 0)}, r"slots = \(1, 0\); .* rising, from 0 to 3"),
        ({"slots": (1, 1)}, r"slots = \(1, 1\)"),
        ({"slots": (2, 4)}, r"slots = \(2, 4\)"),
        ({"layers": ()}, "layers = "),
        ({"layers": (0,)}, r"layers = \(0,\)"),
        ({"layer_weights": (1.0,)}, "layer_weights"),
        ({"layer_weights": (0.0, 0.0)}, "layer_weights"),
        ({"layer_weights": (1.0, float("nan"))}, "layer_weights"),
        ({"layer_weights": (2.0, -1.0)}, "layer_weights"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_wrong_settings_name_field_and_value(index, options, message):
    with pytest.raises(ValueError, match=message):
        stream(index, **options)


def test_reading_ahead_is_bounded_and_in_the_background(index, monkeypatch):
    counted = Counted(monkeypatch)
    source = stream(index, prefetch_steps=2)
    next(source)
    counted.wait_for(12)  # one step given, two read ahead
    assert threading.main_thread() not in counted.threads
    source.close()


def test_early_and_late_steps_are_found_quickly():
    schedule = Schedule([100_000, 1000], 32, (1.0, 1.0), seed=0)
    started = time.monotonic()
    schedule.pictures(1_000_000)
    assert time.monotonic() - started < 20


def test_empty_indices_are_errors():
    empty = PictureIndex(folder="nowhere", records=())
    with pytest.raises(FolderError, match="no pictures to train on in nowhere"):
        TrainStream(empty, groups=1)
    with pytest.raises(FolderError, match="eval_data, or raise eval_fraction"):
        EvalSet(empty)


def test_evaluation_set_is_fixed(index, tmp_path):
    held = EvalSet(index)
    assert len(held) == 19 and [example.slot for example in held] == list(range(19))
    assert {example.layers for example in held} == {3, 4}
    again = [(example.picture_id, example.layers) for example in held]
    for position, path in enumerate(sorted(tmp_path.glob("*.png"), reverse=True)):
        path.rename(tmp_path / f"x{position:03d}.png")
    renamed = scan_folder(tmp_path, BUCKETS)
    assert [(example.picture_id, example.layers) for example in EvalSet(renamed)] == again
    assert [example.picture_id for example in EvalSet(renamed, count=5)] == [
        i for i, _ in again[:5]
    ]
    some = PictureIndex(folder="", records=renamed.records[::2])
    assert {(e.picture_id, e.layers) for e in EvalSet(some)} <= set(again)


def _slots(batches):
    return [e.slot for batch in batches for e in batch.examples if not e.is_blank]


def test_evaluation_batches_have_one_shape_each(index):
    held = EvalSet(index)
    batches = list(held.batches(4))
    assert sorted(_slots(batches)) == list(range(19))
    for batch in batches:
        assert batch.rows == (0, 1, 2, 3) and len(batch.examples) == 4
        shapes = {(e.bucket, e.layers, e.picture.shape) for e in batch.examples}
        assert shapes == {(batch.bucket, batch.layers, (*batch.bucket, 3))}
    with pytest.raises(ValueError, match="size = 0"):
        next(held.batches(0))


def test_rows_of_evaluation_batches_join_to_the_whole(index):
    held = EvalSet(index)
    for whole, *shares in zip(
        *(held.batches(4, rows) for rows in (None, (0, 3), (1, 2))), strict=True
    ):
        found = {r: e for s in shares for r, e in zip(s.rows, s.examples, strict=True)}
        for row, example in enumerate(whole.examples):
            assert (found[row].slot, found[row].path) == (example.slot, example.path)
            assert found[row].is_blank == example.is_blank


def test_evaluation_leaves_out_what_cannot_be_read(index):
    held = EvalSet(index)
    open(held.records[4].path, "wb").close()
    Image.new("RGB", (40, 40)).save(held.records[7].path)
    assert [example.slot for example in held] == [n for n in range(19) if n not in (4, 7)]
    assert sorted(_slots(held.batches(4))) == [n for n in range(19) if n not in (4, 7)]
    assert dict(held.failures) == {
        held.records[4].path: "empty file (0 bytes)",
        held.records[7].path: "changed since the pictures were looked through",
    }
    with pytest.raises(PictureError):
        held[4]
    with pytest.raises(IndexError):
        held[19]
    assert held[-1].slot == 18


def test_limits_of_the_index_hold_when_reading(index):
    record = index.records[0]
    Image.new("RGB", (400, 20)).save(record.path)
    with pytest.raises(PictureError, match="max_aspect"):
        loader._example(record, 3, 0, 0, index.limits)
    assert record.bucket == Bucket(32, 32)

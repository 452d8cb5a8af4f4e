"""Records of judgements: readable, exact, whole."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from hostile import known_group, scripted
from PIL import Image

from sl_jax.scoring import Answer, JudgeConfig, PermanentJudgeError, RenderConfig, TwoStageJudge
from sl_jax.scoring.records import (
    JudgeRecords,
    RecordError,
    read_pictures,
    read_records,
    to_markdown,
)

RENDER = RenderConfig(tile_size=None)


class Flaky:
    """Refuses the second group's second candidate, and gives no grid for the third group."""

    async def answer(self, request):
        text = scripted(request)
        if request.stage == 1 and request.digest() in self.refused:
            raise PermanentJudgeError("refused: „nein“")
        return Answer(text if request.stage == 1 or not self.no_grid else "half", "e", 9, 0.25)

    def __init__(self, refused=(), no_grid=False):
        self.refused, self.no_grid = refused, no_grid


def judged(index, endpoint):
    group = dataclasses.replace(known_group(index, 3), caption="Ein Bär, “quoted”")
    judge = TwoStageJudge(endpoint, JudgeConfig(grids=2, asks=1, render=RENDER))
    return group, asyncio.run(judge.judge(group))


def _equal(first, second):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.shape == b.shape and a.dtype.kind == b.dtype.kind
        elif field.name == "seconds":
            assert a == pytest.approx(b, abs=1e-3)
        else:
            assert a == b, field.name


@pytest.fixture
def epoch():
    whole = judged(0, Flaky())

    class Refusing(Flaky):
        count = 0

        async def answer(self, request):
            Refusing.count += 1
            if Refusing.count == 2:
                raise PermanentJudgeError("refused: „nein“")
            return await super().answer(request)

    found = [whole, judged(1, Refusing()), judged(2, Flaky(no_grid=True))]
    return [group for group, _ in found], [scores for _, scores in found]


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, epoch):
    groups, scores = epoch
    assert not scores[1].valid.all() and not scores[2].two_stage
    records = JudgeRecords(tmp_path / "judge", render=RENDER)
    path = records.write(7, groups, scores, ["a.png", "b.png", "c.png"])
    records.write(8, groups[:1], scores[:1])
    assert path.name == "epoch_000007.jsonl"
    read = read_records(path)
    assert [record.picture_id for record in read] == ["a.png", "b.png", "c.png"]
    for record, group, wanted in zip(read, groups, scores, strict=True):
        assert (record.epoch, record.caption) == (7, group.caption)
        _equal(record.scores, wanted)
    assert [r.epoch for r in read_records(tmp_path / "judge")] == [7, 7, 7, 8]


def test_a_person_can_read_them(tmp_path, epoch):
    groups, scores = epoch
    text = JudgeRecords(tmp_path).write(1, groups, scores).read_text()
    assert "„nein“" in text and "Ein Bär" in text and "NaN" not in text
    row = json.loads(text.splitlines()[0])
    assert row["candidates"][0]["criteria"]["validity"] == {
        "score": scores[0].criteria[0, 4],
        "reason": "seen",
    }
    assert row["calls"][0] == {
        "stage": 1,
        "index": 0,
        "endpoint": "e",
        "seconds": 0.25,
        "tokens": 9,
        "cached": False,
    }


def test_pictures_show_the_first_grid(tmp_path, epoch):
    groups, scores = epoch
    JudgeRecords(tmp_path, pictures=1, render=RENDER).write(1, groups, scores)
    JudgeRecords(tmp_path, pictures=9, render=RENDER).write(2, groups, scores)
    assert len(list(tmp_path.glob("epoch_000001_*.png"))) == 1
    pictures = sorted(tmp_path.glob("epoch_000002_*.png"))
    assert len(pictures) == 3
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.ndim == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


def test_pictures_come_back_with_what_was_said_of_them(tmp_path, epoch):
    groups, scores = epoch
    records = JudgeRecords(tmp_path, pictures=9, render=RENDER)
    records.write(1, groups, scores, ["a.png", "b.png", "c.png"])
    assert read_pictures(tmp_path, 2) == []
    kept = read_pictures(tmp_path, 1)
    assert [record.picture_id for record, _ in kept] == ["a.png", "b.png", "c.png"]
    for number, (_, pixels) in enumerate(kept):
        path = tmp_path / f"epoch_000001_{number:03d}.png"
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))
    lines = to_markdown(kept[0][0]).splitlines()
    assert lines[0].startswith("a.png: Ein Bär")
    assert lines[2].startswith("| | reward | stage 1 | stage 2 | ")
    count = len(scores[0].valid)
    assert [line[:4] for line in lines[4 : 4 + count]] == [f"| {c} " for c in "ABCDEFGH"[:count]]
    assert f"| {scores[0].reward[0]:.2f} |" in lines[4]
    assert "validity: seen" in lines[5 + count]
    failure = next(f for f in scores[1].failures if f is not None)
    assert failure.reason in to_markdown(kept[1][0])


def _interrupted(*_):
    raise KeyboardInterrupt


def test_an_epoch_written_again_replaces_the_first_try(tmp_path, epoch, monkeypatch):
    groups, scores = epoch
    records = JudgeRecords(tmp_path)
    records.write(3, groups, scores)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(epath.Path(tmp_path)), "replace", _interrupted)
        records.write(3, groups, scores)
    records.write(3, groups[:1], scores[:1])
    assert len(read_records(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["epoch_000003_000.png"]
    dataclasses.replace(records, pictures=0).write(3, groups[:1], scores[:1])
    assert len(read_pictures(tmp_path, 3)) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_record_is_named(tmp_path, epoch):
    path = JudgeRecords(tmp_path).write(3, *epoch)
    path.write_text(path.read_text() + '{"epoch": 3}\n')
    with pytest.raises(RecordError, match=r"epoch_000003.jsonl, line 4"):
        read_records(path)
    with pytest.raises(FileNotFoundError, match="name a folder"):
        read_records(tmp_path / "..")


def test_pictures_that_do_not_come_back_are_named(tmp_path, epoch):
    JudgeRecords(tmp_path, pictures=1, render=RENDER).write(3, *epoch)
    (kept,) = tmp_path.glob("epoch_000003_*.png")
    whole = kept.read_bytes()
    for content in (b"", whole[:200], whole[:40] + b"\0\0" + whole[42:]):
        kept.write_bytes(content)
        with pytest.raises((OSError, RecordError)):
            read_pictures(tmp_path, 3)
    kept.write_bytes(whole)
    kept.rename(tmp_path / "epoch_000003_017.png")  # of an earlier try with more groups
    with pytest.raises(RecordError, match=r"_017\.png is of none of the epoch's 3 judged groups"):
        read_pictures(tmp_path, 3)

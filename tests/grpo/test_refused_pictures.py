"""A picture that the judge refuses gives way to another, in the same epoch."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_run import GROUPS, Phases, opened

from sl_jax.data import FolderError
from sl_jax.grpo import rolling
from sl_jax.scoring.records import read_records


@pytest.fixture
def run(tmp_path):
    with opened(tmp_path) as parts:
        yield parts


def _epoch(run):
    batch = rolling.roll_out(run, None, 0, Phases())
    rolled, scored, _ = rolling.await_scores(run, [batch], None, 0, Phases())
    rolling.record(run, 1, rolled, scored)
    return batch, rolled[0], scored


def _ids(batch):
    return [example.picture_id for example in batch.pictures.examples]


def test_nothing_is_rolled_out_again_where_nothing_was_refused(run):
    before, after, judged = _epoch(run)
    assert after is before and run.rollout.calls == 1
    assert len(run.judge.asked) == GROUPS and all(s.valid.all() for s in judged)


def test_refused_pictures_are_replaced_and_the_others_kept(run):
    drawn = _ids(SimpleNamespace(pictures=next(run.stream)))
    run.stream.restore(run.stream.state() | {"step": 0})
    run.judge.refused = {drawn[1], drawn[3]}
    before, after, judged = _epoch(run)
    assert _ids(before) == drawn
    assert [_ids(after)[i] == drawn[i] for i in range(4)] == [True, False, True, False]
    assert not run.judge.refused & set(_ids(after))
    assert all(scores.valid.all() for scores in judged)
    # Scores, candidates, pictures and records are those of the same groups, in order.
    assert run.rollout.calls == 2 and len(run.judge.asked) == GROUPS + 2
    names = [f"0.{slot}.{picture}" for slot, picture in enumerate(_ids(after))]
    assert [scores.group_id for scores in judged] == names
    assert [entry.group.group_id for entry in after.submitted.values()] == names
    for example, latent, entry in zip(
        after.pictures.examples,
        np.asarray(after.candidates.latents),
        after.submitted.values(),
        strict=True,
    ):
        assert np.array_equal(example.picture, latent)
        assert np.array_equal(entry.group.source, latent)
        assert np.array_equal(entry.group.candidates[1][0, ..., :3], latent)
    assert [record.picture_id for record in read_records(run.records)] == _ids(after)
    # They never come back.
    assert set(run.stream.quarantined) == run.judge.refused
    for _ in range(4):
        assert not run.judge.refused & set(_ids(SimpleNamespace(pictures=next(run.stream))))


def test_a_replacement_may_be_refused_too_but_not_for_ever(run):
    every = [record.picture_id for record in run.stream._records[0]]
    drawn = _ids(SimpleNamespace(pictures=next(run.stream)))
    run.stream.restore(run.stream.state() | {"step": 0})
    run.judge.refused = {drawn[0], *(set(every) - set(drawn))}
    _, after, judged = _epoch(run)
    assert run.rollout.calls == 1 + rolling._REPLACEMENTS
    # Then the group is left out of the epoch, and not waited for.
    assert [scores.valid.all() for scores in judged] == [False, True, True, True]
    assert judged[0].refusal == "I cannot help"
    assert set(run.stream.quarantined) >= {drawn[0], _ids(after)[0]}


def test_a_judge_that_refuses_everything_stops_the_run(run):
    run.judge.refused = {record.picture_id for record in run.stream._records[0]}
    with pytest.raises(FolderError, match="are quarantined"):
        for _ in range(2):
            _epoch(run)

"""A picture that the judge refuses gives way to another, in the same epoch."""

from contextlib import contextmanager
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged import judged

from sl_jax.data import FolderError, TrainStream, make_buckets, scan_folder, write_designs
from sl_jax.grpo import rolling
from sl_jax.grpo.config import GrpoConfig, JudgeSettings, RolloutConfig
from sl_jax.grpo.judging import Judging
from sl_jax.grpo.rollout import Decoded
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.processes import Processes
from sl_jax.scoring import Failure, JudgeWorker, Rewards
from sl_jax.scoring.records import JudgeRecords, read_records

CANDIDATES, GROUPS = 2, 4


class Judge:
    """Scores candidates by their number, and refuses some pictures.

    Attributes:
        refused: picture ids.
        asked: names of the groups, in the order of asking.
    """

    endpoint = None

    def __init__(self):
        self.refused, self.asked = set(), []

    async def judge(self, group):
        self.asked.append(group.group_id)
        picture_id = group.group_id.split(".")[-1]
        failure = Failure(True, "I cannot help") if picture_id in self.refused else None
        reward = np.full(CANDIDATES, np.nan) if failure else np.arange(CANDIDATES) / CANDIDATES
        return judged(reward, group_id=group.group_id, failures=(failure,) * len(reward))


class Rollout:
    """Candidates are the picture itself; counts how often it was called."""

    calls = 0
    finite = np.ones(GROUPS, bool)

    def __call__(self, adapter, pictures, start, grid):
        self.calls += 1
        finite = np.repeat(self.finite, CANDIDATES)
        return SimpleNamespace(latents=pictures.pixels, finite=finite)

    def work(self, candidates, start, grid):
        return 1.0

    def decode(self, latents, grid):
        latents = np.asarray(latents)
        alpha = np.full((*latents.shape[:3], 1), 255, np.uint8)
        layers = np.concatenate([latents, alpha], axis=-1)
        stacks = jnp.asarray(np.repeat(np.stack([layers, layers], axis=1), CANDIDATES, axis=0))
        return Decoded(stacks, np.ones(len(stacks), bool))


class Phases:
    def begin(self, name):
        pass

    def wait(self, reason):
        pass

    def computed(self, work):
        pass


@contextmanager
def opened(folder):
    """Parts of a run of one rollout batch per epoch, and its judge."""
    write_designs(folder / "pictures", "A", range(7), 32, 2)
    index = scan_folder(folder / "pictures", make_buckets([(32, 32)]))
    judge = Judge()
    with JudgeWorker(judge) as worker:
        judging = Judging(
            worker,
            Rewards((("judge", 1.0),)),
            JudgeSettings(min_valid=1.0, max_wait=0.0),
            JudgeRecords(folder / "judge", pictures=0),
        )
        yield SimpleNamespace(
            config=GrpoConfig("", "", 1, rollout=RolloutConfig(batch_groups=GROUPS)),
            stream=TrainStream(index, groups=GROUPS, layers=(2,), threads=0),
            rollout=Rollout(),
            prompts=lambda examples: (np.zeros((len(examples), 1, 4)), None),
            judging=judging,
            judge=judge,
            records=folder / "judge",
            layout=Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
            processes=Processes(),
        )


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

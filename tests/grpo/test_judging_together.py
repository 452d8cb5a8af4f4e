"""Processes that judge together wait for the same reason, equally long; threads stand for them."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from sl_jax.grpo import judging as module
from sl_jax.grpo.config import JudgeSettings
from sl_jax.grpo.judging import JudgeUnavailableError, Judging
from sl_jax.parallel.processes import ProcessError, Processes
from sl_jax.scoring import (
    EmbeddedJudge,
    JudgeConfig,
    JudgeWorker,
    PermanentJudgeError,
    Rewards,
    TransientJudgeError,
    TwoStageJudge,
)
from sl_jax.scoring.records import JudgeRecords, read_records

CANDIDATES, GROUPS = 2, 3
COUNT = 2


class Memory:
    """A store that threads share."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def put(self, name, value):
        with self._changed:
            self.values[name] = value
            self._changed.notify_all()

    def get(self, name, seconds):
        with self._changed:
            self._changed.wait_for(lambda: name in self.values, seconds)
            return self.values.get(name)

    def delete(self, name):
        with self._changed:
            for known in [n for n in self.values if n.startswith(f"{name}/")]:
                del self.values[known]


class Endpoint:
    """The embedded judge; each answer is tried for `tries` times before it comes.

    Attributes:
        trouble: what a pool would say while no server is up.
        error: raised while tries are left.
        asked: how often it was.
    """

    def __init__(self, tries=0, trouble=None, error=None):
        self.tries, self.trouble = tries, trouble
        self.error = error or TransientJudgeError("503, overloaded")
        self.asked = 0
        self._embedded = EmbeddedJudge()

    async def answer(self, request):
        self.asked += 1
        if self.asked <= self.tries:
            raise self.error
        return await self._embedded.answer(request)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(module, "_LOOK", 0.05)


def _layers(index):
    rng = np.random.default_rng(index)
    layers = np.zeros((GROUPS * CANDIDATES, 2, 32, 32, 4), np.uint8)
    layers[:, 0] = (*rng.integers(0, 256, 3), 255)
    for number, stack in enumerate(layers):
        stack[1, : 8 + number, :9] = (200, 30, 30, 255)
    return layers


def _examples(index):
    return [
        SimpleNamespace(
            picture=np.full((32, 32, 3), 40 * group, np.uint8),
            caption=f"caption {index}",
            picture_id=f"{index}-{group}",
        )
        for group in range(GROUPS)
    ]


def run(endpoints, work, records=None, **settings):
    """`work(judging, submitted)` in a process per endpoint: what it returns or raises."""
    store, results = Memory(), [None] * len(endpoints)
    settings = JudgeSettings(two_stage=False, **settings)

    def act(index):
        judge = TwoStageJudge(endpoints[index], JudgeConfig(two_stage=False, asks=1))
        processes = Processes(index, len(endpoints), store)
        with JudgeWorker(judge) as worker:
            judging = Judging(worker, Rewards((("judge", 1.0),)), settings, records, processes)
            examples = _examples(index)
            names = [f"0.{GROUPS * index + n}.{e.picture_id}" for n, e in enumerate(examples)]
            try:
                with processes.open():
                    results[index] = work(judging, judging.submit(examples, _layers(index), names))
            except (JudgeUnavailableError, ProcessError, ZeroDivisionError) as error:
                results[index] = error

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(endpoints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def _collected(judging, submitted):
    return judging.collect(submitted)


def test_all_wait_until_enough_of_all_are_valid():
    endpoints = [Endpoint(), Endpoint(2 * GROUPS * CANDIDATES)]
    first, second = run(endpoints, _collected, min_valid=0.9)
    assert all(scores.valid.all() for scores in (*first, *second))
    # Nothing is asked again of a judge that answered.
    assert [endpoint.asked for endpoint in endpoints] == [6, 3 * 6]


def test_the_share_is_that_of_all_processes():
    endpoints = [Endpoint(), Endpoint(10**9)]
    first, second = run(endpoints, _collected, min_valid=0.5)
    assert all(scores.valid.all() for scores in first)
    assert not any(scores.valid.any() for scores in second)
    assert endpoints[1].asked == 6


def test_all_give_up_together_and_say_whose_judge_it_is(caplog):
    said = {}

    def work(judging, submitted):
        told = said.setdefault(judging.processes.index, [])
        return judging.collect(submitted, told.append)

    results = run([Endpoint(), Endpoint(10**9)], work, min_valid=0.9, max_wait=0.3)
    for error in results:
        assert isinstance(error, JudgeUnavailableError)
        assert "only 50%" in str(error) and "process 1: " in str(error)
        assert "503, overloaded" in str(error)
    # The one whose own judge is well waits for the other's, and says so.
    assert said[0] and said[0] == said[1]
    assert "process 1" in said[0][0]
    assert "Waiting for the judge" in caplog.text


def test_trouble_of_one_judge_is_waited_for_by_all():
    """A pool that has no server up holds its requests back."""

    class Down(Endpoint):
        async def answer(self, request):
            await asyncio.sleep(3600)

    results = run([Endpoint(), Down(trouble="no server is up")], _collected, max_wait=0.3)
    for error in results:
        assert isinstance(error, JudgeUnavailableError)
        assert "process 1: no server is up" in str(error)


def test_a_defect_in_one_ends_all():
    broken = Endpoint(10**9, error=ZeroDivisionError("in the endpoint"))
    first, second = run([Endpoint(), broken], _collected)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, ProcessError) and "in the endpoint" in str(first)


def test_a_process_without_groups_takes_part():
    def work(judging, submitted):
        none = judging.submit([], np.zeros((0, 2, 32, 32, 4), np.uint8), [])
        return judging.collect(submitted if judging.processes.index else none)

    first, second = run([Endpoint(), Endpoint(4)], work, min_valid=1.0)
    assert first == [] and len(second) == GROUPS
    assert all(scores.valid.all() for scores in second)


def test_scores_are_known_to_all_and_recorded_once(tmp_path):
    records = JudgeRecords(tmp_path / "judge", pictures=2)
    refusing = Endpoint(2, error=PermanentJudgeError("I cannot help"))

    def work(judging, submitted):
        index = judging.processes.index
        places = [GROUPS * index + number for number in range(GROUPS)]
        shared = judging.share(places, judging.collect(submitted))
        scores = [shared[place] for place in sorted(shared)]
        groups = [submitted[p - places[0]].group if p in places else None for p in range(6)]
        told = [(f"{i}-{n}", f"caption {i}") for i in range(COUNT) for n in range(GROUPS)]
        judging.record(1, groups, scores, told)
        return scores

    first, second = run([Endpoint(), refusing], work, records)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.group_id == theirs.group_id
        for name in ("criteria", "stage1", "stage2", "reward", "valid", "permutations"):
            one, other = (np.asarray(getattr(scores, name)) for scores in (mine, theirs))
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.tobytes() == other.tobytes()
        for name in ("reasons", "failures", "calls", "endpoints", "refusal"):
            assert getattr(mine, name) == getattr(theirs, name)
    assert [scores.refusal is not None for scores in first][:GROUPS] == [False] * GROUPS
    assert any(scores.refusal == "I cannot help" for scores in first[GROUPS:])
    written = read_records(tmp_path / "judge")
    assert [record.picture_id for record in written] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert [record.caption for record in written][2:4] == ["caption 0", "caption 1"]
    assert [r.scores.group_id for r in written] == [scores.group_id for scores in first]
    # Pictures are of the main process's own groups, by their line.
    names = sorted(path.name for path in (tmp_path / "judge").glob("*.png"))
    assert len(names) == 2 and all(int(name[13:16]) < GROUPS for name in names)


@pytest.mark.parametrize("left_over", [0, 1])
def test_judged_groups_count_in_the_share(left_over):
    """After a replacement, those that need no other judgement still stand for their candidates."""

    def work(judging, submitted):
        scores = judging.collect(submitted)
        return judging.collect([], others=scores[: GROUPS * left_over])

    assert run([Endpoint(), Endpoint()], work, min_valid=1.0) == [[], []]

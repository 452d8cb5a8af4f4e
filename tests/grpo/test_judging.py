"""Waiting for a judge that fails, and not waiting for one that refuses."""

import asyncio
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from sl_jax.data import TrainStream, make_buckets, scan_folder, write_designs
from sl_jax.grpo import judging as module
from sl_jax.grpo.config import JudgeSettings
from sl_jax.grpo.judges import make_endpoint, make_judge
from sl_jax.grpo.judging import JudgeUnavailableError, Judging, refusals
from sl_jax.scoring import (
    EmbeddedJudge,
    JudgeConfig,
    JudgeWorker,
    PermanentJudgeError,
    Rewards,
    TransientJudgeError,
    TwoStageJudge,
)

GROUPS, CANDIDATES = 4, 2


class Endpoint:
    """Answers like the embedded judge, unless `trouble` says otherwise of a picture.

    Attributes:
        trouble: (number of the group, asks of it so far) → an error to raise, or None.
        asked: asks of each group so far.
    """

    def __init__(self, trouble=lambda group, asks: None):
        self.trouble = trouble
        self.asked = [0] * GROUPS
        self._embedded = EmbeddedJudge()

    async def answer(self, request):
        # Each group's picture is of a grey of its own, which the request shows.
        picture = next(part for part in request.parts if not isinstance(part, str))
        group = int(picture[picture.shape[0] // 2, picture.shape[1] // 8, 0]) // 50
        self.asked[group] += 1
        error = self.trouble(group, self.asked[group])
        if error:
            raise error
        return await self._embedded.answer(request)


class Clock(SimpleNamespace):
    """Time that only passes while one sleeps."""

    def __init__(self):
        super().__init__(now=0.0, slept=[])

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def examples():
    return [
        SimpleNamespace(
            picture=np.full((32, 32, 3), 50 * group + 5, np.uint8),
            caption="",
            picture_id=f"picture-{group}",
        )
        for group in range(GROUPS)
    ]


def _layers():
    layers = np.zeros((GROUPS * CANDIDATES, 2, 32, 32, 4), np.uint8)
    for number, stack in enumerate(layers):
        stack[0] = (50 * (number // CANDIDATES) + 5, *(50 * (number // CANDIDATES) + 5,) * 2, 255)
        stack[1, : 8 + number, :9] = (200, 30, 30, 255)
    return layers


def _collect(endpoint, examples, progress=lambda text: None, **settings):
    settings = JudgeSettings(two_stage=False, **settings)
    judge = TwoStageJudge(endpoint, JudgeConfig(two_stage=False, asks=1))
    with JudgeWorker(judge) as worker:
        judging = Judging(worker, Rewards((("judge", 1.0),)), settings)
        names = [f"group-{number}" for number in range(GROUPS)]
        return judging.collect(judging.submit(examples, _layers(), names), progress)


def _down_until(asks):
    def trouble(group, asked):
        return TransientJudgeError("503, overloaded") if asked <= asks else None

    return trouble


def test_scores_come_in_order_and_without_waiting(examples, clock):
    endpoint = Endpoint()
    scores = _collect(endpoint, examples, min_valid=1.0)
    assert [entry.group_id for entry in scores] == [f"group-{n}" for n in range(GROUPS)]
    assert all(entry.valid.all() and np.isfinite(entry.reward).all() for entry in scores)
    assert endpoint.asked == [CANDIDATES] * GROUPS
    assert clock.slept == []


def test_it_waits_with_growing_pauses_and_says_for_what(examples, clock):
    said = []
    endpoint = Endpoint(_down_until(3 * CANDIDATES))
    scores = _collect(endpoint, examples, said.append, min_valid=0.9)
    assert all(entry.valid.all() for entry in scores)
    assert clock.slept == [1, 2, 4]
    assert len(said) == 3
    assert "waiting for the judge: 0% valid" in said[0] and "503, overloaded" in said[0]


def test_it_gives_up_after_max_wait_to_the_second(examples, clock):
    endpoint = Endpoint(_down_until(10**9))
    with pytest.raises(JudgeUnavailableError) as error:
        _collect(endpoint, examples, min_valid=0.9, max_wait=100.0)
    assert clock.slept == [1, 2, 4, 8, 16, 32, 37]
    for part in ("0%", "100 s", "min_valid is 90%", "503, overloaded"):
        assert part in str(error.value)


def test_pauses_stop_growing(examples, clock):
    with pytest.raises(JudgeUnavailableError):
        _collect(Endpoint(_down_until(10**9)), examples, min_valid=0.9, max_wait=300.0)
    assert max(clock.slept) == 60
    assert sum(clock.slept) == 300


def test_max_wait_zero_never_waits(examples, clock):
    with pytest.raises(JudgeUnavailableError):
        _collect(Endpoint(_down_until(10**9)), examples, max_wait=0.0)
    assert clock.slept == []


def test_enough_valid_scores_are_not_waited_for(examples, clock):
    endpoint = Endpoint(lambda group, asked: group == 2 and TransientJudgeError("timed out"))
    scores = _collect(endpoint, examples, min_valid=0.75)
    assert clock.slept == []
    assert [entry.valid.all() for entry in scores] == [True, True, False, True]
    assert np.isnan(scores[2].reward).all()
    assert refusals(scores, [e.picture_id for e in examples]) == {}


def test_only_incomplete_groups_are_asked_again(examples, clock):
    def trouble(group, asked):
        return TransientJudgeError("timed out") if group == 2 and asked <= CANDIDATES else None

    endpoint = Endpoint(trouble)
    scores = _collect(endpoint, examples, min_valid=1.0)
    assert all(entry.valid.all() for entry in scores)
    assert endpoint.asked == [CANDIDATES, CANDIDATES, 2 * CANDIDATES, CANDIDATES]
    assert len(clock.slept) == 1


def test_refusals_are_not_waited_for(examples, clock):
    endpoint = Endpoint(lambda group, asked: group == 1 and PermanentJudgeError("I cannot help"))
    scores = _collect(endpoint, examples, min_valid=1.0)
    assert clock.slept == []
    assert endpoint.asked == [CANDIDATES] * GROUPS
    assert not scores[1].valid.any()
    assert refusals(scores, [e.picture_id for e in examples]) == {"picture-1": "I cannot help"}


def test_not_even_if_all_are_refused(examples, clock):
    endpoint = Endpoint(lambda group, asked: PermanentJudgeError("no"))
    scores = _collect(endpoint, examples, min_valid=0.5)
    assert clock.slept == []
    assert len(refusals(scores, [e.picture_id for e in examples])) == GROUPS


def test_refused_groups_do_not_hide_that_others_wait(examples, clock):
    def trouble(group, asked):
        if group < 2:
            return PermanentJudgeError("no")
        return TransientJudgeError("timed out") if asked <= CANDIDATES else None

    scores = _collect(Endpoint(trouble), examples, min_valid=0.5)
    assert clock.slept == [1]
    assert [entry.valid.all() for entry in scores] == [False, False, True, True]


def test_what_nobody_expects_comes_through(examples, clock):
    """An error that is no judge's error is a defect: it ends the run, and does not hang it."""
    endpoint = Endpoint(lambda group, asked: group == 3 and ZeroDivisionError("in the endpoint"))
    with pytest.raises(ZeroDivisionError, match="in the endpoint"):
        _collect(endpoint, examples)


def test_quarantined_pictures_are_drawn_no_more(tmp_path):
    write_designs(tmp_path, "A", range(6), 32, 2)
    index = scan_folder(tmp_path, make_buckets([(32, 32)]))
    stream = TrainStream(index, groups=4, layers=(2,), threads=0)
    first = next(stream)
    refused = first.examples[2].picture_id
    stream.quarantine({refused: "I cannot help"})
    drawn = {example.picture_id for _ in range(6) for example in next(stream).examples}
    assert refused not in drawn and len(drawn) == 5
    # A resumed run draws it no more either.
    resumed = TrainStream(index, groups=4, layers=(2,), threads=0)
    resumed.restore(stream.state())
    assert refused not in {e.picture_id for _ in range(6) for e in next(resumed).examples}


def test_the_judge_is_the_configured_one(examples):
    settings = JudgeSettings(stage2_weight=0.25, grids=3, weights=(1, 0, 0, 0, 0))
    endpoint = make_endpoint(settings)
    config = make_judge(settings, endpoint, 7).config
    assert (config.stage2_weight, config.grids, config.seed) == (0.25, 3, 7)
    assert config.two_stage and config.weights == (1, 0, 0, 0, 0)
    assert not make_judge(settings, endpoint, 7, two_stage=False).config.two_stage
    modes = {
        name: make_endpoint(dataclasses.replace(settings, endpoint=name)).config.mode
        for name in ("embedded", "embedded-vlm")
    }
    assert modes == {"embedded": "precise", "embedded-vlm": "vlm"}


def test_a_hanging_judge_can_be_left(examples, clock):
    """Leaving the worker, as an interrupt does, cancels what nobody waits for any more."""

    class Hanging:
        async def answer(self, request):
            await asyncio.sleep(3600)

    judge = TwoStageJudge(Hanging(), JudgeConfig(two_stage=False))
    with JudgeWorker(judge) as worker:
        judging = Judging(worker, Rewards(), JudgeSettings())
        submitted = judging.submit(examples, _layers(), ["a", "b", "c", "d"])
    assert all(entry.scores.cancelled() for entry in submitted)

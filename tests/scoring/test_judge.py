"""The two-stage judge against scripted endpoints: no score is ever invented."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.scoring import (
    CRITERIA,
    Answer,
    Group,
    JudgeConfig,
    JudgeWorker,
    PermanentJudgeError,
    TransientJudgeError,
    TwoStageJudge,
)
from sl_jax.scoring import request as rendering


def _group(count: int = 4, group_id: str = "g") -> Group:
    """Candidates whose top layer's grey level, 10·(index + 1), tells them apart."""
    source = np.full((8, 8, 3), 200, np.uint8)
    candidates = []
    for index in range(count):
        layers = np.full((2, 8, 8, 4), 255, np.uint8)
        layers[1] = (*[10 * (index + 1)] * 3, 255)
        candidates.append(layers)
    return Group(group_id, source, tuple(candidates))


def _candidate_of(seen: rendering.Seen) -> int:
    return round(float(seen.color[1].mean()) * 255 / 10) - 1


def _stage1(score: float) -> str:
    return json.dumps({name: {"reason": "r", "score": score} for name in CRITERIA})


class Scripted:
    """Scores candidate i with 2·i (stage 1) and 90 − 10·i (stage 2) unless told otherwise.

    `script` maps (stage, candidate or −1) to a list of answers or errors that come first.
    """

    def __init__(self, script=None, delay: float = 0.0):
        self.script = {key: list(value) for key, value in (script or {}).items()}
        self.delay = delay
        self.requests = []

    async def answer(self, request):
        self.requests.append(request)
        await asyncio.sleep(self.delay)
        if request.stage == 1:
            candidate = _candidate_of(rendering.read_candidate(request))
            usual = _stage1(2.0 * candidate)
        else:
            candidate = -1
            labels, seen = rendering.read_grid(request)
            scores = {
                label: 90.0 - 10 * _candidate_of(cell)
                for label, cell in zip(labels, seen, strict=True)
            }
            usual = json.dumps({"scores": scores})
        queue = self.script.get((request.stage, candidate))
        answer = queue.pop(0) if queue else usual
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer, endpoint="scripted", tokens=7)


def _judge(endpoint, group=None, **config):
    return asyncio.run(TwoStageJudge(endpoint, JudgeConfig(**config)).judge(group or _group()))


def test_both_stages_make_the_reward():
    endpoint = Scripted()
    scores = _judge(endpoint, stage2_weight=0.7)
    np.testing.assert_allclose(scores.stage1, [0, 0.2, 0.4, 0.6])
    np.testing.assert_allclose(scores.stage2, [0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(scores.reward, 0.3 * scores.stage1 + 0.7 * scores.stage2)
    assert scores.two_stage and scores.valid.all() and scores.refusal is None
    assert (scores.asks, scores.tokens, scores.endpoints) == (5, 35, ("scripted",))
    assert sorted(scores.permutations[0]) == [0, 1, 2, 3]
    assert scores.reasons[0] == ("r",) * 5


def test_criteria_are_weighted():
    answer = json.dumps(
        {name: {"reason": "", "score": index} for index, name in enumerate(CRITERIA)}
    )
    scores = _judge(Scripted({(1, 0): [answer]}), _group(1), weights=(0.0, 1.0, 0.0, 3.0, 0.0))
    assert scores.stage1[0] == pytest.approx((0.1 + 3 * 0.3) / 4)
    assert not scores.two_stage and scores.grid_failure is None


BROKEN = [
    "no JSON",
    "",
    "[]",
    _stage1(11),
    _stage1(-0.1),
    _stage1(float("nan")),
    _stage1(5).replace("5", '"5"'),
    json.dumps({name: {"reason": "", "score": 5} for name in CRITERIA[:4]}),
    _stage1(5).replace('{"semantic', '{"extra": 1, "semantic'),
    _stage1(5)[:-1] + ', "validity": {"reason": "", "score": 10}}',
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_answer_is_asked_again_and_then_invalid(broken):
    endpoint = Scripted({(1, 2): [broken]})
    assert _judge(endpoint).valid.all()
    assert [r.repeat for r in endpoint.requests if r.stage == 1].count(1) == 1
    scores = _judge(Scripted({(1, 2): [broken] * 3}), asks=3)
    np.testing.assert_array_equal(scores.valid, [True, True, False, True])
    for values in (scores.criteria[2], scores.stage1[2], scores.stage2[2], scores.reward[2]):
        assert np.isnan(values).all()
    assert np.isfinite(scores.reward[[0, 1, 3]]).all()
    assert not scores.failures[2].permanent and scores.permutations[0, 2] == -1
    assert scores.reasons[2] == () and scores.refusal is None


@pytest.mark.parametrize("wrap", ["```json\n{}\n```", "<think>hm {{</think>\n{}", "\n {} \n"])
def test_usual_wrappings_are_understood(wrap):
    answer = wrap.replace("{{", "[").replace("{}", _stage1(5))
    scores = _judge(Scripted({(1, 0): [answer]}), asks=1)
    assert scores.valid[0] and scores.stage1[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "broken",
    [
        json.dumps({"scores": {"A": 1, "B": 2, "C": 3}}),
        json.dumps({"scores": {"A": 1, "B": 2, "C": 3, "D": 4, "E": 5}}),
        json.dumps({"scores": {"A": 1, "B": 2, "C": 3, "D": 101}}),
        '{"scores": {"A": 1, "B": 2, "C": 3, "D": 4, "D": 5}}',
        '{"scores": {"A": 1, "B": 2, "C": 3, "D": Infinity}}',
        "sorry",
    ],
)
def test_a_failed_grid_falls_back_to_stage_1_and_says_so(broken):
    scores = _judge(Scripted({(2, -1): [broken] * 2}), asks=2)
    assert not scores.two_stage and scores.valid.all()
    np.testing.assert_array_equal(scores.reward, scores.stage1)
    assert np.isnan(scores.stage2).all() and scores.grid_failure is not None
    assert _judge(Scripted({(2, -1): [broken]}), asks=2).two_stage


def test_transient_errors_are_retried_and_permanent_ones_are_not():
    endpoint = Scripted({(1, 1): [TransientJudgeError("503")]})
    assert _judge(endpoint).valid.all()
    endpoint = Scripted({(1, 1): [PermanentJudgeError("content filter")]})
    scores = _judge(endpoint, asks=5)
    assert scores.failures[1].permanent and scores.refusal == "content filter"
    assert len([r for r in endpoint.requests if r.stage == 1]) == 4
    assert not scores.valid[1] and scores.two_stage


def test_errors_of_the_program_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        _judge(Scripted({(1, 1): [ZeroDivisionError()]}))


def test_grids_are_shuffled_differently_and_averaged():
    class Biased(Scripted):
        async def answer(self, request):
            if request.stage == 1:
                return await super().answer(request)
            labels, _ = rendering.read_grid(request)
            return json.dumps({"scores": {label: 10 * i for i, label in enumerate(labels)}})

    scores = _judge(Biased(), grids=3)
    np.testing.assert_allclose(scores.grid_scores, scores.permutations / 10)
    np.testing.assert_allclose(scores.stage2, scores.grid_scores.mean(axis=0))
    assert len({tuple(row) for row in scores.permutations}) > 1
    again = _judge(Biased(), grids=3)
    np.testing.assert_array_equal(scores.permutations, again.permutations)
    other = _judge(Biased(), grids=3, seed=1)
    assert (scores.permutations != other.permutations).any()


def test_one_failed_grid_of_several_fails_stage_2():
    scores = _judge(Scripted({(2, -1): ["", "sorry"]}), grids=3, asks=1)
    assert not scores.two_stage and np.isnan(scores.grid_scores).all()


def test_stage_2_can_be_switched_off():
    endpoint = Scripted()
    scores = _judge(endpoint, two_stage=False)
    assert not scores.two_stage and scores.grid_failure is None
    assert all(request.stage == 1 for request in endpoint.requests)


def test_comparison_asks_both_orders():
    endpoint = Scripted()
    judge = TwoStageJudge(endpoint)
    group = _group(2)
    assert asyncio.run(judge.compare(group)) == 0.0
    swapped = Group("g", group.source, group.candidates[::-1])
    assert asyncio.run(judge.compare(swapped)) == 1.0
    same = Group("g", group.source, group.candidates[:1] * 2)
    assert asyncio.run(judge.compare(same)) == 0.5
    assert "(not given)" in endpoint.requests[0].parts[0]
    with pytest.raises(ValueError, match="exactly 2"):
        asyncio.run(judge.compare(_group(3)))


def test_worker_judges_on_a_thread_of_its_own():
    names = set()

    class Named(Scripted):
        async def answer(self, request):
            names.add(threading.current_thread().name)
            return await super().answer(request)

    groups = [_group(2, f"g{i}") for i in range(5)]
    with JudgeWorker(TwoStageJudge(Named(delay=0.01)), concurrency=2) as worker:
        found = {scores.group_id: scores for scores in worker.judge_all(groups)}
        one = worker.submit(groups[0]).result(timeout=10)
    assert set(found) == {group.group_id for group in groups} and names == {"judge"}
    np.testing.assert_array_equal(one.reward, found["g0"].reward)
    np.testing.assert_array_equal(one.reward, _judge(Scripted(), groups[0]).reward)


def test_worker_closes_at_once_and_leaves_nothing_waiting():
    worker = JudgeWorker(TwoStageJudge(Scripted(delay=60)), concurrency=1)
    futures = [worker.submit(_group(2)) for _ in range(3)]
    time.sleep(0.05)
    started = time.monotonic()
    worker.close()
    worker.close()
    assert time.monotonic() - started < 5
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(_group(2))


def test_a_cancelled_group_makes_room_for_the_next():
    class Slow(Scripted):
        async def answer(self, request):
            self.delay = 60 if request.stage == 1 and request.parts[2].shape[1] > 40 else 0
            return await super().answer(request)

    wide = np.full((2, 8, 16, 4), 255, np.uint8)
    stuck = Group("stuck", imaging.recompose(wide), (wide, wide))
    with JudgeWorker(TwoStageJudge(Slow()), concurrency=1) as worker:
        first, second = worker.submit(stuck), worker.submit(_group(2))
        time.sleep(0.05)
        assert not second.done()
        first.cancel()
        assert second.result(timeout=10).valid.all()


def test_wrong_settings_are_refused():
    for wrong in (
        {"weights": (1.0,) * 4},
        {"weights": (0.0,) * 5},
        {"grids": 0},
        {"stage2_weight": 1.5},
    ):
        with pytest.raises(ValueError, match="please"):
            JudgeConfig(**wrong)

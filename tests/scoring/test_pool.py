"""Many servers as one endpoint: what is lost, doubled or mixed up when they misbehave."""

import asyncio
import collections
import json
import threading
import time

import numpy as np
import pytest
from hostile import FAULTS, HostileServer, at_random, expected, http_date, known_group

from sl_jax.scoring import (
    BudgetError,
    JudgeConfig,
    JudgeWorker,
    PermanentJudgeError,
    TransientJudgeError,
    TwoStageJudge,
)
from sl_jax.scoring import pool as module
from sl_jax.scoring import request as rendering
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.endpoint_state import CoolDown, EndpointState
from sl_jax.scoring.openai_client import EndpointConfig
from sl_jax.scoring.pool import JudgePool, PoolConfig
from sl_jax.scoring.rubric import load_prompts

PROMPTS = load_prompts()


def make_pool(servers, budget=None, limits=(), **config):
    limits = limits or ({},) * len(servers)
    endpoints = tuple(
        server.endpoint(name=f"s{i}", **limit)
        for i, (server, limit) in enumerate(zip(servers, limits, strict=True))
    )
    request = RequestConfig(timeout=config.pop("timeout", 20.0), structured="schema")
    config = {"cool_down": CoolDown(0.05, 0.4)} | config
    return JudgePool(PoolConfig(endpoints, request, **config), budget)


def one(index=0, candidate=1):
    group = known_group(index)
    return rendering.candidate_request(
        group.source, group.candidates[candidate], PROMPTS, rendering.RenderConfig()
    )


def run(pool, work):
    """Runs `work(pool)` and closes the pool."""

    async def closed():
        try:
            return await work(pool)
        finally:
            await pool.aclose()

    return asyncio.run(closed())


async def ask(pool, count, start=0):
    return await asyncio.gather(*(pool.answer(one(start + i)) for i in range(count)))


@pytest.fixture
def servers():
    made = []

    def make(*args, **kwargs):
        made.append(HostileServer(*args, **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.close()


def judged(pool, groups, concurrency=16, **config):
    config = JudgeConfig(render=rendering.RenderConfig(tile_size=None), **config)
    with JudgeWorker(TwoStageJudge(pool, config), concurrency) as worker:
        return {scores.group_id: scores for scores in worker.judge_all(groups)}


def check(groups, scores):
    """Every candidate valid with its own score, or invalid with a reason; returns the share."""
    assert set(scores) == {group.group_id for group in groups}
    for group in groups:
        found = scores[group.group_id]
        for index, wanted in enumerate(expected(group)):
            if found.valid[index]:
                assert found.stage1[index] == pytest.approx(wanted, abs=1e-9)
                assert found.failures[index] is None
            else:
                assert np.isnan(found.reward[index]) and found.failures[index].reason
        if found.two_stage:
            np.testing.assert_allclose(
                found.stage2[found.valid], expected(group)[found.valid], atol=1e-9
            )
    return float(np.mean([found.valid.mean() for found in scores.values()]))


def test_pictures_are_rendered_and_encoded_on_threads_of_their_own(servers, monkeypatch):
    """Neither the caller's thread, where rollouts are started, nor the one that has the answers."""
    seen = set()
    steps = (rendering, "candidate_request"), (rendering, "grid_request"), (module, "content_of")

    def noted(home, step):
        real = getattr(home, step)

        def taken(*arguments):
            seen.add((step, threading.current_thread().name))
            return real(*arguments)

        monkeypatch.setattr(home, step, taken)

    for home, step in steps:
        noted(home, step)
    group = known_group(1)
    assert check([group], judged(make_pool([servers()]), [group])) == 1.0
    assert {step for step, _ in seen} == {name for _, name in steps}
    assert not {thread for _, thread in seen} & {threading.current_thread().name, "judge"}


def test_the_least_loaded_endpoint_gets_the_next_request(servers):
    slow, fast = servers(latency=0.6), servers(latency=0.02)
    limits = {"concurrency": 2}, {"concurrency": 4}
    pool = make_pool([slow, fast], limits=limits)
    run(pool, lambda p: ask(p, 30))
    assert slow.most_active == 2 and 2 <= fast.most_active <= 4
    assert len(fast.times) > 20 and len(slow.times) + len(fast.times) == 30


def test_a_failed_request_goes_elsewhere_and_the_endpoint_rests(servers):
    bad, good = servers(lambda _: "500"), servers()
    pool = make_pool([bad, good], cool_down=CoolDown(30, 60))
    answers = run(pool, lambda p: ask(p, 12))
    assert {a.endpoint for a in answers} == {"s1"} and len(good.times) == 12
    assert 1 <= len(bad.times) <= 8  # what was under way when the first failure came
    metrics = pool.metrics()
    assert metrics["up"] == 1 and metrics["s0/errors"] == len(bad.times)
    assert metrics["s1/answers"] == 12 and metrics["s1/p95"] >= metrics["s1/p50"] > 0
    assert pool.metrics()["requests"] == 12 + len(bad.times)


def test_an_endpoint_comes_back_through_a_probe(servers):
    ill = [True]
    server, other = servers(lambda _: "die" if ill[0] else None), servers(latency=0.05)

    async def work(pool):
        await ask(pool, 8)
        before = len(server.times)
        await asyncio.sleep(1.5)  # probes, further and further apart
        probes = len(server.times) - before
        ill[0] = False
        await asyncio.sleep(1.5)
        return probes, await ask(pool, 8, start=50)

    probes, answers = run(make_pool([server, other]), work)
    assert 2 <= probes <= 8
    assert {a.endpoint for a in answers} == {"s0", "s1"}


def test_backoff_grows_and_is_forgiven_slowly():
    state = EndpointState(EndpointConfig("http://h/v1", "m"), CoolDown(1, 10, broken=2))
    waits, now = [], 0.0
    for _ in range(6):
        state.failed(TransientJudgeError("x"), now)
        state.failed(TransientJudgeError("in flight too"), now)
        waits.append(state.wake_at - now)
        now = state.wake_at
        assert state.ready_at(now) == np.inf and state.rested(now)
        state.health = "probing"
    assert waits == [1, 2, 4, 8, 10, 10]
    state.succeeded(0.1)
    assert state.ready_at(now) == now
    state.failed(TransientJudgeError("429", retry_after=50), now)
    assert state.wake_at == now + 50
    state.succeeded(0.1)  # an answer that was under way does not undo Retry-After
    assert state.health == "cooling"


@pytest.mark.parametrize("form", [lambda: "1", lambda: http_date(2)])
def test_retry_after_is_obeyed(servers, form):
    server = servers(lambda number: None if number else "429", retry_after=form)
    pool = make_pool([server], limits=({"concurrency": 1},))
    run(pool, lambda p: ask(p, 3))
    assert server.times[1] - server.times[0] > 0.9
    assert len(server.times) == 5  # the refused one, its probe, and three answers


def test_limits_per_minute_hold():
    limited = EndpointConfig(
        "http://h/v1", "m", requests_per_minute=3, tokens_per_minute=2500, concurrency=99
    )
    state = EndpointState(limited, CoolDown())
    for now in (0.0, 1.0):
        assert state.ready_at(now) == now
        state.end(state.start(now), 1000)
    assert state.ready_at(2.0) == 60.0  # a third of about 1000 tokens would be too many
    state.end(state.start(60.5), 10)
    assert state.ready_at(61.5) == 61.5
    state.end(state.start(61.5), 10)
    state.end(state.start(61.6), 10)
    assert state.ready_at(62.0) == 120.5


def test_a_pool_sends_no_more_than_a_minute_allows(servers):
    server = servers()
    pool = make_pool([server], limits=({"requests_per_minute": 5},))

    async def work(pool):
        tasks = [asyncio.ensure_future(pool.answer(one(i))) for i in range(9)]
        done, waiting = await asyncio.wait(tasks, timeout=1.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return len(done)

    assert run(pool, work) == 5 and len(server.times) == 5


def test_broken_answers_are_asked_elsewhere_with_another_seed(servers):
    bad, good = servers(lambda _: "garbage"), servers()
    pool = make_pool([bad, good], limits=({"concurrency": 1}, {"concurrency": 1}))
    answers = run(pool, lambda p: ask(p, 6))
    assert {a.endpoint for a in answers} == {"s1"}
    assert len({body["seed"] for body in good.bodies}) == 2


def test_a_failed_request_avoids_an_endpoint_that_is_still_up(servers):
    bad, good = servers(lambda _: "garbage"), servers()
    pool = make_pool([bad, good], tries=2, cool_down=CoolDown(1, 2, broken=99))
    for _ in range(3):  # the good one is the busier one
        pool._members[1].state.start(0.0)
    assert len(run(pool, lambda p: ask(p, 1))) == 1
    assert len(bad.times) == len(good.times) == 1


def test_a_place_that_comes_with_a_cancellation_is_given_back(servers):
    async def work(pool):
        place = await pool._place(frozenset())
        task = asyncio.ensure_future(pool._place(frozenset()))
        await asyncio.sleep(0)
        assert pool.metrics()["waiting"] == 1
        place.member.state.end(place.ticket, 0)
        pool._dispatch()
        assert pool.metrics()["s0/in_flight"] == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return pool.metrics()["s0/in_flight"], pool.metrics()["s0/requests"]

    pool = make_pool([servers()], limits=({"concurrency": 1},))
    assert run(pool, work) == (0, 1)


def test_an_endpoint_without_alternative_is_asked_again(servers):
    server = servers(lambda number: "half" if number in (0, 1) else None)
    assert len(run(make_pool([server], tries=3), lambda p: ask(p, 1))) == 1
    with pytest.raises(TransientJudgeError, match="try 2 of 2"):
        run(make_pool([servers(lambda _: "half")], tries=2), lambda p: ask(p, 1))


def test_patience_ends_when_nothing_is_up(servers):
    server = servers(lambda _: "500")
    started = time.monotonic()
    with pytest.raises(TransientJudgeError, match=r"no judge was up for 0.5 s.*HTTP 500"):
        run(make_pool([server], tries=50, patience=0.5), lambda p: ask(p, 4))
    assert 0.5 < time.monotonic() - started < 10


def test_it_tells_why_nobody_answers_until_somebody_does(servers):
    down = True
    pair = [servers(lambda _: "500" if down else None) for _ in range(2)]

    async def work(pool):
        nonlocal down
        assert pool.trouble is None
        asked = asyncio.create_task(ask(pool, 1))
        while pool.trouble is None:
            await asyncio.sleep(0.01)
        told = pool.trouble
        down = False
        await asked
        assert pool.trouble is None
        return told

    told = run(make_pool(pair, tries=50), work)
    assert told.startswith("no judge has been up for 0 s (s0: HTTP 500")
    assert "s1: HTTP 500" in told


def test_refusals_are_not_retried(servers):
    async def refuse(writer, content):
        return await good.send(writer, 400, '{"error": {"code": "content_filter"}}')

    good = servers(lambda _: refuse)
    with pytest.raises(PermanentJudgeError, match="HTTP 400"):
        run(make_pool([good, good], limits=({}, {})), lambda p: ask(p, 1))
    assert len(good.times) == 1


def test_budgets_stop_the_run(servers):
    server = servers(tokens=100)
    for budget, most in ((Budget(max_requests=5), 5), (Budget(max_tokens=250), 3)):
        before = len(server.times)
        pool = make_pool([server], budget, limits=({"concurrency": 1},))
        with pytest.raises(BudgetError, match="budget is spent"):
            run(pool, lambda p: ask(p, 9))
        assert len(server.times) - before == most
        assert budget.requests == most and budget.tokens <= 100 * most
    pool = make_pool([server], Budget(max_requests=3))
    with pytest.raises(BudgetError):
        judged(pool, [known_group(0, 4)])


def test_hedging_cuts_the_tail(servers):
    stuck, good = servers(lambda number: "hang"), servers()
    pool = make_pool([stuck, good], hedge_after=0.2, timeout=30)

    async def work(pool):
        started = time.monotonic()
        for index in range(6):
            await pool.answer(one(index))
        return time.monotonic() - started

    assert run(pool, work) < 10
    assert pool.metrics()["hedges"] >= 3
    assert pool.metrics()["s0/up"] == 0  # overtaken three times


def test_cancellation_leaves_nothing_behind(servers):
    server = servers(latency=30)

    async def work(pool):
        tasks = [asyncio.ensure_future(pool.answer(one(i))) for i in range(20)]
        await asyncio.sleep(0.7)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(d, asyncio.CancelledError) for d in done)
        return asyncio.all_tasks() - {asyncio.current_task()}

    pool = make_pool([server], hedge_after=0.1)
    assert run(pool, work) == set()
    assert pool.metrics()["s0/in_flight"] == 0 and pool.metrics()["waiting"] == 0
    assert server.most_active == 8


def test_a_worker_closes_its_pool_in_the_middle_of_everything(servers):
    pool = make_pool([servers(latency=30), servers(lambda _: "hang")])
    worker = JudgeWorker(TwoStageJudge(pool), 4)
    futures = [worker.submit(known_group(i)) for i in range(8)]
    time.sleep(0.5)
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 5 and all(f.cancelled() for f in futures)


def test_two_workers_share_one_pool(servers):
    server = servers()
    pool = make_pool([server])
    with JudgeWorker(TwoStageJudge(pool)) as first:
        stage1_only = TwoStageJudge(pool, JudgeConfig(two_stage=False))
        with JudgeWorker(stage1_only, 2, beside=first) as second:
            results = [worker.submit(known_group(3)).result(20) for worker in (first, second)]
        assert first.submit(known_group(4)).result(20).valid.all()
        with pytest.raises(RuntimeError, match="closed"):
            second.submit(known_group(3))
    assert [r.two_stage for r in results] == [True, False]
    np.testing.assert_array_equal(results[0].stage1, results[1].stage1)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_loses_doubles_or_mixes_up_a_candidate(servers, fault):
    bad = servers(at_random(1, 0.5, (fault,)))
    groups = [known_group(i, 3) for i in range(5)]
    pool = make_pool([bad, servers()], timeout=1.5)
    assert check(groups, judged(pool, groups)) == 1.0


def test_where_everything_fails_everything_is_invalid_and_nothing_is_invented(servers):
    bad = servers(at_random(2, 1.0, ("500", "garbage", "half", "wrong")))
    groups = [known_group(i, 2) for i in range(3)]
    scores = judged(make_pool([bad], tries=2, patience=0.3), groups, asks=1)
    assert check(groups, scores) == 0.0


def test_a_request_is_sent_as_often_as_judge_and_pool_say_together(servers):
    """And asking again counts where it is sent, whether it helped or not."""
    groups = [known_group(0, 1)]
    for asks, tries, sent in ((3, 4, 4), (3, 2, 4), (3, 1, 3), (1, 2, 2)):
        bad = servers(lambda _: "garbage")
        pool = make_pool([bad], tries=tries, cool_down=CoolDown(1, 2, broken=99))
        scores = judged(pool, groups, asks=asks, two_stage=False)["g0"]
        assert len(bad.times) == sent == scores.asks and not scores.valid.any()
    once = servers(lambda number: "garbage" if number == 0 else None)
    pool = make_pool([once], cool_down=CoolDown(1, 2, broken=99))
    scores = judged(pool, groups, two_stage=False)["g0"]
    assert scores.valid.all() and scores.asks == len(once.times) == 2


def test_tokens_of_a_refused_picture_count(servers):
    async def refuse(writer, content):
        reply = {
            "choices": [{"message": {"refusal": "no"}, "finish_reason": "stop"}],
            "usage": {"total_tokens": 9000},
        }
        return await server.send(writer, 200, json.dumps(reply))

    server, budget = servers(lambda _: refuse), Budget()
    with pytest.raises(PermanentJudgeError, match="refused"):
        run(make_pool([server], budget), lambda p: ask(p, 1))
    assert budget.tokens == 9000


@pytest.mark.slow
def test_500_hostile_requests_over_eight_endpoints(servers):
    """Six healthy endpoints, two that misbehave: everything right, at the pace of the healthy."""
    healthy = [servers(latency=0.6) for _ in range(6)]
    bad = [servers(at_random(seed, 0.7), 0.6) for seed in range(2)]
    groups = [known_group(i, 4) for i in range(100)]
    seconds = []
    for group_of, hosts in ((groups[50:], healthy), (groups, healthy + bad)):
        limits = ({"concurrency": 4},) * len(hosts)
        pool = make_pool(hosts, limits=limits, timeout=8.0, cool_down=CoolDown(1, 10))
        started = time.monotonic()
        scores = judged(pool, group_of, concurrency=24)
        seconds.append((time.monotonic() - started) / len(group_of))
        assert check(group_of, scores) == 1.0
    answered = sum((server.answered for server in healthy + bad), collections.Counter())
    assert len(answered) == 500 and sum(len(server.times) for server in bad) > 20
    # Loose, since 500 requests are few beside one time-out; the soak run holds it at 0.85.
    assert seconds[1] < seconds[0] / 0.5, seconds


@pytest.mark.parametrize(
    "wrong", [{"endpoints": ()}, {"tries": 0}, {"hedge_after": 0.0}, {"patience": -1}]
)
def test_wrong_settings_are_refused(wrong):
    right = {"endpoints": (EndpointConfig("http://h/v1", "m"),)}
    with pytest.raises(ValueError, match="please"):
        PoolConfig(**right | wrong)
    with pytest.raises(ValueError, match="name of its own"):
        PoolConfig(right["endpoints"] * 2)

"""What was asked once is not asked again; what would be answered differently is."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from hostile import HostileServer, known_group, scripted

from sl_jax.scoring import (
    Answer,
    JudgeConfig,
    JudgeRequest,
    JudgeWorker,
    TransientJudgeError,
    TwoStageJudge,
)
from sl_jax.scoring import request as rendering
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint, CacheError
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.pool import JudgePool, PoolConfig
from sl_jax.scoring.rubric import load_prompts


class Counting:
    """Answers known groups, and counts what it is asked."""

    def __init__(self, fingerprint="f", delay=0.0):
        self.fingerprint, self.delay = fingerprint, delay
        self.asked = []

    async def answer(self, request):
        self.asked.append(request)
        await asyncio.sleep(self.delay)
        return Answer(scripted(request), "counting", 5, 0.1)


def one(index=0):
    group = known_group(index)
    return rendering.candidate_request(
        group.source, group.candidates[1], load_prompts(), rendering.RenderConfig()
    )


def through(path, endpoint, work):
    async def run():
        cached = CachedEndpoint(endpoint, AnswerCache(path))
        try:
            return await work(cached)
        finally:
            await cached.aclose()

    return asyncio.run(run())


def test_a_resumed_run_asks_nothing_twice(tmp_path):
    path = tmp_path / "run" / "judge.sqlite3"
    groups = [known_group(i, 3) for i in range(3)]
    runs = []
    for _ in range(2):
        endpoint = Counting()
        judge = TwoStageJudge(
            CachedEndpoint(endpoint, AnswerCache(path)),
            JudgeConfig(grids=2, render=rendering.RenderConfig(tile_size=None)),
        )
        with JudgeWorker(judge) as worker:
            runs.append([worker.submit(group).result(20) for group in groups])
        runs[-1].append(len(endpoint.asked))
    assert runs[0].pop() == 15 and runs[1].pop() == 0
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first.reward, second.reward)
        assert first.reasons == second.reasons and second.tokens == first.tokens
        assert {call.cached for call in first.calls} == {False}
        assert {call.cached for call in second.calls} == {True}


def test_what_determines_an_answer_is_in_the_key():
    request = one()
    picture = request.parts[2].copy()
    picture[0, 0] ^= 1
    changed = [
        dataclasses.replace(request, parts=(request.parts[0] + " ", *request.parts[1:])),
        dataclasses.replace(request, parts=(*request.parts[:2], picture)),
        dataclasses.replace(request, schema={"type": "object"}),
        dataclasses.replace(request, sample=1),
        JudgeRequest(2, request.parts, request.schema),
    ]
    cached = CachedEndpoint(Counting(), None)
    keys = {cached.key(r) for r in (request, *changed)}
    keys.add(CachedEndpoint(Counting("g"), None).key(request))
    assert len(keys) == 7
    assert cached.key(dataclasses.replace(request, repeat=3)) in keys


def test_a_change_of_model_or_sampling_asks_again_and_of_address_does_not(tmp_path):
    configs = (
        ("m", RequestConfig(), 1),
        ("m", RequestConfig(timeout=9), 1),
        ("n", RequestConfig(), 2),
        ("n", RequestConfig(temperature=1.0), 3),
        ("n", RequestConfig(picture_format="jpeg", jpeg_quality=95), 4),
    )
    asked = 0
    for model, request, total in configs:
        with HostileServer() as server:  # at another port each time
            server.respond = lambda _: scripted(one())  # whatever JPEG made of its colours
            pool = JudgePool(PoolConfig((server.endpoint(model=model),), request))
            through(tmp_path / "c", pool, lambda cached: cached.answer(one()))
            asked += len(server.times)
        assert asked == total


def test_equal_requests_in_flight_are_asked_once(tmp_path):
    endpoint = Counting(delay=0.2)

    async def work(cached):
        return await asyncio.gather(*(cached.answer(one()) for _ in range(5)))

    answers = through(tmp_path / "c", endpoint, work)
    assert len(endpoint.asked) == 1 and len(set(answers)) == 1
    assert sorted(a.cached for a in answers) == [False, True, True, True, True]


def test_a_cancelled_asker_does_not_cancel_the_others(tmp_path):
    endpoint = Counting(delay=0.3)

    async def work(cached):
        first, second = (asyncio.ensure_future(cached.answer(one())) for _ in range(2))
        await asyncio.sleep(0.15)
        first.cancel()
        return await second

    assert through(tmp_path / "c", endpoint, work) == scripted(one())
    assert len(endpoint.asked) == 2


def test_failures_are_not_stored(tmp_path):
    class Failing(Counting):
        async def answer(self, request):
            answer = await super().answer(request)
            if len(self.asked) == 1:
                raise TransientJudgeError("503")
            return answer

    async def work(cached):
        with pytest.raises(TransientJudgeError):
            await cached.answer(one())
        return await cached.answer(dataclasses.replace(one(), repeat=1)), await cached.answer(one())

    endpoint = Failing()
    again, first = through(tmp_path / "c", endpoint, work)
    assert again == first and first.cached and len(endpoint.asked) == 2


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-1], lambda text: b"\xff" + text[1:], lambda _: b'{"score": 7}']
)
def test_a_stored_answer_that_is_broken_now_is_asked_for_anew(tmp_path, caplog, damage):
    """Cut off, no UTF-8, or of rules of another day: it would be no less broken at every ask."""
    path = tmp_path / "c"

    async def work(cached):
        answers = [await cached.answer(one(index)) for index in range(3)]
        return answers, cached.metrics()

    first, _ = through(path, Counting(), work)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        keys = [key for (key,) in database.execute("SELECT key FROM answers")]
        for key, text in zip(keys[:2], first, strict=False):
            damaged = damage(text.encode()), key
            database.execute("UPDATE answers SET answer = CAST(? AS TEXT) WHERE key = ?", damaged)
    for asked, hits in ((2, 1), (0, 3)):
        endpoint = Counting()
        again, metrics = through(path, endpoint, work)
        assert again == first and len(endpoint.asked) == asked
        assert (metrics["cache/hits"], metrics["cache/broken"]) == (hits, asked)
        assert metrics["cache/misses"] == asked
    assert len(caplog.records) == 1 and f"{path} holds an answer that is broken" in caplog.text


def test_budgets_count_over_restarts(tmp_path):
    for total in (2, 4):
        with HostileServer(tokens=7) as server:
            cache = AnswerCache(tmp_path / "c")
            pool = JudgePool(PoolConfig((server.endpoint(),)), Budget(ledger=cache))

            async def run(pool=pool, cache=cache, total=total):
                cached = CachedEndpoint(pool, cache)
                await asyncio.gather(*(cached.answer(one(total + i)) for i in range(2)))
                await cached.aclose()

            asyncio.run(run())
        cache = AnswerCache(tmp_path / "c")
        assert cache.spent() == (total, 7 * total)
        cache.close()


def test_what_is_spent_is_in_the_file_when_the_process_is_killed(tmp_path):
    """A run counts in one connection and stores answers in others."""
    script = (
        "import os, sys; from sl_jax.scoring.budget import Budget\n"
        "from sl_jax.scoring.cache import AnswerCache\n"
        "budget = Budget(ledger=AnswerCache(sys.argv[1])); answers = AnswerCache(sys.argv[1])\n"
        "budget.request(); budget.answered(7); budget.request(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")])
    assert killed.returncode == -signal.SIGKILL
    with contextlib.closing(AnswerCache(tmp_path / "c")) as cache:
        assert cache.spent() == (2, 7)


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "judge.sqlite3"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(CacheError, match=r"judge.sqlite3.*please delete it"):
        AnswerCache(path)


_WRITER = """
import sys
from sl_jax.scoring import Answer
from sl_jax.scoring.cache import AnswerCache
cache, name = AnswerCache(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    if cache.get(f"{i}") is None:
        cache.put(f"{i}", Answer(f"answer {i} " + "x" * 2000, name, 3))
        print(i, flush=True)
    cache.spend(1, 1)
cache.close()
"""


def _writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), name, str(count)], stdout=subprocess.PIPE
    )


def test_several_processes_share_it_and_a_killed_one_harms_nothing(tmp_path):
    path = tmp_path / "c"
    AnswerCache(path).close()
    killed = _writer(path, "killed", 10**6)
    others = [_writer(path, f"w{i}", 200) for i in range(2)]
    assert killed.stdout.readline()
    time.sleep(0.3)
    os.kill(killed.pid, signal.SIGKILL)
    printed = [int(line) for line in killed.communicate()[0].split()[:-1]]
    for process in others:
        process.communicate(timeout=60)
        assert process.returncode == 0
    cache = AnswerCache(path)
    for i in {*range(200), *printed}:
        assert cache.get(f"{i}").startswith(f"answer {i} ")
    assert cache.spent()[0] >= 400
    cache.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)

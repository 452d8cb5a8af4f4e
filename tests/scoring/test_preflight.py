"""What shows before weights are loaded."""

import asyncio
import dataclasses
import json

import pytest
from hostile import HostileServer, scripted

from sl_jax.scoring import BudgetError, EmbeddedJudge, RenderConfig
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.decoding import Limits
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.openai_client import EndpointConfig
from sl_jax.scoring.pool import JudgePool, PoolConfig
from sl_jax.scoring.preflight import EndpointReport, PreflightError, forecast, preflight
from sl_jax.scoring.server import completion

SMALL = {"size": 32, "layers": 3, "group_size": 3, "render": RenderConfig(tile_size=None)}


def check(endpoints, budget=None, **options):
    async def run():
        pool = JudgePool(PoolConfig(tuple(endpoints), RequestConfig(timeout=5)), budget)
        try:
            return await preflight(pool, **SMALL, **options)
        finally:
            await pool.aclose()

    return asyncio.run(run())


@pytest.fixture
def judge():
    """A server that judges any design."""
    embedded = EmbeddedJudge()

    async def reply(writer, content):
        if content["model"] != "good":
            return await server.send(writer, 404, json.dumps({"error": {"message": "no model"}}))
        found = await asyncio.to_thread(completion, embedded, "good", content, Limits())
        return await server.send(writer, 200, json.dumps(found))

    with HostileServer(lambda _: reply) as server:
        yield server


def test_endpoints_that_can_judge_are_told_from_others(judge):
    blind = HostileServer(lambda _: blind_reply, schema=True)

    async def blind_reply(writer, content):
        return await blind.send(writer, 400, '{"error": {"message": "no image input"}}')

    with blind:
        reports = check(
            [
                judge.endpoint(name="good", model="good", concurrency=3),
                judge.endpoint(name="model", model="other"),
                blind.endpoint(name="blind"),
                EndpointConfig("http://127.0.0.1:9/v1", "m", name="nobody"),
            ]
        )
    good, model, no_eyes, nobody = reports
    assert not good.problems and good.structure == "schema" and good.concurrency == 3
    assert min(good.seconds) > 0 and min(good.tokens) > 0 and "ready" in good.to_text()
    assert "no model" in model.to_text() and "lists scripted, not other" in model.to_text()
    assert "no image input" in no_eyes.to_text()
    assert "stage 1" in nobody.to_text() and "stage 2" in nobody.to_text()


def test_a_pool_in_which_nobody_can_judge_stops_the_run(judge):
    with pytest.raises(PreflightError, match=r"no model.*lists scripted"):
        check([judge.endpoint(model="other")])
    with pytest.raises(BudgetError):
        check([judge.endpoint(model="good")], Budget(max_requests=1))


def test_a_broken_answer_is_asked_again_once():
    with HostileServer(lambda number: "half") as server, pytest.raises(PreflightError):
        check([server.endpoint()])
    assert len(server.times) == 4


def test_a_run_that_needs_captions_asks_for_one(judge):
    """The embedded judge gives none, and says so before weights are loaded."""
    with HostileServer() as model:
        model.respond = lambda request: (
            scripted(request) if request.stage else json.dumps({"caption": "a design"})
        )
        endpoints = [judge.endpoint(name="good", model="good"), model.endpoint(name="model")]
        silent, telling = check(endpoints, caption=True)
    assert "captions (config.data.caption): good: refused: " in silent.to_text()
    assert "describes no pictures" in silent.to_text() and min(silent.tokens) > 0
    assert not telling.problems and telling.caption_tokens == 10
    assert "one caption" in telling.to_text() and telling.caption_seconds > 0
    with pytest.raises(PreflightError, match="describes no pictures"):
        check(endpoints[:1], caption=True)
    (unasked,) = check(endpoints[:1])
    assert not unasked.problems and "caption" not in unasked.to_text()


def test_the_forecast_adds_up():
    def able(name, seconds, tokens):
        return EndpointReport(name, (), "schema", 4, seconds, tokens)

    reports = [
        able("a", (2.0, 4.0), (100, 400)),
        able("b", (2.0, 4.0), (300, 800)),
        EndpointReport("c", ("down",), "", 99, (0.0, 0.0), (0, 0)),
    ]
    found = forecast(reports, groups=32, group_size=8, grids=1, epochs=10, evaluation_calls=100)
    assert (found.calls, found.run_calls) == (288, 2980)
    assert found.tokens == 256 * 200 + 32 * 600 and found.run_tokens == 10 * found.tokens + 20_000
    assert found.seconds == pytest.approx(256 * 2 / 8 + 32 * 4 / 8)
    assert found.run_seconds == pytest.approx(10 * found.seconds + 100 * 2 / 8)
    assert "288 calls" in found.to_text()
    assert "captions" not in found.to_text()
    more = [
        dataclasses.replace(report, caption_seconds=0.5, caption_tokens=tokens)
        for report, tokens in zip(reports, (30, 50, 0), strict=True)
    ]
    described = forecast(
        more, groups=32, group_size=8, grids=1, epochs=10, evaluation_calls=100, caption_calls=80
    )
    assert (described.calls, described.run_calls, described.captions) == (288, 3060, 80)
    assert described.tokens == found.tokens
    assert described.run_tokens == found.run_tokens + 80 * 40
    assert described.run_seconds == pytest.approx(found.run_seconds + 80 * 0.5 / 8)
    assert "at most 80 captions among them" in described.to_text()
    with pytest.raises(ValueError, match="endpoint that can judge"):
        forecast(reports[2:], groups=1, group_size=2, grids=0, epochs=1)

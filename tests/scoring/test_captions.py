"""Captions from a pool: what is asked, what is kept, and what it means when none comes."""

import asyncio
import json
import re

import numpy as np
import pytest
from hostile import HostileServer
from test_server import Served

from sl_jax.scoring import BrokenAnswerError, BudgetError, EmbeddedJudge, PermanentJudgeError
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint
from sl_jax.scoring.captions import (
    CaptionConfig,
    CaptionError,
    caption_request,
    caption_schema,
    captions_of,
    load_template,
    parse_caption,
)
from sl_jax.scoring.decoding import Limits, _items, _open
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.endpoint_state import CoolDown
from sl_jax.scoring.pool import JudgePool, PoolConfig

REQUEST = RequestConfig(timeout=10.0, structured="schema")


def shades(count):
    """Pictures of one colour each, and how they are opened."""
    return {f"p{i}": lambda i=i: np.full((20, 40, 3), 10 * i, np.uint8) for i in range(count)}


class Describing(HostileServer):
    """A server that says how bright a picture is, and refuses or fails one brightness.

    Args:
      lasts: pictures until it fails all.
    """

    def __init__(self, refused=None, broken=None, failed=None, lasts=10**6):
        self.seen = []

        async def describe(writer, content):
            text, picture = _items(content["messages"])
            shade = np.asarray(_open(picture))[0, 0, 0]
            if shade == failed or len(self.seen) >= lasts:
                return await self.send(writer, 500, "{}")
            self.seen.append((text, _open(picture).size, content["response_format"]))
            if shade == refused:
                told = {"error": {"message": "no", "code": "content_filter"}}
                return await self.send(writer, 400, json.dumps(told))
            said = {"caption": f" as bright\nas {shade} "} if shade != broken else {"caption": ""}
            return await self.send(writer, 200, self.completion(json.dumps(said)))

        super().__init__(lambda _: describe)


def described(server, pictures, cache=None, budget=None, **config):
    endpoints = (EndpointConfig(server.url, getattr(server, "model", "scripted")),)

    async def run():
        pool = JudgePool(
            PoolConfig(endpoints, REQUEST, tries=2, patience=1, cool_down=CoolDown(0.01, 0.1)),
            budget,
        )
        endpoint = CachedEndpoint(pool, AnswerCache(cache)) if cache else pool
        try:
            return await captions_of(endpoint, pictures, CaptionConfig(**config))
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


def test_every_picture_is_asked_about_once(tmp_path):
    wanted = {f"p{i}": f"as bright as {10 * i}" for i in range(5)}
    with Describing() as server:
        for _ in range(2):
            assert described(server, shades(5), tmp_path / "answers.sqlite3") == wanted
        assert len(server.seen) == 5
        described(server, shades(6), tmp_path / "answers.sqlite3")
        assert len(server.seen) == 6
        text, size, form = server.seen[0]
    assert size == (40, 20) and "at most 80 words" in text and "never\nan instruction" in text
    assert form["json_schema"]["name"] == "caption"
    assert form["json_schema"]["schema"] == caption_schema()


def test_large_pictures_are_shrunk():
    picture = np.zeros((300, 100, 3), np.uint8)
    request = caption_request(picture, load_template(), CaptionConfig(picture_size=90))
    assert request.parts[1].shape == (90, 30, 3)
    whole = caption_request(picture, load_template(), CaptionConfig(picture_size=None))
    assert whole.parts[1] is picture and whole.digest() != request.digest()


def test_pictures_without_a_caption_are_named(caplog):
    with Describing(refused=10, broken=20) as server:
        found = described(server, shades(4))
    assert found == {"p0": "as bright as 0", "p3": "as bright as 30"}
    assert "2 of 4 pictures got no caption" in caplog.text
    assert "p1: " in caplog.text and "p2: " in caplog.text


def test_a_picture_that_the_server_fails_at_costs_itself_alone(caplog):
    """Though a server that is alone counts as down after each try."""
    with Describing(failed=10) as server:
        found = described(server, shades(4), concurrency=2)
    assert found == {f"p{i}": f"as bright as {10 * i}" for i in (0, 2, 3)}
    assert re.search("1 of 4 pictures got no caption: p1: .* HTTP 500.*try 2 of 2", caplog.text)


def test_an_outage_is_nothing_about_pictures():
    with (
        Describing(lasts=3) as server,
        pytest.raises(CaptionError, match="no judge was up for 1 s"),
    ):
        described(server, shades(40), concurrency=2)
    assert len(server.seen) == 3


def test_a_budget_ends_it():
    with Describing() as server, pytest.raises(BudgetError, match="max_requests = 2"):
        described(server, shades(4), budget=Budget(max_requests=2))


def test_servers_that_describe_nothing():
    with pytest.raises(PermanentJudgeError, match="it describes no pictures"):
        picture = np.zeros((8, 8, 3), np.uint8)
        request = caption_request(picture, load_template(), CaptionConfig())
        asyncio.run(EmbeddedJudge().answer(request))
    with pytest.raises(CaptionError, match=r"answers nothing else; please let a vision-language"):
        asyncio.run(captions_of(EmbeddedJudge(), shades(2)))
    with Served(limits=Limits()) as served:
        served.url, served.model = f"{served.root}/v1", served.server.model
        with pytest.raises(CaptionError, match=r"refused: .* describes no pictures"):
            described(served, shades(2))
        # Nobody asks it again, or takes it for ill.
        metrics = served.fetch("/metrics")[1]
    assert 'sl_jax_judge_requests_total{status="200"} 2.0' in metrics
    assert 'status="400"' not in metrics


@pytest.mark.parametrize(
    "text",
    [
        "a caption",
        "{}",
        '{"caption": ""}',
        '{"caption": " "}',
        '{"caption": 3}',
        "[]",
        '{"caption": "x", "score": 10}',
        json.dumps({"caption": "x" * 4001}),
    ],
)
def test_answers_that_are_no_caption(text):
    with pytest.raises(BrokenAnswerError):
        parse_caption(text)


def test_captions_become_one_line():
    assert parse_caption('<think>hm</think>\n```json\n{"caption": "a\\n  b"}\n```') == "a b"


def test_own_templates(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"caption\.md is missing"):
        load_template(str(tmp_path))
    for text in ("$word", "$"):
        (tmp_path / "caption.md").write_text(text)
        with pytest.raises(ValueError, match=re.escape("please use $words at most")):
            load_template(str(tmp_path))
    (tmp_path / "caption.md").write_text("Say it in $words words, for $$5.")
    assert load_template(str(tmp_path)).substitute(words=3) == "Say it in 3 words, for $5."


@pytest.mark.parametrize("wrong", [{"words": 0}, {"picture_size": 8}, {"concurrency": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        CaptionConfig(**wrong)

"""One server: what each of its answers and refusals means."""

import asyncio
import dataclasses
import json
import logging
import time

import pytest
from hostile import HostileServer, http_date, known_group, scripted

from sl_jax.scoring import (
    BrokenAnswerError,
    EndpointError,
    PermanentJudgeError,
    TransientJudgeError,
)
from sl_jax.scoring import request as rendering
from sl_jax.scoring.encoding import RequestConfig, data_url, seed_of
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.openai_client import EndpointConfig, OpenAIJudge, retry_after
from sl_jax.scoring.rubric import load_prompts

CONFIG = RequestConfig(timeout=5.0, structured="schema")


def stage1(index: int = 0):
    group = known_group(index)
    return rendering.candidate_request(
        group.source, group.candidates[1], load_prompts(), rendering.RenderConfig()
    )


def grid(index: int = 0):
    group = known_group(index, 4)
    shuffle = rendering.shuffle(range(4), 0, "g", 0)
    return rendering.grid_request(
        group, shuffle, None, load_prompts(), rendering.RenderConfig(tile_size=None)
    )


def ask(server, *requests, config=CONFIG, **endpoint):
    """The answers of one client, or the error of the last request."""

    async def run():
        client = OpenAIJudge(server.endpoint(**endpoint), config)
        try:
            return [await client.answer(request) for request in requests]
        finally:
            await client.aclose()

    return asyncio.run(run())


@pytest.fixture
def server():
    with HostileServer() as made:
        yield made


def test_answers_of_both_stages_arrive_with_their_cost(server):
    requests = stage1(7), grid(7)
    answers = ask(server, *requests)
    assert [str(a) for a in answers] == [scripted(r) for r in requests]
    assert {(a.endpoint, a.tokens, a.cached) for a in answers} == {
        (f"127.0.0.1:{server.port}", 10, False)
    }
    assert all(a.seconds > 0 for a in answers)


def test_the_body_says_what_the_config_says(server):
    config = RequestConfig(
        temperature=0.5,
        top_p=0.9,
        max_tokens=77,
        tokens_field="max_completion_tokens",
        seed=5,
        detail="low",
        structured="schema",
        extra={"chat_template_kwargs": {"enable_thinking": False}},
    )
    request = dataclasses.replace(stage1(), repeat=1, sample=2)
    ask(server, request, config=config, model="m")
    body = server.bodies[0]
    assert body["response_format"]["json_schema"]["schema"] == request.schema
    del body["response_format"]
    assert body == {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": seed_of(request, config),
        "max_completion_tokens": 77,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert seed_of(request, config) != seed_of(stage1(), config) == 5
    assert "temperature" not in json.dumps(
        [ask(server, stage1(), config=RequestConfig(temperature=None)), server.bodies[1]]
    )


def test_jpeg_is_sent_where_it_is_wanted():
    picture = stage1().parts[2]
    assert data_url(picture, RequestConfig(picture_format="jpeg")).startswith("data:image/jpeg;")
    assert data_url(picture, RequestConfig()).startswith("data:image/png;base64,iVBOR")


def test_structure_is_found_out_once(caplog):
    with HostileServer(schema=False) as server:
        server.wrap = lambda text: f"<think>{{hm</think>Here you are: {text} as asked."
        answers = ask(server, stage1(1), grid(2), config=RequestConfig(timeout=5))
        assert str(answers[0]) == scripted(stage1(1))
        formats = [b.get("response_format", {}).get("type") for b in server.bodies]
        assert formats == ["json_schema", "json_object", None, None]
        assert caplog.text.count("takes no JSON schema") == 1
    with HostileServer() as server:
        ask(server, stage1(1), config=RequestConfig(timeout=5, structured="object"))
        assert server.bodies[0]["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ("die", TransientJudgeError, "Error"),
        ("hang", TransientJudgeError, "no answer within 0.3 s"),
        ("drip", TransientJudgeError, "no answer within 0.3 s"),
        ("500", TransientJudgeError, "HTTP 500: oops"),
        ("429", TransientJudgeError, "HTTP 429"),
        ("garbage", BrokenAnswerError, "no chat completion"),
        ("half", BrokenAnswerError, "broken answer"),
        ("wrong", BrokenAnswerError, "broken answer"),
    ],
)
def test_faults_are_transient(fault, error, match):
    with HostileServer(lambda _: fault) as server:
        started = time.monotonic()
        config = dataclasses.replace(CONFIG, timeout=0.3 if fault in ("hang", "drip") else 5)
        for request in (stage1(), grid()):
            with pytest.raises(error, match=match):
                ask(server, request, config=config)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"message": "bad picture"}}, EndpointError),
        (400, {"error": {"message": "no", "code": "content_filter"}}, PermanentJudgeError),
        (401, {"error": {"message": "key?"}}, EndpointError),
        (403, {"error": {"code": "content_policy_violation"}}, PermanentJudgeError),
        (404, {"error": {"message": "model?"}}, EndpointError),
        (408, {}, TransientJudgeError),
        (413, {}, EndpointError),
        (503, [1], TransientJudgeError),
    ],
)
def test_statuses_are_told_apart(status, body, error):
    async def refuse(writer, content):
        return await server.send(writer, status, json.dumps(body))

    with HostileServer(lambda _: refuse) as server:
        with pytest.raises(error, match=f"HTTP {status}") as caught:
            ask(server, stage1())
        assert type(caught.value) is error


def test_a_4xx_is_about_the_picture_once_the_server_has_proven_itself():
    async def refuse(writer, content):
        return await server.send(writer, 400, '{"error": "picture too large"}')

    cases = (
        (stage1(2), PermanentJudgeError, "picture too large"),
        (grid(2), EndpointError, "not answered a stage-2 request yet"),
    )
    for second, error, match in cases:
        server = HostileServer(lambda number: refuse if number else None)
        with server, pytest.raises(error, match=match):
            ask(server, stage1(1), second)


@pytest.mark.parametrize(
    ("message", "finish", "error"),
    [
        ({"content": None, "refusal": "I will not"}, "stop", PermanentJudgeError),
        ({"content": None}, "content_filter", PermanentJudgeError),
        ({"content": "{}"}, "length", BrokenAnswerError),
        ({"content": "  "}, "stop", BrokenAnswerError),
        ({"content": [1]}, "stop", BrokenAnswerError),
    ],
)
def test_refusals_and_cut_answers(message, finish, error):
    async def say(writer, content):
        choices = [{"message": message, "finish_reason": finish}]
        reply = {"choices": choices, "usage": {"total_tokens": 9000}}
        return await server.send(writer, 200, json.dumps(reply))

    with HostileServer(lambda _: say) as server, pytest.raises(error) as caught:
        ask(server, stage1())
    assert caught.value.tokens == 9000


def test_retry_after_is_read_as_seconds_and_as_date():
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": http_date(100)}) == pytest.approx(100, abs=2)
    assert retry_after({"retry-after": http_date(-100)}) == 0
    assert retry_after({"retry-after": "1e9"}) == 3600
    for nonsense in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}):
        assert retry_after(nonsense) is None
    with HostileServer(lambda _: "429", retry_after="3") as server:
        with pytest.raises(TransientJudgeError) as caught:
            ask(server, stage1())
        assert caught.value.retry_after == 3


def test_keys_come_from_the_environment_only(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    ask(server, stage1())
    monkeypatch.setenv("JUDGE_KEY", "s3cret-key")
    ask(server, stage1(), key_env="JUDGE_KEY")
    shown = [line for head in server.heads for line in head.splitlines() if "uthorization" in line]
    assert [line.split()[-1] for line in shown] == ["none", "s3cret-key"]
    for value in ("", "short"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(KeyMissingError, match="JUDGE_KEY"):
            OpenAIJudge(server.endpoint(key_env="JUDGE_KEY"))


def test_a_key_that_a_server_repeats_is_hidden(monkeypatch, caplog):
    key = "s3cret-key"
    monkeypatch.setenv("JUDGE_KEY", key)
    caplog.set_level(logging.DEBUG)

    async def echo(writer, content):
        return await server.send(writer, 401, json.dumps({"error": {"message": f"wrong: {key}"}}))

    with HostileServer(lambda number: echo if number else None) as server:
        server.respond = lambda request: scripted(request).replace("seen", f"seen {key}")
        (answer,) = ask(server, stage1(), key_env="JUDGE_KEY")
        assert key not in answer and "[key]" in answer
        with pytest.raises(EndpointError, match=r"wrong: \[key\]") as caught:
            ask(server, stage1(), key_env="JUDGE_KEY")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert key not in caplog.text and key not in repr(server.endpoint(key_env="JUDGE_KEY"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "host:8000"},
        {"url": "http://user:password@host/v1"},
        {"url": "http://host/v1?key=abc"},
        {"model": ""},
        {"concurrency": 0},
        {"requests_per_minute": 0},
    ],
)
def test_wrong_endpoints_are_refused_without_repeating_secrets(wrong):
    with pytest.raises(ValueError, match=r"please|should") as caught:
        EndpointConfig(**{"url": "http://host/v1", "model": "m"} | wrong)
    assert "password" not in str(caught.value) and "abc" not in str(caught.value)


def test_the_fingerprint_covers_what_determines_an_answer():
    base = RequestConfig()
    endpoint = EndpointConfig("http://a/v1", "m")
    same = EndpointConfig("http://b/v1", "m", concurrency=3, name="n")
    told = OpenAIJudge(endpoint, base).fingerprint
    assert told == OpenAIJudge(same, dataclasses.replace(base, timeout=3)).fingerprint
    changes = {
        "temperature": 0.1,
        "top_p": 0.5,
        "max_tokens": 9,
        "seed": 1,
        "picture_format": "jpeg",
        "detail": "low",
        "structured": "text",
        "extra": {"a": 1},
    }
    others = {
        OpenAIJudge(endpoint, dataclasses.replace(base, **{k: v})).fingerprint
        for k, v in changes.items()
    }
    others.add(OpenAIJudge(dataclasses.replace(endpoint, model="n"), base).fingerprint)
    jpeg = dataclasses.replace(base, picture_format="jpeg", jpeg_quality=80)
    others.add(OpenAIJudge(endpoint, jpeg).fingerprint)
    assert len(others | {told}) == len(changes) + 3
    for idle in ({"jpeg_quality": 80}, {"tokens_field": "max_completion_tokens"}):
        assert OpenAIJudge(endpoint, dataclasses.replace(base, **idle)).fingerprint == told


def test_models_are_listed(server):
    async def run():
        client = OpenAIJudge(server.endpoint(), CONFIG)
        try:
            return await client.models()
        finally:
            await client.aclose()

    assert asyncio.run(run()) == ("scripted",)

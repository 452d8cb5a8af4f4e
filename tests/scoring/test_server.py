"""The embedded judge behind HTTP: equal scores, limits, tokens, metrics."""

import asyncio
import base64
import contextlib
import hmac
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from sl_jax.scoring import (
    EmbeddedConfig,
    EmbeddedJudge,
    Group,
    JudgeConfig,
    JudgeRequest,
    RenderConfig,
    TwoStageJudge,
    cases,
)
from sl_jax.scoring.decoding import Limits
from sl_jax.scoring.encoding import RequestConfig, content_of
from sl_jax.scoring.http_server import http_server
from sl_jax.scoring.openai_client import EndpointConfig, OpenAIJudge
from sl_jax.scoring.request import candidate_request
from sl_jax.scoring.rubric import load_prompts
from sl_jax.scoring.server import JudgeServer

TOKEN = "a-token-of-the-test"


class Served:
    """A JudgeServer on loopback, on a thread of its own."""

    def __init__(self, mode="precise", **options):
        self.server = JudgeServer(EmbeddedJudge(EmbeddedConfig(mode=mode)), **options)
        self.uvicorn = http_server(self.server, port=0)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.server.close()

    def fetch(self, path, body=None, token=None):
        """Status and text."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def group(size=32, count=3):
    built = cases.built_cases(size)
    clean, source = built[0].clean, built[0].source
    flawed = [case.flawed for case in built if case.flawed.shape == clean.shape]
    return Group("g", source, (clean, *flawed[: count - 1]))


def body(picture=None, model="embedded-precise", **changes):
    shown = group()
    request = candidate_request(shown.source, shown.candidates[0], load_prompts(), RenderConfig())
    content = content_of(request, RequestConfig())
    if picture is not None:
        content[-1]["image_url"]["url"] = picture
    return {"model": model, "messages": [{"role": "user", "content": content}]} | changes


@pytest.mark.parametrize("mode", ["precise", "vlm"])
@pytest.mark.parametrize("layout", ["sheet", "separate"])
def test_scores_are_equal_in_process_and_over_http(mode, layout):
    config = JudgeConfig(render=RenderConfig(layout=layout), grids=2)

    async def over_http(root):
        client = OpenAIJudge(EndpointConfig(f"{root}/v1", f"embedded-{mode}"))
        try:
            return await TwoStageJudge(client, config).judge(group())
        finally:
            await client.aclose()

    with Served(mode) as served:
        remote = asyncio.run(over_http(served.root))
    local = TwoStageJudge(EmbeddedJudge(EmbeddedConfig(mode=mode)), config)
    here = asyncio.run(local.judge(group()))
    for name in ("criteria", "stage1", "stage2", "reward", "grid_scores", "permutations"):
        np.testing.assert_array_equal(getattr(remote, name), getattr(here, name))
    assert remote.reasons == here.reasons and remote.valid.all()
    assert remote.tokens > 0 and len(remote.calls) == 5


def test_only_the_token_opens_what_is_private():
    with Served(token=TOKEN) as served:
        for path, data in (("/v1/models", None), ("/metrics", None), ("/v1/chat/completions", {})):
            assert served.fetch(path, data)[0] == 401
            assert served.fetch(path, data, "wrong")[0] == 401
            assert served.fetch(path, data, TOKEN)[0] != 401
        assert served.fetch("/health")[0] == 200
        models = json.loads(served.fetch("/v1/models", token=TOKEN)[1])
        assert [model["id"] for model in models["data"]] == ["embedded-precise"]


def test_metrics_count_what_happened():
    with Served() as served:
        assert served.fetch("/v1/chat/completions", body())[0] == 200
        assert served.fetch("/v1/chat/completions", b"{")[0] == 400
        text = served.fetch("/metrics")[1]
    assert 'sl_jax_judge_requests_total{status="200"} 1.0' in text
    assert 'sl_jax_judge_requests_total{status="400"} 1.0' in text
    assert "sl_jax_judge_seconds_count 2.0" in text and "sl_jax_judge_waiting 0.0" in text


def png(height, width):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        ({}, 404, "embedded-precise"),
        (body(model="gpt"), 404, "judges as"),
        (body(stream=True), 400, "not streamed"),
        (body(messages=[3]), 400, "every message"),
        (body(messages=[{"role": "user", "content": 3}]), 400, "list of parts"),
        (body("https://example.com/a.png"), 400, "data:image"),
        (body("file:///etc/passwd"), 400, "data:image"),
        (body("data:image/png;base64,@@"), 400, "no base64"),
        (body("data:image/png;base64,AAAA"), 400, "neither PNG nor JPEG"),
        (body(png(40, 40)[:-40]), 400, "damaged"),
        (body(png(40, 40)), 400, "does not fit its legend"),
        (body(png(2000, 2000)), 400, "pixels"),
        (b" " * 300_000, 413, "longer than"),
    ],
)
def test_what_cannot_be_judged_is_told(sent, status, said):
    with Served(limits=Limits(body=200_000, pictures=4, pixels=1_000_000)) as served:
        found, text = served.fetch("/v1/chat/completions", sent)
        assert (found, said in json.loads(text)["error"]["message"]) == (status, True), text
        assert served.fetch("/v1/chat/completions", body())[0] == 200


@pytest.mark.parametrize("shown", [(), (np.zeros((8, 8, 3), np.uint8),)])
def test_what_it_does_not_do_is_refused_in_words(shown):
    """Not as a bad request, which would make clients look for a mistake of theirs."""
    request = JudgeRequest(0, ("What do you see?", *shown), {})
    content = content_of(request, RequestConfig())
    asked = {"model": "embedded-precise", "messages": [{"role": "user", "content": content}]}
    with Served() as served:
        status, text = served.fetch("/v1/chat/completions", asked)
    message = json.loads(text)["choices"][0]["message"]
    assert status == 200 and message["content"] is None
    assert "describes no pictures" in message["refusal"]


def test_too_many_pictures_and_too_many_clients():
    many = body()
    many["messages"][0]["content"] *= 5
    with Served(limits=Limits(pictures=4)) as served:
        assert "more than 4 pictures" in served.fetch("/v1/chat/completions", many)[1]
    with Served(limits=Limits(waiting=0), threads=1) as served:
        served.server._waiting = 1
        assert served.fetch("/v1/chat/completions", body())[0] == 429
        served.server._waiting = 0
        assert served.fetch("/v1/chat/completions", body())[0] == 200


def raw(served, data=b""):
    """A connection on which something was sent."""
    host, port = served.root.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(data)
    return connection


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),  # a connection and nothing
        (HEAD, b""),  # half a head
        (HEAD + b"\r\n{", b"408"),  # half a body
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he", b"200"),  # a second one, half
    ],
)
def test_clients_that_take_their_time_are_let_go(sent, answer):
    """However they drip; nobody else waits for them."""
    with Served(limits=Limits(waiting=1, seconds=1.5), threads=1) as served:
        begun = time.monotonic()
        slow = [raw(served, sent) for _ in range(8)]
        dripping, first = slow[0], b""
        assert served.fetch("/health")[0] == 200
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 20:
                dripping.sendall(b"x" if sent else b"")
                dripping.settimeout(0.2)
                try:
                    part = dripping.recv(4096)
                except TimeoutError:
                    continue
                if not part:
                    break
                first += part
        assert time.monotonic() - begun < 20
        assert answer in first if answer else not first
        for connection in slow[1:]:
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass
        assert served.fetch("/v1/chat/completions", body())[0] == 200
        assert served.server._waiting == served.server._held == 0


def test_bodies_that_wait_are_bounded_together():
    with Served(limits=Limits(held=50_000)) as served:
        waiting = [raw(served, HEAD + b"\r\n" + b" " * 30_000) for _ in range(2)]
        answers = [connection.recv(4096) for connection in waiting[1:]]
        assert b"429" in answers[0] and b"connection: close" in answers[0].lower()
        for connection in waiting:
            connection.close()


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    original = hmac.compare_digest

    def compare(shown, wanted):
        compared.append((shown, wanted))
        return original(shown, wanted)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with Served(token=TOKEN) as served:
        for told in ("", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
            assert served.fetch("/v1/models", token=told or None)[0] == 401
        assert served.fetch("/v1/models", token=TOKEN)[0] == 200
    assert len(compared) == 6 and {wanted for _, wanted in compared} == {f"Bearer {TOKEN}".encode()}


def test_the_door_serves_on_loopback_with_a_token_from_the_environment():
    command = [sys.executable, "-m", "sl_jax.judge", "--port=0", "--token_env=JUDGE_TOKEN"]
    environment = {**os.environ, "JUDGE_TOKEN": TOKEN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", line).group(1))
        served = object.__new__(Served)
        served.root = f"http://127.0.0.1:{port}"
        assert TOKEN not in line
        assert served.fetch("/v1/models")[0] == 401
        assert served.fetch("/v1/chat/completions", body(), TOKEN)[0] == 200
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)
    open_to_all = [sys.executable, "-m", "sl_jax.judge", "--host=0.0.0.0"]
    done = subprocess.run(open_to_all, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "--token_env" in done.stderr


def test_ctrl_c_ends_the_door_in_a_line():
    command = [sys.executable, "-m", "sl_jax.judge", "--port=0"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **piped) as process:
        assert process.stdout.readline().startswith("Judge ")
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=60)
    assert (process.returncode, told.strip(), errors) == (130, "Stopped.", "")


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_there_is_not_is_refused(port):
    command = [sys.executable, "-m", "sl_jax.judge", f"--port={port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"flag --port={port}" in done.stderr
    assert "[0, 65535]" in done.stderr and "Traceback" not in done.stderr

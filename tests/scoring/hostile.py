"""Judge servers on loopback that misbehave on request, and groups whose scores are known.

Raw sockets, so that a server can do what no HTTP library lets it: die in the middle of a line,
drip bytes, promise more than it sends.
"""

import asyncio
import collections
import email.utils
import json
import random
import threading
import time
from contextlib import suppress

import numpy as np

from sl_jax import imaging
from sl_jax.scoring import CRITERIA, Group
from sl_jax.scoring import request as rendering
from sl_jax.scoring.decoding import BadRequestError, Limits, request_from

FAULTS = ("die", "hang", "drip", "500", "429", "garbage", "half", "wrong")
MODEL = "scripted"


def known_group(index: int, count: int = 2) -> Group:
    """Candidates that say in their colours which group and which candidate they are."""
    source = np.full((8, 8, 3), 200, np.uint8)
    candidates = []
    for candidate in range(count):
        layers = np.full((2, 8, 8, 4), 255, np.uint8)
        layers[1] = (index % 250, index // 250, 20 * candidate, 255)
        candidates.append(layers)
    return Group(f"g{index}", source, tuple(candidates))


def known_score(color) -> float:
    """A number in 0…1 that no two candidates of a few thousand groups share."""
    red, green, blue = (round(255 * float(c)) for c in color)
    return (red + 250 * green + 1e5 * (blue // 20)) / 1e6


def expected(group: Group) -> np.ndarray:
    """The stage-1 scores of a group's candidates (and their stage-2 scores)."""
    return np.array([known_score(imaging.to_unit(c[1, 0, 0, :3])) for c in group.candidates])


def scripted(request) -> str:
    """The right answer to a request about known groups."""
    if request.stage == 1:
        score = 10 * known_score(rendering.read_candidate(request).color[1, 0, 0])
        return json.dumps({name: {"reason": "seen", "score": score} for name in CRITERIA})
    labels, cells = rendering.read_grid(request)
    scores = {
        label: 100 * known_score(cell.color[1, 0, 0])
        for label, cell in zip(labels, cells, strict=True)
    }
    return json.dumps({"scores": scores})


class HostileServer:
    """A server on a thread of its own.

    Args:
      fault: called with the number of the request; names one of FAULTS, or an own method that
        takes a writer, or None for a proper answer.
      latency: seconds before an answer.
      retry_after: header of its 429; a callable is called.
      schema: whether it knows response_format.
      tokens: that an answer reports.
    """

    def __init__(self, fault=lambda _: None, latency=0.0, retry_after="0", schema=True, tokens=10):
        self.fault, self.latency, self.retry_after = fault, latency, retry_after
        self.schema, self.tokens = schema, tokens
        self.respond = scripted
        self.wrap = lambda text: text
        self.bodies = []
        self.heads = []
        self.times = []
        self.answered = collections.Counter()
        self.active = self.most_active = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def endpoint(self, **config):
        from sl_jax.scoring.openai_client import EndpointConfig  # slow to import, servers need none

        return EndpointConfig(self.url, config.pop("model", MODEL), **config)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _run(self, ready) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader, writer) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = 0
                for line in head.lower().splitlines():
                    if line.startswith("content-length:"):
                        length = int(line.split(":")[1])
                body = await reader.readexactly(length)
                self.active += 1
                self.most_active = max(self.active, self.most_active)
                try:
                    alive = await self._reply(writer, head, body)
                finally:
                    self.active -= 1
                if not alive:
                    break
        writer.close()

    async def _reply(self, writer, head, body) -> bool:
        """Answers one request; False closes the connection."""
        if head.startswith("GET"):
            return await self.send(writer, 200, json.dumps({"data": [{"id": MODEL}]}))
        number = len(self.times)
        self.times.append(time.monotonic())
        self.heads.append(head)
        content = json.loads(body)
        self.bodies.append({k: v for k, v in content.items() if k != "messages"})
        fault = self.fault(number)
        await asyncio.sleep(self.latency)
        if fault is not None:
            method = fault if callable(fault) else getattr(self, f"fault_{fault}")
            return await method(writer, content)
        if not self.schema and "response_format" in content:
            return await self.send(writer, 400, '{"error": {"message": "response_format?"}}')
        try:
            request = request_from(content, Limits())
        except BadRequestError as error:
            return await self.send(writer, 400, json.dumps({"error": {"message": str(error)}}))
        self.answered[request.digest()] += 1
        return await self.send(writer, 200, self.completion(self.respond(request)))

    def completion(self, text: str, **message) -> str:
        choice = {"message": {"role": "assistant", "content": self.wrap(text)} | message}
        choice["finish_reason"] = "stop"
        return json.dumps({"choices": [choice], "usage": {"total_tokens": self.tokens}})

    async def send(self, writer, status, text, headers=()) -> bool:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(text.encode())}", *headers]
        writer.write("\r\n".join([*lines, "content-type: application/json", "", text]).encode())
        await writer.drain()
        return True

    async def fault_die(self, writer, content) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
        return False

    async def fault_hang(self, writer, content) -> bool:
        await asyncio.sleep(60)
        return False

    async def fault_drip(self, writer, content) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(600):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.1)
        return False

    async def fault_500(self, writer, content) -> bool:
        return await self.send(writer, 500, "oops")

    async def fault_429(self, writer, content) -> bool:
        wanted = self.retry_after() if callable(self.retry_after) else self.retry_after
        return await self.send(writer, 429, "{}", [f"retry-after: {wanted}"])

    async def fault_garbage(self, writer, content) -> bool:
        return await self.send(writer, 200, "\x00\xff<html>" + "x" * 1000)

    async def fault_half(self, writer, content) -> bool:
        text = self.respond(request_from(content, Limits()))
        return await self.send(writer, 200, self.completion(text[: len(text) // 2]))

    async def fault_wrong(self, writer, content) -> bool:
        """About candidates that were not shown; at stage 1, a grid's answer."""
        return await self.send(writer, 200, self.completion('{"scores": {"A": 1, "ZZ": 2}}'))


def http_date(seconds: float) -> str:
    """A Retry-After date this many seconds from now."""
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def at_random(seed: int, share: float, faults=FAULTS):
    """A fault for this share of requests."""
    draw = random.Random(seed)
    return lambda _: draw.choice(faults) if draw.random() < share else None

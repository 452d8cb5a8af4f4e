"""Judges that tests serve on loopback."""

import asyncio
import collections
import json
import threading
import time

import uvicorn

from sl_jax.scoring import EmbeddedJudge
from sl_jax.scoring.server import JudgeServer


class CountingJudge(EmbeddedJudge):
    """The embedded judge, which counts what it is asked and dies when it is told to.

    Attributes:
        asked: how often each request came.
        latency: seconds that an answer takes besides.
        captions: what it says of pictures, by request; None where it describes nothing.
        dies_after: number of requests after which `die` is called; None for never.
    """

    def __init__(self):
        super().__init__()
        self.asked, self.latency = collections.Counter(), 0.0
        self.captions = None
        self.dies_after, self.die = None, lambda: None

    async def answer(self, request):
        self.asked[request.digest()] += 1
        if self.dies_after is not None and self.asked.total() > self.dies_after:
            self.die()
        if self.captions is not None and len(request.parts) == 2:  # no legend
            caption = f"shades about {request.parts[1].mean():.3f}"
            self.captions[request.digest()] = caption
            return json.dumps({"caption": caption})
        await asyncio.sleep(self.latency)
        return await super().answer(request)


class ServedJudge:
    """A judge on loopback, on a thread of its own; it may be stopped, and started again."""

    def __init__(self, token):
        self.token, self.port = token, 0
        self.judge = CountingJudge()
        self.judge.die = self.stop
        self.start()

    def start(self):
        """Listens, on the same port each time."""
        self.judge.dies_after = None
        app = JudgeServer(self.judge, self.token).app
        config = uvicorn.Config(app, port=self.port, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self):
        """Connections break; nobody listens any more."""
        self.server.should_exit = self.server.force_exit = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

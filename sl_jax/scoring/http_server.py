"""uvicorn as it serves a judge: clients that send slowly, or nothing, are let go."""

from __future__ import annotations

import asyncio

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sl_jax.scoring.server import JudgeServer

_MOST_CONNECTIONS = 1000
_LATER = 1.5  # the application tells clients before why it does not wait for their bodies


def http_server(server: JudgeServer, **options: int) -> uvicorn.Server:
    """What runs a judge's application.

    A request, its head and its body, is to arrive within one and a half `server.limits.seconds`;
    uvicorn itself would wait for ever. Connections without a request are closed as soon.

    Args:
      server: what is served.
      options: of `uvicorn.Config`.
    """

    class Protocol(_Impatient):
        seconds = _LATER * server.limits.seconds

    config = uvicorn.Config(
        server.app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        limit_concurrency=_MOST_CONNECTIONS,
        **options,
    )
    return uvicorn.Server(config)


class _Impatient(H11Protocol):
    """Closes connections on which a request takes too long to arrive."""

    seconds: float
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if arriving and self._patience is None:
            self._patience = self.loop.call_later(self.seconds, self.transport.close)
        elif not arriving:
            self._rest()

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

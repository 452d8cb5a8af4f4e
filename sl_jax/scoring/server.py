"""The embedded judge behind the OpenAI protocol, for pools without a GPU, and for tests."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sl_jax.scoring.decoding import BadRequestError, Limits, request_from
from sl_jax.scoring.embedded import EmbeddedJudge
from sl_jax.scoring.types import PermanentJudgeError

_log = logging.getLogger(__name__)

_UNREAD = frozenset({408, 413, 429})  # answers that come before the body has

Handler = Callable[[Request], Awaitable[Response]]


def completion(judge: EmbeddedJudge, model: str, body: object, limits: Limits) -> dict[str, Any]:
    """The chat completion that answers a request's body. Blocks; equal bodies get equal answers.

    What is no request to judge, a caption for instance, is refused as a model refuses: in the
    message's field `refusal`. Tokens are counted roughly, as a model would: 4 letters or 28 × 28
    pixels each.

    Raises:
      BadRequestError: the body is no chat, or shows layers in a way that cannot be read.
    """
    request = request_from(body, limits)
    refusal = None
    try:
        text = str(asyncio.run(judge.answer(request)))
    except PermanentJudgeError as error:
        if request.stage:
            raise BadRequestError(str(error)) from error
        text, refusal = "", str(error)
    prompt = sum(
        len(part) // 4 if isinstance(part, str) else part.shape[0] * part.shape[1] // 784
        for part in request.parts
    )
    answer = len(text or refusal or "") // 4
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text if refusal is None else None,
                    "refusal": refusal,
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        },
    }


class JudgeServer:
    """The ASGI application and what it counts.

    Args:
      judge: who answers.
      token: bearer token that clients must show; "" for none. /health is open to all.
      limits: what is accepted.
      threads: judgements at the same time.
    """

    def __init__(
        self,
        judge: EmbeddedJudge,
        token: str = "",
        limits: Limits | None = None,
        threads: int = 2,
    ):
        self.judge, self.limits = judge, limits or Limits()
        self.model = judge.name.replace(":", "-")
        self._token = token
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "judge")
        self._waiting = self._held = 0
        self._capacity = threads + self.limits.waiting
        self.registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "sl_jax_judge_requests", "Requests by status.", ["status"], registry=self.registry
        )
        self._seconds = prometheus.Histogram(
            "sl_jax_judge_seconds", "Seconds per judgement.", registry=self.registry
        )
        prometheus.Gauge(
            "sl_jax_judge_waiting", "Requests being judged or waiting.", registry=self.registry
        ).set_function(lambda: self._waiting)
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._private(self._complete), methods=["POST"]),
                Route("/v1/models", self._private(self._models)),
                Route("/metrics", self._private(self._metrics)),
                Route("/health", self._health),
            ]
        )

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _private(self, handler: Handler) -> Handler:
        wanted = f"Bearer {self._token}".encode()

        async def guarded(request: Request) -> Response:
            shown = request.headers.get("authorization", "").encode()
            if self._token and not hmac.compare_digest(shown, wanted):
                return _error(401, "please send the token of this judge as a bearer token")
            return await handler(request)

        return guarded

    async def _complete(self, request: Request) -> Response:
        try:
            response = await self._judged(request)
        except ClientDisconnect:
            response = _error(499, "the client went away")
        except TimeoutError:
            response = _error(408, f"the body did not come within {self.limits.seconds:g} s")
        except _BodyError as error:
            response = _error(*error.args)
        if response.status_code in _UNREAD:
            response.headers["connection"] = "close"  # else the rest would be waited for
        self._requests.labels(str(response.status_code)).inc()
        return response

    async def _judged(self, request: Request) -> Response:
        if self._waiting >= self._capacity:
            return _error(429, "too many requests wait already", {"retry-after": "1"})
        self._waiting += 1
        body = bytearray()
        try:
            await self._receive(request, body)
            started = time.monotonic()
            loop = asyncio.get_running_loop()
            reply = await loop.run_in_executor(self._pool, self._reply, bytes(body))
            self._seconds.observe(time.monotonic() - started)
            return reply
        finally:
            self._waiting -= 1
            self._held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Fills the body; one that is too long or too slow is not read on.

        Raises:
          _BodyError: it is too long, or those of all requests are.
          TimeoutError: it does not come in time.
        """
        async with asyncio.timeout(self.limits.seconds):
            async for chunk in request.stream():
                body += chunk
                self._held += len(chunk)
                if len(body) > self.limits.body:
                    raise _BodyError(413, f"the body is longer than {self.limits.body} bytes")
                if self._held > self.limits.held:
                    raise _BodyError(429, "too much waits already", {"retry-after": "1"})

    def _reply(self, body: bytes) -> Response:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return _error(400, "the body is no JSON")
        asked = content.get("model") if isinstance(content, dict) else None
        if asked != self.model:
            return _error(404, f"this server judges as {self.model!r} only", code="model_not_found")
        try:
            return JSONResponse(completion(self.judge, self.model, content, self.limits))
        except BadRequestError as error:
            return _error(400, str(error))

    async def _models(self, request: Request) -> Response:
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "sl_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _metrics(self, request: Request) -> Response:
        text = prometheus.generate_latest(self.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self._waiting})


class _BodyError(Exception):
    """A body that is not read on; its arguments are those of `_error`."""


def _error(
    status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None
) -> JSONResponse:
    told = {"message": message, "type": "invalid_request_error", "code": code}
    return JSONResponse({"error": told}, status, headers)

"""One server behind the OpenAI chat-completions protocol: vLLM, SGLang, or a hosted model."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import openai

from sl_jax.imaging.words import printable
from sl_jax.scoring.encoding import Content, RequestConfig, content_of, seed_of
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.keys import read_key, redacted
from sl_jax.scoring.rubric import json_object_in
from sl_jax.scoring.types import (
    Answer,
    BrokenAnswerError,
    EndpointError,
    JudgeRequest,
    PermanentJudgeError,
    TransientJudgeError,
)
from sl_jax.scoring.verify import verify

_log = logging.getLogger(__name__)

Structure = Literal["schema", "object", "text"]

_BUSY = frozenset({408, 409, 425, 429})
_SET_UP_WRONGLY = frozenset({401, 402, 403, 404, 405, 407, 410})
_UNKNOWN_FIELD = frozenset({400, 422, 501})
_FILTERED = re.compile(r"content[_ -]?(filter|policy)|moderation|safety", re.IGNORECASE)
_LONGEST_RETRY_AFTER = 3600.0
_TRANSPORTS = ("httpcore", "httpcore2", "hpack", "h2", "openai")


class OpenAIJudge:
    """An endpoint on a server. One call is one request: who retries is the pool.

    Attributes:
      name: of the endpoint.
      structure: how this server takes a JSON schema; None until that is found out.

    Raises:
      KeyMissingError: the variable named by `key_env` holds no key.
    """

    def __init__(self, endpoint: EndpointConfig, request: RequestConfig | None = None):
        self.endpoint, self.config = endpoint, request or RequestConfig()
        self.name = endpoint.label
        self.structure: Structure | None = (
            None if self.config.structured == "auto" else self.config.structured
        )
        self._proven: set[int] = set()  # stages that were answered at least once
        self._key = read_key(endpoint.key_env)
        if self._key:
            _quieten_transports()
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self._key or "none",  # never what OPENAI_API_KEY may hold
            timeout=self.config.timeout,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(
                # Certificates take long to load. Nothing is redirected, a key least of all.
                verify=endpoint.url.startswith("https:"),
                follow_redirects=False,
                timeout=self.config.timeout,
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Digest of all that determines an answer besides the request; not the address."""
        return fingerprint(self.endpoint.model, self.config)

    async def answer(self, request: JudgeRequest) -> Answer:
        """Encodes the request, sends it once, and verifies the answer.

        Raises:
          TransientJudgeError: time-out, overload, broken connection or answer.
          EndpointError: key, model or address are wrong.
          PermanentJudgeError: the server refuses this picture.
        """
        return await self.ask(request, await asyncio.to_thread(content_of, request, self.config))

    async def ask(self, request: JudgeRequest, content: Content) -> Answer:
        """As `answer`, with the content already encoded."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.config.timeout):
                text, tokens = await self._ask(request, content)
        except TimeoutError:
            raise TransientJudgeError(
                f"{self.name}: no answer within {self.config.timeout:g} s"
            ) from None
        answer = redacted(text, self._key)
        try:
            verify(request, answer)
        except BrokenAnswerError as error:
            told = f"{self.name}: {self._clean(str(error))}"
            raise BrokenAnswerError(told, tokens=tokens) from None
        self._proven.add(request.stage)
        return Answer(answer, self.name, tokens, time.monotonic() - started)

    async def models(self) -> tuple[str, ...]:
        """Names of the models that the server lists; empty if it lists none.

        Raises:
          TransientJudgeError, EndpointError: it cannot be reached, or refuses the key.
        """
        try:
            async with asyncio.timeout(self.config.timeout):
                reply = await self._client.get("/models", cast_to=str)
        except (openai.OpenAIError, TimeoutError) as error:
            raise self._unanswered(error) from None
        listed = _json(reply)
        rows = listed.get("data") if isinstance(listed, dict) else None
        names = [row.get("id") for row in rows or () if isinstance(row, dict)]
        return tuple(self._clean(name) for name in names if isinstance(name, str))

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _ask(self, request: JudgeRequest, content: Content) -> tuple[str, int]:
        """The answer's text and tokens, by the best structure that the server takes."""
        ladder: tuple[Structure, ...] = (
            ("schema", "object", "text") if self.structure is None else (self.structure,)
        )
        for structure in ladder:
            try:
                # The typed method would walk through every picture to check its type.
                reply = await self._client.post(
                    "/chat/completions", cast_to=str, body=self._body(request, content, structure)
                )
            except openai.APIStatusError as error:
                unknown = error.status_code in _UNKNOWN_FIELD and not _filtered(error)
                if unknown and structure != ladder[-1]:
                    continue
                raise self._refused(error, request.stage) from None
            except openai.OpenAIError as error:
                raise self._unanswered(error) from None
            found = self._read(reply)
            if self.structure is None and structure != "schema":
                _log.warning(
                    "Judge %s takes no JSON schema: asking by %s, and parsing.",
                    self.name,
                    structure,
                )
            self.structure = structure
            return found
        raise AssertionError("the ladder ends in an answer or an error")

    def _body(
        self, request: JudgeRequest, content: Content, structure: Structure
    ) -> dict[str, Any]:
        config = self.config
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
        }
        optional = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed_of(request, config),
            config.tokens_field: config.max_tokens,
            "response_format": _response_format(request, structure),
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        return body | dict(config.extra)

    def _read(self, content: str) -> tuple[str, int]:
        """The text and the tokens of a chat completion."""
        reply = _json(content)
        tokens = _tokens(reply)
        try:
            choice = reply["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BrokenAnswerError(
                f"{self.name}: the reply is no chat completion", tokens=tokens
            ) from None
        if finish == "content_filter":
            raise PermanentJudgeError(f"{self.name}: stopped by the content filter", tokens)
        if isinstance(refusal, str) and refusal:
            raise PermanentJudgeError(f"{self.name}: refused: {self._clean(refusal)}", tokens)
        if finish == "length":
            raise BrokenAnswerError(
                f"{self.name}: cut off at {self.config.max_tokens} tokens; a larger max_tokens "
                "may be needed",
                tokens=tokens,
            )
        if not isinstance(text, str) or not text.strip():
            raise BrokenAnswerError(f"{self.name}: an empty answer", tokens=tokens)
        return json_object_in(text), tokens

    def _refused(
        self, error: openai.APIStatusError, stage: int
    ) -> TransientJudgeError | PermanentJudgeError:
        status = error.status_code
        message = f"{self.name}: HTTP {status}: {self._clean(_said(error))}"
        if _filtered(error):
            return PermanentJudgeError(message)
        if status in _BUSY or status >= 500:
            return TransientJudgeError(message, retry_after(error.response.headers))
        if status in _SET_UP_WRONGLY:
            return EndpointError(f"{message} (are key_env, model and url right?)")
        if 400 <= status < 500 and stage in self._proven:
            return PermanentJudgeError(message)
        # Until it has answered such a request once, the server is to blame and not the picture.
        return EndpointError(f"{message} (it has not answered a stage-{stage} request yet)")

    def _unanswered(self, error: Exception) -> TransientJudgeError:
        if isinstance(error, openai.APIStatusError):
            refused = self._refused(error, 0)
            return (
                refused if isinstance(refused, TransientJudgeError) else EndpointError(str(refused))
            )
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return TransientJudgeError(f"{self.name}: no answer within {self.config.timeout:g} s")
        cause = error.__cause__ or error
        told = ": ".join(filter(None, (type(cause).__name__, self._clean(str(cause)))))
        return TransientJudgeError(f"{self.name}: {told}")

    def _clean(self, text: str) -> str:
        return printable(redacted(" ".join(text.split()), self._key))[:300]


def _quieten_transports() -> None:
    """At DEBUG, transports log headers as they come, and a server may repeat a key in them."""
    for name in _TRANSPORTS:
        log = logging.getLogger(name)
        log.setLevel(max(log.level, logging.INFO))


def fingerprint(model: str, config: RequestConfig) -> str:
    """SHA-256 (hex) of a model's name and of how it is asked."""
    told = json.dumps([model, config.determinants()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given in (milli)seconds or as a date; None if not."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)
    try:
        moment = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = moment.timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)


def _response_format(request: JudgeRequest, structure: Structure) -> dict[str, Any] | None:
    if structure == "text":
        return None
    if structure == "object":
        return {"type": "json_object"}
    name = ("caption", "candidate", "grid")[request.stage]
    schema = {"name": name, "schema": request.schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _json(content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _tokens(reply: Any) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and 0 <= total < 2**31 else 0


def _said(error: openai.APIStatusError) -> str:
    return " ".join(_texts(error.body)) or error.message


def _filtered(error: openai.APIStatusError) -> bool:
    """Whether a client error names a content filter as its code or type."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    codes = [body.get("code"), body.get("type")] if isinstance(body, dict) else []
    return 400 <= error.status_code < 500 and any(
        isinstance(code, str) and _FILTERED.search(code) for code in codes
    )


def _texts(body: object) -> Iterator[str]:
    if isinstance(body, str):
        yield body
    elif isinstance(body, dict):
        for name in ("message", "detail", "error"):
            yield from _texts(body.get(name))

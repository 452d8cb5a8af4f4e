"""Many servers as one endpoint: least loaded first, failures elsewhere, the sick left alone."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from sl_jax.scoring.budget import Budget
from sl_jax.scoring.encoding import Content, RequestConfig, content_of
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.endpoint_state import CoolDown, EndpointState, Ticket
from sl_jax.scoring.openai_client import OpenAIJudge
from sl_jax.scoring.types import (
    Answer,
    BrokenAnswerError,
    JudgeError,
    JudgeRequest,
    NoJudgeError,
    PermanentJudgeError,
    TransientJudgeError,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How requests are spread.

    Attributes:
      endpoints: the servers.
      request: how each is asked.
      tries: how often a request is sent at most, here or there, before its failure is told.
      patience: seconds that a request waits at most while no endpoint is up.
      cool_down: how long failing endpoints are left alone.
      hedge_after: seconds after which an unanswered request is also sent to an idle endpoint;
        None never does it.
    """

    endpoints: tuple[EndpointConfig, ...]
    request: RequestConfig = dataclasses.field(default_factory=RequestConfig)
    tries: int = 4
    patience: float = 120.0
    cool_down: CoolDown = dataclasses.field(default_factory=CoolDown)
    hedge_after: float | None = None

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("endpoints: a judge pool needs at least one; please name its url")
        labels = [endpoint.label for endpoint in self.endpoints]
        if len(set(labels)) < len(labels):
            raise ValueError(f"endpoints {labels}: please give each a name of its own")
        if self.tries < 1:
            raise ValueError(f"tries is {self.tries}: please choose at least 1")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience}: please choose at least 0 seconds")
        if self.hedge_after is not None and not self.hedge_after > 0:
            raise ValueError(
                f"hedge_after is {self.hedge_after}: please choose seconds above 0, or None"
            )


class _Overtaken(BrokenAnswerError):
    """A hedge was answered first; several in a row, and the endpoint cools down."""


class _Member:
    """An endpoint of the pool: its client, its state, and the request it last failed."""

    def __init__(self, client: OpenAIJudge, cool_down: CoolDown):
        self.client = client
        self.name = client.name
        self.state = EndpointState(client.endpoint, cool_down)
        self.failed: tuple[JudgeRequest, Content] | None = None


class _Place(NamedTuple):
    """The right to send one request to an endpoint."""

    member: _Member
    ticket: Ticket


@dataclasses.dataclass(eq=False)
class _Waiter:
    """A request that waits for a place, and the endpoints that it failed at."""

    place: asyncio.Future[_Place]
    avoid: frozenset[str]
    since: float


class JudgePool:
    """An endpoint made of servers; it lives on one event loop.

    A request goes to the least loaded endpoint that is up and within its limits, or waits its
    turn. A transient failure sends it elsewhere; the endpoint cools down, with growing back-off,
    and must answer a probe (a copy of a request) before it gets requests again.

    Args:
      config: the servers.
      budget: what may be spent; None for anything.

    Raises:
      KeyMissingError: a variable named by `key_env` holds no key.
    """

    def __init__(self, config: PoolConfig, budget: Budget | None = None):
        self.config, self.budget = config, budget or Budget()
        self._members = [
            _Member(OpenAIJudge(endpoint, config.request), config.cool_down)
            for endpoint in config.endpoints
        ]
        self._waiting: collections.deque[_Waiter] = collections.deque()
        self._probes: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._down_since: float | None = None
        self._answered: tuple[JudgeRequest, Content] | None = None
        self._hedges = 0
        self._closed = False

    @property
    def clients(self) -> Sequence[OpenAIJudge]:
        """One client per endpoint, in the order of the config."""
        return [member.client for member in self._members]

    @property
    def fingerprint(self) -> str:
        """Digest of the models and of how they are asked; not of how many servers there are."""
        kinds = sorted({member.client.fingerprint for member in self._members})
        return hashlib.sha256("/".join(kinds).encode()).hexdigest()

    @property
    def trouble(self) -> str | None:
        """While no endpoint is up: since when, and what each said; None otherwise.

        May be read on any thread.
        """
        since = self._down_since
        if since is None:
            return None
        return f"no judge has been up for {time.monotonic() - since:.0f} s ({self._said()})"[:600]

    async def answer(self, request: JudgeRequest) -> Answer:
        """One verified answer.

        Raises:
          TransientJudgeError: `tries` failed.
          NoJudgeError: nothing was up for `patience`.
          PermanentJudgeError: an endpoint refuses the picture.
          BudgetError: nothing may be spent any more.
        """
        tries = self.config.tries
        content = await asyncio.to_thread(content_of, request, self.config.request)
        request = dataclasses.replace(request, repeat=request.repeat * tries)
        avoid: frozenset[str] = frozenset()
        for attempt in range(1, tries + 1):
            place = await self._place(avoid)
            try:
                answer = await self._hedged(place, request, content, avoid)
                answer.tries = attempt
                return answer
            except TransientJudgeError as error:
                if attempt == tries:
                    told = f"{error} (try {attempt} of {tries})"
                    raise type(error)(told, tries=attempt) from None
                avoid |= {place.member.name}
                if isinstance(error, BrokenAnswerError):  # another seed, not the same answer
                    request = dataclasses.replace(request, repeat=request.repeat + 1)
        raise AssertionError("the tries end in an answer or an error")

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers for a metrics writer: of the pool, then by endpoint."""
        states = [member.state for member in self._members]
        answering = [state for state in states if state.answers]
        found = {
            "up": float(sum(state.health == "up" for state in states)),
            "waiting": float(len(self._waiting)),
            "hedges": float(self._hedges),
            "requests": float(self.budget.requests),
            "tokens": float(self.budget.tokens),
            "p50": max((state.percentile(0.5) for state in answering), default=math.nan),
            "p95": max((state.percentile(0.95) for state in answering), default=math.nan),
        }
        for member in self._members:
            found |= {f"{member.name}/{k}": v for k, v in member.state.metrics().items()}
        return found

    async def aclose(self) -> None:
        """Ends probes and connections."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        probes = tuple(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        for member in self._members:
            await member.client.aclose()

    # Places ---------------------------------------------------------------------------------

    async def _place(self, avoid: frozenset[str]) -> _Place:
        """Waits for an endpoint that takes a request."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiter(future, avoid, time.monotonic()))
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                place = future.result()
                place.member.state.withdraw(place.ticket)
            future.cancel()
            self._dispatch()
            raise

    def _dispatch(self) -> None:
        """Hands out free places in order of arrival, and sets the alarm for what is left."""
        if self._closed:
            return
        now = time.monotonic()
        self._probe_the_rested(now)
        if any(member.state.health == "up" for member in self._members):
            self._down_since = None
        elif self._down_since is None:
            self._down_since = now
        left: collections.deque[_Waiter] = collections.deque()
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.place.done():  # cancelled
                continue
            member = self._choose(now, waiter.avoid)
            if member is not None:
                waiter.place.set_result(_Place(member, member.state.start(now)))
            elif self._given_up_at(waiter) <= now:
                waiter.place.set_exception(NoJudgeError(self._complaint()))
            else:
                left.append(waiter)
                if not waiter.avoid and self._down_since is None:  # none behind it is luckier
                    left.extend(self._waiting)
                    self._waiting.clear()
        self._waiting = left
        self._set_alarm(now)

    def _choose(self, now: float, avoid: frozenset[str]) -> _Member | None:
        """The least loaded endpoint that is ready; one to avoid only if all others are down."""
        elsewhere = [member for member in self._members if member.name not in avoid]
        if not any(member.state.health == "up" for member in elsewhere):
            elsewhere = self._members
        ready = [member for member in elsewhere if member.state.ready_at(now) <= now]
        return min(ready, key=lambda m: (m.state.load, m.state.requests), default=None)

    def _given_up_at(self, waiter: _Waiter) -> float:
        if self._down_since is None:
            return math.inf
        return max(waiter.since, self._down_since) + self.config.patience

    def _complaint(self) -> str:
        return f"no judge was up for {self.config.patience:g} s ({self._said()})"[:600]

    def _said(self) -> str:
        return "; ".join(
            m.state.last_error
            if m.state.last_error.startswith(m.name)
            else f"{m.name}: {m.state.last_error}"
            for m in self._members
        )

    def _set_alarm(self, now: float) -> None:
        """Wakes the dispatcher when something will have changed by itself."""
        if self._alarm is not None:
            self._alarm.cancel()
        moments = [m.state.wake_at for m in self._members if m.state.health == "cooling"]
        if self._waiting:
            moments += [member.state.ready_at(now) for member in self._members]
            moments.append(min(map(self._given_up_at, self._waiting)))
        next_one = min(moments, default=math.inf)
        if math.isfinite(next_one):
            delay = max(next_one - now, 0.01)
            self._alarm = asyncio.get_running_loop().call_later(delay, self._dispatch)

    def _probe_the_rested(self, now: float) -> None:
        for member in self._members:
            shown = self._answered or member.failed
            if shown is not None and member.state.rested(now):
                member.state.health = "probing"
                place = _Place(member, member.state.start(now))
                task = asyncio.get_running_loop().create_task(self._probe(place, *shown))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probe(self, place: _Place, request: JudgeRequest, content: Content) -> None:
        """Asks a cooled endpoint something, for no other purpose than to see it answer."""
        try:
            await self._attempt(place, request, content)
            _log.info("Judge %s answers again.", place.member.name)
        except JudgeError as error:
            _log.debug("Judge %s does not answer yet: %s", place.member.name, error)
        finally:
            place.member.state.cut_short(time.monotonic())

    # Requests -------------------------------------------------------------------------------

    async def _attempt(self, place: _Place, request: JudgeRequest, content: Content) -> Answer:
        """Sends one request; whatever happens, the place is given back and the cost counted."""
        member, tokens = place.member, None
        try:
            self.budget.request()
            answer = await member.client.ask(request, content)
            tokens = answer.tokens
            member.state.succeeded(answer.seconds)
            self._answered = request, content
            return answer
        except PermanentJudgeError as error:
            tokens = error.tokens
            member.state.succeeded(None)
            raise
        except TransientJudgeError as error:
            tokens = error.tokens
            member.failed = request, content
            self._record(member, error)
            raise
        finally:
            member.state.end(place.ticket, tokens)
            self.budget.answered(tokens or 0)
            self._dispatch()

    def _record(self, member: _Member, error: TransientJudgeError) -> None:
        before = member.state.health
        now = time.monotonic()
        member.state.failed(error, now)
        if before == "up" and member.state.health == "cooling":
            wait = member.state.wake_at - now
            _log.warning("Judge %s cools down for %.1f s: %s", member.name, wait, error)

    async def _hedged(
        self, place: _Place, request: JudgeRequest, content: Content, avoid: frozenset[str]
    ) -> Answer:
        """The answer of this place, or of a second one if the first takes long."""
        if self.config.hedge_after is None:
            return await self._attempt(place, request, content)
        running = {asyncio.ensure_future(self._attempt(place, request, content)): place.member}
        try:
            await asyncio.wait(running, timeout=self.config.hedge_after)
            second = None
            if not any(task.done() for task in running):
                second = self._idle(avoid | {place.member.name})
            if second is not None:
                self._hedges += 1
                task = asyncio.ensure_future(self._attempt(second, request, content))
                running[task] = second.member
            return await self._first(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _first(self, running: dict[asyncio.Task[Answer], _Member]) -> Answer:
        """The first good answer; if all fail, the last error."""
        left = set(running)
        while True:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            failures = [task for task in done if task.exception() is not None]
            for task in done.difference(failures):
                first = next(iter(running))
                if first in left:
                    self._record(running[first], _Overtaken("a hedge was answered first"))
                return task.result()
            refused = [t for t in failures if not isinstance(t.exception(), TransientJudgeError)]
            if refused or not left:
                return (refused or failures)[0].result()  # raises

    def _idle(self, avoid: frozenset[str]) -> _Place | None:
        """A place for a hedge: only where nobody has to wait for it."""
        now = time.monotonic()
        ready = [m for m in self._members if m.name not in avoid and m.state.ready_at(now) <= now]
        if self._waiting or not ready:
            return None
        member = min(ready, key=lambda m: m.state.load)
        return _Place(member, member.state.start(now))

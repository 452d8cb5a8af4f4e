"""What a pool knows about one of its endpoints: load, limits, health, latency."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Literal

import numpy as np

from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.types import BrokenAnswerError, TransientJudgeError

Health = Literal["up", "cooling", "probing"]

_MINUTE = 60.0
_FIRST_ESTIMATE = 1000  # tokens per request, until one was answered


@dataclasses.dataclass(frozen=True)
class CoolDown:
    """How long an endpoint that fails is left alone.

    Attributes:
      first: seconds after the first failure; each further one doubles it.
      longest: seconds at most; a server that asks for longer gets it.
      broken: broken answers in a row that count as one failure.
    """

    first: float = 1.0
    longest: float = 60.0
    broken: int = 3

    def __post_init__(self) -> None:
        if not self.first > 0:
            raise ValueError(f"first is {self.first}: please choose a number of seconds above 0")
        if self.longest < self.first:
            raise ValueError(f"longest is {self.longest}: please choose at least first")
        if self.broken < 1:
            raise ValueError(f"broken is {self.broken}: please choose at least 1")


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request in the last minute: when it started, and its (estimated) tokens."""

    time: float
    tokens: float


class EndpointState:
    """Bookkeeping without a clock of its own: every method is told the time, in seconds."""

    def __init__(self, config: EndpointConfig, cool_down: CoolDown):
        self.config, self._cool_down = config, cool_down
        self.health: Health = "up"
        self.in_flight = 0
        self.wake_at = 0.0
        self.requests = self.answers = self.tokens = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.last_error = ""
        self._strikes = 0
        self._broken = 0
        self._estimate = float(_FIRST_ESTIMATE)
        self._latencies: collections.deque[float] = collections.deque(maxlen=512)
        self._window: collections.deque[Ticket] = collections.deque()

    @property
    def load(self) -> float:
        """Share of its places that are taken."""
        return self.in_flight / self.config.concurrency

    def ready_at(self, now: float) -> float:
        """When it can take a request: now, later, or (inf) once another one has ended."""
        if self.health != "up":
            return math.inf
        if self.in_flight >= self.config.concurrency:
            return math.inf
        return self._within_limits_at(now)

    def rested(self, now: float) -> bool:
        """Whether the cool-down is over, and a probe would be within its limits."""
        return (
            self.health == "cooling"
            and self.wake_at <= now
            and self.in_flight < self.config.concurrency
            and self._within_limits_at(now) <= now
        )

    def start(self, now: float) -> Ticket:
        """Takes a place; the ticket is handed back to `end`."""
        ticket = Ticket(now, self._estimate)
        self._window.append(ticket)
        self.in_flight += 1
        self.requests += 1
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Gives back a place that was never used."""
        self.in_flight -= 1
        self.requests -= 1
        if ticket in self._window:
            self._window.remove(ticket)

    def end(self, ticket: Ticket, tokens: int | None) -> None:
        """Gives the place back; None where the cost never became known."""
        self.in_flight -= 1
        if tokens is not None:
            ticket.tokens = tokens
            self.tokens += tokens
        if tokens:
            self._estimate += 0.2 * (tokens - self._estimate)

    def succeeded(self, seconds: float | None) -> None:
        """Records an answer, or a refusal (None), which also shows that the server is well.

        Strikes are forgiven one by one, so that flaky servers rest longer. It ends a probe, but no
        cool-down: what was in flight says nothing about a Retry-After.
        """
        self.answers += 1
        if self.health == "probing":
            self.health = "up"
        self._strikes = max(0, self._strikes - 1)
        self._broken = 0
        if seconds is not None:
            self._latencies.append(seconds)

    def failed(self, error: TransientJudgeError, now: float) -> None:
        """Records a failure, and cools down unless that is under way already."""
        self.errors[type(error).__name__] += 1
        self.last_error = str(error)
        if isinstance(error, BrokenAnswerError) and self.health == "up":
            self._broken += 1
            if self._broken < self._cool_down.broken:
                return
        if self.health != "cooling":  # all requests in flight fail together: one strike
            self._strikes += 1
            self._broken = 0
            self.health = "cooling"
            wait = self._cool_down.first * 2 ** min(self._strikes - 1, 30)
            self.wake_at = now + min(wait, self._cool_down.longest)
        if error.retry_after is not None:
            self.wake_at = max(self.wake_at, now + error.retry_after)

    def cut_short(self, now: float) -> None:
        """Ends a probe that told nothing (no budget, say): the next one is not hurried."""
        if self.health == "probing":
            self.health = "cooling"
            self.wake_at = now + self._cool_down.longest

    def percentile(self, share: float) -> float:
        """Latency in seconds of recent answers; nan without any."""
        return float(np.quantile(self._latencies, share)) if self._latencies else math.nan

    def metrics(self) -> dict[str, float]:
        """Numbers for a metrics writer."""
        return {
            "up": float(self.health == "up"),
            "in_flight": float(self.in_flight),
            "requests": float(self.requests),
            "answers": float(self.answers),
            "errors": float(self.errors.total()),
            "tokens": float(self.tokens),
            "p50": self.percentile(0.5),
            "p95": self.percentile(0.95),
        }

    def _within_limits_at(self, now: float) -> float:
        window, config = self._window, self.config
        while window and window[0].time <= now - _MINUTE:
            window.popleft()
        ready = now
        if config.requests_per_minute is not None and len(window) >= config.requests_per_minute:
            ready = window[-config.requests_per_minute].time + _MINUTE
        if config.tokens_per_minute is None:
            return ready
        excess = sum(t.tokens for t in window) + self._estimate - config.tokens_per_minute
        for ticket in window:  # an estimate above the limit itself waits for an empty window
            if excess <= 0:
                break
            excess -= ticket.tokens
            ready = max(ready, ticket.time + _MINUTE)
        return ready

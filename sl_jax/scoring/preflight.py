"""Before weights are loaded: one real call of each kind per endpoint, and what a run will cost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from sl_jax import imaging
from sl_jax.scoring import request as rendering
from sl_jax.scoring.cases import design
from sl_jax.scoring.openai_client import OpenAIJudge
from sl_jax.scoring.pool import JudgePool
from sl_jax.scoring.rubric import load_prompts
from sl_jax.scoring.types import (
    Answer,
    Group,
    JudgeRequest,
    PermanentJudgeError,
    PreflightError,
    TransientJudgeError,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EndpointReport:
    """What one endpoint did with a stage-1 call and a grid.

    Attributes:
      name: of the endpoint.
      problems: what stands in the way; empty if it can judge.
      structure: how it takes JSON schemas: "schema", "object" or "text"; "" if unknown.
      concurrency: requests in flight that it is given.
      seconds, tokens: of the stage-1 call and of the grid; 0 where that failed.
    """

    name: str
    problems: tuple[str, ...]
    structure: str
    concurrency: int
    seconds: tuple[float, float]
    tokens: tuple[int, int]

    def to_text(self) -> str:
        """One line."""
        if self.problems:
            return f"judge {self.name}: cannot judge: {'; '.join(self.problems)}"
        return (
            f"judge {self.name}: ready (JSON by {self.structure}); one candidate "
            f"{self.seconds[0]:.1f} s, {self.tokens[0]} tokens; one grid {self.seconds[1]:.1f} s, "
            f"{self.tokens[1]} tokens"
        )


async def preflight(
    pool: JudgePool,
    *,
    size: int = 256,
    layers: int = 4,
    group_size: int = 8,
    render: rendering.RenderConfig | None = None,
    prompts: str | None = None,
    asks: int = 2,
) -> tuple[EndpointReport, ...]:
    """Calls every endpoint once per stage, at the size, layers and group size of the run.

    Wrong models and keys, missing vision, limits on pictures and schema support show here.

    Raises:
      PreflightError: no endpoint can judge.
      BudgetError: the pool may spend nothing.
    """
    render = render or rendering.RenderConfig()
    requests = _requests(size, layers, group_size, render, prompts)
    reports = await asyncio.gather(
        *(_check(pool, client, requests, asks) for client in pool.clients)
    )
    for report in reports:
        _log.log(logging.WARNING if report.problems else logging.INFO, "%s", report.to_text())
    if all(report.problems for report in reports):
        told = "\n  ".join(report.to_text() for report in reports)
        raise PreflightError(f"no endpoint of the judge pool can judge:\n  {told}")
    return tuple(reports)


def _requests(
    size: int, layers: int, group_size: int, render: rendering.RenderConfig, prompts: str | None
) -> tuple[JudgeRequest, JudgeRequest]:
    built = design(size)
    spare = np.zeros_like(built[:1])
    stack = np.concatenate([built, *[spare] * max(0, layers - len(built))])[:layers]
    group = Group("preflight", imaging.recompose(built), (stack,) * group_size)
    texts = load_prompts(prompts)
    arrangement = rendering.shuffle(range(group_size), 0, group.group_id, 0)
    return (
        rendering.candidate_request(group.source, stack, texts, render),
        rendering.grid_request(group, arrangement, np.full(group_size, 0.5), texts, render),
    )


async def _check(
    pool: JudgePool, client: OpenAIJudge, requests: Sequence[JudgeRequest], asks: int
) -> EndpointReport:
    problems: list[str] = []
    answers: list[Answer] = []
    for request in requests:
        try:
            answers.append(await _ask(pool, client, request, asks))
        except (TransientJudgeError, PermanentJudgeError) as error:
            problems.append(f"stage {request.stage}: {error}")
            answers.append(Answer(""))
    if problems:
        problems += await _wrong_model(client)
    return EndpointReport(
        client.name,
        tuple(problems),
        client.structure or "",
        client.endpoint.concurrency,
        (answers[0].seconds, answers[1].seconds),
        (answers[0].tokens, answers[1].tokens),
    )


async def _ask(pool: JudgePool, client: OpenAIJudge, request: JudgeRequest, asks: int) -> Answer:
    for repeat in range(asks):
        pool.budget.request()
        try:
            answer = await client.answer(dataclasses.replace(request, repeat=repeat))
            pool.budget.answered(answer.tokens)
            return answer
        except TransientJudgeError as error:
            pool.budget.answered(error.tokens)
            if repeat == asks - 1:
                raise
    raise AssertionError("asks is at least 1")


async def _wrong_model(client: OpenAIJudge) -> list[str]:
    """A hint where the server lists models, and not the one that was asked for."""
    try:
        listed = await client.models()
    except TransientJudgeError:
        return []
    if not listed or client.endpoint.model in listed:
        return []
    return [f"the server lists {', '.join(listed[:8])}, not {client.endpoint.model}"]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What judging will take, estimated from a preflight.

    Attributes:
      calls, tokens, seconds: per epoch; seconds are those of the judge alone.
      run_calls, run_tokens, run_seconds: of the whole run, evaluations included.
    """

    calls: int
    tokens: int
    seconds: float
    run_calls: int
    run_tokens: int
    run_seconds: float

    def to_text(self) -> str:
        """One line."""
        return (
            f"judging takes about {self.seconds:.0f} s, {self.calls} calls and {self.tokens} "
            f"tokens per epoch; {self.run_seconds / 3600:.1f} h, {self.run_calls} calls and "
            f"{self.run_tokens} tokens for the run"
        )


def forecast(
    reports: Sequence[EndpointReport],
    *,
    groups: int,
    group_size: int,
    grids: int,
    epochs: int,
    evaluation_calls: int = 0,
) -> Forecast:
    """Estimates from the endpoints that can judge.

    Args:
      reports: of a preflight.
      groups, group_size: per epoch, and candidates of each.
      grids: per group; 0 without stage 2.
      epochs: of the run.
      evaluation_calls: stage-1 calls of all evaluations together.

    Raises:
      ValueError: no endpoint can judge.
    """
    able = [report for report in reports if not report.problems]
    if not able:
        raise ValueError("a forecast needs an endpoint that can judge")
    places = sum(report.concurrency for report in able)
    shares = np.array([report.concurrency / places for report in able])
    # An endpoint's share of the calls grows with its places and its pace.
    seconds = [
        1 / sum(r.concurrency / max(r.seconds[stage], 1e-3) for r in able) for stage in (0, 1)
    ]
    tokens = [float(shares @ [r.tokens[stage] for r in able]) for stage in (0, 1)]
    counts = (groups * group_size, groups * grids)
    per_epoch = [
        sum(n * x for n, x in zip(counts, cost, strict=True)) for cost in (tokens, seconds)
    ]
    return Forecast(
        calls=sum(counts),
        tokens=round(per_epoch[0]),
        seconds=per_epoch[1],
        run_calls=epochs * sum(counts) + evaluation_calls,
        run_tokens=round(epochs * per_epoch[0] + evaluation_calls * tokens[0]),
        run_seconds=epochs * per_epoch[1] + evaluation_calls * seconds[0],
    )

"""Before weights are loaded: one real call of each kind per endpoint, and what a run will cost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from sl_jax import imaging
from sl_jax.scoring import captions
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
    """What one endpoint did with a stage-1 call and a grid, and maybe with a caption.

    Attributes:
      name: of the endpoint.
      problems: what stands in the way; empty if it can judge.
      structure: how it takes JSON schemas: "schema", "object" or "text"; "" if unknown.
      concurrency: requests in flight that it is given.
      seconds, tokens: of the stage-1 call and of the grid; 0 where that failed.
      caption_seconds, caption_tokens: of the caption; 0 where that failed or was not asked for.
    """

    name: str
    problems: tuple[str, ...]
    structure: str
    concurrency: int
    seconds: tuple[float, float]
    tokens: tuple[int, int]
    caption_seconds: float = 0.0
    caption_tokens: int = 0

    def to_text(self) -> str:
        """One line."""
        if self.problems:
            return f"judge {self.name}: cannot judge: {'; '.join(self.problems)}"
        caption = f"; one caption {self.caption_seconds:.1f} s, {self.caption_tokens} tokens"
        return (
            f"judge {self.name}: ready (JSON by {self.structure}); one candidate "
            f"{self.seconds[0]:.1f} s, {self.tokens[0]} tokens; one grid {self.seconds[1]:.1f} s, "
            f"{self.tokens[1]} tokens{caption if self.caption_seconds else ''}"
        )


async def preflight(
    pool: JudgePool,
    *,
    size: int = 256,
    layers: int = 4,
    group_size: int = 8,
    render: rendering.RenderConfig | None = None,
    prompts: str | None = None,
    caption: bool = False,
    asks: int = 2,
) -> tuple[EndpointReport, ...]:
    """Calls every endpoint once per stage, at the size, layers and group size of the run.

    Wrong models and keys, missing vision, limits on pictures and schema support show here. With
    `caption`, each is asked to describe a picture, too: one that does not is no help to a run that
    needs captions.

    Raises:
      PreflightError: no endpoint can judge.
      BudgetError: the pool may spend nothing.
    """
    render = render or rendering.RenderConfig()
    requests = _requests(size, layers, group_size, render, prompts, caption)
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
    size: int,
    layers: int,
    group_size: int,
    render: rendering.RenderConfig,
    prompts: str | None,
    caption: bool,
) -> list[JudgeRequest]:
    """Of stage 1, of a grid, and of a caption if it is wanted."""
    built = design(size)
    spare = np.zeros_like(built[:1])
    stack = np.concatenate([built, *[spare] * max(0, layers - len(built))])[:layers]
    group = Group("preflight", imaging.recompose(built), (stack,) * group_size)
    texts = load_prompts(prompts)
    arrangement = rendering.shuffle(range(group_size), 0, group.group_id, 0)
    requests = [
        rendering.candidate_request(group.source, stack, texts, render),
        rendering.grid_request(group, arrangement, np.full(group_size, 0.5), texts, render),
    ]
    if caption:
        template, config = captions.load_template(prompts), captions.CaptionConfig()
        requests.append(captions.caption_request(group.source, template, config))
    return requests


async def _check(
    pool: JudgePool, client: OpenAIJudge, requests: Sequence[JudgeRequest], asks: int
) -> EndpointReport:
    problems: list[str] = []
    answers: list[Answer] = []
    for request in requests:
        try:
            answers.append(await _ask(pool, client, request, asks))
        except (TransientJudgeError, PermanentJudgeError) as error:
            problems.append(f"{_asked_for(request)}: {error}")
            answers.append(Answer(""))
    if problems:
        problems += await _wrong_model(client)
    described = answers[2] if len(answers) > 2 else Answer("")
    return EndpointReport(
        client.name,
        tuple(problems),
        client.structure or "",
        client.endpoint.concurrency,
        (answers[0].seconds, answers[1].seconds),
        (answers[0].tokens, answers[1].tokens),
        described.seconds,
        described.tokens,
    )


def _asked_for(request: JudgeRequest) -> str:
    return f"stage {request.stage}" if request.stage else "captions (config.data.caption)"


async def _ask(pool: JudgePool, client: OpenAIJudge, request: JudgeRequest, asks: int) -> Answer:
    for repeat in range(asks):
        pool.budget.request()
        try:
            answer = await client.answer(dataclasses.replace(request, repeat=repeat))
            pool.budget.answered(answer.tokens)
            return answer
        except (TransientJudgeError, PermanentJudgeError) as error:
            pool.budget.answered(error.tokens)
            if repeat == asks - 1 or isinstance(error, PermanentJudgeError):
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
      run_calls, run_tokens, run_seconds: of the whole run, evaluations and captions included.
      captions: calls of these that ask for captions, before the first epoch.
    """

    calls: int
    tokens: int
    seconds: float
    run_calls: int
    run_tokens: int
    run_seconds: float
    captions: int = 0

    def to_text(self) -> str:
        """One line."""
        captions = f", at most {self.captions} captions among them" if self.captions else ""
        return (
            f"judging takes about {self.seconds:.0f} s, {self.calls} calls and {self.tokens} "
            f"tokens per epoch; {self.run_seconds / 3600:.1f} h, {self.run_calls} calls and "
            f"{self.run_tokens} tokens for the run{captions}"
        )


def forecast(
    reports: Sequence[EndpointReport],
    *,
    groups: int,
    group_size: int,
    grids: int,
    epochs: int,
    evaluation_calls: int = 0,
    caption_calls: int = 0,
) -> Forecast:
    """Estimates from the endpoints that can judge.

    Args:
      reports: of a preflight.
      groups, group_size: per epoch, and candidates of each.
      grids: per group; 0 without stage 2.
      epochs: of the run.
      evaluation_calls: stage-1 calls of all evaluations together.
      caption_calls: pictures that are to be described, by endpoints that were tried with one.

    Raises:
      ValueError: no endpoint can judge.
    """
    able = [report for report in reports if not report.problems]
    if not able:
        raise ValueError("a forecast needs an endpoint that can judge")
    concurrency = np.array([report.concurrency for report in able])
    shares = concurrency / concurrency.sum()
    # An endpoint's share of the calls grows with its places and its pace.
    seconds = [
        1 / sum(places / max(pace, 1e-3) for places, pace in zip(concurrency, took, strict=True))
        for took in zip(*((*r.seconds, r.caption_seconds) for r in able), strict=True)
    ]
    tokens = [
        float(shares @ cost)
        for cost in zip(*((*r.tokens, r.caption_tokens) for r in able), strict=True)
    ]
    counts = (groups * group_size, groups * grids)
    per_epoch = [
        sum(n * x for n, x in zip(counts, cost[:2], strict=True)) for cost in (tokens, seconds)
    ]
    return Forecast(
        calls=sum(counts),
        tokens=round(per_epoch[0]),
        seconds=per_epoch[1],
        run_calls=epochs * sum(counts) + evaluation_calls + caption_calls,
        run_tokens=round(
            epochs * per_epoch[0] + evaluation_calls * tokens[0] + caption_calls * tokens[2]
        ),
        run_seconds=epochs * per_epoch[1]
        + evaluation_calls * seconds[0]
        + caption_calls * seconds[2],
        captions=caption_calls,
    )

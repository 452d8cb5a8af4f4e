"""The two-stage judge, and the thread that runs it beside training."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Float

from sl_jax.scoring import request as rendering
from sl_jax.scoring import rubric
from sl_jax.scoring.types import (
    CRITERIA,
    Answer,
    Call,
    Endpoint,
    Failure,
    Group,
    GroupScores,
    JudgeRequest,
    PermanentJudgeError,
    TransientJudgeError,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Settings of the two-stage judge.

    Attributes:
      weights: one non-negative weight per criterion, in the order of `CRITERIA`.
      two_stage: whether groups are compared in a grid after stage 1.
      stage2_weight: λ in reward = (1 − λ)·stage 1 + λ·stage 2.
      grids: how many differently shuffled grids are asked for and averaged.
      asks: how often a request is sent before its candidate (or the grid) counts as failed; what
        a pool sends by itself counts, and is not cut short.
      render: how pictures are laid out.
      prompts: folder with candidate.md and grid.md; None for the packaged ones.
      seed: determines, with a group's id, the shuffles of the grid.
      sample: which of several independent judgements of the same groups this is (test–retest).
    """

    weights: tuple[float, ...] = (1.0,) * len(CRITERIA)
    two_stage: bool = True
    stage2_weight: float = 0.7
    grids: int = 1
    asks: int = 3
    render: rendering.RenderConfig = dataclasses.field(default_factory=rendering.RenderConfig)
    prompts: str | None = None
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        if len(self.weights) != len(CRITERIA) or min(self.weights) < 0 or not sum(self.weights):
            raise ValueError(
                f"weights {self.weights}: please give {len(CRITERIA)} non-negative numbers, "
                f"not all 0, for {', '.join(CRITERIA)}"
            )
        if not 0 <= self.stage2_weight <= 1:
            raise ValueError(f"stage2_weight {self.stage2_weight}: please choose it in 0…1")
        for name in ("grids", "asks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: please choose at least 1")


class _Tally:
    """What the answers of one group cost."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.asks = 0
        self.tokens = 0
        self.endpoints: set[str] = set()
        self.calls: list[Call] = []

    def count(self, stage: int, index: int, answer: str) -> None:
        if isinstance(answer, Answer):
            self.tokens += answer.tokens
            self.endpoints.add(answer.endpoint)
            self.calls.append(
                Call(stage, index, answer.endpoint, answer.seconds, answer.tokens, answer.cached)
            )


class _Comparison(NamedTuple):
    """Stage 2 of a group: [grids, G] scores (nan where none) and the places they were shown at."""

    scores: Float[np.ndarray, "grids g"]
    permutations: np.ndarray
    failure: Failure | None


class TwoStageJudge:
    """Scores groups by asking an endpoint: each candidate alone, then all side by side.

    A judgement depends on the group, the config and the endpoint's answers only: never on
    timing or on other groups.
    """

    def __init__(self, endpoint: Endpoint, config: JudgeConfig | None = None):
        self.endpoint = endpoint
        self.config = config or JudgeConfig()
        self.prompts = rubric.load_prompts(self.config.prompts)

    async def judge(self, group: Group) -> GroupScores:
        """Both stages. Failures are recorded in the scores, never replaced by numbers.

        Stage 2 compares the candidates that stage 1 judged, if there are at least two; where it
        fails, the whole group keeps stage 1 and `two_stage` is False.
        """
        tally = _Tally()
        verdicts = await asyncio.gather(
            *(self._judge_candidate(group, index, tally) for index in range(len(group.candidates)))
        )
        valid = np.array([not isinstance(verdict, Failure) for verdict in verdicts])
        criteria = np.full((len(verdicts), len(CRITERIA)), np.nan)
        for index in np.flatnonzero(valid):
            criteria[index] = verdicts[index].scores()
        stage1 = criteria @ (np.array(self.config.weights) / sum(self.config.weights))
        compared = await self._compare(group, np.flatnonzero(valid), stage1, tally)
        two_stage = bool(np.isfinite(compared.scores).any())
        stage2 = compared.scores.mean(axis=0) if two_stage else np.full(len(verdicts), np.nan)
        weight = self.config.stage2_weight
        return GroupScores(
            group_id=group.group_id,
            criteria=criteria,
            stage1=stage1,
            stage2=stage2,
            reward=(1 - weight) * stage1 + weight * stage2 if two_stage else stage1.copy(),
            valid=valid,
            two_stage=two_stage,
            reasons=tuple(() if isinstance(v, Failure) else v.reasons() for v in verdicts),
            failures=tuple(v if isinstance(v, Failure) else None for v in verdicts),
            grid_failure=compared.failure,
            capped=np.zeros(len(verdicts), bool),
            grid_scores=compared.scores,
            permutations=compared.permutations,
            endpoints=tuple(sorted(tally.endpoints)),
            asks=tally.asks,
            tokens=tally.tokens,
            seconds=time.monotonic() - tally.started,
            calls=tuple(sorted(tally.calls)),
        )

    async def compare(self, group: Group) -> float | Failure:
        """Two candidates in two grids, both orders, without stage-1 scores: a win rate.

        Returns:
          The share of the two grids that the second candidate wins, a tie counting as half; or
          why a grid failed.
        """
        if len(group.candidates) != 2:
            raise ValueError(f"{len(group.candidates)} candidates: a comparison takes exactly 2")
        wins, tally = [], _Tally()
        for order in ((0, 1), (1, 0)):
            arrangement = rendering.Shuffle(np.array(order), ("A", "B"))
            scores = await self._ask_grid(group, arrangement, None, 0, tally)
            if isinstance(scores, Failure):
                return scores
            first, second = (scores[order.index(candidate)] for candidate in (0, 1))
            wins.append(0.5 * (1 + np.sign(second - first)))
        return float(np.mean(wins))

    async def _judge_candidate(
        self, group: Group, index: int, tally: _Tally
    ) -> rubric.CandidateVerdict | Failure:
        request = await asyncio.to_thread(  # the loop has answers to attend to
            rendering.candidate_request,
            *(group.source, group.candidates[index], self.prompts, self.config.render),
            group.caption,
        )
        return await self._ask(request, rubric.parse_candidate, index, tally)

    async def _compare(
        self, group: Group, shown: np.ndarray, stage1: np.ndarray, tally: _Tally
    ) -> _Comparison:
        shape = (self.config.grids if self.config.two_stage else 0, len(group.candidates))
        scores, permutations = np.full(shape, np.nan), np.full(shape, -1)
        if not self.config.two_stage or len(shown) < 2:
            return _Comparison(scores, permutations, None)
        arrangements = [
            rendering.shuffle(shown, self.config.seed, group.group_id, grid)
            for grid in range(self.config.grids)
        ]
        answers = await asyncio.gather(
            *(
                self._ask_grid(group, arrangement, stage1, grid, tally)
                for grid, arrangement in enumerate(arrangements)
            )
        )
        for grid, (arrangement, answer) in enumerate(zip(arrangements, answers, strict=True)):
            permutations[grid, arrangement.places] = np.arange(len(shown))
            if not isinstance(answer, Failure):
                scores[grid, arrangement.places] = answer
        failure = next((answer for answer in answers if isinstance(answer, Failure)), None)
        if failure is not None:  # shuffles cancel position bias only if all of them count
            scores[...] = np.nan
        return _Comparison(scores, permutations, failure)

    async def _ask_grid(
        self,
        group: Group,
        arrangement: rendering.Shuffle,
        stage1: np.ndarray | None,
        grid: int,
        tally: _Tally,
    ) -> Float[np.ndarray, " shown"] | Failure:
        request = await asyncio.to_thread(
            rendering.grid_request,
            *(group, arrangement, stage1, self.prompts, self.config.render),
        )
        return await self._ask(
            request, lambda text: rubric.parse_grid(text, arrangement.labels), grid, tally
        )

    async def _ask(
        self, request: JudgeRequest, parse: Callable[[str], T], index: int, tally: _Tally
    ) -> T | Failure:
        """Asks until an answer parses, or the request was sent `asks` times or more.

        `index` is the candidate's, or the grid's: equal grids are still asked one by one.
        """
        sample = self.config.sample * self.config.grids + (index if request.stage == 2 else 0)
        sent = repeat = 0
        reason = ""
        while sent < self.config.asks:
            tries = 1
            try:
                answer = await self.endpoint.answer(
                    dataclasses.replace(request, repeat=repeat, sample=sample)
                )
                tries = getattr(answer, "tries", 1)
                tally.count(request.stage, index, answer)
                return parse(answer)
            except PermanentJudgeError as error:
                return Failure(permanent=True, reason=str(error))
            except TransientJudgeError as error:
                tries, reason = error.tries, str(error)
            finally:
                tally.asks += tries
            sent, repeat = sent + tries, repeat + 1
        return Failure(permanent=False, reason=f"{sent} asks failed; last: {reason}")


class JudgeWorker:
    """Judges groups on a thread of its own, so that training goes on meanwhile.

    Args:
      judge: the judge; its endpoint is closed with the worker if it has a method `aclose`.
      concurrency: groups in flight at most; others wait their turn in the order of submission.
      beside: a worker whose thread this one shares, which is needed when their judges share an
        endpoint with connections; it must be closed after this one.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self, judge: TwoStageJudge, concurrency: int = 8, beside: JudgeWorker | None = None
    ):
        self._judge = judge
        self._host = beside
        self._loop = beside._loop if beside else asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrency)
        self._closed = False
        self._gate = threading.Lock()  # nothing is queued on a loop that was told to stop
        self._open: set[concurrent.futures.Future[Any]] = set()
        self._thread = (
            beside._thread
            if beside
            else threading.Thread(target=self._run, name="judge", daemon=True)
        )
        if beside is None:
            self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        """Who answers the judge's requests."""
        return self._judge.endpoint

    def submit(self, group: Group) -> concurrent.futures.Future[GroupScores]:
        """Queues a group; the future's `cancel` stops its judgement at the next answer.

        Raises:
          RuntimeError: the worker is closed.
        """
        return self.call(self._take_turn(group))

    def call(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine where the endpoint's connections live, such as a preflight.

        Raises:
          RuntimeError: the worker is closed.
        """
        with self._gate:
            if self._closed or (self._host and self._host._closed):
                work.close()
                raise RuntimeError("this JudgeWorker is closed: please make another one")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def judge_all(self, groups: Iterable[Group]) -> Iterator[GroupScores]:
        """Yields the scores of the groups as they finish; stopping early cancels the rest."""
        futures = [self.submit(group) for group in groups]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Cancels what is unfinished and ends the thread; futures still open are cancelled."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        for future in tuple(self._open):
            future.cancel()
        if self._host is None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _take_turn(self, group: Group) -> GroupScores:
        async with self._slots:
            return await self._judge.judge(group)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            closing = getattr(self._judge.endpoint, "aclose", None)
            if closing is not None:
                self._loop.run_until_complete(closing())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

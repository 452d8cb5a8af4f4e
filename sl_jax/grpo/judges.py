"""The judges of a run, built once: in process, or pools of servers with cache and budget."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from sl_jax.checkpoints.source import TINY
from sl_jax.grpo.config import GrpoConfig, JudgeSettings
from sl_jax.grpo.judging import Judging
from sl_jax.imaging.words import counted
from sl_jax.parallel.processes import ALONE, Processes
from sl_jax.scoring import (
    EmbeddedConfig,
    EmbeddedJudge,
    Endpoint,
    JudgeConfig,
    JudgeWorker,
    Rewards,
    TwoStageJudge,
)
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.records import RECORDS, JudgeRecords

if TYPE_CHECKING:
    from sl_jax.scoring.pool import JudgePool
    from sl_jax.scoring.preflight import EndpointReport

_log = logging.getLogger(__name__)


class Judges(NamedTuple):
    """Who judges: `training` by both stages, `evaluation` by stage 1 alone."""

    training: JudgeWorker
    evaluation: JudgeWorker


class _Pooled(NamedTuple):
    """Servers, and the endpoint that remembers what they said."""

    pool: "JudgePool"
    endpoint: Endpoint


@contextmanager
def open_judges(
    config: GrpoConfig,
    folder: epath.Path,
    epochs: int,
    held_out: int,
    processes: Processes = ALONE,
    captions: int = 0,
) -> Iterator[Judges]:
    """The judges, once they are known to work, until the block ends.

    Servers get one real call of each kind first, and what judging will cost is logged. Every
    process has judges, a file of answers, and its part of the budget.

    Args:
        config: of the run.
        folder: its work directory, for the file of answers.
        epochs: still to come, for the forecast.
        held_out: pictures of an evaluation, for the forecast.
        processes: that judge; all open their judges together.
        captions: pictures that the main process will have described, for the forecast.

    Raises:
        KeyMissingError: a variable that should hold a key does not.
        CacheError: the file of answers cannot be used.
        PreflightError: no server can judge.
        BudgetError: nothing is left to spend.
        ProcessError: another process met one of these.
    """
    urls = sorted({server.url for server in (*config.judge.endpoints, *config.evaluation.judge)})
    users = Counter(url for named in processes.all_gather("naming judges", urls) for url in named)
    judge = _own(config.judge, folder, processes, users)
    servers = _shared(config.evaluation.judge, users)
    with ExitStack() as stack:
        ready = stack.enter_context(ExitStack())
        ready.enter_context(processes.together("opening judges"))
        budget = None
        if judge.endpoints or servers:
            budget = _budget(judge, stack)
        training = _pooled(judge, judge.endpoints, budget) if judge.endpoints else None
        if training is None and config.model != TINY:
            _log.warning(
                "The judge in process looks at pixels, by rules made for procedural designs: of "
                "other pictures its scores mean little. Please name servers of a vision-language "
                "model as config.judge.endpoints."
            )
        endpoint = training.endpoint if training else make_endpoint(judge)
        worker = stack.enter_context(
            JudgeWorker(make_judge(judge, endpoint, config.seed), judge.concurrency)
        )
        other = _pooled(judge, servers, budget) if servers else None
        if other:
            stack.callback(lambda: worker.call(other.endpoint.aclose()).result())
        else:
            _log.warning(
                "Held-out pictures are judged by the judge of training: scores that rise there "
                "too may show how to please it. config.evaluation.judge names another."
            )
        grader = make_judge(
            judge, other.endpoint if other else endpoint, config.seed, two_stage=False
        )
        graders = stack.enter_context(JudgeWorker(grader, judge.concurrency, beside=worker))
        if judge.preflight:
            rollout, times = config.rollout, config.evaluation.times(epochs)
            spread = config.evaluation.spread_draws * rollout.batch_groups * rollout.group_size
            graded = (held_out + spread) * times // processes.count
            groups = config.rollout.groups // processes.count
            asked = captions if processes.is_main else 0
            _try_out(config, worker, training, other, epochs, groups, graded, asked)
        ready.close()
        yield Judges(worker, graders)


def judgings(
    config: GrpoConfig, folder: epath.Path, judges: Judges, processes: Processes
) -> tuple[Judging, Judging]:
    """How training is rewarded, on record; and how held-out pictures are, by the judge alone."""
    judge = config.judge
    records = JudgeRecords(folder / RECORDS, judge.recorded_pictures, judge.render)
    training = Judging(judges.training, Rewards(config.rewards), judge, records, processes)
    alone = Rewards((("judge", 1.0),))
    return training, Judging(judges.evaluation, alone, judge, processes=processes)


def make_endpoint(settings: JudgeSettings) -> Endpoint:
    """The judge in process that the configuration names."""
    mode = {"embedded": "precise", "embedded-vlm": "vlm"}[settings.endpoint]
    return EmbeddedJudge(EmbeddedConfig(mode=mode))


def make_judge(
    settings: JudgeSettings, endpoint: Endpoint, seed: int, *, two_stage: bool = True
) -> TwoStageJudge:
    """The judge of training, or with `two_stage` false the one that evaluates (stage 1)."""
    config = JudgeConfig(
        weights=settings.weights,
        two_stage=settings.two_stage and two_stage,
        stage2_weight=settings.stage2_weight,
        grids=settings.grids,
        asks=settings.asks,
        render=settings.render,
        prompts=settings.prompts or None,
        seed=seed,
    )
    return TwoStageJudge(endpoint, config)


def _own(
    settings: JudgeSettings, folder: epath.Path, processes: Processes, users: Mapping[str, int]
) -> JudgeSettings:
    """The settings of one of several processes: a file, and its part of budget and servers."""
    path = epath.Path(settings.cache_path or folder / "judge.sqlite3")
    if not processes.is_main:
        path = path.with_name(f"{path.stem}_{processes.index}{path.suffix}")
    limits = {
        limit: None if (value := getattr(settings, limit)) is None else value // processes.count
        for limit in ("max_requests", "max_tokens")
    }
    endpoints = _shared(settings.endpoints, users)
    return dataclasses.replace(settings, cache_path=str(path), endpoints=endpoints, **limits)


def _shared(
    endpoints: Sequence[EndpointConfig], users: Mapping[str, int]
) -> tuple[EndpointConfig, ...]:
    """What one process may ask of each server: its part, but at least one request at a time."""
    names = ("concurrency", "requests_per_minute", "tokens_per_minute")
    found = []
    for endpoint in endpoints:
        count = users[endpoint.url]
        given = {name: value for name in names if (value := getattr(endpoint, name)) is not None}
        scarce = [name for name, value in given.items() if value < count]
        if scarce:
            _log.warning(
                "Judge %s: %s cannot be divided by the %d processes that share it; each takes 1.",
                *(endpoint.label, " and ".join(scarce), count),
            )
        parts = {name: max(1, value // count) for name, value in given.items()}
        found.append(dataclasses.replace(endpoint, **parts))
    return tuple(found)


def _budget(settings: JudgeSettings, stack: ExitStack) -> Budget:
    ledger = AnswerCache(settings.cache_path)
    stack.callback(ledger.close)
    return Budget(settings.max_requests, settings.max_tokens, ledger)


def _pooled(
    settings: JudgeSettings,
    endpoints: Sequence[EndpointConfig],
    budget: Budget | None,
) -> _Pooled:
    from sl_jax.scoring.pool import JudgePool, PoolConfig  # takes seconds to import

    pool = JudgePool(
        PoolConfig(
            tuple(endpoints),
            settings.request,
            tries=settings.tries,
            patience=settings.patience,
            cool_down=settings.cool_down,
            hedge_after=settings.hedge_after,
        ),
        budget,
    )
    cached = CachedEndpoint(pool, AnswerCache(settings.cache_path)) if settings.cache else pool
    return _Pooled(pool, cached)


def _try_out(
    config: GrpoConfig,
    worker: JudgeWorker,
    training: _Pooled | None,
    other: _Pooled | None,
    epochs: int,
    groups: int,
    graded: int,
    captions: int,
) -> None:
    """Preflights of all servers, and the forecast.

    This process judges `groups` an epoch and `graded` pictures in all evaluations, and has
    `captions` pictures described.
    """
    if training:
        reports = _preflight(config, worker, training.pool, captions > 0)
        _forecast(config, reports, epochs, groups, 0 if other else graded, captions)
    if other:
        _preflight(config, worker, other.pool)
        _log.info("The evaluation's judge gets %s in the run.", counted(graded, "call"))


def _preflight(
    config: GrpoConfig, worker: JudgeWorker, pool: "JudgePool", caption: bool = False
) -> "tuple[EndpointReport, ...]":
    from sl_jax.scoring.preflight import preflight

    calls = preflight(
        pool,
        size=max(max(bucket) for bucket in config.data.buckets),
        layers=max(config.data.layers),
        group_size=config.rollout.group_size,
        render=config.judge.render,
        prompts=config.judge.prompts or None,
        caption=caption,
    )
    return worker.call(calls).result()


def _forecast(
    config: GrpoConfig,
    reports: "Sequence[EndpointReport]",
    epochs: int,
    groups: int,
    graded: int,
    captions: int,
) -> None:
    from sl_jax.scoring.preflight import forecast

    expected = forecast(
        reports,
        groups=groups,
        group_size=config.rollout.group_size,
        grids=config.judge.grids if config.judge.two_stage else 0,
        epochs=epochs,
        evaluation_calls=graded,
        caption_calls=captions,
    )
    _log.info("%s", expected.to_text())

"""The judge of an evaluation: embedded, or servers behind the chat-completions protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from etils import epath

from sl_jax.eval.options import EvaluationError, Shard
from sl_jax.scoring import (
    EmbeddedConfig,
    EmbeddedJudge,
    Endpoint,
    Failure,
    Group,
    JudgeConfig,
    JudgeWorker,
    TwoStageJudge,
)
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint
from sl_jax.scoring.endpoint_config import EndpointConfig

_EMBEDDED = {"embedded": "precise", "embedded-vlm": "vlm"}


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges.

    Attributes:
      endpoints: "embedded", "embedded-vlm", or addresses of servers such as http://host:8000/v1.
      model: name of the model on the servers.
      key_env: environment variable with the servers' key; empty for none.
      concurrency: judgements at the same time, over all servers.

    Raises:
      EvaluationError: they do not fit each other.
    """

    endpoints: tuple[str, ...]
    model: str = ""
    key_env: str = ""
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise EvaluationError("no judge; please pass embedded, or the address of a server")
        if set(self.endpoints) & _EMBEDDED.keys():
            if len(self.endpoints) > 1 or self.model:
                raise EvaluationError(
                    f"judge {', '.join(self.endpoints)}: an embedded judge stands alone, without "
                    "a model"
                )
            return
        try:
            self.servers()
        except ValueError as error:
            raise EvaluationError(
                f"judge: {error}; judges are {', '.join(_EMBEDDED)}, or servers, whose model "
                "--judge_model names"
            ) from error

    @property
    def name(self) -> str:
        """What decides the scores: servers may come and go, their model may not."""
        return self.model or self.endpoints[0]

    def servers(self) -> tuple[EndpointConfig, ...]:
        """The servers, each with its share of the concurrency.

        Raises:
          ValueError: an address, the model or the variable's name is wrong.
        """
        share = -(-self.concurrency // len(self.endpoints))
        return tuple(EndpointConfig(url, self.model, self.key_env, share) for url in self.endpoints)


class Judged(NamedTuple):
    """Stage 1 of one decomposition.

    Attributes:
      reward: weighted mean of the criteria, 0..1.
      criteria: 0..1, in the order of `scoring.CRITERIA`.
    """

    reward: float
    criteria: tuple[float, ...]


class Judge:
    """Judges decompositions one by one, or two against each other; safe on many threads."""

    def __init__(self, worker: JudgeWorker, judge: TwoStageJudge):
        self._worker, self._judge = worker, judge

    def score(self, name: str, source: np.ndarray, layers: np.ndarray) -> Judged | Failure:
        """Stage 1: uint8 [H, W, 3] and [L, H, W, 4]; waits for the answer."""
        scores = self._worker.submit(Group(name, source, (layers,))).result()
        if not scores.valid[0]:
            return scores.failures[0]
        return Judged(float(scores.stage1[0]), tuple(map(float, scores.criteria[0])))

    def compare(
        self, name: str, source: np.ndarray, base: np.ndarray, other: np.ndarray
    ) -> float | Failure:
        """Share of two grids, one for each order, that `other` wins against `base`; a tie is half.

        The shorter of two stacks is filled up with transparent layers in front, so that a grid
        shows equal numbers.
        """
        count = max(len(base), len(other))
        group = Group(name, source, (_filled(base, count), _filled(other, count)))
        return self._worker.call(self._judge.compare(group)).result()


@contextmanager
def open_judge(
    choice: JudgeChoice, folder: epath.Path, size: int, layers: int, shard: Shard
) -> Iterator[Judge]:
    """The judge, once it is known to work, until the block ends.

    Args:
      choice: who judges.
      folder: of the results; answers of servers are kept there if it is local.
      size, layers: largest ones that will be shown, for the servers' trial.
      shard: keeps its answers in a file of its own, as the folder may be on a network drive.

    Raises:
      KeyMissingError: the variable that should hold a key does not.
      PreflightError: no server can judge.
    """
    if choice.endpoints[0] in _EMBEDDED:
        mode = _EMBEDDED[choice.endpoints[0]]
        judge = _stage1(EmbeddedJudge(EmbeddedConfig(mode=mode)))
        with JudgeWorker(judge, choice.concurrency) as worker:
            yield Judge(worker, judge)
        return
    from sl_jax.scoring.pool import JudgePool, PoolConfig  # takes seconds to import
    from sl_jax.scoring.preflight import preflight

    pool = JudgePool(PoolConfig(choice.servers()))
    endpoint: Endpoint = pool
    if "://" not in str(folder):
        name = f"judge_{shard.part}.sqlite3" if shard.part else "judge.sqlite3"
        endpoint = CachedEndpoint(pool, AnswerCache(folder / name))
    judge = _stage1(endpoint)
    with JudgeWorker(judge, choice.concurrency) as worker:
        worker.call(preflight(pool, size=size, layers=layers, group_size=2)).result()
        yield Judge(worker, judge)


def _stage1(endpoint: Endpoint) -> TwoStageJudge:
    return TwoStageJudge(endpoint, JudgeConfig(two_stage=False))


def _filled(layers: np.ndarray, count: int) -> np.ndarray:
    missing = np.zeros((count - len(layers), *layers.shape[1:]), np.uint8)
    return np.concatenate([layers, missing])

"""The work of an evaluation: layers made, measured, judged and compared, picture by picture."""

from __future__ import annotations

import collections
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sl_jax.data import PictureError
from sl_jax.eval.judging import Judge, JudgeChoice, open_judge
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.options import JUDGED, WIN_RATE, EvaluationError, Shard
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.results import Record, ResultFolder
from sl_jax.eval.samples import EvalData, EvalPicture, Sample, grouped
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.eval.stacks import StackError
from sl_jax.eval.summary import LeftOut
from sl_jax.eval.systems import System, Task, Unmade
from sl_jax.scoring import Failure

_log = logging.getLogger(__name__)

_LAYERS = 4


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done.

    Attributes:
      data: the pictures.
      systems: who decomposes them.
      base: one of the systems, with which the others are compared.
      protocols: to be run.
      judge: needed for the protocols judge and win_rate.
      num_layers: number of layers asked for; None asks for as many as there are true ones, or 4.
      shard: the share of this process.
    """

    data: EvalData
    systems: tuple[System, ...]
    base: System
    protocols: tuple[str, ...]
    judge: JudgeChoice | None = None
    num_layers: int | None = None
    shard: Shard = field(default_factory=Shard)

    def asked(self, picture: EvalPicture) -> int:
        """Number of layers to make of a picture."""
        return self.num_layers or picture.layers or _LAYERS


class _Made(NamedTuple):
    """Layers on their way to the protocols; `task` and `layers` None where they were kept."""

    picture: EvalPicture
    task: Task | None
    layers: np.ndarray | None


class Work:
    """What one process does of a plan; results go to a folder, record by record."""

    def __init__(self, plan: Plan, results: ResultFolder):
        self._plan, self._results = plan, results
        self._systems = {system.name: system for system in plan.systems}
        part, of = plan.shard
        self.pictures = [p for p in plan.data.pictures if p.index % of == part]
        self._left: dict[LeftOut, None] = {}

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Everything that is not in every table, each once."""
        return (*(LeftOut("data", *entry) for entry in self._plan.data.skipped), *self._left)

    def complete(self) -> None:
        """Makes, measures, judges and compares what is missing."""
        todo = {name: self._unmeasured(system) for name, system in self._systems.items()}
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self._threads()))
            judge = stack.enter_context(self._judge(any(todo.values()) or self._uncompared()))
            for name, pictures in todo.items():
                system = self._systems[name]
                score = functools.partial(self._scored, system, judge)
                self._each(pool, score, self._made(system, pictures), name, len(pictures))
            pairs = self._uncompared()
            compare = functools.partial(self._compared, judge)
            self._each(pool, compare, pairs, "win rate", len(pairs))

    def record(self, system: System, picture: EvalPicture) -> Record | None:
        """What is known of a decomposition; None if that is nothing, or of other layers."""
        record = self._results.read(system.name, picture.name)
        if record is None or record.stamp != system.stamp(picture):
            return None
        return record

    def layers(self, system: System, picture: EvalPicture, sample: Sample) -> np.ndarray | None:
        """Layers that were made before: a model's were kept, the others' cost little."""
        if system.kind == "model":
            return self._kept(system, picture)
        (layers,) = system.make([Task(picture, sample, self._plan.asked(picture))])
        return None if isinstance(layers, Unmade) else layers

    @property
    def _alone(self) -> tuple[str, ...]:
        """Protocols that look at one system at a time."""
        return tuple(name for name in self._plan.protocols if name != WIN_RATE)

    def _threads(self) -> int:
        judge = self._plan.judge
        return max(os.cpu_count() or 1, judge.concurrency if judge else 0)

    def _judge(self, anything: object) -> AbstractContextManager[Judge | None]:
        """The judge; None where it has nothing to do."""
        choice = self._plan.judge
        if choice is None or not anything or not set(self._plan.protocols) & set(JUDGED):
            return nullcontext()
        size = max(max(picture.size) for picture in self.pictures)
        layers = max(self._plan.asked(picture) for picture in self.pictures)
        return open_judge(choice, self._results.folder, size, layers, self._plan.shard)

    def _unmeasured(self, system: System) -> list[EvalPicture]:
        found = []
        for picture in self.pictures:
            record = self.record(system, picture)
            if record is None or record.lacking(self._alone):
                found.append(picture)
        return found

    def _uncompared(self) -> list[tuple[System, EvalPicture]]:
        if WIN_RATE not in self._plan.protocols:
            return []
        return [
            (system, picture)
            for system in self._plan.systems
            if system is not self._plan.base
            for picture in self.pictures
            if self._win(self.record(system, picture), picture) is None
        ]

    def _win(self, record: Record | None, picture: EvalPicture) -> float | None:
        base = self._plan.base
        return record and record.won(base.name, base.stamp(picture))

    def _leave_out(self, what: str, picture: str, reason: str) -> None:
        entry = LeftOut(what, picture, reason)
        if entry not in self._left:
            self._left[entry] = None
            _log.warning("%s: %s left out: %s", *entry)

    def _each(
        self,
        pool: ThreadPoolExecutor,
        work: Callable[[Any], None],
        items: Iterable[Any],
        name: str,
        total: int,
    ) -> None:
        """Works on items on threads, with a bar; few of them are held at a time."""
        if total:
            with tqdm(total=total, unit="picture", desc=name) as bar:
                for _ in _bounded(pool, work, items, 2 * self._threads()):
                    bar.update()

    def _made(self, system: System, pictures: Sequence[EvalPicture]) -> Iterator[_Made]:
        """Layers of each picture; those of models that were kept are not made again."""
        fresh = []
        for picture in pictures:
            if system.kind == "model" and self.record(system, picture):
                yield _Made(picture, None, None)
            else:
                fresh.append(picture)
        for batch in grouped(fresh, lambda p: (p.size, self._plan.asked(p)), system.batch):
            tasks = [task for picture in batch if (task := self._task(picture))]
            made = list(zip(tasks, system.make(tasks) if tasks else (), strict=True))
            for task, layers in made:
                self._keep(system, task, layers)
            for task, layers in made:
                if not isinstance(layers, Unmade):
                    yield _Made(task.picture, task, layers)

    def _keep(self, system: System, task: Task, layers: np.ndarray | Unmade) -> None:
        """Saves what a model made at once: whatever happens then, it is not made again."""
        picture = task.picture
        if isinstance(layers, Unmade):
            self._leave_out(system.name, picture.name, layers.reason)
        elif system.kind == "model":
            self._results.write_layers(system.name, picture.name, layers)
            self._results.write(self._empty(system, task))

    def _empty(self, system: System, task: Task) -> Record:
        picture = task.picture
        layers = picture.layers or task.layers
        return Record(picture.name, system.name, layers, system.stamp(picture))

    def _task(self, picture: EvalPicture) -> Task | None:
        try:
            return Task(picture, picture.open(), self._plan.asked(picture))
        except PictureError as error:
            self._leave_out("data", picture.name, error.reason)
            return None

    def _scored(self, system: System, judge: Judge | None, made: _Made) -> None:
        """Runs the protocols that are missing for one decomposition, and writes its record."""
        picture, task = made.picture, made.task or self._task(made.picture)
        if task is None:
            return
        layers = self._kept(system, picture) if made.layers is None else made.layers
        record = self.record(system, picture) or self._empty(system, task)
        scores = dict(record.scores)
        for protocol in record.lacking(self._alone):
            if protocol == "judge":
                scores |= self._judged(system, judge, task, layers)
            else:
                scores[protocol] = _measured(protocol, layers, task.sample)
        self._results.write(replace(record, scores=scores))

    def _kept(self, system: System, picture: EvalPicture) -> np.ndarray:
        try:
            return self._results.read_layers(system.name, picture.name)
        except StackError as error:
            raise EvaluationError(
                f"{self._results.folder}: layers of {picture.name} by {system.name} are damaged "
                f"({error}); please delete results/…/{picture.name}.json, so that they are made "
                "again"
            ) from error

    def _judged(
        self, system: System, judge: Judge | None, task: Task, layers: np.ndarray
    ) -> dict[str, Any]:
        """Stage 1 as a score; nothing where the judge gave none, so that it is asked again."""
        assert judge is not None
        name = task.picture.name
        said = judge.score(f"{name}/{system.name}", task.sample.source, layers)
        if isinstance(said, Failure):
            self._leave_out(system.name, name, f"judge: {said.reason}")
            return {}
        return {"judge": said._asdict()}

    def _compared(self, judge: Judge | None, pair: tuple[System, EvalPicture]) -> None:
        """Has one decomposition judged beside the base's, and adds the result to its record."""
        system, picture = pair
        base, record = self._plan.base, self.record(system, picture)
        task = self._task(picture) if record and self.record(base, picture) else None
        if record is None or task is None:
            return  # left out before, with the reason
        ours, theirs = (self.layers(s, picture, task.sample) for s in (base, system))
        if ours is None or theirs is None:
            return
        assert judge is not None
        won = judge.compare(f"{picture.name}/{system.name}", task.sample.source, ours, theirs)
        if isinstance(won, Failure):
            self._leave_out(system.name, picture.name, f"win rate: {won.reason}")
            return
        self._results.write(record.with_win(base.name, base.stamp(picture), won))


def _measured(protocol: str, layers: np.ndarray, sample: Sample) -> Any:
    """One protocol's numbers as JSON values; None where it does not apply."""
    if protocol == "reference_free":
        return vars(reference_free(layers, sample.source))
    reference = sample.reference
    assert reference is not None
    if protocol == "stable_layers":
        return vars(layer_l1(layers, reference))
    # LayerD's own script leaves out stacks of a single layer.
    if min(len(layers), len(reference)) < 2:
        return None
    return [vars(edits) for edits in layerd_scores(layers, reference)]


def _bounded(
    pool: ThreadPoolExecutor, work: Callable[[Any], None], items: Iterable[Any], most: int
) -> Iterator[None]:
    """Yields once for each finished item; at most `most` are in the pool at a time."""
    waiting: collections.deque[Future[None]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            while waiting and (waiting[0].done() or len(waiting) >= most):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()

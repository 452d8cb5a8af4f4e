"""One evaluation: every system on the same pictures and noise, measured, judged, reported.

A decomposition that is finished is not made again, so that a stopped evaluation goes on, a further
adapter, protocol or judge costs only itself, and several processes can share the pictures.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sl_jax.checkpoints.adapters import adapter_digest
from sl_jax.data import PictureError
from sl_jax.eval.judging import Judge, JudgeChoice, open_judge
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.options import (
    JUDGED,
    EvaluationError,
    Named,
    SamplerChoice,
    Shard,
    allowed_protocols,
)
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.report import write_report
from sl_jax.eval.results import Record, ResultFolder
from sl_jax.eval.samples import EvalData, EvalPicture, Sample, grouped, open_data, own_side
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.eval.stacks import StackError
from sl_jax.eval.summary import Evaluated, LeftOut, evaluation_report, summary_text
from sl_jax.eval.systems import (
    Model,
    ModelConfig,
    System,
    Task,
    Unmade,
    baseline_systems,
    checkpoint_digest,
    ready_made,
)
from sl_jax.scoring import Failure

_log = logging.getLogger(__name__)

BASE = "base"
_SIDE = 640  # at which the release decomposes
_LAYERS = 4
_WIN_RATE = "win_rate"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how.

    Attributes:
      data: see `samples.open_data`.
      output: folder for results and report.
      model: the base; None if only ready-made layers are scored.
      adapters: of that model, each a system of its own beside the base.
      layers: folders of ready-made layers.
      protocols: from `options.PROTOCOLS`; empty runs all that are possible.
      judge: for the protocols judge and win_rate.
      samplers: of the model; with several, each is a system of its own.
      size: longest side in pixels; None takes that of procedural designs, else 640 for a model,
        and the pictures' own size without one.
      num_layers: number of layers asked for; None asks for as many as there are true layers, or 4.
      base: the system that others are compared with; empty for the model without adapter, or the
        first of the ready-made ones.
      baselines: run them too.
      shard: the share of this process.
      limit: take the first so many pictures.
      shown: pictures on the page.
    """

    data: str
    output: str
    model: ModelConfig | None = None
    adapters: tuple[Named, ...] = ()
    layers: tuple[Named, ...] = ()
    protocols: tuple[str, ...] = ()
    judge: JudgeChoice | None = None
    samplers: tuple[SamplerChoice, ...] = (SamplerChoice("heun", 50),)
    size: int | None = None
    num_layers: int | None = None
    base: str = ""
    baselines: bool = True
    shard: Shard = field(default_factory=Shard)
    limit: int | None = None
    shown: int = 50

    def __post_init__(self) -> None:
        if self.model is None and self.adapters:
            raise EvaluationError("adapters need their base; please pass --model")


class Outcome(NamedTuple):
    """What became of an evaluation.

    Attributes:
      text: a table for the console; says what is left to do where this process had a share only.
      left_out: what is in no table, or not in all of them.
    """

    text: str
    left_out: tuple[LeftOut, ...]


def evaluate(config: EvaluationConfig, systems: Sequence[System] = ()) -> Outcome:
    """Runs what is missing, and writes the report unless this process had a share only.

    Args:
      config: what is evaluated, and how.
      systems: further ones, that no flag can name; they come before the baselines.

    Raises:
      EvaluationError: it cannot be done as asked, or the folder holds another evaluation.
      FolderError: there are no pictures.
      CheckpointError: a model or adapter is missing or damaged.
    """
    data = open_data(config.data, _side(config), config.limit)
    for name, reason in data.skipped:
        _log.warning("skipped %s: %s", name, reason)
    systems = _systems(config, systems)
    base = _base(config, systems)
    protocols = allowed_protocols(
        config.protocols,
        references=data.has_references,
        judge=config.judge is not None,
        others=len(systems) > 1,
    )
    results = ResultFolder(config.output)
    results.claim(_settings(config, data, systems))
    run = _Run(config, data, systems, base, protocols, results)
    run.complete()
    if config.shard.of > 1:
        return Outcome(run.shard_text(), run.left_out)
    evaluated = run.evaluated()
    write_report(evaluation_report(evaluated, config.shown), results.folder)
    return Outcome(summary_text(evaluated), run.left_out)


def _side(config: EvaluationConfig) -> int | None:
    if config.size is not None or config.model is None:
        return config.size
    return own_side(config.data) or _SIDE


def _systems(config: EvaluationConfig, further: Sequence[System]) -> list[System]:
    found = []
    if config.model is not None:
        model = Model(config.model, dict(config.adapters))
        for adapter in (None, *config.adapters):
            digest = adapter_digest(adapter.where) if adapter else None
            for sampler in config.samplers:
                name = adapter.name if adapter else BASE
                if len(config.samplers) > 1:
                    name = f"{name}, {sampler}"
                found.append(model.system(name, adapter and adapter.name, sampler, digest))
    found += [ready_made(*named) for named in config.layers]
    found += further
    if not found:
        raise EvaluationError("nothing to evaluate; please pass --model, or --layers DIR")
    found += baseline_systems() if config.baselines else []
    counts = collections.Counter(system.name for system in found)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise EvaluationError(f"two systems are called {twice[0]!r}; please name them NAME=PATH")
    return found


def _base(config: EvaluationConfig, systems: Sequence[System]) -> str:
    names = [system.name for system in systems]
    if config.base and config.base not in names:
        raise EvaluationError(f"base {config.base!r} is none of the systems {names}")
    return config.base or names[0]


def _settings(
    config: EvaluationConfig, data: EvalData, systems: Sequence[System]
) -> dict[str, Any]:
    common: dict[str, Any] = {"num_layers": config.num_layers}
    if config.model is not None:
        common |= {
            "seed": config.model.seed,
            "checkpoint_sha256": checkpoint_digest(config.model.model),
        }
    return {
        "pictures": [picture.digest for picture in data.pictures],
        "common": common,
        "judge": config.judge.settings if config.judge else None,
        "systems": {system.name: dict(system.settings) for system in systems},
    }


class _Made(NamedTuple):
    """Layers on their way to the protocols; `sample` and `layers` None where they were kept."""

    picture: EvalPicture
    sample: Sample | None
    layers: np.ndarray | None


class _Run:
    """The work of one process."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: EvalData,
        systems: Sequence[System],
        base: str,
        protocols: tuple[str, ...],
        results: ResultFolder,
    ):
        self._config, self._data, self._results = config, data, results
        self._systems, self._protocols = {system.name: system for system in systems}, protocols
        self._base = self._systems[base]
        shard = config.shard
        self._pictures = [p for p in data.pictures if p.index % shard.of == shard.part]
        self._left: dict[tuple[str, str, str], None] = {}

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Everything that is in no table, each once."""
        skipped = [LeftOut("data", *entry) for entry in self._data.skipped]
        return (*skipped, *(LeftOut(*key) for key in self._left))

    def complete(self) -> None:
        """Makes, measures and judges what is missing."""
        alone = [name for name in self._protocols if name != _WIN_RATE]
        todo = {
            name: [p for p in self._pictures if self._lacking(name, p, alone)]
            for name in self._systems
        }
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self._threads()))
            judge = stack.enter_context(self._open_judge(any(todo.values())))
            for name, pictures in todo.items():
                self._each(
                    name,
                    len(pictures),
                    pool,
                    lambda made, name=name: self._scored(self._systems[name], made, alone, judge),
                    self._made(self._systems[name], pictures),
                )
            if _WIN_RATE in self._protocols:
                self._compare(pool, judge)

    def _threads(self) -> int:
        return max(os.cpu_count() or 1, self._config.judge.concurrency if self._config.judge else 0)

    def _open_judge(self, anything: bool) -> Any:
        """The judge; None where nothing is left for it."""
        choice = self._config.judge
        needed = set(self._protocols) & set(JUDGED)
        if choice is None or not needed or not (anything or self._to_compare()):
            return nullcontext()
        sizes = [max(picture.size) for picture in self._pictures]
        layers = [self._asked(picture) for picture in self._pictures]
        return open_judge(choice, self._results.folder, max(sizes), max(layers))

    def _asked(self, picture: EvalPicture) -> int:
        return self._config.num_layers or picture.layers or _LAYERS

    def _lacking(self, system: str, picture: EvalPicture, protocols: Sequence[str]) -> bool:
        record = self._results.read(system, picture.name)
        return record is None or bool(record.lacking(protocols))

    def _leave_out(self, what: str, picture: str, reason: str) -> None:
        key = (what, picture, reason)
        if key not in self._left:
            self._left[key] = None
            _log.warning("%s: %s left out: %s", what, picture, reason)

    def _each(
        self,
        name: str,
        total: int,
        pool: ThreadPoolExecutor,
        work: Callable[[Any], None],
        items: Iterable[Any],
    ) -> None:
        """Works on items on threads, with a bar; few of them wait at a time."""
        if not total:
            return
        with tqdm(total=total, unit="picture", desc=name) as bar:
            for _ in _bounded(pool, work, items, 2 * self._threads()):
                bar.update()

    def _made(self, system: System, pictures: Sequence[EvalPicture]) -> Iterator[_Made]:
        """Layers of each picture; those of models that were kept are not made again."""
        fresh = []
        for picture in pictures:
            if system.kind == "model" and self._results.read(system.name, picture.name):
                yield _Made(picture, None, None)
            else:
                fresh.append(picture)
        batches = grouped(fresh, lambda p: (p.size, self._asked(p)), system.batch)
        for batch in batches:
            tasks = [task for picture in batch if (task := self._task(picture))]
            for task, layers in zip(tasks, system.make(tasks) if tasks else (), strict=True):
                if isinstance(layers, Unmade):
                    self._leave_out(system.name, task.picture.name, layers.reason)
                else:
                    yield _Made(task.picture, task.sample, layers)

    def _task(self, picture: EvalPicture) -> Task | None:
        try:
            return Task(picture, picture.open(), self._asked(picture))
        except PictureError as error:
            self._leave_out("data", picture.name, error.reason)
            return None

    def _scored(
        self, system: System, made: _Made, protocols: Sequence[str], judge: Judge | None
    ) -> None:
        """Runs the protocols that are missing for one decomposition, and writes its record."""
        picture, name = made.picture, system.name
        record = self._results.read(name, picture.name)
        if record is None:
            seed = self._config.model.seed if self._config.model else 0
            count = picture.layers or self._asked(picture)
            record = Record(picture.name, name, picture.digest, count, seed + picture.index)
        layers, sample = made.layers, made.sample
        if layers is None or sample is None:
            task = self._task(picture)
            if task is None:
                return
            sample, layers = task.sample, self._kept(name, picture)
        elif system.kind == "model":
            self._results.write_layers(name, picture.name, layers)
        scores = dict(record.scores)
        for protocol in record.lacking(protocols):
            if protocol == "judge":
                scores |= self._judged(name, picture, sample, layers, judge)
            else:
                scores[protocol] = _measured(protocol, layers, sample)
        self._results.write(replace(record, scores=scores))

    def _kept(self, system: str, picture: EvalPicture) -> np.ndarray:
        try:
            return self._results.read_layers(system, picture.name)
        except StackError as error:
            raise EvaluationError(
                f"layers of {picture.name} by {system} in {self._results.folder} are damaged "
                f"({error}); please delete results and layers of that picture"
            ) from error

    def _judged(
        self,
        system: str,
        picture: EvalPicture,
        sample: Sample,
        layers: np.ndarray,
        judge: Judge | None,
    ) -> dict[str, Any]:
        """Stage 1 as a score; nothing where the judge gave none, so that it is asked again."""
        assert judge is not None
        said = judge.score(f"{picture.name}/{system}", sample.source, layers)
        if isinstance(said, Failure):
            self._leave_out(system, picture.name, f"judge: {said.reason}")
            return {}
        return {"judge": said._asdict()}

    def _to_compare(self) -> list[tuple[str, EvalPicture]]:
        """Systems and pictures whose win rate is missing."""
        if _WIN_RATE not in self._protocols:
            return []
        return [
            (name, picture)
            for name in self._systems
            if name != self._base.name
            for picture in self._pictures
            if self._lacking(name, picture, [_WIN_RATE])
        ]

    def _compare(self, pool: ThreadPoolExecutor, judge: Judge | None) -> None:
        todo = self._to_compare()
        self._each("win rate", len(todo), pool, lambda pair: self._compared(*pair, judge), todo)

    def _compared(self, name: str, picture: EvalPicture, judge: Judge | None) -> None:
        record = self._results.read(name, picture.name)
        if record is None or self._results.read(self._base.name, picture.name) is None:
            return  # left out before, with its reason
        task = self._task(picture)
        stacks = task and [self._again(s, task) for s in (self._base, self._systems[name])]
        if not stacks or any(stack is None for stack in stacks):
            return
        assert judge is not None
        won = judge.compare(f"{picture.name}/{name}", task.sample.source, *stacks)
        if isinstance(won, Failure):
            self._leave_out(name, picture.name, f"win rate: {won.reason}")
            return
        self._results.write(replace(record, scores={**record.scores, _WIN_RATE: won}))

    def _again(self, system: System, task: Task) -> np.ndarray | None:
        """Layers of a system: a model's were kept, the others' cost little."""
        if system.kind == "model":
            return self._kept(system.name, task.picture)
        (layers,) = system.make([task])
        return None if isinstance(layers, Unmade) else layers

    def shard_text(self) -> str:
        """What a process says that had a share only."""
        part, of = self._config.shard
        return (
            f"Shard {part}/{of} is finished: {len(self._pictures)} of {len(self._data.pictures)} "
            "pictures. When all are, the same command without --shard writes the report."
        )

    def evaluated(self) -> Evaluated:
        """All results, for the report."""
        found = [
            (name, picture, record)
            for name in self._systems
            for picture in self._data.pictures
            if (record := self._results.read(name, picture.name))
        ]
        if not found:
            raise EvaluationError("nothing could be evaluated; the messages above say why")
        return Evaluated(
            data=self._data,
            measurements=tuple(r.measurement(self._protocols) for _, _, r in found),
            base=self._base.name,
            systems=tuple(self._systems.values()),
            protocols=self._protocols,
            adapters=self._config.adapters,
            left_out=self.left_out,
            details=self._details(),
            layers=self._shown,
        )

    def _shown(self, system: System, task: EvalPicture, sample: Sample) -> np.ndarray | None:
        return self._again(system, Task(task, sample, self._asked(task)))

    def _details(self) -> dict[str, str]:
        config = self._config
        told = {
            "data": f"{config.data} ({len(self._data.pictures)} pictures)",
            "sizes": ", ".join(sorted({f"{w}×{h}" for h, w in (p.size for p in self._pictures)})),
            "protocols": ", ".join(self._protocols),
        }
        if config.model:
            told["model"] = config.model.model
            told["seed"] = f"{config.model.seed} for the first picture, one more for each next"
            told["guidance"] = f"{config.model.guidance:g}"
            told["samplers"] = ", ".join(map(str, config.samplers))
        told |= {f"adapter {name}": where for name, where in config.adapters}
        told |= {f"layers {name}": where for name, where in config.layers}
        if config.judge:
            told["judge"] = config.judge.settings["judge"]
        return told


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

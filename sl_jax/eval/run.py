"""One evaluation: every system on the same pictures and noise, measured, judged, reported.

A decomposition that is finished is not made again, so that a stopped evaluation goes on, a further
adapter, protocol or judge costs only itself, and several processes can share the pictures.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.options import (
    WIN_RATE,
    EvaluationError,
    Named,
    SamplerChoice,
    Shard,
    allowed_protocols,
    check_apart,
)
from sl_jax.eval.report import write_report
from sl_jax.eval.results import ResultFolder, file_name
from sl_jax.eval.samples import MOST_LAYERS, EvalData, open_data, own_side
from sl_jax.eval.summary import Evaluated, LeftOut, evaluation_report, summary_text
from sl_jax.eval.systems import Model, ModelConfig, System, baseline_systems, ready_made
from sl_jax.eval.work import Plan, Work
from sl_jax.imaging.words import counted
from sl_jax.inference.decomposer import check_seeds

_log = logging.getLogger(__name__)

BASE = "base"
_SIDE = 640  # at which the release decomposes
_LARGEST = 8192  # pixels of the longest side


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
      max_layers: of designs with more true layers neighbours are merged.
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
    max_layers: int = MOST_LAYERS
    base: str = ""
    baselines: bool = True
    shard: Shard = field(default_factory=Shard)
    limit: int | None = None
    shown: int = 50

    def __post_init__(self) -> None:
        if self.model is None and self.adapters:
            raise EvaluationError("adapters need their base; please pass --model")
        if self.size is not None and not 16 <= self.size <= _LARGEST:
            raise EvaluationError(f"size is {self.size}; please use 16 to {_LARGEST} pixels")
        check_apart(self.output, (self.data, *(named.where for named in self.layers)))


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
      ValueError: a picture's seed would be out of range.
      CheckpointError: a model or adapter is missing or damaged.
    """
    data = open_data(config.data, _side(config), config.limit, config.max_layers)
    for name, reason in data.skipped:
        _log.warning("skipped %s: %s", name, reason)
    if config.model:
        check_seeds(config.model.seed, len(data.pictures))
    found = _systems(config, systems)
    base = _base(config, found)
    protocols = allowed_protocols(
        config.protocols,
        references=data.has_references,
        judge=config.judge is not None,
        others=len(found) > 1,
    )
    results = ResultFolder(config.output)
    results.claim(_settings(config, data, found))
    plan = Plan(data, found, base, protocols, config.judge, config.num_layers, config.shard)
    work = Work(plan, results)
    work.complete()
    if config.shard.of > 1:
        return Outcome(_shard_text(work, config), work.left_out)
    evaluated = _evaluated(config, plan, work)
    write_report(evaluation_report(evaluated, config.shown), results.folder)
    return Outcome(summary_text(evaluated), work.left_out)


def _shard_text(work: Work, config: EvaluationConfig) -> str:
    part, of = config.shard
    pictures = counted(len(work.pictures), "picture")
    return (
        f"Shard {part}/{of} is finished: {pictures}. When all are, the same command without "
        "--shard writes the report."
    )


def _evaluated(config: EvaluationConfig, plan: Plan, work: Work) -> Evaluated:
    """All results, for the report.

    Raises:
      EvaluationError: there are none.
    """
    first, base = config.model.seed if config.model else 0, plan.base
    measurements = []
    for system in plan.systems:
        for picture in plan.data.pictures:
            if record := work.record(system, picture):
                won = record.won(base.name, base.stamp(picture))
                wins = won if WIN_RATE in plan.protocols else None
                measurements.append(record.measurement(plan.protocols, first + picture.index, wins))
    if not measurements:
        raise EvaluationError("nothing could be evaluated; the messages above say why")
    return Evaluated(
        data=plan.data,
        measurements=tuple(measurements),
        base=base.name,
        systems=plan.systems,
        layers=work.layers,
        left_out=work.left_out,
        details=_details(config, plan),
    )


def _details(config: EvaluationConfig, plan: Plan) -> dict[str, str]:
    """Where the numbers come from, by name."""
    pictures = plan.data.pictures
    sizes = sorted({picture.size for picture in pictures})
    told = {
        "data": f"{config.data} ({counted(len(pictures), 'picture')})",
        "sizes": ", ".join(f"{width}×{height}" for height, width in sizes[:20]),
        "protocols": ", ".join(plan.protocols),
    }
    if merged := plan.data.merged:
        told["true layers"] = (
            f"merged to {config.max_layers} in {merged} of {len(pictures)} designs"
        )
    if config.model:
        told["model"] = config.model.model
        told["seed"] = f"{config.model.seed} for the first picture, one more for each next"
        told["guidance"] = f"{config.model.guidance:g}"
        told["samplers"] = ", ".join(map(str, config.samplers))
    adapters = (system.adapter for system in plan.systems if system.adapter)
    told |= {f"adapter {name}": where for name, where in adapters}
    told |= {f"layers {name}": where for name, where in config.layers}
    for system in plan.systems:
        told |= {
            f"{system.name}: {field.removesuffix('_sha256')} SHA-256": value
            for field, value in system.settings.items()
            if field.endswith("_sha256") and value
        }
    return told | ({"judge": config.judge.name} if config.judge else {})


def _side(config: EvaluationConfig) -> int | None:
    if config.size is not None or config.model is None:
        return config.size
    return own_side(config.data) or _SIDE


def _systems(config: EvaluationConfig, further: Sequence[System]) -> tuple[System, ...]:
    found: list[System] = []
    if config.model is not None:
        model = Model(config.model, dict(config.adapters))
        for adapter in (None, *config.adapters):
            for sampler in config.samplers:
                name = adapter.name if adapter else BASE
                if len(config.samplers) > 1:
                    name = f"{name}, {sampler}"
                found.append(model.system(name, adapter.name if adapter else None, sampler))
    found += [ready_made(*named) for named in config.layers]
    found += further
    if not found:
        raise EvaluationError("nothing to evaluate; please pass --model, or --layers DIR")
    found += baseline_systems() if config.baselines else []
    counts = collections.Counter(file_name(system.name) for system in found)
    twice = [s.name for s in found if counts[file_name(s.name)] > 1]
    if twice:
        raise EvaluationError(f"two systems are called {twice[0]!r}; please name them NAME=PATH")
    return tuple(found)


def _base(config: EvaluationConfig, systems: Sequence[System]) -> System:
    by_name = {system.name: system for system in systems}
    if config.base and config.base not in by_name:
        raise EvaluationError(f"base {config.base!r} is none of the systems {list(by_name)}")
    return by_name[config.base] if config.base else systems[0]


def _settings(
    config: EvaluationConfig, data: EvalData, systems: Sequence[System]
) -> dict[str, Any]:
    return {
        "pictures": [picture.digest for picture in data.pictures],
        "num_layers": config.num_layers,
        "judge": config.judge.name if config.judge else None,
        "systems": {system.name: dict(system.settings) for system in systems},
    }

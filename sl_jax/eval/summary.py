"""From the results of an evaluation to its report, and to a table for the console."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sl_jax.data import PictureError, resize_to
from sl_jax.data.pictures import shown as shown_name
from sl_jax.eval import _format
from sl_jax.eval.bootstrap import paired_difference
from sl_jax.eval.compare import (
    JUDGE,
    LAYER_L1,
    REFERENCE_FREE,
    WIN_RATE,
    Measurement,
    Metric,
    comparison_tables,
    flat_records,
    layerd_metrics,
)
from sl_jax.eval.curves import adapter_curves
from sl_jax.eval.options import Named
from sl_jax.eval.report import Column, Decomposition, Fact, Picture, Report, Table
from sl_jax.eval.samples import EvalData, EvalPicture, Sample
from sl_jax.eval.systems import System
from sl_jax.imaging.words import counted, printable

# What pictures are sorted by: the first of these that was measured.
_QUALITY = (layerd_metrics(0)[2], LAYER_L1[2], JUDGE[0], REFERENCE_FREE[0])
_CONSOLE = (
    *(layerd_metrics(0)[2], layerd_metrics(0)[1], LAYER_L1[0], LAYER_L1[2]),
    *(REFERENCE_FREE[0], JUDGE[0], WIN_RATE),
)
_MOST_NAMED = 200
_SHOWN_SIDE = 384


class LeftOut(NamedTuple):
    """A picture that a system, or all of them ("data"), has no number for, and why."""

    system: str
    picture: str
    reason: str


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The results of an evaluation.

    Attributes:
      data: the pictures.
      measurements: of every system and picture.
      base: name of the system that others are compared with.
      systems: all of them, in the order of tables.
      left_out: what is missing.
      details: settings, by name.
      layers: a system's layers of a picture; None if there are none.
    """

    data: EvalData
    measurements: tuple[Measurement, ...]
    base: str
    systems: tuple[System, ...]
    layers: Callable[[System, EvalPicture, Sample], np.ndarray | None]
    left_out: tuple[LeftOut, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def adapters(self) -> tuple[Named, ...]:
        """Those that the systems sample with, each once."""
        return tuple(dict.fromkeys(s.adapter for s in self.systems if s.adapter))

    @property
    def pair(self) -> tuple[str, str]:
        """Whose pictures are compared one by one: the base and the first system beside it.

        A base that is alone is compared with the best baseline; without one, with itself.
        """
        others = [s for s in self.systems if s.name != self.base]
        rivals = [s.name for s in others if s.kind != "baseline"]
        if rivals or not others:
            return self.base, (rivals or [self.base])[0]
        return max((s.name for s in others), key=self.goodness), self.base

    @property
    def quality(self) -> Metric | None:
        """What the improvement is measured by; None if nothing of the kind was."""
        for metric in _QUALITY:
            if any(not math.isnan(metric.of(m)) for m in self.measurements):
                return metric
        return None

    def goodness(self, system: str) -> float:
        """A system's mean quality, larger is better; −∞ where nothing was measured."""
        metric = self.quality
        values = [metric.of(m) for m in self.measurements if m.model == system] if metric else []
        known = [value for value in values if not math.isnan(value)]
        return self._sign * float(np.mean(known)) if known else -math.inf

    def improvements(self) -> dict[str, float]:
        """By picture, how much better the second of the pair is than the first."""
        metric, (first, second) = self.quality, self.pair
        if metric is None or first == second:
            return {}
        values = {(m.model, m.picture): metric.of(m) for m in self.measurements}
        found = {}
        for picture in self.data.pictures:
            before, after = (values.get((s, picture.name), math.nan) for s in (first, second))
            if not math.isnan(after - before):
                found[picture.name] = self._sign * (after - before)
        return found

    @property
    def _sign(self) -> float:
        return -1.0 if self.quality and self.quality.column.better == "lower" else 1.0


def evaluation_report(evaluated: Evaluated, shown: int = 50) -> Report:
    """The report of an evaluation.

    Args:
      evaluated: its results.
      shown: pictures on the page, chosen evenly from the most to the least improved.
    """
    data, metric = evaluated.data, evaluated.quality
    pictures = _pictures(evaluated, shown)
    first, second = evaluated.pair
    measured = {m.model for m in evaluated.measurements}
    base = evaluated.base if evaluated.base in measured else None  # else it is among the left out
    chosen = ""
    if len(pictures) < len(data.pictures):
        chosen = f"{len(pictures)} of {counted(len(data.pictures), 'picture')}, chosen evenly"
        ranked = f" from those that {second} improves most on {first} to those it spoils most"
        chosen += f"{ranked if evaluated.improvements() else ''}."
    return Report(
        title=f"Layer decomposition: {' against '.join(dict.fromkeys((second, first)))}",
        summary=_opening(evaluated),
        facts=_facts(evaluated),
        tables=(
            *comparison_tables(evaluated.measurements, base),
            *_left_out_table(evaluated.left_out),
        ),
        curves=adapter_curves(evaluated.adapters),
        pictures=pictures,
        pictures_note=chosen,
        improvement_name=f"improvement in {metric.column.name}" if metric else "improvement",
        details=evaluated.details,
        records=flat_records(evaluated.measurements),
    )


def _opening(evaluated: Evaluated) -> str:
    data, missing = evaluated.data, len(evaluated.left_out)
    systems, pictures = len(evaluated.systems), len(data.pictures)
    text = f"{counted(systems, 'system')} on {counted(pictures, 'picture')} from {data.where}, "
    text += "with the same noise for every model."
    if data.merged:
        text += f" Designs with more than {max(data.layer_counts)} true layers had neighbours "
        text += f"merged to so many: {data.merged} of {len(data.pictures)}."
    if missing:
        text += f"\n\nLeft out: {missing}. Every table says how many pictures it covers; the last "
        text += "one names what is missing, and why."
    return text


def summary_text(evaluated: Evaluated) -> str:
    """Means by system, for the console."""
    metrics = [
        metric
        for metric in _CONSOLE
        if any(not math.isnan(metric.of(m)) for m in evaluated.measurements)
    ]
    rows = [["", *(metric.column.name for metric in metrics), "Pictures"]]
    for system in evaluated.systems:
        mine = [m for m in evaluated.measurements if m.model == system.name]
        cells, counts = [], {0} if not mine else set()
        for metric in metrics:
            values = [value for m in mine if not math.isnan(value := metric.of(m))]
            mean = float(np.mean(values)) if values else math.nan
            cells.append(_format.number(mean, metric.column.digits))
            if values:
                counts.add(len(values))
        covered = dict.fromkeys((min(counts), max(counts))) if counts else (0,)
        rows.append([printable(system.name), *cells, " to ".join(map(str, covered))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _facts(evaluated: Evaluated) -> tuple[Fact, ...]:
    data, metric = evaluated.data, evaluated.quality
    facts = [
        Fact(
            "pictures",
            len(data.pictures),
            f"{len(data.skipped)} more were skipped" if data.skipped else "",
        )
    ]
    if metric is None:
        return tuple(facts)
    digits = metric.column.digits
    for name in dict.fromkeys(evaluated.pair):
        mean = abs(evaluated.goodness(name))
        mean = mean if math.isfinite(mean) else math.nan
        note = f"{name}; {metric.column.better} is better"
        facts.append(Fact(metric.column.name, _format.number(mean, digits), note))
    gains = list(evaluated.improvements().values())
    if gains:
        gain = paired_difference(gains, np.zeros(len(gains)))
        tone = {True: "good", False: "bad"}[gain.mean > 0] if gain.excludes_zero else "neutral"
        ends = [_format.number(end, digits, signed=True) for end in (gain.low, gain.high)]
        facts.append(
            Fact(
                "improvement",
                _format.number(gain.mean, digits, signed=True),
                f"95 % {ends[0]} … {ends[1]}, {counted(gain.count, 'picture')}",
                tone,
            )
        )
    return tuple(facts)


def _left_out_table(left_out: Sequence[LeftOut]) -> tuple[Table, ...]:
    if not left_out:
        return ()
    more = len(left_out) - _MOST_NAMED
    return (
        Table(
            "Left out",
            (Column("System"), Column("Picture"), Column("Reason")),
            tuple(tuple(entry) for entry in left_out[:_MOST_NAMED]),
            f"{len(left_out)} in all" + (f", {more} of them not named here." if more > 0 else "."),
        ),
    )


def _pictures(evaluated: Evaluated, shown: int) -> tuple[Picture, ...]:
    gains = evaluated.improvements()
    ranked = sorted(
        evaluated.data.pictures,
        key=lambda picture: (picture.name not in gains, -gains.get(picture.name, 0.0)),
    )
    if len(ranked) > shown:
        places = np.linspace(0, len(ranked) - 1, shown).round().astype(int)
        ranked = [ranked[place] for place in dict.fromkeys(places.tolist())]
    ranked.sort(key=lambda picture: picture.index)
    by_key = {(m.model, m.picture): m for m in evaluated.measurements}
    found = (_picture(evaluated, p, gains.get(p.name), by_key) for p in ranked)
    return tuple(picture for picture in found if picture is not None)


def _picture(
    evaluated: Evaluated,
    picture: EvalPicture,
    gain: float | None,
    by_key: Mapping[tuple[str, str], Measurement],
) -> Picture | None:
    try:
        sample = picture.open()
    except PictureError:
        return None  # named among what is left out
    made = []
    for system in evaluated.systems:
        measured = by_key.get((system.name, picture.name))
        if system.kind == "baseline" or measured is None:
            continue
        layers = evaluated.layers(system, picture, sample)
        if layers is not None:
            made.append(Decomposition(system.name, _reduced(layers), _scores(measured)))
    if sample.reference is not None:
        made.append(Decomposition("true layers", _reduced(sample.reference)))
    (source,) = _reduced(sample.source[None])
    return Picture(shown_name(picture.name), source, tuple(made), improvement=gain)


def _reduced(layers: np.ndarray) -> np.ndarray:
    """A stack small enough for a page of many; uint8 [L, h, w, C]."""
    height, width = layers.shape[1:3]
    scale = min(_SHOWN_SIDE / max(height, width), 1.0)
    size = tuple(max(1, round(side * scale)) for side in (height, width))
    return np.stack([resize_to(layer, size) for layer in layers])


def _scores(measured: Measurement) -> dict[str, str | float]:
    return {
        metric.column.name: _format.number(metric.of(measured), metric.column.digits)
        for metric in _QUALITY
        if not math.isnan(metric.of(measured))
    }

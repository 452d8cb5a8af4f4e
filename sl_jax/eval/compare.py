"""From decompositions of many pictures by several models to the tables of a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sl_jax.eval.bootstrap import Interval, interval, paired_difference
from sl_jax.eval.layerd import EditScores, layerd_scores
from sl_jax.eval.reference_free import ReferenceFree, reference_free
from sl_jax.eval.report import Column, Table
from sl_jax.eval.stable_layers import LayerL1, layer_l1
from sl_jax.scoring import CRITERIA


@dataclass(frozen=True)
class Measurement:
    """All that was measured of one decomposition.

    Attributes:
      picture, model: whose it is; one picture may be measured for several L and seeds.
      layers: L of the reference, or the L that was asked for where there is none.
      seed: of the sampler.
      free: reference-free measures; None if they were not asked for.
      layer_l1, layerd: reference-based measures; None without a reference, and layerd also where
        prediction or reference has fewer than two layers, which LayerD's own script leaves out.
      reward: the judge's stage-1 score, 0..1; nan if nobody judged.
      criteria: the judge's criteria, 0..1, in the order of `scoring.CRITERIA`; empty if unknown.
      wins: share of two grids, one per order, that it won against the base; nan if not compared.
    """

    picture: str
    model: str
    layers: int
    seed: int
    free: ReferenceFree | None
    layer_l1: LayerL1 | None = None
    layerd: tuple[EditScores, ...] | None = None
    reward: float = math.nan
    criteria: tuple[float, ...] = ()
    wins: float = math.nan


@dataclass(frozen=True)
class Metric:
    """A number of a measurement, with the column that shows it; nan where it was not measured."""

    column: Column
    of: Callable[[Measurement], float]


def _layer_l1(name: str) -> Callable[[Measurement], float]:
    return lambda m: getattr(m.layer_l1, name) if m.layer_l1 else math.nan


def _free(name: str) -> Callable[[Measurement], float]:
    return lambda m: getattr(m.free, name) if m.free else math.nan


def _criterion(index: int) -> Callable[[Measurement], float]:
    return lambda m: m.criteria[index] if m.criteria else math.nan


def _layerd(name: str, edits: int) -> Callable[[Measurement], float]:
    """The score at an edit budget; a design that stopped earlier carries its last one."""
    return lambda m: (
        getattr(m.layerd[min(edits, len(m.layerd) - 1)], name) if m.layerd else math.nan
    )


LAYER_L1 = (
    Metric(Column("Mean L1", 4, "lower"), _layer_l1("mean")),
    Metric(Column("Background (Pred 0)", 4, "lower"), _layer_l1("background")),
    Metric(Column("Order-free mean L1", 4, "lower"), _layer_l1("order_free")),
)
JUDGE = (
    Metric(Column("Judge score", 3, "higher"), lambda m: m.reward),
    *(
        Metric(Column(name.replace("_", " ").capitalize(), 3, "higher"), _criterion(index))
        for index, name in enumerate(CRITERIA)
    ),
)
WIN_RATE = Metric(Column("Win rate", 3, "higher"), lambda m: m.wins)
REFERENCE_FREE = (
    Metric(Column("Recomposition PSNR, dB", 2, "higher"), _free("psnr")),
    Metric(Column("Recomposition L1", 4, "lower"), _free("recomposition_l1")),
    Metric(Column("Blank layers", 3), _free("blank_rate")),
    Metric(Column("Duplicate layers", 3, "lower"), _free("duplicate_rate")),
    Metric(Column("Layers with fragments", 3, "lower"), _free("fragment_rate")),
    Metric(Column("Bleed", 4, "lower"), _free("bleed")),
    Metric(Column("Alpha bimodality", 3, "higher"), _free("bimodality")),
)


def layerd_metrics(edits: int) -> tuple[Metric, ...]:
    """The LayerD protocol's scores at an edit budget."""
    return (
        Metric(Column("RGB L1", 4, "lower"), _layerd("rgb_l1", edits)),
        Metric(Column("Alpha IoU", 4, "higher"), _layerd("alpha_iou", edits)),
        Metric(Column("LayerD cost", 4, "lower"), _layerd("cost", edits)),
    )


def measure(
    picture: str,
    model: str,
    layers: np.ndarray,
    source: np.ndarray,
    reference: np.ndarray | None = None,
    seed: int = 0,
    reward: float = math.nan,
) -> Measurement:
    """Measures one decomposition by every protocol that it allows.

    Args:
      picture, model, seed, reward: as in `Measurement`.
      layers: uint8 [L, H, W, 4] straight RGBA, back to front.
      source: uint8 [H, W, 3].
      reference: uint8 [L_r, H, W, 4], the true layers, if they are known.

    Raises:
      ValueError: shapes or types that the metrics refuse.
    """
    known = reference is not None
    return Measurement(
        picture=picture,
        model=model,
        layers=len(reference if known else layers),
        seed=seed,
        free=reference_free(layers, source),
        layer_l1=layer_l1(layers, reference) if known else None,
        layerd=layerd_scores(layers, reference)
        if known and min(len(layers), len(reference)) > 1
        else None,
        reward=reward,
    )


def comparison_tables(
    measurements: Sequence[Measurement], base: str | None = None, edits: Sequence[int] = (0, 1, 5)
) -> tuple[Table, ...]:
    """Every table that the measurements allow, models in the order of their first appearance.

    Args:
      measurements: of all models; means and intervals are over pictures, the L and seeds of one
        picture averaged within it.
      base: the model that the others are compared with, pair by pair of equal picture, L and seed;
        None leaves the differences out.
      edits: edit budgets of the LayerD table.

    Raises:
      ValueError: if nothing was measured, `base` is not among the models, or a model has two
        measurements of one picture, L and seed.
    """
    models = list(dict.fromkeys(m.model for m in measurements))
    if not models or (base is not None and base not in models):
        raise ValueError(f"base {base!r} is not among the measured models {models}")
    _check_unique(measurements)
    tables = [_per_layer_l1(measurements, models), _layerd_table(measurements, models, edits)]
    tables.append(_table("Without a reference", measurements, models, REFERENCE_FREE, _FREE_NOTE))
    tables.append(_table("Judge", measurements, models, JUDGE, _JUDGE_NOTE))
    others = [model for model in models if model != base]
    if base is not None and others:
        note = _WINS_NOTE.format(base)
        tables.append(_table(f"Win rate against {base}", measurements, others, [WIN_RATE], note))
        tables += _difference_tables(measurements, others, base, max(edits))
    return tuple(table for table in tables if table is not None)


def flat_records(
    measurements: Iterable[Measurement],
) -> tuple[dict[str, str | int | float | None], ...]:
    """One flat mapping per measurement, for the JSON and CSV files of a report."""
    records = []
    for m in measurements:
        record: dict[str, str | int | float | None] = {
            "picture": m.picture,
            "model": m.model,
            "layers": m.layers,
            "seed": m.seed,
            "reward": m.reward,
            **dict(zip(CRITERIA, m.criteria, strict=False)),
            "win_rate": m.wins,
        }
        if m.layer_l1:
            record |= {
                "layer_l1_mean": m.layer_l1.mean,
                "layer_l1_background": m.layer_l1.background,
                "layer_l1_order_free": m.layer_l1.order_free,
            }
        for level in m.layerd or ():
            for name in ("cost", "rgb_l1", "alpha_iou"):
                record[f"layerd_{name}_{level.edits}"] = getattr(level, name)
        records.append(record | (dataclasses.asdict(m.free) if m.free else {}))
    return tuple(records)


_L1_NOTE = (
    "Mean |Δ| of premultiplied RGBA against the true layer at the same index, 0 to 1; order-free: "
    "under the best assignment of layers. Grouped by the number of true layers."
)
_LAYERD_NOTE = (
    "LayerD protocol (arXiv 2509.25134): layers grouped and aligned in order, with up to so many "
    "merges of neighbouring layers on either side. Stacks of a single layer do not count."
)
_FREE_NOTE = (
    "Sanity checks, not goals: all content in the background recomposes perfectly. Spare blank "
    "layers are normal."
)
_JUDGE_NOTE = "Stage 1: each decomposition judged on its own, 0 to 1."
_WINS_NOTE = (
    "Judged side by side with {} in two grids, one for each order; a tie counts as half, and 0.5 "
    "is a draw. Stacks of different length are filled up with transparent layers."
)
_DIFFERENCE_NOTE = "Paired differences over equal pictures, layer counts and seeds."


def _per_layer_l1(measurements: Sequence[Measurement], models: Sequence[str]) -> Table | None:
    counts = sorted({m.layers for m in measurements if m.layer_l1})
    rows = []
    for count in [*counts, None] if len(counts) > 1 else counts:
        group = [m for m in measurements if count is None or m.layers == count]
        heading = "All" if count is None else f"L = {count}"
        rows += [(heading, *row) for row in _rows(group, models, LAYER_L1)]
    columns = (Column("Layers"), Column("Model"), *(m.column for m in LAYER_L1), _PICTURES)
    return Table("Per-layer L1", columns, tuple(rows), _L1_NOTE, grouped=True) if rows else None


def _layerd_table(
    measurements: Sequence[Measurement], models: Sequence[str], edits: Sequence[int]
) -> Table | None:
    rows = []
    for budget in edits:
        heading = f"{budget} merge{'s' * (budget != 1)}"
        group = _rows(measurements, models, layerd_metrics(budget))
        rows += [(heading, *row) for row in group]
    shown = (metric.column for metric in layerd_metrics(0))
    columns = (Column("Merges"), Column("Model"), *shown, _PICTURES)
    return Table("LayerD", columns, tuple(rows), _LAYERD_NOTE, grouped=True) if rows else None


def _table(
    title: str,
    measurements: Sequence[Measurement],
    models: Sequence[str],
    metrics: Sequence[Metric],
    note: str,
) -> Table | None:
    """Columns that nobody has a number for are left out; None if that leaves nothing."""
    measured = [m for m in metrics if not all(math.isnan(m.of(x)) for x in measurements)]
    rows = _rows(measurements, models, measured)
    columns = (Column("Model"), *(metric.column for metric in measured), _PICTURES)
    return Table(title, columns, tuple(rows), note) if rows else None


def _difference_tables(
    measurements: Sequence[Measurement], others: Sequence[str], base: str, edits: int
) -> list[Table]:
    tables = []
    for title, metrics in (
        ("reference-based", (*LAYER_L1, *layerd_metrics(edits))),
        ("without a reference", (*REFERENCE_FREE, *JUDGE)),
    ):
        of_all = {metric: _grids(measurements, [base, *others], metric) for metric in metrics}
        kept = [m for m, grids in of_all.items() if not all(np.isnan(g).all() for g in grids)]
        if not kept:
            continue
        rows = []
        for index, model in enumerate(others, 1):
            cells = [paired_difference(of_all[m][index], of_all[m][0]) for m in kept]
            rows.append((model, *cells, _covered(cells)))
        signed = (dataclasses.replace(m.column, better="", signed=True) for m in kept)
        columns = (Column("Model"), *signed, _PICTURES)
        name = f"Difference from {base}, {title}"
        tables.append(Table(name, columns, tuple(rows), _DIFFERENCE_NOTE))
    return tables


_PICTURES = Column("Pictures", 0)


def _rows(
    measurements: Sequence[Measurement], models: Sequence[str], metrics: Sequence[Metric]
) -> list[tuple[str | int | Interval, ...]]:
    """(model, interval per metric, pictures) for each model with anything measured."""
    rows = []
    grids = [_grids(measurements, models, metric) for metric in metrics]
    for index, model in enumerate(models):
        cells = [interval(grid[index]) for grid in grids]
        if any(cell.count for cell in cells):
            rows.append((model, *cells, _covered(cells)))
    return rows


def _covered(cells: Sequence[Interval]) -> int | str:
    """How many pictures stand behind a row, from the least to the most if its cells differ."""
    counts = sorted({cell.count for cell in cells})
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _grids(
    measurements: Sequence[Measurement], models: Sequence[str], metric: Metric
) -> list[np.ndarray]:
    """For each model [pictures, (L, seed) pairs] of one metric, nan where it has none."""
    pictures = {
        name: row for row, name in enumerate(dict.fromkeys(m.picture for m in measurements))
    }
    repeats = {key: column for column, key in enumerate(sorted({_repeat(m) for m in measurements}))}
    grids = np.full((len(models), len(pictures), len(repeats)), math.nan)
    places = {model: index for index, model in enumerate(models)}
    for m in measurements:
        if m.model in places:
            grids[places[m.model], pictures[m.picture], repeats[_repeat(m)]] = metric.of(m)
    return list(grids)


def _repeat(measurement: Measurement) -> tuple[int, int]:
    return measurement.layers, measurement.seed


def _check_unique(measurements: Sequence[Measurement]) -> None:
    seen = set()
    for m in measurements:
        key = (m.model, m.picture, *_repeat(m))
        if key in seen:
            raise ValueError(
                f"{m.model!r} has two measurements of picture {m.picture!r} with L = {m.layers} "
                f"and seed {m.seed}; please keep one, or number the seeds"
            )
        seen.add(key)

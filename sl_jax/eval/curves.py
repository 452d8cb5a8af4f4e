"""Curves from the log of a training run, and from the records of its judge."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sl_jax.eval.options import Named
from sl_jax.eval.report import Curve, Series
from sl_jax.scoring import CRITERIA
from sl_jax.scoring.records import Record, RecordError, read_records
from sl_jax.training.metrics import read_metrics

_log = logging.getLogger(__name__)

RUN_CURVES: Mapping[str, tuple[str, ...]] = {
    "Training reward": ("judge/reward_mean", "judge/stage1_mean"),
    "Held-out reward (stage 1)": ("evaluation/reward",),
    "Held-out recomposition PSNR, dB": ("evaluation/psnr",),
    "Spread of reward within a group": ("judge/reward_spread", "judge/stage1_spread"),
    "Clip fraction": ("learner/clipped_low/all", "learner/clipped_high/all"),
    "KL from the epoch's policy": ("learner/kl_old/all",),
}
"""Title of each curve, and the metrics on it."""


def run_curves(records: Sequence[Mapping[str, Any]], of: str = "") -> tuple[Curve, ...]:
    """The curves that a run's records allow; bands where there are bounds NAME_low, NAME_high.

    Args:
      records: from `training.metrics.read_metrics`.
      of: name of the run, if there are several.
    """
    found = []
    for title, names in RUN_CURVES.items():
        series = tuple(line for name in names if (line := _series(name, records)))
        if series:
            found.append(Curve(f"{of}: {title}" if of else title, series))
    return tuple(found)


def record_curves(records: Sequence[Record], of: str = "") -> tuple[Curve, ...]:
    """What the judge said of the candidates of each epoch: the mean of every criterion.

    Candidates without a valid score count in no mean; epochs without any have no point.

    Args:
      records: from `scoring.records.read_records`.
      of: name of the run, if there are several.
    """
    told: dict[int, list[np.ndarray]] = {}
    for record in records:
        if record.scores.valid.any():
            told.setdefault(record.epoch, []).append(record.scores.criteria[record.scores.valid])
    if not told:
        return ()
    epochs = sorted(told)
    means = np.array([np.concatenate(told[epoch]).mean(axis=0) for epoch in epochs])
    title = "Criteria of the training's judge"
    series = tuple(
        Series(name.replace("_", " "), epochs, means[:, index].tolist())
        for index, name in enumerate(CRITERIA)
    )
    return (Curve(f"{of}: {title}" if of else title, series),)


def adapter_curves(adapters: Iterable[Named]) -> tuple[Curve, ...]:
    """The curves of the runs that adapters come from, where they lie in a work directory."""
    curves: list[Curve] = []
    for name, where in adapters:
        folder = epath.Path(where).expanduser()
        for place in (folder, folder.parent):
            if (place / "metrics.jsonl").exists():
                curves += run_curves(list(read_metrics(place)), name)
                curves += record_curves(_records(place / "judge"), name)
                break
    return tuple(curves)


def _records(folder: epath.Path) -> list[Record]:
    """What a judge's folder holds; none where it holds no records, or damaged ones."""
    try:
        return read_records(folder)
    except FileNotFoundError:
        return []
    except RecordError as error:
        _log.warning("The report shows no criteria of the training's judge: %s", error)
        return []


def _series(name: str, records: Sequence[Mapping[str, Any]]) -> Series | None:
    known = [record for record in records if record.get(name) is not None]
    if not known:
        return None
    bounds: list[list[float]] = []
    if all(f"{name}_low" in record for record in known):
        bounds = [[record[f"{name}_{side}"] for record in known] for side in ("low", "high")]
    label = name.split("/")[1].replace("_", " ")
    return Series(label, [r["step"] for r in known], [r[name] for r in known], *bounds)

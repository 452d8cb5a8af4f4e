"""Curves from the log of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from sl_jax.eval.options import Named
from sl_jax.eval.report import Curve, Series
from sl_jax.training.metrics import read_metrics

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


def adapter_curves(adapters: Iterable[Named]) -> tuple[Curve, ...]:
    """The curves of the runs that adapters come from, where they lie in a work directory."""
    curves: list[Curve] = []
    for name, where in adapters:
        folder = epath.Path(where).expanduser()
        for place in (folder, folder.parent):
            if (place / "metrics.jsonl").exists():
                curves += run_curves(list(read_metrics(place)), name)
                break
    return tuple(curves)


def _series(name: str, records: Sequence[Mapping[str, Any]]) -> Series | None:
    known = [record for record in records if record.get(name) is not None]
    if not known:
        return None
    bounds: list[list[float]] = []
    if all(f"{name}_low" in record for record in known):
        bounds = [[record[f"{name}_{side}"] for record in known] for side in ("low", "high")]
    label = name.split("/")[1].replace("_", " ")
    return Series(label, [r["step"] for r in known], [r[name] for r in known], *bounds)

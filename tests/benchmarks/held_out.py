"""What benchmarks share that compare adapters with the base on held-out designs."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sl_jax.eval.bootstrap import LEVEL, RESAMPLES, Interval, paired_difference

_ONE_SIGMA = 0.6827  # central share within one standard error


def module(name: str, *arguments: str) -> None:
    """Runs a door of the package to its end."""
    subprocess.run([sys.executable, "-m", f"sl_jax.{name}", *arguments], check=True)


def read_records(evaluation: Path) -> list[dict]:
    """One record per model and picture of a finished evaluation."""
    return json.loads((evaluation / "report.json").read_text())["records"]


def changes(
    records: Sequence[dict],
    model: str,
    measures: Mapping[str, int],
    groups: Mapping[str, int] | None = None,
) -> dict[str, dict]:
    """How a model's measures differ from the base's, paired by picture.

    Args:
        records: of both, as `read_records` gives them.
        model: whose.
        measures: +1 for each name where more is better, -1 where less is.
        groups: of pictures that have something in common, by picture: what is then resampled.

    Returns:
        Means, difference with its 95 % bootstrap interval and bootstrap error, by measure; how many
        errors it is better by is None where all pictures differ by the same.
    """
    measured = {
        name: {r["picture"]: r for r in records if r["model"] == name} for name in ("base", model)
    }
    pictures = sorted(measured["base"])
    found = {}
    for measure, better in measures.items():
        before, after = (
            np.array([measured[name][picture][measure] for picture in pictures], float)
            for name in ("base", model)
        )
        if groups:
            of = np.array([groups[picture] for picture in pictures])
            change, error = (
                _grouped_difference(after - before, of, level) for level in (LEVEL, _ONE_SIGMA)
            )
        else:
            change = paired_difference(after, before)
            error = paired_difference(after, before, level=_ONE_SIGMA)
        deviation = (error.high - error.low) / 2
        found[measure] = {
            "before": float(np.nanmean(before)),
            "after": float(np.nanmean(after)),
            "change": change.mean,
            "low": change.low,
            "high": change.high,
            "bootstrap_error": deviation,
            "better_by_errors": better * change.mean / deviation if deviation else None,
        }
    return found


def _grouped_difference(differences: np.ndarray, groups: np.ndarray, level: float) -> Interval:
    """The mean over pictures, nan left out; its interval by resampling whole groups of them."""
    known = ~np.isnan(differences)
    _, places = np.unique(groups[known], return_inverse=True)
    sums, counts = np.bincount(places, differences[known]), np.bincount(places)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences[known].mean()), float(low), float(high), len(places))

"""Scalars of an epoch: what the learner did at each trained step of the σ grid."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sl_jax.grpo.learner import StepReport
from sl_jax.grpo.objective import ObjectiveMetrics


def learner_metrics(updates: Sequence[Sequence[StepReport]]) -> dict[str, float]:
    """Averages over samples, by position in the σ grid and over all, from the reports of updates.

    Samples count by their weight in the loss. The mismatch between rollout and learner is taken at
    the first update, where both use the same adapter; everything else over the last one, where
    policies differ most. An update that had nothing to learn from reports nothing.
    """
    first, last = (jax.device_get(list(updates[i])) for i in (0, -1))
    return _by_step(last, _objective) | _by_step(first, _mismatch)


def _by_step(
    reports: Sequence[StepReport], summarise: Callable[[Sequence[StepReport]], dict[str, float]]
) -> dict[str, float]:
    groups: dict[str, list[StepReport]] = defaultdict(list)
    for report in reports:
        groups[f"step_{int(report.index)}"].append(report)
        groups["all"].append(report)
    return {
        f"learner/{name}/{where}": value
        for where, members in groups.items()
        for name, value in summarise(members).items()
    }


def _objective(reports: Sequence[StepReport]) -> dict[str, float]:
    samples: ObjectiveMetrics = jax.tree.map(
        lambda *parts: np.concatenate(parts), *(report.objective for report in reports)
    )
    weight = np.concatenate([report.weight for report in reports])

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=weight)) if weight.any() else math.nan

    excess = mean(samples.ratio_excess)
    return {
        "ratio_excess": excess,
        "ratio_std": math.sqrt(mean((samples.ratio_excess - excess) ** 2)),
        "clipped_low": mean(samples.clipped_low),
        "clipped_high": mean(samples.clipped_high),
        "surrogate_gain": mean(samples.surrogate_gain),
        "kl_old": mean(samples.kl_old),
        "kl_reference": mean(samples.kl_reference),
        "gradient_norm": float(np.mean([report.gradient_norm for report in reports])),
    }


def _mismatch(reports: Sequence[StepReport]) -> dict[str, float]:
    distances = np.concatenate([report.mismatch.distance for report in reports])
    log_ratios = np.concatenate([report.mismatch.log_ratio for report in reports])
    return {
        "mismatch": float(distances.mean()),
        "mismatch_log_ratio": float(np.abs(log_ratios).mean()),
    }

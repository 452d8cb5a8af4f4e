"""Scalars of an epoch: what the learner did at each trained step of the σ grid."""

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from sl_jax.grpo.learner import StepReport


def learner_metrics(updates: Sequence[Sequence[StepReport]]) -> dict[str, float]:
    """Averages over samples, by position in the σ grid and over all, from the reports of updates.

    The mismatch between rollout and learner is taken at the first update, where both use the same
    adapter; everything else over the last one, where policies differ most.
    """
    first, last = (jax.device_get(list(updates[i])) for i in (0, -1))
    metrics = _by_step(last, _objective)
    metrics |= _by_step(first, _mismatch)
    return metrics


def _by_step(reports: Sequence[StepReport], summarise) -> dict[str, float]:
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
    def mean(field: str) -> float:
        return float(np.mean([np.mean(getattr(r.objective, field)) for r in reports]))

    excess = np.concatenate([np.atleast_1d(r.objective.ratio_excess) for r in reports])
    return {
        "ratio_excess": float(excess.mean()),
        "ratio_std": float(excess.std()),
        "clipped_low": mean("clipped_low"),
        "clipped_high": mean("clipped_high"),
        "surrogate_gain": mean("surrogate_gain"),
        "kl_old": mean("kl_old"),
        "kl_reference": mean("kl_reference"),
        "gradient_norm": float(np.mean([r.gradient_norm for r in reports])),
    }


def _mismatch(reports: Sequence[StepReport]) -> dict[str, float]:
    return {
        "mismatch": float(np.mean([np.mean(r.mismatch.distance) for r in reports])),
        "mismatch_log_ratio": float(
            np.mean([np.mean(np.abs(r.mismatch.log_ratio)) for r in reports])
        ),
    }

"""Scalars of an epoch: what the learner did at each trained step of the σ grid."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sl_jax.eval.divergence import divergence
from sl_jax.grpo.config import StopConfig
from sl_jax.grpo.learner import StepReport, UpdateReport
from sl_jax.grpo.objective import ObjectiveConfig, ObjectiveMetrics
from sl_jax.imaging.words import counted, time_span

_log = logging.getLogger(__name__)

_MISMATCH = "learner/mismatch_log_ratio/step_"
_NEAR = 0.5  # of the clip range


def learner_metrics(updates: Sequence[UpdateReport]) -> dict[str, float]:
    """Averages over samples, by position in the σ grid and over all, from the reports of updates.

    Samples count by their weight in the loss. The mismatch between rollout and learner, with the
    adapter that sampled in both, is taken at the first update, the share of what was truncated over
    all, and everything else at the last one, where policies differ most. An update that had nothing
    to learn from reports nothing.
    """
    first, last = (jax.device_get(updates[i]) for i in (0, -1))
    metrics = _by_step(last.steps, _objective) | _by_step(first.steps, _mismatch)
    return metrics | _gradient_norms(last) | _truncated(updates)


def beyond(bounds: StopConfig, reports: Sequence[StepReport]) -> bool:
    """Whether the policy is further from the one that rolled out than a bound allows."""
    found = _objective(jax.device_get(reports))
    return any(
        bound is not None and found[name] > bound
        for name, bound in (
            ("kl_old", bounds.kl),
            ("clip_fraction", bounds.clip_fraction),
            ("log_ratio_size", bounds.log_ratio),
        )
    )


def warn_of_mismatch(metrics: Mapping[str, float], objective: ObjectiveConfig) -> None:
    """Says so where rollout and learner differ so much that it counts as a change of the policy.

    Half the clip range is near: what is clipped is then decided by rounding as much as by learning.
    """
    found = {
        int(n.removeprefix(_MISMATCH)): v for n, v in metrics.items() if n.startswith(_MISMATCH)
    }
    clip = min(objective.clip_low, objective.clip_high)
    near = {step: value for step, value in found.items() if value >= _NEAR * clip}
    if near:
        worst = max(near, key=lambda step: near[step])
        _log.warning(
            "Rollout and learner differ at step%s %s of the sampler by a log ratio of %.1e on "
            "average (step %d), and updates are clipped at %.1e: rounding is taken for learning. "
            "Please use compute.dtype=float32, a learner.micro_batch nearer to batch_groups × "
            "group_size, or a wider objective.clip_low and clip_high.",
            *("s" if len(near) > 1 else "", ", ".join(map(str, sorted(near))), near[worst]),
            *(worst, clip),
        )


def warn_of_standstill(updates: Sequence[UpdateReport]) -> None:
    """Says so where not even the first update of an epoch was within its bounds."""
    if updates and updates[0].stopped:
        _log.warning(
            "Before the first update of the epoch the policy is already beyond a bound of "
            "learner.stop, and nothing was learned; if it goes on, please raise the bound, or set "
            "rollout.max_staleness=0."
        )


def warn_of_spoiled(finite: np.ndarray) -> None:
    """Says so where candidates were not finite; they take no part in the update."""
    if not finite.all():
        _log.warning(
            "%d of %d candidates are not finite and are left out of the update; if it goes on, "
            "please go back to an earlier checkpoint with a lower optimizer.learning_rate.",
            *(np.sum(~finite), finite.size),
        )


def warn_of_divergence(records: Iterable[Mapping[str, Any]], said: set[str]) -> None:
    """Says what falls on held-out pictures while the training reward rises.

    Args:
        records: of the run so far.
        said: findings, without their numbers, that are not said again; new ones are added.
    """
    for finding in divergence(records):
        kind = re.sub(r"-?\d\S*", "", finding)
        if kind not in said:
            said.add(kind)
            _log.warning("In this run %s.", finding)


def epoch_line(
    epoch: int, of: int, metrics: Mapping[str, float], pace: tuple[float, float] | None
) -> str:
    """An epoch in one line of the log.

    Args:
        epoch: counted from 1.
        of: epochs of the run.
        metrics: of the epoch.
        pace: seconds per epoch, and to the end of the run, where they are known.
    """
    said = [f"reward {metrics['judge/reward_mean']:.3f}"]
    if "evaluation/reward" in metrics:
        said.append(f"held out {metrics['evaluation/reward']:.3f}")
    if "advantage/effective_groups" in metrics:
        said.append(counted(int(metrics["advantage/effective_groups"]), "group") + " to learn from")
    sides = [metrics.get(f"learner/clipped_{side}/all") for side in ("low", "high")]
    if None not in sides:
        said.append(f"{sum(sides):.0%} clipped")
    shares = [
        f"{name} {metrics[f'share/{name}']:.0%}"
        for name in ("rollout", "judging", "learning", "evaluating")
        if f"share/{name}" in metrics
    ]
    said.append(f"{time_span(metrics['seconds/all'])} ({', '.join(shares)})")
    if pace and epoch < of:
        said.append(f"{time_span(pace[1])} left")
    return f"Epoch {epoch} of {of}: {', '.join(said)}."


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
    means = {name: _mean(reports, [values]) for name, values in samples._asdict().items()}
    variance = _mean(reports, [(samples.ratio_excess - means["ratio_excess"]) ** 2])
    return means | {
        "ratio_std": math.sqrt(variance),
        "log_ratio_size": _mean(reports, [np.abs(samples.log_ratio)]),
        "clip_fraction": means["clipped_low"] + means["clipped_high"],
    }


def _gradient_norms(report: UpdateReport) -> dict[str, float]:
    if report.gradient_norm is None:
        return {}
    norms = {f"step_{index}": norm for index, norm in report.gradient_norms}
    norms["all"] = report.gradient_norm
    return {f"learner/gradient_norm/{where}": float(norm) for where, norm in norms.items()}


def _truncated(updates: Sequence[UpdateReport]) -> dict[str, float]:
    reports = [step for update in jax.device_get(updates) for step in update.steps]
    if not reports:
        return {}
    share = _mean(reports, [report.objective.truncated for report in reports])
    return {"learner/truncated_share": share}


def _mismatch(reports: Sequence[StepReport]) -> dict[str, float]:
    return {
        "mismatch": _mean(reports, [report.mismatch.distance for report in reports]),
        "mismatch_log_ratio": _mean(reports, [np.abs(r.mismatch.log_ratio) for r in reports]),
    }


def _mean(reports: Sequence[StepReport], values: Sequence[np.ndarray]) -> float:
    """Over the samples of all reports, by their weight; nan where none has any."""
    weight = np.concatenate([report.weight for report in reports])
    return float(np.average(np.concatenate(values), weights=weight)) if weight.any() else math.nan

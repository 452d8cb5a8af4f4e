"""The report of a run: reward curves, and held-out pictures before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sl_jax.eval.bootstrap import Interval, interval, paired_difference
from sl_jax.eval.report import Column, Curve, Decomposition, Fact, Picture, Report, Series, Table
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluated
from sl_jax.scoring import CRITERIA
from sl_jax.training.metrics import read_metrics

_CURVES = {
    "Training reward": ("judge/reward_mean", "judge/stage1_mean"),
    "Held-out reward (stage 1)": ("evaluation/reward",),
    "Held-out recomposition PSNR, dB": ("evaluation/psnr",),
    "Spread of reward within a group": ("judge/reward_spread", "judge/stage1_spread"),
    "Clip fraction": ("learner/clipped_low/all", "learner/clipped_high/all"),
    "KL from the epoch's policy": ("learner/kl_old/all",),
}


def run_report(
    config: GrpoConfig,
    workdir: epath.PathLike,
    before: Sequence[Evaluated],
    after: Sequence[Evaluated],
) -> Report:
    """What a finished run says of itself, on the pictures that both evaluations could read."""
    before, after = (
        [r for r in mine if r.example.slot in {other.example.slot for other in others}]
        for mine, others in ((before, after), (after, before))
    )
    gain = paired_difference([r.reward for r in after], [r.reward for r in before])
    records = list(read_metrics(workdir))
    return Report(
        title="Stable-Layers on JAX: training run",
        summary=(
            f"{config.epochs} epochs of Flow-GRPO on pictures in {config.data.path}, judged by "
            f"{', '.join(config.judge.models)}. Held-out pictures were never trained on; their "
            "noise is the same before and after."
        ),
        facts=_facts(before, after, gain),
        tables=(_table(before, after),),
        curves=tuple(
            curve for title, names in _CURVES.items() if (curve := _curve(title, names, records))
        ),
        pictures=_pictures(before, after, config.evaluation.shown),
        pictures_note="Held-out pictures: the initial adapter, then the trained one (average).",
        improvement_name="stage-1 reward",
        details={"model": config.model, "seed": str(config.seed), "workdir": config.workdir},
    )


def _facts(
    before: Sequence[Evaluated], after: Sequence[Evaluated], gain: Interval
) -> tuple[Fact, ...]:
    tone = {True: "good", False: "bad"}[gain.mean > 0] if gain.excludes_zero else "neutral"
    psnr = [float(np.mean([r.psnr for r in results])) for results in (before, after)]
    return (
        Fact("held-out reward before", _mean(before)),
        Fact("held-out reward after", _mean(after)),
        Fact("difference", f"{gain.mean:+.4f}", f"95 % {gain.low:+.4f} … {gain.high:+.4f}", tone),
        Fact("recomposition PSNR", f"{psnr[1]:.1f} dB", f"before {psnr[0]:.1f} dB"),
    )


def _mean(results: Sequence[Evaluated]) -> str:
    return f"{np.nanmean([r.reward for r in results]):.4f}"


def _table(before: Sequence[Evaluated], after: Sequence[Evaluated]) -> Table:
    rows = []
    for name, results in (("before", before), ("after", after)):
        criteria = [interval([r.criteria[k] for r in results]) for k in range(len(CRITERIA))]
        rows.append((name, interval([r.reward for r in results]), *criteria))
    return Table(
        f"Stage-1 score of {len(before)} held-out pictures",
        (
            Column(""),
            Column("reward", better="higher"),
            *(Column(name.replace("_", " "), better="higher") for name in CRITERIA),
        ),
        tuple(rows),
        note="Means with 95 % bootstrap intervals over pictures.",
    )


def _curve(title: str, names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Curve | None:
    series = []
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            x, y = zip(*points, strict=True)
            label = name.split("/")[1].replace("_", " ")
            series.append(Series(label, x, y, *_band(name, records)))
    return Curve(title, tuple(series)) if series else None


def _band(name: str, records: Sequence[Mapping[str, Any]]) -> tuple[list[float], ...]:
    rows = [r for r in records if r.get(name) is not None and f"{name}_low" in r]
    return tuple([r[f"{name}_{side}"] for r in rows] for side in ("low", "high")) if rows else ()


def _pictures(
    before: Sequence[Evaluated], after: Sequence[Evaluated], shown: int
) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            name=first.example.picture_id,
            source=first.example.picture,
            caption=first.example.caption,
            decompositions=tuple(
                Decomposition(
                    label, r.layers, {"reward": f"{r.reward:.3f}", "PSNR": f"{r.psnr:.1f} dB"}
                )
                for label, r in (("before", first), ("after", second))
            ),
            improvement=second.reward - first.reward,
        )
        for first, second in zip(before[:shown], after[:shown], strict=True)
    )

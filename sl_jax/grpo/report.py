"""The report of a run: reward curves, and held-out pictures before and after."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from sl_jax.data.pictures import shown as shown_name
from sl_jax.eval.bootstrap import Interval, interval, paired_difference
from sl_jax.eval.curves import run_curves
from sl_jax.eval.divergence import divergence
from sl_jax.eval.report import Column, Decomposition, Fact, Picture, Report, Table
from sl_jax.grpo.config import GrpoConfig
from sl_jax.grpo.evaluation import Evaluated
from sl_jax.imaging.words import counted
from sl_jax.scoring import CRITERIA
from sl_jax.training.metrics import read_metrics


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
    warnings = "".join(f"\n\nWarning: {finding}." for finding in divergence(records))
    return Report(
        title="Stable-Layers on JAX: training run",
        summary=(
            f"{counted(config.epochs, 'epoch')} of Flow-GRPO on pictures in {config.data.path}, "
            f"judged by {', '.join(config.judge.models)}. Held-out pictures were never trained on; "
            f"their noise is the same before and after.{warnings}"
        ),
        facts=_facts(before, after, gain),
        tables=(_table(before, after),),
        curves=run_curves(records),
        pictures=_pictures(before, after, config.evaluation.shown),
        pictures_note="Held-out pictures: the initial adapter, then the trained one (average).",
        improvement_name="stage-1 reward",
        details={"model": config.model, "seed": str(config.seed), "workdir": config.workdir},
    )


def _facts(
    before: Sequence[Evaluated], after: Sequence[Evaluated], gain: Interval
) -> tuple[Fact, ...]:
    tone = {True: "good", False: "bad"}[gain.mean > 0] if gain.excludes_zero else "neutral"
    psnr = [float(np.nanmean([r.measures.psnr for r in results])) for results in (before, after)]
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
        reward = interval([r.reward for r in results])
        rows.append((name, reward, *criteria, reward.count))
    return Table(
        f"Stage-1 score of {counted(len(before), 'held-out picture')}",
        (
            Column(""),
            Column("reward", better="higher"),
            *(Column(name.replace("_", " "), better="higher") for name in CRITERIA),
            Column("pictures", 0),
        ),
        tuple(rows),
        note="Means with 95 % bootstrap intervals over the pictures that have a score.",
    )


def _pictures(
    before: Sequence[Evaluated], after: Sequence[Evaluated], shown: int
) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            name=shown_name(first.example.path.rpartition("/")[2]) or first.example.picture_id,
            source=first.example.picture,
            caption=first.example.caption,
            decompositions=tuple(
                Decomposition(
                    label,
                    r.layers,
                    {"reward": f"{r.reward:.3f}", "PSNR": f"{r.measures.psnr:.1f} dB"},
                )
                for label, r in (("before", first), ("after", second))
            ),
            improvement=second.reward - first.reward,
        )
        for first, second in zip(before[:shown], after[:shown], strict=True)
    )

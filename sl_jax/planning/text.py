"""A plan for people, and as JSON."""

from typing import Any

from sl_jax.planning.roofline import Forecast, JudgePool, PhasePlan, Plan

_GIB = 2**30


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan: bytes and operations per chip, seconds at peak rates.

    Forecast and replicas are None where the compiler refused a phase.
    """
    slice_, forecast, pool = plan.slice, plan.forecast(), plan.pool
    return {
        "topology": slice_.name,
        "accelerator_type": slice_.accelerator_type,
        "chips": slice_.chips,
        "chip": slice_.chip._asdict(),
        "mesh": plan.mesh,
        "micro_batch": plan.micro_batch,
        "fits": plan.fits,
        "needed": plan.most.needed,
        "resident": plan.resident,
        "phases": [_phase(phase, plan) for phase in plan.phases],
        "workload": plan.workload._asdict(),
        "forecast": forecast and forecast._asdict(),
        "judge_replicas": forecast and pool and pool.replicas(forecast.calls_per_second),
    }


def _phase(phase: PhasePlan, plan: Plan) -> dict[str, Any]:
    times = phase.times(plan.slice)
    return {
        "name": phase.name,
        "calls": phase.calls,
        "memory": phase.memory._asdict() if phase.memory else None,
        "refused": phase.refused.message if phase.refused else None,
        "held": phase.held,
        "needed": phase.needed,
        "flops": phase.flops,
        "hbm_bytes": phase.hbm,
        "sent_bytes": phase.collectives,
        "seconds": times,
        "epoch_seconds": phase.seconds(plan.slice),
        "bound": max(times, key=times.get),
    }


def to_text(plan: Plan) -> str:
    """Fits or not and by how much, a table of the phases, the forecast."""
    lines = [_verdict(plan), "", *_table(plan), "", *_forecast(plan)]
    if not plan.fits:
        lines += ["", *advice(plan)]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    hbm = plan.slice.chip.hbm
    mesh = (
        " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    )
    room = hbm - plan.most.needed
    if plan.fits:
        verdict = f"fits, with {_gib(room)} GiB to spare on each chip"
    elif room < 0:
        verdict = f"does not fit: {_gib(-room)} GiB too much on each chip in {plan.most.name}"
    else:
        verdict = f"does not fit: the compiler refused {' and '.join(plan.refused)}"
    return (
        f"{plan.slice.name} ({plan.slice.accelerator_type}, {plan.slice.chips} chips of "
        f"{_gib(hbm)} GiB), {mesh}, micro-batch {plan.micro_batch}: {verdict}."
    )


def _table(plan: Plan) -> list[str]:
    head = ("phase", "calls", "args", "temp", "out", "other", "sum GiB")
    rows = [(*head, "TFLOP", "HBM GB", "sent GB", "seconds", "bound by")]
    for phase in plan.phases:
        times = phase.times(plan.slice)
        sizes = phase.memory or ("", "", "")
        rows.append(
            (
                phase.name,
                f"{phase.calls:g}",
                *(_gib(size) if size != "" else "–" for size in sizes),
                _gib(phase.held),
                _gib(phase.needed),
                f"{phase.flops / 1e12:.1f}",
                f"{phase.hbm / 1e9:.1f}",
                f"{phase.sent / 1e9:.1f}",
                f"{phase.seconds(plan.slice):.1f}",
                max(times, key=times.get),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _forecast(plan: Plan) -> list[str]:
    chip, forecast = plan.slice.chip, plan.forecast()
    resident = ", ".join(f"{name} {_gib(size)}" for name, size in plan.resident.items())
    return [
        f"Per chip and call; seconds are a whole epoch's, at peak rates: {chip.flops / 1e12:.0f} "
        f"TFLOP/s (bfloat16), {chip.bandwidth / 1e9:.0f} GB/s of HBM and "
        f"{plan.slice.ici / 1e9:.0f} GB/s of links: no run is faster.",
        f"Always there, GiB per chip: {resident}.",
        *(_times(plan, forecast) if forecast else [_no_forecast(plan)]),
    ]


def _times(plan: Plan, forecast: Forecast) -> list[str]:
    work = plan.workload
    return [
        f"Epoch {forecast.epoch_seconds:.0f} s, and {forecast.evaluation_seconds:.0f} s of "
        f"evaluation per epoch on average; {work.epochs} epochs ({work.epochs * work.updates} "
        f"updates) {forecast.hours:.1f} h, without the judge.",
        f"Judge: {forecast.judge_calls} calls; so that nobody waits for it, "
        f"{forecast.pictures_per_second:.2f} candidates and {forecast.calls_per_second:.2f} calls "
        f"per second{_replicas(plan.pool, forecast)}.",
    ]


def _no_forecast(plan: Plan) -> str:
    return (
        f"No forecast: the compiler refused {' and '.join(plan.refused)}, whose traffic is not "
        "known, nor what comes after."
    )


def _replicas(pool: JudgePool | None, forecast: Forecast) -> str:
    if pool is None:
        return " (--judge_seconds of a call tells how many replicas that is)"
    count = pool.replicas(forecast.calls_per_second)
    return (
        f": {count} replica{'s' if count > 1 else ''} with {pool.concurrency} calls at a "
        f"time, of {pool.seconds:g} s each"
    )


def advice(plan: Plan) -> list[str]:
    """What to change, by what takes the memory."""
    worst, fixed = plan.most, sum(plan.resident.values())
    hbm = plan.slice.chip.hbm
    tips = []
    if fixed > 0.6 * hbm:
        tips.append(
            f"{_gib(fixed)} GiB are weights and optimizer: use more chips, or split them further "
            "(config.mesh.data=1, config.mesh.tensor)"
        )
    if worst.name.startswith("learner"):
        tips.append("lower config.learner.micro_batch, or set config.compute.remat=block")
    else:
        tips.append("lower config.rollout.batch_groups")
    tips.append("lower config.lora.rank or the longest side of config.data.buckets")
    tips.append("or let --suggest look for a mesh that fits")
    return ["To change: " + "; ".join(tips) + "."]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"

"""The README's tables and figures are those of the results that lie in the repository."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import growth
import plan_table
import pytest

from sl_jax.planning.roofline import JudgePool

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((Path(__file__).parent / "results" / name).read_text())


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(row: dict[str, float], digits: int) -> str:
    mean, low, high = (round(row[name], digits) + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})".replace("-", "−")


def change(row: dict[str, float], digits: int) -> str:
    told = [signed(row[name], digits) for name in ("change", "low", "high")]
    return f"{told[0]} ({told[1]} … {told[2]})"


def of_plans() -> Iterator[str]:
    plans = results("plan_table.json")
    for shown in (plan_table.table(plans), growth.table(plans, JudgePool(5.0, 16))):
        for line in shown.splitlines()[2:]:
            yield line.partition(" | ")[2]  # what the rows are called is the README's own


def of_the_tiny_base() -> Iterator[str]:
    for name, row in results("tiny_base.json")["rows"].items():
        if re.match("euler|heun", name):
            told = [f"{row[f'layerd_{part}']['mean']:.3f}" for part in ("rgb_l1", "alpha_iou")]
            told += [f"{row[part]['mean']:.4f}" for part in ("layer_l1", "layer_l1_order_free")]
            told = [interval(row["layerd_cost"], 3), *told, f"{row['psnr']['mean']:.1f} dB"]
            yield " | ".join((name, *told))


def of_the_two_stages() -> Iterator[str]:
    for name, row in results("judge_fidelity.json")["rows"].items():
        if name != "precise":
            of = ("precise", "order_free_l1")
            told = [interval(row[f"{stage}_{o}"], 2) for o in of for stage in ("stage1", "reward")]
            yield " | ".join(told)


def of_supervised_training() -> Iterator[str]:
    digits = {"layer_l1_order_free": 4, "layer_l1_background": 4, "layerd_cost_0": 3, "psnr": 2}
    for name, places in digits.items():
        row = results("sft_pairs.json")["held_out"][name]
        yield f"{row['before']:.{places}f} | {change(row, places)}"


def of_the_peer() -> Iterator[str]:
    for row in results("against_pytorch.json"):
        if row["ratio_to_peer"] is not None:
            digits = 1 if row["ratio_to_peer"] > 1 else 2
            yield f"| {row['ratio_to_peer']:.{digits}f} |"


def of_the_reproduction() -> Iterator[str]:
    tables = reproduction_tables()
    found = tables.read_results(tables.RESULTS)
    for part in (tables.headline, tables.controls, tables.ablations, tables.ratios):
        lines = part(found)
        assert lines, part.__name__
        yield from filter(None, lines)


def reproduction_tables() -> ModuleType:
    """Its files import each other, as launch/reproduce.sh has it."""
    folder = str(Path(__file__).parent / "reproduction")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("tables")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    "rows",
    [
        of_plans,
        of_the_tiny_base,
        of_the_two_stages,
        of_supervised_training,
        of_the_reproduction,
        of_the_peer,
    ],
)
def test_a_table_is_that_of_the_results(rows):
    expected = list(rows())
    assert len(expected) >= 4
    missing = [row for row in expected if row not in README]
    assert not missing, "\n".join(missing)


def test_the_quickstart_takes_what_it_took():
    seconds = results("quickstart.json")["seconds"]
    told = re.search(r"takes (\d+) s to install and (\d+) s to train", " ".join(README.split()))
    assert [int(part) for part in told.groups()] == [
        round(seconds[part]) for part in ("installation", "training")
    ]
    rewards = results("quickstart.json")["evaluation_reward"]
    assert f"Epoch 24 of 24: reward 0.383, held out {rewards['24']:.3f}, " in README
    assert f"before training the held-out reward was {rewards['0']:.3f}" in README


def test_planning_takes_what_it_took():
    took = {name: row["planning"] for name, row in results("plan_table.json").items()}
    whole = took.pop("v5e:2x4")
    core = [row["cpu_seconds"] for row in took.values()]
    peak = max(row["peak_bytes_of_any_row"] for row in took.values())
    assert whole["seconds"] < 180 and whole["peak_bytes_of_any_row"] < 4e9
    told = " ".join(README.split())
    assert (
        f"took {min(core):.0f} to {max(core):.0f} s of a core each, and at most {peak / 1e9:.1f} GB"
    ) in told
    assert (
        f"{whole['seconds']:.0f} s on two free cores, {whole['cpu_seconds']:.0f} s of a core, and "
        f"{whole['peak_bytes_of_any_row'] / 1e9:.1f} GB"
    ) in told


def test_the_learner_waits_as_little_as_it_did():
    waits = {run["factor"]: run["share"]["judging"] for run in results("overlap.json")["runs"]}
    assert waits[1.0] < 0.05
    told = (
        f"{waits[1.0]:.1%} of an epoch, and for {waits[0.0]:.1%} with a judge that answers at once"
    )
    assert told.replace("%", " %") in " ".join(README.split())

"""The committed plans: what follows from them without compiling again is still so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plan_table
import pytest

from sl_jax.grpo.programs import workload
from sl_jax.planning.phases import Workload
from sl_jax.planning.roofline import forecast

SCRIPT = Path(plan_table.__file__)
RESULTS = SCRIPT.parent / "results" / "plan_table.json"
ENTRIES = json.loads(RESULTS.read_text())
PLANS = {name: entry["plan"] for name, entry in ENTRIES.items()}


def test_the_plans_are_those_of_the_rows_commands():
    commands = {row.name: " ".join(["python", *plan_table.command(row)]) for row in plan_table.ROWS}
    assert {name: entry["command"] for name, entry in ENTRIES.items()} == commands


@pytest.mark.parametrize("row", plan_table.ROWS, ids=[row.name for row in plan_table.ROWS])
def test_the_forecast_is_that_of_the_phases(row):
    plan = PLANS[row.name]
    config = plan_table.configuration(row, plan["chips"])
    assert plan["workload"] == workload(config)._asdict()
    seconds = {phase["name"]: phase["epoch_seconds"] for phase in plan["phases"]}
    found = forecast(Workload(**plan["workload"]), seconds)
    assert plan["forecast"] == pytest.approx(found._asdict())


@pytest.mark.parametrize("row", plan_table.ROWS, ids=[row.name for row in plan_table.ROWS])
def test_a_derived_micro_batch_leaves_a_reserve(row):
    """Of 8 % of the memory, by what the compiler needs."""
    plan = PLANS[row.name]
    if plan["fits"]:
        assert plan["needed"] <= 0.92 * plan["chip"]["hbm"]


@pytest.mark.slow
def test_estimates_of_micro_batches_are_above_what_the_compiler_needs():
    """In a process of its own, which has libtpu describe the slices."""
    command = [sys.executable, SCRIPT, f"--output={RESULTS}", "--estimates"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["row"] for row in rows] == [row.name for row in plan_table.ROWS]
    for row in rows:
        assert row["micro_batch"] == PLANS[row["row"]]["micro_batch"], row
        assert row["needed"] <= row["estimate"] <= 1.2 * row["needed"], row

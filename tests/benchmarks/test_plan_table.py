"""The committed plans: rows of the table, with what follows from them without compiling again."""

import json
import runpy
from ast import literal_eval
from pathlib import Path

import plan_table
import pytest

from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.programs import workload
from sl_jax.planning.phases import Workload
from sl_jax.planning.roofline import forecast

ROOT = Path(__file__).parents[2]
PLANS = json.loads((ROOT / "tests/benchmarks/results/plan_table.json").read_text())


def _config(row, chips):
    """The configuration that the row's command gives."""
    settings = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"]()
    with settings.unlocked():
        for name, value in row.settings.items():
            value = literal_eval(value) if isinstance(value, str) else value
            settings.update_from_flattened_dict({name: value})
    settings.data.path = "pictures"
    return from_mapping(settings.to_dict(), chips)


@pytest.mark.parametrize("row", plan_table.ROWS, ids=[row.name for row in plan_table.ROWS])
def test_the_forecast_is_that_of_the_phases(row):
    plan = PLANS[row.name]["plan"]
    assert plan["workload"] == workload(_config(row, plan["chips"]))._asdict()
    seconds = {phase["name"]: phase["epoch_seconds"] for phase in plan["phases"]}
    assert plan["forecast"] == pytest.approx(
        forecast(Workload(**plan["workload"]), seconds)._asdict()
    )

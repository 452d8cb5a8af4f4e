"""How large a judge pool has to be, from the plans of slices."""

import copy
import json
from pathlib import Path

import growth
import pytest

from sl_jax.planning.roofline import JudgePool


@pytest.fixture
def plans():
    return json.loads((Path(__file__).parent / "results" / "plan_table.json").read_text())


def test_replicas_are_those_that_keep_pace(plans):
    entry = copy.deepcopy(plans["v5e:2x4"])
    entry["plan"]["forecast"] |= {"calls_per_second": 6.5, "pictures_per_second": 5.0}
    for seconds, in_flight, replicas in ((5.0, 16, 3), (2.0, 13, 1), (8.0, 4, 13)):
        (line,) = growth.table({"a": entry}, JudgePool(seconds, in_flight)).splitlines()[2:]
        assert line.endswith(f"| 5.00 | 6.50 | {replicas} |")


def test_only_slices_that_the_run_fits(plans):
    entry = plans["v5e:2x4"]
    broken = copy.deepcopy(entry)
    broken["plan"]["fits"] = False
    shown = growth.table({"a": broken, "b": entry | {"kind": "card"}}, JudgePool(5.0, 16))
    assert len(shown.splitlines()) == 2

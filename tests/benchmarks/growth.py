"""What a judge pool must deliver as the slice grows, from the plans of `plan_table.py`.

    python tests/benchmarks/growth.py --results tests/benchmarks/results/plan_table.json

Prints the table of the README: for every slice that the run fits, its mesh and work, the roofline
of its epoch, and the replicas of a judge for which nobody then waits. `--judge_seconds` and
`--judge_concurrency` are those of `sl_jax.plan`.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sl_jax.planning.roofline import JudgePool

_HEAD = ("slice", "hosts", "mesh", "groups per epoch", "epoch", "candidates / s", "calls / s")
_CHIPS_OF_A_HOST = 4  # but for single hosts of eight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--judge_seconds", type=float, default=5.0)
    parser.add_argument("--judge_concurrency", type=int, default=16)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    print(table(results, JudgePool(arguments.judge_seconds, arguments.judge_concurrency)))


def table(results: dict[str, Any], judge: JudgePool) -> str:
    """Markdown: one line per slice that the run fits, by chips, then by speed."""
    plans = [e["plan"] for e in results.values() if e["kind"] != "card" and e["plan"]["fits"]]
    plans.sort(key=lambda plan: (plan["chips"], -plan["forecast"]["epoch_seconds"]))
    head = f"| {' | '.join(_HEAD)} | replicas |\n|{' --- |' * (len(_HEAD) + 1)}"
    return "\n".join([head, *(_line(plan, judge) for plan in plans)])


def _line(plan: dict[str, Any], judge: JudgePool) -> str:
    forecast = plan["forecast"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    alone = plan["chips"] == 8 and plan["chip"]["name"] in ("v5e", "v6e")
    cells = (
        plan["topology"],
        1 if alone else math.ceil(plan["chips"] / _CHIPS_OF_A_HOST),
        mesh,
        plan["workload"]["groups"],
        f"{forecast['epoch_seconds']:.0f} s",
        f"{forecast['pictures_per_second']:.2f}",
        f"{forecast['calls_per_second']:.2f}",
        judge.replicas(forecast["calls_per_second"]),
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()

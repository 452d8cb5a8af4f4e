"""Does the production run fit, and how fast could it be, from one card to 256 chips?

    python tests/benchmarks/plan_table.py --output tests/benchmarks/results/plan_table.json

Plans `configs/grpo.py` for every row of `ROWS` with `python -m sl_jax.plan --json`, in a process of
its own, and prints one JSON line per row, with what planning took. Rows that the output has already
are not planned again; those with a note, which the table marks, say why they should be. `--table`
prints the table of the README from it, `--estimates` compiles nothing and prints for every row of
it the micro-batch that a run would derive, and what that is estimated to take beside what it took.
"""

import argparse
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path
from typing import Any, NamedTuple

from sl_jax.checkpoints.source import release_shapes
from sl_jax.grpo.config import GrpoConfig, from_mapping
from sl_jax.grpo.micro_batch import derived
from sl_jax.grpo.programs import Programs
from sl_jax.parallel.mesh import Layout, make_mesh
from sl_jax.planning import topologies
from sl_jax.planning.phases import Workload
from sl_jax.planning.roofline import forecast

_ROOT = Path(__file__).parents[2]
_GIB = 2**30
_H100 = {"hbm": 80e9, "flops": 989e12, "bandwidth": 3352e9}  # NVIDIA's data sheet, SXM, bfloat16
_RESERVED = 2e9  # of a card's memory: CUDA, its libraries, and what allocation leaves unused


class Row(NamedTuple):
    """A plan to make.

    Attributes:
        name: of the row.
        topology: as `sl_jax.plan` takes it.
        settings: fields of the configuration that differ from the defaults.
        flags: of the command.
        kind: "slice"; "weak" for rows whose work grows with the chips; "card" for one whose
            programs are compiled for a TPU chip, and whose memory and rates are a GPU's.
    """

    name: str
    topology: str
    settings: dict[str, int | str]
    flags: tuple[str, ...] = ("--quick",)
    kind: str = "slice"


def _weak(topology: str, chips: int) -> Row:
    """As many groups per chip as the production run has on four."""
    settings: dict[str, int | str] = {
        "mesh.data": chips // 4,
        "mesh.fsdp": 4,
        "rollout.groups": 8 * chips,
        "rollout.batch_groups": 2 * chips,
        "evaluation.batch": 2 * chips,
        "evaluation.pictures": 16 * chips,
    }
    return Row(f"{topology}, weak", topology, settings, kind="weak")


# As much as a card's 80 GB leave: less CUDA, its libraries, and what allocation leaves unused.
_CARD = ("--quick", f"--hbm_gib={(_H100['hbm'] - _RESERVED) / _GIB:.2f}")
ROWS = (
    Row("v5e:2x2", "v5e:2x2", {}),
    Row("v5e:2x2, smaller", "v5e:2x2", {"lora.rank": 16, "data.layers": "(3,)"}),
    Row("v5e:2x4", "v5e:2x4", {}, flags=()),
    Row("v5e:4x4", "v5e:4x4", {"mesh.fsdp": 8, "mesh.tensor": 2}),
    Row("v6e:2x2", "v6e:2x2", {}),
    Row("v6e:2x4", "v6e:2x4", {}),
    Row("v5p:2x2x1", "v5p:2x2x1", {}),
    Row("v5p:2x2x4", "v5p:2x2x4", {"mesh.fsdp": 8, "mesh.tensor": 2}),
    _weak("v5p:2x2x4", 16),
    _weak("v5p:4x8x8", 256),
    Row("H100", "v5p:1x1x1", {}, _CARD, "card"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", action="append", help="name of a row; may be repeated")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--estimates", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.table:
        print(table(results))
        return
    if arguments.estimates:
        for row in ROWS:
            print(json.dumps(estimate(row, results[row.name]["plan"])), flush=True)
        return
    for row in ROWS:
        if row.name in results or (arguments.only and row.name not in arguments.only):
            continue
        results[row.name] = planned(row)
        print(json.dumps({"row": row.name, **results[row.name]}), flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def command(row: Row) -> list[str]:
    """What Python is given to plan a row."""
    return [
        *("-m", "sl_jax.plan", "--config=configs/grpo.py", f"--topology={row.topology}", "--json"),
        *row.flags,
        *(f"--config.{name}={value}" for name, value in row.settings.items()),
    ]


def planned(row: Row) -> dict[str, Any]:
    """The plan of a row, and the seconds and bytes that making it took."""
    given = command(row)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, load = time.monotonic(), os.getloadavg()[0]
    done = subprocess.run([sys.executable, *given], cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{row.name} could not be planned; see above.")
    return {
        "kind": row.kind,
        "command": " ".join(["python", *given]),
        "plan": json.loads(done.stdout),
        "planning": {
            "seconds": seconds,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_bytes_of_any_row": after.ru_maxrss * 1024,
            "load": load,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def configuration(row: Row, chips: int) -> GrpoConfig:
    """The configuration that the row's command gives."""
    settings = runpy.run_path(str(_ROOT / "configs" / "grpo.py"))["get_config"]()
    with settings.unlocked():
        for name, value in row.settings.items():
            value = literal_eval(value) if isinstance(value, str) else value
            settings.update_from_flattened_dict({name: value})
    settings.data.path = "of no interest here"
    return from_mapping(settings.to_dict(), chips)


def estimate(row: Row, plan: dict[str, Any]) -> dict[str, Any]:
    """What `grpo.micro_batch` makes of a row: samples, and bytes beside those of the plan."""
    slice_ = topologies.topology(row.topology)
    topologies.prepare_environment(slice_)
    config = configuration(row, slice_.chips)
    layout = Layout(make_mesh(config.mesh, topologies.devices(slice_)))
    programs = Programs(config, release_shapes(), layout)
    found = derived(programs, config, layout, plan["chip"]["hbm"])
    needed = max(p["needed"] for p in plan["phases"] if p["name"].startswith("learner"))
    return {
        "row": row.name,
        "micro_batch": found.samples,
        "fits": found.fits,
        "estimate": found.needed,
        "needed": needed,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: one line per row."""
    names = ("slice", "mesh", "groups per epoch", "fits", "GiB per chip, of", "roofline epoch")
    head = f"| {' | '.join(names)} | 600 updates |"
    rule = "| --- | --- | --- | --- | --- | --- | --- |"
    rows = [_line(results[row.name]) for row in ROWS if row.name in results]
    return "\n".join([head, rule, *rows])


def _line(entry: dict[str, Any]) -> str:
    plan, card = entry["plan"], entry["kind"] == "card"
    chip = plan["chip"] | _H100 if card else plan["chip"]
    needed = plan["needed"] + (_RESERVED if card else 0)
    forecast = card_forecast(plan) if card and plan["forecast"] else plan["forecast"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = (
        ("H100, estimate" if card else plan["topology"]) + (" †" if "note" in entry else ""),
        mesh or "one",
        plan["workload"]["groups"],
        "yes" if needed <= chip["hbm"] else "**no**",
        f"{needed / _GIB:.1f} of {chip['hbm'] / _GIB:.1f}",
        f"{forecast['epoch_seconds']:.0f} s" if forecast else "–",
        f"{forecast['hours']:.0f} h" if forecast else "–",
    )
    return f"| {' | '.join(map(str, cells))} |"


def card_forecast(plan: dict[str, Any]) -> dict[str, float]:
    """The forecast with a GPU's rates in place of the chip's."""
    seconds = {
        phase["name"]: phase["calls"]
        * max(phase["flops"] / _H100["flops"], phase["hbm_bytes"] / _H100["bandwidth"])
        for phase in plan["phases"]
    }
    return forecast(Workload(**plan["workload"]), seconds)._asdict()


if __name__ == "__main__":
    main()

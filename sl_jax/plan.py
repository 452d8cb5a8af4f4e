"""Does a run fit, and how long does it take at best? `python -m sl_jax.plan --topology=v5e:2x4`.

Compiles the phases of a training configuration for TPUs that need not be there, or only the
shapes of the model: no weights are loaded. Exit code 1 if the run does not fit.
"""

import json
import logging
import os
import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.source import RELEASE_ID, release_shapes, resolve_model
from sl_jax.grpo.config import GrpoConfig, from_mapping
from sl_jax.grpo.micro_batch import with_micro_batch
from sl_jax.grpo.programs import Programs, workload
from sl_jax.parallel.mesh import Layout, MeshConfig
from sl_jax.planning import suggestions, topologies
from sl_jax.planning.phases import bytes_per_chip
from sl_jax.planning.roofline import JudgePool, Plan, plan_phases
from sl_jax.planning.text import to_json, to_text
from sl_jax.planning.topologies import PlanError, Topology
from sl_jax.training.configuration import ConfigError
from sl_jax.training.console import set_up_logging
from sl_jax.training.flags import parse_config_flags
from sl_jax.training.layout import run_layout

_log = logging.getLogger("sl_jax")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice of TPUs, such as v5e:2x4 or v5p:2x2x1.")
_JSON = flags.DEFINE_boolean("json", False, "Print the plan as JSON.")
_QUICK = flags.DEFINE_boolean(
    "quick", False, "Compile with the least effort: sooner, and memory is right to half a GiB."
)
_HBM = flags.DEFINE_float(
    "hbm_gib", None, "Memory of a chip to plan with; by default what the compiler gives programs."
)
_JUDGE_SECONDS = flags.DEFINE_float("judge_seconds", None, "That a call to the judge takes.")
_JUDGE_CONCURRENCY = flags.DEFINE_integer(
    "judge_concurrency", 8, "Calls that one replica of the judge takes at a time."
)
_SUGGEST = flags.DEFINE_boolean("suggest", False, "Try up to three meshes; print the fastest.")


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 1 if the run does not fit."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    try:
        sys.exit(run())
    except (ConfigError, CheckpointError, PlanError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run() -> int:
    """The plan of the flags; the exit code."""
    slice_ = topologies.topology(_TOPOLOGY.value, _HBM.value)
    topologies.prepare_environment(slice_)
    chips = topologies.devices(slice_)
    settings = _CONFIG.value.to_dict()
    settings["data"]["path"] = settings["data"]["path"] or "of no interest here"
    name = settings["model"]
    folder = release_shapes() if name == RELEASE_ID else resolve_model(name, ["*/*.json"])
    if _SUGGEST.value:  # whatever mesh the configuration has
        plan = _suggested(settings, folder, slice_, chips)
    else:
        plan = make_plan(from_mapping(settings, len(chips)), folder, slice_, chips)
    print(json.dumps(to_json(plan), indent=1) if _JSON.value else to_text(plan))
    return 0 if plan.fits else 1


def make_plan(config: GrpoConfig, folder: epath.Path, slice_: Topology, chips: list) -> Plan:
    """The plan of one configuration on a slice."""
    layout = run_layout(config.mesh, folder, chips)
    config = with_micro_batch(config, folder, layout, slice_.chip.hbm)
    programs = Programs(config, folder, layout)
    resident = {name: bytes_per_chip(tree) for name, tree in programs.resident().items()}
    phases = plan_phases(programs.chains(), slice_, _QUICK.value)
    batch, judge = config.learner.micro_batch, _judge_pool()
    return Plan(slice_, dict(layout.mesh.shape), resident, phases, workload(config), batch, judge)


def _judge_pool() -> JudgePool | None:
    seconds, concurrency = _JUDGE_SECONDS.value, _JUDGE_CONCURRENCY.value
    if seconds is None:
        return None
    if seconds <= 0 or concurrency < 1:
        raise PlanError(
            f"--judge_seconds is {seconds:g} and --judge_concurrency {concurrency}; please give "
            "more than 0 seconds and at least 1 call"
        )
    return JudgePool(seconds, concurrency)


def _suggested(settings: dict, folder: epath.Path, slice_: Topology, chips: list) -> Plan:
    """The fastest plan that fits of the most promising meshes; if none does, the nearest."""

    def config_on(mesh: MeshConfig) -> GrpoConfig:
        return from_mapping(settings | {"mesh": settings["mesh"] | mesh.sizes}, len(chips))

    def layout_on(mesh: MeshConfig) -> Layout:
        return run_layout(config_on(mesh).mesh, folder, chips)

    def resident_on(mesh: MeshConfig) -> int:
        programs = Programs(config_on(mesh), folder, layout_on(mesh))
        return sum(map(bytes_per_chip, programs.resident().values()))

    plans = []
    for mesh in suggestions.meshes(slice_, layout_on, resident_on):
        plan = make_plan(config_on(mesh), folder, slice_, chips)
        plans.append(plan)
        sizes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
        seconds = f"{plan.forecast().epoch_seconds:.0f}" if plan.forecast() else "unknown"
        _log.info("%s: %s, %s s per epoch", sizes, "fits" if plan.fits else "does not fit", seconds)
    return suggestions.best(plans)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # libtpu tells of its options
    app.run(main, flags_parser=parse_config_flags)

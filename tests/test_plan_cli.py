"""`python -m sl_jax.plan`: programs for TPUs that are not there."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sl_jax.grpo.config import from_mapping
from sl_jax.planning import topologies
from sl_jax.training.flags import packaged

ROOT = Path(__file__).parents[1]
# A narrow model of two blocks; the rest is the production run, but for fewer and smaller samples.
WIDTH = 8 * 128
WEIGHTS = 2 * 12 * WIDTH**2  # of a block: projections and MLP, for image and for text
SMALL = (
    "--config.rollout.groups=8",
    "--config.rollout.batch_groups=4",
    "--config.rollout.group_size=4",
    "--config.learner.micro_batch=4",
    "--config.data.buckets=((128, 128),)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The release's configuration, made small."""
    folder = tmp_path_factory.mktemp("model")
    for path in (ROOT / "sl_jax" / "assets" / "qwen_image_layered").rglob("*.json"):
        told = json.loads(path.read_text())
        if "num_layers" in told:
            told |= {"num_layers": 2, "num_attention_heads": WIDTH // 128}
        target = folder / path.relative_to(ROOT / "sl_jax" / "assets" / "qwen_image_layered")
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(told))
    return folder


def _plan(*flags, variant="production"):
    done = subprocess.run(
        [sys.executable, "-m", "sl_jax.plan", f"--config=configs/grpo.py:{variant}", *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout, done.stderr


def test_mistakes_end_in_one_line():
    for flags, message in (
        (("--topology=h100:1",), "PlanError: topology 'h100:1' is unknown"),
        (("--topology=v5e:2x4", "--config.mesh.fsdp=3"), "ConfigError"),
        (("--topology=v5e:4x4", "--config.mesh.fsdp=1", "--config.mesh.tensor=16"), "24 heads"),
    ):
        code, printed, errors = _plan(*flags)
        assert code == 1 and not printed
        assert message in errors and "Traceback" not in errors


@pytest.mark.slow
def test_the_programs_of_a_run_are_compiled_for_a_slice(folder):
    flags = (
        "--topology=v5e:2x2",
        f"--config.model={folder}",
        *SMALL,
        "--json",
        "--quick",
        "--judge_seconds=2",
    )
    code, printed, errors = _plan(*flags)
    assert code == 0, errors
    plan = json.loads(printed)
    assert plan["fits"] and plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    phases = {phase["name"]: phase for phase in plan["phases"]}
    learner = {"learner forward", "learner backward", "apply"}
    assert set(phases) == learner | {"rollout", "encode", "decode"}
    assert plan["micro_batch"] == 4 and plan["judge_replicas"] > 0
    for phase in phases.values():
        assert phase["memory"]["arguments"] > 0 and phase["refused"] is None
        assert phase["needed"] < plan["chip"]["hbm"]
    # Every chip gets the three quarters of the weights that it lacks, in bfloat16.
    forward = phases["learner forward"]
    gathered = 2 * WEIGHTS * 2 * 3 / 4
    assert 0.7 * gathered < sum(forward["sent_bytes"].values()) < 1.5 * gathered
    # Per chip one sample; image and text tokens meet half of the weights each.
    linear = 2 * 2 * WEIGHTS / 2 * (6 * 64 + 512)
    assert 0.9 * linear < forward["flops"] < 1.5 * linear
    # The forward pass again and one product back for each, but for what comes before any adapter.
    assert 1.5 < phases["learner backward"]["flops"] / forward["flops"] < 2.6
    assert plan["forecast"]["judge_calls"] == 300 * 8 * 5


@pytest.mark.slow
def test_a_mesh_is_suggested_where_that_of_the_configuration_cannot_be(folder):
    """Batches of two groups leave 16 chips few meshes, and the default one is none of them."""
    flags = [f"--config.model={folder}", *SMALL, "--config.rollout.batch_groups=2", "--quick"]
    flags.append("--topology=v5e:4x4")
    code, _, errors = _plan(*flags)
    assert code == 1 and "ConfigError" in errors
    code, printed, errors = _plan(*flags, "--suggest")
    assert code == 0, errors
    assert re.search(r"^v5e:4x4 .* tensor 8, micro-batch 4: fits", printed), printed
    for data, fsdp in ((2, 1), (1, 2)):
        assert f"data {data}, fsdp {fsdp}, tensor 8, sequence 1: fits, " in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "topology"),
    [("tiny", "v5e:1x1"), ("gpu1", "v5p:1x1x1"), ("v5e8", "v5e:2x4"), ("v5p16", "v5p:2x2x4")],
)
def test_every_variant_is_planned(random_checkpoint, variant, topology):
    """With its batches and mesh, on its number of devices; the model and its pictures are small.

    Plans of the real one take minutes: tests/benchmarks/plan_table.py. One takes the compiler's
    full effort, the others the least.
    """
    small = ["--config.data.buckets=((32, 32),)", f"--config.model={random_checkpoint}"]
    if variant != "tiny":
        small.append("--quick")
    code, printed, errors = _plan(f"--topology={topology}", *small, "--json", variant=variant)
    assert code == 0, errors
    plan = json.loads(printed)
    assert plan["fits"] and math.prod(plan["mesh"].values()) == topologies.topology(topology).chips


def test_a_hosted_judge_changes_nothing_that_is_planned():
    """Nor does a mesh that names its eight chips: what is planned for one is for all three."""
    production, hosted, v5e8 = (
        packaged("grpo", variant).to_dict() for variant in ("production", "hosted", "v5e8")
    )
    assert production.pop("judge") != hosted.pop("judge")
    assert hosted == production
    assert from_mapping(_given(v5e8), 8).mesh.shape(8) == from_mapping(
        _given(hosted), 8
    ).mesh.shape(8)
    assert v5e8 | {"mesh": hosted["mesh"], "judge": None} == hosted | {"judge": None}


def _given(settings):
    return settings | {"data": settings["data"] | {"path": "pictures"}}

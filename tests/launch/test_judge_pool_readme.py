"""The README's three commands for two judge servers and a training run with them, as they stand."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from services import LIMIT, free_ports

from sl_jax.data import write_designs
from sl_jax.scoring.records import read_records

ROOT = Path(__file__).parents[2]
# The same program, in less time.
SMALL = {
    "epochs": "1",
    "data.buckets": "((32, 32),)",
    "data.eval_fraction": "0.2",
    "rollout.groups": "2",
    "rollout.batch_groups": "2",
    "rollout.group_size": "2",
    "rollout.steps": "4",
    "rollout.window_size": "2",
    "rollout.window_range": "(0, 3)",
    "learner.updates": "1",
    "learner.micro_batch": "4",
    "evaluation.pictures": "2",
    "evaluation.batch": "2",
    "evaluation.steps": "2",
    "evaluation.shown": "1",
    "mesh.data": "1",
}


def commands() -> str:
    """The block of the README that starts two servers and trains with them."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "--config.judge.endpoints=http://127" in block]
    return block


def test_they_are_three_and_name_the_ports_that_they_serve():
    told = commands().replace("\\\n", " ").strip().splitlines()
    assert len(told) == 3
    served = re.findall(r"sl_jax\.judge --port=(\d+) &", "\n".join(told[:2]))
    asked = re.findall(r"--config\.judge\.endpoints=http://127\.0\.0\.1:(\d+)/v1", told[2])
    assert len(set(served)) == 2 and served == asked


@pytest.mark.slow
def test_they_train(tmp_path):
    write_designs(tmp_path / "pictures", "B", range(8), 32, 3)
    block = commands()
    replaced = {
        "python": sys.executable,
        "runs/quickstart/pictures": str(tmp_path / "pictures"),
        "runs/pool": str(tmp_path / "run"),
        **dict(zip(("8001", "8002"), map(str, free_ports(2)), strict=True)),
    }
    for told, here in replaced.items():
        assert re.search(rf"(?<![\w.]){told}\b", block), told
        block = re.sub(rf"(?<![\w.]){told}\b", lambda _, here=here: here, block)
    small = " ".join(f"--config.{name}='{value}'" for name, value in SMALL.items())
    flags = "--xla_force_host_platform_device_count=1"
    printed = tmp_path / "printed.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-ec", f"{block.rstrip()} {small}"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        code = process.wait(LIMIT)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the servers
    said = printed.read_text()
    assert code == 0, said[-5000:]
    assert said.count("ready (JSON by schema)") == 2 and "judging takes about" in said
    endpoints = {
        name for r in read_records(tmp_path / "run" / "judge") for name in r.scores.endpoints
    }
    assert endpoints == {f"127.0.0.1:{replaced[port]}" for port in ("8001", "8002")}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()

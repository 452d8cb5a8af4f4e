"""The evaluate command: mistakes, and a whole evaluation that is killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sl_jax
from sl_jax import imaging
from sl_jax.checkpoints.peft import save_peft
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.data import write_designs
from sl_jax.data.procedural import make_design
from sl_jax.eval.stacks import read_stack
from sl_jax.models.lora import Adapter, LoRAConfig, init_adapter

COMMAND = [sys.executable, "-m", "sl_jax.evaluate"]
COUNT = 4


def _run(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, flags)],
        **{"capture_output": True, "text": True, "timeout": 1200},
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def adapter(random_checkpoint, tmp_path_factory) -> Path:
    """A PEFT folder of a run, beside the run's log; its update is not zero."""
    shapes = parameter_shapes(random_checkpoint)
    fresh = init_adapter(jax.random.key(3), shapes, LoRAConfig(rank=4, alpha=8.0))
    moved = jax.tree.map(lambda x: x + 0.2, fresh.lora)
    run = tmp_path_factory.mktemp("tuned")
    save_peft(run / "adapter", Adapter(moved, fresh.lora_scale), str(random_checkpoint))
    lines = [{"step": step, "judge/reward_mean": step / 10} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run / "adapter"


def test_mistakes_are_said_before_anything_is_loaded(tmp_path):
    told = _run("--data=procedural:B:4", "--model=tiny", f"--output={tmp_path}/o", "--sampler=rk4")
    assert told.returncode == 1
    assert told.stderr.strip().splitlines()[-1] == (
        "EvaluationError: sampler 'rk4' is unknown; known are heun, euler"
    )
    assert not (tmp_path / "o").exists()


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("no folder")
    told = _run("--data=procedural:B:1:2:32", "--model=tiny", f"--output={tmp_path}/taken")
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert told.stderr.strip().splitlines()[-1] == (
        f"{tmp_path}/taken: File exists; something else is in its way; please choose another place"
    )


@pytest.mark.slow
def test_processes_share_the_pictures(tmp_path):
    write_designs(tmp_path / "data", "B", range(COUNT), 32, 2, with_layers=True)
    data, layers = f"--data={tmp_path}/data", f"--layers=made={tmp_path}/data"
    flags = (data, layers, "--protocols=stable_layers", f"--output={tmp_path}/out")
    pipe = subprocess.PIPE
    shards = [
        subprocess.Popen([*COMMAND, *flags, f"--shard={part}/2"], stdout=pipe, stderr=pipe)
        for part in range(2)
    ]
    for part, shard in enumerate(shards):
        printed, errors = shard.communicate(timeout=600)
        assert shard.returncode == 0, errors.decode()
        assert f"Shard {part}/2 is finished: {COUNT // 2} pictures." in printed.decode()
    assert not (tmp_path / "out" / "report.html").exists()
    done = _run(*flags)
    assert done.returncode == 0 and "made:" not in done.stderr  # nothing was left to measure
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["Pictures"] for row in report["tables"][0]["rows"]} == {COUNT}


@pytest.mark.slow
def test_an_evaluation_from_start_to_page(random_checkpoint, adapter, tmp_path):
    output = tmp_path / "out"
    flags = (
        *(f"--data=procedural:B:{COUNT}:2:32", f"--model={random_checkpoint}", "--judge=embedded"),
        *(f"--adapter=tuned={adapter}", "--sampler=heun:2,euler:2", "--dtype=float32"),
        *(f"--output={output}", "--batch_size=4", "--seed=5"),
    )
    killed = subprocess.Popen([*COMMAND, *flags], stderr=subprocess.DEVNULL)
    finished = output / "results" / "base, heun 2"
    deadline = time.monotonic() + 1000
    while len(list(finished.glob("*.json"))) < COUNT:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {path: path.read_bytes() for path in (output / "layers").rglob("*.png")}
    times = {
        path: path.stat().st_mtime_ns for path in (output / "layers" / finished.name).rglob("*.png")
    }
    assert len(times) == 2 * COUNT

    done = _run(*flags)
    assert done.returncode == 0, done.stderr
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert all(path.read_bytes() == content for path, content in before.items())
    report = json.loads((output / "report.json").read_text())
    tables = {table["title"]: table["rows"] for table in report["tables"]}
    models = ["base, heun 2", "base, euler 2", "tuned, heun 2", "tuned, euler 2"]
    for title in ("Per-layer L1", "Without a reference", "Judge"):
        assert [row["Model"] for row in tables[title]][:4] == models
        assert {row["Pictures"] for row in tables[title]} == {COUNT}
    assert len(tables["Win rate against base, heun 2"]) == 3 + 3
    assert [curve["title"] for curve in report["curves"]] == ["tuned: Training reward"]
    assert all(name in done.stdout for name in models)

    picture = imaging.recompose(make_design("B", 1, 32, 2).layers)
    decompose = sl_jax.Decomposer.from_pretrained(
        str(random_checkpoint), str(adapter), dtype="float32"
    )
    made = decompose(Image.fromarray(picture), layers=2, seed=6, steps=2, sampler="heun", size=32)
    kept = read_stack(output / "layers" / "tuned, heun 2" / "B-000001")
    gap = np.abs(np.stack([np.asarray(layer) for layer in made]).astype(int) - kept)
    assert gap.max() <= 1
    for name in models[:2]:
        assert np.abs(kept.astype(int) - read_stack(output / "layers" / name / "B-000001")).max()

    again = _run(*flags[:-1], "--seed=6")
    assert again.returncode == 1
    assert "seed: 5 there, 6 here" in again.stderr


def _stacks(output: Path) -> dict[str, np.ndarray]:
    made = sorted((output / "layers" / "base").iterdir())
    return {folder.name: read_stack(folder).astype(int) for folder in made}


@pytest.mark.slow
def test_processes_and_devices_share_the_pictures(random_checkpoint, tmp_path):
    """Two processes of four devices each, one of them again, and one device alone: the same."""
    flags = (
        *(f"--data=procedural:B:{COUNT}:2:32", f"--model={random_checkpoint}", "--sampler=euler"),
        *("--steps=2", "--dtype=float32", "--protocols=stable_layers", "--nobaselines"),
    )
    one = _run(*flags, f"--output={tmp_path / 'one'}", XLA_FLAGS="")
    assert one.returncode == 0, one.stderr
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    shared = (*flags, f"--output={tmp_path / 'shared'}", "--batch_size=4")
    for part in (0, 1, 1):
        done = _run(*shared, f"--shard={part}/2", **devices)
        assert done.returncode == 0, done.stderr
        assert f"Shard {part}/2 is finished" in done.stdout
        assert len(_stacks(tmp_path / "shared")) == (part + 1) * COUNT // 2
    assert "base:" not in done.stderr  # there was nothing left to make
    assert not (tmp_path / "shared" / "report.html").exists()
    last = _run(*shared, **devices)
    assert last.returncode == 0, last.stderr
    here, there = _stacks(tmp_path / "one"), _stacks(tmp_path / "shared")
    assert here.keys() == there.keys() and len(here) == COUNT
    assert max(np.abs(here[name] - there[name]).max() for name in here) <= 1
    report = json.loads((tmp_path / "shared" / "report.json").read_text())
    assert {row["Pictures"] for row in report["tables"][0]["rows"]} == {COUNT}

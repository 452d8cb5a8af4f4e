"""`python -m sl_jax.sft` on the tiny base: stopped, gone on with, and an adapter that learned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from sl_jax.data import write_designs
from sl_jax.data.procedural import make_design
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FAMILY = "B"  # which the tiny base has never seen
TRAIN_SEEDS = range(10_000, 10_200)
HELD_OUT = range(16)
STEPS = 120
LIMIT = 1800  # seconds for one process, on a busy machine

pytestmark = pytest.mark.slow


def _start(module: str, *flags: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    command = [sys.executable, "-m", f"sl_jax.{module}", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it printed."""
    try:
        printed, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, printed + errors


class Run(NamedTuple):
    """A run that Ctrl-C stopped, and that was then started again."""

    folder: Path
    flags: tuple[str, ...]
    stopped: tuple[int, str]
    ended: tuple[int, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_designs(folder / "designs", FAMILY, TRAIN_SEEDS, 64, 3, with_layers=True)
    flags = (
        "--config=configs/sft.py:tiny",
        f"--config.data.path={folder / 'designs'}",
        f"--config.workdir={folder / 'run'}",
        f"--config.steps={STEPS}",
        "--config.batch=8",
        "--config.eval_every=30",
        "--config.ema=0.97",
    )
    process = _start("sft", *flags)
    deadline = time.monotonic() + LIMIT
    while not list(read_metrics(folder / "run")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped = _ended(process)
    ended = _ended(_start("sft", *flags))
    assert ended[0] == 0, ended[1]
    return Run(folder / "run", flags, stopped, ended)


def test_ctrl_c_saves_and_says_how_to_go_on(run):
    code, printed = run.stopped
    assert code == 130 and "Traceback" not in printed
    assert "The same command goes on after the last complete update" in printed
    assert "Going on at update" in run.ended[1]
    assert f"The result is in {run.folder / 'adapter'}." in run.ended[1]
    steps = [record["step"] for record in read_metrics(run.folder) if "tune/mse" in record]
    assert steps == list(range(10, STEPS + 1, 10))


def test_the_loss_falls(run):
    records = list(read_metrics(run.folder))
    held_out = [r["tune/held_out_mse"] for r in records if "tune/held_out_mse" in r]
    trained = [r["tune/mse"] for r in records if "tune/mse" in r]
    assert len(held_out) == 4 and held_out[-1] < held_out[0]
    assert np.mean(trained[-4:]) < 0.95 * np.mean(trained[:2])


def test_decompose_takes_the_run_and_its_layers_are_no_worse(run, tmp_path):
    write_designs(tmp_path / "pictures", FAMILY, HELD_OUT, 64, 3)
    settings = ["--layers=3", "--steps=10", "--sampler=euler", "--size=64", "--transparent"]
    given = (f"--input={tmp_path / 'pictures'}", "--model=tiny", *settings)
    outputs = {"base": (), "tuned": (f"--adapter={run.folder}",)}
    for name, adapter in outputs.items():
        output = f"--output={tmp_path / name}"
        code, printed = _ended(_start("decompose", *given, output, *adapter))
        assert code == 0, printed

    def order_free(folder: Path) -> float:
        return np.mean([_order_free(found) for found in sorted(folder.iterdir())])

    before, after = order_free(tmp_path / "base"), order_free(tmp_path / "tuned")
    print(f"order-free L1 on held-out designs: {before:.4f} before, {after:.4f} after")
    # So short a run moves them little; `tests/benchmarks` has one that is long enough to tell.
    assert after != before and after < before + 0.001


def _order_free(folder: Path) -> float:
    pictures = [Image.open(path).convert("RGBA") for path in sorted(folder.glob("layer_*.png"))]
    layers = np.stack([np.array(picture) for picture in pictures])
    seed = int(folder.name.partition("-")[2].partition(".")[0])
    return layer_l1(layers, make_design(FAMILY, seed, 64, 3).layers).order_free


def test_the_adapter_is_one_for_pytorch_too(run):
    settings = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 16 and settings["base_model_name_or_path"] == "tiny"


def test_what_cannot_run_ends_in_one_message(run, tmp_path):
    elsewhere = f"--config.workdir={tmp_path / 'run'}"
    cases = [
        ((), "Flag --config must have a value other than None"),
        ((run.flags[0], elsewhere, f"--config.data.path={tmp_path}/none"), f"{tmp_path}/none"),
        (("--config=configs/sft_tiny.py", elsewhere, "--config.vae.batch=7"), "config.vae.batch"),
        ((*run.flags, "--config.lora.rank=5"), "config.lora.rank: 16 there, 5 here"),
    ]
    for flags, message in cases:
        code, printed = _ended(_start("sft", *flags))
        assert code == 1 and "Traceback" not in printed, printed
        assert message in printed
    assert not (tmp_path / "run" / "config.json").exists()

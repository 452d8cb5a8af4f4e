"""Crello and TFDS datasets through the doors: `train`, `sft` and `evaluate` of their own names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crello_files import design, write_split

from sl_jax.data.crello import prepare_crello
from sl_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

LIMIT = 900  # seconds for one process, on a busy machine
TRAINED, HELD_OUT = 12, 3


@pytest.fixture(scope="module")
def crello(tmp_path_factory) -> Path:
    """A folder of parquet files; in the test split one design is broken."""
    folder = tmp_path_factory.mktemp("crello")
    write_split(folder / "data", "train", [design(f"d{n:02d}", n) for n in range(TRAINED)])
    broken = design("broken")
    broken["image"][1] = {"bytes": b"no picture", "path": None}
    held_out = [design(f"t{n}", 20 + n) for n in range(HELD_OUT)]
    write_split(folder / "data", "test", [*held_out, broken])
    prepare_crello(str(folder), folder / "tfds")
    return folder


def _run(crello: Path, module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TFDS_DATA_DIR": str(crello / "tfds"),
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "",
    }
    return subprocess.run(
        [sys.executable, "-m", f"sl_jax.{module}", *flags],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
        timeout=LIMIT,
    )


def _report(output: Path) -> tuple[dict, dict[str, list[dict]]]:
    report = json.loads((output / "report.json").read_text())
    return report, {table["title"]: table["rows"] for table in report["tables"]}


def test_evaluate_on_designs(crello, tmp_path):
    done = _run(
        *(crello, "evaluate", f"--data=crello:{crello}#test", f"--layers=none={tmp_path}/none"),
        *(f"--output={tmp_path}/out", "--protocols=stable_layers", "--max_layers=2"),
    )
    # Nobody made layers, and one design is broken: all are named.
    assert done.returncode == 1 and f"{HELD_OUT + 1} left out" in done.stderr, done.stderr
    assert "broken" in done.stderr and "there is no such folder" in done.stderr
    report, tables = _report(tmp_path / "out")
    assert {row["Layers"] for row in tables["Per-layer L1"]} == {"L = 2"}
    assert {row["Pictures"] for row in tables["Per-layer L1"]} == {HELD_OUT}
    assert report["details"]["true layers"] == f"merged to 2 in {HELD_OUT} of {HELD_OUT} designs"


def test_evaluate_takes_any_tfds_dataset_as_pictures(crello, tmp_path):
    done = _run(
        *(crello, "evaluate", "--data=tfds:crello#test", f"--layers=none={tmp_path}/none"),
        *(f"--output={tmp_path}/out", "--num_layers=2"),
    )
    assert done.returncode == 1 and f"{HELD_OUT} left out" in done.stderr, done.stderr
    _, tables = _report(tmp_path / "out")
    assert {row["Pictures"] for row in tables["Without a reference"]} == {HELD_OUT}
    found = {record["picture"] for record in _report(tmp_path / "out")[0]["records"]}
    assert found == {f"crello_test-{number:06d}" for number in range(HELD_OUT)}
    layered = _run(
        *(crello, "evaluate", "--data=tfds:crello#test", f"--layers=none={tmp_path}/none"),
        *(f"--output={tmp_path}/out", "--protocols=layerd"),
    )
    assert (
        layered.stderr.strip()
        .splitlines()[-1]
        .startswith("EvaluationError: protocol layerd needs true layers")
    )


@pytest.mark.parametrize("door", ["train", "sft", "evaluate"])
def test_a_split_that_there_is_not_is_one_line(crello, tmp_path, door):
    where = f"crello:{crello}#testing"
    output = tmp_path / "out"
    flags = {
        "train": ("--config=configs/grpo.py:tiny", f"--config.data.path={where}"),
        "sft": ("--config=configs/sft.py:tiny", f"--config.data.path={where}"),
        "evaluate": (f"--data={where}", f"--output={output}", f"--layers={tmp_path}/none"),
    }[door]
    place = () if door == "evaluate" else (f"--config.workdir={output}",)
    done = _run(crello, door, *flags, *place)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"{where} is no split of its dataset, which has train, test" in last


def test_train_on_pictures_of_datasets(random_checkpoint, crello, tmp_path):
    settings = {
        "model": random_checkpoint,
        "workdir": tmp_path / "run",
        "data.path": "tfds:crello#train",
        "data.eval_data": f"crello:{crello}#test",
        "data.buckets": ((32, 32),),
        "epochs": 1,
        "rollout.groups": 2,
        "rollout.batch_groups": 2,
        "rollout.group_size": 2,
        "rollout.steps": 3,
        "rollout.window_range": (0, 2),
        "rollout.window_size": 1,
        "learner.updates": 1,
        "learner.micro_batch": 4,
        "lora.rank": 4,
        "evaluation.pictures": 4,
        "evaluation.batch": 4,
        "evaluation.steps": 2,
    }
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    done = _run(crello, "train", "--config=configs/grpo.py:tiny", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{TRAINED} pictures to train on, {HELD_OUT} held out" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    records = list(read_metrics(tmp_path / "run"))
    assert sum("evaluation/psnr" in record for record in records) == 2


def test_sft_on_true_layers(random_checkpoint, crello, tmp_path):
    settings = {
        "model": random_checkpoint,
        "workdir": tmp_path / "run",
        "data.path": f"crello:{crello}#train",
        "data.eval_data": f"crello:{crello}#test",
        "data.buckets": ((32, 48),),
        "data.max_layers": 2,
        "steps": 2,
        "batch": 2,
        "log_every": 1,
        "eval_every": 2,
        "optimizer.warmup_steps": 0,
    }
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    done = _run(crello, "sft", "--config=configs/sft.py:tiny", *flags)
    assert done.returncode == 0, done.stderr
    records = list(read_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if "tune/mse" in r] == [1, 2]
    assert any(r.get("tune/held_out_mse") is not None for r in records)
    told = _run(
        *(crello, "sft", "--config=configs/sft.py:tiny", "--config.data.path=tfds:crello#train"),
        f"--config.workdir={tmp_path}/other",
    )
    assert told.returncode == 1
    assert "tfds:crello#train has no layers" in told.stderr.strip().splitlines()[-1]

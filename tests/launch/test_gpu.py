"""`launch/gpu.sh` in a repository of stand-ins, on a node of stand-ins."""

import json
import os
import re
import signal
import subprocess

import pytest
from documents import ROOT, instructions
from stand_ins import Node

RUN = ["--config=configs/grpo.py:gpu1", "--config.data.path=my pictures", "--config.workdir=a run"]
INSTALL = ["pip", "install", "-e", ".[cuda]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Node:
    """After a first run."""
    node = Node(tmp_path_factory.mktemp("gpu"))
    done = node.run("gpu.sh", *RUN)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB" in done.stdout
    assert node.calls() == [INSTALL, ["train", "--selftest"], ["train", *RUN]]
    return node


@pytest.fixture
def node(installed) -> Node:
    installed.cards(1)
    return installed


def test_again_it_only_trains(node):
    assert node.run("gpu.sh", *RUN).returncode == 0
    assert node.calls() == [["train", *RUN]]


def test_other_cards_are_tested_again(node):
    node.cards(2)
    assert node.run("gpu.sh").returncode == 0
    assert node.calls() == [["train", "--selftest"]]


def test_a_login_node_only_installs(tmp_path):
    node = Node(tmp_path)
    node.python.with_name("nvidia-smi").unlink()
    done = node.run("gpu.sh", "--install", EXTRAS="cuda,gcs")
    assert done.returncode == 0, done.stderr
    assert node.calls() == [["pip", "install", "-e", ".[cuda,gcs]"]]
    done = node.run("gpu.sh", *RUN)
    assert done.returncode == 1 and "nvidia-smi is not found" in done.stderr


def test_what_is_wrong_with_a_node_is_said(node):
    for change, words in (
        (lambda: node.cards(1, driver="470.82.01"), "The driver is 470.82.01; CUDA 12 needs 525"),
        (lambda: node.nvidia_smi("echo 'no communication'; exit 9"), "no communication"),
        (lambda: node.nvidia_smi("true"), "lists no GPU"),
        (lambda: node.cards(8, seen=7), "JAX sees 7 of 8 GPUs"),
        (lambda: node.cards(1, driver="garbage"), "The driver is garbage"),
    ):
        change()
        done = node.run("gpu.sh", *RUN)
        assert done.returncode == 1 and words in done.stderr
        assert node.calls() == []


def test_chosen_cards_are_enough(node):
    node.cards(8, seen=2)
    assert node.run("gpu.sh", *RUN, CUDA_VISIBLE_DEVICES="0,1", SELFTEST="no").returncode == 0
    node.cards(8, seen=0)
    done = node.run("gpu.sh", *RUN, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "JAX sees no GPU" in done.stderr
    assert node.calls() == [["train", *RUN]]


def test_a_failed_self_test_stops_it(node):
    node.cards(1, driver="560.1")
    done = node.run("gpu.sh", *RUN, train_STATUS="1")
    assert done.returncode == 1 and "SELFTEST=no bash " in done.stderr
    assert node.calls() == [["train", "--selftest"]]
    assert node.run("gpu.sh", *RUN, SELFTEST="no").returncode == 0
    assert node.calls() == [["train", *RUN]]
    assert node.run("gpu.sh", *RUN).returncode == 0
    assert node.calls() == [["train", "--selftest"], ["train", *RUN]]


def test_what_is_wrong_is_put_right_before_it_goes_on(node):
    done = node.run("gpu.sh", *RUN, SELFTEST="no", train_STATUS="1")
    assert done.returncode == 1 and "Please put right what stands above" in done.stderr
    node.calls()


@pytest.mark.parametrize("status", [70, 143])
def test_the_status_of_the_training_is_passed_on(node, status):
    done = node.run("gpu.sh", *RUN, SELFTEST="no", train_STATUS=str(status))
    assert done.returncode == status
    assert f"Training ended with status {status}" in done.stderr
    command = re.search(r"To go on: (bash .*)", done.stderr).group(1)
    again = subprocess.run(["bash", "-c", command], env=node.environment(), cwd=node.place)
    assert again.returncode == 0
    assert node.calls()[-1] == ["train", *RUN]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["pictures"], "'pictures' is not an argument"), (["--install", "x"], "takes nothing else")],
)
def test_it_refuses(node, words, said):
    done = node.run("gpu.sh", *words)
    assert done.returncode == 1 and said in done.stderr and node.calls() == []


def test_ctrl_c_says_how_to_go_on(node):
    process = subprocess.Popen(
        ["bash", str(node.root / "launch" / "gpu.sh"), *RUN],
        env=node.environment(HANG="train", SELFTEST="no"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line == "hanging\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved" in rest and "To go on: bash " in rest
    node.calls()


FRACTION = "XLA_CLIENT_MEM_FRACTION"
FRACTIONS = [
    ({}, "0.92 None"),
    ({FRACTION: "0.7"}, "0.7 None"),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "None 0.5"),  # JAX refuses both
]
TELL = f"""
import os
print("takes", *map(os.environ.get, ("{FRACTION}", "XLA_PYTHON_CLIENT_MEM_FRACTION")))
"""


@pytest.fixture(scope="module")
def telling(tmp_path_factory) -> Node:
    """Its training tells what part of a card JAX is to take; so does Slurm's `srun`."""
    node = Node(tmp_path_factory.mktemp("telling"))
    (node.root / "sl_jax" / "train.py").write_text(TELL)
    srun = node.python.with_name("srun")
    srun.write_text(f"#!/bin/bash\nexec python3 - <<'END'\n{TELL}END\n")
    srun.chmod(0o755)
    assert node.run("gpu.sh", "--install").returncode == 0
    return node


@pytest.mark.parametrize("script", ["gpu.sh", "slurm.sbatch"])
@pytest.mark.parametrize(("given", "taken"), FRACTIONS)
def test_jax_takes_most_of_a_card(telling, script, given, taken):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(telling.root)}
    told = given | ({"SELFTEST": "no"} if script == "gpu.sh" else slurm)
    done = telling.run(script, *RUN, **told)
    assert done.returncode == 0, done.stderr
    assert f"takes {taken}\n" in done.stdout


def test_which_is_what_the_plan_of_a_card_assumes():
    (variables,) = [
        text for name, text in instructions(ROOT / "launch" / "Dockerfile") if name == "ENV"
    ]
    (fraction,) = re.findall(rf"{FRACTION}=([\d.]+)", variables)
    assert fraction == FRACTIONS[0][1].split()[0]
    plans = json.loads((ROOT / "tests/benchmarks/results/plan_table.json").read_text())
    planned = float(re.search(r"--hbm_gib=([\d.]+)", plans["H100"]["command"])[1])
    # Of the 81559 MiB that nvidia-smi lists, CUDA keeps half a GiB to itself.
    assert planned <= float(fraction) * (81559 - 512) / 1024 < 1.01 * planned

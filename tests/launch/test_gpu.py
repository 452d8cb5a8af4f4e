"""`launch/gpu.sh` in a repository of stand-ins, on a node of stand-ins."""

import os
import re
import signal
import subprocess

import pytest
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

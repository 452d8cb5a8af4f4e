"""The README's commands of launching, as they stand, with stand-ins for clouds and schedulers."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cloud import Cloud
from documents import ROOT, blocks, configured
from stand_ins import Node

JUDGE = "http://JUDGE:8000/v1"
SBATCH = """#!/bin/bash
printf "%q " "$@" >>called
echo "$HOST$JUDGE_JOB" >>called
echo 17
"""
VLM = "Qwen/Qwen2.5-VL-7B-Instruct"


def block(words: str) -> str:
    """The block of commands with these words."""
    (found,) = [text for text in blocks(ROOT / "README.md") if words in text]
    return found


def test_a_host_for_the_judge(tmp_path):
    """Its commands but for the installation: a token of its own, and vLLM for other hosts."""
    _, *commands = block("bash launch/judge_pool/vllm.sh\n").splitlines()
    vllm = tmp_path / "vllm" / "bin" / "vllm"
    vllm.parent.mkdir(parents=True)
    vllm.write_text('#!/bin/sh\necho "$VLLM_API_KEY $*"\n')
    vllm.chmod(0o755)
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(rf"[0-9a-f]{{48}} serve {VLM} --host 0\.0\.0\.0 --port 8000 ", done.stdout)


def test_one_gpu(tmp_path):
    node = Node(tmp_path)
    command = block("bash launch/gpu.sh --config")
    done = subprocess.run(
        ["bash", "-ec", command], cwd=node.root, env=node.environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    *_, (program, *arguments) = node.calls()
    assert program == "train"
    run = configured(arguments, 1)
    (endpoint,) = run.judge.endpoints
    assert (endpoint.url, endpoint.model, endpoint.key_env) == (JUDGE, VLM, "JUDGE_TOKEN")
    configured([argument.replace(":gpu1", "") for argument in arguments], 8)


def test_a_tpu_vm_from_its_making_to_its_end(cloud: Cloud):
    for words in ("tpu_vm.sh run", "tpu_vm.sh status"):
        done = subprocess.run(
            ["bash", "-ec", block(words)],
            cwd=cloud.repository.root,
            env=cloud.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "my-tpu: READY" in done.stdout
    assert [call[3] for call in cloud.calls()][-1] == "delete"
    assert not (cloud.place / "vm.json").exists()
    (start,) = cloud.trained()
    run = configured(start["arguments"], 8)
    copied = re.search(r"gcloud storage cp -r (.*) (gs://\S+)", block("gcloud storage cp"))
    for path in (run.model, run.data.path):
        assert path in [copied.group(2) + name for name in copied.group(1).split()]
    assert run.workdir.startswith(copied.group(2)) and run.judge.cache_path.startswith("/tmp/")


def test_slurm(tmp_path):
    node = Node(tmp_path)
    sbatch = node.python.with_name("sbatch")
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    done = subprocess.run(
        ["bash", "-ec", block("launch/slurm.sbatch")],
        cwd=node.root,
        env=node.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert node.calls() == [["pip", "install", "-e", ".[cuda]"]]
    judge, learner = map(shlex.split, (node.root / "called").read_text().splitlines())
    assert judge[-1] == "0.0.0.0" and "--wrap=bash launch/judge_pool/vllm.sh" in judge
    dependency, script, *arguments, judged_by = learner
    assert dependency == "--dependency=after:17" and judged_by == "17"
    assert script == "launch/slurm.sbatch"
    tasks = re.search(r"--ntasks-per-node=(\d+)", (ROOT / script).read_text())
    run = configured([*arguments, f"--config.judge.endpoints={JUDGE}"], int(tasks.group(1)))
    assert run.judge.model == VLM and run.judge.key_env == "JUDGE_TOKEN"


@pytest.mark.parametrize("folder", [None, ".", "launch"])
def test_the_script_of_slurm_says_where_it_belongs(folder):
    told = {} if folder is None else {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT / folder)}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch")],
        env={"PATH": "/usr/bin:/bin", **told},
        capture_output=True,
        text=True,
    )
    words = {None: "Please submit it", ".": "nothing to train", "launch": "is not the repository"}
    assert done.returncode == 1 and words[folder] in done.stderr


@pytest.mark.parametrize("path", ["README.md", "launch/gke/README.md"])
def test_scripts_that_are_named_are_there(path):
    text = (ROOT / path).read_text()
    for name in re.findall(r"launch/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
    assert Path(ROOT / "launch" / "gke").is_dir()

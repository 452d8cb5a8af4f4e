"""`launch/tpu_vm.sh` for real, with a stand-in for gcloud whose hosts are folders."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from cloud import HERE, TOKEN, Cloud, lines, wait_for

from sl_jax.grpo.metrics import epoch_line

WORKDIR = "--config.workdir=gs://bucket/run"
OLD = """#!/bin/bash
# Not of a version that suits: all that it is good for is pip.
[ "$*" = "-m pip install --quiet --user uv" ] || exit 1
mkdir -p "$HOME/.local/bin" && cp "$(dirname "$0")/uv.of.pip" "$HOME/.local/bin/uv"
"""
HARD = [
    "--config.data.prompt=a 'clean' \"image\"; $HOME * \\ &",
    "--config.data.path=gs://b/my pictures",
]


def run_words(*more: str, type: str = "v5litepod-8") -> tuple[str, ...]:
    return ("run", "my-tpu", f"--type={type}", *more, "--", "--config=grpo", WORKDIR, *HARD)


def verbs(calls: list[list[str]]) -> list[str]:
    """What changed something, by its verb and, of ssh, what the host was asked to do."""
    found = []
    for call in calls:
        asked = re.search(r"tpu_host\.sh (\w+)", " ".join(call))
        if call[3] != "describe":
            found.append(f"ssh {asked.group(1)}" if asked else call[3])
    return found


def test_from_nothing_to_the_end_on_two_hosts(cloud):
    words = run_words("--zone=us-a", "--spot", "--env=JUDGE_TOKEN", type="v5e:4x4")
    printed, said = cloud.run(*words)
    assert printed.count("first line") == printed.count("last line") == 1, said
    starts = cloud.trained()
    assert len(starts) == 2 and len({start["home"] for start in starts}) == 2
    for start in starts:
        assert start["arguments"] == ["--config=grpo", WORKDIR, *HARD]
        assert start["token"] == TOKEN
    calls = cloud.calls()
    begin = ["create", "ssh state", "scp", "ssh install", "scp", "ssh start"]
    assert verbs(calls) == [*begin, "ssh follow", "ssh state"]
    (create,) = [call for call in calls if call[3] == "create"]
    for flag in ("--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"):
        assert flag in create
    assert all("--zone=us-a" in call for call in calls)
    assert "secret" not in json.dumps(calls)
    for host in cloud.place.glob("host*"):
        assert stat.S_IMODE((host / ".sl_jax-env").stat().st_mode) == 0o600
        assert lines(host / "sl_jax/calls.jsonl") == [["pip", "install", "-e", ".[tpu,gcs]"]]

    _, said = cloud.run(*words)
    assert "The training is finished." in said
    assert len(cloud.trained()) == 2
    assert verbs(cloud.calls()[len(calls) :]) == ["ssh state"]

    # A dry run prints what was called, but for looks at states, and calls nothing.
    before = len(cloud.calls())
    printed, _ = cloud.run("run", "--dry-run", *words[1:])
    assert len(cloud.calls()) == before
    told = [shlex.split(line) for line in printed.splitlines()]
    shown = [words[1:] for words in told if words[0] == "gcloud" and words[4] != "describe"]
    made = [call for call in calls if call[3] != "describe" and " state" not in str(call)]
    assert list(map(without_folders, shown)) == list(map(without_folders, made))
    (tar,) = [words for words in told if words[0] != "gcloud"]
    assert tar[0] == "tar" and {"setup.py", "configs", "sl_jax", "launch"} <= set(tar)


def without_folders(call: list[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in call]


def set_state(cloud: Cloud, state: str) -> None:
    """As Google does with a TPU VM."""
    vm = json.loads((cloud.place / "vm.json").read_text())
    (cloud.place / "vm.json").write_text(json.dumps(vm | {"state": state}))


def preempt(cloud: Cloud) -> None:
    """As Google does: the hosts are gone, and the VM says so."""
    set_state(cloud, "PREEMPTED")
    for session in cloud.sessions():
        os.killpg(session, signal.SIGKILL)


def test_a_preempted_one_is_made_again_and_goes_on(cloud):
    cloud.plan("hang", "0")
    process = cloud.start(*run_words("--spot"))
    wait_for(lambda: len(cloud.trained()) == 1)
    preempt(cloud)
    _, said = cloud.ended(process)
    assert "my-tpu is PREEMPTED: it is deleted and made again." in said
    assert "Start 2, to go on where it was." in said
    first, second = cloud.trained()
    assert first == second
    assert verbs(cloud.calls()).count("create") == 2


def trouble(cloud: Cloud, **times: int) -> None:
    """What fails from now on, and how often."""
    (cloud.place / "trouble.json").write_text(json.dumps(times))


def test_chips_that_are_short_after_a_preemption_are_waited_for(cloud):
    cloud.plan("hang", "0")
    process = cloud.start(*run_words("--spot"))
    wait_for(lambda: len(cloud.trained()) == 1)
    trouble(cloud, create=2, delete=1)
    preempt(cloud)
    _, said = cloud.ended(process)
    assert said.count("no more capacity") == 2 and len(cloud.trained()) == 2
    pauses = re.findall(r"That has failed; .* Next try in (\S+) s\.", said)
    assert pauses == ["0.1", "0.1", "0.2"]  # of a deletion; twice of a creation


@pytest.mark.parametrize("words", [("--queued",), ()])
def test_a_gcloud_that_is_offline_for_a_while_is_asked_again(cloud, words):
    """While chips are waited for, and when they are there again."""
    cloud.plan("hang", "0")
    process = cloud.start(*run_words("--spot", *words))
    wait_for(lambda: "create" in verbs(cloud.calls()))
    trouble(cloud, describe=2)
    wait_for(lambda: len(cloud.trained()) == 1)
    preempt(cloud)
    _, said = cloud.ended(process)
    assert said.count("no connection") == 2 and len(cloud.trained()) == 2


def test_a_gcloud_that_never_answered_is_not_asked_again(cloud):
    trouble(cloud, describe=2)
    _, said = cloud.run(*run_words(), code=1)
    assert "gcloud does not say what my-tpu is:" in said and len(cloud.calls()) == 1


def test_hosts_may_be_slow_to_answer_after_every_preemption(cloud):
    """What counts as too often is that of one start."""
    script = cloud.repository.root / "launch" / "tpu_vm.sh"
    text = script.read_text()
    assert "\nLOOKS=20 " in text
    script.write_text(text.replace("\nLOOKS=20 ", "\nLOOKS=3 "))
    cloud.plan("hang", "hang", "0")
    process = cloud.start(*run_words("--spot"))
    for starts in (1, 2):
        wait_for(lambda starts=starts: len(cloud.trained()) == starts and tails(cloud))
        trouble(cloud, ssh=3)  # once before the VM is found to be gone
        preempt(cloud)
    cloud.ended(process)
    assert len(cloud.trained()) == 3


@pytest.mark.parametrize("state", ["TERMINATED", "SUSPENDED"])
def test_one_of_the_users_own_with_a_run_on_its_disk_is_not_deleted(cloud, state):
    words = ("run", "my-tpu", "--type=v5e:2x4", "--zone=us-a", "--", "--config=grpo")
    cloud.run(*words)
    set_state(cloud, state)
    _, said = cloud.run(*words, code=1)
    assert f"my-tpu is {state}, with all that is on its disk" in said
    assert "  gcloud compute tpus tpu-vm start my-tpu --zone=us-a\n" in said
    assert "delete" not in verbs(cloud.calls()) and list(cloud.place.glob("host*"))
    cloud.run(*words[:4], "--spot", "--", "--config=grpo", WORKDIR)
    assert verbs(cloud.calls()).count("delete") == 1


def test_a_lost_connection_is_taken_up_where_the_log_was(cloud):
    cloud.plan("hang")
    process = cloud.start(*run_words())
    wait_for(lambda: len(cloud.trained()) == 1)
    wait_for(lambda: tails(cloud) != [])
    before = tails(cloud)
    trouble(cloud, ssh=2, describe=1)  # offline
    for tail in before:
        os.kill(tail, signal.SIGKILL)
    wait_for(lambda: set(tails(cloud)) - set(before))
    (cloud.place / "go").touch()
    printed, said = cloud.ended(process)
    assert said.count("The connection to my-tpu is lost.") == 2 and "my-tpu is unknown." in said
    assert printed.endswith("first line\nlast line\n") and printed.count("line\n") == 2
    assert len(cloud.trained()) == 1


def tails(cloud: Cloud) -> list[int]:
    """Processes that follow the log on a host."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (place / "cmdline").read_bytes().split(b"\0")
            if command[0] == b"tail" and str(cloud.place).encode() in b" ".join(command):
                found.append(int(place.name))
    return found


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        (("1",), 1, 1),
        pytest.param(("kill", "143", "70", "0"), 0, 4, marks=pytest.mark.slow),
    ],
)
def test_the_status_decides_whether_it_starts_again(cloud, plan, code, starts):
    cloud.plan(*plan)
    _, said = cloud.run(*run_words(), code=code)
    assert len(cloud.trained()) == starts
    assert f"The training has ended with status {'1' if code else '137'}." in said


def test_an_error_that_comes_each_time_ends_it(cloud):
    cloud.plan("70")
    _, said = cloud.run(*run_words(), code=1)
    assert len(cloud.trained()) == 3
    assert "An error that nobody expected has ended it 3 times" in said


@pytest.mark.slow
@pytest.mark.parametrize("plan", [("70", "70", "143", "70", "0"), ("70", "70", "70", "70", "0")])
def test_errors_that_come_now_and_then_do_not(cloud, plan):
    """After a preemption, or where epochs are complete between them."""
    train = cloud.repository.root / "sl_jax" / "train.py"
    line = epoch_line(7, 24, {"judge/reward_mean": 0.4, "seconds/all": 90.0}, None)
    if "143" not in plan:
        train.write_text(f"print({line!r})\n{train.read_text()}")
    cloud.plan(*plan)
    cloud.run(*run_words())
    assert len(cloud.trained()) == len(plan)


@pytest.mark.slow
def test_restarts_have_a_limit(cloud):
    cloud.plan("kill")
    _, said = cloud.run(*run_words("--restarts=1"), code=1)
    assert "It has started again 1 times" in said and len(cloud.trained()) == 2


def test_a_host_whose_python_is_too_old_gets_one(cloud):
    python = cloud.repository.python
    suitable = python.rename(python.with_name("a-newer-one"))
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        python.with_name(name).write_text(OLD)
        python.with_name(name).chmod(0o755)
    uv = python.with_name("uv.of.pip")
    uv.write_text(f'#!/bin/bash\necho "$*" >>"$HOME/uv"\n[ "$2" != find ] || echo "{suitable}"\n')
    uv.chmod(0o755)
    cloud.run(*run_words())
    assert len(cloud.trained()) == 1
    (home,) = cloud.place.glob("host*")
    assert (home / "uv").read_text() == "python install --quiet 3.12\npython find 3.12\n"


@pytest.mark.slow
def test_troubles_that_pass(cloud):
    trouble(cloud, ssh=4, scp=3)
    _, said = cloud.run(*run_words("--env=JUDGE_TOKEN"))
    assert "Try 3 of 4 has failed" in said and len(cloud.trained()) == 1


def test_no_chips(cloud):
    trouble(cloud, create=1)
    _, said = cloud.run(*run_words(), code=1)
    assert "no more capacity" in said and "--queued waits" in said


@pytest.mark.slow
def test_a_queue_is_waited_in_and_left(cloud):
    _, said = cloud.run(*run_words("--queued"))
    assert "my-tpu is WAITING_FOR_RESOURCES." in said
    (create,) = [call for call in cloud.calls() if call[3] == "create"]
    assert create[2] == "queued-resources" and "--node-id=my-tpu" in create
    cloud.run("delete", "my-tpu")  # finds out by itself how it was made
    assert cloud.run("status", "my-tpu")[0] == "my-tpu: not there\n"
    assert {path.name for path in cloud.place.glob("*.json")} == set()


def test_ctrl_c_leaves_the_training_which_stop_stops(cloud):
    cloud.plan("hang")
    words = run_words()
    process = cloud.start(*words)
    wait_for(lambda: tails(cloud) != [])
    os.killpg(process.pid, signal.SIGINT)
    _, said = cloud.ended(process, 130)
    command = re.search(r"To follow it: (bash .*)", said).group(1)
    assert "bash launch/tpu_vm.sh stop my-tpu" in said
    printed, _ = cloud.run("status", "my-tpu")
    assert printed == "my-tpu: READY\nrunning\n"
    _, said = cloud.run(*words, "--config.seed=1", code=1)
    assert "Another training runs on my-tpu; please stop it first" in said
    wait_for(lambda: tails(cloud) == [])
    again = cloud.start(*shlex.split(command)[2:])
    wait_for(lambda: tails(cloud) != [])
    os.killpg(again.pid, signal.SIGINT)
    assert "The training runs already." in cloud.ended(again, 130)[1]
    printed, _ = cloud.run("stop", "my-tpu")
    assert "Stopped on" in printed and "with status 143" in printed
    printed, _ = cloud.run("logs", "my-tpu")
    assert printed == "first line\nsaved\n"
    assert len(cloud.trained()) == 1
    printed, _ = cloud.run("stop", "my-tpu")
    assert "Nothing runs on" in printed


def test_stop_ends_it_also_for_who_follows_it(cloud):
    cloud.plan("hang")
    process = cloud.start(*run_words())
    wait_for(lambda: tails(cloud) != [])
    cloud.run("stop", "my-tpu")
    printed, said = cloud.ended(process, 143)
    assert "The training was stopped." in said and printed.endswith("saved\n")
    assert len(cloud.trained()) == 1
    cloud.plan("0")
    cloud.run(*run_words())  # and goes on when it is wanted again
    assert len(cloud.trained()) == 2


def test_what_is_there_as_another_type_is_left_alone(cloud):
    cloud.run(*run_words())
    _, said = cloud.run(*run_words(type="v6e-8"), code=1)
    assert "my-tpu is there, as a v5litepod-8 and not a v6e-8" in said
    assert (cloud.place / "vm.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Please give a command and the name of a TPU VM"),
        (["launch", "a"], "'launch' is not a command"),
        (["run"], "Please name the TPU VM"),
        (["run", "my tpu"], "'my tpu' cannot be the name"),
        (["run", "a", "b"], "'b' is one word too many"),
        (["run", "a"], "Please give the type"),
        (["create", "a", "--type=h100"], "--type=h100 is not known"),
        (["create", "a", "--type=v5e:2y4"], "--type=v5e:2y4 is not known"),
        (["run", "a", "--type=v6e-8"], "There is nothing to train"),
        (["run", "a", "--type=v6e-8", "--config=x"], "please put -- before"),
        (["run", "a", "--tpu=v6e-8"], "--tpu=v6e-8 is not an option"),
        (["run", "a", "--type=v6e-8", "--restarts=-1"], "--restarts=-1 is not a number"),
        (["run", "a", "--type=v6e-8", "--env=A=b"], "the name of a variable only"),
        (["run", "a", "--type=v6e-8", "--env=NOT_SET_HERE"], "is not set here"),
        (["run", "a", "--type=v6e-8", "--extras=tpu;ls"], "are not extras"),
        (["run", "a", "--type=v6e-8", "--spot", "--", "--config=x"], "config.workdir is ''"),
        (["run", "a", "--type=v5e:4x4", "--", "--config.workdir=runs"], "config.workdir is 'runs'"),
        (["stop", "a", "--", "--config=x"], "stop takes no arguments"),
        (["delete", "a"], "gcloud is not found"),
    ],
)
def test_it_refuses(words, said, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [tmp_path / "bash", str(HERE.parents[1] / "launch" / "tpu_vm.sh"), *words],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and said in done.stderr and not done.stdout

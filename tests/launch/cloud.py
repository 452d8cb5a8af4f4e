"""A cloud of stand-ins: a gcloud whose TPU VMs are folders of this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stand_ins import Repository

HERE = Path(__file__).parent
LIMIT = 120  # seconds, on a busy machine
TOKEN = "a secret 'of' $the test"
# The first start on a host ends as the first word of `plan` says, and so on; the last one stays.
TRAIN = """
import json, os, signal, sys, time
home = os.environ["HOME"]
told = {"arguments": sys.argv[1:], "token": os.environ.get("JUDGE_TOKEN"), "home": home}
with open(home + "/../trained.jsonl", "a") as file:
    file.write(json.dumps(told) + "\\n")
starts = [json.loads(line)["home"] for line in open(home + "/../trained.jsonl")].count(home)
plan = open(home + "/../plan").read().split()
what = plan[min(starts, len(plan)) - 1]
print("first line", flush=True)
if what == "hang":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(143)))
    while not os.path.exists(home + "/../go"):
        time.sleep(0.05)
print("last line", flush=True)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(0 if what == "hang" else int(what))
"""
ENVIRONMENTS = """#!/bin/bash
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && exec cp "$0" "$3/bin/python"
fi
exec "{python}" "$@"
"""


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Cloud:
    """A repository, a gcloud first on PATH, and the folder that both Google and its hosts are."""

    def __init__(self, place: Path):
        self.repository = Repository(place)
        root = self.repository.root
        for name in ("pyproject.toml", "README.md", "LICENSE", "configs/grpo.py"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()
        (root / "sl_jax" / "train.py").write_text(TRAIN)
        self.place = place / "cloud"
        self.place.mkdir()
        # Environments are made many times here: as a file, in no time.
        self.repository.python.write_text(ENVIRONMENTS.format(python=sys.executable))
        gcloud = self.repository.python.with_name("gcloud")
        gcloud.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{HERE}/fake_gcloud.py" "$@"\n')
        gcloud.chmod(0o755)
        self.plan("0")

    def plan(self, *what: str) -> None:
        """How the starts of the training end, one after the other; the last of all later ones."""
        (self.place / "plan").write_text(" ".join(what))

    def environment(self) -> dict[str, str]:
        return self.repository.environment(
            FAKE_CLOUD=str(self.place),
            PYTHONPATH=str(self.repository.root),  # pip, which environments here are without
            TPU_PAUSE="0.1",
            JUDGE_TOKEN=TOKEN,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.repository.root / "launch" / "tpu_vm.sh"), *words],
            cwd=self.repository.place,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """What is printed."""
        return self.ended(self.start(*words), code)

    def ended(self, process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
        printed = process.communicate(timeout=LIMIT)
        assert process.returncode == code, printed
        return printed

    def calls(self) -> list[list[str]]:
        """How gcloud was called."""
        return lines(self.place / "calls.jsonl")

    def trained(self) -> list[dict[str, Any]]:
        """The starts of the training, one of each host."""
        return lines(self.place / "trained.jsonl")

    def sessions(self) -> list[int]:
        """Process groups of the training, one of each host."""
        return [int(path.read_text()) for path in self.place.glob("host*/.sl_jax-run/pid")]

    def close(self) -> None:
        """Ends what runs on the hosts."""
        (self.place / "go").touch()
        for session in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)

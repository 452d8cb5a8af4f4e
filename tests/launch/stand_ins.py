"""A repository whose Python parts are stand-ins, to run the scripts of launch/ in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# Each stand-in appends its arguments to calls.jsonl, and ends as its variable says.
STAND_IN = """
import json, os, sys, time
if "--version" not in sys.argv:
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(["{name}", *sys.argv[1:]]) + "\\n")
if os.environ.get("HANG") == "{name}":
    try:
        print("hanging", flush=True)
        time.sleep(120)
    except KeyboardInterrupt:
        print("saved", flush=True)
        sys.exit(130)
sys.exit(int(os.environ.get("{name}_STATUS", "0")))
"""
DESIGNS = """
import json, pathlib
def write_designs(folder, family, seeds, size, layers):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(["designs", family, len(seeds), size, layers]) + "\\n")
    pathlib.Path(folder).mkdir(parents=True)
"""
CARD = "NVIDIA H100 80GB HBM3, {driver}, 81559 MiB"


class Repository:
    """A copy of the scripts, in a folder with spaces, and beside it what pip and others are."""

    def __init__(self, place: Path):
        self.root = place / "a repository"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        files = {
            "setup.py": "",
            "pip.py": STAND_IN.replace("{name}", "pip"),
            "pytest.py": STAND_IN.replace("{name}", "pytest"),
            "sl_jax/train.py": STAND_IN.replace("{name}", "train"),
            "sl_jax/data/__init__.py": DESIGNS,
            "tests/test_peer.py": "def test_peer():\n    import torch\n",
            "tests/test_own.py": "import torchless\n",
            "tests/benchmarks/reproduction/run.py": STAND_IN.replace("{name}", "run"),
            "tests/benchmarks/reproduction/tables.py": STAND_IN.replace("{name}", "tables"),
        }
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.place = place
        # Environments without pip: its stand-in is found in the current directory.
        self.python = place / "bin" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(
            f'#!/bin/bash\n[ "$1 $2" != "-m venv" ] || set -- "$@" --without-pip\n'
            f'exec "{sys.executable}" "$@"\n'
        )
        self.python.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        """Little of the caller's, and the repository's interpreter first on PATH."""
        path = f"{self.python.parent}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.place), "LC_ALL": "C.UTF-8"} | variables

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            cwd=cwd or self.place,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list[Any]]:
        """What was called since the last look, in order."""
        path = self.root / "calls.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        path.unlink()
        return [json.loads(line) for line in lines]


class Node(Repository):
    """With `cards` of one driver, of which JAX sees some."""

    def __init__(self, place: Path):
        super().__init__(place)
        (self.root / "jax.py").write_text('def devices(kind): return open("seen").readlines()\n')
        self.cards(1)

    def cards(self, count: int, seen: int | None = None, driver: str = "550.54.15") -> None:
        listed = "\n".join([CARD.format(driver=driver)] * count)
        self.nvidia_smi(f"cat <<'END'\n{listed}\nEND")
        (self.root / "seen").write_text("a card\n" * (count if seen is None else seen))

    def nvidia_smi(self, script: str) -> None:
        program = self.python.with_name("nvidia-smi")
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)

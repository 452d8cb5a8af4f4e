"""How long does the README's first command take on a fresh clone?

    python tests/benchmarks/quickstart.py --output tests/benchmarks/results/quickstart.json

Clones the last commit into an empty folder and runs `bash launch/quickstart.sh` there, with no more
of an environment than PATH, an empty home and pip's settings. Fails if the run does, if it leaves
less than it promises, or if training takes more than ten minutes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sl_jax.training.metrics import read_metrics

_ROOT = Path(__file__).parents[2]
_LIMIT = 600  # seconds after the installation, on two cores
_INSTALLED = "Drawing "  # begins the first line of output after the installation
_LEFT = ("adapter/adapter_model.safetensors", "checkpoints", "report.html", "tensorboard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--place", type=Path, help="an empty folder; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments.place or Path(temporary))
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if result["seconds"]["training"] > _LIMIT:
        sys.exit(f"Training took more than {_LIMIT} s.")


def measure(place: Path) -> dict[str, object]:
    """One run in `place`, with what it took and left."""
    clone, home = place / "sl_jax", place / "home"
    home.mkdir(parents=True)
    load = os.getloadavg()[0]
    started = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(_ROOT), str(clone)], check=True)
    cloned = time.monotonic()
    installed = _run(clone, home)
    ended = time.monotonic()
    run = clone / "runs" / "quickstart" / "run"
    if missing := [name for name in _LEFT if not (run / name).exists()]:
        sys.exit(f"The run left no {', '.join(missing)}.")
    rewards = {r["step"]: r["evaluation/reward"] for r in read_metrics(run) if _evaluated(r)}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True)
    return {
        "command": "bash launch/quickstart.sh",
        "commit": commit.strip(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "seconds": {
            "clone": round(cloned - started, 1),
            "installation": round(installed - cloned, 1),
            "training": round(ended - installed, 1),
            "all": round(ended - started, 1),
        },
        "report_bytes": (run / "report.html").stat().st_size,
        "evaluation_reward": {str(step): round(reward, 4) for step, reward in rewards.items()},
    }


def _run(clone: Path, home: Path) -> float:
    """Runs the script to its end; when it was done with the installation."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "SSL_"))}
    process = subprocess.Popen(
        ["bash", str(clone / "launch" / "quickstart.sh")],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHON": sys.executable} | kept,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    installed = None
    for line in process.stdout:
        sys.stdout.write(line)
        if installed is None and line.startswith(_INSTALLED):
            installed = time.monotonic()
    if process.wait() or installed is None:
        sys.exit(f"The quickstart ended with status {process.returncode}.")
    return installed


def _evaluated(record: Mapping[str, float]) -> bool:
    return "evaluation/reward" in record


if __name__ == "__main__":
    main()

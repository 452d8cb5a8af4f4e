"""The README's first command on a fresh clone, with nothing but a Python: two epochs of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EPOCHS = ("--config.epochs=2", "--config.evaluation.pictures=8", "--config.evaluation.shown=2")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git has of this repository, and what is not committed of it, in a folder of its own."""
    place = tmp_path_factory.mktemp("clone") / "sl jax"
    place.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    return place


def quickstart(clone: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with no more of an environment than a fresh machine has."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "SSL_"))}
    return subprocess.run(
        ["bash", str(clone / "launch" / "quickstart.sh"), *arguments],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHON": sys.executable} | kept,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.system
def test_trains_and_is_finished(clone, tmp_path):
    first = quickstart(clone, tmp_path, *EPOCHS)
    assert first.returncode == 0, first.stderr[-2000:]
    for phase in ("rollout", "judging", "learning", "evaluation"):
        assert phase in first.stderr
    assert "reward=" in first.stderr  # in the progress bar
    pictures = [path.suffix for path in (clone / "runs/quickstart/pictures").iterdir()]
    assert {".png", ".jpg"} <= set(pictures)
    run = clone / "runs" / "quickstart" / "run"
    assert f"{run}/report.html" in first.stdout
    report = (run / "report.html").read_text()
    assert "data:image/png;base64," in report and "http://" not in report.replace("www.w3.org", "")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).stat().st_size > 0
    assert list((run / "checkpoints").iterdir())
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))

    again = quickstart(clone, tmp_path, *EPOCHS)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "This run is finished: 2 epochs." in again.stdout
    assert "rollout" not in again.stderr

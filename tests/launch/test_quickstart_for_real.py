"""The README's first command on a fresh clone, with nothing but a Python: two epochs of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

LIMIT = 900  # seconds
EPOCHS = ("--config.epochs=2", "--config.evaluation.pictures=8", "--config.evaluation.shown=2")


class Printed(NamedTuple):
    """What a start of the script left on the screen."""

    code: int
    stdout: str
    stderr: str


def quickstart(clone: Path, home: Path, *arguments: str, until: Path | None = None) -> Printed:
    """Runs the script with no more of an environment than a fresh machine has.

    Args:
        until: Ctrl-C is pressed when this is there.
    """
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "SSL_"))}
    with (home / "stdout").open("w") as stdout, (home / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            ["bash", str(clone / "launch" / "quickstart.sh"), *arguments],
            cwd=home,
            env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHON": sys.executable} | kept,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            # A parent in the background ignores SIGINT, and a shell hands that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + LIMIT
        while until is not None and not until.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if until is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=LIMIT)
        printed = ((home / name).read_text() for name in ("stdout", "stderr"))
        return Printed(process.returncode, *printed)


@pytest.mark.system
def test_stopped_it_goes_on_and_finished_it_says_so(clone, tmp_path):
    run = clone / "runs" / "quickstart" / "run"
    records = run / "metrics.jsonl"  # of the start; the first epoch is under way
    stopped = quickstart(clone, tmp_path, *EPOCHS, until=records)
    assert stopped.code == 130, stopped.stderr[-2000:]
    assert "Interrupted. To go on: bash" in stopped.stdout and "Traceback" not in stopped.stderr
    assert not (run / "report.html").exists()

    first = quickstart(clone, tmp_path, *EPOCHS)
    assert first.code == 0, first.stderr[-2000:]
    for phase in ("rollout", "judging", "learning", "evaluation"):
        assert phase in first.stderr
    # In the progress bar: epochs, reward, and the time that is left.
    assert re.search(r"epoch 2 · \w+.*1/2 \[\d+:\d+<\d+:\d+.*reward=0\.\d+", first.stderr)
    pictures = [path.suffix for path in (clone / "runs/quickstart/pictures").iterdir()]
    assert {".png", ".jpg"} <= set(pictures)
    assert f"{run}/report.html" in first.stdout
    report = (run / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?://""", report)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).stat().st_size > 0
    assert list((run / "checkpoints").iterdir())
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))

    again = quickstart(clone, tmp_path, *EPOCHS)
    assert again.code == 0, again.stderr[-2000:]
    assert "This run is finished: 2 epochs." in again.stdout
    assert "rollout" not in again.stderr

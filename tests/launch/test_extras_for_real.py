"""The extras that the README tells to install: what an index has for them, and wandb itself.

Each test makes an environment of its own; of what is resolved only metadata are fetched.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 900  # seconds, of an installation on a busy machine
# As the README writes them, with a package that they are there for.
EXTRAS = {
    "'.[tpu]'": "libtpu",
    "'.[cuda]'": "jax-cuda12-plugin",
    "'.[tpu,gcs]'": "gcsfs",
    "'.[wandb]'": "wandb",
}
pytestmark = pytest.mark.system

OFFLINE = """
import numpy as np
from sl_jax.training.metrics import LogConfig, MetricsWriter
for resume_from in (0, 2):  # a run, and the same one when it goes on
    writer = MetricsWriter("a run", resume_from, LogConfig("layers"))
    writer.scalars(resume_from + 1, {"judge/reward_mean": 0.625, "odd": float("nan")})
    writer.picture(resume_from + 1, "judged/0", np.zeros((8, 8, 3), np.uint8), "a table of scores")
    writer.close()
"""


def run(place: Path, *command: str | Path, **variables: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        command,
        cwd=place,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(place: Path, *packages: str) -> Path:
    """The programs of a new environment with these, beside the packages of the tests."""
    run(place, sys.executable, "-m", "venv", "venv")
    python = place / "venv" / "bin" / "python"
    where = run(place, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    known = [path for path in sys.path if path.endswith("site-packages")]
    (Path(where.strip()) / "tests.pth").write_text("".join(f"{path}\n" for path in known))
    run(place, python, "-m", "pip", "install", "--quiet", *packages)
    return python.parent


@pytest.fixture(scope="module")
def uv(tmp_path_factory) -> Path:
    """It resolves without fetching what it resolves, where pip may not."""
    return environment(tmp_path_factory.mktemp("uv"), "uv") / "uv"


@pytest.mark.parametrize(("words", "package"), EXTRAS.items())
def test_an_extra_can_be_had(uv, tmp_path, words, package):
    assert words in (ROOT / "README.md").read_text()
    extras = re.search(r"\[(.*)\]", words)[1].split(",")
    chosen = [f"--extra={extra}" for extra in extras]
    compile = (uv, "pip", "compile", "--quiet", *chosen, "--python-version=3.12", "--no-annotate")
    pinned = run(tmp_path, *compile, ROOT / "setup.py")
    names = re.findall(r"^([\w.-]+)==", pinned, re.MULTILINE)
    assert package in names and "torch" not in names
    assert ("jax" in names) == ("tpu" in extras or "cuda" in extras)


def test_weights_and_biases_for_real(tmp_path):
    python = environment(tmp_path, "wandb") / "python"
    run(tmp_path, python, "-c", OFFLINE, WANDB_MODE="offline", PYTHONPATH=str(ROOT))
    first, second = sorted((tmp_path / "a run" / "wandb").glob("offline-run-*"))
    for step, folder in ((1, first), (3, second)):
        (record,) = folder.glob("*.wandb")
        written = record.read_bytes()
        for words in (b"layers", b"judge/reward_mean", b"0.625", b"a table of scores"):
            assert words in written, words
        (picture,) = folder.glob("files/media/images/judged/*.png")
        assert picture.name.startswith(f"0_{step}_")
    told = (tmp_path / "a run" / "wandb_id").read_text()
    assert told in first.name and told in second.name  # which of one second get a number

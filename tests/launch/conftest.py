"""Places where the scripts of launch/ are tried."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import Cloud

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def cloud(tmp_path) -> Iterator[Cloud]:
    """A cloud with nothing in it."""
    made = Cloud(tmp_path)
    yield made
    made.close()

"""What an installed sl_jax contains: the wheel, unpacked and used far from the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that nothing stays behind in the repository."""
    place = tmp_path_factory.mktemp("packaging")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sl_jax", "configs"):
        shutil.copytree(ROOT / name, place / "copy" / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "copy")
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    done = subprocess.run(
        [sys.executable, *build, "./copy"], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = place.glob("*.whl")
    return zipfile.ZipFile(path)


def _files(folder: str, installed: str) -> set[str]:
    return {
        f"{installed}/{path.relative_to(ROOT / folder)}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_file_is_in_the_wheel(wheel):
    expected = _files("sl_jax", "sl_jax") | _files("configs", "sl_jax/configs")
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    for name in ("assets/tiny/tokenizer/vocab.json", "scoring/prompts/grid.md"):
        assert f"sl_jax/{name}" in packed
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_works_elsewhere(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    script = (
        "import sl_jax; from sl_jax.configs import grpo; from sl_jax.scoring import EmbeddedJudge;"
        "EmbeddedJudge(); print(sl_jax.__file__, grpo.get_config('tiny').model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [f"{tmp_path}/site/sl_jax/__init__.py", "tiny"], done.stderr

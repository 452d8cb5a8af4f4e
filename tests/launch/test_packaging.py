"""What an installed sl_jax contains, and that it works far from the repository."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sl_jax

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


def test_the_metadata_name_version_python_and_extras(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    told = email.message_from_bytes(wheel.read(name))
    assert (told["Name"], told["Version"]) == ("sl_jax", sl_jax.__version__)
    assert told["License-Expression"] == "Apache-2.0" or told["License"] == "Apache-2.0"
    allowed = SpecifierSet(told["Requires-Python"])
    assert [minor for minor in range(9, 16) if f"3.{minor}.1" in allowed] == [11, 12, 13]
    extras = {"cpu", "cuda", "tpu", "gcs", "judge", "wandb", "test"}
    assert extras <= set(told.get_all("Provides-Extra"))
    needed = [Requirement(text) for text in told.get_all("Requires-Dist")]
    accelerated = {
        extra
        for extra in [*extras, ""]
        for needs in needed
        if needs.name == "jax" and (not needs.marker or needs.marker.evaluate({"extra": extra}))
    }
    assert accelerated == {"cpu", "cuda", "tpu", "test"}
    assert "# Stable-Layers on JAX" in told.get_payload()


def _run(python: Path | str, place: Path, *arguments: str, **environment: str) -> str:
    """What Python prints in a folder far from the repository, with hardly an environment."""
    done = subprocess.run(
        [python, *arguments],
        cwd=place,
        env={"PATH": "/usr/bin:/bin", "HOME": str(place)} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _train(run: Callable[..., str], place: Path) -> None:
    """One small epoch of the packaged configuration, base and prompts, to adapter and report."""
    designs = (
        "from sl_jax.data import write_designs; write_designs('pictures', 'B', range(8), 64, 3)"
    )
    run("-c", designs)
    small = {
        **{"epochs": 1, "rollout.groups": 2, "rollout.batch_groups": 2, "rollout.group_size": 2},
        **{"rollout.steps": 4, "rollout.window_size": 2, "rollout.window_range": (0, 3)},
        **{"learner.updates": 1, "learner.micro_batch": 4, "evaluation.pictures": 2},
        **{"evaluation.batch": 2, "evaluation.steps": 2, "data.path": "pictures"},
    }
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    printed = run("-m", "sl_jax.train", "--config=grpo:tiny", *flags)
    assert "Report: runs/tiny/report.html" in printed
    assert (place / "runs" / "tiny" / "adapter" / "adapter_config.json").is_file()


@pytest.fixture
def elsewhere(wheel, tmp_path) -> Callable[..., str]:
    """Runs Python in a folder far from the repository, with the unpacked wheel."""
    wheel.extractall(tmp_path / "site")
    place = tmp_path / "place"
    place.mkdir()
    return partial(_run, sys.executable, place, PYTHONPATH=str(tmp_path / "site"))


def test_the_wheel_works_elsewhere(elsewhere, tmp_path):
    script = (
        "import sl_jax; from sl_jax.configs import grpo; from sl_jax.scoring import EmbeddedJudge;"
        "EmbeddedJudge(); print(sl_jax.__file__, grpo.get_config('tiny').model)"
    )
    found = elsewhere("-c", script).split()
    assert found == [f"{tmp_path}/site/sl_jax/__init__.py", "tiny"]


def test_the_wheel_trains_elsewhere(elsewhere, tmp_path):
    source = f"{tmp_path}/site/sl_jax/configs/grpo.py:tiny"
    printed = elsewhere("-m", "sl_jax.train", "--config=grpo:tiny", "--explain")
    assert printed.startswith(f"{source}\n")
    _train(elsewhere, tmp_path / "place")


@pytest.mark.system
def test_a_clone_installs_into_an_empty_environment_and_trains(clone, tmp_path):
    """`pip install` of a clone, with nothing but what it names itself."""
    python, place = tmp_path / "venv" / "bin" / "python", tmp_path / "place"
    place.mkdir()
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "SSL_"))}
    _run(sys.executable, tmp_path, "-m", "venv", "venv")
    _run(python, tmp_path, "-m", "pip", "install", "--quiet", f"{clone}[cpu]", **kept)
    run = partial(_run, python, place)
    assert run("-m", "sl_jax.train", "--version") == f"sl_jax {sl_jax.__version__}\n"
    assert not run("-m", "pip", "list", "--format=freeze").count("torch")
    _train(run, place)

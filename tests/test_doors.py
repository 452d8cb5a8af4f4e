"""What every command says at once: its version, a stop while it imports, a missing package."""

import os
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import sl_jax

ROOT = Path(__file__).parents[1]
DOORS = sorted(path.stem for path in (ROOT / "sl_jax").glob("[!_]*.py"))


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _stub_absl(folder: Path) -> None:
    """What the judge's imports need of it, but for `app`."""
    (folder / "absl").mkdir()
    (folder / "absl" / "__init__.py").write_text("")
    anything = "def __getattr__(name): return lambda *args, **named: None\n"
    for name in ("flags", "logging"):
        (folder / "absl" / f"{name}.py").write_text(anything)


@pytest.mark.parametrize("door", DOORS)
def test_version(door):
    done = _run("-X", "importtime", "-m", f"sl_jax.{door}", "--version")
    assert (done.returncode, done.stdout) == (0, f"sl_jax {sl_jax.__version__}\n")
    assert "numpy" not in done.stderr and "sl_jax" in done.stderr  # nothing heavy was imported


@pytest.mark.parametrize("as_module", [("-m", "tool.run"), ("-mtool.run",)])
def test_programs_that_use_the_package_keep_their_own_version_and_errors(tmp_path, as_module):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("import sl_jax\n")
    program = "import sys\nprint('tool', *sys.argv[1:])\nimport nothing_such\n"
    (tmp_path / "tool" / "run.py").write_text(program)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = _run(*as_module, "--version", "sl_jax.train", PYTHONPATH=path)
    assert done.stdout == "tool --version sl_jax.train\n"
    assert "Traceback" in done.stderr and "extra" not in done.stderr


def test_what_is_missing_later_than_at_imports_keeps_its_traceback(tmp_path):
    _stub_absl(tmp_path)
    (tmp_path / "absl" / "app.py").write_text("def run(main): import nothing_such\n")
    done = _run("-m", "sl_jax.judge", PYTHONPATH=str(tmp_path))
    assert "Traceback" in done.stderr and "nothing_such" in done.stderr
    assert _run("-msl_jax.judge", "--version").stdout == f"sl_jax {sl_jax.__version__}\n"


def test_the_version_is_that_of_the_package(monkeypatch):
    declared = {}
    recorder = types.ModuleType("setuptools")
    recorder.setup, recorder.find_packages = declared.update, lambda **_: []
    monkeypatch.setitem(sys.modules, "setuptools", recorder)
    runpy.run_path(str(ROOT / "setup.py"))
    assert declared["version"] == sl_jax.__version__


def test_a_stop_while_modules_are_imported_is_a_line(tmp_path):
    """A module that a door imports early takes its time."""
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl" / "__init__.py").write_text("")
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "absl" / "app.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, "-m", "sl_jax.judge"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == "\nStopped.\n"
    assert process.returncode == 130


def test_a_stop_that_a_compiled_module_swallows_is_a_line(tmp_path):
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl" / "__init__.py").write_text("")
    swallowing = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("it failed to begin")
"""
    (tmp_path / "absl" / "app.py").write_text(swallowing)
    done = _run("-m", "sl_jax.judge", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nStopped.\n")


@pytest.mark.parametrize("where", ["gc.collect()", "Late()", "signal.raise_signal(signal.SIGINT)"])
def test_a_stop_after_imports_is_a_line(tmp_path, where):
    """Also where Python drops it: in a garbage collection (JAX has a callback), in finalizers."""
    _stub_absl(tmp_path)
    program = f"""
import gc, signal, time
def once(*_):
    gc.callbacks.remove(once)
    signal.raise_signal(signal.SIGINT)
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def run(main):
    gc.disable()
    gc.callbacks.append(once)
    {where}
    time.sleep(20)
"""
    (tmp_path / "absl" / "app.py").write_text(program)
    done = _run("-m", "sl_jax.judge", PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("", "\nStopped.\n")
    assert done.returncode == -signal.SIGINT  # 130, says a shell


@pytest.mark.parametrize("door", DOORS)
def test_what_is_not_installed_is_named_with_the_extra(door):
    done = _run("-S", "-m", f"sl_jax.{door}")  # the standard library alone
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert " is not installed; please install sl_jax with the extra" in line


def test_other_errors_keep_their_traceback(tmp_path):
    (tmp_path / "absl.py").write_text("raise ZeroDivisionError('of a test')\n")
    done = _run("-m", "sl_jax.judge", PYTHONPATH=str(tmp_path))
    assert "Traceback" in done.stderr and "ZeroDivisionError: of a test" in done.stderr
    assert "No module named sl_jax.nothing" in _run("-m", "sl_jax.nothing").stderr

"""The scripts of launch/ and .ci/, run in a repository whose Python parts are stand-ins."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from stand_ins import Repository

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    ROOT / "launch" / "slurm.sbatch",
    ROOT / ".ci" / "run",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    return Repository(tmp_path_factory.mktemp("scripts"))


@pytest.fixture(scope="module")
def installed(repository) -> Repository:
    """With both environments made."""
    for script in ("quickstart.sh", "test.sh"):
        done = repository.run(script)
        assert done.returncode == 0, done.stderr
    repository.calls()
    return repository


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.suffix == ".sh" and path.name != "_env.sh"]
)
def test_usage_needs_nothing(script):
    done = subprocess.run(
        [shutil.which("bash"), str(script), "--help"],
        env={"PATH": str(Path(shutil.which("dirname")).parent), "HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("Usage: bash launch/")


@pytest.mark.system
def test_shellcheck():
    names = [str(script.relative_to(ROOT)) for script in SCRIPTS]
    done = subprocess.run(
        ["shellcheck", "-x", *names], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_quickstart_from_nothing(tmp_path):
    repository = Repository(tmp_path)
    done = repository.run("quickstart.sh", "--config.epochs=2")
    assert done.returncode == 0, done.stderr
    assert repository.calls() == [
        ["pip", "install", "-e", ".[cpu]"],
        ["designs", "B", 256, 64, 3],
        [
            "train",
            "--config=configs/grpo.py:tiny",
            "--config.data.path=runs/quickstart/pictures",
            "--config.workdir=runs/quickstart/run",
            "--config.epochs=2",
        ],
    ]
    run = repository.root / "runs" / "quickstart" / "run"
    for name in (run / "report.html", run / "adapter"):
        assert str(name) in done.stdout
    assert "tensorboard --logdir" in done.stdout


def test_quickstart_again_only_trains(installed):
    assert installed.run("quickstart.sh").returncode == 0
    assert [call[0] for call in installed.calls()] == ["train"]


def test_a_changed_setup_installs_again(tmp_path):
    repository = Repository(tmp_path)
    repository.run("quickstart.sh")
    (repository.root / "setup.py").write_text("# another\n")
    repository.calls()
    assert repository.run("quickstart.sh", pip_STATUS="3").returncode == 3
    assert [call[0] for call in repository.calls()] == ["pip"]
    assert repository.run("quickstart.sh").returncode == 0  # a failed installation is repeated
    assert [call[0] for call in repository.calls()] == ["pip", "train"]


def test_folders_of_one_name_do_not_collide(installed):
    folders = [installed.place / owner / "my pictures" for owner in "ab"]
    workdirs = []
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "one.png").touch()
        done = installed.run("quickstart.sh", "my pictures/", cwd=folder.parent)
        assert "procedural designs" in done.stdout
        (call,) = installed.calls()
        assert call[2] == f"--config.data.path={folder}"
        workdirs.append(call[3])
    assert len(set(workdirs)) == 2
    assert all(name.startswith("--config.workdir=runs/quickstart/run-my_") for name in workdirs)


def test_quickstart_with_a_work_directory(installed, tmp_path):
    done = installed.run("quickstart.sh", "--config.workdir=here", cwd=tmp_path)
    assert installed.calls()[0][3] == f"--config.workdir={tmp_path}/here"
    assert f"{tmp_path}/here/report.html" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "missing is not a folder"),
        ([""], "FOLDER is empty"),
        (["-x"], "-x is not known"),
        ([".", ".."], "Two folders"),
    ],
)
def test_quickstart_refuses(installed, arguments, words):
    done = installed.run("quickstart.sh", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert installed.calls() == []


def test_failed_training_is_passed_on(installed):
    done = installed.run("quickstart.sh", train_STATUS="7")
    assert done.returncode == 7
    assert "To go on: bash" in done.stderr
    assert "report.html" not in done.stdout
    installed.calls()


@pytest.mark.parametrize(
    "given", [["--work", "its work", "--results", "r"], ["--work=its work", "--results=r"]]
)
def test_folders_of_a_reproduction_are_the_callers(installed, tmp_path, given):
    work = tmp_path / "its work"
    (work / "wheels").mkdir(parents=True)
    (work / "wheels" / ".complete").touch()  # nothing is left to fetch
    done = installed.run("reproduce.sh", *given, "--arm", "base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = ["--work", str(work), "--results", f"{tmp_path}/r", "--arm", "base"]
    run = ["run", "--wheels", f"{work}/wheels", *told]
    assert installed.calls() == [run, ["tables", *told]]


def test_a_reproduction_without_folders_is_in_the_repository(installed, tmp_path):
    wheels = installed.root / "runs" / "reproduction" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / ".complete").touch()
    assert installed.run("reproduce.sh", cwd=tmp_path).returncode == 0
    assert installed.calls() == [["run", "--wheels", str(wheels)], ["tables"]]


@pytest.mark.parametrize("stage", ["pip", "train"])
def test_interrupt_says_how_to_go_on(stage, tmp_path):
    repository = Repository(tmp_path)
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    (pictures / "one.png").touch()
    process = subprocess.Popen(
        ["bash", str(repository.root / "launch" / "quickstart.sh"), str(pictures)],
        env=repository.environment(HANG=stage),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A parent in the background ignores SIGINT; a shell that inherits that cannot trap it.
        preexec_fn=_heeds_interrupts,
    )
    for line in process.stdout:
        if line == "hanging\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved" in rest
    command = rest.partition("To go on: ")[2]
    assert command.startswith("bash ")
    done = subprocess.run(["bash", "-c", command], env=repository.environment())
    assert done.returncode == 0
    assert repository.calls()[-1][2] == f"--config.data.path={pictures}"


def _heeds_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _only(folder: Path, *names: str) -> str:
    """A PATH with these programs and no others."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def test_no_suitable_python_names_what_was_looked_for(tmp_path):
    repository = Repository(tmp_path)
    old = repository.place / "old"
    path = _only(old, "bash", "dirname", "cat")
    (old / "python3").write_text('#!/bin/bash\necho "an old Python" >&2\nexit 1\n')
    (old / "python3").chmod(0o755)
    done = repository.run("quickstart.sh", PATH=path)
    assert done.returncode == 1
    for words in ("3.11 3.12 3.13", "python3.12", ".pyenv/versions", "PYTHON=/path/to/python"):
        assert words in done.stderr
    assert "an old Python" not in done.stderr
    done = repository.run("quickstart.sh", PYTHON=str(old / "python3"))
    assert done.returncode == 1
    assert f"PYTHON={old / 'python3'} is not a Python" in done.stderr


def test_a_strangers_folder_is_kept(tmp_path):
    repository = Repository(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").write_text("kept")
    done = repository.run("quickstart.sh", VENV="precious")
    assert done.returncode == 1
    assert "choose another folder" in done.stderr
    assert (tmp_path / "precious" / "work").read_text() == "kept"


def test_a_broken_environment_is_made_again(tmp_path):
    repository = Repository(tmp_path)
    repository.run("quickstart.sh")
    (repository.root / ".venv" / "bin" / "python").unlink()
    repository.calls()
    assert repository.run("quickstart.sh").returncode == 0
    assert [call[0] for call in repository.calls()] == ["pip", "train"]


def _marks(call: list[str]) -> str:
    return call[call.index("-m") + 1]


def test_suite_from_nothing(tmp_path):
    repository = Repository(tmp_path)
    done = repository.run("test.sh", "tests/flow", "-k", "a b")
    assert done.returncode == 0, done.stderr
    pip, fast, slow = repository.calls()
    assert pip == ["pip", "install", "torch==2.13.0", "-e", ".[test]"]
    assert _marks(fast) == "not slow and not system and not soak"
    assert _marks(slow) == "slow and not system and not soak"
    assert fast[-3:] == slow[-3:] == ["tests/flow", "-k", "a b"]
    assert "Tier fast: status 0 after" in done.stdout
    assert "Left out: the tiers system and soak" in done.stdout


def test_suite_fails_when_a_tier_fails(installed):
    done = installed.run("test.sh", pytest_STATUS="1")
    assert done.returncode == 1
    assert len(installed.calls()) == 2  # the second tier runs all the same
    assert "Failed: fast slow" in done.stderr


def test_suite_that_runs_nothing_fails(installed):
    done = installed.run("test.sh", pytest_STATUS="5")
    assert done.returncode == 1
    assert "No test was run" in done.stderr
    installed.calls()


def test_one_tier_without_peers(tmp_path):
    repository = Repository(tmp_path)
    done = repository.run("test.sh", TIERS="fast", PEERS="no", WORKERS="3")
    assert done.returncode == 0, done.stderr
    pip, fast = repository.calls()
    assert pip == ["pip", "install", "-e", ".[test-without-torch]"]
    assert [word for word in fast if "ignore" in word] == ["--ignore=tests/test_peer.py"]
    assert fast[fast.index("-n") + 1] == "3"
    assert "tests/test_peer.py" in done.stdout


def test_unknown_tier(installed):
    done = installed.run("test.sh", TIERS="quick")
    assert done.returncode == 1
    assert "please use fast, slow or both" in done.stderr
    assert installed.calls() == []

"""The fast tier with the oldest, or the newest, versions that setup.py allows, in a fresh clone.

    python tests/soak/versions.py oldest --out tests/soak/results/oldest_versions.json
    python tests/soak/versions.py newest --out tests/soak/results/newest_versions.json

`oldest` is the first Python that setup.py allows, and of each requirement with a lower bound just
that version; `newest` is the last Python, and what pip then chooses. Both go through
`launch/test.sh`, without PyTorch as on CI's second Python, on the commit that is checked out.
"""

import argparse
import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
EXTRA = "test-without-torch"  # what `launch/test.sh` installs with PEERS=no
PYTHONS = [f"3.{minor}" for minor in range(20)]


def printed(command, folder=None):
    """What a command prints."""
    return subprocess.check_output(command, cwd=folder, text=True).strip()


def told_by_setup(folder):
    """The arguments of `setup`."""
    with contextlib.chdir(folder), mock.patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    return setup.call_args.kwargs


def lower_bounds(told):
    """Lower bounds of what the fast tier needs, by name, and the names without one."""
    bounds, unbounded = {}, []
    for requirement in map(Requirement, told["install_requires"] + told["extras_require"][EXTRA]):
        lowest = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if lowest:
            bounds[requirement.name] = lowest[0]
        else:
            unbounded.append(requirement.name)
    return bounds, unbounded


def interpreter(end, told):
    """Path of the oldest or newest Python that setup.py allows, as `launch` finds it."""
    allowed = [v for v in PYTHONS if v in SpecifierSet(told["python_requires"])]
    version = allowed[0] if end == "oldest" else allowed[-1]
    return printed(["bash", "-c", f". launch/_env.sh; PYTHON= find_python {version}"], ROOT)


def counts(report):
    """Of a JUnit report: how many tests ended how, and the names of those that failed."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
    }


def installed(python):
    """Version of every package of an environment."""
    listed = json.loads(printed([python, "-m", "pip", "list", "--format", "json"]))
    return {entry["name"]: entry["version"] for entry in listed if entry["name"] != "sl_jax"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=("oldest", "newest"))
    parser.add_argument("tests", nargs="*", help="files; all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    told = told_by_setup(ROOT)
    bounds, unbounded = lower_bounds(told)
    with tempfile.TemporaryDirectory() as temporary:
        clone, venv = Path(temporary, "clone"), Path(temporary, "venv")
        constraints, report = Path(temporary, "constraints.txt"), Path(temporary, "report.xml")
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        environment = os.environ | {
            "PYTHON": interpreter(arguments.end, told),
            "VENV": str(venv),
            "PEERS": "no",
            "TIERS": "fast",
            "WORKERS": str(arguments.workers),
        }
        if arguments.end == "oldest":
            constraints.write_text("".join(f"{n}=={v}\n" for n, v in bounds.items()))
            environment["PIP_CONSTRAINT"] = str(constraints)
        began = time.monotonic()
        command = ["bash", "launch/test.sh", f"--junitxml={report}", *arguments.tests]
        ended = subprocess.run(command, cwd=clone, env=environment)
        if not report.exists():
            sys.exit("No test has run; the reason is above.")
        result = {
            "command": " ".join(["python tests/soak/versions.py", arguments.end, *arguments.tests]),
            "commit": printed(["git", "rev-parse", "--short=12", "HEAD"], clone),
            "python": printed([venv / "bin" / "python", "--version"]).removeprefix("Python "),
            "cpus": os.cpu_count(),
            "workers": arguments.workers,
            "seconds, with the installation": round(time.monotonic() - began),
            **counts(report),
            "installed": installed(venv / "bin" / "python"),
        }
    if arguments.end == "oldest":
        result |= {"lower bounds": bounds, "without a bound, as pip chose": unbounded}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()

"""Readers of strangers' files and answers, 10,000 cases each: nothing but documented errors.

    python tests/soak/fuzz.py --out tests/soak/results/fuzz.json

The subjects and their cases are those of `tests/fuzzing.py`, of which the slow tests take 500.
`--only NAME` runs one, and leaves the results of the others in the file as they are.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import outcome, subjects
from hypothesis import HealthCheck, Phase, given, seed, settings


def fuzzed(name, cases, first, folder):
    """How the cases of a subject ended; one that ends in another error is raised, as small as it
    can be made."""
    subject, ends, slowest = subjects()[name], collections.Counter(), 0.0

    @seed(first)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.cases)
    def read(case):
        nonlocal slowest
        end, seconds = outcome(subject, case, folder)
        ends[end] += 1
        slowest = max(slowest, seconds)

    begun = time.monotonic()
    read()
    return {
        "cases": ends.total(),
        "read": ends.pop("read", 0),
        "documented_errors": dict(ends),
        "other_errors": 0,
        "slowest_seconds": round(slowest, 3),
        "seconds": round(time.monotonic() - begun, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=subjects())
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    versions = ("hypothesis", "jax", "numpy", "pillow", "pydantic", "safetensors")
    told = {
        "command": f"python tests/soak/fuzz.py --cases {flags.cases} --seed {flags.seed}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "subjects": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        if flags.only and flags.out and flags.out.exists():
            told["subjects"] = json.loads(flags.out.read_text())["subjects"]
        for number, name in enumerate([flags.only] if flags.only else subjects()):
            place = Path(folder, str(number))
            place.mkdir()
            told["subjects"][name] = fuzzed(name, flags.cases, flags.seed, place)
            print(name, json.dumps(told["subjects"][name]), flush=True)
    if flags.out:
        flags.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

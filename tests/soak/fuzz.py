"""Readers of strangers' files and answers, 10,000 cases each: nothing but documented errors.

    python tests/soak/fuzz.py --out tests/soak/results/fuzz.json

The subjects and their cases are those of `tests/fuzzing.py`, of which the slow tests take 500.
`--only NAME` runs one; the results of the others that are in the file stay. Each says by which
command and versions it was made, and which bound on seconds of a core all its cases kept to.
"""

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import LONGEST, outcome, subjects
from hypothesis import HealthCheck, Phase, given, seed, settings
from soak_results import about

PACKAGES = ("hypothesis", "jax", "numpy", "pillow", "pydantic", "safetensors")


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

    begun = time.process_time()
    read()
    command = f'python tests/soak/fuzz.py --cases {cases} --seed {first} --only "{name}"'
    return about(command, PACKAGES) | {
        "cases": ends.total(),
        "read": ends.pop("read", 0),
        "documented_errors": dict(ends),
        "other_errors": 0,
        "slowest_seconds": round(slowest, 3),
        "bound_seconds": LONGEST,
        "seconds": round(time.process_time() - begun, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=subjects())
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    before = json.loads(flags.out.read_text()) if flags.out and flags.out.exists() else {}
    found = {name: before[name] for name in subjects() if name in before}
    for name in [flags.only] if flags.only else subjects():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = fuzzed(name, flags.cases, flags.seed, Path(folder))
        print(name, json.dumps(found[name]), flush=True)
        if flags.out:
            flags.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

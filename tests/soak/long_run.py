"""Two thousand epochs of the smallest configuration: nothing grows but the records.

    python tests/soak/long_run.py --out tests/soak/results/long_run.json

The run saves a checkpoint after every epoch, as runs do by default, and asks a judge on loopback.
Every two seconds its memory, file handles, threads and CPU time are noted, and the files of
its work directory. Ten parts of the run are compared: medians, and CPU time per epoch, which other
work on the machine stretches less than the clock.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "grpo"))

import jax
import numpy as np
from random_base import write_random_base
from runner import MINIMAL, SERVED, Runner
from served import ServedJudge
from soak_results import about

PARTS = 10
A_RUN = 600  # epochs of a long one
EVERY = 2.0  # seconds
# What grows by the same amount every epoch.
RECORDS = ("judge", "judge.sqlite3", "metrics.jsonl", "tensorboard")
TOKEN = "a-token-of-the-soak"
SETTINGS = {
    **MINIMAL,
    **SERVED,
    "evaluation.every": 50,
    "checkpoint.every": 1,
    "judge.max_requests": 1_000_000,
}
# What may change between the second part of the run and the last.
MEMORY, HANDLES, THREADS, SECONDS = 0.03, 4, 4, 1.5


def memory(process):
    """Resident bytes."""
    fields = Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")
    return 1024 * int(fields[1].split()[0]) if len(fields) > 1 else 0


def cpu_seconds(process):
    """Of all its threads, so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def size(path):
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def look(process, workdir):
    """How things stand, once the run has begun; None where it ended meanwhile."""
    try:
        epochs = (workdir / "metrics.jsonl").read_bytes().count(b"\n") - 1
        return {
            "epoch": epochs,
            "memory": memory(process),
            "cpu": cpu_seconds(process),
            "handles": len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
            "threads": len(list(Path(f"/proc/{process.pid}/task").iterdir())),
            "records": sum(size(workdir / name) for name in RECORDS),
            "other": sum(size(p) for p in workdir.iterdir() if p.name not in RECORDS),
        }
    except OSError:
        return None


def in_parts(epochs, values, last):
    """Medians of the values of each part of the run."""
    part = np.minimum(np.asarray(epochs) * PARTS // (last + 1), PARTS - 1)
    values = np.asarray(values, float)
    return [float(np.median(values[part == number])) for number in range(PARTS)]


def slopes(epochs, values, last):
    """Growth of the values per epoch in each part of the run."""
    bounds = np.interp(np.linspace(epochs[0], last, PARTS + 1), epochs, values)
    return [float(growth) * PARTS / (last - epochs[0]) for growth in np.diff(bounds)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=2000)
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # what runs once here, costs less so
    server = ServedJudge(TOKEN)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = root / "base"
        base.mkdir()
        runner = Runner(write_random_base(base), root, SETTINGS, devices=1, token=TOKEN)
        began, seen = time.monotonic(), []
        (process,) = runner.start(root, ((server,),), {"epochs": arguments.epochs})
        while process.poll() is None:
            found = look(process, root / "run")
            if found and 0 < found["epoch"] < arguments.epochs:
                seen.append(found)
            time.sleep(EVERY)
        elapsed = time.monotonic() - began
        assert process.returncode == 0, (root / "printed_0.txt").read_text()[-3000:]
        server.stop()
        records = (root / "run" / "metrics.jsonl").read_bytes().count(b"\n") - 1
    epochs = [found["epoch"] for found in seen]
    parts = {
        name: in_parts(epochs, [found[name] for found in seen], arguments.epochs)
        for name in ("memory", "handles", "threads", "other")
    }
    parts["seconds"] = slopes(epochs, [found["cpu"] for found in seen], epochs[-1])
    first, last = seen[len(seen) // 10], seen[-1]
    flat = {
        "memory": parts["memory"][-1] <= (1 + MEMORY) * parts["memory"][1],
        "handles": parts["handles"][-1] <= parts["handles"][1] + HANDLES,
        "threads": parts["threads"][-1] <= parts["threads"][1] + THREADS,
        "other files": parts["other"][-1] <= 1.1 * parts["other"][1],
        "seconds": parts["seconds"][-1] <= SECONDS * parts["seconds"][1],
    }
    # From the middle of the second part to that of the last; each epoch ends with a save.
    growth = (parts["memory"][-1] - parts["memory"][1]) / (records * (PARTS - 2) / PARTS)
    result = about(f"python tests/soak/long_run.py --epochs {arguments.epochs}") | {
        "epochs": records,
        "seconds": round(elapsed, 1),
        "tenths": {
            "resident memory, MB": [round(v / 1e6, 1) for v in parts["memory"]],
            "file handles": parts["handles"],
            "threads": parts["threads"],
            "files but records, kB": [round(v / 1e3, 1) for v in parts["other"]],
            "CPU seconds per epoch": [round(v, 4) for v in parts["seconds"]],
        },
        "records, bytes per epoch": round(
            (last["records"] - first["records"]) / (last["epoch"] - first["epoch"])
        ),
        "memory, kB per epoch and save": round(growth / 1e3, 1),
        f"which makes of {A_RUN} epochs, MB": round(A_RUN * growth / 1e6, 1),
        "flat": flat,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(0 if all(flat.values()) else 1)


if __name__ == "__main__":
    main()

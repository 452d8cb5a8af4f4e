"""How long does the learner wait for a judge that takes as long as the rollout?

    python tests/benchmarks/overlap.py --output tests/benchmarks/results/overlap.json

Trains the tiny base by `python -m sl_jax.train --config=configs/grpo.py:tiny`, judged by servers on
loopback, in a process of their own, that answer with scores drawn from what they are sent; so many
that all groups of two rollout batches are judged at a time. First they answer at once, which tells
how long a rollout batch takes; then each judgement of a group, both stages together, takes
`--factor` times that. One JSON line per run: seconds and shares of an epoch's phases (median over
epochs, without the first, which compiles), `judging` being the time for which everything waits for
scores. Fails if that is 5 % or more at factor 1.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scoring"))

from hostile import MODEL, HostileServer

from sl_jax.data import write_designs
from sl_jax.scoring import CRITERIA
from sl_jax.training.metrics import read_metrics

_ROOT = Path(__file__).parents[2]
_MOST_IDLE = 0.05  # of an epoch
_STAGES = 2  # requests of a group, one after the other
_BATCHES = 4  # of rollouts, per epoch
_SERVERS = 10  # of 8 requests at a time each: two batches of 4 groups ask 2 × 4 × 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--factor", type=float, action="append", help="default: 1 and 2")
    arguments = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    factors = arguments.factor or [1.0, 2.0]
    with tempfile.TemporaryDirectory() as folder:
        write_designs(Path(folder) / "pictures", "B", range(64), 64, 3)
        rows.append(measured(Path(folder), 0.0, 0.0, arguments.epochs))
        batch = _seconds_per_batch(rows[0])
        for factor in factors:
            rows.append(measured(Path(folder), factor, factor * batch, arguments.epochs))
    told = " ".join(f"--factor {factor:g}" for factor in factors)
    result = {
        "command": f"python tests/benchmarks/overlap.py --epochs {arguments.epochs} {told}",
        "load_before": round(load, 2),
        "settings": {"epochs": arguments.epochs, "factors": factors},
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "numpy")},
        "runs": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        if row["factor"] == 1 and row["share"]["judging"] >= _MOST_IDLE:
            sys.exit(f"The learner waits for {row['share']['judging']:.1%} of the time.")


def measured(folder: Path, factor: float, latency: float, epochs: int) -> dict:
    """One run whose groups take `latency` seconds to judge; printed as well."""
    workdir = folder / f"run_{factor:g}"
    with _served(latency / _STAGES) as urls:
        _train(folder / "pictures", workdir, urls, epochs)
    records = [r for r in read_metrics(workdir) if r["step"] > 1]

    def medians(what: str) -> dict[str, float]:
        names = [n.removeprefix(f"{what}/") for n in records[0] if n.startswith(f"{what}/")]
        return {n: statistics.median(r.get(f"{what}/{n}", 0.0) for r in records) for n in names}

    row = {
        "factor": factor,
        "judgement_seconds": latency,
        "epochs": len(records),
        "batches_per_epoch": _BATCHES,
        "valid_share": min(r["judge/valid_share"] for r in records),
        "seconds": medians("seconds"),
        "share": medians("share"),
    }
    print(json.dumps(row), flush=True)
    return row


def _train(pictures: Path, workdir: Path, urls: Sequence[str], epochs: int) -> None:
    settings: dict[str, object] = {
        "data.path": pictures,
        "workdir": workdir,
        "epochs": epochs,
        "rollout.groups": 4 * _BATCHES,
        "judge.model": MODEL,
        "judge.concurrency": 16,
        "judge.cache": False,
        "evaluation.every": epochs,
        "evaluation.pictures": 4,
        "evaluation.batch": 4,
        "evaluation.steps": 2,
        "checkpoint.every": epochs,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    flags += [f"--config.judge.endpoints={url}" for url in urls]
    command = [sys.executable, "-m", "sl_jax.train", "--config=configs/grpo.py:tiny", *flags]
    subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)


def _seconds_per_batch(row: dict) -> float:
    """Of rolling out: from the pictures to the layers that are sent to the judge."""
    phases = ("rollout", "decoding", "encoding")
    return sum(row["seconds"][name] for name in phases) / _BATCHES


@contextmanager
def _served(latency: float) -> Iterator[list[str]]:
    """URLs of judges in another process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, latency), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join(10)


def serve(connection, latency: float) -> None:
    """Answers after `latency` seconds until it is told to stop."""

    async def answer(writer, content):
        await asyncio.sleep(latency)
        schema = content["response_format"]["json_schema"]["schema"]["properties"]
        scores = _scores(json.dumps(content).encode())
        if "scores" in schema:
            names = schema["scores"]["required"]
            text = json.dumps({"scores": dict(zip(names, scores(len(names), 100), strict=True))})
        else:
            text = json.dumps(
                {
                    name: {"reason": "drawn by lot", "score": score}
                    for name, score in zip(CRITERIA, scores(len(CRITERIA), 10), strict=True)
                }
            )
        return await servers[0].send(writer, 200, servers[0].completion(text))

    with ExitStack() as stack:
        servers = [stack.enter_context(HostileServer(lambda _: answer)) for _ in range(_SERVERS)]
        connection.send([server.url for server in servers])
        connection.recv()


def _scores(content: bytes):
    """(how many, largest) → scores that depend on the request alone."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    random = np.random.default_rng(seed)

    def drawn(count: int, largest: int) -> Sequence[int]:
        return random.integers(0, largest + 1, count).tolist()

    return drawn


if __name__ == "__main__":
    main()

"""What judging by servers costs the host that trains: CPU per request, and its main thread.

    python tests/benchmarks/judge_client.py --output tests/benchmarks/results/judge_client.json

Groups of the production shape (640 px, 4 layers, 8 candidates, one grid) are judged through the
pool by a server on loopback that answers at once or after `--latency` seconds and runs in a process
of its own. One JSON line per row:

- part: milliseconds of one thread for each step of a request;
- alone: seconds that a request takes beyond the server's own, one at a time;
- pool: CPU of this process per request, its share of one core at that pace, and what the main
  thread notices: how long it takes to hand a group over, and how late it wakes from sleeps of a
  millisecond while groups are judged, beside the same sleeps before.
"""

import argparse
import asyncio
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scoring"))

from hostile import HostileServer

from sl_jax.scoring import CRITERIA, Group, JudgeConfig, JudgeWorker, RenderConfig, TwoStageJudge
from sl_jax.scoring import request as rendering
from sl_jax.scoring.cases import design
from sl_jax.scoring.encoding import RequestConfig, content_of
from sl_jax.scoring.rubric import load_prompts, parse_candidate, parse_grid

SIDE, LAYERS, CANDIDATES = 640, 4, 8
VERDICT = json.dumps({name: {"reason": "as it should be", "score": 7} for name in CRITERIA})


def serve(connection, latency: float) -> None:
    """Answers without looking until it is told to stop."""

    async def answer(writer, content):
        await asyncio.sleep(latency)
        schema = content["response_format"]["json_schema"]["schema"]["properties"]
        text = VERDICT
        if "scores" in schema:
            text = json.dumps({"scores": dict.fromkeys(schema["scores"]["required"], 50)})
        return await server.send(writer, 200, server.completion(text))

    with HostileServer(lambda _: answer) as server:
        connection.send(server.url)
        connection.recv()


@contextmanager
def served(latency: float) -> Iterator[str]:
    """The address of such a server."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, latency), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        process.join(20)


def groups(count: int) -> list[Group]:
    """Groups whose pictures all differ."""
    built = design(SIDE)
    spare = np.zeros_like(built[:1])
    stack = np.concatenate([built, *[spare] * max(0, LAYERS - len(built))])[:LAYERS]
    source = np.ascontiguousarray(stack[0, ..., :3])
    rng = np.random.default_rng(0)

    def shifted() -> np.ndarray:
        return np.roll(stack, rng.integers(0, SIDE, 2), axis=(1, 2))

    return [
        Group(f"g{i}", source, tuple(shifted() for _ in range(CANDIDATES))) for i in range(count)
    ]


def pool_of(url: str, config: RequestConfig, places: int):
    from sl_jax.scoring.openai_client import EndpointConfig
    from sl_jax.scoring.pool import JudgePool, PoolConfig

    return JudgePool(PoolConfig((EndpointConfig(url, "m", concurrency=places),), config))


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of this thread, after one try."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.thread_time()
        work()
        taken.append(1e3 * (time.thread_time() - started))
    return round(statistics.median(taken), 3)


def parts(group: Group, repeats: int) -> Iterator[dict]:
    """Each step of a request on one thread."""
    prompts, render = load_prompts(), RenderConfig()
    arrangement = rendering.shuffle(range(CANDIDATES), 0, "g", 0)
    makers = {
        "candidate": lambda: rendering.candidate_request(
            group.source, group.candidates[0], prompts, render
        ),
        "grid": lambda: rendering.grid_request(
            group, arrangement, np.full(CANDIDATES, 0.5), prompts, render
        ),
    }
    answers = {
        "candidate": lambda: parse_candidate(VERDICT),
        "grid": lambda: parse_grid(
            json.dumps({"scores": dict.fromkeys(arrangement.labels, 50)}), arrangement.labels
        ),
    }
    for kind, make in makers.items():
        yield {"row": "part", "of": kind, "step": "render", "ms": milliseconds(make, repeats)}
        request = make()
        for form in ("png", "jpeg"):
            config = RequestConfig(picture_format=form)
            body = len(json.dumps(content_of(request, config)))
            yield {
                **{"row": "part", "of": kind, "step": f"encode {form}"},
                "ms": milliseconds(lambda c=config, r=request: content_of(r, c), repeats),
                "body_kib": body // 1024,
            }
        yield {
            "row": "part",
            "of": kind,
            "step": "parse",
            "ms": milliseconds(answers[kind], repeats),
        }


def alone(group: Group, form: str, repeats: int) -> dict:
    """One request at a time, at a server that answers at once."""
    config = RequestConfig(picture_format=form, structured="schema")
    request = rendering.candidate_request(
        group.source, group.candidates[0], load_prompts(), RenderConfig()
    )

    async def asked(url: str) -> list[float]:
        pool, taken = pool_of(url, config, 1), []
        try:
            for _ in range(repeats + 1):
                started = time.monotonic()
                await pool.answer(request)
                taken.append(1e3 * (time.monotonic() - started))
        finally:
            await pool.aclose()
        return taken[1:]

    with served(0.0) as url:
        taken = asyncio.run(asked(url))
    return {"row": "alone", "format": form, "ms": round(statistics.median(taken), 2), "n": repeats}


def lateness(until: Callable[[], bool]) -> dict[str, float]:
    """How late this thread wakes from sleeps of a millisecond, in milliseconds."""
    late = []
    while not until():
        started = time.monotonic()
        time.sleep(1e-3)
        late.append(1e3 * (time.monotonic() - started) - 1)
    return {f"p{share}": round(float(np.percentile(late, share)), 2) for share in (50, 95, 99)}


def pooled(shown: list[Group], form: str, latency: float, places: int) -> dict:
    """Many requests in flight, while the main thread has other things to do."""
    config = RequestConfig(picture_format=form, structured="schema")
    ends = time.monotonic() + 3
    before = lateness(lambda: time.monotonic() > ends)
    with served(latency) as url:
        judge = TwoStageJudge(pool_of(url, config, places), JudgeConfig())
        with JudgeWorker(judge, concurrency=8) as worker:
            worker.submit(shown[0]).result()  # connections, and the first use of everything
            started, cpu, main = time.monotonic(), time.process_time(), time.thread_time()
            futures = []
            handing = []
            for group in shown:
                began = time.monotonic()
                futures.append(worker.submit(group))
                handing.append(1e3 * (time.monotonic() - began))
            during = lateness(lambda: all(future.done() for future in futures))
            seconds = time.monotonic() - started
            cpu, main = time.process_time() - cpu, time.thread_time() - main
            assert all(future.result().two_stage for future in futures)
    requests = len(shown) * (CANDIDATES + 1)
    return {
        **{"row": "pool", "format": form, "latency": latency, "places": places},
        "requests": requests,
        "requests_per_second": round(requests / seconds, 1),
        "cpu_ms_per_request": round(1e3 * (cpu - main) / requests, 2),
        "cpu_share_of_one_core": round((cpu - main) / seconds, 3),
        "main_thread": {
            "submit_ms": round(statistics.median(handing), 3),
            "submit_ms_most": round(max(handing), 3),
            "wakes_late_ms_before": before,
            "wakes_late_ms_while_judging": during,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds of a busy server")
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = {k: v for k, v in vars(arguments).items() if k != "output"}
    command = "python tests/benchmarks/judge_client.py " + " ".join(
        f"--{name} {value}" for name, value in settings.items()
    )
    names = ("openai", "numpy", "pillow", "pydantic")
    rows = [
        {
            **{"row": "host", "command": command, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": round(os.getloadavg()[0], 1),
            "versions": {name: importlib.metadata.version(name) for name in names},
            "group": {"side": SIDE, "layers": LAYERS, "candidates": CANDIDATES},
        }
    ]
    shown = groups(arguments.groups)
    rows += parts(shown[0], arguments.repeats)
    for form in ("png", "jpeg"):
        rows.append(alone(shown[0], form, arguments.repeats))
        rows.append(pooled(shown, form, arguments.latency, arguments.places))
    for row in rows:
        print(json.dumps(row), flush=True)
    arguments.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()

"""The judge pool under full fire: 10,000 requests over eight servers, two of which misbehave.

    python tests/soak/judge_pool.py --out tests/soak/results/judge_pool.json

Servers run in processes of their own, on loopback. Two runs: the six healthy servers alone, which
says what they can do, then all eight. Every answer is compared with the one that is right.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scoring"))

from hostile import HostileServer, at_random, expected, known_group
from soak_results import about

from sl_jax.scoring import JudgeConfig, JudgeWorker, RenderConfig, TwoStageJudge
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.endpoint_state import CoolDown

GROUP = 4  # candidates; with one grid, five requests


def serve(connection, seed, share, latency):
    """A server until it is told to stop; then it says what it saw."""
    fault = at_random(seed, share) if share else lambda _: None
    with HostileServer(fault, latency) as server:
        connection.send(server.port)
        connection.recv()
        connection.send((len(server.times), dict(server.answered)))


class Servers:
    """Servers in processes of their own."""

    def __init__(self, shares, latency):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for seed, share in enumerate(shares):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, seed, share, latency), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.ports = [pipe.recv() for pipe in self.pipes]

    def stop(self):
        for pipe in self.pipes:
            pipe.send("stop")
        seen = [pipe.recv() for pipe in self.pipes]
        for process in self.processes:
            process.join(20)
        return seen


def run(shares, groups, arguments):
    """Judges the groups; returns what happened."""
    from sl_jax.scoring.openai_client import EndpointConfig  # servers start without it
    from sl_jax.scoring.pool import JudgePool, PoolConfig

    servers = Servers(shares, arguments.latency)
    endpoints = tuple(
        EndpointConfig(f"http://127.0.0.1:{port}/v1", "scripted", concurrency=arguments.places)
        for port in servers.ports
    )
    pool = JudgePool(
        PoolConfig(
            endpoints,
            RequestConfig(timeout=10 * arguments.latency, structured="schema"),
            cool_down=CoolDown(1, 60),
        )
    )
    judge = TwoStageJudge(pool, JudgeConfig(render=RenderConfig(tile_size=None)))
    right = wrong = invalid = grids = finished = 0
    started, cpu = time.monotonic(), time.process_time()
    with JudgeWorker(judge, arguments.groups_in_flight) as worker:
        for scores in worker.judge_all(groups):
            finished += 1
            wanted = expected(groups[int(scores.group_id[1:])])
            for found, known, valid in zip(scores.stage1, wanted, scores.valid, strict=True):
                right += bool(valid and abs(found - known) < 1e-9)
                wrong += bool(valid and abs(found - known) >= 1e-9)
                invalid += not valid
            grids += bool(scores.two_stage and (abs(scores.stage2 - wanted) < 1e-9).all())
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        metrics = pool.metrics()
    seen = servers.stop()
    answered = {}
    for _, digests in seen:
        for digest in digests:
            answered[digest] = answered.get(digest, 0) + 1
    requests = len(groups) * (GROUP + 1)
    return {
        "servers": len(shares),
        "groups": finished,
        "requests": requests,
        "right": right,
        "wrong": wrong,
        "invalid": invalid,
        "grids_right": grids,
        "distinct_requests_answered": len(answered),
        "sent": int(metrics["requests"]),
        "errors": {k: int(v) for k, v in metrics.items() if k.endswith("/errors")},
        "seconds": round(seconds, 2),
        "requests_per_second": round(requests / seconds, 2),
        "p50": round(metrics["p50"], 3),
        "p95": round(metrics["p95"], 3),
        "client_cpu_ms_per_request": round(1e3 * cpu / requests, 2),
        "client_cpu_share_of_one_core": round(cpu / seconds, 3),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds per answer")
    parser.add_argument("--places", type=int, default=8, help="concurrency per server")
    parser.add_argument("--groups_in_flight", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.7, help="faulty answers of the bad two")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    groups = [known_group(i, GROUP) for i in range(arguments.requests // (GROUP + 1))]
    alone = run([0.0] * 6, groups[: max(1, len(groups) // 4)], arguments)
    hostile = run([0.0] * 6 + [arguments.share] * 2, groups, arguments)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    flags = " ".join(f"--{name} {value}" for name, value in settings.items())
    packages = ("openai", "numpy", "pillow", "pydantic")
    result = about(f"python tests/soak/judge_pool.py {flags}", packages) | {
        "six_healthy_servers": alone,
        "with_two_hostile_servers": hostile,
        "throughput_ratio": round(hostile["requests_per_second"] / alone["requests_per_second"], 3),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    candidates = GROUP * len(groups)
    held = (
        hostile["groups"] == len(groups)
        and hostile["wrong"] == 0
        and hostile["right"] + hostile["invalid"] == candidates
        and result["throughput_ratio"] > 0.85
        and hostile["peak_memory_mib"] < 1.25 * alone["peak_memory_mib"]  # of four times as much
    )
    sys.exit(0 if held else "the pool did not hold what it promises")


if __name__ == "__main__":
    main()

"""The judge against a real vLLM server with a Qwen2.5-VL model and decoding by JSON schema.

    JUDGE_TOKEN=... VLLM=/path/to/bin/vllm bash launch/judge_pool/vllm.sh MODEL --dtype float32 ...
    JUDGE_TOKEN=... python tests/soak/vllm_judge.py --url http://127.0.0.1:8000/v1 --model MODEL \
        --out tests/soak/results/vllm_judge.json

Any model does, one with random weights too: what is tried is the protocol, not the taste. Groups
are judged in both stages, as contact sheets and as separate pictures; once more through the cache,
which must ask nothing; and one picture is described.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from sl_jax.scoring import Group, GroupScores, JudgeConfig, JudgeWorker, RenderConfig, TwoStageJudge
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint
from sl_jax.scoring.captions import CaptionConfig, captions_of
from sl_jax.scoring.cases import built_cases
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.openai_client import EndpointConfig
from sl_jax.scoring.pool import JudgePool, PoolConfig
from sl_jax.scoring.preflight import preflight

GROUP = 4
KEY = "JUDGE_TOKEN"


def groups(count: int) -> list[Group]:
    """Groups whose candidates all differ."""
    built = [case for case in built_cases(64) if case.clean.shape == case.flawed.shape]
    made = []
    for number in range(count):
        case = built[number % len(built)]
        shifted = np.roll(case.clean, 2 * number + 1, axis=2)
        candidates = (case.clean, case.flawed, shifted, case.clean[:, ::-1].copy())
        made.append(Group(f"g{number}", case.source, candidates))
    return made


def summary(judged: list[GroupScores], seconds: float, pool: JudgePool) -> dict:
    stage1, stage2 = (
        np.concatenate([getattr(scores, name) for scores in judged])
        for name in ("stage1", "stage2")
    )
    return {
        "groups": len(judged),
        "candidates": len(stage1),
        "valid": int(sum(scores.valid.sum() for scores in judged)),
        "two_stage": sum(scores.two_stage for scores in judged),
        "distinct_stage1": len(np.unique(stage1[np.isfinite(stage1)])),
        "distinct_stage2": len(np.unique(stage2[np.isfinite(stage2)])),
        "reasons": sum(any(scores.reasons) for scores in judged),
        "sent": int(pool.metrics()["requests"]),
        "seconds": round(seconds, 1),
    }


def judged(endpoint, shown, render) -> tuple[list[GroupScores], float]:
    began = time.monotonic()
    with JudgeWorker(TwoStageJudge(endpoint, JudgeConfig(render=render)), concurrency=4) as worker:
        return list(worker.judge_all(shown)), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--server", default="", help="what serves, with its version")
    parser.add_argument("--max_tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    key = KEY if os.environ.get(KEY) else ""

    def pool(structured: str = "auto") -> JudgePool:
        endpoint = EndpointConfig(arguments.url, arguments.model, key, concurrency=4)
        request = RequestConfig(timeout=600, max_tokens=arguments.max_tokens, structured=structured)
        return JudgePool(PoolConfig((endpoint,), request))

    checked = asyncio.run(_preflight(pool()))
    result = {"server": arguments.server, "python": platform.python_version(), "preflight": checked}
    shown = groups(arguments.groups)
    small = RenderConfig(picture_size=112, tile_size=56)
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("sheet", "separate"):
            render = dataclasses.replace(small, layout=layout)
            asked = pool()
            cached = CachedEndpoint(asked, AnswerCache(Path(folder) / f"{layout}.sqlite3"))
            scores, seconds = judged(cached, shown, render)
            result[layout] = summary(scores, seconds, asked)
            resumed = pool()
            again = CachedEndpoint(resumed, AnswerCache(Path(folder) / f"{layout}.sqlite3"))
            repeated, seconds = judged(again, shown, render)
            result[f"{layout}, again"] = summary(repeated, seconds, resumed)
            known = {entry.group_id: entry.reward for entry in scores}
            result[f"{layout}, again"]["equal"] = all(
                np.array_equal(entry.reward, known[entry.group_id], equal_nan=True)
                for entry in repeated
            )
    described = asyncio.run(_described(pool(), shown[0]))
    result["caption"] = described
    print(json.dumps(result, indent=1))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


async def _preflight(pool: JudgePool) -> str:
    try:
        reports = await preflight(pool, size=64, layers=3, group_size=GROUP)
    finally:
        await pool.aclose()
    return reports[0].to_text()


async def _described(pool: JudgePool, group: Group) -> dict[str, int]:
    try:
        found = await captions_of(pool, {"picture": lambda: group.source}, CaptionConfig(words=20))
    finally:
        await pool.aclose()
    return {"asked": 1, "letters": len(found.get("picture", ""))}


if __name__ == "__main__":
    main()

"""A judge's key is in none of all the things that a run writes."""

import asyncio
import json
import logging
import re
from urllib.parse import quote, quote_plus

import pytest
from hostile import HostileServer, known_group, scripted

from sl_jax.scoring import JudgeConfig, JudgeWorker, RenderConfig, TwoStageJudge
from sl_jax.scoring.budget import Budget
from sl_jax.scoring.cache import AnswerCache, CachedEndpoint
from sl_jax.scoring.encoding import RequestConfig
from sl_jax.scoring.keys import redacted
from sl_jax.scoring.openai_client import OpenAIJudge
from sl_jax.scoring.pool import JudgePool, PoolConfig
from sl_jax.scoring.preflight import preflight
from sl_jax.scoring.records import JudgeRecords

KEY = "sk-very-s3cret-key"


def test_nothing_that_is_written_holds_the_key(tmp_path, monkeypatch, capfd):
    """The server repeats the key wherever it can: answers, errors, headers, lists of models."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    handler = logging.FileHandler(tmp_path / "all.log")
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)

    async def echo(writer, content):
        text = json.dumps({"error": {"message": f"no {KEY}", "code": KEY, "type": KEY}})
        return await server.send(writer, 401 + 99 * (len(server.times) % 2), text, [f"x: {KEY}"])

    try:
        with HostileServer(lambda number: echo if number % 3 == 2 else None) as server:
            server.respond = lambda request: scripted(request).replace("seen", f"seen {KEY}")
            config = PoolConfig((server.endpoint(key_env="JUDGE_KEY"),), RequestConfig(timeout=5))
            cache = AnswerCache(tmp_path / "judge.sqlite3")
            pool = JudgePool(config, Budget(ledger=cache))
            judge = TwoStageJudge(
                CachedEndpoint(pool, cache), JudgeConfig(render=RenderConfig(tile_size=None))
            )
            groups = [known_group(i, 3) for i in range(4)]
            with JudgeWorker(judge) as worker:
                scores = [worker.submit(group).result(60) for group in groups]
                names = worker.call(pool.clients[0].models()).result(20)
                metrics = pool.metrics()
            broken = JudgePool(config)
            server.fault = lambda _: echo
            reports = asyncio.run(_failing_preflight(broken))
        JudgeRecords(tmp_path / "records").write(1, groups, scores)
        told = "".join(map(repr, (config, pool, scores, names, metrics, reports, cache)))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
    (tmp_path / "told").write_text(told + "".join(capfd.readouterr()))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4 and any("[key]" in path.read_text("latin-1") for path in files)
    shown = [head for head in server.heads if f"Bearer {KEY}" in head]
    assert len(shown) == len(server.heads) > 10  # the server did get it
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_a_key_is_hidden_in_all_its_forms():
    """Servers repeat it in JSON, cut off or not, in addresses, and letter by letter."""
    key = 'sk-"\\/+ü-0123'
    letters = "".join(f"\\u{ord(letter):04x}" for letter in key)
    lower = re.sub("%..", lambda found: found[0].lower(), quote(key, safe=""))
    mixed = f"{letters[:12].upper().replace('U', 'u')}{key[2:]}"
    for told in (
        *(key, json.dumps(key), json.dumps(key, ensure_ascii=False), mixed),
        *(quote(key), quote(key, safe=""), lower, quote_plus(key)),
    ):
        assert redacted(f"no {told}, no", key).replace('"', "") == "no [key], no", told
    for told in (json.dumps(key), json.dumps(key, ensure_ascii=False), f'"{letters}"'):
        for before, after in (("", ""), ("<think>{</think>", ""), ("```json\n", "\n```")):
            text = f'{before}{{"{letters}": [{told}, 1.5, "a\\n"]}}{after}'
            hidden = redacted(text, key).removeprefix(before).removesuffix(after)
            assert json.loads(hidden) == {"[key]": ["[key]", 1.5, "a\n"]}
    assert redacted('{"a": "\\u00fc"}', key) == '{"a": "\\u00fc"}'  # as it was
    assert redacted("a key+of words", "key of words") == "a [key]"


@pytest.mark.parametrize(
    ("before", "after"), [("```json\n", "\n```"), ("<think>a {\\}</think>\n", ""), ("", "")]
)
def test_answers_of_every_form_are_cleaned(monkeypatch, before, after):
    """With escapes in them, and the key in escapes."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    letters = "".join(f"\\u{ord(letter):04X}" for letter in KEY)
    with HostileServer() as server:
        server.respond = lambda request: scripted(request).replace(
            "seen", f"\\u00fc \\\\ {letters}"
        )
        server.wrap = lambda text: f"{before}{text}{after}"
        judge = OpenAIJudge(server.endpoint(key_env="JUDGE_KEY"), RequestConfig(timeout=20))
        endpoint = TwoStageJudge(judge, JudgeConfig(render=RenderConfig(tile_size=None)))
        with JudgeWorker(endpoint) as worker:
            scores = worker.submit(known_group(0, 3)).result(60)
            worker.call(judge.aclose()).result(20)
    assert scores.valid.all(), scores.failures
    assert {reason for told in scores.reasons for reason in told} == {"ü \\ [key]"}


async def _failing_preflight(pool):
    try:
        return await preflight(pool, size=32, group_size=2)
    except RuntimeError as error:
        return repr(error)
    finally:
        await pool.aclose()

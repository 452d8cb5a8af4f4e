"""Serves the embedded judge over the OpenAI protocol, or audits any judge.

`python -m sl_jax.judge --port=8000` serves. `python -m sl_jax.judge --audit=http://host:8000/v1
--model=NAME` measures what the judge there notices, how noisy it is, and what it costs;
`--audit=embedded` and `--audit=embedded-vlm` measure the embedded ones. Needs no JAX.
"""

import asyncio
import json
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from absl import logging as absl_logging

from sl_jax.parallel.interrupts import stop
from sl_jax.scoring.embedded import EmbeddedConfig, EmbeddedJudge
from sl_jax.scoring.keys import read_key
from sl_jax.scoring.types import JudgeError

if TYPE_CHECKING:
    from sl_jax.scoring.audit import AuditReport
    from sl_jax.scoring.server import JudgeServer

_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to serve on; 0 takes a free one.", lower_bound=0, upper_bound=65535
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; loopback needs no token.")
_TOKEN = flags.DEFINE_string("token_env", "", "Environment variable of the clients' bearer token.")
_MODE = flags.DEFINE_enum("mode", "precise", ["precise", "vlm"], "Which embedded judge to serve.")
_THREADS = flags.DEFINE_integer("threads", 2, "Judgements at the same time.", lower_bound=1)
_AUDIT = flags.DEFINE_string("audit", "", "Judge to audit: a URL, embedded, or embedded-vlm.")
_MODEL = flags.DEFINE_string("model", "", "Model to audit.")
_KEY = flags.DEFINE_string("key_env", "", "Environment variable of the audited judge's key.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Judgements of each case.", lower_bound=2)
_CONCURRENCY = flags.DEFINE_integer(
    "concurrency", 8, "Groups and requests in flight.", lower_bound=1
)
_SIZE = flags.DEFINE_integer("size", 128, "Side of the audit's pictures.", lower_bound=32)
_TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds for an answer.", lower_bound=0.1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling.", lower_bound=0.0)
_JSON = flags.DEFINE_string("json", "", "File that the audit's numbers are written to.")


def main(argv: list[str]) -> None:
    """Serves until it is stopped, or audits."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --flag=value")
    try:
        if _AUDIT.value:
            _print_audit()
        else:
            _serve()
    except KeyboardInterrupt:
        stop("Stopped.")
    except (JudgeError, RuntimeError, OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _serve() -> None:
    from sl_jax.scoring.server import JudgeServer

    token = read_key(_TOKEN.value)
    if not token and _HOST.value not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(
            f"--host={_HOST.value} can be reached by others: please export a token of at least 8 "
            "characters and name its variable, as in --token_env=JUDGE_TOKEN"
        )
    judge = EmbeddedJudge(EmbeddedConfig(mode=_MODE.value))
    family = socket.AF_INET6 if ":" in _HOST.value else socket.AF_INET
    with (
        closing(JudgeServer(judge, token, threads=_THREADS.value)) as server,
        socket.create_server((_HOST.value, _PORT.value), family=family) as listening,
    ):
        asyncio.run(_answer(server, listening))


async def _answer(server: "JudgeServer", listening: socket.socket) -> None:
    from sl_jax.scoring.http_server import http_server

    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"Judge {server.model} at http://{address}:{port}/v1", flush=True)
    await http_server(server).serve([listening])


def _print_audit() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # not a line for each request
    report = asyncio.run(_audited())
    print(report.to_text())
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")


async def _audited() -> "AuditReport":
    from sl_jax.scoring.audit import audit
    from sl_jax.scoring.encoding import RequestConfig
    from sl_jax.scoring.openai_client import EndpointConfig  # takes seconds to import
    from sl_jax.scoring.pool import JudgePool, PoolConfig
    from sl_jax.scoring.preflight import preflight

    how = (_REPEATS.value, _SIZE.value, _CONCURRENCY.value)
    if _AUDIT.value in ("embedded", "embedded-vlm"):
        mode = "vlm" if _AUDIT.value == "embedded-vlm" else "precise"
        judge = EmbeddedJudge(EmbeddedConfig(mode=mode))
        return await audit(judge, judge.name, *how)
    endpoint = EndpointConfig(_AUDIT.value, _MODEL.value, _KEY.value, _CONCURRENCY.value)
    request = RequestConfig(temperature=_TEMPERATURE.value, timeout=_TIMEOUT.value)
    pool = JudgePool(PoolConfig((endpoint,), request))
    try:
        for found in await preflight(pool):
            print(found.to_text(), flush=True)
        return await audit(pool, endpoint.label, *how)
    finally:
        await pool.aclose()


if __name__ == "__main__":
    app.run(main)

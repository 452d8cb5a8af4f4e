"""Answers that were paid for once, in SQLite: a resumed or repeated run asks nothing twice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import os
import sqlite3
import threading
import time
from functools import partial
from pathlib import Path
from typing import Protocol

from sl_jax.scoring.types import Answer, BrokenAnswerError, JudgeRequest
from sl_jax.scoring.verify import verify

_log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY, answer TEXT NOT NULL, endpoint TEXT NOT NULL, tokens INTEGER NOT NULL,
  seconds REAL NOT NULL, stored REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (
  one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, tokens INTEGER NOT NULL
);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0);
"""
_BUSY_SECONDS = 60.0


class CacheError(RuntimeError):
    """The file is no cache, or cannot be used."""


class AnswerCache:
    """A SQLite file of verified answers, and of what the run has spent.

    Every answer is one transaction (write-ahead log): a killed process loses at most the one it was
    writing. Several processes on one machine may use the file at once; on a network drive they may
    not. Methods block: `CachedEndpoint` calls them on a thread.

    Args:
      path: of the file, made if it is missing; on a local disk.

    Raises:
      CacheError: the file cannot be opened or is no cache.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._gate = threading.Lock()
        self.hits = self.misses = self.broken = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # A byte that was changed spoils its own answer, and not the run.
            self._database.text_factory = partial(str, encoding="utf-8", errors="replace")
            self._database.execute(f"PRAGMA busy_timeout = {int(1000 * _BUSY_SECONDS)}")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
            self._database.execute("SELECT key, answer FROM answers LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise CacheError(
                f"{self.path} cannot be used as a cache of judge answers ({error}): please delete "
                "it to start an empty one, or name a file on a local disk"
            ) from error

    def get(self, key: str) -> Answer | None:
        """The stored answer, marked as cached."""
        row = self._execute("SELECT answer, endpoint, tokens FROM answers WHERE key = ?", key)
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        return Answer(row[0], row[1], row[2], cached=True)

    def put(self, key: str, answer: Answer) -> None:
        """Stores an answer; one that is there already stays."""
        self._execute(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            *(key, str(answer), answer.endpoint, answer.tokens, answer.seconds, time.time()),
        )

    def forget(self, key: str) -> None:
        """Removes an answer that `get` gave and that proved to be none: it was a miss."""
        self._execute("DELETE FROM answers WHERE key = ?", key)
        self.hits, self.misses, self.broken = self.hits - 1, self.misses + 1, self.broken + 1

    def spent(self) -> tuple[int, int]:
        """Requests and tokens of all processes so far."""
        return self._execute("SELECT requests, tokens FROM spent")

    def spend(self, requests: int, tokens: int) -> None:
        """Adds to them, in the file, where a kill leaves it."""
        change = "UPDATE spent SET requests = requests + ?, tokens = tokens + ?"
        self._execute(change, requests, tokens)

    def close(self) -> None:
        """Closes the file."""
        with self._gate:
            self._database.close()

    def _execute(self, statement: str, *values: object) -> tuple | None:
        with self._gate:
            try:
                return self._database.execute(statement, values).fetchone()
            except sqlite3.Error as error:
                raise CacheError(f"{self.path}: {error}") from error


class Fingerprinted(Protocol):
    """An endpoint that says what its answers depend on."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything besides the request that determines an answer."""
        ...

    async def answer(self, request: JudgeRequest) -> Answer:
        """As `Endpoint`; answers are verified."""
        ...


class CachedEndpoint:
    """An endpoint that asks another one only what it was never told.

    Equal requests that are in flight together are asked once. A request's `repeat` is not part of
    the key: broken answers are never stored, so the answer that came at last is the one to keep.
    One that is broken now, by the disk or by rules that became stricter, is forgotten and asked for
    anew, which a warning says once.

    Args:
      endpoint: who knows, and gives verified answers only.
      cache: where its answers are kept.
    """

    def __init__(self, endpoint: Fingerprinted, cache: AnswerCache):
        self.endpoint, self.cache = endpoint, cache
        self._asked: dict[str, asyncio.Task[Answer]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "judge-cache")

    @property
    def fingerprint(self) -> str:
        """The other endpoint's."""
        return self.endpoint.fingerprint

    @property
    def trouble(self) -> str | None:
        """The other endpoint's: why nobody answers at present, if so."""
        return getattr(self.endpoint, "trouble", None)

    def key(self, request: JudgeRequest) -> str:
        """SHA-256 (hex) of all that determines the answer."""
        told = (self.fingerprint, str(request.stage), str(request.sample), request.digest())
        return hashlib.sha256("/".join(told).encode()).hexdigest()

    async def answer(self, request: JudgeRequest) -> Answer:
        """The stored answer, or the other endpoint's, which is then stored.

        Raises:
          CacheError: the file fails.
          JudgeError: as the other endpoint.
        """
        loop = asyncio.get_running_loop()
        key = await loop.run_in_executor(self._thread, self.key, request)
        while (task := self._asked.get(key)) is not None:
            await asyncio.wait({task})
            if not task.cancelled():  # else whoever asked gave up, and it is our turn
                shared = task.result()
                return Answer(shared, shared.endpoint, shared.tokens, cached=True)
        task = self._asked[key] = loop.create_task(self._fetch(key, request))
        task.add_done_callback(lambda _: self._asked.pop(key))
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            task.cancel()

    def metrics(self) -> dict[str, float]:
        """The other endpoint's, and what was remembered."""
        cache = self.cache
        own = {
            "cache/hits": float(cache.hits),
            "cache/misses": float(cache.misses),
            "cache/broken": float(cache.broken),
        }
        inner = getattr(self.endpoint, "metrics", None)
        return own if inner is None else inner() | own

    async def aclose(self) -> None:
        """Closes the other endpoint and the file."""
        closing = getattr(self.endpoint, "aclose", None)
        if closing is not None:
            await closing()
        await asyncio.get_running_loop().run_in_executor(self._thread, self.cache.close)
        self._thread.shutdown()

    async def _fetch(self, key: str, request: JudgeRequest) -> Answer:
        loop = asyncio.get_running_loop()
        known = await loop.run_in_executor(self._thread, self._known, key, request)
        if known is not None:
            return known
        answer = await self.endpoint.answer(request)
        await loop.run_in_executor(self._thread, self.cache.put, key, answer)
        return answer

    def _known(self, key: str, request: JudgeRequest) -> Answer | None:
        """The stored answer, if it is still one."""
        known = self.cache.get(key)
        if known is None:
            return None
        try:
            verify(request, known)
        except BrokenAnswerError as error:
            if not self.cache.broken:
                _log.warning(
                    "%s holds an answer that is broken now (%s): it is asked for anew, and so are "
                    "others like it.",
                    *(self.cache.path, error),
                )
            self.cache.forget(key)
            return None
        return known

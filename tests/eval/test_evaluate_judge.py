"""The judge of an evaluation: in process and behind a server, equal, and asked only once."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn

from sl_jax import imaging
from sl_jax.data.procedural import make_design
from sl_jax.eval.judging import JudgeChoice, open_judge
from sl_jax.eval.options import Shard
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.systems import baseline_systems
from sl_jax.scoring import EmbeddedJudge
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.server import JudgeServer
from sl_jax.scoring.types import PreflightError

TOKEN = "a-token-of-the-test"
TRUE = make_design("B", 0, 32, 3).layers
SOURCE = imaging.recompose(TRUE)
COPIES = np.stack([TRUE[0]] * 3)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """Address and model of the embedded judge behind HTTP."""
    judge = JudgeServer(EmbeddedJudge(), TOKEN)
    running = uvicorn.Server(uvicorn.Config(judge.app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", judge.model
    running.should_exit = True
    thread.join(10)
    judge.close()


def _told(choice: JudgeChoice, folder) -> list:
    with open_judge(choice, folder, 32, 3, Shard()) as judge:
        return [
            judge.score("true", SOURCE, TRUE),
            judge.score("copies", SOURCE, COPIES),
            judge.compare("pair", SOURCE, COPIES, TRUE),
            judge.compare("same", SOURCE, TRUE, TRUE),
        ]


def test_scores_and_comparisons(tmp_path):
    true, copies, better, same = _told(JudgeChoice(("embedded",)), tmp_path)
    assert true.reward > copies.reward and len(true.criteria) == 5
    assert true.reward == pytest.approx(np.mean(true.criteria))
    assert (better, same) == (1.0, 0.5)


def test_stacks_of_different_length_are_filled_up(tmp_path):
    with open_judge(JudgeChoice(("embedded",)), tmp_path, 32, 3, Shard()) as judge:
        blank = np.zeros_like(TRUE[:1])
        for short in (TRUE[:1], TRUE[:2]):
            filled = np.concatenate([short, *[blank] * (3 - len(short))])
            assert judge.compare("a", SOURCE, TRUE, short) == judge.compare(
                "a", SOURCE, TRUE, filled
            )
            assert judge.compare("b", SOURCE, short, TRUE) == 1.0


def test_a_server_says_the_same_and_is_asked_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY_OF_THE_TEST", TOKEN)
    url, model = server
    choice = JudgeChoice((url,), model, "JUDGE_KEY_OF_THE_TEST", concurrency=2)
    embedded = _told(JudgeChoice(("embedded",)), tmp_path)
    assert _told(choice, tmp_path) == embedded
    asked = []
    answer = EmbeddedJudge.answer

    async def counted(self, request):
        asked.append(request.stage)
        return await answer(self, request)

    monkeypatch.setattr(EmbeddedJudge, "answer", counted)
    assert _told(choice, tmp_path) == embedded
    assert len(asked) <= 2  # its trial alone


def test_every_shard_keeps_its_answers_in_a_file_of_its_own(server, tmp_path, monkeypatch):
    """Hosts that share a network drive cannot share a database."""
    monkeypatch.setenv("JUDGE_KEY_OF_THE_TEST", TOKEN)
    url, model = server
    config = EvaluationConfig(
        "procedural:B:2:2:32",
        str(tmp_path),
        protocols=("judge",),
        judge=JudgeChoice((url,), model, "JUDGE_KEY_OF_THE_TEST"),
        baselines=False,
    )
    for part in range(2):
        evaluate(dataclasses.replace(config, shard=Shard(part, 2)), baseline_systems()[:1])
        assert (tmp_path / "judge.sqlite3").exists()
        assert (tmp_path / "judge_1.sqlite3").exists() == (part == 1)


def test_a_judge_that_cannot_judge_is_named_at_once(server, tmp_path, monkeypatch):
    url, model = server
    monkeypatch.setenv("JUDGE_KEY_OF_THE_TEST", "another-token-than-its-own")
    with (
        pytest.raises(PreflightError, match="cannot judge"),
        open_judge(JudgeChoice((url,), model, "JUDGE_KEY_OF_THE_TEST"), tmp_path, 32, 3, Shard()),
    ):
        pass
    monkeypatch.delenv("JUDGE_KEY_OF_THE_TEST")
    with (
        pytest.raises(KeyMissingError, match="JUDGE_KEY_OF_THE_TEST"),
        open_judge(JudgeChoice((url,), model, "JUDGE_KEY_OF_THE_TEST"), tmp_path, 32, 3, Shard()),
    ):
        pass

"""The judges of a run as the configuration names them."""

import dataclasses
import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from flax import serialization

from sl_jax.grpo.config import EvaluationConfig, GrpoConfig, JudgeSettings, RolloutConfig
from sl_jax.grpo.judges import open_judges
from sl_jax.parallel.processes import Processes
from sl_jax.scoring import BudgetError, EmbeddedJudge, cases
from sl_jax.scoring.cache import CacheError
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.types import Group, PreflightError

URL = "http://127.0.0.1:9/v1"  # nobody listens
QUIET = {"preflight": False}


def _config(evaluation=(), model="tiny", **judge):
    return GrpoConfig(
        "run",
        model,
        4,
        rollout=RolloutConfig(group_size=2),
        judge=JudgeSettings(**judge),
        evaluation=EvaluationConfig(every=3, judge=evaluation),
    )


def _group(name="g", seed=0):
    built = cases.built_cases(32)[seed]
    return Group(name, built.source, (built.clean, built.flawed))


@pytest.fixture
def served(servers, judge_token, monkeypatch):
    """A served judge, with the endpoint that leads to it."""
    monkeypatch.setenv("TEST_JUDGE_TOKEN", judge_token)
    servers[0].endpoint = EndpointConfig(servers[0].url, "embedded-precise", "TEST_JUDGE_TOKEN")
    return servers[0]


def test_in_process_nothing_is_written_or_tried(tmp_path, caplog):
    with open_judges(_config(), tmp_path, 4, 10) as judges:
        both = judges.training.submit(_group()).result(60)
        one = judges.evaluation.submit(_group()).result(60)
        assert isinstance(judges.training.endpoint, EmbeddedJudge)
    assert both.two_stage and not one.two_stage and both.stage1.tolist() == one.stage1.tolist()
    assert list(tmp_path.iterdir()) == []
    assert "config.evaluation.judge names another" in caplog.text


@pytest.mark.parametrize("model", ["tiny", "Qwen/Qwen-Image-Layered"])
def test_pixels_alone_should_not_judge_other_pictures_than_procedural_ones(tmp_path, caplog, model):
    with open_judges(_config(model=model), tmp_path, 4, 10):
        pass
    said = "config.judge.endpoints" in caplog.text
    assert said == (model != "tiny")
    caplog.clear()
    config = _config(model=model, endpoints=(EndpointConfig(URL, "m"),), **QUIET)
    with open_judges(config, tmp_path, 4, 10):
        pass
    assert "config.judge.endpoints" not in caplog.text


def test_training_and_evaluation_share_servers_answers_and_budget(served, tmp_path):
    config = _config(endpoints=(served.endpoint,), max_requests=3, **QUIET)
    with open_judges(config, tmp_path, 4, 10) as judges:
        assert judges.training.endpoint is judges.evaluation.endpoint
        first = judges.training.submit(_group()).result(60)
        again = judges.evaluation.submit(_group()).result(60)
        assert first.stage1.tolist() == again.stage1.tolist() and first.valid.all()
        assert all(call.cached for call in again.calls)
        with pytest.raises(BudgetError, match="3 of max_requests = 3"):
            judges.evaluation.submit(_group(name="h", seed=1)).result(60)
    assert served.judge.asked.total() == 3
    with open_judges(config, tmp_path, 4, 10) as judges:  # restarted
        judges.training.submit(_group()).result(60)
        with pytest.raises(BudgetError):
            judges.training.submit(_group(name="h", seed=1)).result(60)
    assert served.judge.asked.total() == 3


class Sending(Processes):
    """One process, that puts what it would tell others as it would be sent."""

    def all_gather(self, what, value=None, error=None):
        serialization.msgpack_serialize({"value": value})
        return super().all_gather(what, value, error)


def test_servers_are_named_to_other_processes(tmp_path):
    config = _config((EndpointConfig(URL, "n"),), endpoints=(EndpointConfig(URL, "m"),), **QUIET)
    with open_judges(config, tmp_path, 4, 10, Sending()) as judges:
        assert judges.training.endpoint is not judges.evaluation.endpoint


def test_another_judge_may_evaluate(served, tmp_path, caplog):
    with open_judges(
        _config((served.endpoint,), max_requests=2, **QUIET), tmp_path, 4, 10
    ) as judges:
        assert judges.training.submit(_group()).result(60).endpoints == ("embedded:precise",)
        found = judges.evaluation.submit(_group()).result(60)
        assert found.endpoints == (served.endpoint.label,) and not found.two_stage
        with pytest.raises(BudgetError):
            judges.evaluation.submit(_group(name="h", seed=1)).result(60)
    assert "names another" not in caplog.text


def test_without_a_cache_the_budget_still_holds_over_restarts(served, tmp_path):
    config = _config(endpoints=(served.endpoint,), max_requests=6, cache=False, **QUIET)
    for _ in range(2):
        with open_judges(config, tmp_path, 4, 10) as judges:
            assert judges.training.submit(_group()).result(60).valid.all()
    assert served.judge.asked.total() == 6
    with open_judges(config, tmp_path, 4, 10) as judges, pytest.raises(BudgetError):
        judges.training.submit(_group()).result(60)


def test_servers_are_tried_and_the_cost_is_forecast(served, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sl_jax")
    config = _config(endpoints=(served.endpoint,), model="m")
    with open_judges(config, tmp_path, 4, 10):
        assert served.judge.asked.total() == 2
    assert "ready (JSON by schema)" in caplog.text
    # 32 groups of 2 and a grid, 4 epochs; 10 pictures before, at epochs 3 and 4.
    assert "96 calls and" in caplog.text and "414 calls" in caplog.text


def test_captions_are_tried_and_forecast_too(served, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sl_jax")
    config = _config(endpoints=(served.endpoint,))
    with (
        pytest.raises(PreflightError, match="describes no pictures"),
        open_judges(config, tmp_path, 4, 10, captions=7),
    ):
        pass
    served.judge.captions = {}
    with open_judges(config, tmp_path, 4, 10, captions=7):
        assert len(served.judge.captions) == 1
    assert "one caption" in caplog.text
    assert "421 calls" in caplog.text and "at most 7 captions among them" in caplog.text


def test_what_cannot_be_used_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    servers = (EndpointConfig(URL, "m", "NO_SUCH_KEY"),)
    with (
        pytest.raises(KeyMissingError, match="NO_SUCH_KEY"),
        open_judges(_config(endpoints=servers), tmp_path, 4, 10),
    ):
        pass
    (tmp_path / "judge.sqlite3").write_text(json.dumps("no database, whatever its name says" * 9))
    with (
        pytest.raises(CacheError, match=r"judge\.sqlite3"),
        open_judges(_config(endpoints=(EndpointConfig(URL, "m"),)), tmp_path, 4, 10),
    ):
        pass


def test_evaluations_are_counted():
    config = EvaluationConfig(every=3)
    assert [config.times(epochs) for epochs in (0, 1, 3, 4, 6)] == [1, 2, 2, 3, 3]


def test_processes_share_what_a_server_can_take(served, tmp_path, caplog):
    """One that both name takes no more from both than from one; one of a process's own does."""
    limits = {"concurrency": 9, "requests_per_minute": 500, "tokens_per_minute": 1}
    shared = dataclasses.replace(served.endpoint, **limits)
    alone = EndpointConfig(URL, "m", concurrency=9, name="alone")
    processes = SimpleNamespace(
        is_main=True,
        count=2,
        all_gather=lambda what, urls: [urls, [url for url in urls if url != URL]],
        together=lambda what: nullcontext(),
    )
    with open_judges(_config(endpoints=(shared, alone), **QUIET), tmp_path, 4, 10, processes) as j:
        first, second = (client.endpoint for client in j.training.endpoint.endpoint.clients)
    assert (first.concurrency, first.requests_per_minute, first.tokens_per_minute) == (4, 250, 1)
    assert "tokens_per_minute cannot be divided by the 2 processes" in caplog.text
    assert second == alone

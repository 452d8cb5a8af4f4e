"""Whole runs judged by served judges on loopback: they fail, and the run ends the same."""

import collections
import runpy
import time
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from sl_jax import train
from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.data import write_designs
from sl_jax.grpo.config import from_mapping
from sl_jax.grpo.judging import JudgeUnavailableError
from sl_jax.parallel.mesh import make_mesh
from sl_jax.scoring import BudgetError
from sl_jax.scoring.captions import CaptionError
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.records import read_records
from sl_jax.scoring.types import PreflightError
from sl_jax.training.metrics import read_metrics
from sl_jax.training.status import read_status

_FILE = Path(__file__).parents[2] / "configs" / "grpo.py"
EPOCHS = 2
SETTINGS = {
    "epochs": EPOCHS,
    "data.buckets": ((32, 32),),
    "data.eval_fraction": 0.2,
    "rollout.groups": 4,
    "rollout.batch_groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 4,
    "rollout.window_range": (0, 3),
    "rollout.window_size": 2,
    "learner.micro_batch": 8,
    "lora.rank": 4,
    # With random weights every candidate would meet the vetoes, and nothing be learned.
    "rewards": (("judge", 1.0),),
    "evaluation.pictures": 3,
    "evaluation.batch": 4,
    "evaluation.steps": 2,
    "evaluation.every": 2,
    "evaluation.shown": 2,
    "checkpoint.every": 100,
    "judge.cool_down.first": 0.1,
    "judge.cool_down.longest": 0.2,
    "judge.patience": 0.5,
    "judge.min_valid": 1.0,
}


class Runner:
    """Runs of one checkpoint on one folder of pictures, on one device."""

    def __init__(self, model, folder):
        self.model, self.pictures = model, folder / "pictures"
        write_designs(self.pictures, "B", range(16), 32, 3)

    def __call__(self, workdir, servers=(), **settings):
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        fields = {
            "model": str(self.model),
            "data.path": str(self.pictures),
            "workdir": str(workdir),
            **SETTINGS,
            "judge.endpoints": tuple(served.url for served in servers),
            "judge.model": "embedded-precise",
            "judge.key_env": "TEST_JUDGE_TOKEN",
            **settings,
        }
        config = runpy.run_path(str(_FILE))["get_config"]("tiny").to_dict()
        for path, value in fields.items():
            *parents, name = path.split(".")
            here = config
            for parent in parents:
                here = here[parent]
            here[name] = value
        train.run(from_mapping(config, 1))


@pytest.fixture(scope="module")
def runner(random_checkpoint, judge_token, tmp_path_factory):
    one = jax.devices()[:1]
    cache = str(tmp_path_factory.mktemp("programs"))
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        made = "sl_jax.parallel.mesh.make_mesh"
        patch.setattr(made, lambda config, _: make_mesh(config, one))
        patch.setenv("TEST_JUDGE_TOKEN", judge_token)
        for name, value in settings.items():
            jax.config.update(name, value)
        yield Runner(random_checkpoint, tmp_path_factory.mktemp("runs"))
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """The work directory of a run with the judge in process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runner(workdir)
    return workdir


def _assert_same(workdir, other):
    adapters = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (workdir, other)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, weights in adapters[0].items():
        assert weights.tobytes() == adapters[1][name].tobytes(), name
    for mine, theirs in zip(
        read_records(workdir / "judge"), read_records(other / "judge"), strict=True
    ):
        assert (mine.epoch, mine.picture_id) == (theirs.epoch, theirs.picture_id)
        for name in ("criteria", "stage1", "stage2", "reward", "permutations"):
            first, second = (getattr(record.scores, name) for record in (mine, theirs))
            assert first.tobytes() == second.tobytes(), name
        assert mine.scores.reasons == theirs.scores.reasons


def _asked(servers):
    return sum((served.judge.asked for served in servers), collections.Counter())


def _latest(workdir):
    checkpoints = RunCheckpoints(workdir / "checkpoints")
    try:
        return checkpoints.latest
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_served_judges_train_the_adapter_that_the_one_in_process_does(
    runner, whole, servers, judge_token, tmp_path, caplog
):
    """Though one of them dies in the middle, and whatever is asked again is asked elsewhere."""
    caplog.set_level("INFO", "sl_jax")
    servers[1].judge.dies_after = 12  # of about 25: before the last metrics, whoever was quicker
    workdir = tmp_path / "run"
    runner(workdir, servers)
    _assert_same(workdir, whole)
    records = read_records(workdir / "judge")
    assert len(records) == EPOCHS * 4
    assert len(list((workdir / "judge").glob("*.png"))) == EPOCHS * 2
    names = {f"127.0.0.1:{served.port}" for served in servers}
    assert {name for record in records for name in record.scores.endpoints} == names
    metrics = list(read_metrics(workdir))[-1]
    assert metrics["judge/valid_share"] == 1
    assert "cools down" in caplog.text  # and is tried again: it may count as up at the end
    assert metrics[f"pool/127.0.0.1_{servers[1].port}/errors"] > 0
    # The last metrics are older than the last evaluation, whose pictures are asked about after.
    after = SETTINGS["evaluation.pictures"] * 3
    assert metrics["pool/requests"] >= _asked(servers).total() - after
    # What comes before weights, and what it says.
    said = [record.getMessage() for record in caplog.records]
    assert sum("ready (JSON by schema)" in text for text in said) == 2
    assert any("judging takes about" in text for text in said)
    assert any("config.evaluation.judge names another" in text for text in said)
    for path in workdir.rglob("*"):
        if path.is_file():
            assert judge_token.encode() not in path.read_bytes(), path
    assert judge_token not in "".join(said)


@pytest.mark.slow
def test_a_spent_budget_stops_with_a_checkpoint_and_asks_nothing_twice(
    runner, whole, servers, tmp_path
):
    workdir = tmp_path / "run"
    before = 4 + 3 + 2 + 20 + 7  # preflight, evaluation, sampler gap, an epoch, part of another
    with pytest.raises(BudgetError, match=f"max_requests = {before}"):
        runner(workdir, servers, judge__max_requests=before)
    assert _latest(workdir) == 1
    spent = _asked(servers).total()  # of what was in flight at the end, not all arrived
    assert before - 3 <= spent <= before
    with pytest.raises(BudgetError):  # it holds over restarts
        runner(workdir, servers, judge__max_requests=before)
    assert _asked(servers).total() == spent
    runner(workdir, servers, judge__max_requests=1000, judge__preflight=False)
    _assert_same(workdir, whole)
    twice = {digest: n for digest, n in _asked(servers).items() if n > 1}
    assert len(twice) <= 2  # the preflight's two requests, at each of two servers


@pytest.mark.slow
def test_when_nobody_answers_it_waits_and_stops_with_a_checkpoint(
    runner, whole, servers, tmp_path, caplog
):
    workdir = tmp_path / "run"
    for served in servers:
        served.judge.dies_after = 18  # in the second epoch
    started = time.monotonic()
    with pytest.raises(JudgeUnavailableError, match=r"max_wait|after waiting"):
        runner(workdir, servers, judge__max_wait=3.0)
    assert time.monotonic() - started > 3
    assert "Waiting for the judge" in caplog.text and "127.0.0.1" in caplog.text
    told = read_status(workdir)
    assert told.state == "stopped" and told.reason.startswith("JudgeUnavailableError: ")
    assert told.judge["up"] == 2 and told.last_checkpoint == 1  # as the first epoch left them
    assert _latest(workdir) == 1
    for served in servers:
        served.thread.join(10)
        served.start()
    runner(workdir, servers)
    _assert_same(workdir, whole)


def _nothing_was_loaded(workdir):
    assert not (workdir / "prompts").exists() and not (workdir / "config.json").exists()


@pytest.mark.slow
def test_a_missing_key_and_a_wrong_model_show_before_weights_load(
    runner, servers, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    with pytest.raises(PreflightError, match=r"lists embedded-precise, not gpt"):
        runner(workdir, servers, judge__model="gpt")
    _nothing_was_loaded(workdir)
    monkeypatch.setenv("TEST_JUDGE_TOKEN", "wrong-token")
    with pytest.raises(PreflightError, match=r"HTTP 401") as caught:
        runner(workdir, servers)
    assert "wrong-token" not in str(caught.value)
    monkeypatch.delenv("TEST_JUDGE_TOKEN")
    with pytest.raises(KeyMissingError, match="TEST_JUDGE_TOKEN"):
        runner(workdir, servers)
    _nothing_was_loaded(workdir)
    assert not _asked(servers)


@pytest.mark.slow
def test_captions_come_from_the_pool_once(runner, servers, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(PreflightError, match=r"config\.data\.caption.*describes no pictures"):
        runner(workdir, servers, data__caption="vlm")
    with pytest.raises(CaptionError, match="no caption could be had"):
        runner(workdir, servers, data__caption="vlm", judge__preflight=False)
    _nothing_was_loaded(workdir)
    for served in servers:
        served.judge.captions = {}
        served.judge.asked.clear()
    runner(workdir, servers, data__caption="vlm", epochs=1)
    captions = servers[0].judge.captions | servers[1].judge.captions
    assert len(captions) == 17  # and the preflight's
    # The policy, the judge and the records know them.
    assert {record.caption for record in read_records(workdir / "judge")} <= {*captions.values()}
    assert len(list((workdir / "prompts").iterdir())) >= len({*captions.values()})
    runner(workdir, servers, data__caption="vlm", epochs=2)
    counts = sorted(_asked(servers)[digest] for digest in captions)
    assert counts == [1] * 16 + [4]  # the preflight's: of each server, of each run

"""A work directory belongs to one configuration."""

import dataclasses
import errno
import json
import pathlib
from contextlib import nullcontext

import pytest
from etils import epath

from sl_jax.grpo.config import DataConfig, GrpoConfig
from sl_jax.grpo.identity import IDENTITY
from sl_jax.parallel.joining import DistributedConfig
from sl_jax.scoring.endpoint_config import EndpointConfig
from sl_jax.training import workdir
from sl_jax.training.configuration import ConfigError
from sl_jax.training.metrics import MetricsWriter
from sl_jax.training.status import StatusFile


def _config(folder, **changes):
    config = GrpoConfig(str(folder / "run"), "tiny", 3, data=DataConfig(path="pictures"))
    return dataclasses.replace(config, **changes)


def _nested(config, part, **changes):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


def test_the_same_configuration_comes_back(tmp_path):
    config = _config(tmp_path)
    folder = workdir.claim(config, IDENTITY)
    workdir.record(config)
    before = (folder / "config.json").read_bytes()
    assert workdir.claim(config, IDENTITY) == folder
    workdir.record(config)
    assert (folder / "config.json").read_bytes() == before
    assert json.loads(before)["epochs"] == 3


def test_another_configuration_is_refused_and_overwrites_nothing(tmp_path):
    config = _config(tmp_path)
    folder = workdir.claim(config, IDENTITY)
    workdir.record(config)
    before = (folder / "config.json").read_bytes()
    other = _nested(_nested(config, "rollout", group_size=6), "lora", rank=3)
    with pytest.raises(ConfigError) as error:
        workdir.claim(dataclasses.replace(other, seed=5), IDENTITY)
    message = str(error.value)
    assert "config.rollout.group_size: 8 there, 6 here" in message
    assert "config.lora.rank: 64 there, 3 here" in message
    assert "config.seed: 0 there, 5 here" in message
    assert len(message.splitlines()) == 4
    assert "please choose another config.workdir" in message
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("evaluation", {"every": 3, "steps": 7}),
        ("checkpoint", {"every": 1}),
        ("mesh", {"fsdp": 1, "data": -1}),
        ("learner", {"micro_batch": 4}),
        ("judge", {"concurrency": 2, "max_wait": 5.0}),
        ("judge", {"max_requests": 9, "key_env": "KEY", "cache": False, "hedge_after": 2.0}),
        ("compute", {"remat": "none"}),
    ],
)
def test_a_run_may_be_moved_and_watched_differently(tmp_path, part, changes):
    config = _config(tmp_path)
    workdir.claim(config, IDENTITY)
    workdir.record(config)
    workdir.claim(dataclasses.replace(_nested(config, part, **changes), epochs=9), IDENTITY)


def test_servers_may_come_and_go_but_not_the_models_that_judge(tmp_path):
    def with_servers(*servers):
        return _nested(_config(tmp_path), "judge", endpoints=tuple(servers))

    config = with_servers(EndpointConfig("http://a/v1", "m"), EndpointConfig("http://b/v1", "m"))
    workdir.claim(config, IDENTITY)
    workdir.record(config)
    workdir.claim(with_servers(EndpointConfig("http://c/v1", "m", "KEY", 3)), IDENTITY)
    for other in (with_servers(EndpointConfig("http://a/v1", "n")), _config(tmp_path)):
        with pytest.raises(ConfigError, match=r"config\.judge\.endpoints\.model: \['m'\] there"):
            workdir.claim(other, IDENTITY)


def test_neighbours_of_free_fields_are_not_free(tmp_path):
    config = _config(tmp_path)
    workdir.claim(config, IDENTITY)
    workdir.record(config)
    for part, changes in (("learner", {"ema": 0.5}), ("compute", {"dtype": "float32"})):
        with pytest.raises(ConfigError, match=rf"config\.{part}\."):
            workdir.claim(_nested(config, part, **changes), IDENTITY)


def test_a_start_that_failed_has_claimed_nothing(tmp_path):
    """Between `claim` and `record` lies everything that may turn out not to work."""
    workdir.claim(_config(tmp_path), IDENTITY)
    workdir.claim(_config(tmp_path, seed=8, data=DataConfig(path="other pictures")), IDENTITY)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_found_before_a_model_is_loaded(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as error:
        workdir.claim(
            dataclasses.replace(_config(tmp_path), workdir=str(tmp_path / place)), IDENTITY
        )
    assert error.value.filename == str(tmp_path / place)


@pytest.mark.parametrize(
    ("write", "refuses"),
    [
        (lambda folder: workdir.record(GrpoConfig(str(folder), "tiny", 3)), True),
        (lambda folder: MetricsWriter(folder, 0), True),
        (lambda folder: StatusFile(folder, 3).close("stopped"), False),  # ends no run
    ],
    ids=["config.json", "metrics.jsonl", "status.json"],
)
def test_what_a_full_disk_takes_half_of_leaves_nothing(tmp_path, monkeypatch, write, refuses):
    folder = epath.Path(tmp_path)
    write(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(path, content):
        pathlib.Path(path).write_bytes(content[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(folder), "write_bytes", half)
    with pytest.raises(OSError, match="No space") if refuses else nullcontext():
        write(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damaged", ["half", "null", "[]", "3", "[" * 200_000, "{}\udcff"])
def test_a_damaged_record_is_no_licence(tmp_path, damaged):
    config = _config(tmp_path)
    folder = workdir.claim(config, IDENTITY)
    workdir.record(config)
    whole = (folder / "config.json").read_text()
    left = whole[: len(whole) // 2] if damaged == "half" else damaged
    (folder / "config.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        workdir.claim(config, IDENTITY)


@pytest.mark.parametrize("entry", [3, {}, {"model": 3}, {"model": []}])
def test_a_record_of_what_no_server_is_differs(tmp_path, entry):
    config = _config(tmp_path)
    folder = workdir.claim(config, IDENTITY)
    (folder / "config.json").write_text(json.dumps({"judge": {"endpoints": ["a", entry]}}))
    with pytest.raises(ConfigError, match=r"config\.judge\.endpoints: \['a', .*\] there"):
        workdir.claim(config, IDENTITY)


class Others:
    """Stands for processes; the others have configurations of their own."""

    index, count, is_main = 0, 3, True

    def __init__(self, *configs):
        self.configs = configs

    def all_gather(self, what, value):
        return [value, *(json.dumps(dataclasses.asdict(config)) for config in self.configs)]


def test_processes_may_have_judges_of_their_own(tmp_path):
    config = _nested(
        _config(tmp_path),
        "judge",
        endpoints=(EndpointConfig("http://a/v1", "m"),),
        cache_path="/tmp/a.sqlite3",
    )
    other = _nested(
        config,
        "judge",
        endpoints=(EndpointConfig("http://b/v1", "m"), EndpointConfig("http://c/v1", "m")),
        cache_path="/tmp/b.sqlite3",
        concurrency=2,
        tries=9,
    )
    distributed = DistributedConfig("auto", "host:1", 3, 1)
    workdir.agree(
        config, IDENTITY, Others(config, dataclasses.replace(other, distributed=distributed))
    )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "judge",
            {"max_wait": 1.0},
            "config.judge.max_wait: 3600.0 in process 0, 1.0 in",
        ),
        ("judge", {"min_valid": 0.1}, "config.judge.min_valid: 0.5 in process 0"),
        ("judge", {"endpoint": "embedded-vlm"}, "'embedded-vlm' in process 2"),
        ("mesh", {"tensor": 2}, "config.mesh.tensor: 1 in process 0, 2 in process 2"),
        ("learner", {"micro_batch": 4}, "config.learner.micro_batch: None in process 0, 4 in"),
        ("evaluation", {"every": 3}, "config.evaluation.every: 10 in process 0, 3 in"),
    ],
)
def test_processes_have_one_configuration(tmp_path, part, changes, message):
    config = _config(tmp_path)
    other = _nested(config, part, **changes)
    with pytest.raises(ConfigError, match="start all with the same fields") as error:
        workdir.agree(config, IDENTITY, Others(config, other))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 2
    with pytest.raises(ConfigError):
        workdir.claim(config, IDENTITY, Others(other, config))
    assert not (tmp_path / "run").exists()

"""What the command is told: protocols, samplers, names, shards, judges, data."""

import numpy as np
import pytest

from sl_jax import imaging
from sl_jax.data import FolderError
from sl_jax.data.procedural import make_design
from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.options import (
    PROTOCOLS,
    EvaluationError,
    SamplerChoice,
    Shard,
    allowed_protocols,
    check_apart,
    parse_named,
    parse_protocols,
    parse_samplers,
    parse_shard,
)
from sl_jax.eval.samples import open_data, own_side


def test_protocols():
    assert parse_protocols("") == ()
    assert parse_protocols("judge, layerd") == ("layerd", "judge")
    with pytest.raises(EvaluationError, match="'layrd' is unknown; did you mean layerd"):
        parse_protocols("layrd")
    everything = {"references": True, "judge": True, "others": True}
    assert allowed_protocols((), **everything) == PROTOCOLS
    assert allowed_protocols((), **everything | {"references": False, "judge": False}) == (
        "reference_free",
    )
    for lacking, name in (
        ("references", "stable_layers"),
        ("judge", "win_rate"),
        ("others", "win_rate"),
    ):
        with pytest.raises(EvaluationError, match=f"protocol {name} needs"):
            allowed_protocols((name,), **everything | {lacking: False})


def test_samplers():
    assert parse_samplers("heun", 50) == (SamplerChoice("heun", 50),)
    assert list(map(str, parse_samplers("heun:50,euler:20,heun:50", 9))) == ["heun 50", "euler 20"]
    for wrong in ("rk4", "heun:0", "euler:many", ""):
        with pytest.raises(EvaluationError, match="sampler"):
            parse_samplers(wrong, 50)


def test_names():
    named = parse_named(["runs/second/adapter", "tuned=/a=b/c", "org/lora", "a/b.safetensors"])
    assert [tuple(entry) for entry in named] == [
        ("second", "runs/second/adapter"),
        ("tuned", "/a=b/c"),
        ("lora", "org/lora"),
        ("b", "a/b.safetensors"),
    ]
    assert parse_named(["/runs/x=1/adapter"])[0].name == "x=1"
    assert parse_named(["runs/a/checkpoints/12"])[0].name == "a"
    with pytest.raises(EvaluationError, match="two systems are called 'base'"):
        parse_named(["base=x"], taken=["base"])
    for wrong in ("=x", "..=x", ".hidden=x", ".hidden", ".."):
        with pytest.raises(EvaluationError, match="names no system; please name it, as in tuned="):
            parse_named([wrong])


def test_output_lies_apart_from_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for wrong in ("data", "data/out", "other/../data/x"):
        with pytest.raises(EvaluationError, match="lies in data, which is read"):
            check_apart(wrong, ["procedural:B:4", "data"])
    with pytest.raises(EvaluationError, match="output is ''"):
        check_apart("", [])
    check_apart("data2", ["data", "data/*.png", "crello", "gs://bucket/data", "not_there"])


def test_shards():
    assert (parse_shard(""), parse_shard("2/8")) == (Shard(0, 1), Shard(2, 8))
    for wrong in ("8/8", "1", "a/b", "-1/2"):
        with pytest.raises(EvaluationError, match="shard"):
            parse_shard(wrong)


def test_judges():
    assert JudgeChoice(("embedded",)).name == "embedded"
    urls = ("http://one:8000/v1", "http://two:8000/v1")
    several = JudgeChoice(urls, "vlm", concurrency=5)
    assert [server.concurrency for server in several.servers()] == [3, 3]
    assert several.name == JudgeChoice(urls[:1], "vlm").name  # servers may come and go
    for wrong in ((), ("embedded", "http://a/v1"), ("http://a/v1",), ("embeded",)):
        with pytest.raises(EvaluationError, match="judge"):
            JudgeChoice(wrong)


def test_procedural_designs():
    data = open_data("procedural:B:3:2,4:32:7")
    assert [p.name for p in data.pictures] == ["B-000007", "B-000008", "B-000009"]
    assert [p.layers for p in data.pictures] == [2, 4, 2] and data.layer_counts == (2, 4)
    sample = data.pictures[1].open()
    np.testing.assert_array_equal(sample.reference, make_design("B", 8, 32, 4).layers)
    np.testing.assert_array_equal(sample.source, imaging.recompose(sample.reference))
    assert own_side("procedural:B:3:2:48") == 48 and own_side("folder") is None
    smaller = open_data("procedural:B:3:2,4:32:7", side=16, limit=2)
    assert len(smaller.pictures) == 2 and smaller.pictures[0].open().source.shape == (16, 16, 3)
    assert smaller.pictures[0].digest != data.pictures[0].digest


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("procedural", "families are"),
        ("procedural:Q:4", "families are"),
        ("procedural:A:0", "COUNT"),
        ("procedural:A:four", "four"),
        ("procedural:A:4:9", "LAYERS"),
        ("procedural:A:4:3:8", "SIZE"),
        ("procedural:A:4:3:64:-1", "FIRST"),
        ("procedural:A:4:3:64:0:0", "procedural:FAMILY"),
    ],
)
def test_wrong_procedural_designs(where, told):
    with pytest.raises(EvaluationError, match=told):
        open_data(where)


def test_no_data(tmp_path):
    with pytest.raises(FolderError, match="no picture"):
        open_data(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(FolderError, match="no usable picture"):
        open_data(str(tmp_path))

"""Evaluations without a model: designs, layers that others made, judges, restarts, bad input."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sl_jax import imaging
from sl_jax.data import write_designs
from sl_jax.data.canvas import merge_to
from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.options import EvaluationError, Named, Shard
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.stable_layers import layer_l1
from sl_jax.eval.stacks import read_stack, write_stack
from sl_jax.eval.systems import System
from sl_jax.scoring import EmbeddedJudge, PermanentJudgeError

COUNT = 4


@pytest.fixture(scope="module")
def designs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("designs")
    write_designs(folder, "B", range(COUNT), 32, (2, 3), with_layers=True)
    return folder


@pytest.fixture(scope="module")
def worse(designs, tmp_path_factory) -> Path:
    """Layers of another system: everything in the background."""
    folder = tmp_path_factory.mktemp("worse")
    for design in designs.iterdir():
        layers = read_stack(design)
        made = BASELINES["all in background"](imaging.recompose(layers), len(layers))
        write_stack(folder / design.name, made)
    return folder


def config(designs: Path, output: Path, **changes) -> EvaluationConfig:
    settings = {
        "layers": (Named("truth", str(designs)),),
        "protocols": ("stable_layers", "reference_free"),
        "shown": 2,
    }
    return EvaluationConfig(str(designs), str(output), **(settings | changes))


def written(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def table(output: Path, title: str) -> list[dict]:
    return next(t["rows"] for t in written(output)["tables"] if t["title"] == title)


def records(output: Path) -> dict[tuple[str, str], dict]:
    with (output / "records.csv").open() as file:
        return {(row["model"], row["picture"]): row for row in csv.DictReader(file)}


class Counted:
    """A model whose layers are the source in the background, and which counts what it makes."""

    def __init__(self, fail_after: int | None = None):
        self.made: list[str] = []
        self.fail_after = fail_after

    def system(self, name: str = "model", **settings) -> System:
        def make(tasks):
            stacks = []
            for task in tasks:
                if len(self.made) == self.fail_after:
                    raise KeyboardInterrupt
                self.made.append(task.picture.name)
                stacks.append(BASELINES["all in background"](task.sample.source, task.layers))
            return stacks

        return System(name, "model", settings, make)


def test_every_protocol_with_baselines_in_every_table(designs, worse, tmp_path):
    outcome = evaluate(
        config(
            designs,
            tmp_path,
            layers=(Named("worse", str(worse)), Named("truth", str(designs))),
            protocols=(),
            judge=JudgeChoice(("embedded",), concurrency=2),
        )
    )
    assert outcome.left_out == ()
    systems = ["worse", "truth", *BASELINES]
    titles = [t["title"] for t in written(tmp_path)["tables"]]
    assert titles == [
        "Per-layer L1",
        "LayerD",
        "Without a reference",
        "Judge",
        "Win rate against worse",
        "Difference from worse, reference-based",
        "Difference from worse, without a reference",
    ]
    for title in titles[:4]:
        assert list(dict.fromkeys(row["Model"] for row in table(tmp_path, title))) == systems
    for title in titles[4:]:
        assert [row["Model"] for row in table(tmp_path, title)] == systems[1:]
        assert {row["Pictures"] for row in table(tmp_path, title)} == {COUNT}
    wins = {row["Model"]: row["Win rate"] for row in table(tmp_path, titles[4])}
    assert wins["truth"]["mean"] == 1.0  # in both orders
    assert wins["all in background"]["mean"] == 0.5  # a tie, in both orders
    judged = {row["Model"]: row for row in table(tmp_path, "Judge")}
    assert judged["truth"]["Judge score"]["mean"] > judged["worse"]["Judge score"]["mean"]
    assert judged["truth"]["Background inpainting"]["count"] == COUNT
    for name in ("truth", "worse"):
        assert name in outcome.text
    found = records(tmp_path)
    for name in (path.name for path in designs.iterdir()):
        true, made = read_stack(designs / name), read_stack(worse / name)
        wanted = layer_l1(made, true)
        assert float(found["worse", name]["layer_l1_mean"]) == pytest.approx(wanted.mean)
        assert float(found["truth", name]["layer_l1_mean"]) == 0.0
        assert (
            found["all in background", name]["layer_l1_mean"]
            == found["worse", name]["layer_l1_mean"]
        )
    page = (tmp_path / "report.html").read_text()
    assert page.count('<article class="card picture') == 2 and "true layers" in page
    assert "data-improvement" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_restart_makes_only_what_is_missing(designs, tmp_path):
    stopped = Counted(fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(designs, tmp_path), [stopped.system()])
    assert not (tmp_path / "report.html").exists()
    again = Counted()
    evaluate(config(designs, tmp_path), [again.system()])
    assert sorted(stopped.made + again.made) == sorted(p.name for p in designs.iterdir())
    third = Counted()
    # A further protocol is run on the layers that were kept, a further system on its own.
    outcome = evaluate(
        config(designs, tmp_path, protocols=("layerd", "stable_layers")),
        [third.system(), Counted().system("another")],
    )
    assert third.made == [] and outcome.left_out == ()
    assert {row["Pictures"] for row in table(tmp_path, "LayerD")} == {COUNT}
    assert "another" in {row["Model"] for row in table(tmp_path, "LayerD")}
    assert list(tmp_path.rglob("*.partial")) == []


def test_layers_that_change_are_measured_again(designs, worse, tmp_path):
    made = tmp_path / "made"
    _copy(worse, made)
    judge = JudgeChoice(("embedded",))
    systems = (Named("made", str(made)), Named("truth", str(designs)))
    settings = config(
        designs, tmp_path / "out", layers=systems, protocols=("win_rate",), judge=judge, limit=1
    )

    def wins(settings: EvaluationConfig) -> dict[str, float]:
        evaluate(settings)
        title = f"Win rate against {settings.base or 'made'}"
        rows = table(tmp_path / "out", title)
        return {row["Model"]: row["Win rate"]["mean"] for row in rows}

    assert wins(settings)["truth"] == 1.0
    assert wins(replace(settings, base="truth"))["made"] == 0.0
    first = sorted(designs.iterdir())[0]
    write_stack(made / first.name, read_stack(first))
    assert wins(settings)["truth"] == 0.5
    assert wins(replace(settings, base="truth"))["made"] == 0.5


def test_a_damaged_record_is_made_again(designs, tmp_path, caplog):
    evaluate(config(designs, tmp_path), [Counted().system()])
    path = sorted((tmp_path / "results" / "model").iterdir())[1]
    before = path.read_text()
    path.write_text(before[: len(before) // 2])
    again = Counted()
    evaluate(config(designs, tmp_path), [again.system()])
    assert again.made == [path.stem] and path.read_text() == before


def test_a_change_of_settings_is_refused_by_field(designs, tmp_path):
    first = config(designs, tmp_path, judge=JudgeChoice(("embedded",)))
    evaluate(first, [Counted().system(sampler="heun", steps=50)])
    counted = Counted()
    changed = config(designs, tmp_path, num_layers=2, judge=JudgeChoice(("embedded-vlm",)))
    with pytest.raises(EvaluationError) as told:
        evaluate(changed, [counted.system(sampler="euler", steps=50)])
    lines = str(told.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "num_layers",
        "judge",
        "model",
    ]
    assert "model: sampler: 'heun' there, 'euler' here" in lines[-1]
    with pytest.raises(EvaluationError, match="data: picture 0 is another one"):
        evaluate(config(designs, tmp_path, size=16), [])
    assert counted.made == []


def test_more_pictures_may_follow(designs, tmp_path):
    first, second = Counted(), Counted()
    evaluate(config(designs, tmp_path, limit=2), [first.system()])
    assert table(tmp_path, "Without a reference")[0]["Pictures"] == 2
    evaluate(config(designs, tmp_path), [second.system()])
    assert (len(first.made), len(second.made)) == (2, 2)
    assert table(tmp_path, "Without a reference")[0]["Pictures"] == COUNT


def test_shards_share_the_pictures(designs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(config(designs, whole), [Counted().system()])
    counted = [Counted() for _ in range(3)]
    for part in range(3):
        told = evaluate(config(designs, parts, shard=Shard(part, 3)), [counted[part].system()])
        assert f"Shard {part}/3 is finished" in told.text
    assert [len(c.made) for c in counted] == [2, 1, 1]
    assert not (parts / "report.html").exists()
    last = Counted()
    evaluate(config(designs, parts), [last.system()])
    assert last.made == [] and records(parts) == records(whole)


def _copy(designs: Path, folder: Path) -> list[Path]:
    for design in sorted(designs.iterdir()):
        write_stack(folder / design.name, read_stack(design))
    return sorted(folder.iterdir())


def test_bad_layers_are_named_and_counted(designs, tmp_path):
    first, second, third, fourth = _copy(designs, tmp_path / "made")
    (first / "0000.png").unlink()
    layer = second / "0001.png"
    Image.open(layer).convert("RGB").save(layer)
    Image.open(third / "0001.png").resize((48, 32)).save(third / "0001.png")
    output = tmp_path / "out"
    made = (Named("truth", str(designs)), Named("bad", str(tmp_path / "made")))
    outcome = evaluate(config(designs, output, layers=made))
    assert {entry.system for entry in outcome.left_out} == {"bad"}
    reasons = {entry.picture: entry.reason for entry in outcome.left_out}
    assert "0000.png is missing" in reasons[first.name]
    assert "0001.png has no alpha" in reasons[second.name]
    assert "0001.png is 48×32" in reasons[third.name]
    assert fourth.name not in reasons
    rows = {row["Model"]: row for row in table(output, "Without a reference")}
    assert (rows["truth"]["Pictures"], rows["bad"]["Pictures"]) == (COUNT, 1)
    assert len(table(output, "Left out")) == 3
    # What was missing and then comes is measured by the same command.
    write_stack(first, read_stack(designs / first.name))
    evaluate(config(designs, output, layers=made))
    rows = {row["Model"]: row for row in table(output, "Without a reference")}
    assert rows["bad"]["Pictures"] == 2


def test_bad_designs_are_named_and_counted(designs, tmp_path):
    first, second, third, _ = _copy(designs, tmp_path / "data")
    layer = first / "0001.png"
    Image.open(layer).convert("RGB").save(layer)
    content = (second / "0000.png").read_bytes()
    (second / "0000.png").write_bytes(content[: len(content) // 2])
    Image.open(third / "0001.png").resize((48, 32)).save(third / "0001.png")
    output = tmp_path / "out"
    outcome = evaluate(config(tmp_path / "data", output, layers=(Named("truth", str(designs)),)))
    assert {(e.system, e.picture) for e in outcome.left_out} == {
        ("data", path.name) for path in (first, second, third)
    }
    assert {row["Pictures"] for row in table(output, "Without a reference")} == {1}
    assert written(output)["facts"][0]["note"] == "3 more were skipped"


def test_more_true_layers_than_asked_for_are_merged(tmp_path):
    write_designs(tmp_path / "data", "B", range(3), 32, (2, 4), with_layers=True)
    settings = {"layers": (Named("truth", str(tmp_path / "data")),)}
    evaluate(config(tmp_path / "data", tmp_path / "two", **settings, max_layers=2))
    evaluate(config(tmp_path / "data", tmp_path / "all", **settings))
    four = sorted((tmp_path / "data").iterdir())[1]
    merged = merge_to(read_stack(four), 2)
    wanted = layer_l1(BASELINES["copies"](imaging.recompose(merged), 2), merged)
    found = records(tmp_path / "two")
    assert {row["layers"] for row in found.values()} == {"2"}
    assert float(found["copies", four.name]["layer_l1_mean"]) == pytest.approx(wanted.mean)
    assert written(tmp_path / "two")["details"]["true layers"] == "merged to 2 in 1 of 3 designs"
    assert (
        "more than 2 true layers had neighbours merged to so many: 1 of 3."
        in written(tmp_path / "two")["summary"]
    )
    assert {row["layers"] for row in records(tmp_path / "all").values()} == {"2", "4"}
    assert "true layers" not in written(tmp_path / "all")["details"]
    with pytest.raises(EvaluationError, match="data: picture 1 is another one"):
        evaluate(config(tmp_path / "data", tmp_path / "two", **settings))


def test_layers_of_another_size_are_scaled_in_proportion_only(tmp_path):
    layers = np.zeros((2, 64, 96, 4), np.uint8)
    layers[0] = (250, 200, 10, 255)
    layers[1, 16:48, 16:48] = (0, 0, 255, 255)
    write_stack(tmp_path / "data" / "one", layers)
    write_stack(tmp_path / "large" / "one", layers.repeat(2, 1).repeat(2, 2))
    write_stack(tmp_path / "square" / "one", layers[:, :, :64])
    made = tuple(Named(name, str(tmp_path / name)) for name in ("data", "large", "square"))
    outcome = evaluate(config(tmp_path / "data", tmp_path / "out", layers=made, size=48))
    assert [entry.system for entry in outcome.left_out] == ["square"]
    assert "its layers are 64×64, and the picture is 96×64" in outcome.left_out[0].reason
    rows = {row["Model"]: row for row in table(tmp_path / "out", "Per-layer L1")}
    assert rows["data"]["Mean L1"]["mean"] == 0.0
    assert rows["large"]["Mean L1"]["mean"] < 0.01


def test_a_judge_that_refuses_is_asked_again(designs, tmp_path, monkeypatch):
    judged = config(designs, tmp_path, protocols=("judge",), judge=JudgeChoice(("embedded",)))
    answer, refused = EmbeddedJudge.answer, []

    async def refuses(self, request):
        if not refused or request.digest() in refused:
            refused.append(request.digest())
            raise PermanentJudgeError("I do not look at this")
        return await answer(self, request)

    monkeypatch.setattr(EmbeddedJudge, "answer", refuses)
    outcome = evaluate(judged)
    assert [entry.reason for entry in outcome.left_out] == ["judge: I do not look at this"]
    counts = [row["Judge score"]["count"] for row in table(tmp_path, "Judge")]
    assert sorted(counts) == [COUNT - 1, COUNT, COUNT, COUNT]
    monkeypatch.setattr(EmbeddedJudge, "answer", answer)
    assert evaluate(judged).left_out == ()
    assert {row["Judge score"]["count"] for row in table(tmp_path, "Judge")} == {COUNT}


def test_pictures_without_layers(designs, tmp_path):
    (tmp_path / "pictures").mkdir()
    for design in sorted(designs.iterdir()):
        picture = Image.fromarray(imaging.recompose(read_stack(design)))
        picture.save(tmp_path / "pictures" / f"{design.name}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    output = tmp_path / "out"
    truth = (Named("truth", str(designs)),)
    pictures = tmp_path / "pictures"
    outcome = evaluate(config(pictures, output, layers=truth, protocols=(), num_layers=3))
    assert [(e.system, e.picture) for e in outcome.left_out] == [("data", "broken.png")]
    assert next(t["title"] for t in written(output)["tables"]) == "Without a reference"
    found = records(output)
    assert {row["layers"] for row in found.values()} == {"3"}
    assert float(found["truth", "B-000000"]["psnr"]) > 50
    with pytest.raises(EvaluationError, match="protocol layerd needs true layers"):
        evaluate(config(pictures, output, protocols=("layerd",)))


def test_what_cannot_be_done_is_said(designs, tmp_path):
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        evaluate(config(designs, tmp_path, layers=()))
    with pytest.raises(EvaluationError, match="pass --model"):
        config(designs, tmp_path, adapters=(Named("a", "b"),))
    for size in (8, 100_000):
        with pytest.raises(EvaluationError, match=f"size is {size}; please use 16 to 8192"):
            config(designs, tmp_path, size=size)
    with pytest.raises(EvaluationError, match="which is read"):
        config(designs, designs / "out")
    with pytest.raises(EvaluationError, match="protocol judge needs a judge"):
        evaluate(config(designs, tmp_path, protocols=("judge",)))
    with pytest.raises(EvaluationError, match="is none of the systems"):
        evaluate(config(designs, tmp_path, base="nobody"))
    with pytest.raises(EvaluationError, match="two systems are called 'truth'"):
        evaluate(config(designs, tmp_path), [Counted().system("truth")])
    missing = config(designs, tmp_path, layers=(Named("gone", str(tmp_path / "no")),))
    outcome = evaluate(missing)
    assert len(outcome.left_out) == COUNT
    assert not any((tmp_path / "results" / "gone").glob("*"))
    models = [row["Model"] for row in table(tmp_path, "Without a reference")]
    assert models == list(BASELINES)  # and nothing is compared with a base that is not there

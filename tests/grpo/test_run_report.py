"""The report of a run: what it says of before and after."""

from dataclasses import fields

import numpy as np
import pytest

from sl_jax.data import make_buckets
from sl_jax.data.loader import Example
from sl_jax.eval.reference_free import ReferenceFree, reference_free
from sl_jax.eval.report import write_html
from sl_jax.grpo.config import DataConfig, EvaluationConfig, GrpoConfig
from sl_jax.grpo.evaluation import Evaluated, evaluation_metrics, strip
from sl_jax.grpo.metrics import warn_of_divergence
from sl_jax.grpo.report import run_report
from sl_jax.training.metrics import MetricsWriter


def _evaluated(slot, reward):
    rng = np.random.default_rng(slot)
    (bucket,) = make_buckets([(16, 16)])
    picture = rng.integers(0, 256, (16, 16, 3), np.uint8)
    example = Example(picture, "", f"{slot}.png", f"id{slot}", 2, bucket, 0, slot)
    layers = rng.integers(0, 256, (2, 16, 16, 4), np.uint8)
    return Evaluated(example, layers, reward, np.full(5, reward), reference_free(layers, picture))


@pytest.fixture
def workdir(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, results in ((0, [0.2, 0.4]), (2, [0.5, 0.7])):
        writer.scalars(step, evaluation_metrics([_evaluated(i, r) for i, r in enumerate(results)]))
        writer.scalars(step, {"judge/reward_mean": 0.1 * step, "learner/kl_old/all": float("nan")})
    writer.close()
    return tmp_path


def _config(shown=1):
    evaluation = EvaluationConfig(shown=shown)
    return GrpoConfig("run", "tiny", 2, data=DataConfig(path="pics"), evaluation=evaluation)


def test_it_compares_before_and_after(workdir):
    before = [_evaluated(i, r) for i, r in enumerate([0.2, 0.4, 0.3])]
    after = [_evaluated(i, r) for i, r in enumerate([0.5, 0.7, 0.6])]
    report = run_report(_config(), workdir, before, after)
    facts = {fact.label: fact for fact in report.facts}
    assert facts["held-out reward before"].value == "0.3000"
    assert facts["held-out reward after"].value == "0.6000"
    assert facts["difference"].value == "+0.3000" and facts["difference"].tone == "good"
    assert [picture.name for picture in report.pictures] == ["0.png"]
    assert report.pictures[0].improvement == pytest.approx(0.3)
    assert [d.model for d in report.pictures[0].decompositions] == ["before", "after"]
    curves = {curve.title: curve for curve in report.curves}
    reward = curves["Held-out reward (stage 1)"].series[0]
    assert list(reward.x) == [0, 2] and reward.y == pytest.approx((0.3, 0.6))
    assert "KL from the epoch's policy" not in curves  # never measured
    write_html(report, workdir / "report.html")
    assert "0.6000" in (workdir / "report.html").read_text()


def test_a_loss_is_called_one(workdir):
    before = [_evaluated(i, 0.8) for i in range(4)]
    after = [_evaluated(i, 0.2 + 0.01 * i) for i in range(4)]
    report = run_report(_config(), workdir, before, after)
    assert next(f for f in report.facts if f.label == "difference").tone == "bad"


def test_pictures_that_vanished_meanwhile_are_left_out(workdir):
    before = [_evaluated(i, 0.2) for i in range(3)]
    after = [_evaluated(i, 0.5) for i in (0, 2)]
    report = run_report(_config(shown=8), workdir, before, after)
    assert [picture.name for picture in report.pictures] == ["0.png", "2.png"]
    assert report.tables[0].title == "Stage-1 score of 2 held-out pictures"


def test_the_table_counts_the_pictures_that_have_a_score(workdir):
    before = [_evaluated(i, r) for i, r in enumerate([0.2, 0.4, 0.3])]
    after = [_evaluated(i, r) for i, r in enumerate([0.2, np.nan, 0.3])]
    (table,) = run_report(_config(), workdir, before, after).tables
    assert table.columns[-1].name == "pictures"
    assert [row[-1] for row in table.rows] == [3, 2]


def test_pictures_without_a_score_are_no_number():
    results = [_evaluated(0, 0.4), _evaluated(1, np.nan)]
    metrics = evaluation_metrics(results)
    assert metrics["evaluation/reward"] == pytest.approx(0.4)
    assert metrics["evaluation/validity"] == pytest.approx(0.4)


def test_all_measures_without_reference_are_metrics():
    results = [_evaluated(0, 0.4), _evaluated(1, 0.5)]
    metrics = evaluation_metrics(results)
    for field in fields(ReferenceFree):
        wanted = np.mean([getattr(r.measures, field.name) for r in results])
        assert metrics[f"evaluation/{field.name}"] == pytest.approx(wanted), field.name


def test_a_strip_shows_source_recomposition_and_layers():
    result = _evaluated(0, 0.4)
    blank = result._replace(layers=np.zeros_like(result.layers))
    first, second = strip(result), strip(blank)
    assert first.shape == second.shape and first.shape[1] > 4 * 16  # and gaps
    differ = np.flatnonzero((first != second).any(axis=(0, 2)))
    assert differ.min() > 16  # the source is the same in both
    assert len(differ) == 3 * 16


RISING = [
    {"step": step, "judge/reward_mean": 0.1 * step, "evaluation/psnr": 30.0 - step}
    for step in range(5)
]


def test_a_reward_that_rises_while_pictures_get_worse_is_said_once(caplog):
    said = set()
    for length in range(2, 6):
        warn_of_divergence(RISING[:length], said)
    assert len(caplog.records) == 1 and "recomposition PSNR" in caplog.text
    worse = [record | {"evaluation/reward": 0.5 - 0.1 * record["step"]} for record in RISING]
    warn_of_divergence(worse, said)
    assert len(caplog.records) == 2 and "the evaluation judge's score" in caplog.text


def test_and_stands_in_the_report(tmp_path):
    writer = MetricsWriter(tmp_path)
    for record in RISING:
        writer.scalars(record["step"], {k: v for k, v in record.items() if k != "step"})
    writer.close()
    results = [_evaluated(i, 0.5) for i in range(2)]
    report = run_report(_config(), tmp_path, results, results)
    write_html(report, tmp_path / "report.html")
    assert "Warning: the training reward rose by 0.4" in (tmp_path / "report.html").read_text()

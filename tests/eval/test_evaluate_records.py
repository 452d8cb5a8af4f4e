"""What `evaluate` shows of the records that a training run keeps of its judge."""

import numpy as np
import pytest

from sl_jax.eval.curves import adapter_curves, record_curves
from sl_jax.eval.options import Named
from sl_jax.scoring import CRITERIA, Group
from sl_jax.scoring.records import JudgeRecords, read_records
from sl_jax.scoring.types import Failure, GroupScores

SHOWN = Group("g", np.zeros((4, 4, 3), np.uint8), (np.zeros((1, 4, 4, 4), np.uint8),) * 2)


def scores(*criteria):
    """Of a candidate per given number, which is every criterion; nan for an invalid one."""
    told = np.array(criteria, float)[:, None] * np.ones(len(CRITERIA))
    told[:, 1] /= 2
    valid = np.isfinite(told[:, 0])
    none = np.full(len(told), np.nan)
    return GroupScores(
        group_id="g",
        criteria=told,
        stage1=told.mean(axis=1),
        stage2=none,
        reward=told.mean(axis=1),
        valid=valid,
        two_stage=False,
        reasons=tuple(("",) * len(CRITERIA) if ok else () for ok in valid),
        failures=tuple(None if ok else Failure(False, "time-out") for ok in valid),
        grid_failure=None,
        capped=np.zeros(len(told), bool),
        grid_scores=np.zeros((0, len(told))),
        permutations=np.zeros((0, len(told)), int),
    )


@pytest.fixture
def run(tmp_path):
    """The work directory of a run of three epochs, of which the second was never judged."""
    records = JudgeRecords(tmp_path / "judge", pictures=0)
    records.write(1, [SHOWN, SHOWN], [scores(0.2, 0.4), scores(0.6, np.nan)])
    records.write(2, [SHOWN], [scores(np.nan, np.nan)])
    records.write(3, [SHOWN], [scores(0.8, 0.8)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "judge/reward_mean": 0.5}\n')
    return tmp_path


def test_the_mean_of_every_criterion_by_epoch(run):
    (curve,) = record_curves(read_records(run / "judge"), "run")
    assert curve.title == "run: Criteria of the training's judge"
    assert [s.name for s in curve.series] == [name.replace("_", " ") for name in CRITERIA]
    for index, series in enumerate(curve.series):
        assert list(series.x) == [1, 3]
        assert series.y == pytest.approx([0.2, 0.4] if index == 1 else [0.4, 0.8])
    assert record_curves([]) == ()


def test_adapters_bring_them_along(run, caplog):
    def titles():
        return [c.title for c in adapter_curves([Named("a", str(run / "adapter"))])]

    assert titles() == ["a: Training reward", "a: Criteria of the training's judge"]
    (run / "judge" / "epoch_000003.jsonl").write_text("cut off {")
    assert titles() == ["a: Training reward"]
    assert "epoch_000003.jsonl, line 1" in caplog.text

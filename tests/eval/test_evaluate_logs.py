"""Curves from a run's log, and the signs of over-optimisation in it."""

import json

import pytest

from sl_jax.eval.curves import adapter_curves, run_curves
from sl_jax.eval.divergence import divergence
from sl_jax.eval.options import Named

LOG = [
    {"step": 0, "judge/reward_mean": 0.4, "evaluation/psnr": 30.0, "evaluation/reward": 0.5}
    | {"evaluation/reward_low": 0.4, "evaluation/reward_high": 0.6},
    {"step": 1, "judge/reward_mean": 0.5, "judge/stage1_mean": None},
    {"step": 2, "judge/reward_mean": 0.6},
    {"step": 3, "judge/reward_mean": 0.7, "evaluation/psnr": 29.8, "evaluation/reward": 0.6}
    | {"evaluation/reward_low": 0.5, "evaluation/reward_high": 0.7},
]


def test_curves_of_a_log():
    curves = {curve.title: curve.series for curve in run_curves(LOG, "run")}
    assert list(curves) == [
        "run: Training reward",
        "run: Held-out reward (stage 1)",
        "run: Held-out recomposition PSNR, dB",
    ]
    (reward,) = curves["run: Training reward"]
    assert (reward.name, list(reward.x), list(reward.y)) == (
        "reward mean",
        [0, 1, 2, 3],
        [0.4, 0.5, 0.6, 0.7],
    )
    (held_out,) = curves["run: Held-out reward (stage 1)"]
    assert (list(held_out.x), list(held_out.low), list(held_out.high)) == (
        [0, 3],
        [0.4, 0.5],
        [0.6, 0.7],
    )
    assert run_curves([]) == ()


def test_curves_of_the_runs_that_adapters_come_from(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in LOG))
    for where in (adapter, adapter.parent):
        assert len(adapter_curves([Named("a", str(where)), Named("b", "org/name")])) == 3


@pytest.mark.parametrize(
    ("psnr", "score", "reward", "told"),
    [
        (29.8, 0.6, 0.7, []),
        (28.0, 0.6, 0.7, ["recomposition PSNR on held-out pictures fell from 30 to 28 dB"]),
        (29.8, 0.4, 0.7, ["the evaluation judge's score on held-out pictures fell"]),
        (28.0, 0.4, 0.7, ["PSNR", "judge"]),
        (28.0, 0.4, 0.4, []),  # nothing rises
    ],
)
def test_divergence(psnr, score, reward, told):
    last = LOG[-1] | {
        "evaluation/psnr": psnr,
        "evaluation/reward": score,
        "judge/reward_mean": reward,
    }
    found = divergence([*LOG[:-1], last])
    assert len(found) == len(told)
    assert all(part in text for part, text in zip(told, found, strict=True))


def test_divergence_needs_two_of_each():
    assert divergence([]) == divergence(LOG[:1]) == divergence(LOG[:3]) == ()

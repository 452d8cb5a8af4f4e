"""Where rounding looks like learning, the log says so."""

import pytest

from sl_jax.grpo.metrics import warn_of_mismatch
from sl_jax.grpo.objective import ObjectiveConfig

CLIP = ObjectiveConfig(clip_low=2e-2, clip_high=1e-2)


def _metrics(**steps):
    found = {f"learner/mismatch_log_ratio/{name}": value for name, value in steps.items()}
    return found | {"learner/mismatch/step_1": 1.0, "learner/gradient_norm/all": 3.0}


@pytest.mark.parametrize(
    "metrics", [{}, _metrics(step_1=1e-4, step_2=4e-3, all=2e-3), {"learner/updates": 4.0}]
)
def test_a_small_mismatch_is_a_metric_only(metrics, caplog):
    warn_of_mismatch(metrics, CLIP)
    assert caplog.records == []


def test_a_mismatch_near_the_clip_range_is_said_once(caplog):
    warn_of_mismatch(_metrics(step_1=6e-3, step_2=2e-2, step_3=1e-4, all=9e-3), CLIP)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert "at steps 1, 2" in message and "2.0e-02 on average (step 2)" in message
    assert "clipped at 1.0e-02" in message
    for field in ("compute.dtype", "learner.micro_batch", "objective.clip_low"):
        assert field in message


def test_one_step_is_named_alone(caplog):
    warn_of_mismatch(_metrics(step_3=5e-3), CLIP)
    assert "at step 3 of the sampler" in caplog.text

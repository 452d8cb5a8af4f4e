"""The page that a training run leaves, in a real browser: it fits, is quiet, and is whole."""

import tempfile

import numpy as np
import pytest
from chromium import BROKEN_IMAGES, LAPTOP, OVERFLOW, PHONE, Browser

from sl_jax.data import make_buckets
from sl_jax.data.loader import Example
from sl_jax.data.procedural import make_design
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.report import write_html
from sl_jax.grpo.config import DataConfig, EvaluationConfig, GrpoConfig
from sl_jax.grpo.evaluation import Evaluated, evaluation_metrics
from sl_jax.grpo.report import run_report
from sl_jax.training.metrics import MetricsWriter

pytestmark = pytest.mark.system

SIDE, PICTURES = 64, 3


def _evaluated(slot: int, reward: float) -> Evaluated:
    design = make_design("B", slot, SIDE, 3)
    (bucket,) = make_buckets([(SIDE, SIDE)])
    path = f"pictures/{'a_long_name_' * 9 * (slot == 1)}{slot}.png"
    example = Example(design.flat, "a caption", path, f"id{slot}", 3, bucket, 0, slot)
    measures = reference_free(design.layers, design.flat)
    return Evaluated(example, design.layers, reward, np.full(5, reward), measures)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    stages = [[_evaluated(slot, reward) for slot in range(PICTURES)] for reward in (0.4, 0.6)]
    writer = MetricsWriter(folder)
    for step in range(12):
        writer.scalars(step, {"judge/reward_mean": 0.4 + step / 60, "learner/kl_old/all": 1e-5})
        writer.scalars(step, evaluation_metrics(stages[step // 6]))
    writer.close()
    config = GrpoConfig(
        "run", "tiny", 12, data=DataConfig(path="p" * 90), evaluation=EvaluationConfig(shown=8)
    )
    write_html(run_report(config, folder, *stages), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        chromium = Browser(profile)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_keeps_quiet(browser, page, size, scheme):
    browser.open(page, size, scheme)
    assert browser.run(OVERFLOW) == [0, []]
    assert browser.run(BROKEN_IMAGES) == 0
    assert browser.run("document.querySelectorAll('.picture').length") == PICTURES
    assert browser.run("document.querySelectorAll('.chart').length") >= 3
    assert browser.complaints == []
    assert browser.requests == [page]

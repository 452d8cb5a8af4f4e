"""The page of a training run in a real browser: it fits, and keeps quiet."""

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
from sl_jax.imaging import recompose
from sl_jax.training.metrics import MetricsWriter

pytestmark = pytest.mark.system
SIDE, PICTURES, EPOCHS = 64, 5, 4


def _evaluated(slot: int, moved: int) -> Evaluated:
    """A design whose layers above the background are `moved` pixels off."""
    (bucket,) = make_buckets([(SIDE, SIDE)])
    true = make_design("B", slot, SIDE, 3 + slot % 2).layers
    picture = recompose(true)
    layers = np.concatenate([true[:1], np.roll(true[1:], moved, axis=1)])
    caption = "a caption that goes on for longer than a phone is wide " * (slot == 1)
    example = Example(picture, caption, f"{slot}.png", f"{slot:016x}", 3, bucket, 0, slot)
    reward = 0.9 - 0.1 * moved
    return Evaluated(example, layers, reward, np.full(5, reward), reference_free(layers, picture))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("a_run_with_a_long_name_" + "x" * 60)
    before, after = ([_evaluated(i, moved) for i in range(PICTURES)] for moved in (4, 1))
    writer = MetricsWriter(folder)
    for step in range(EPOCHS):
        measured = evaluation_metrics(after if step else before)
        worse = {"judge/reward_mean": 0.1 * step, "evaluation/psnr": 30.0 - step}  # a warning
        writer.scalars(step, measured | worse | {"learner/kl_old/all": 1e-7 * step})
    writer.close()
    shown = EvaluationConfig(shown=PICTURES)
    data = DataConfig(path=str(folder))
    config = GrpoConfig(str(folder), "tiny", EPOCHS, data=data, evaluation=shown)
    write_html(run_report(config, folder, before, after), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        chromium = Browser(profile)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_training_run_fits_and_keeps_quiet(browser, page, size, scheme):
    browser.open(page, size, scheme)
    assert browser.run(OVERFLOW) == [0, []]
    assert browser.run(BROKEN_IMAGES) == 0
    assert browser.run("document.querySelectorAll('.picture').length") == PICTURES
    assert browser.run("document.querySelectorAll('.chart').length") >= 3
    assert browser.run("document.body.innerText.includes('Warning: the training reward rose')")
    assert browser.complaints == []
    assert browser.requests == [page]


def test_layers_before_and_after_enlarge(browser, page):
    browser.open(page, LAPTOP)
    browser.run("document.querySelectorAll('.model')[1].querySelector('.layer').click()")
    assert browser.run("document.querySelector('dialog').open")
    caption = browser.run("document.querySelector('dialog p').textContent")
    assert caption.endswith("after  ·  Background")
    assert browser.complaints == []

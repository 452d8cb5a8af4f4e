"""The page of an evaluation in a real browser: it fits, shows its pictures, sorts and enlarges."""

import tempfile

import numpy as np
import pytest
from chromium import BROKEN_IMAGES, LAPTOP, OVERFLOW, PHONE, Browser

from sl_jax import imaging
from sl_jax.data import write_designs
from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.options import Named
from sl_jax.eval.run import EvaluationConfig, evaluate
from sl_jax.eval.stacks import read_stack, write_stack

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """An evaluation with a picture that a system lacks, and a name with everything in it."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_designs(folder / "data", "B", range(4), 32, (2, 3), with_layers=True)
    noise = np.random.default_rng(0)
    for index, design in enumerate(sorted((folder / "data").iterdir())):
        layers = read_stack(design)
        made = BASELINES["colour components"](imaging.recompose(layers), len(layers))
        write_stack(folder / "base" / design.name, made)
        if index:
            moved = layers.astype(int) + noise.normal(0, 10 * index, layers.shape)
            write_stack(folder / "new" / design.name, np.clip(moved, 0, 255).astype(np.uint8))
    systems = (Named("base", str(folder / "base")), Named("<b>new</b> & long", str(folder / "new")))
    data, output = str(folder / "data"), str(folder / "out")
    evaluate(
        EvaluationConfig(data, output, layers=systems, judge=JudgeChoice(("embedded",)), shown=50)
    )
    return (folder / "out" / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        chromium = Browser(profile)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_keeps_quiet(browser, page, size, scheme):
    browser.open(page, size, scheme)
    assert browser.run(OVERFLOW) == [0, []]
    assert browser.run(BROKEN_IMAGES) == 0
    assert browser.run("document.querySelectorAll('.picture').length") == 4
    assert browser.complaints == []
    assert browser.requests == [page]


def test_pictures_sort_worst_first(browser, page):
    browser.open(page, LAPTOP)
    browser.run("document.querySelector('[data-sort=worst]').click()")
    gains = browser.run(
        "[...document.querySelectorAll('.picture')].map((p) => p.dataset.improvement ?? null)"
    )
    # The picture that one system lacks has no improvement, and stands last.
    assert gains[-1] is None and None not in gains[:-1]
    assert [float(gain) for gain in gains[:-1]] == sorted(float(gain) for gain in gains[:-1])


def test_layers_enlarge_and_true_layers_are_beside(browser, page):
    browser.open(page, LAPTOP)
    models = (
        "[...document.querySelectorAll('.picture')].map((p) => "
        "[...p.querySelectorAll('.model')].map((m) => m.dataset.model))"
    )
    first, second, *_ = browser.run(models)
    assert first == ["base", "true layers"]
    assert second == ["base", "<b>new</b> & long", "true layers"]
    browser.run("document.querySelectorAll('.picture')[1].querySelector('.layer').click()")
    assert browser.run("document.querySelector('dialog').open")
    caption = browser.run("document.querySelector('dialog p').textContent")
    assert caption == "B-000001  ·  base  ·  Background"
    assert browser.complaints == []

"""The report in a real browser: widths, themes, what its script does, and a silent console."""

import base64
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from chromium import BROKEN_IMAGES, LAPTOP, OVERFLOW, PHONE, Browser
from PIL import Image

from sl_jax.eval.bootstrap import Interval
from sl_jax.eval.report import (
    Column,
    Curve,
    Decomposition,
    Fact,
    Picture,
    Report,
    Series,
    Table,
    write_html,
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        chromium = Browser(profile)
        yield chromium
        chromium.close()


def _decomposition(model: str, seed: int, count: int, size: tuple[int, int]) -> Decomposition:
    rng = np.random.default_rng(seed)
    height, width = size
    layers = np.zeros((count, height, width, 4), np.uint8)
    layers[0] = (*rng.integers(0, 256, 3), 255)
    for layer in layers[1:]:
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        layer[top : top + height // 2, left : left + width // 2] = (*rng.integers(0, 256, 3), 200)
    return Decomposition(model, layers, {"judge": rng.random(), "a rather long score": "0.123"})


def sample_report() -> Report:
    """Long words, many columns, layers in different numbers, tall and wide and tiny pictures."""
    sizes = [(64, 64), (256, 192), (150, 300), (64, 64)]
    pictures = []
    for index, size in enumerate(sizes):
        made = [
            _decomposition("base", index, 3, size),
            _decomposition("tuned <b>&amp; bold", index + 50, 3 + index, size),
        ]
        gain = (0.1, -0.2, 0.3, None)[index]
        source = made[0].layers[0, ..., :3]
        name = f"picture-{index}-" + "with_a_very_long_file_name" * (index == 1)
        pictures.append(Picture(name, source, tuple(made), "a caption", gain))
    names = ["row", *(f"metric number {index}" for index in range(8))]
    wide = Table(
        "A wide table",
        tuple(Column(name, better="lower" if name != "row" else "") for name in names),
        tuple((f"model {r}", *(Interval(r / 7, 0.0, 1.0, 9) for _ in names[1:])) for r in range(3)),
        note="Ünïcode → fine",
    )
    steps = list(range(50))
    curves = tuple(
        Curve(f"curve {i}", (Series("a", steps, steps), Series("b", steps, [i] * 50)))
        for i in range(3)
    )
    return Report(
        title="A report with a title that is long enough to need more than one line on a phone",
        summary="First paragraph.\n\nSecond paragraph with averyverylongwordthatcannotbebroken" * 2,
        facts=tuple(Fact(f"fact {i}", i / 3, "note " * i, "good") for i in range(5)),
        tables=(wide,),
        curves=curves,
        pictures=tuple(pictures),
        improvement_name="judge score",
        details={"checkpoint": "0123456789abcdef" * 8},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(sample_report(), path)
    return path.as_uri()


CONTRAST = """(() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const colour = (selector, key) => luminance(style(selector)[key]);
  const card = colour(".card", "backgroundColor"), page = colour("body", "backgroundColor");
  return Math.min(ratio(colour("h1", "color"), page), ratio(colour(".note", "color"), card),
    ratio(colour(".fact dd", "color"), card), ratio(colour(".lead p", "color"), page));
})()"""


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_keeps_quiet(browser, page, size, scheme, tmp_path):
    browser.open(page, size, scheme)
    assert browser.run("innerWidth") == size[0]
    assert browser.run(OVERFLOW) == [0, []]
    assert browser.run(CONTRAST) >= 4.5
    page_is_dark = browser.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((v) => v < 60)"
    )
    assert page_is_dark == (scheme == "dark")
    assert browser.run(BROKEN_IMAGES) == 0
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert browser.complaints == []
    assert browser.requests == [page]


def test_the_theme_button_overrules_the_system(browser, page):
    browser.open(page, LAPTOP, "dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = browser.run(background)
    light = browser.run(f"document.getElementById('theme').click(), {background}")
    assert light != dark
    assert browser.run(f"document.getElementById('theme').click(), {background}") == dark
    browser.run("localStorage.clear()")
    assert browser.complaints == []


def test_pictures_sort_by_improvement(browser, page):
    browser.open(page, LAPTOP)
    order = "[...document.querySelectorAll('.picture')].map((p) => Number(p.dataset.index))"
    assert browser.run(order) == [0, 1, 2, 3]

    def press(name):
        return browser.run(f"document.querySelector('[data-sort={name}]').click(), {order}")

    assert press("best") == [2, 0, 1, 3]
    assert press("worst") == [1, 0, 2, 3]
    assert press("listed") == [0, 1, 2, 3]


def test_click_enlarges_and_keys_walk(browser, page):
    browser.open(page, LAPTOP)
    caption = "document.querySelector('dialog p').textContent"
    browser.run("document.querySelector('.model .layer').click()")
    assert browser.run("document.querySelector('dialog').open")
    assert browser.run(caption) == "picture-0-  ·  base  ·  Background"
    shown = browser.run("document.querySelector('.stage img').getBoundingClientRect().width")
    assert shown > 300  # 64 pixels, enlarged

    def key(name):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=name)
        return browser.run(caption)

    assert key("ArrowRight").endswith("base  ·  Matte of Background")
    assert key("ArrowRight").endswith("base  ·  Layer 1")
    assert key("ArrowDown") == "picture-0-  ·  tuned <b>&amp; bold  ·  Layer 1"
    assert key("ArrowLeft").endswith("Matte of Background")
    browser.run("document.querySelector('[data-close]').click()")
    assert not browser.run("document.querySelector('dialog').open")
    assert browser.complaints == []


def test_mattes_show_alpha_as_grey(browser, page, tmp_path):
    """A matte's pixels on the screen: black where transparent, the alpha as grey elsewhere."""
    browser.open(page, LAPTOP)
    box = browser.run(
        """(async () => {
          const m = document.querySelectorAll(".pixelated .model .matte")[1];
          m.scrollIntoView({block: "center", behavior: "instant"});
          await m.firstElementChild.decode();
          for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
          const b = m.getBoundingClientRect();
          return {x: b.x + scrollX + 4, y: b.y + scrollY + 4, width: b.width - 8,
            height: b.height - 8, scale: 1};
        })()"""
    )
    shot = browser.call("Page.captureScreenshot", clip=box)
    path = tmp_path / "matte.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    values = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(values, axis=0, return_counts=True)
    common = {tuple(map(int, value)) for value in found[counts > 0.05 * len(values)]}
    assert common == {(0, 0, 0), (200, 200, 200)}


def test_views_show_layers_or_mattes_only(browser, page):
    browser.open(page, PHONE)
    visible = (
        "[...document.querySelectorAll('.model {}')].filter((e) => e.checkVisibility()).length"
    )
    assert browser.run(visible.format(".matte")) == 0  # a phone starts with large layers
    for view, layers, mattes in (("layers", True, False), ("mattes", False, True)):
        browser.run(f"document.querySelector('button[data-view={view}]').click()")
        assert (browser.run(visible.format(".layer")) > 0) == layers
        assert (browser.run(visible.format(".matte")) > 0) == mattes
        assert browser.run(OVERFLOW) == [0, []]


def test_charts_read_off_values_under_the_pointer(browser, page):
    browser.open(page, LAPTOP)
    box = browser.run(
        """(() => {
          const c = document.querySelector(".chart");
          c.scrollIntoView({block: "center", behavior: "instant"});
          const b = c.getBoundingClientRect();
          return {x: b.x + b.width * (360 - 12) / 360 - 1, y: b.y + b.height / 2};
        })()"""
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **box)
    values = (
        "[...document.querySelector('.curve').querySelectorAll('output')].map((o) => o.textContent)"
    )
    assert browser.run(values) == ["49", "0"]
    assert browser.complaints == []

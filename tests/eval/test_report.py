"""Report pages and files: what they contain, without a browser."""

import base64
import csv
import html.parser
import io
import json
import math
import re
import resource

import numpy as np
import pytest
from PIL import Image

from sl_jax.eval._charts import line_chart, nice_ticks
from sl_jax.eval._format import number
from sl_jax.eval._thumbnails import data_url
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
    render_html,
    write_csv,
    write_html,
    write_json,
    write_report,
)

LAYERS = np.zeros((3, 20, 30, 4), np.uint8)
LAYERS[0] = (200, 100, 50, 255)
LAYERS[1, 5:15, 5:15] = (0, 0, 255, 255)
SOURCE = LAYERS[0, ..., :3].copy()
SOURCE[5:15, 5:15] = (0, 0, 255)


def picture(name="one", improvement=0.25) -> Picture:
    base = Decomposition("base", LAYERS[:1], {"reward": 0.5})
    return Picture(name, SOURCE, (base, Decomposition("tuned", LAYERS, {})), "", improvement)


def table(**options) -> Table:
    columns = (
        Column("L"),
        Column("model"),
        Column("L1", 2, "lower"),
        Column("gain", 1, "higher", signed=True),
    )
    rows = (
        ("L = 2", "base", Interval(0.5, 0.25, 0.75, 9), 0.0),
        ("L = 2", "tuned", Interval(0.25, math.nan, math.nan, 1), 1.5),
        ("L = 3", "base", 0.125, -2.0),
        ("L = 3", "tuned", math.nan, None),
    )
    return Table("Layer L1", columns, rows, **options)


class _Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps attributes that name other places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in ("meta", "link", "img", "circle", "line", "path", "fecolormatrix"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("circle", "line", "path", "fecolormatrix"):
            assert self.open.pop() == tag


def rows_of(page: str) -> list[list[str]]:
    body = re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:]
    return [[re.sub(r"<.*?>", "", c).strip() for c in re.findall("<td.*?</td>", r)] for r in body]


def test_full_page_is_well_formed_and_self_contained():
    curve = Curve("reward", (Series("a", [0, 1], [0.0, 1.0]),))
    report = Report(
        "T", "one\n\ntwo", (Fact("f", 3),), (table(),), (curve,), (picture(),), details={"a": "b"}
    )
    page = render_html(report)
    links = _Page(page).links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "<p>one</p>" in page and "<p>two</p>" in page


def test_empty_parts_do_not_appear():
    page = render_html(Report("Only a title"))
    _Page(page)
    assert "<section" not in page and "<dl" not in page and "None" not in page


def test_names_are_escaped():
    evil = "<script>alert(1)</script>"
    made = Decomposition(evil, LAYERS, {evil: evil})
    curve = Curve(evil, (Series(evil, [0], [1]),), evil, evil, evil)
    cells = Table(evil, (Column(evil),), ((evil,),), evil)
    report = Report(
        evil,
        evil,
        (Fact(evil, evil, evil),),
        (cells,),
        (curve,),
        (Picture(evil, SOURCE, (made,), evil, 1.0),),
        evil,
        evil,
        {evil: evil},
    )
    assert evil not in render_html(report)


def test_table_cells_signs_intervals_and_best_values():
    page = render_html(Report("T", tables=(table(grouped=True),)))
    assert rows_of(page) == [
        ["base", "0.50 0.25 … 0.75", "0.0"],
        ["tuned", "0.25", "+1.5"],
        ["base", "0.12", "−2.0"],
        ["tuned", "–", "–"],
    ]
    best = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<td class="best.*?</td>', page)]
    assert best == ["0.25", "+1.5"]  # a value without a measured rival is not the best
    assert re.findall(r'rowgroup".*?<span>(.*?)</span>', page) == ["L = 2", "L = 3"]


def test_best_over_the_whole_table_when_not_grouped():
    page = render_html(Report("T", tables=(table(),)))
    best = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<td class="best.*?</td>', page)]
    assert best == ["+1.5", "0.12"]


def test_pictures_are_data_urls_of_the_right_things():
    page = render_html(Report("T", pictures=(picture(),)))
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    shown = {}
    for data, name in images:
        shown.setdefault(name, []).append(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        )
    np.testing.assert_array_equal(shown["Source"][0], SOURCE)
    base, tuned = shown["Recomposition"]
    np.testing.assert_array_equal(tuned, SOURCE)
    np.testing.assert_array_equal(base, LAYERS[0, ..., :3])
    assert not shown["Difference × 4"][1].any()
    assert (shown["Difference × 4"][0][5:15, 5:15] == (255, 255, 255)).all()
    assert shown["Layer 1"][0].shape == (20, 30, 4)
    assert page.count(">Background<") == 2 and page.count(">Layer 2<") == 1
    assert page.count('class="cell blank"') == 1
    assert 'data-improvement="0.25"' in page and "+0.25 improvement" in page


def test_pictures_shrink_until_the_page_is_small_enough():
    rng = np.random.default_rng(0)
    pictures = []
    for index in range(2):
        layers = rng.integers(0, 256, (2, 160, 160, 4), np.uint8)
        made = tuple(Decomposition(name, layers) for name in ("base", "tuned"))
        pictures.append(Picture(str(index), layers[0, ..., :3], made))
    report = Report("T", pictures=tuple(pictures))
    free = len(render_html(report).encode())
    assert len(render_html(report, max_bytes=free // 2).encode()) <= free // 2
    with pytest.raises(ValueError, match="fewer pictures than 2"):
        render_html(report, max_bytes=60_000)


def test_thumbnails():
    noise = np.random.default_rng(0).integers(0, 256, (300, 150, 4), np.uint8)
    for pixels, kind in ((noise, "webp"), (noise[..., :3], "jpeg"), (noise[:50, :50], "png")):
        url = data_url(pixels, 200)
        assert url.startswith(f"data:image/{kind};base64,")
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert image.size == ((100, 200) if pixels.shape[0] == 300 else (50, 50))
    # White beside hidden black: premultiplied scaling keeps the edge white.
    edge = np.zeros((40, 40, 4), np.uint8)
    edge[:, :19] = 255
    url = data_url(edge, 10)
    small = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert (small[small[..., 3] > 40][:, :3] > 250).all()
    # An opaque layer travels without its alpha.
    opaque = data_url(np.full((4, 4, 4), 255, np.uint8), 10)
    assert Image.open(io.BytesIO(base64.b64decode(opaque.partition(",")[2]))).mode == "RGB"


def test_files(tmp_path):
    other = table()
    curve = Curve("reward", (Series("a", [0, 1, 2], [0.0, math.nan, None]),))
    report = Report(
        "T",
        facts=(Fact("f", 3, "note", "good"),),
        tables=(table(), other),
        curves=(curve,),
        pictures=(picture(),),
        records=({"picture": "one", "l1": 0.5}, {"picture": "two", "psnr": math.nan}),
    )
    write_report(report, tmp_path / "deep" / "er")
    names = {path.name for path in (tmp_path / "deep" / "er").iterdir()}
    assert names == {
        "report.html",
        "report.json",
        "layer-l1.csv",
        "layer-l1-2.csv",
        "records.csv",
    }
    content = json.loads((tmp_path / "deep/er/report.json").read_text())
    assert content["tables"][0]["rows"][0] == {
        "L": "L = 2",
        "model": "base",
        "L1": {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 9},
        "gain": 0.0,
    }
    assert content["tables"][0]["rows"][1]["L1"]["low"] is None
    assert content["curves"][0]["series"][0]["y"] == [0.0, None, None]
    assert content["pictures"][0]["scores"]["base"] == {"reward": 0.5}
    assert (tmp_path / "deep/er/records.csv").read_text() == "picture,l1,psnr\none,0.5,\ntwo,,\n"


@pytest.mark.parametrize("before", [None, "the page of an earlier run"])
def test_a_page_that_finds_no_room_leaves_no_half(tmp_path, before):
    """Where a run finds a page, it says that it is finished."""
    path = tmp_path / "report.html"
    if before:
        path.write_text(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_html(Report("T"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert left == ({path.name: before} if before else {})


def test_csv_spreads_intervals(tmp_path):
    write_csv(table(), tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").open()))
    assert rows == [
        ["L", "model", "L1", "L1 low", "L1 high", "L1 n", "gain"],
        ["L = 2", "base", "0.5", "0.25", "0.75", "9", "0.0"],
        ["L = 2", "tuned", "0.25", "", "", "1", "1.5"],
        ["L = 3", "base", "0.125", "", "", "", "-2.0"],
        ["L = 3", "tuned", "", "", "", "", ""],
    ]


def test_numpy_numbers_are_numbers(tmp_path):
    cells = Table("t", (Column("a", 2), Column("b", 2)), ((np.float32(0.5), np.int64(1200)),))
    report = Report("T", facts=(Fact("f", np.float64(0.25)),), tables=(cells,))
    assert rows_of(render_html(report)) == [["0.50", "1,200"]]
    write_json(report, tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["tables"][0]["rows"] == [{"a": 0.5, "b": 1200}]


def test_chart_places_points_and_gaps():
    curve = Curve("c", (Series("a", [0, 1, 2, 3], [0.0, 1.0, math.nan, 0.5], [0] * 4, [1] * 4),))
    svg = str(line_chart(curve))
    path = re.search(r'<path class="series c0" d="(.*?)"', svg).group(1)
    points = [tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", path)]
    assert path.count("M") == 2  # the gap starts a new stretch, whose single point is a dot
    assert svg.count("<circle") == 1
    assert points[0][0] == 48 and points[-1][0] == 348  # the plot's left and right end
    assert points[0][1] > points[2][1] > points[1][1]  # y grows upwards
    data = json.loads(re.search('data-chart="(.*?)"', svg).group(1).replace("&#34;", '"'))
    assert data["series"][0] == {"x": [0, 1, 2, 3], "y": ["0", "1", None, "0.5"]}


def test_chart_without_values_says_so():
    for series in ((), (Series("a", [], []),), (Series("a", [1], [math.nan]),)):
        assert "nothing measured yet" in line_chart(Curve("c", series))
    assert "<circle" in line_chart(Curve("c", (Series("a", [1], [2]),)))


def test_long_series_are_averaged_down():
    steps = range(10_000)
    svg = str(line_chart(Curve("c", (Series("a", steps, [i % 5 for i in steps]),))))
    data = json.loads(re.search('data-chart="(.*?)"', svg).group(1).replace("&#34;", '"'))
    assert data["series"][0]["y"] == ["2"] * 400  # means of 25 values
    assert data["series"][0]["x"][:2] == [12, 37]


def test_small_ticks_are_short_enough_for_their_margin():
    chart = line_chart(Curve("KL", (Series("kl", (0, 1, 2), (0.0, 1.5e-5, 2.1e-5)),)))
    assert ">1.5e−5<" in chart and "e−05" not in chart


def test_epochs_are_whole():
    chart = str(line_chart(Curve("r", (Series("r", (1, 2, 3), (0.1, 0.2, 0.3)),))))
    along = re.findall(r'class="mid" [^>]*>([^<]*)<', chart)
    assert along == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 7, [-2, 0, 2, 4, 6]), (0.11, 0.19, None)],
)
def test_ticks_are_round(low, high, ticks):
    found = nice_ticks(low, high)
    assert 3 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    if ticks:
        assert found == pytest.approx(ticks)


def test_numbers():
    assert number(0.123456) == "0.1235" and number(1234567.0) == "1234567"
    assert number(-0.5, 1) == "−0.5" and number(0.5, 1, signed=True) == "+0.5"
    assert number(-0.0001, 2, signed=True) == "0.00"
    assert number(math.nan) == "–" and number(-math.inf) == "−∞"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fact("f", 1, tone="great"), "tone"),
        (lambda: Column("c", better="up"), "better"),
        (lambda: Table("t", (Column("a"),), (("x", 1),)), "1 columns, but a row of 2"),
        (lambda: Series("s", [1], [1, 2]), "one length"),
        (lambda: Series("s", [1], [1], [0]), "both or neither"),
        (lambda: Picture("p", SOURCE[:5], (Decomposition("m", LAYERS),)), "do not fit"),
        (lambda: Picture("p", SOURCE, (Decomposition("m", LAYERS / 255),)), "uint8"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

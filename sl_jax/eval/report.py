"""Reports: one self-contained HTML page, JSON and CSV from one `Report`.

The page asks nothing of any network: styles, script, charts and pictures are inside it. It shows
summary facts, tables with intervals, curves, and for chosen pictures the source beside each
model's recomposition, layers and mattes. `train` and `evaluate` both write their pages here.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from etils import epath

from sl_jax import imaging
from sl_jax.checkpoints.disk import write_whole
from sl_jax.eval import _format
from sl_jax.eval._charts import Curve, Series, line_chart
from sl_jax.eval._thumbnails import data_url
from sl_jax.eval.bootstrap import Interval
from sl_jax.imaging.words import printable, readable_json

__all__ = [
    "Cell",
    "Column",
    "Curve",
    "Decomposition",
    "Fact",
    "Interval",
    "Picture",
    "Report",
    "Series",
    "Table",
    "render_html",
    "write_csv",
    "write_html",
    "write_json",
    "write_records",
    "write_report",
]

Cell = str | int | float | Interval | None
"""What a table can hold; None and nan are shown as a dash."""

MAX_BYTES = 20_000_000
_THUMBNAIL_SIDES = (384, 320, 256, 192, 128, 96, 64)
_PIXELATED = 128  # pictures up to this side are shown with visible pixels, not blurred
_TONES = ("neutral", "good", "bad")
# Nothing to see: control characters, what turns the direction of writing for the text behind it,
# and halves of characters, from names that are no UTF-8.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True)
class Fact:
    """One headline number: `tone` is neutral, good or bad; `note` is the small print under it."""

    label: str
    value: str | int | float
    note: str = ""
    tone: str = "neutral"

    def __post_init__(self) -> None:
        if self.tone not in _TONES:
            raise ValueError(f"fact {self.label!r}: tone {self.tone!r} is none of {_TONES}")


@dataclass(frozen=True)
class Column:
    """A column's name, its decimals, and which way is better.

    `better` is "lower", "higher" or "" (no best value is marked); `signed` shows the plus sign,
    for differences.
    """

    name: str
    digits: int = 3
    better: str = ""
    signed: bool = False

    def __post_init__(self) -> None:
        if self.better not in ("", "lower", "higher"):
            raise ValueError(f"column {self.name!r}: better is 'lower', 'higher' or ''")


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    With `grouped`, the first cell names a group, the second the row: rows of equal first cell
    belong together under one heading, and the best values are marked within each group; otherwise
    within the whole table. Differences belong in a table of their own, or they would compete.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    grouped: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r} has {len(self.columns)} columns, but a row of "
                    f"{len(row)} cells: {row!r}"
                )


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One model's layers of a picture: uint8 [L, H, W, 4] straight RGBA, back to front.

    `scores` are shown beside the model's name, in their order.
    """

    model: str
    layers: np.ndarray
    scores: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """A source uint8 [H, W, 3] and what the models made of it, in one order over all pictures.

    `improvement` is what the page sorts by: larger is better, None sorts last.
    """

    name: str
    source: np.ndarray
    decompositions: tuple[Decomposition, ...]
    caption: str = ""
    improvement: float | None = None

    def __post_init__(self) -> None:
        for made in self.decompositions:
            layers = made.layers
            if layers.dtype != np.uint8 or layers.ndim != 4 or layers.shape[-1] != 4:
                raise ValueError(
                    f"picture {self.name!r}, {made.model!r}: layers must be uint8 [L, H, W, 4], "
                    f"got {layers.dtype} {list(layers.shape)}"
                )
            if layers.shape[1:3] != self.source.shape[:2]:
                raise ValueError(
                    f"picture {self.name!r}, {made.model!r}: layers {list(layers.shape)} do not "
                    f"fit the source {list(self.source.shape)}; please resize one of them first"
                )


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a report says; empty parts do not appear.

    Attributes:
      title: what was run or compared.
      summary: opening text; blank lines separate paragraphs.
      facts: headline numbers.
      tables, curves, pictures: in the order of appearance.
      pictures_note: one line above the pictures (which ones, and why these).
      improvement_name: what `Picture.improvement` measures, for the sort buttons.
      details: provenance (checkpoint hashes, seeds, versions, command), by name.
      records: one flat mapping per measurement, for the JSON and CSV files; not on the page.
    """

    title: str
    summary: str = ""
    facts: tuple[Fact, ...] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    pictures: tuple[Picture, ...] = ()
    pictures_note: str = ""
    improvement_name: str = "improvement"
    details: Mapping[str, str] = field(default_factory=dict)
    records: tuple[Mapping[str, str | int | float | None], ...] = ()


def render_html(report: Report, max_bytes: int = MAX_BYTES) -> str:
    """The page. Its pictures are made smaller until the page has at most `max_bytes`.

    Raises:
      ValueError: if it is larger even with pictures of 64 px.
    """
    sides = list(_THUMBNAIL_SIDES)
    while sides:
        side = sides.pop(0)
        page = _page(report, side)
        size = len(page.encode())
        if size <= max_bytes:
            return page
        # Encoding is slow: pass over sides that stay too large even if bytes fall like pixels.
        while len(sides) > 1 and size * (sides[0] / side) ** 2 > max_bytes:
            sides.pop(0)
    raise ValueError(
        f"the report has {size:,} bytes with pictures of {side} px and may have {max_bytes:,}; "
        f"please choose fewer pictures than {len(report.pictures)}"
    )


def write_html(report: Report, path: epath.PathLike, max_bytes: int = MAX_BYTES) -> None:
    """Writes the page of `render_html` as UTF-8."""
    _write(path, render_html(report, max_bytes))


def write_json(report: Report, path: epath.PathLike) -> None:
    """Writes all numbers of the report, without pixels, as strict JSON (nan becomes null).

    Table rows are objects by column name; an interval is {mean, low, high, count}.
    """
    content = {
        "title": report.title,
        "summary": report.summary,
        "facts": [vars(fact) for fact in report.facts],
        "tables": [
            {
                "title": table.title,
                "note": table.note,
                "rows": [_named(table, row) for row in table.rows],
            }
            for table in report.tables
        ],
        "curves": [
            {
                "title": curve.title,
                "x_label": curve.x_label,
                "y_label": curve.y_label,
                "series": [
                    {key: list(value) if key != "name" else value for key, value in vars(s).items()}
                    for s in curve.series
                ],
            }
            for curve in report.curves
        ],
        "pictures": [
            {
                "name": picture.name,
                "caption": picture.caption,
                "improvement": picture.improvement,
                "scores": {made.model: dict(made.scores) for made in picture.decompositions},
            }
            for picture in report.pictures
        ],
        "details": dict(report.details),
        "records": [dict(record) for record in report.records],
    }
    _write(path, readable_json(_plain(content), indent=1, allow_nan=False) + "\n")


def write_csv(table: Table, path: epath.PathLike) -> None:
    """Writes one table; columns with intervals are followed by "NAME low", "NAME high", "NAME n".

    Missing values are empty.
    """
    wide = [
        any(isinstance(row[index], Interval) for row in table.rows)
        for index in range(len(table.columns))
    ]
    head = []
    for column, has_interval in zip(table.columns, wide, strict=True):
        suffixes = ("", " low", " high", " n") if has_interval else ("",)
        head += [column.name + suffix for suffix in suffixes]
    rows = []
    for row in table.rows:
        cells: list[Cell] = []
        for cell, has_interval in zip(row, wide, strict=True):
            parts = tuple(cell) if isinstance(cell, Interval) else (cell,)
            cells += [*parts, *[None] * (3 * has_interval + 1 - len(parts))]
        rows.append(cells)
    _write(path, _csv_text([head, *rows]))


def write_records(
    records: Sequence[Mapping[str, str | int | float | None]], path: epath.PathLike
) -> None:
    """Writes flat records as CSV; columns in the order in which their names first appear."""
    names = list(dict.fromkeys(name for record in records for name in record))
    _write(path, _csv_text([names, *([record.get(name) for name in names] for record in records)]))


def write_report(report: Report, folder: epath.PathLike) -> None:
    """Writes report.html, report.json, one TITLE.csv per table and records.csv into `folder`."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_html(report, folder / "report.html")
    write_json(report, folder / "report.json")
    taken: set[str] = {"records"}
    for table in report.tables:
        stem = re.sub(r"[^\w]+", "-", table.title.lower()).strip("-") or "table"
        name = stem
        while name in taken:
            name = f"{stem}-{len(taken)}"
        taken.add(name)
        write_csv(table, folder / f"{name}.csv")
    if report.records:
        write_records(report.records, folder / "records.csv")


def _write(path: epath.PathLike, text: str) -> None:
    write_whole(epath.Path(path), text)  # a page that is there counts as finished


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _format.number
    return environment.get_template("report.html")


def _page(report: Report, max_side: int) -> str:
    with ThreadPoolExecutor() as pool:  # Pillow encodes outside the interpreter lock
        views = list(pool.map(lambda p: _picture_view(p, max_side), report.pictures))
    page = _template().render(
        report=report,
        paragraphs=[text.strip() for text in re.split(r"\n\s*\n", report.summary) if text.strip()],
        facts=[(fact, _text(fact.value)) for fact in report.facts],
        tables=[_table_view(table) for table in report.tables],
        charts=[(curve, line_chart(curve)) for curve in report.curves],
        pictures=views,
        sortable=any(picture.improvement is not None for picture in report.pictures),
    )
    return _UNSEEN.sub("\ufffd", page)


@dataclass(frozen=True)
class _CellView:
    text: str
    span: str
    best: bool
    numeric: bool


@dataclass(frozen=True)
class _TableView:
    """`groups` are (heading, rows of cells); an ungrouped table is one without heading."""

    table: Table
    columns: tuple[tuple[Column, bool], ...]  # with whether it holds text
    groups: tuple[tuple[str, tuple[tuple[_CellView, ...], ...]], ...]


@dataclass(frozen=True)
class _Shot:
    """One picture of a decomposition; `kind` is opaque, layer or difference."""

    label: str
    url: str
    kind: str
    blank: bool = False


@dataclass(frozen=True)
class _ModelView:
    model: str
    scores: tuple[tuple[str, str], ...]
    recomposition: _Shot
    difference: _Shot
    layers: tuple[_Shot, ...]


@dataclass(frozen=True)
class _PictureView:
    picture: Picture
    source: str
    models: tuple[_ModelView, ...]
    columns: int
    pixelated: bool
    ratio: float


def _table_view(table: Table) -> _TableView:
    skip = int(table.grouped)  # the heading's column is not shown again in every row
    best = _best_cells(table)
    rows = [
        tuple(
            _cell_view(cell, column, (index, place) in best)
            for place, (cell, column) in enumerate(zip(row, table.columns, strict=True))
        )
        for index, row in enumerate(table.rows)
    ]
    columns = tuple(
        (column, not any(row[place].numeric for row in rows))
        for place, column in enumerate(table.columns)
    )
    groups = [
        (heading, tuple(rows[index][skip:] for index in members))
        for heading, members in _groups(table).items()
    ]
    return _TableView(table, columns[skip:], tuple(groups))


def _groups(table: Table) -> dict[str, list[int]]:
    """Row indices by group heading; "" heads the rows of an ungrouped table."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(table.rows):
        groups.setdefault(_text(row[0]) if table.grouped else "", []).append(index)
    return groups


def _best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of every value that is the best of its group, if it has rivals."""
    groups = _groups(table)
    best = set()
    for place, column in enumerate(table.columns):
        for members in groups.values() if column.better else ():
            values = {i: _value(table.rows[i][place]) for i in members}
            values = {i: value for i, value in values.items() if not math.isnan(value)}
            if len(values) > 1:
                pick = min if column.better == "lower" else max
                best |= {(i, place) for i, v in values.items() if v == pick(values.values())}
    return best


def _value(cell: Cell) -> float:
    cell = _python(cell)
    if isinstance(cell, Interval):
        return cell.mean
    return float(cell) if isinstance(cell, int | float) else math.nan


def _cell_view(cell: Cell, column: Column, best: bool) -> _CellView:
    cell = _python(cell)
    show = functools.partial(_format.number, digits=column.digits, signed=column.signed)
    if isinstance(cell, Interval):
        known = not math.isnan(cell.low)
        span = f"{show(cell.low)} … {show(cell.high)}" if known else ""
        return _CellView(show(cell.mean), span, best, True)
    if isinstance(cell, float):
        return _CellView(show(cell), "", best, True)
    return _CellView(_text(cell), "", best, isinstance(cell, int))


def _python(value: Cell) -> Cell:
    """numpy's numbers as Python's; everything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _text(value: Cell) -> str:
    value = _python(value)
    if value is None:
        return _format.MISSING
    if isinstance(value, int):
        return f"{value:,}"
    return _format.number(value) if isinstance(value, float) else str(value)


def _picture_view(picture: Picture, max_side: int) -> _PictureView:
    height, width = picture.source.shape[:2]
    return _PictureView(
        picture=picture,
        source=data_url(picture.source, max_side),
        models=tuple(
            _model_view(made, picture.source, max_side) for made in picture.decompositions
        ),
        columns=1 + max((len(made.layers) for made in picture.decompositions), default=0),
        pixelated=max(height, width) <= _PIXELATED,
        ratio=width / height,
    )


def _model_view(made: Decomposition, source: np.ndarray, max_side: int) -> _ModelView:
    recomposition = imaging.recompose(made.layers)
    gap = np.abs(recomposition.astype(np.int16) - source)
    difference = np.minimum(4 * gap, 255).astype(np.uint8)
    return _ModelView(
        model=made.model,
        scores=tuple((name, _text(value)) for name, value in made.scores.items()),
        recomposition=_Shot("Recomposition", data_url(recomposition, max_side), "opaque"),
        difference=_Shot("Difference × 4", data_url(difference, max_side), "difference"),
        layers=tuple(
            _Shot(
                label="Background" if index == 0 else f"Layer {index}",
                url=data_url(layer, max_side),
                kind="layer",
                blank=bool(imaging.is_blank(layer[..., 3])),
            )
            for index, layer in enumerate(made.layers)
        ),
    )


def _named(table: Table, row: tuple[Cell, ...]) -> dict[str, object]:
    return {
        column.name: cell._asdict() if isinstance(cell, Interval) else cell
        for column, cell in zip(table.columns, row, strict=True)
    }


def _plain(value: object) -> object:
    """Nested containers of plain JSON values, numpy numbers and nan included."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    value = _python(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_text(rows: Iterable[Sequence[Cell]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow(map(_csv_cell, row))
    return buffer.getvalue()


def _csv_cell(cell: Cell) -> Cell:
    if isinstance(cell, str):
        return printable(cell)
    return None if isinstance(cell, float) and math.isnan(cell) else cell

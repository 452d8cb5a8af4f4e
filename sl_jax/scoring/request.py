"""Renders groups into requests, and reads the geometry of a request back.

Everything that says where something is shown is text in the request itself (`legend` lines), so
that a vision-language model and the embedded judge have the same knowledge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from sl_jax import imaging
from sl_jax.scoring.rubric import Prompts, candidate_schema, grid_schema
from sl_jax.scoring.types import Group, JudgeRequest

Layout = Literal["sheet", "separate"]
Rgb = UInt8[np.ndarray, "height width 3"]
Stack = UInt8[np.ndarray, "layers height width 4"]

_LABEL = 14
_GAP = 4
_TILE_GAP = 2
_SQUARE = 8
_SMALLEST = 16  # less shows nothing


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How pictures are laid out for the judge.

    Attributes:
      layout: "sheet", stage 1 as one contact sheet; "separate", as 2 + 3·L pictures.
      picture_size: longest side in pixels of each picture of stage 1; larger ones are shrunk,
        smaller ones are left alone; None shrinks nothing.
      tile_size: the same for each picture inside a cell of the grid of stage 2.
    """

    layout: Layout = "sheet"
    picture_size: int | None = 384
    tile_size: int | None = 128

    def __post_init__(self) -> None:
        if self.layout not in ("sheet", "separate"):
            raise ValueError(f'layout {self.layout!r}: please choose "sheet" or "separate"')
        for name in ("picture_size", "tile_size"):
            longest = getattr(self, name)
            if longest is not None and longest < _SMALLEST:
                raise ValueError(
                    f"{name} is {longest}: please choose at least {_SMALLEST} pixels, or None"
                )


class Shuffle(NamedTuple):
    """One arrangement of the grid.

    Attributes:
      places: the candidate at each place, row by row.
      labels: the label drawn at each place.
    """

    places: Int[np.ndarray, " shown"]
    labels: tuple[str, ...]


def shuffle(shown: Sequence[int], seed: int, group_id: str, grid: int) -> Shuffle:
    """Places and labels of the candidates in grid number `grid`, drawn independently.

    Determined by its arguments alone, on every machine.
    """
    name = f"{seed}/{grid}/{group_id}".encode()
    draw = np.random.default_rng(
        np.frombuffer(hashlib.sha256(name).digest(), np.uint32).astype(np.uint64)
    )
    places = np.asarray(shown)[draw.permutation(len(shown))]
    labels = draw.permutation(len(shown))
    return Shuffle(places, tuple(label_of(int(index)) for index in labels))


def label_of(index: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def candidate_request(
    source: Rgb,
    layers: Stack,
    prompts: Prompts,
    config: RenderConfig,
    caption: str = "",
) -> JudgeRequest:
    """Stage 1: source, recomposition, each layer on white, on a checkerboard, and its alpha."""
    views = _views(source, layers, config.picture_size)
    names = _names(len(layers))
    prompt = prompts.fill_candidate(len(layers), caption)
    if config.layout == "separate":
        shown = [
            part for name, view in zip(names, views, strict=True) for part in (f"{name}:", view)
        ]
        return JudgeRequest(1, (prompt, *shown), candidate_schema())
    blank = np.full_like(views[0], 240)
    cells = [*views[:2], blank, *views[2:]]
    drawn = ["source", "recomposed", "", *map(_drawn, names[2:])]
    sheet = imaging.contact_sheet(cells, 3, drawn, label_height=_LABEL, gap=_GAP)
    listed = [*names[:2], "(empty)", *names[2:]]
    legend = _sheet_legend("contact sheet", blank.shape, 3, listed)
    return JudgeRequest(1, (prompt, legend, sheet), candidate_schema())


def grid_request(
    group: Group,
    arrangement: Shuffle,
    stage1: Float[np.ndarray, " g"] | None,
    prompts: Prompts,
    config: RenderConfig,
) -> JudgeRequest:
    """Stage 2: the arranged candidates in one labelled grid, with stage-1 scores (0…1) or not."""
    cells = [
        _grid_cell(group.source, group.candidates[index], config.tile_size)
        for index in arrangement.places
    ]
    count = len(group.candidates[0])
    tile = _shrunk(*group.source.shape[:2], config.tile_size)
    columns = _grid_columns(len(cells), cells[0].shape)
    grid = imaging.contact_sheet(cells, columns, arrangement.labels, label_height=_LABEL, gap=_GAP)
    legend = _sheet_legend("grid", cells[0].shape, columns, arrangement.labels) + (
        f" In each cell, {count + 1} by 2 pictures of {tile[1]} wide and {tile[0]} high, "
        f"{_TILE_GAP} apart: upper row: recomposition, layers 1 to {count} on a checkerboard of "
        f"{_SQUARE} pixel squares; lower row: source, alpha of layers 1 to {count}."
    )
    scores = {
        label: None if stage1 is None else 10 * float(stage1[index])
        for label, index in zip(arrangement.labels, arrangement.places, strict=True)
    }
    labels = _alphabetical(arrangement.labels)
    context = [(label, scores[label]) for label in labels]
    prompt = prompts.fill_grid(count, group.caption, context)
    return JudgeRequest(2, (prompt, legend, grid), grid_schema(labels))


def _alphabetical(labels: Sequence[str]) -> list[str]:
    return sorted(labels, key=lambda label: (len(label), label))


def _grid_columns(count: int, cell: tuple[int, ...]) -> int:
    """Columns that bring the sheet nearest to a square."""
    height, width = cell[:2]
    shapes = {
        columns: -(-count // columns) * (height + _LABEL) / (columns * width)
        for columns in range(1, count + 1)
    }
    return min(shapes, key=lambda columns: abs(np.log(shapes[columns])))


def _sheet_legend(kind: str, cell: tuple[int, ...], columns: int, names: Sequence[str]) -> str:
    return (
        f"The picture is a {kind}. Cells: {cell[1]} wide, {cell[0]} high, in {columns} columns, "
        f"label strips of {_LABEL}, gaps of {_GAP}. Row by row: {' | '.join(names)}."
    )


def _names(count: int) -> list[str]:
    kinds = ("on white", "on checkerboard", "alpha")
    layers = [f"layer {i + 1} of {count} {kind}" for i in range(count) for kind in kinds]
    return ["source", "recomposition", *layers]


def _drawn(name: str) -> str:
    """The short form of a name that fits above a small cell: "1 white"."""
    words = name.split()
    return f"{words[1]} {words[-1][:5]}"


def _shrunk(height: int, width: int, longest: int | None) -> tuple[int, int]:
    if longest is None or max(height, width) <= longest:
        return height, width
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(picture: UInt8[np.ndarray, "h w c"], longest: int | None) -> UInt8[np.ndarray, "i j c"]:
    """Shrinks RGB or straight RGBA (Pillow weights colours by alpha); never enlarges."""
    size = _shrunk(*picture.shape[:2], longest)
    if size == picture.shape[:2]:
        return picture
    resized = Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(resized)


def _alpha_picture(layers: UInt8[np.ndarray, "... 4"]) -> UInt8[np.ndarray, "... 3"]:
    return np.repeat(layers[..., 3:], 3, axis=-1)


def _views(source: Rgb, layers: Stack, longest: int | None) -> list[Rgb]:
    together = _resize(imaging.recompose(layers), longest)
    small = np.stack([_resize(layer, longest) for layer in layers])
    triples = zip(
        imaging.flatten(small),
        imaging.on_checkerboard(small, _SQUARE),
        _alpha_picture(small),
        strict=True,
    )
    return [_resize(source, longest), together, *(view for triple in triples for view in triple)]


def _grid_cell(source: Rgb, layers: Stack, longest: int | None) -> Rgb:
    small = np.stack([_resize(layer, longest) for layer in layers])
    upper = [_resize(imaging.recompose(layers), longest), *imaging.on_checkerboard(small, _SQUARE)]
    lower = [_resize(source, longest), *_alpha_picture(small)]
    return imaging.contact_sheet([*upper, *lower], len(upper), gap=_TILE_GAP)


# Reading back ------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A candidate as its pictures show it, floats in 0…1.

    Attributes:
      source, recomposition: [H, W, 3].
      color: premultiplied colours of the layers, [L, H, W, 3], back to front.
      alpha: [L, H, W].
    """

    source: Float[np.ndarray, "height width 3"]
    recomposition: Float[np.ndarray, "height width 3"]
    color: Float[np.ndarray, "layers height width 3"]
    alpha: Float[np.ndarray, "layers height width"]


# Numbers of a few digits, and few letters between: others' texts are searched in linear time.
_SHEET = re.compile(
    r"The picture is a (?:contact sheet|grid)\. Cells: (\d{1,6}) wide, (\d{1,6}) high, "
    r"in (\d{1,6}) columns, label strips of (\d{1,6}), gaps of (\d{1,6})\. Row by row: ([^.]*)\."
)
_GRID = re.compile(r"The picture is a grid\. Cells: ")
_CELL = re.compile(
    r"In each cell, (\d{1,6}) by 2 pictures of (\d{1,6}) wide and (\d{1,6}) high, "
    r"(\d{1,6}) apart: .{0,100}on a checkerboard of (\d{1,6}) pixel squares"
)
_NAMED = re.compile(r"[A-Z]{1,3}")  # as `label_of` does
_MOST_CANDIDATES = 256


class UnreadableRequestError(ValueError):
    """A request whose legend or pictures are not those of this module."""


def request_of(parts: Sequence[str | Rgb], sample: int = 0) -> JudgeRequest:
    """The request that shows these parts, as a server receives them: its legend says which.

    What has no legend, and names no source, is of stage 0: a question about something else.

    Raises:
      UnreadableRequestError: a grid without exactly one legend and one picture.
    """
    shown = tuple(parts)
    request = JudgeRequest(1, shown, candidate_schema(), sample=sample)
    texts = [part for part in shown if isinstance(part, str)]
    named = any(text.rstrip(":") == "source" for text in texts)
    if not named and not any(_SHEET.search(text) for text in texts):
        return dataclasses.replace(request, stage=0, schema={})
    if not any(_GRID.search(text) for text in texts):
        return request
    legend, _ = _legend_and_picture(request)
    _, labels = _geometry(legend)
    if len(labels) > _MOST_CANDIDATES or not all(map(_NAMED.fullmatch, labels)):
        raise UnreadableRequestError(
            f"the grid's candidates are not called A, B, …, or are more than {_MOST_CANDIDATES}"
        )
    return JudgeRequest(2, shown, grid_schema(_alphabetical(labels)), sample=sample)


def read_candidate(request: JudgeRequest) -> Seen:
    """Recovers source, recomposition and layers from the pictures of a stage-1 request.

    The premultiplied colour follows from the rendering on white, W = c·a + (1 − a), and from the
    picture of the alpha.
    """
    pictures = _named_pictures(request)
    count = sum(name.endswith(" alpha") for name in pictures)
    try:
        white, alpha = (
            imaging.to_unit(
                np.stack([pictures[f"layer {i + 1} of {count} {kind}"] for i in range(count)])
            )
            for kind in ("on white", "alpha")
        )
        source, recomposition = pictures["source"], pictures["recomposition"]
    except (KeyError, ValueError) as error:
        raise UnreadableRequestError(f"stage-1 request lacks a picture: {error}") from error
    sizes = {picture.shape[:2] for picture in (source, recomposition, white[0])}
    if len(sizes) > 1:
        raise UnreadableRequestError(f"the pictures of a candidate have the sizes {sorted(sizes)}")
    alpha = alpha[..., 0]
    color = np.clip(white - (1 - alpha[..., None]), 0.0, alpha[..., None])
    return Seen(imaging.to_unit(source), imaging.to_unit(recomposition), color, alpha)


def read_grid(request: JudgeRequest) -> tuple[tuple[str, ...], tuple[Seen, ...]]:
    """Recovers labels and candidates, by place, from the picture of a stage-2 request."""
    legend, sheet = _legend_and_picture(request)
    geometry, labels = _geometry(legend)
    cell = _CELL.search(legend)
    if cell is None:
        raise UnreadableRequestError("the grid's legend does not say what its cells hold")
    columns, width, height, gap, square = map(int, cell.groups())
    if columns < 2 or not width or not height or not square:
        raise UnreadableRequestError("the cells of the grid show no layers")
    tiles = imaging.SheetGeometry(height, width, columns, 2 * columns, label=0, gap=gap)
    if sheet.shape[:2] != geometry.size or tiles.size != (geometry.height, geometry.width):
        raise UnreadableRequestError(f"a grid of {sheet.shape} does not fit its legend")
    cells = [geometry.cut(sheet, index) for index in range(len(labels))]
    return labels, tuple(_read_cell(cell, tiles, square) for cell in cells)


def _read_cell(cell: Rgb, tiles: imaging.SheetGeometry, square: int) -> Seen:
    count = tiles.columns - 1
    views = imaging.to_unit(np.stack([tiles.cut(cell, i) for i in range(tiles.count)]))
    alpha = views[count + 2 :, ..., 0]
    board = imaging.to_unit(imaging.checkerboard(tiles.height, tiles.width, square))
    color = views[1 : count + 1] - board * (1 - alpha[..., None])
    color = np.clip(color, 0.0, alpha[..., None])
    return Seen(views[count + 1], views[0], color, alpha)


def _named_pictures(request: JudgeRequest) -> dict[str, Rgb]:
    if any(isinstance(part, str) and _SHEET.search(part) for part in request.parts):
        legend, sheet = _legend_and_picture(request)
        geometry, names = _geometry(legend)
        if sheet.shape[:2] != geometry.size:
            raise UnreadableRequestError(f"a sheet of {sheet.shape} does not fit its legend")
        return {name: geometry.cut(sheet, index) for index, name in enumerate(names)}
    parts = request.parts
    return {
        text.rstrip(":"): picture
        for text, picture in itertools.pairwise(parts)
        if isinstance(text, str) and not isinstance(picture, str)
    }


def _legend_and_picture(request: JudgeRequest) -> tuple[str, Rgb]:
    texts = [p for p in request.parts if isinstance(p, str) and _SHEET.search(p)]
    pictures = [p for p in request.parts if not isinstance(p, str)]
    if len(texts) != 1 or len(pictures) != 1:
        raise UnreadableRequestError(
            f"{len(texts)} legends and {len(pictures)} pictures, where one of each is expected"
        )
    return texts[0], pictures[0]


def _geometry(legend: str) -> tuple[imaging.SheetGeometry, tuple[str, ...]]:
    match = _SHEET.search(legend)
    width, height, columns, label, gap = map(int, match.groups()[:5])
    names = tuple(match.group(6).split(" | "))
    if not width or not height or not columns:
        raise UnreadableRequestError("the cells of the legend show nothing")
    return imaging.SheetGeometry(height, width, columns, len(names), label, gap), names

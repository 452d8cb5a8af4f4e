"""Contact sheets: equal cells in rows, each under a drawn label."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_PAPER = 240
_INK = 16


@dataclasses.dataclass(frozen=True)
class SheetGeometry:
    """Where the cells of a contact sheet lie.

    A sheet starts with a margin of `gap` pixels; every cell is `label` pixels of label strip over
    `height` × `width` pixels of picture; `gap` pixels lie between neighbours and at the edges.

    Attributes:
      height: height of a cell's picture, in pixels.
      width: width of a cell's picture, in pixels.
      columns: cells in a row.
      count: cells on the sheet.
      label: height of the label strip over every cell; 0 for none.
      gap: pixels between cells and around them.
    """

    height: int
    width: int
    columns: int
    count: int
    label: int = 14
    gap: int = 4

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return -(-self.count // self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole sheet, in pixels."""
        columns = min(self.columns, self.count)
        return (
            self.gap + self.rows * (self.label + self.height + self.gap),
            self.gap + columns * (self.width + self.gap),
        )

    def origin(self, index: int) -> tuple[int, int]:
        """Top and left of the picture (below its label) of cell `index`, counted row by row."""
        row, column = divmod(index, self.columns)
        top = self.gap + row * (self.label + self.height + self.gap) + self.label
        return top, self.gap + column * (self.width + self.gap)

    def cut(self, sheet: UInt8[np.ndarray, "h w 3"], index: int) -> UInt8[np.ndarray, "ch cw 3"]:
        """The picture of cell `index`, as a view into the sheet."""
        top, left = self.origin(index)
        return sheet[top : top + self.height, left : left + self.width]


@functools.lru_cache(maxsize=4096)
def _label_strip(text: str, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    strip = Image.new("L", (width, height), _PAPER)
    font = ImageFont.load_default(size=max(6, height - 4))
    ImageDraw.Draw(strip).text((1, 0), text, fill=_INK, font=font)
    pixels = np.repeat(np.asarray(strip)[..., None], 3, axis=-1)
    pixels.flags.writeable = False
    return pixels


def contact_sheet(
    cells: Sequence[UInt8[np.ndarray, "height width 3"]],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    label_height: int = 14,
    gap: int = 4,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Lays pictures of one size out in rows on light paper, each under its label.

    Args:
      cells: at least one RGB picture; all of the same height and width.
      columns: cells in a row.
      labels: one short text per cell (Pillow's built-in font; cut off at the cell's width), or
        None for a sheet without label strips.
      label_height: height of the label strips in pixels.
      gap: pixels between cells and around them.

    Returns:
      The sheet; `sheet_geometry` of the same arguments says where the cells lie.

    Raises:
      ValueError: no cells, cells of different shapes, or not one label per cell.
    """
    geometry = sheet_geometry(cells, columns, labels, label_height=label_height, gap=gap)
    sheet = np.full((*geometry.size, 3), _PAPER, np.uint8)
    for index, cell in enumerate(cells):
        geometry.cut(sheet, index)[...] = cell
        if geometry.label:
            top, left = geometry.origin(index)
            strip = _label_strip(labels[index], geometry.label, geometry.width)
            sheet[top - geometry.label : top, left : left + geometry.width] = strip
    return sheet


def sheet_geometry(
    cells: Sequence[UInt8[np.ndarray, "height width 3"]],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    label_height: int = 14,
    gap: int = 4,
) -> SheetGeometry:
    """The geometry of the sheet that `contact_sheet` makes of the same arguments."""
    if not cells or columns < 1:
        raise ValueError("a contact sheet needs at least one cell and one column")
    shapes = {cell.shape for cell in cells}
    if len(shapes) != 1 or cells[0].ndim != 3 or cells[0].shape[-1] != 3:
        raise ValueError(f"cells of shapes {sorted(shapes)}: please pass RGB cells of one size")
    if labels is not None and len(labels) != len(cells):
        raise ValueError(f"{len(labels)} labels for {len(cells)} cells: please pass one for each")
    return SheetGeometry(
        height=cells[0].shape[0],
        width=cells[0].shape[1],
        columns=columns,
        count=len(cells),
        label=0 if labels is None else label_height,
        gap=gap,
    )

"""Crello (cyberagent/crello, revision 5.1): designs with true layers, as a TFDS dataset.

The public parquet files hold one design a row: the size of its canvas, and for each element, back
to front, its picture, already drawn, and where it goes: `left`, `top`, `width` and `height` in
canvas pixels, `angle` in degrees about the element's centre, `opacity`. Here each element becomes
a layer as large as the canvas. Drawing follows the dataset's public renderer without its fonts:
texts, too, are taken as the pictures that the dataset has of them.

The dataset is made once (`prepare_crello`) and read back without TensorFlow.
"""

from __future__ import annotations

import collections
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from sl_jax import imaging
from sl_jax.data._walk import Skipped
from sl_jax.data.canvas import Element, as_stack, content_hash, place
from sl_jax.data.folder import FolderError
from sl_jax.data.pictures import shown

_log = logging.getLogger(__name__)

HUB_ID = "cyberagent/crello"
REVISION = "5.1.0"
SPLITS = ("train", "validation", "test")

_FACTS = "designs.json"
_SCALARS = ("id", "canvas_width", "canvas_height")
_GEOMETRY = ("left", "top", "width", "height", "angle", "opacity")
_COLUMNS = (*_SCALARS, "title", *_GEOMETRY, "image")
_ROWS = 16  # read at a time
_WANTED = (
    f"please give the parquet files of {HUB_ID}, revision {REVISION}: its hub id, or a folder, "
    "local or remote, with train-*.parquet, validation-*.parquet and test-*.parquet"
)
_SPLIT_FILE = re.compile(r"(train|validation|test)-.*\.parquet")


class Facts(NamedTuple):
    """What is known of a design without reading it.

    Attributes:
      name: its id.
      title: serves as caption.
      content_hash: of its layers, see `canvas.content_hash`.
      height, width: of its layers in pixels.
      layers: their number.
    """

    name: str
    title: str
    content_hash: str
    height: int
    width: int
    layers: int


class Designs(NamedTuple):
    """One split: its designs by position, and what was left out when it was made."""

    used: tuple[Facts, ...]
    skipped: tuple[Skipped, ...]


class RowError(ValueError):
    """A design that cannot be composed; the message says why."""


class Crello(tfds.core.GeneratorBasedBuilder):
    """Designs of Crello with their layers.

    Features: `id`; `title`, which serves as caption; `image`, the design, RGB; `layers`, straight
    RGBA, back to front, the background first (see `canvas.as_stack`), as many as there are.
    """

    VERSION = tfds.core.Version(REVISION)

    def __init__(self, *, source: str = HUB_ID, side: int = 1024, **kwargs: Any):
        """A builder.

        Args:
          source: hub id, or folder of the parquet files, local or remote.
          side: longest side of the layers in pixels; larger canvases are reduced to it.
          kwargs: of every TFDS builder, `data_dir` among them.
        """
        self._source = source
        self._side = side
        self.designs: dict[str, tuple[list[Facts], list[Skipped]]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        picture = {"encoding_format": "png"}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Designs of Crello, each element as a layer as large as the canvas.",
            homepage=f"https://huggingface.co/datasets/{HUB_ID}",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "title": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3), **picture),
                    "layers": tfds.features.Sequence(
                        tfds.features.Image(shape=(None, None, 4), **picture)
                    ),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        return {
            split: self._generate_examples(split, files)
            for split, files in parquet_files(self._source).items()
        }

    def _generate_examples(
        self, split: str, files: Sequence[epath.Path]
    ) -> Iterator[tuple[int, Any]]:
        used, skipped = self.designs[split] = [], []
        for name, result in _in_threads(files, self._side):
            if isinstance(result, RowError):
                _log.warning("Crello design %s of %s is left out: %s", name, split, result)
                skipped.append(Skipped(name, str(result)))
            else:
                example, facts = result
                used.append(facts)
                yield len(used) - 1, example


def prepare_crello(
    source: str = HUB_ID, data_dir: str | os.PathLike[str] | None = None, side: int = 1024
) -> epath.Path:
    """Makes the dataset, if it is not there yet.

    Args:
      source: hub id (downloaded with the hub client's own cache and token), or folder of the
        parquet files, local or remote.
      data_dir: TFDS's folder of datasets; TFDS's own default.
      side: longest side of the layers.

    Returns:
      The folder of the made dataset, which `tfds.builder_from_directory` opens.

    Raises:
      FolderError: the source is missing or damaged, or is another revision.
    """
    directory = None if data_dir is None else os.fspath(data_dir)
    builder = Crello(source=source, side=side, data_dir=directory, file_format="array_record")
    folder = epath.Path(builder.data_dir)
    if not (folder / "dataset_info.json").exists():
        _log.info("Making the dataset of %s in %s.", source, folder)
        builder.download_and_prepare()
        (folder / _FACTS).write_text(json.dumps(builder.designs))
    return folder


def designs(folder: epath.PathLike, split: str) -> Designs:
    """The designs of a split of the made dataset in `folder`.

    Raises:
      FolderError: the dataset was not made whole.
    """
    path = epath.Path(folder) / _FACTS
    try:
        used, skipped = json.loads(path.read_text())[split]
        return Designs(tuple(Facts(*one) for one in used), tuple(Skipped(*one) for one in skipped))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FolderError(
            f"{shown(folder)} is not whole: {_FACTS} is missing or damaged; please delete the "
            "folder, so that it is made again"
        ) from error


def parquet_files(source: str | os.PathLike[str]) -> dict[str, list[epath.Path]]:
    """The parquet files of each split that there is.

    Args:
      source: as for `prepare_crello`; files may lie in the folder or in its `data`.

    Raises:
      FolderError: there are none.
    """
    folder = epath.Path(source).expanduser()
    if not folder.is_dir():
        text = os.fspath(source)
        if "://" in text or text.startswith(("/", ".", "~")) or text.count("/") != 1:
            raise FolderError(f"no folder {shown(text)}; {_WANTED}")
        folder = _downloaded(text)
    for place_ in (folder, folder / "data"):
        found = [path for path in place_.iterdir()] if place_.is_dir() else []
        splits = {
            split: sorted(
                p for p in found if (m := _SPLIT_FILE.fullmatch(p.name)) and m[1] == split
            )
            for split in SPLITS
        }
        if any(splits.values()):
            return {split: files for split, files in splits.items() if files}
    raise FolderError(f"no parquet file of a split in {shown(folder)}; {_WANTED}")


def compose(row: Mapping[str, Any], side: int) -> UInt8[np.ndarray, "layers height width 4"]:
    """The layers of one row of the parquet files.

    Args:
      row: the columns `canvas_width`, `canvas_height`, and a list each of `left`, `top`, `width`,
        `height`, `angle`, `opacity` and `image` (encoded, as {"bytes": …}).
      side: longest side of the layers; smaller canvases keep their size.

    Returns:
      uint8 [L, h, w, 4], straight RGBA, back to front, the background first.

    Raises:
      RowError: a value is missing or makes no sense, or a picture cannot be read.
    """
    canvas = _positive(row, "canvas_height"), _positive(row, "canvas_width")
    scale = min(1.0, side / max(canvas))
    size = max(round(canvas[0] * scale), 1), max(round(canvas[1] * scale), 1)
    lengths = {name: len(row[name] or ()) for name in (*_GEOMETRY, "image")}
    if len(set(lengths.values())) != 1:
        raise RowError(f"its lists differ in length: {lengths}")
    layers = []
    for number in range(lengths["image"]):
        geometry = {name: row[name][number] for name in _GEOMETRY}
        if any(value is None or not math.isfinite(value) for value in geometry.values()):
            raise RowError(f"element {number} has no position: {geometry}")
        if geometry["width"] > 0 and geometry["height"] > 0 and geometry["opacity"] > 0:
            picture = _picture(row["image"][number], number)
            layers.append(place(Element(picture, **geometry), canvas, size))
    return as_stack(layers, size)


def _positive(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or not 0 < value < 100_000:
        raise RowError(f"{name} is {value!r}")
    return value


def _picture(entry: Mapping[str, Any] | None, number: int) -> UInt8[np.ndarray, "h w 4"]:
    content = (entry or {}).get("bytes")
    if not content:
        raise RowError(f"element {number} has no picture")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            return np.array(image.convert("RGBA"))
    except UnidentifiedImageError as error:
        raise RowError(f"the picture of element {number} is no PNG, JPEG or WebP") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowError(f"the picture of element {number} cannot be read: {error}") from error


_Made = tuple[dict[str, Any], Facts] | RowError


def _in_threads(files: Sequence[epath.Path], side: int) -> Iterator[tuple[str, _Made]]:
    """(id, example) of every row, in order, composed by all cores, few at a time in memory."""
    workers = min(os.cpu_count() or 1, 32)
    waiting: collections.deque[tuple[str, Future[_Made]]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for row in _rows(files):
            waiting.append((str(row["id"]), pool.submit(_example, row, side)))
            while len(waiting) > 2 * workers:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()


def _example(row: Mapping[str, Any], side: int) -> _Made:
    try:
        layers = compose(row, side)
    except RowError as error:
        return error
    name, title = str(row["id"]), str(row.get("title") or "")
    example = {
        "id": name,
        "title": title,
        "image": _encoded(imaging.recompose(layers)),
        "layers": [_encoded(layer) for layer in layers],
    }
    return example, Facts(name, title, content_hash(layers), *layers.shape[1:3], len(layers))


def _encoded(pixels: np.ndarray) -> io.BytesIO:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return io.BytesIO(content.getvalue())


def _rows(files: Sequence[epath.Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        try:
            with path.open("rb") as file:
                table = pq.ParquetFile(file)
                columns = _checked_columns(table.schema_arrow, path)
                for batch in table.iter_batches(_ROWS, columns=columns):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise FolderError(
                f"{shown(path)} is no whole parquet file ({error}); please download it again"
            ) from error


def _checked_columns(schema: pa.Schema, path: epath.Path) -> list[str]:
    """The columns to read, if they mean what they do in this revision."""
    missing = set(_COLUMNS) - {"title"} - set(schema.names)
    if missing:
        raise FolderError(f"{shown(path)} has no columns {sorted(missing)}; {_WANTED}")
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    width = told.get("info", {}).get("features", {}).get("canvas_width", {})
    # Earlier revisions number the canvas sizes that occur, and give positions as shares of them.
    if width.get("_type") == "ClassLabel":
        raise FolderError(f"{shown(path)} is of a revision before 5; {_WANTED}")
    return [name for name in _COLUMNS if name in schema.names]


def _downloaded(name: str) -> epath.Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = REVISION if name == HUB_ID else None
    try:
        return epath.Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns="data/*.parquet"
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise FolderError(
            f"{name} cannot be downloaded from the hub ({reason}); {_WANTED}"
        ) from error

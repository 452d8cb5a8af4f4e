"""What an evaluation looks at: pictures, designs with their true layers, procedural designs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sl_jax import imaging
from sl_jax.checkpoints.disk import inside_name
from sl_jax.data import FolderError, Skipped, make_buckets
from sl_jax.data.canvas import merge_to
from sl_jax.data.paired import PairedDesign, is_paired, open_paired
from sl_jax.data.pictures import (
    PictureError,
    fetch_file,
    longest_side_size,
    picture_size,
    resize_to,
)
from sl_jax.data.procedural import FAMILIES, MAX_LAYERS, make_design
from sl_jax.data.tfds_pictures import Named, open_record, parse_named, scan_tfds
from sl_jax.data.threads import in_threads
from sl_jax.eval.options import EvaluationError
from sl_jax.eval.stacks import LIMITS, StackError, check_alpha
from sl_jax.inference.folder import Entry, find_pictures

PROCEDURAL = "procedural"
MOST_LAYERS = 8  # which `sft` merges to as well
_PROCEDURAL_WANTED = (
    "please write procedural:FAMILY:COUNT[:LAYERS[:SIZE[:FIRST]]], such as procedural:B:256:3,4:64"
)


class Sample(NamedTuple):
    """A picture in memory.

    Attributes:
      source: what every system is shown.
      reference: its true layers, straight RGBA, back to front; None if they are not known.
    """

    source: UInt8[np.ndarray, "h w 3"]
    reference: UInt8[np.ndarray, "l h w 4"] | None


@dataclass(frozen=True)
class EvalPicture:
    """One picture of an evaluation.

    Attributes:
      index: its place, counted from 0; added to the sampler's seed.
      name: unique; folders and tables call it so.
      size: (height, width) at which it is decomposed.
      original: (height, width) as it is stored.
      layers: number of its true layers; None if they are not known.
      digest: changes with its content, name, size and number of layers.
      open: reads it. Raises `PictureError` if that is no longer possible.
      merged: its true layers are fewer than the design has, neighbours having become one.
    """

    index: int
    name: str
    size: tuple[int, int]
    original: tuple[int, int]
    layers: int | None
    digest: str
    open: Callable[[], Sample]
    merged: bool = False


@dataclass(frozen=True)
class EvalData:
    """The pictures of an evaluation, and what was left out, each with its reason."""

    where: str
    pictures: tuple[EvalPicture, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def has_references(self) -> bool:
        """Whether true layers are known; a kind of data has them for all or for none."""
        return self.pictures[0].layers is not None

    @property
    def merged(self) -> int:
        """Number of designs whose true layers were merged."""
        return sum(picture.merged for picture in self.pictures)

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Numbers of true layers that occur, ascending."""
        return tuple(sorted({p.layers for p in self.pictures if p.layers is not None}))


def open_data(
    where: str, side: int | None = None, limit: int | None = None, max_layers: int = MOST_LAYERS
) -> EvalData:
    """Finds the pictures to evaluate on.

    Args:
      where: `procedural:FAMILY:COUNT[:LAYERS[:SIZE[:FIRST]]]`, where LAYERS are one or more
        numbers to take in turn (3), SIZE the side in pixels (64), and FIRST the first seed (0);
        designs with layers as `data.paired.open_paired` finds them: a folder of designs
        NAME/0000.png, … (LayerD layout), Photoshop documents, `crello#SPLIT`; or a picture, a
        folder of pictures, a pattern, or `tfds:NAME#SPLIT`.
      side: pixels of the longest side, sides being multiples of 16; None keeps the pictures' own
        size.
      limit: take the first so many.
      max_layers: of designs with more true layers neighbours are merged, see `canvas.merge_to`;
        procedural ones have as many as they are asked for.

    Raises:
      FolderError: there is nothing to evaluate on.
      EvaluationError: a procedural specification is wrong.
    """
    if where.partition(":")[0] == PROCEDURAL:
        data = _procedural(where, side)
    elif is_paired(where):
        data = _paired(where, side, max_layers)
    elif named := parse_named(where):
        data = _dataset(named, side)
    else:
        data = _flat(where, side)
    return dataclasses.replace(data, pictures=data.pictures[:limit]) if limit else data


def own_side(where: str) -> int | None:
    """The side that a procedural specification names; None for other data."""
    return _parsed(where).size if where.partition(":")[0] == PROCEDURAL else None


class _Designs(NamedTuple):
    family: str
    count: int
    layers: tuple[int, ...]
    size: int
    first: int


def _parsed(where: str) -> _Designs:
    parts = where.split(":")[1:]
    family, *rest = [*parts, *("", "0", "3", "64", "0")[len(parts) :]]
    try:
        count, layers, size, first = rest
        found = _Designs(
            family, int(count), tuple(map(int, layers.split(","))), int(size), int(first)
        )
    except ValueError as error:
        raise EvaluationError(f"data {where!r}: {error}; {_PROCEDURAL_WANTED}") from error
    for wrong, text in (
        (family not in FAMILIES, f"families are {', '.join(sorted(FAMILIES))}"),
        (found.count < 1, "COUNT is 1 or more"),
        (min(found.layers) < 1 or max(found.layers) > MAX_LAYERS, f"LAYERS are 1 to {MAX_LAYERS}"),
        (found.size < 16, "SIZE is 16 or more"),
        (found.first < 0, "FIRST is 0 or more"),
    ):
        if wrong:
            raise EvaluationError(f"data {where!r}: {text}; {_PROCEDURAL_WANTED}")
    return found


def _procedural(where: str, side: int | None) -> EvalData:
    designs = _parsed(where)
    size = _frame(designs.size, designs.size, side)
    pictures = []
    for index in range(designs.count):
        layers = designs.layers[index % len(designs.layers)]
        seed = designs.first + index
        pictures.append(
            EvalPicture(
                index=index,
                name=f"{designs.family}-{seed:06d}",
                size=size,
                original=(designs.size, designs.size),
                layers=layers,
                digest=_digest(designs.family, seed, designs.size, layers, size),
                open=functools.partial(
                    _open_procedural, designs.family, seed, designs.size, layers, size
                ),
            )
        )
    return EvalData(where, tuple(pictures))


def _open_procedural(
    family: str, seed: int, own: int, layers: int, size: tuple[int, int]
) -> Sample:
    return _with_reference(make_design(family, seed, own, layers).layers, size)


def _paired(where: str, side: int | None, most: int) -> EvalData:
    found = open_paired(where, limits=LIMITS)
    skipped, designs = list(found.skipped), []
    checked = in_threads(lambda design: _opaque_layer(design.files), found, "designs")
    for design, problem in zip(found, checked, strict=True):
        if problem:
            skipped.append(Skipped(design.name, problem))
        else:
            designs.append(design)
    if not designs:
        raise FolderError(f"no usable design in {where}: {skipped[0].name}: {skipped[0].reason}")
    pictures = []
    for index, design in enumerate(designs):
        size = _frame(design.height, design.width, side)
        pictures.append(
            EvalPicture(
                index=index,
                name=inside_name(design.name),
                size=size,
                original=(design.height, design.width),
                layers=min(design.layers, most),
                digest=_digest(design.name, design.content_hash, size, min(design.layers, most)),
                open=functools.partial(_open_paired, design, most, size),
                merged=design.layers > most,
            )
        )
    return EvalData(where, tuple(pictures), tuple(skipped))


def _open_paired(design: PairedDesign, most: int, size: tuple[int, int]) -> Sample:
    return _with_reference(merge_to(design.read(), most), size)


def _opaque_layer(paths: Sequence[str]) -> str:
    """Why the layers above the background cannot be used; "" if they can."""
    try:
        for path in paths[1:]:
            check_alpha(path)
    except StackError as error:
        return str(error)
    return ""


def _with_reference(layers: np.ndarray, size: tuple[int, int]) -> Sample:
    """True layers at a size, and the picture that they are together at that size."""
    reference = np.stack([resize_to(layer, size) for layer in layers])
    return Sample(imaging.recompose(reference), reference)


def _dataset(named: Named, side: int | None) -> EvalData:
    """The images of a TFDS split, named by their places in it."""
    found = scan_tfds(
        str(named), make_buckets([(16, 16)]), limits=LIMITS
    )  # their shape is not used
    pictures = []
    for index, record in enumerate(found):
        size = _frame(record.height, record.width, side)
        dataset, _, place = record.path.partition(":")[2].rpartition("@")
        pictures.append(
            EvalPicture(
                index=index,
                name=f"{re.sub('[^A-Za-z0-9.-]', '_', dataset)}-{int(place):06d}",
                size=size,
                original=(record.height, record.width),
                layers=None,
                digest=_digest(record.path, record.content_hash, size),
                open=functools.partial(_open_flat, record.path, size),
            )
        )
    return EvalData(str(named), tuple(pictures), tuple(found.skipped))


def _flat(where: str, side: int | None) -> EvalData:
    entries = find_pictures(where)
    found = in_threads(_inspected, entries, "pictures")
    pictures, skipped = [], []
    for entry, result in zip(entries, found, strict=True):
        if isinstance(result, Skipped):
            skipped.append(result)
            continue
        (height, width), content = result
        size = _frame(height, width, side)
        pictures.append(
            EvalPicture(
                index=len(pictures),
                name=entry.name,
                size=size,
                original=(height, width),
                layers=None,
                digest=_digest(entry.name, content, size),
                open=functools.partial(_open_flat, entry.path, size),
            )
        )
    if not pictures:
        raise FolderError(f"no usable picture in {where}: {skipped[0].name}: {skipped[0].reason}")
    return EvalData(where, tuple(pictures), tuple(skipped))


def _inspected(entry: Entry) -> tuple[tuple[int, int], str] | Skipped:
    try:
        file = fetch_file(entry.path, LIMITS)
        return picture_size(file, LIMITS, decode=True), file.sha256
    except PictureError as error:
        return Skipped(entry.path.name, error.reason)


def _open_flat(path: os.PathLike[str], size: tuple[int, int]) -> Sample:
    return Sample(resize_to(open_record(os.fspath(path), LIMITS), size), None)


def _frame(height: int, width: int, side: int | None) -> tuple[int, int]:
    return (height, width) if side is None else longest_side_size(height, width, side)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def grouped(
    pictures: Sequence[EvalPicture], key: Callable[[EvalPicture], object], batch: int
) -> Iterator[list[EvalPicture]]:
    """Lists of at most `batch` pictures of equal key, in the order in which keys first appear."""
    groups: dict[object, list[EvalPicture]] = {}
    for picture in pictures:
        groups.setdefault(key(picture), []).append(picture)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]

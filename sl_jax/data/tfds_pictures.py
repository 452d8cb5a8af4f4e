"""TFDS datasets as data: any with an `image` as flat pictures, Crello also with its layers.

They are read without TensorFlow, from array_record files, by position and from many threads.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sl_jax.data._walk import Skipped
from sl_jax.data.buckets import Bucket, nearest_bucket
from sl_jax.data.canvas import content_hash
from sl_jax.data.folder import FolderError, PictureIndex, PictureRecord
from sl_jax.data.pictures import PictureError, PictureLimits, fetch_file, open_picture, shown
from sl_jax.data.threads import in_threads

TFDS, CRELLO = "tfds", "crello"
_IMAGE = "image"
_DEFAULT_LIMITS = PictureLimits()
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of JSON; the last of old files
_CAPTIONS = ("caption", "text", "prompt", "title")
_WANTED = (
    "please write crello, crello#SPLIT, crello:FOLDER#SPLIT (a folder of Crello's parquet files, "
    "or TFDS's folder of datasets), or tfds:NAME#SPLIT for a TFDS dataset with an image"
)


class Named(NamedTuple):
    """What `crello:FOLDER#SPLIT` or `tfds:NAME#SPLIT` says.

    Attributes:
      kind: "crello" or "tfds".
      name: folder of Crello ("" for the usual one), or name of the dataset.
      split: "train" by default.
    """

    kind: str
    name: str
    split: str

    def __str__(self) -> str:
        inside = f":{self.name}" if self.name else ""
        return f"{self.kind}{inside}#{self.split}"


def parse_named(where: str | os.PathLike[str]) -> Named | None:
    """The dataset that `where` names; None if it is a path.

    Raises:
      FolderError: it begins like the name of a dataset, but is none.
    """
    text = os.fspath(where)
    head, _, split = text.partition("#")
    kind, _, name = head.partition(":")
    if kind not in (TFDS, CRELLO) or (kind == CRELLO and name.startswith("//")):
        return None
    if kind == TFDS and not name:
        raise FolderError(f"{shown(text)} names no dataset; {_WANTED}")
    return Named(kind, name, split or "train")


def scan_tfds(
    where: str,
    buckets: Sequence[Bucket],
    *,
    limits: PictureLimits = _DEFAULT_LIMITS,
    threads: int | None = None,
) -> PictureIndex:
    """Indexes the `image` of every example of a TFDS split, as `scan_folder` does a folder's files.

    The result is the same kind of index; `open_record` opens its paths. A text feature named
    caption, text, prompt or title is the caption. Every picture is decoded once, but for those of
    Crello, which were when its dataset was made.

    Args:
      where: `crello…` or `tfds:NAME…`, see `parse_named`.
      buckets: static shapes.
      limits: what counts as absurd and is skipped.
      threads: number of reading threads; see `in_threads`.

    Raises:
      FolderError: there is no such dataset or split, it has no `image`, or no usable picture.
    """
    named = parse_named(where)
    if named is None:
        raise FolderError(f"{shown(where)} names no dataset; {_WANTED}")
    count = len(open_split(named))
    if named.kind == CRELLO:
        known = crello_designs(named)
        skipped = list(known.skipped)
        results = [_known(named, limits, *item) for item in enumerate(known.used)]
    else:
        inspect = functools.partial(_inspect, named, limits)
        skipped = []
        results = in_threads(inspect, range(count), "examples", threads)
    first: dict[str, PictureRecord] = {}
    for result in results:
        if isinstance(result, Skipped):
            skipped.append(result)
            continue
        digest, height, width, caption, path = result
        if digest in first:
            kept = first[digest].name
            skipped.append(Skipped(path, f"same content as {shown(kept)}"))
            continue
        bucket = nearest_bucket(buckets, height, width)
        first[digest] = PictureRecord(path, path, digest, height, width, bucket, caption)
    if not first:
        reason = f": {skipped[0].reason}" if skipped else ""
        raise FolderError(f"no usable picture among the {count} of {named}{reason}")
    return PictureIndex(str(named), tuple(first.values()), tuple(skipped), limits=limits)


def open_record(
    path: str, limits: PictureLimits = _DEFAULT_LIMITS, sha256: str = ""
) -> UInt8[np.ndarray, "height width 3"]:
    """Opens what a record of an index names: a file, or an example of a TFDS split.

    Args:
      path: of the record.
      limits: what to refuse.
      sha256: what the record says of a file's bytes; "" takes any. Datasets are taken as they are.

    Raises:
      PictureError: as `open_picture`, or the file has another content than the record says.
    """
    head, at, number = path.rpartition("@")
    named = parse_named(head) if at and number.isdecimal() else None
    if named is None:
        file = fetch_file(path, limits)
        picture = open_picture(file, limits)
        if sha256 not in ("", file.sha256):
            raise PictureError(path, "changed since the pictures were looked through")
        return picture
    return _flat(path, read_example(named, int(number))[_IMAGE], limits)


def read_example(named: Named, position: int) -> dict[str, Any]:
    """One decoded example.

    Raises:
      PictureError: it cannot be read any more.
    """
    try:
        return open_split(named)[position]
    except _READ_ERRORS as error:
        raise PictureError(f"{named}@{position}", f"cannot be read: {error}") from error


# What array_record, protobuf and Pillow raise on damaged records.
_READ_ERRORS = (OSError, ValueError, IndexError, KeyError, RuntimeError, SyntaxError)


@functools.lru_cache(maxsize=8)
def open_split(named: Named) -> Any:
    """A random-access source of decoded examples; made or downloaded first if need be.

    Raises:
      FolderError: there is no such dataset or split, or it has no `image`.
    """
    builder = _builder(named)
    if named.split not in builder.info.splits:
        known = ", ".join(builder.info.splits) or "none"
        raise FolderError(f"{named} is no split of its dataset, which has {known}; {_WANTED}")
    if _IMAGE not in builder.info.features:
        raise FolderError(f"{named} has no feature {_IMAGE!r}, but {sorted(builder.info.features)}")
    return builder.as_data_source(named.split)


def crello_designs(named: Named) -> Any:
    """What is known of the designs of a split of Crello: `crello.Designs`, by position.

    Raises:
      FolderError: as `open_split`.
    """
    from sl_jax.data.crello import designs

    open_split(named)  # makes it if need be, and knows its splits
    return designs(_crello_folder(named.name), named.split)


def _builder(named: Named) -> Any:
    import tensorflow_datasets as tfds

    if named.kind == CRELLO:
        folder = _crello_folder(named.name)
        _check_features(folder)
        return tfds.builder_from_directory(folder)
    try:
        if tfds.core.naming.parse_builder_name_kwargs(named.name)[0].namespace:
            raise ValueError("TFDS would fetch and run the code of others")
        builder = tfds.builder(named.name, try_gcs=False, file_format="array_record")
        builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FolderError(f"{named} cannot be opened ({first}); {_WANTED}") from error
    return builder


def _check_features(folder: epath.Path) -> None:
    """Of features that it does not know, TFDS imports the modules that the folder names.

    Raises:
      FolderError: there are others than Crello's, or they cannot be read.
    """
    try:
        names = list(_class_names(json.loads((folder / "features.json").read_text("utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{shown(folder)} holds no dataset: {error}; {_WANTED}") from error
    own = _own_classes()
    for name in names:
        if name not in own:
            raise FolderError(f"{shown(folder)} asks for the code of {shown(name)}; {_WANTED}")


def _class_names(told: Any) -> Iterator[str]:
    """All that TFDS may take for the name of a class in the JSON of features."""
    if isinstance(told, list):
        for part in told:
            yield from _class_names(part)
    elif isinstance(told, dict):
        for key, part in told.items():
            if key in _CLASS_KEYS and isinstance(part, str):
                yield part
            yield from _class_names(part)


def _own_classes() -> frozenset[str]:
    """Names of the classes of Crello's features."""
    import tensorflow_datasets as tfds

    features = tfds.features
    used = (features.FeaturesDict, features.Text, features.Image, features.Sequence)
    return frozenset(f"{kind.__module__}.{kind.__name__}" for kind in used)


@functools.lru_cache(maxsize=8)
def _crello_folder(name: str) -> epath.Path:
    from sl_jax.data.crello import HUB_ID, prepare_crello

    folder = epath.Path(name).expanduser()
    if not name:
        return prepare_crello(HUB_ID)
    if not folder.is_dir():
        raise FolderError(f"no folder {shown(name)}; {_WANTED}")
    for place in (folder, folder / "data"):
        if place.is_dir() and any(p.suffix == ".parquet" for p in place.iterdir()):
            return prepare_crello(name, folder / "tfds")
    return prepare_crello(HUB_ID, folder)


_Found = tuple[str, int, int, str, str]  # hash, height, width, caption, path


def _inspect(named: Named, limits: PictureLimits, position: int) -> _Found | Skipped:
    path = f"{named}@{position}"
    try:
        example = read_example(named, position)
        picture = _flat(path, example[_IMAGE], limits)
    except PictureError as error:
        return Skipped(path, error.reason)
    return content_hash(picture), *picture.shape[:2], caption_of(example), path


def _known(named: Named, limits: PictureLimits, position: int, facts: Any) -> _Found | Skipped:
    """Of a design of Crello; its hash is that of its layers, as where these are read too."""
    path = f"{named}@{position}"
    try:
        check_size(path, facts.height, facts.width, limits)
    except PictureError as error:
        return Skipped(path, error.reason)
    return facts.content_hash, facts.height, facts.width, facts.title, path


def caption_of(example: dict[str, Any]) -> str:
    """The text of the first feature that may be a caption; "" if there is none."""
    for name in _CAPTIONS:
        value = example.get(name)
        if isinstance(value, bytes | str):
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return ""


def _flat(path: str, pixels: Any, limits: PictureLimits) -> UInt8[np.ndarray, "height width 3"]:
    """A decoded feature as `open_picture` would return it: checked, RGB, alpha over white."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3, 4):
        raise PictureError(path, f"its image is {pixels.dtype} {pixels.shape}, not 8-bit pixels")
    check_size(path, pixels.shape[0], pixels.shape[1], limits)
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, 2)
    if pixels.shape[2] == 4:
        canvas = Image.new("RGB", pixels.shape[1::-1], (255, 255, 255))
        canvas.paste(Image.fromarray(pixels[..., :3]), mask=Image.fromarray(pixels[..., 3]))
        return np.array(canvas)
    return pixels


def check_size(path: str, height: int, width: int, limits: PictureLimits) -> None:
    """Refuses sizes outside of the limits.

    Raises:
      PictureError: says which limit.
    """
    short, long = sorted((height, width))
    for wrong, limit in (
        (height * width > limits.max_pixels, f"max_pixels is {limits.max_pixels}"),
        (short < limits.min_side, f"min_side is {limits.min_side}"),
        (long > short * limits.max_aspect, f"max_aspect is {limits.max_aspect:g}"),
    ):
        if wrong:
            raise PictureError(path, f"{width}x{height} pixels; the limit {limit}")

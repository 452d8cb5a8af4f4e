"""Folders of paired layers in the LayerD layout: NAME/0000.png, NAME/0001.png, …, back to front."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sl_jax.data._captions import Captions
from sl_jax.data._walk import Found, Skipped, list_files, name_bytes
from sl_jax.data.folder import FolderError, named_by_reason
from sl_jax.data.pictures import (
    PictureError,
    PictureLimits,
    fetch_file,
    open_rgba,
    picture_size,
    shown,
)
from sl_jax.data.threads import in_threads
from sl_jax.imaging.words import counted

_LAYER_NAME = re.compile(r"(?:(.+)/)?(\d+)\.png", re.IGNORECASE | re.DOTALL)
_DEFAULT_LIMITS = PictureLimits()


@dataclass(frozen=True)
class LayeredRecord:
    """One design of a layered folder.

    Attributes:
      name: its folder, relative to the scanned one.
      paths: its layer files, back to front.
      content_hash: SHA-256, in hexadecimal, of its files' hashes in order.
      height, width: size of every layer in pixels.
      caption: from NAME.txt or `metadata.jsonl` beside the folder; "" if there is none.
    """

    name: str
    paths: tuple[str, ...]
    content_hash: str
    height: int
    width: int
    caption: str = ""


@dataclass(frozen=True)
class LayeredFolder:
    """Designs with their true layers, ordered by name; they are read when they are asked for.

    Attributes:
      folder: the scanned folder.
      records: the designs.
      skipped: what is not used, each with its reason.
      limits: what counts as an absurd layer.
    """

    folder: str
    records: tuple[LayeredRecord, ...]
    skipped: tuple[Skipped, ...] = ()
    limits: PictureLimits = _DEFAULT_LIMITS

    @classmethod
    def scan(
        cls,
        folder: str | os.PathLike[str],
        *,
        limits: PictureLimits = _DEFAULT_LIMITS,
        max_layers: int = 64,
        verify: bool = True,
        threads: int | None = None,
    ) -> LayeredFolder:
        """Finds every folder below `folder` that holds numbered layers.

        A design is used if its layers are numbered from 0 without a gap, are as large as each
        other and can all be read; of equal designs the first by name is kept.

        Args:
          folder: local or remote.
          limits: what counts as absurd.
          max_layers: designs with more layers are skipped.
          verify: decode every layer once, so that corrupt files are found now.
          threads: number of reading threads; default: four a core, at most 32.

        Raises:
          FolderError: there is no such folder, or no usable design in it.
        """
        root = epath.Path(folder).expanduser()
        if not root.is_dir():
            raise FolderError(f"no folder {shown(root)}; {_WANTED}")
        files, skipped = list_files(root)
        captions = Captions(files)
        designs = _designs(files)
        inspect = functools.partial(
            _inspect, captions=captions, limits=limits, max_layers=max_layers, verify=verify
        )
        results = in_threads(lambda item: inspect(*item), list(designs.items()), "designs", threads)
        first: dict[str, LayeredRecord] = {}
        for result in results:
            if isinstance(result, Skipped):
                skipped.append(result)
            elif result.content_hash in first:
                kept = first[result.content_hash].name
                skipped.append(Skipped(result.name, f"same content as {shown(kept)}"))
            else:
                first[result.content_hash] = result
        found = cls(
            os.fspath(root),
            tuple(first.values()),
            tuple(sorted(skipped, key=name_bytes)),
            limits,
        )
        if not found.records:
            raise FolderError(
                f"no layered design among {counted(len(files), 'file')}; {_WANTED}\n{found}"
            )
        return found

    def __str__(self) -> str:
        return self.summary()

    def read(self, record: LayeredRecord) -> UInt8[np.ndarray, "layers height width 4"]:
        """The layers of one of the records: straight RGBA, back to front.

        Raises:
          PictureError: a layer cannot be read any more, or has changed its size.
        """
        layers = []
        for path in record.paths:
            layer = open_rgba(path, self.limits)
            if layer.shape[:2] != (record.height, record.width):
                raise PictureError(path, "its size has changed since the folder was scanned")
            layers.append(layer)
        return np.stack(layers)

    def summary(self) -> str:
        """What is used and what is skipped, by reason and by name."""
        head = (
            f"{counted(len(self.records), 'layered design')} in {shown(self.folder)}, "
            f"{len(self.skipped)} skipped"
        )
        return "\n".join([head, *named_by_reason("skipped", self.skipped)])


_WANTED = "please give a folder of designs, each a folder NAME with its layers NAME/0000.png, …"


def _designs(files: Sequence[Found]) -> dict[str, dict[int, Found]]:
    """Layer number → file, of each folder that has numbered PNG files."""
    designs: dict[str, dict[int, Found]] = {}
    for found in files:
        match = _LAYER_NAME.fullmatch(found.name)
        if match and match[1]:
            designs.setdefault(match[1], {}).setdefault(int(match[2]), found)
    return designs


def _inspect(
    name: str,
    numbered: dict[int, Found],
    *,
    captions: Captions,
    limits: PictureLimits,
    max_layers: int,
    verify: bool,
) -> LayeredRecord | Skipped:
    if len(numbered) > max_layers:
        return Skipped(name, f"{len(numbered)} layers; the limit max_layers is {max_layers}")
    if missing := sorted(set(range(len(numbered))) - set(numbered)):
        return Skipped(name, f"layer {missing[0]:04d}.png is missing")
    files = [numbered[number] for number in range(len(numbered))]
    digest = hashlib.sha256()
    sizes: list[tuple[int, int]] = []
    for found in files:
        try:
            file = fetch_file(found.path, limits)
            sizes.append(picture_size(file, limits, decode=verify))
            digest.update(bytes.fromhex(file.sha256))
        except PictureError as error:
            return Skipped(name, f"{shown(found.path.name)}: {error.reason}")
        if sizes[-1] != sizes[0]:
            return Skipped(name, f"{shown(found.path.name)} differs in size from 0000.png")
    paths = tuple(os.fspath(found.path) for found in files)
    return LayeredRecord(name, paths, digest.hexdigest(), *sizes[0], captions.of(name))

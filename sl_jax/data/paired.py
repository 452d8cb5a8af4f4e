"""Designs with their true layers, wherever they are: layer folders, Photoshop files, Crello."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sl_jax.data._captions import Captions
from sl_jax.data._walk import Found, Skipped, list_files
from sl_jax.data.folder import FolderError, is_held_out, named_by_reason
from sl_jax.data.layered import LayeredFolder
from sl_jax.data.pictures import PictureError, PictureLimits, picture_suffixes, shown
from sl_jax.data.psd import open_psd, psd_info
from sl_jax.data.tfds_pictures import (
    CRELLO,
    Named,
    check_size,
    crello_designs,
    parse_named,
    read_example,
)
from sl_jax.imaging.words import counted

_DEFAULT_LIMITS = PictureLimits()
_PSD = (".psd", ".psb")


@dataclass(frozen=True)
class PairedDesign:
    """A design whose layers can be read.

    Attributes:
      name: unique in its data.
      content_hash: SHA-256 of its content, in hexadecimal.
      height, width: of its layers in pixels.
      layers: their number, with the background.
      caption: "" if there is none.
      read: gives uint8 [L, H, W, 4], straight RGBA, back to front. Raises `PictureError` if they
        cannot be read any more.
      files: the files of its layers, where each has one.
    """

    name: str
    content_hash: str
    height: int
    width: int
    layers: int
    caption: str
    read: Callable[[], UInt8[np.ndarray, "l h w 4"]]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairedData(Sequence[PairedDesign]):
    """Designs ordered by name, and what is not used, each with its reason."""

    where: str
    designs: tuple[PairedDesign, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.designs)

    def __getitem__(self, position: int) -> PairedDesign:
        return self.designs[position]

    @property
    def fingerprint(self) -> str:
        """Hash of contents and captions: equal where two processes see the same data."""
        told = sorted((design.content_hash, design.caption) for design in self.designs)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def split(self, eval_fraction: float) -> tuple[PairedData, PairedData]:
        """(training, held-out) parts by content hash: adding designs moves no other one.

        Raises:
          ValueError: not 0 ≤ eval_fraction < 1.
        """
        if not 0 <= eval_fraction < 1:
            raise ValueError(f"eval_fraction = {eval_fraction}; please use 0 up to, not with, 1")
        held = tuple(d for d in self.designs if is_held_out(d.content_hash, eval_fraction))
        return self._without(held), dataclasses.replace(self, designs=held, skipped=())

    def without(self, other: PairedData) -> PairedData:
        """Leaves out the contents that other data hold."""
        return self._without(other.designs)

    def _without(self, designs: Sequence[PairedDesign]) -> PairedData:
        theirs = {design.content_hash for design in designs}
        kept = tuple(d for d in self.designs if d.content_hash not in theirs)
        return dataclasses.replace(self, designs=kept)

    def summary(self) -> str:
        """What is used and what is skipped, by reason and by name."""
        head = (
            f"{counted(len(self), 'design')} with layers in {shown(self.where)}, "
            f"{len(self.skipped)} skipped"
        )
        return "\n".join([head, *named_by_reason("skipped", self.skipped)])


def is_paired(where: str | os.PathLike[str]) -> bool:
    """Whether `open_paired` would look for layers there: Crello, a PSD file, a folder of designs.

    Of a folder only its own entries are looked at; other pictures beside PSD files make it a folder
    of pictures.
    """
    named = parse_named(where)
    if named is not None:
        return named.kind == CRELLO
    path = epath.Path(where).expanduser()
    if not path.is_dir():
        return _is_psd(path.name)
    children = list(path.iterdir())
    pictures = [c for c in children if c.suffix.lower() in picture_suffixes() or _is_psd(c.name)]
    return any((child / "0000.png").exists() for child in children) or (
        bool(pictures) and all(_is_psd(child.name) for child in pictures)
    )


def open_paired(
    where: str | os.PathLike[str],
    *,
    limits: PictureLimits = _DEFAULT_LIMITS,
    max_layers: int = 64,
    threads: int | None = None,
) -> PairedData:
    """Finds designs with true layers; files are read once, to know that they can be.

    Args:
      where: a folder of designs NAME/0000.png, … (LayerD layout); a Photoshop document (.psd,
        .psb), or a folder with such below it; `crello`, `crello#SPLIT` or `crello:FOLDER#SPLIT`.
        Of equal designs the first by name is kept.
      limits: what counts as absurd.
      max_layers: designs with more are skipped.
      threads: number of reading threads; default: one a core, at most 32.

    Raises:
      FolderError: there is no such data, or no usable design.
    """
    named = parse_named(where)
    if named is not None and named.kind != CRELLO:
        raise FolderError(f"{named} has no layers; {_WANTED}")
    threads = threads or min(os.cpu_count() or 1, 32)
    if named is not None:
        found = _crello(named, limits)
    else:
        found = _files(epath.Path(where).expanduser(), limits, max_layers, threads)
    designs, skipped = [], list(found.skipped)
    first: dict[str, str] = {}
    for design in found.designs:
        if design.layers > max_layers:
            reason = f"{design.layers} layers; the limit max_layers is {max_layers}"
            skipped.append(Skipped(design.name, reason))
        elif design.content_hash in first:
            kept = first[design.content_hash]
            skipped.append(Skipped(design.name, f"same content as {shown(kept)}"))
        else:
            first[design.content_hash] = design.name
            designs.append(design)
    data = PairedData(found.where, tuple(designs), tuple(skipped))
    if not designs:
        raise FolderError(f"{data.summary()}\n{_WANTED}")
    return data


_WANTED = (
    "please give a folder of designs, each a folder NAME with its layers NAME/0000.png, …; .psd "
    "files; or crello#SPLIT"
)


def _files(root: epath.Path, limits: PictureLimits, max_layers: int, threads: int) -> PairedData:
    if root.is_dir():
        files, skipped = list_files(root)
    elif root.exists():
        files, skipped = [Found(root.name, root)], []
    else:
        raise FolderError(f"no folder {shown(root)}; {_WANTED}")
    documents = [found for found in files if _is_psd(found.name)]
    if documents:
        results = _psd(documents, Captions(files), limits, threads)
        designs = tuple(result for result in results if isinstance(result, PairedDesign))
        skipped += [result for result in results if isinstance(result, Skipped)]
        return PairedData(os.fspath(root), designs, tuple(skipped))
    folder = LayeredFolder.scan(root, limits=limits, max_layers=max_layers, threads=threads)
    return PairedData(
        os.fspath(root),
        tuple(
            PairedDesign(
                name=record.name,
                content_hash=record.content_hash,
                height=record.height,
                width=record.width,
                layers=len(record.paths),
                caption=record.caption,
                read=functools.partial(folder.read, record),
                files=record.paths,
            )
            for record in folder.records
        ),
        folder.skipped,
    )


def _is_psd(name: str) -> bool:
    return name.lower().endswith(_PSD)


def _psd(
    documents: Sequence[Found], captions: Captions, limits: PictureLimits, threads: int
) -> list[PairedDesign | Skipped]:
    def inspect(found: Found) -> PairedDesign | Skipped:
        try:
            info = psd_info(found.path, limits)
        except PictureError as error:
            return Skipped(found.name, error.reason)
        return PairedDesign(
            name=found.name,
            content_hash=info.content_hash,
            height=info.height,
            width=info.width,
            layers=info.layers,
            caption=captions.of(found.name),
            read=functools.partial(open_psd, found.path, limits),
        )

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(inspect, documents))


def _crello(named: Named, limits: PictureLimits) -> PairedData:
    known = crello_designs(named)
    designs, skipped = [], list(known.skipped)
    for position, facts in enumerate(known.used):
        try:
            check_size(f"{named}@{position}", facts.height, facts.width, limits)
        except PictureError as error:
            skipped.append(Skipped(facts.name, error.reason))
            continue
        designs.append(
            PairedDesign(
                name=facts.name,
                content_hash=facts.content_hash,
                height=facts.height,
                width=facts.width,
                layers=facts.layers,
                caption=facts.title,
                read=functools.partial(_read_crello, named, position),
            )
        )
    designs.sort(key=lambda design: design.name)
    return PairedData(str(named), tuple(designs), tuple(skipped))


def _read_crello(named: Named, position: int) -> UInt8[np.ndarray, "l h w 4"]:
    layers = read_example(named, position)["layers"]
    return np.stack([np.asarray(layer, np.uint8) for layer in layers])

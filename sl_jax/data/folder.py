"""A folder of pictures as a deterministic index: contents, buckets, captions, held-out split."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath

from sl_jax.data._captions import METADATA, Captions
from sl_jax.data._walk import Found, Skipped, list_files, name_bytes
from sl_jax.data.buckets import Bucket, nearest_bucket
from sl_jax.data.pictures import (
    PictureError,
    PictureLimits,
    fetch_file,
    picture_size,
    picture_suffixes,
    shown,
)
from sl_jax.data.threads import in_threads

_log = logging.getLogger(__name__)
_NAMED_PER_REASON = 50
_DEFAULT_LIMITS = PictureLimits()


class FolderError(ValueError):
    """A picture folder that cannot be used; the message says what was looked for."""


@dataclass(frozen=True)
class PictureRecord:
    """One picture of a folder.

    Attributes:
      path: where to open it.
      name: its path relative to the folder.
      content_hash: SHA-256 of the file's bytes, in hexadecimal.
      height, width: size in pixels, upright.
      bucket: the shape that it is resized to.
      caption: "" if there is none.
    """

    path: str
    name: str
    content_hash: str
    height: int
    width: int
    bucket: Bucket
    caption: str = ""

    @property
    def picture_id(self) -> str:
        """A short name of the content, stable under renaming."""
        return self.content_hash[:16]


@dataclass(frozen=True)
class PictureIndex:
    """The pictures of a folder, ordered by name, and what was skipped.

    Attributes:
      folder: the folder.
      records: one per distinct content.
      skipped: files that are not used, each with its reason.
      notes: captions that are not used, each with its reason.
      other_files: number of files that neither claim to be pictures nor are.
      limits: what the pictures were checked against, and are again when they are read.
    """

    folder: str
    records: tuple[PictureRecord, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[Skipped, ...] = ()
    other_files: int = 0
    limits: PictureLimits = _DEFAULT_LIMITS

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[PictureRecord]:
        return iter(self.records)

    @functools.cached_property
    def by_bucket(self) -> dict[Bucket, tuple[PictureRecord, ...]]:
        """Records of each bucket that has any, the buckets ordered by their sizes."""
        groups: dict[Bucket, list[PictureRecord]] = collections.defaultdict(list)
        for record in self.records:
            groups[record.bucket].append(record)
        return {bucket: tuple(groups[bucket]) for bucket in sorted(groups)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the contents and their buckets: equal where two processes see the same data."""
        digest = hashlib.sha256()
        for line in sorted(f"{record.content_hash} {record.bucket}" for record in self.records):
            digest.update(line.encode())
        return digest.hexdigest()[:16]

    def split(self, eval_fraction: float) -> tuple[PictureIndex, PictureIndex]:
        """(training, held-out) parts by content hash.

        Which part a picture is in depends on its content and the fraction only: adding, removing
        or renaming pictures moves no other one, and a larger fraction only adds to the held-out.

        Args:
          eval_fraction: expected share of held-out pictures, 0 ≤ eval_fraction < 1.

        Raises:
          ValueError: the fraction is out of range.
        """
        if not 0 <= eval_fraction < 1:
            raise ValueError(f"eval_fraction = {eval_fraction}; please use 0 up to, not with, 1")
        held = tuple(is_held_out(record.content_hash, eval_fraction) for record in self.records)
        rest = tuple(not out for out in held)
        return self._only(rest), dataclasses.replace(self._only(held), skipped=(), notes=())

    def split_off_first(self) -> tuple[PictureIndex, PictureIndex]:
        """(training, held-out) parts, of which the latter has the first content by hash alone."""
        first = min(record.content_hash for record in self.records)
        held = tuple(record.content_hash == first for record in self.records)
        rest = tuple(not out for out in held)
        return self._only(rest), dataclasses.replace(self._only(held), skipped=(), notes=())

    def without(self, other: PictureIndex) -> PictureIndex:
        """Leaves out the contents that another index holds, and names them among the skipped."""
        theirs = {record.content_hash for record in other.records}
        kept = tuple(record.content_hash not in theirs for record in self.records)
        reason = f"also in {shown(other.folder)}"
        shared = (
            Skipped(record.name, reason)
            for record, keep in zip(self.records, kept, strict=True)
            if not keep
        )
        return dataclasses.replace(self._only(kept), skipped=(*self.skipped, *shared))

    def summary(self, names_per_reason: int = _NAMED_PER_REASON) -> str:
        """What is used and what is skipped, by reason and by name.

        Args:
          names_per_reason: how many files are named for each reason; the rest is counted.
        """
        shapes = ", ".join(f"{bucket}: {len(rows)}" for bucket, rows in self.by_bucket.items())
        captions = sum(bool(record.caption) for record in self.records)
        lines = [
            f"{len(self.records)} pictures in {shown(self.folder)}"
            + (f" ({shapes})" if shapes else "")
            + f", {captions} with a caption, {len(self.skipped)} skipped"
        ]
        lines += named_by_reason("skipped", self.skipped, names_per_reason)
        lines += named_by_reason("caption not used", self.notes, names_per_reason)
        return "\n".join(lines)

    def _only(self, chosen: Sequence[bool]) -> PictureIndex:
        return dataclasses.replace(self, records=tuple(itertools.compress(self.records, chosen)))


def is_held_out(content_hash: str, eval_fraction: float) -> bool:
    """True if a content, by its SHA-256 in hexadecimal, belongs to the held-out share."""
    return int(content_hash[:16], 16) < eval_fraction * 2.0**64


def scan_folder(
    folder: str | os.PathLike[str],
    buckets: Sequence[Bucket],
    *,
    limits: PictureLimits = _DEFAULT_LIMITS,
    verify: bool = True,
    threads: int | None = None,
) -> PictureIndex:
    """Indexes all pictures below a folder.

    Files are read once, and in parallel; the result does not depend on the number of threads, nor
    on the order in which the file system lists them. Of files with equal bytes the first by name is
    kept.
    A file whose ending is not a picture's is used all the same if its content is a picture.

    Args:
      folder: local or remote (gs://…).
      buckets: static shapes, from `make_buckets` or `standard_buckets`.
      limits: what counts as absurd and is skipped.
      verify: decode every picture once, so that truncated and corrupt files are skipped now (about
        10 ms a megapixel and core). Without it they are met, and replaced, during training.
      threads: number of reading threads; default: four a core, at most 32.

    Returns:
      The index, with one or more records.

    Raises:
      FolderError: there is no such folder, or it holds no usable picture.
    """
    root = epath.Path(folder).expanduser()
    _check_folder(root)
    files, unlisted = list_files(root)
    captions = Captions(files)
    pictures = [found for found in files if not _is_caption(found.name)]
    inspect = functools.partial(_inspect, captions=captions, limits=limits, verify=verify)
    results = list(zip(pictures, in_threads(inspect, pictures, "pictures", threads), strict=True))
    records, skipped = _records(results, buckets)
    index = PictureIndex(
        folder=os.fspath(root),
        records=tuple(records),
        skipped=tuple(sorted((*unlisted, *skipped), key=name_bytes)),
        notes=tuple(sorted(captions.unused, key=name_bytes)),
        other_files=sum(result is None for _, result in results),
        limits=limits,
    )
    if not index.records:
        raise FolderError(_nothing_found(index, len(files)))
    return index


def training_and_held_out(
    folder: str | os.PathLike[str],
    buckets: Sequence[Bucket],
    *,
    eval_data: str | os.PathLike[str] | None = None,
    eval_fraction: float = 0.05,
    limits: PictureLimits = _DEFAULT_LIMITS,
    verify: bool = True,
    threads: int | None = None,
) -> tuple[PictureIndex, PictureIndex]:
    """Indexes the pictures to train on and those held out, and logs one summary of each folder.

    Args:
      folder: pictures to train on.
      buckets: static shapes.
      eval_data: folder of held-out pictures. Contents that it shares with `folder` are not trained
        on. If None, the share `eval_fraction` of `folder` is held out by content hash.
      eval_fraction: 0 ≤ eval_fraction < 1; not used with `eval_data`.
      limits, verify, threads: as in `scan_folder`.

    Returns:
      (training, held-out). Where the fraction of a small folder hits no picture, the first one by
      content hash is held out.

    Raises:
      FolderError: a folder is missing or holds no usable picture, or nothing is left to train on.
    """
    scan = functools.partial(
        scan_folder, buckets=buckets, limits=limits, verify=verify, threads=threads
    )
    index = scan(folder)
    if eval_data is None:
        training, held_out = index.split(eval_fraction)
        if eval_fraction and len(index) == 1:
            raise FolderError(
                f"{shown(index.folder)} holds one usable picture; one to train on and another to "
                "evaluate on are needed: please add pictures, or name another folder as eval_data"
            )
        if eval_fraction and not held_out:
            training, held_out = index.split_off_first()
            _log.warning(
                "A share of %g of so few pictures is none: %s is held out, as long as no picture "
                "is added",
                eval_fraction,
                held_out.records[0].name,
            )
        _log_summary(index)
    else:
        held_out = scan(eval_data)
        training = index.without(held_out)
        _log_summary(training)
        _log_summary(held_out)
    _log.info("%d pictures to train on, %d held out", len(training), len(held_out))
    if not training:
        raise FolderError(
            f"all {len(index)} pictures of {shown(index.folder)} are held out, none are left to "
            "train on; please add pictures, lower eval_fraction, or use another eval_data"
        )
    return training, held_out


def _log_summary(index: PictureIndex) -> None:
    level = logging.WARNING if index.skipped or index.notes else logging.INFO
    _log.log(level, "%s", index.summary())


def _check_folder(root: epath.Path) -> None:
    wanted = "please give a folder of pictures (.png, .jpg, .webp, …; folders inside are read too)"
    try:
        if not root.exists():
            raise FolderError(f"no folder {shown(root)}; {wanted}")
        if not root.is_dir():
            raise FolderError(f"{shown(root)} is not a folder; {wanted}")
    except OSError as error:
        raise FolderError(f"{shown(root)}: {error.strerror or error}; {wanted}") from error


def _is_caption(name: str) -> bool:
    return name.endswith(".txt") or name.rpartition("/")[2] == METADATA


class _Inspected(NamedTuple):
    content_hash: str
    height: int
    width: int
    caption: str


def _inspect(
    found: Found, *, captions: Captions, limits: PictureLimits, verify: bool
) -> _Inspected | Skipped | None:
    """Size, hash and caption of one file; None if it neither claims to be a picture nor is one."""
    suffix = found.name[found.name.rfind(".") :].lower()
    claims = suffix in picture_suffixes()
    try:
        if not claims:  # Most are no pictures, and some are huge: the header comes first.
            picture_size(found.path, limits, trust_name=False)
        file = fetch_file(found.path, limits)
        height, width = picture_size(file, limits, decode=verify, trust_name=claims)
        return _Inspected(file.sha256, height, width, captions.of(found.name))
    except PictureError as error:
        return Skipped(found.name, error.reason) if claims or not error.unidentified else None


def _records(
    results: Iterable[tuple[Found, _Inspected | Skipped | None]],
    buckets: Sequence[Bucket],
) -> tuple[list[PictureRecord], list[Skipped]]:
    """Records of the distinct contents, and the skipped with the duplicates among them."""
    first: dict[str, PictureRecord] = {}
    skipped: list[Skipped] = []
    for found, result in results:
        if isinstance(result, Skipped):
            skipped.append(result)
        elif result is not None and result.content_hash in first:
            kept = first[result.content_hash].name
            skipped.append(Skipped(found.name, f"same content as {shown(kept)}"))
        elif result is not None:
            first[result.content_hash] = PictureRecord(
                path=os.fspath(found.path),
                name=found.name,
                content_hash=result.content_hash,
                height=result.height,
                width=result.width,
                bucket=nearest_bucket(buckets, result.height, result.width),
                caption=result.caption,
            )
    return list(first.values()), skipped


def named_by_reason(
    title: str, entries: Sequence[Skipped], limit: int = _NAMED_PER_REASON
) -> Iterator[str]:
    """One line per reason, with the names that share it."""
    names: dict[str, list[str]] = collections.defaultdict(list)
    for entry in entries:
        names[entry.reason].append(shown(entry.name))
    for reason, having in names.items():
        more = f" and {len(having) - limit} more" if len(having) > limit else ""
        yield f"  {title}, {reason}: {', '.join(having[:limit])}{more}"


def _nothing_found(index: PictureIndex, files: int) -> str:
    head = (
        f"no usable picture in {shown(index.folder)}: looked there and in the folders inside for "
        f"any picture that Pillow reads (.png, .jpg, .webp, .tif, …) and found {files} files, "
        f"{len(index.skipped)} of which were skipped"
    )
    return "\n".join([head, *named_by_reason("skipped", index.skipped, _NAMED_PER_REASON)])

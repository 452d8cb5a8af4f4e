"""Many pictures: found, grouped by size, decomposed in batches, written; what went wrong is kept.

A picture's noise depends on the seed and its place among the inputs alone, as in the Stable-Layers
release, and every size has one program, whatever else is in the folder.
"""

import collections
import dataclasses
import fnmatch
import functools
import glob
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.disk import inside_name, require_writable
from sl_jax.data import FolderError, are_folders, in_threads, list_files
from sl_jax.data.pictures import (
    PictureError,
    PictureLimits,
    fetch_file,
    open_rgba,
    picture_size,
    picture_suffixes,
    shown,
)
from sl_jax.inference.decomposer import (
    NOT_FINITE,
    PictureDecomposer,
    Sampling,
    check_seeds,
    picture_keys,
)
from sl_jax.inference.outputs import clear_outputs, layer_names, read_record, write_outputs

_MAGIC = frozenset("*?[")

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One input picture.

    Attributes:
        index: its place among all inputs, counted from 0; added to the seed.
        path: the file.
        name: of its folder in the output.
    """

    index: int
    path: epath.Path
    name: str


class Problem(NamedTuple):
    """An input that has no new layers, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


class Outcome(NamedTuple):
    """What became of the inputs: folders written, folders that were complete before, problems."""

    written: list[epath.Path]
    kept: list[epath.Path]
    problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is made of every picture.

    Attributes:
        output: each picture gets a folder in it.
        sampling: how layers are sampled.
        seed: of the first picture; the next has seed + 1. All are 0 to 2³² − 1.
        made_by: what else decides the result (model, adapter, prompt); kept in `layers.json`.
        transparent: see `write_outputs`.
        overwrite: decompose again what is complete.
        recurse: layer that is decomposed once more, into a folder of its own; None for none.
        batch: pictures at a time; rounded up to the number of shards of the batch.

    Raises:
        ValueError: `recurse` names no layer, or `batch` is below 1.
    """

    output: epath.Path
    sampling: Sampling
    seed: int = 42
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    transparent: bool = False
    overwrite: bool = False
    recurse: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.recurse is not None and not 0 <= self.recurse < self.sampling.layers:
            raise ValueError(
                f"recurse = {self.recurse}; please name a layer, 0 to {self.sampling.layers - 1}"
            )
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}; please use 1 or more")

    @property
    def limits(self) -> PictureLimits:
        """Any size is decomposed, up to the aspect at which a side falls below one token."""
        return PictureLimits(min_side=1, max_aspect=max(self.sampling.size / 16, 4.0))

    def settings(self, entry: Entry) -> dict[str, Any]:
        """What decides the layers of a picture, as kept in `layers.json`."""
        return {
            **self.made_by,
            **dataclasses.asdict(self.sampling),
            "seed": self.seed + entry.index,
            "transparent": self.transparent,
        }


def find_pictures(where: str) -> list[Entry]:
    """The inputs, ordered by path.

    Args:
        where: a picture; a folder, of which the pictures directly in it are taken; or a pattern
            with *, ? or [ ], in which ** stands for any local folders. Local or remote (gs://…).
            Of folders and patterns, files whose names end like a picture's count.

    Raises:
        FolderError: there is nothing to decompose.
        CheckpointError: its store cannot be reached.
    """
    path = reachable(where)
    if path.is_dir():
        found = _pictures(path.iterdir())
    elif path.exists():
        found = [path]
    else:
        found = _pictures(_matching(path))
    if not found:
        raise FolderError(
            f"no picture at {shown(where)}; please give a picture, a folder with pictures "
            "(.png, .jpg, .webp, …), or a pattern such as 'pictures/**/*.png' in quotes"
        )
    found = sorted(found, key=lambda child: os.fsencode(os.fspath(child)))
    return [Entry(i, p, n) for i, (p, n) in enumerate(zip(found, _names(found), strict=True))]


def _pictures(paths: Iterable[epath.Path]) -> list[epath.Path]:
    """Files whose names claim that they are pictures."""
    claim = [
        path
        for path in paths
        if not path.name.startswith(".") and path.suffix.lower() in picture_suffixes()
    ]
    return [p for p, folder in zip(claim, are_folders(claim), strict=True) if not folder]


def _matching(pattern: epath.Path) -> list[epath.Path]:
    text = os.fspath(pattern)
    if "://" not in text:
        parts = text.split("/")
        if "**" not in parts:
            return [epath.Path(match) for match in glob.glob(text)]
        depth = parts.index("**")
        folders = glob.glob("/".join([*parts[:depth], ""]) or ".")
        return [path for folder in folders for path in _below(folder, parts[depth + 1 :])]
    plain = list(itertools.takewhile(lambda part: _MAGIC.isdisjoint(part), pattern.parts))
    rest = pattern.parts[len(plain) :]
    if "**" in rest:
        raise FolderError(f"{text}: ** is for local folders; please write out the levels as */*")
    return list(epath.Path(*plain).glob("/".join(rest))) if rest else []


def _below(folder: str, pattern: Sequence[str]) -> list[epath.Path]:
    """Files at any depth whose last names fit a pattern; links that loop are followed once."""
    files, unlisted = list_files(epath.Path(folder))
    for name, reason in unlisted:
        _log.warning("%s: %s", shown(os.path.join(folder, name)), reason)
    wanted = ["**", *(pattern or ["*"])]
    return [found.path for found in files if _fits(found.name.split("/"), wanted)]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    head, *rest = pattern
    if head == "**":
        return _fits(parts, rest) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], head) and _fits(parts[1:], rest)


def _names(paths: Sequence[epath.Path]) -> list[str]:
    """Names without ending; those that would collide get ending, or number, as well."""
    numbered = [f"{i}_{p.name}" for i, p in enumerate(paths)]
    names = [path.stem for path in paths]
    for better in ([p.name for p in paths], numbered):
        counts = collections.Counter(name.casefold() for name in names)
        names = [
            new if counts[name.casefold()] > 1 else name
            for name, new in zip(names, better, strict=True)
        ]
    if len({name.casefold() for name in names}) < len(names):  # one is called like 0_NAME itself
        names = numbered
    return [inside_name(name) for name in names]


def decompose_pictures(
    entries: Sequence[Entry], job: Job, load: Callable[[], PictureDecomposer]
) -> Outcome:
    """Decomposes what is not complete yet; a picture that cannot be used stops no other.

    Args:
        load: called once, and only if there is anything to do.

    Raises:
        OSError: the output cannot be written, which is noticed before anything is loaded.
        ValueError: the seed of the last picture is out of range.
    """
    check_seeds(job.seed, len(entries))
    outcome = Outcome([], [], [])
    groups: dict[tuple[int, int], list[Entry]] = collections.defaultdict(list)
    seen = in_threads(functools.partial(_seen, job=job), entries, "pictures")
    for entry, found in zip(entries, seen, strict=True):
        if isinstance(found, Problem):
            outcome.problems.append(found)
        elif found is None:
            outcome.kept.append(job.output / entry.name)
        else:
            groups[found].append(entry)
    if not groups:
        return outcome
    require_writable(job.output)
    decomposer = load()
    total = sum(map(len, groups.values()))
    with tqdm(total=total, unit="picture", desc="decompose") as bar:
        for (height, width), group in sorted(groups.items()):
            bar.set_postfix_str(f"{width}x{height}")
            for batch in _batches(group, job, outcome):
                _decompose(batch, job, decomposer, outcome)
                bar.update(len(batch))
    return outcome


def _seen(entry: Entry, job: Job) -> tuple[int, int] | Problem | None:
    """At what size a picture is to be decomposed, or why it is not; None if that has been done.

    What was made with other settings is no less a problem: it must not be lost unasked.
    """
    try:
        record = None if job.overwrite else read_record(job.output / entry.name)
        if record is not None:
            if other := _differences(record, entry, job):
                return Problem(os.fspath(entry.path), other)
            if job.recurse is None or record.get("recursed") == job.recurse:
                return None
        return job.sampling.frame_size(*picture_size(entry.path, job.limits))
    except PictureError as error:
        return Problem(os.fspath(entry.path), error.reason)


def _differences(record: Mapping[str, Any], entry: Entry, job: Job) -> str:
    """How a complete folder is not what would be made now; "" if it is."""
    wanted, made = job.settings(entry), record.get("settings")
    made = made if isinstance(made, Mapping) else {}
    other = [f"{key} {made.get(key)!r}" for key in wanted if made.get(key) != wanted[key]]
    if record.get("sha256") != fetch_file(entry.path, job.limits).sha256:
        other.append("another picture")
    if not other:
        return ""
    folder = shown(job.output / entry.name)
    return (
        f"{folder} was made with {', '.join(other)}; please pass --overwrite, or another --output"
    )


class _Opened(NamedTuple):
    entry: Entry
    sha256: str
    size: tuple[int, int]
    frame: UInt8[np.ndarray, "h w 4"]


def _batches(group: Sequence[Entry], job: Job, outcome: Outcome) -> Iterator[list[_Opened]]:
    """Pictures of one size, opened, so many at a time; none is held longer than its batch."""
    opened = (picture for entry in group if (picture := _open(entry, job, outcome)))
    while batch := list(itertools.islice(opened, job.batch)):
        yield batch


def _open(entry: Entry, job: Job, outcome: Outcome) -> _Opened | None:
    try:
        file = fetch_file(entry.path, job.limits)
        picture = open_rgba(file, job.limits)
        return _Opened(entry, file.sha256, picture.shape[:2], job.sampling.frame(picture))
    except PictureError as error:
        outcome.problems.append(Problem(os.fspath(entry.path), error.reason))
    return None


def _decompose(
    batch: Sequence[_Opened], job: Job, decomposer: PictureDecomposer, outcome: Outcome
) -> None:
    keys = picture_keys([job.seed + picture.entry.index for picture in batch])
    sample = functools.partial(decomposer.decoded, sampling=job.sampling, batch=job.batch)
    stacks, finite = sample(np.stack([picture.frame for picture in batch]), keys)
    inner = None
    if job.recurse is not None:
        # The layer keeps its alpha: what it leaves transparent is no part of the picture.
        chosen = stacks[:, job.recurse]
        inner = sample(chosen, jax.vmap(lambda key: jax.random.fold_in(key, job.recurse))(keys))
        finite = finite & inner.finite
    for row, picture in enumerate(batch):
        if not finite[row]:
            outcome.problems.append(Problem(os.fspath(picture.entry.path), NOT_FINITE))
            continue
        clear_outputs(job.output / picture.entry.name)
        if inner is not None:
            name = layer_names(job.sampling.layers)[job.recurse]
            _write(picture, chosen[row], inner.layers[row], job, (name,))
        _write(picture, picture.frame, stacks[row], job)
        outcome.written.append(job.output / picture.entry.name)


def _write(
    picture: _Opened,
    frame: UInt8[np.ndarray, "h w 4"],
    layers: UInt8[np.ndarray, "l h w 4"],
    job: Job,
    inside: tuple[str, ...] = (),
) -> None:
    record = {
        "picture": picture.entry.path.name,
        "sha256": picture.sha256,
        "picture_width": picture.size[1],
        "picture_height": picture.size[0],
        "settings": job.settings(picture.entry),
    }
    record |= {"layer": inside[-1]} if inside else {"recursed": job.recurse}
    folder = job.output.joinpath(picture.entry.name, *inside)
    write_outputs(folder, frame, layers, record, transparent=job.transparent)

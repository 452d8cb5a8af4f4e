"""The tensors of one component folder, local or remote, read by byte ranges."""

import json
import math
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sl_jax.checkpoints.byte_ranges import ByteRanges, import_problem, is_remote, open_ranges
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.safetensors_file import NUMBERS, Entry, parse_header

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_config(folder: epath.PathLike, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in `folder/name`.

    Raises:
        CheckpointError: the file does not exist, or holds something else.
    """
    path = epath.Path(folder) / name
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; please pass a checkpoint in the diffusers folder layout"
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no text, no JSON
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


class _Tensor(NamedTuple):
    file: ByteRanges
    entry: Entry
    offset: int  # of the file's first tensor


class TensorFiles:
    """The tensors of one component folder (sharded with index, or a single file).

    Local files are mapped into memory; of remote ones only what is asked for is fetched. Several
    threads may read at once. Use as a context manager.

    Raises:
        CheckpointError: no safetensors, only pickled weights, a truncated or damaged file (it and
            the tensor concerned are named), a tensor in two files, or an index that names what is
            not there.
    """

    def __init__(self, folder: epath.PathLike):
        self.is_remote = is_remote(folder)
        self.folder = epath.Path(folder) if self.is_remote else FilePath(folder)
        self._where: dict[str, _Tensor] = {}
        try:
            for file in weight_files(self.folder):
                self._open(file)
            self._check_index()
        except ImportError as error:
            raise import_problem(folder, error) from error

    def _open(self, file: FilePath | epath.Path) -> None:
        try:
            opened = open_ranges(file)
            header = parse_header(opened.read, opened.size, file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        twice = sorted({entry.name for entry in header.entries} & set(self._where))
        if twice:
            raise CheckpointError(
                f"{file} repeats {len(twice)} tensors of other files beside it, {twice[0]} for "
                "one; please keep one set of weights in the folder"
            )
        for entry in header.entries:
            self._where[entry.name] = _Tensor(opened, entry, len(header.content))

    def _check_index(self) -> None:
        absent = [
            f"{file} lacks tensor {name}"
            for name, file in _weight_map(self.folder).items()
            if name not in self._where or self._where[name].file.path.name != file
        ]
        if absent:
            raise CheckpointError(
                f"{self.folder}: files and index disagree; please fetch the checkpoint again:\n  "
                + "\n  ".join(absent)
            )

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()  # Mapped files are closed with the last array that shows them.

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        return self._where[name].entry.shape

    def row_bytes(self, name: str) -> int:
        """Bytes of one entry along the first axis."""
        entry = self._where[name].entry
        return (entry.end - entry.begin) // max(1, entry.shape[0] if entry.shape else 1)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects; not writable.

        One range of bytes is read: all that the first of the slices selects, whose step must be 1.

        Raises:
            CheckpointError: the file and the tensor that cannot be read, and why.
        """
        file, entry, offset = self._where[name]
        if entry.dtype not in NUMBERS:
            raise CheckpointError(
                f"{file.path}: tensor {name} is of type {entry.dtype}, which is not supported"
            )
        first, last = 0, entry.shape[0] if entry.shape else 1
        if index:
            first, last, _ = index[0].indices(entry.shape[0])
        row = self.row_bytes(name)
        begin, end = (offset + entry.begin + bound * row for bound in (first, max(first, last)))
        try:
            found = file.read(begin, end)
        except OSError as error:
            raise CheckpointError(f"{file.path}: tensor {name} cannot be read: {error}") from error
        if len(found) != end - begin:
            raise CheckpointError(
                f"{file.path} is truncated: of tensor {name} {len(found)} bytes came, not "
                f"{end - begin}"
            )
        shape = (max(0, last - first), *entry.shape[1:]) if entry.shape else ()
        tensor = np.ndarray(shape, NUMBERS[entry.dtype], found.data if math.prod(shape) else b"")
        return tensor[(slice(None), *index[1:])] if index else tensor


def weight_files(folder: FilePath | epath.Path) -> list[FilePath | epath.Path]:
    """The safetensors files of one component folder: those of its index, or all.

    Raises:
        CheckpointError: there are none, or the index names files which are not there, or are
            elsewhere.
    """
    names = sorted(set(_weight_map(folder).values()))
    if names:
        absent = [n for n in names if not (folder / n).is_file()]
        if absent:
            raise CheckpointError(f"{_index(folder)} names files that are not there: {absent}")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickled)}), which can run "
            "code when loaded; please convert them to safetensors"
        )
    raise CheckpointError(f"{folder} holds no *.safetensors files")


def _index(folder: FilePath | epath.Path) -> FilePath | epath.Path | None:
    return next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)


def _weight_map(folder: FilePath | epath.Path) -> dict[str, str]:
    """Tensor → file, as the index tells; empty without an index."""
    index = _index(folder)
    if index is None:
        return {}
    weight_map = read_config(folder, index.name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} holds no object 'weight_map'")
    outside = sorted({f for f in map(str, weight_map.values()) if FilePath(f).name != f})
    if outside:
        raise CheckpointError(
            f"{index} names files that are not beside it: {outside}; please fetch the checkpoint "
            "from where it was published"
        )
    return {name: str(file) for name, file in weight_map.items()}


def local_path(folder: epath.PathLike) -> FilePath:
    """`folder` as a path on this machine.

    Raises:
        CheckpointError: it is on a remote store.
    """
    if is_remote(folder):
        raise CheckpointError(
            f"{folder} is remote, and this needs local files; please copy the folder to a local "
            "disk (or mount the bucket) and pass that path"
        )
    return FilePath(folder)

"""Byte ranges of files: of local ones as views of mapped memory, of remote ones as requests."""

import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sl_jax.checkpoints.errors import CheckpointError


class ByteRanges(Protocol):
    """A file that may be read by several threads at once.

    Attributes:
        path: of the file.
        size: its bytes.
    """

    path: epath.Path
    size: int

    def read(self, begin: int, end: int) -> UInt8[np.ndarray, " n"]:
        """Bytes `begin` up to, not with, `end`, or as many of them as there are; not writable."""
        ...


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is on a remote store (gs://…, s3://…)."""
    return "://" in os.fspath(path)


def open_ranges(path: epath.PathLike) -> ByteRanges:
    """Opens a local or remote file.

    Raises:
        OSError: it cannot be opened.
    """
    return RemoteFile(path) if is_remote(path) else LocalFile(path)


class LocalFile:
    """A file of this machine. Ranges cost nothing until they are looked at."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.size = Path(path).stat().st_size
        self._map = None
        if self.size:  # An empty file cannot be mapped.
            with Path(path).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, begin: int, end: int) -> UInt8[np.ndarray, " n"]:
        """As `ByteRanges.read`."""
        begin, end = min(begin, self.size), min(end, self.size)
        if begin == end:
            return np.zeros(0, np.uint8)
        if hasattr(self._map, "madvise"):  # The kernel fetches it at once, not page after page.
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, end - page)
        return np.frombuffer(self._map, np.uint8, end - begin, begin)


class RemoteFile:
    """A file on a remote store, through etils.epath: by fsspec, or by TensorFlow if installed."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        with self.path.open("rb") as file:
            self.size = file.seek(0, os.SEEK_END) or file.tell()
            # fsspec's files know their file system, which fetches exactly the range asked for;
            # the files themselves read ahead, and not from several threads.
            self._store = getattr(file, "fs", None)

    def read(self, begin: int, end: int) -> UInt8[np.ndarray, " n"]:
        """As `ByteRanges.read`."""
        begin, end = min(begin, self.size), min(end, self.size)
        if begin == end:
            return np.zeros(0, np.uint8)
        if self._store is not None:
            return np.frombuffer(
                self._store.cat_file(os.fspath(self.path), start=begin, end=end), np.uint8
            )
        with self.path.open("rb") as file:
            file.seek(begin)
            return np.frombuffer(file.read(end - begin), np.uint8)


_PACKAGES = {
    "gs": "the extra gcs, as in pip install -e '.[gcs]'",
    "s3": "it by pip install s3fs",
    "az": "it by pip install adlfs",
    "hf": "it by pip install huggingface_hub",
}


def reachable(path: epath.PathLike) -> epath.Path:
    """The path, ~ expanded, once the store that it names is known to be one that answers.

    Raises:
        CheckpointError: nothing is known of such stores, the package that reads them is not
            installed, or the store does not answer.
    """
    text = os.fspath(path)
    scheme, sign, _ = text.partition("://")
    if sign and scheme not in _PACKAGES:
        raise CheckpointError(
            f"{text} is on no store that is known; please use gs://…, s3://…, or a local path"
        )
    try:
        found = epath.Path(text).expanduser()
        if sign:
            found.exists()
    except ImportError as error:
        raise import_problem(text, error) from error
    except OSError as error:
        raise CheckpointError(
            f"{text} cannot be reached: {error}; please check the name, the network, and the "
            "credentials for this store"
        ) from error
    return found


def import_problem(path: epath.PathLike, error: ImportError) -> CheckpointError:
    """The error of a store whose Python package is not installed, with what to install."""
    return CheckpointError(
        f"{path} cannot be read without another package ({error}); please install "
        f"{_PACKAGES[os.fspath(path).partition('://')[0]]}, or copy the files to a local disk"
    )

"""Listing every file below a folder, in a fixed order, safe against links that loop."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from sl_jax.data.threads import in_threads


class Found(NamedTuple):
    """One file below the folder; `name` is its path relative to the folder, with '/'."""

    name: str
    path: epath.Path


class Skipped(NamedTuple):
    """A file or folder that is not used, and why; `name` is relative to the scanned folder."""

    name: str
    reason: str


def list_files(folder: epath.Path) -> tuple[list[Found], list[Skipped]]:
    """All files below a folder, ordered by the bytes of their names.

    Hidden entries and `__MACOSX` are left out. Linked folders are followed after all real ones,
    and no folder is entered twice, so a link to a parent ends there. Folders that cannot be listed
    are reported, and the rest is listed all the same.

    Args:
      folder: an existing folder, local or remote.

    Returns:
      The files, and what could not be listed.
    """
    files: list[Found] = []
    skipped: list[Skipped] = []
    entered: set[tuple[int, int]] = set()
    real, linked = [Found("", folder)], []
    while real or linked:
        name, path = real.pop() if real else linked.pop(0)
        try:
            if _entered_before(path, entered):
                continue
            children = sorted(path.iterdir(), key=lambda child: os.fsencode(child.name))
        except OSError as error:
            skipped.append(Skipped(name or ".", f"cannot be listed: {error.strerror or error}"))
            continue
        children = [c for c in children if c.name[0] != "." and c.name != "__MACOSX"]
        for child, is_folder in zip(children, are_folders(children), strict=True):
            found = Found(f"{name}/{child.name}" if name else child.name, child)
            if not is_folder:
                files.append(found)
            elif _is_link(child):
                linked.append(found)
            else:
                real.append(found)
    return sorted(files, key=name_bytes), sorted(skipped, key=name_bytes)


def are_folders(paths: Sequence[epath.Path]) -> list[bool]:
    """Which paths are folders; remote stores are asked about many at a time."""
    if not paths or not _is_remote(paths[0]):
        return [path.is_dir() for path in paths]
    return in_threads(lambda path: path.is_dir(), paths, "listing")


def is_regular(path: epath.Path) -> bool:
    """Whether a file can be read to its end: a pipe would block, a device has none.

    Raises:
      OSError: it cannot be looked at.
    """
    return _is_remote(path) or stat.S_ISREG(os.stat(path).st_mode)


def name_bytes(entry: Found | Skipped) -> bytes:
    """Sort key: the same order in every locale."""
    return os.fsencode(entry.name)


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _is_link(path: epath.Path) -> bool:
    return not _is_remote(path) and os.path.islink(path)


def _entered_before(path: epath.Path, entered: set[tuple[int, int]]) -> bool:
    """Notes that a local folder is entered; True if it was before, by whatever name."""
    if _is_remote(path):
        return False
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    if identity in entered:
        return True
    entered.add(identity)
    return False

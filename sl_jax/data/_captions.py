"""Captions beside pictures: `NAME.txt` files and `metadata.jsonl`."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence

from sl_jax.data._walk import Found, Skipped, is_regular

METADATA = "metadata.jsonl"
_TEXT_KEYS = ("text", "caption", "prompt")
_MAX_CAPTION_BYTES = 64 * 1024
_MAX_METADATA_BYTES = 1 << 30


class Captions:
    """The captions found among the files of a folder; may be asked by several threads.

    A text file is named like its picture with `.txt` in place of, or after, the picture's ending
    (`a.png`: `a.txt` or `a.png.txt`), and wins over `metadata.jsonl`. Lines of the latter are
    objects with `file_name`, relative to the file's own folder, and one of `text`, `caption`,
    `prompt`.

    Attributes:
      unused: captions that were not used, and why, in no order. They never cost a picture.
    """

    def __init__(self, files: Sequence[Found]):
        self.unused: list[Skipped] = []
        self._texts = {found.name: found.path for found in files if found.name.endswith(".txt")}
        self._listed: dict[str, str] = {}
        for found in files:
            if posixpath.basename(found.name) == METADATA:
                self._read_metadata(found)

    def of(self, name: str) -> str:
        """The caption of a picture, "" if it has none."""
        stem = posixpath.splitext(name)[0]
        for text_name in (f"{name}.txt", f"{stem}.txt"):
            if text_name in self._texts:
                return self._read_text(text_name)
        return self._listed.get(name, "")

    def _read_text(self, name: str) -> str:
        data = self._read(Found(name, self._texts[name]), _MAX_CAPTION_BYTES)
        if b"\0" in data:
            self.unused.append(Skipped(name, "not text"))
            return ""
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            self.unused.append(Skipped(name, "not UTF-8; the wrong bytes were replaced"))
            return data.decode("utf-8", "replace").strip()

    def _read_metadata(self, found: Found) -> None:
        folder = posixpath.dirname(found.name)
        data = self._read(found, _MAX_METADATA_BYTES)
        for number, line in enumerate(data.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                file_name, caption = _parse(line)
            except ValueError as error:
                self.unused.append(Skipped(found.name, f"line {number}: {error}"))
                continue
            whole = caption.encode("utf-8", "replace").decode("utf-8")
            if whole != caption:
                note = f"line {number}: half a character; it was replaced"
                self.unused.append(Skipped(found.name, note))
            if caption:
                self._listed[posixpath.normpath(posixpath.join(folder, file_name))] = whole

    def _read(self, found: Found, limit: int) -> bytes:
        """The file's bytes; empty, and noted, if it cannot be read or is too long."""
        try:
            if not is_regular(found.path):
                return self._unused(found, "not a regular file")
            size = found.path.stat().length
            if size > limit:
                return self._unused(found, f"{size} bytes; at most {limit} are read")
            return found.path.read_bytes()
        except OSError as error:
            return self._unused(found, f"{error.strerror or error}")

    def _unused(self, found: Found, reason: str) -> bytes:
        self.unused.append(Skipped(found.name, reason))
        return b""


def _parse(line: bytes) -> tuple[str, str]:
    """(file name, caption) of one line; the caption is "" if the line has none."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    file_name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(file_name, str):
        raise ValueError('not an object with a "file_name"')
    for key in _TEXT_KEYS:
        caption = entry.get(key)
        if isinstance(caption, str):
            return file_name, caption.strip()
        if caption is not None:
            raise ValueError(f'"{key}" is not a string')
    return file_name, ""

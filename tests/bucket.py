"""A bucket at gs://, made of a local folder, that notes which bytes are asked for."""

import os
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile


class _File(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start, end)


class Bucket(AbstractFileSystem):
    """What gcsfs is to fsspec; `gs://bucket/x` is `root/bucket/x`. Writing replaces whole files."""

    protocol = ("gcs", "gs")
    cachable = False
    root = Path()
    asked: tuple[tuple[str, int, int], ...] = ()
    cut = 0  # bytes that are missing at the end of every answer

    @classmethod
    def install(cls, root: Path, patch) -> type["Bucket"]:
        """Registers a fresh bucket for `gs://` for as long as `patch` lasts."""
        from etils.epath import backend

        made = type("FreshBucket", (cls,), {"root": root, "asked": []})
        for name in cls.protocol:
            patch.setitem(_registry, name, made)
        backend.fsspec_backend._get_filesystem.cache_clear()
        return made

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        place = self.root / path
        if not place.exists():
            raise FileNotFoundError(path)
        children = [place] if place.is_file() else sorted(place.iterdir())
        found = [self._told(child) for child in children]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if not (self.root / path).exists():
            raise FileNotFoundError(path)
        return self._told(self.root / path)

    def _told(self, place):
        kind = "directory" if place.is_dir() else "file"
        name = place.relative_to(self.root).as_posix()
        return {"name": name, "size": place.stat().st_size, "type": kind}

    def _open(self, path, mode="rb", **_):
        if "r" not in mode:
            place = self.root / self._strip_protocol(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            return place.open("wb")  # for appending as well: as gcsfs does, with a warning
        return _File(self, path, mode, size=self.info(path)["size"])

    def cat_file(self, path, start=None, end=None, **_):
        path = self._strip_protocol(path)
        start, end = start or 0, self.info(path)["size"] if end is None else end
        self.asked.append((os.path.basename(path), start, end))
        with (self.root / path).open("rb") as file:
            file.seek(start)
            return file.read(end - start - self.cut)

    def makedirs(self, path, exist_ok=False):
        pass  # folders are there when something is in them

    def mkdir(self, path, create_parents=True, **_):
        pass

    def cp_file(self, path1, path2, **_):
        source, target = (self.root / self._strip_protocol(path) for path in (path1, path2))
        target.write_bytes(source.read_bytes())

    def rm_file(self, path):
        (self.root / self._strip_protocol(path)).unlink()

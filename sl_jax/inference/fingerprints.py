"""What tells one model from another, without reading all of it."""

import hashlib
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from sl_jax.checkpoints.huggingface import TensorFiles
from sl_jax.checkpoints.source import resolve_model

_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
_WEIGHTS = ".safetensors"
_WHOLE = 4096  # Tensors of up to so many elements enter a fingerprint whole.
_WHOLE_BYTES = 2**26  # Other files of up to so many bytes do, too;
_HASHED_BYTES = 2**20  # of larger ones, so many at either end.
_READERS = 16  # A remote store answers slowly.


def checkpoint_digest(model: str) -> str:
    """SHA-256 (hex) of a checkpoint's files, without reading its forty gigabytes.

    Of weights it takes names, shapes and samples of every tensor, see `add_tensors`: it changes
    with any training, and with any adapter folded in.

    Raises:
      CheckpointError: there is no such checkpoint, or its weights are damaged.
    """
    folder = resolve_model(model)
    digest = hashlib.sha256()
    for component in _COMPONENTS:
        inside = folder / component
        files = [p for p in sorted(inside.iterdir()) if not p.is_dir()] if inside.is_dir() else []
        for path in (p for p in files if p.suffix != _WEIGHTS):
            digest.update(f"{component}/{path.name} {_file_digest(path)}\n".encode())
        if any(path.suffix == _WEIGHTS for path in files):
            digest.update(f"{component}\n".encode())
            with TensorFiles(inside) as tensors:
                add_tensors(digest, tensors, tensors.names())
    return digest.hexdigest()


def add_tensors(digest: Any, tensors: TensorFiles, names: Iterable[str]) -> None:
    """Adds tensors to a hash, in the order of their names; how files split them does not count.

    Small ones enter whole and large ones by their first, middle and last row: retraining changes
    them, as a product of low rank does that is added to all of a matrix.

    Raises:
      CheckpointError: one of them cannot be read.
    """
    ordered = sorted(names)
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda name: _sampled(tensors, name), ordered)
        for name, parts in zip(ordered, read, strict=True):
            digest.update(f"{name} {tensors.shape(name)}\n".encode())
            for part in parts:
                digest.update(part.tobytes())


def _sampled(tensors: TensorFiles, name: str) -> list[np.ndarray]:
    shape = tensors.shape(name)
    if math.prod(shape) <= _WHOLE:
        return [tensors.read(name)]
    rows = (0, shape[0] // 2, shape[0] - 1)
    return [tensors.read(name, (slice(row, row + 1),)) for row in rows]


def _file_digest(path: epath.Path) -> str:
    size = path.stat().length
    if size <= _WHOLE_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        head = file.read(_HASHED_BYTES)
        file.seek(size - _HASHED_BYTES)
        return hashlib.sha256(f"{size}\n".encode() + head + file.read()).hexdigest()

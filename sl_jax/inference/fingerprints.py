"""What tells one model from another, without reading all of it."""

import hashlib

from sl_jax.checkpoints.source import resolve_model

_HASHED_BYTES = 2**20
_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def checkpoint_digest(model: str) -> str:
    """SHA-256 (hex) of names, sizes, heads and tails of a checkpoint's files.

    It changes with any training, and does not read forty gigabytes.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    folder = resolve_model(model)
    digest = hashlib.sha256()
    for component in _COMPONENTS:
        inside = folder / component
        for path in sorted(inside.iterdir()) if inside.is_dir() else ():
            if path.is_dir():
                continue
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                head = file.read(_HASHED_BYTES)
                file.seek(max(size - _HASHED_BYTES, 0))
                tail = file.read(_HASHED_BYTES)
            parts = f"{component}/{path.name} {size}\n".encode(), head, tail
            digest.update(hashlib.sha256(b"".join(parts)).digest())
    return digest.hexdigest()

"""A checkpoint with an adapter folded into its weights, written tensor by tensor.

The result has the base's files, names, types and sharding; only the bytes of adapted weights
differ. At most one tensor is in memory, in float32 beside its own type.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from sl_jax.checkpoints.huggingface import (
    CheckpointError,
    TensorFiles,
    local_path,
    read_config,
    weight_files,
)
from sl_jax.checkpoints.lora_modules import LoraModule, Modules, refuse
from sl_jax.checkpoints.safetensors_file import FLOATS, Entry, read_header

_MODEL = "transformer"
_SPARE_BYTES = 2**26


class Merged(NamedTuple):
    """What was written: number of changed tensors, of all of the transformer, and its bytes."""

    changed: int
    tensors: int
    size: int


def merge(base: epath.PathLike, modules: Modules, output: epath.PathLike) -> Merged:
    """Writes `base` with an adapter folded into its transformer as a new checkpoint folder.

    Each adapted weight W becomes W + scale · up @ down, computed in float32 and rounded once to the
    type that W has. All else, index and other components among it, is copied. The folder appears
    when it is whole.

    Args:
        base: checkpoint in the diffusers layout, on a local disk.
        modules: the adapter.
        output: folder that does not exist yet.

    Raises:
        CheckpointError: the adapter does not fit the base, the base is damaged, or there is no
            place for the result.
    """
    base, output = local_path(base), local_path(output)
    read_config(base, "model_index.json")
    _check_fit(base / _MODEL, modules)
    _check_place(base, output)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged = _written(base, modules, partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merged


def _check_fit(folder: Path, modules: Modules) -> None:
    problems = []
    with TensorFiles(folder) as files:
        for name, module in modules.items():
            wanted = len(module.up), module.down.shape[1]
            if f"{name}.weight" not in files:
                problems.append(f"{name} is adapted, but the base has no such module")
            elif files.shape(f"{name}.weight") != wanted:
                shape = files.shape(f"{name}.weight")
                problems.append(f"{name} is adapted as {wanted}, but is {shape} in the base")
    for entry in _entries(folder):
        if entry.name.removesuffix(".weight") in modules and entry.dtype not in FLOATS:
            problems.append(f"{entry.name} is of type {entry.dtype}, not a 16 or 32-bit float")
    refuse(f"the adapter for {folder}", problems)


def _entries(folder: Path) -> Iterator[Entry]:
    for file in weight_files(folder):
        with file.open("rb") as source:
            yield from read_header(source, file).entries


def _check_place(base: Path, output: Path) -> None:
    if output.exists():
        raise CheckpointError(f"{output} exists; please name a folder that does not exist yet")
    if output.resolve().is_relative_to(base.resolve()):
        raise CheckpointError(f"{output} is inside the base; please name a folder outside of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    size = sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) + _SPARE_BYTES
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise CheckpointError(
            f"{output} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; please name a "
            "folder on a larger disk"
        )


def _written(base: Path, modules: Modules, folder: Path) -> Merged:
    weights = weight_files(base / _MODEL)
    skipped = {str(base / _MODEL): {p.name for p in weights}, str(base): {".git", ".cache"}}
    shutil.copytree(base, folder, ignore=lambda path, _: skipped.get(path, set()))
    size = sum(file.stat().st_size for file in weights)
    changed = tensors = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="merging") as progress:
        for file in weights:
            for touched, written in _rewritten(file, folder / _MODEL / file.name, modules):
                changed, tensors = changed + touched, tensors + 1
                progress.update(written)
    return Merged(changed, tensors, size)


def _rewritten(file: Path, target: Path, modules: Modules) -> Iterator[tuple[bool, int]]:
    """Copies a safetensors file with the adapter; per tensor, whether it changed and its bytes."""
    with file.open("rb") as source, target.open("wb") as sink:
        header = read_header(source, file)
        sink.write(header.content)
        for entry in header.entries:
            data = source.read(entry.end - entry.begin)
            module = modules.get(entry.name.removesuffix(".weight"))
            module = module if entry.name.endswith(".weight") else None
            sink.write(data if module is None else _folded(data, entry, module))
            yield module is not None, len(data)


def _folded(data: bytes, entry: Entry, module: LoraModule) -> bytes:
    weight = np.frombuffer(data, FLOATS[entry.dtype]).reshape(entry.shape)
    update = (np.float32(module.scale) * module.up) @ module.down
    return (weight.astype(np.float32) + update).astype(weight.dtype).tobytes()

"""Checkpoints in the diffusers / transformers folder layout: config.json and safetensors.

Reading goes tensor by tensor, and shard by shard, from memory-mapped files straight into sharded
arrays; stacked layers are written into one buffer per device shard, without a second copy. PyTorch
pickles are refused.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sl_jax.checkpoints.naming import Naming, Source, sources, to_parameter, to_tensor

_MAX_SHARD_BYTES = 5 * 2**30
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, with every reason in the message."""


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


class TensorFiles:
    """The tensors of one component folder (sharded with index, or a single file).

    Use as a context manager: files stay memory-mapped until it closes.

    Raises:
        CheckpointError: no safetensors, only pickled weights, an unreadable file, a tensor in two
            files, or an index that names files which are not there.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = local_path(folder)
        self._where: dict[str, Any] = {}
        with ExitStack() as stack:
            for file in weight_files(self.folder):
                self._open(file, stack)
            self._stack = stack.pop_all()

    def _open(self, file: FilePath, stack: ExitStack) -> None:
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
        twice = sorted(set(opened.keys()) & set(self._where))
        if twice:
            raise CheckpointError(
                f"{file} repeats {len(twice)} tensors of other files beside it, {twice[0]} for "
                "one; please keep one set of weights in the folder"
            )
        self._where.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects."""
        try:
            part = self._where[name].get_slice(name)
            return part[index] if index else part[...]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder}: tensor {name} cannot be read: {error}"
            ) from error


def weight_files(folder: FilePath) -> list[FilePath]:
    """The safetensors files of one component folder: those of its index, or all.

    Raises:
        CheckpointError: there are none, or the index names files which are not there.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_config(folder, indices[0].name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{indices[0]} holds no object 'weight_map'")
        names = sorted({str(file) for file in weight_map.values()})
        absent = [n for n in names if not (folder / n).is_file()]
        if absent:
            raise CheckpointError(f"{indices[0]} names files that are not there: {absent}")
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


def local_path(folder: epath.PathLike) -> FilePath:
    """`folder` as a path on this machine, where weights can be memory-mapped.

    Raises:
        CheckpointError: it is on a remote store.
    """
    folder = epath.Path(folder)
    if "://" in str(folder):
        raise CheckpointError(
            f"{folder} is remote, and weights are memory-mapped; please copy the folder to a local "
            "disk (or mount the bucket) and pass that path"
        )
    return FilePath(folder)


def load_params(
    folder: epath.PathLike,
    naming: Naming,
    abstract: Mapping[str, Any],
    unused: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Loads the parameters of one model.

    Args:
        folder: component folder, for example `CHECKPOINT/transformer`.
        naming: rule table of the model.
        abstract: tree of `jax.ShapeDtypeStruct`; a leaf with a `sharding` becomes an array with
            this sharding, each process reading only its own shards.
        unused: substrings of tensor names that may be present without being loaded.

    Raises:
        CheckpointError: lists every missing, surplus and mis-shaped tensor.
    """
    flat = traverse_util.flatten_dict(abstract)
    plan = dict(sources(naming, {path: tuple(leaf.shape) for path, leaf in flat.items()}))
    with TensorFiles(folder) as files:
        _check(files, plan, unused)
        loaded = {path: _load(files, source, flat[path]) for path, source in plan.items()}
    return traverse_util.unflatten_dict(loaded)


def _check(files: TensorFiles, plan: Mapping[Any, Source], unused: tuple[str, ...]) -> None:
    wanted = {name: source.shape for source in plan.values() for name in source.names}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in files]
    surplus = files.names() - set(wanted)
    problems += [f"surplus: {n}" for n in sorted(surplus) if not any(u in n for u in unused)]
    problems += [
        f"shape of {name}: {files.shape(name)}, expected {shape}"
        for name, shape in wanted.items()
        if name in files and files.shape(name) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{files.folder} does not fit the model its config.json describes:\n  "
            + "\n  ".join(problems)
        )


def _load(files: TensorFiles, source: Source, leaf: Any) -> jax.Array:
    stacked = len(leaf.shape) > len(to_parameter_shape(source))

    @functools.cache  # Devices that hold the same shard share one buffer.
    def part(*bounds: tuple[int | None, int | None]) -> np.ndarray:
        index = tuple(slice(*ends) for ends in bounds)
        if not stacked:
            return _rows(files, source, source.names[0], index).astype(leaf.dtype, copy=False)
        names = source.names[index[0]]
        first = _rows(files, source, names[0], index[1:])
        buffer = np.empty((len(names), *first.shape), leaf.dtype)
        buffer[0] = first
        for row, name in enumerate(names[1:], 1):
            buffer[row] = _rows(files, source, name, index[1:])
        return buffer

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return part(*((ends.start, ends.stop) for ends in index))

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.numpy.asarray(shard((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def to_parameter_shape(source: Source) -> tuple[int, ...]:
    """Shape of one row of the parameter that `source` fills."""
    return to_parameter(np.broadcast_to(np.int8(0), source.shape), source.layout).shape


def _rows(files: TensorFiles, source: Source, name: str, index: tuple[slice, ...]) -> np.ndarray:
    if source.layout == "linear" and index:
        return files.read(name, index[::-1]).T
    if source.layout == "same" and index:
        return files.read(name, index)
    return to_parameter(files.read(name), source.layout)[index]


def named_tensors(
    naming: Naming, params: Mapping[str, Any], dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint names and tensors of a parameter tree, in sorted order of paths."""
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    for path, source in sources(naming, {p: leaf.shape for p, leaf in flat.items()}):
        leaf = flat[path] if dtype is None else flat[path].astype(dtype)
        rows = leaf if len(leaf.shape) > len(to_parameter_shape(source)) else leaf[None]
        for name, row in zip(source.names, rows, strict=True):
            yield name, np.ascontiguousarray(to_tensor(row, source))


def save_params(
    folder: epath.PathLike,
    tensors: Iterator[tuple[str, np.ndarray]] | Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    stem: str = "diffusion_pytorch_model",
) -> None:
    """Writes config.json and safetensors, in shards of at most 5 GB with an index beyond that.

    Weights of the same stem that the folder held before are replaced.
    """
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (*folder.glob(f"{stem}.safetensors*"), *folder.glob(f"{stem}-*.safetensors")):
        earlier.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in dict(tensors).items():
        if size + tensor.nbytes > _MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", {"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")

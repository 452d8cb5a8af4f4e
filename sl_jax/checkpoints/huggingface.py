"""Checkpoints in the diffusers / transformers folder layout: config.json and safetensors.

Reading goes by byte ranges from local or remote files straight into sharded arrays, see
`checkpoints.loading`. Writing goes shard by shard. PyTorch pickles are refused.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save_file

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.loading import Loader, to_parameter_shape
from sl_jax.checkpoints.naming import Naming, Source, sources, to_tensor
from sl_jax.checkpoints.tensor_files import TensorFiles, local_path, read_config, weight_files

__all__ = [
    "CheckpointError",
    "TensorFiles",
    "load_params",
    "local_path",
    "named_tensors",
    "read_config",
    "save_params",
    "weight_files",
]

_MAX_SHARD_BYTES = 5 * 2**30


def load_params(
    folder: epath.PathLike,
    naming: Naming,
    abstract: Mapping[str, Any],
    unused: tuple[str, ...] = (),
    on_host: Collection[str] = (),
) -> dict[str, Any]:
    """Loads the parameters of one model.

    Beyond the finished arrays this takes, on the host, one shard of one parameter of a local
    checkpoint, or the process's shards of one parameter of a remote one. With several processes,
    all of them call it together.

    Args:
        folder: component folder, for example `CHECKPOINT/transformer`; local, or gs://….
        naming: rule table of the model.
        abstract: tree of `jax.ShapeDtypeStruct`; a leaf with a `sharding` becomes an array with
            this sharding, each process reading only its own shards.
        unused: substrings of tensor names that may be present without being loaded.
        on_host: first parts of paths whose parameters stay in the hosts' memory, as `HostArray`s.

    Raises:
        CheckpointError: lists every missing, surplus and mis-shaped tensor, or names the file and
            the tensor that are damaged.
    """
    flat = traverse_util.flatten_dict(abstract)
    plan = dict(sources(naming, {path: tuple(leaf.shape) for path, leaf in flat.items()}))
    with TensorFiles(folder) as files:
        _check(files, plan, unused)
        with Loader(files, flat.values()) as loader:
            loaded = {
                path: loader.load(source, flat[path], path[0] in on_host)
                for path, source in plan.items()
            }
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


def named_tensors(
    naming: Naming,
    params: Mapping[str, Any],
    dtype: Any = None,
    whole: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint names and tensors of a parameter tree, in sorted order of paths.

    One tensor at a time is fetched from its devices.

    Args:
        naming: rule table of the model.
        params: tree of arrays.
        dtype: of the tensors; None for that of each parameter.
        whole: fetches an array. Of those that are spread over several processes, which then all
            go through this together, `parallel.processes.to_everywhere` does.
    """
    flat = traverse_util.flatten_dict(params)
    for path, source in sources(naming, {p: np.shape(leaf) for p, leaf in flat.items()}):
        for name, row in zip(source.names, _rows(flat[path], source), strict=True):
            fetched = whole(row)
            fetched = fetched if dtype is None else fetched.astype(dtype)
            yield name, np.ascontiguousarray(to_tensor(fetched, source))


def _rows(leaf: Any, source: Source) -> Iterator[Any]:
    """What fills each of a parameter's tensors: its layers where it is stacked, else all of it."""
    if len(np.shape(leaf)) == len(to_parameter_shape(source)):
        yield leaf
    elif isinstance(leaf, jax.Array):
        yield from (_layer(leaf, number) for number in range(len(leaf)))
    else:
        yield from leaf


@jax.jit
def _layer(leaf: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def save_params(
    folder: epath.PathLike,
    tensors: Iterator[tuple[str, np.ndarray]] | Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    stem: str = "diffusion_pytorch_model",
) -> None:
    """Writes config.json and safetensors, in shards of at most 5 GB with an index beyond that.

    One shard at a time is in memory. Weights of the same stem that the folder held before are
    replaced.
    """
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (*folder.glob(f"{stem}.safetensors*"), *folder.glob(f"{stem}-*.safetensors")):
        earlier.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    parts: list[FilePath] = []
    index: dict[str, int] = {}
    total = 0
    for shard in _shards(iter(pairs)):
        parts.append(folder / f"{stem}.{len(parts)}.partial")
        save_file(shard, parts[-1], {"format": "pt"})
        index |= dict.fromkeys(shard, len(parts))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(parts) == 1:
        parts[0].rename(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    weight_map = {tensor: names[number - 1] for tensor, number in index.items()}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _shards(pairs: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in pairs:
        if size + tensor.nbytes > _MAX_SHARD_BYTES and shard:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard

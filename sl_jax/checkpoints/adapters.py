"""Adapters wherever they come from: PEFT folders, diffusers' LoRA files, checkpoints of runs.

All of them by a local or remote path, the first two also from the Hugging Face hub.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal, NamedTuple

from etils import epath
from flax import traverse_util

from sl_jax.checkpoints import diffusers_lora, peft
from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.huggingface import CheckpointError, read_config
from sl_jax.checkpoints.lora_modules import (
    LoraModule,
    refuse,
    stack_size,
    to_adapter,
    to_modules,
)
from sl_jax.checkpoints.orbax import RunCheckpoints, find_step, read_entry
from sl_jax.checkpoints.source import download, is_hub_id
from sl_jax.models.lora import Adapter

_AVERAGE = "ema"


class AdapterSource(NamedTuple):
    """Where an adapter is: a PEFT folder, a LoRA file, or the folder of one checkpoint."""

    kind: Literal["peft", "diffusers", "run"]
    path: epath.Path


class AdapterModules(NamedTuple):
    """An adapter module by module.

    Attributes:
        modules: by dotted name.
        layers: number of blocks of its model, if the source tells.
        base_model: name of its model, if the source tells.
        config: the configuration of the run that trained it; empty if the source is in no work
            directory.
    """

    modules: dict[str, LoraModule]
    layers: int | None
    base_model: str | None
    config: Mapping[str, Any]


def locate_adapter(name: epath.PathLike) -> AdapterSource:
    """What `name` means.

    Args:
        name: a PEFT folder; a diffusers LoRA file, or a folder with one; a work directory, whose
            newest checkpoint is taken, or the folder of one checkpoint; or a hub id, OWNER/NAME,
            optionally with a folder inside: OWNER/NAME/FOLDER. What exists locally comes first.

    Raises:
        CheckpointError: it is none of these.
    """
    path = reachable(name)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return _file(path)
    *parts, inside = (*os.fspath(name).strip("/").split("/", 2), "")[:3]
    repository = "/".join(parts)
    # Of OWNER/NAME/FOLDER, what is there as OWNER/NAME decides whether it is meant to be local.
    if os.fspath(name)[0] == "/" or not is_hub_id(repository) or epath.Path(repository).exists():
        raise CheckpointError(
            f"{path} does not exist, so that it holds no {peft.CONFIG} either; please pass a PEFT "
            "folder, a diffusers LoRA file, the work directory of a run, or a hub id OWNER/NAME"
        )
    return _in_folder(download(repository, inside))


def _in_folder(folder: epath.Path) -> AdapterSource:
    if (folder / peft.CONFIG).exists():
        return AdapterSource("peft", folder)
    step = find_step(folder)
    if step is not None:
        return AdapterSource("run", step)
    files = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors"]
    named = [p for p in files if p.name == diffusers_lora.WEIGHTS]
    if len(files) == 1 or named:
        return AdapterSource("diffusers", (named or files)[0])
    peft.refuse_pickles(folder)
    found = f"several LoRA files, {[p.name for p in files]}" if files else "no LoRA file"
    raise CheckpointError(
        f"{folder} holds no {peft.CONFIG}, no checkpoints of a run, and {found}; please pass "
        "one adapter"
    )


def _file(path: epath.Path) -> AdapterSource:
    if path.name == peft.WEIGHTS and (path.parent / peft.CONFIG).exists():
        return AdapterSource("peft", path.parent)
    if path.suffix == ".safetensors":
        return AdapterSource("diffusers", path)
    if peft.is_pickle(path):
        raise CheckpointError(
            f"{path} is pickled, and can run code when loaded; please convert it to safetensors"
        )
    raise CheckpointError(f"{path} is no adapter; please pass a .safetensors file or a folder")


def load_adapter(name: epath.PathLike, params: Mapping[str, Any]) -> Adapter:
    """Reads any adapter for the model that `params` belong to.

    Args:
        name: see `locate_adapter`.
        params: parameters of the base, or their shapes.

    Returns:
        float32 arrays on the host; `checkpoints.pipeline.shard_adapter` puts them in place.

    Raises:
        CheckpointError: lists everything about it that is no plain LoRA of this model.
    """
    source = locate_adapter(name)
    problems: list[str] = []
    adapter = to_adapter(_modules(source, problems), params, problems)
    refuse(name, problems)
    return adapter


def read_adapter(name: epath.PathLike) -> AdapterModules:
    """Reads any adapter without its model.

    Raises:
        CheckpointError: lists everything about it that is no plain LoRA.
    """
    source = locate_adapter(name)
    problems: list[str] = []
    if source.kind == "run":
        adapter, config = _run_adapter(source.path), _run_config(source.path.parent)
        return AdapterModules(to_modules(adapter), stack_size(adapter), config.get("model"), config)
    modules = _modules(source, problems)
    refuse(name, problems)
    told = None
    if source.kind == "peft":
        told = read_config(source.path, peft.CONFIG).get("base_model_name_or_path")
        if not isinstance(told, str | None):
            raise CheckpointError(f"{name}: base_model_name_or_path is {told!r}, which is no name")
    return AdapterModules(modules, None, told, _run_config(source.path))


def _modules(source: AdapterSource, problems: list[str]) -> dict[str, LoraModule]:
    if source.kind == "peft":
        return peft.read_peft(source.path, problems)
    if source.kind == "diffusers":
        return diffusers_lora.read_diffusers(source.path, problems)
    return to_modules(_run_adapter(source.path))


def _run_adapter(step: epath.Path) -> Adapter:
    """The averaged adapter of a checkpoint, which is what a run evaluates and exports."""
    tree = read_entry(step, (_AVERAGE,))
    if not isinstance(tree, Mapping) or tree.keys() != {"lora", "lora_scale"}:
        raise CheckpointError(
            f"{step} is of a run that trains whole parameters; please pass one of a run that "
            "trains an adapter"
        )
    return Adapter(**tree)


def _run_config(part: epath.Path) -> Mapping[str, Any]:
    """The configuration of the run whose `checkpoints` or `adapter` this is; {} of another's."""
    run = part.parent
    inside = part.name in ("checkpoints", "adapter") and (run / "checkpoints").exists()
    return read_config(run) if inside and (run / "config.json").exists() else {}


def save_adapter_checkpoint(folder: epath.PathLike, adapter: Adapter) -> None:
    """Writes an adapter as checkpoint 0 of `folder`, as `locate_adapter` finds it there.

    Raises:
        CheckpointError: an adapter or a checkpoint is there already, or it cannot be written.
    """
    folder = epath.Path(folder)
    taken = (folder / peft.CONFIG).exists() or find_step(folder) is not None
    if not taken:
        with closing(RunCheckpoints(folder)) as checkpoints:
            taken = checkpoints.latest is not None  # a damaged one
            if not taken:
                checkpoints.save(0, {_AVERAGE: adapter})
    if taken:
        raise CheckpointError(f"{folder} holds an adapter already; please name another folder")


def adapter_digest(name: epath.PathLike) -> str:
    """SHA-256, in hexadecimal, of an adapter's weights and settings as they are stored."""
    kind, path = locate_adapter(name)
    if kind == "run":
        leaves = traverse_util.flatten_dict(_run_adapter(path).variables(), sep="/")
        parts = [
            f"{key} {leaves[key].shape}".encode() + leaves[key].tobytes() for key in sorted(leaves)
        ]
    else:
        files = [path] if kind == "diffusers" else [path / peft.CONFIG, path / peft.WEIGHTS]
        parts = [file.read_bytes() for file in files]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()

"""Adapters as diffusers' LoRA files: one safetensors file, settings in its header.

`pipeline.load_lora_weights(folder)` reads them. Without the settings diffusers takes every scale,
alpha / r, for 1.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.checkpoints.lora_modules import LoraModule, Modules, find_prefix
from sl_jax.checkpoints.peft import METADATA, peft_settings, scaled, write_lora
from sl_jax.checkpoints.safetensors_file import read_tensors

WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."
_log = logging.getLogger(__name__)


def write_diffusers(
    folder: epath.PathLike, modules: Modules, base_model: str, layers: int | None = None
) -> None:
    """Writes `pytorch_lora_weights.safetensors`; arguments as of `peft.write_peft`."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_lora(folder / WEIGHTS, modules, peft_settings(modules, base_model, layers), _PREFIX)


def read_diffusers(path: epath.PathLike, problems: list[str]) -> dict[str, LoraModule]:
    """The modules of a LoRA file; what is no plain LoRA of a transformer goes to `problems`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = read_tensors(path)
    settings = None
    if METADATA in file.metadata:
        prefix = find_prefix([*file.tensors, *file.others])
        settings = _settings(file.metadata[METADATA], prefix, path, problems)
    else:
        _log.info("%s names no alpha: its scale is 1, as diffusers takes it.", path)
    return scaled(file, settings, problems)


def _settings(
    text: str, prefix: str, path: epath.PathLike, problems: list[str]
) -> Mapping[str, Any]:
    try:
        packed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {METADATA} is not valid JSON: {error}") from error
    if not isinstance(packed, dict):
        raise CheckpointError(f"{path}: {METADATA} must hold a JSON object")
    others = sorted(name for name in packed if not name.startswith(prefix))
    problems += [f"{METADATA}: {name} is of another component" for name in others]
    return {
        name.removeprefix(prefix): value
        for name, value in packed.items()
        if name.startswith(prefix)
    }

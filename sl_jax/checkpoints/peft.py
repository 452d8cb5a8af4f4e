"""Adapters as PEFT folders, which PyTorch's PEFT and diffusers load."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath

from sl_jax.checkpoints.huggingface import CheckpointError, read_config
from sl_jax.checkpoints.lora_modules import (
    PREFIXES,
    LoraModule,
    Modules,
    check_settings,
    find_prefix,
    pair_tensors,
    stack_size,
    to_modules,
    with_scales,
)
from sl_jax.checkpoints.safetensors_file import TensorFile, read_tensors, write_tensors
from sl_jax.models.lora import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"
_PREFIX = PREFIXES[0]


def save_peft(folder: epath.PathLike, adapter: Adapter, base_model: str) -> None:
    """Writes an adapter as a PEFT folder; see `write_peft`."""
    write_peft(folder, to_modules(adapter), base_model, stack_size(adapter))


def write_peft(
    folder: epath.PathLike, modules: Modules, base_model: str, layers: int | None = None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are float32: `lora_A.weight` (r, in) and `lora_B.weight` (out, r); the update is
    alpha / r · B A. Modules whose rank or alpha differs from the commonest stand in `rank_pattern`
    and `alpha_pattern`. The weights carry the settings in their header too, where diffusers'
    `load_lora_adapter(…, prefix="base_model.model")` looks for them.

    Args:
        folder: made if need be.
        modules: by dotted name.
        base_model: noted as the model that the adapter belongs to.
        layers: number of blocks of the model, where known: modules of all blocks then have one
            target for all.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = peft_settings(modules, base_model, layers)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    write_lora(folder / WEIGHTS, modules, settings, _PREFIX)


def write_lora(
    path: epath.Path, modules: Modules, settings: Mapping[str, Any], prefix: str
) -> None:
    """Writes all modules, and their settings as metadata, in one file."""
    tensors = {}
    for name, module in modules.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = module.down
        tensors[f"{prefix}{name}.lora_B.weight"] = module.up
    packed = {f"{prefix}{name}": value for name, value in settings.items()}
    write_tensors(path, tensors, {METADATA: json.dumps(packed, indent=2, sort_keys=True)})


def peft_settings(modules: Modules, base_model: str, layers: int | None) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: module.alpha for name, module in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(modules, layers),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(modules: Modules, layers: int | None) -> list[str]:
    """Names that match the adapted modules and no others."""
    blocks: dict[str, list[str]] = {}
    targets = []
    for name in modules:
        if name.startswith("transformer_blocks."):
            blocks.setdefault(name.split(".", 2)[2], []).append(name)
        else:
            targets.append(name)
    for ending, names in blocks.items():
        targets += [ending] if len(names) == layers else names
    return sorted(targets)


def read_peft(folder: epath.PathLike, problems: list[str]) -> dict[str, LoraModule]:
    """The modules of a PEFT folder; what is no plain LoRA goes to `problems`.

    Raises:
        CheckpointError: the folder has no such files, or they are damaged, or pickled.
    """
    folder = epath.Path(folder)
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} is no PEFT folder: it holds no {CONFIG}; please pass the folder "
            f"that was saved, with its {WEIGHTS}"
        )
    if not (folder / WEIGHTS).exists():
        refuse_pickles(folder)
        raise CheckpointError(f"{folder} holds no {WEIGHTS}; please pass the whole folder")
    return scaled(read_tensors(folder / WEIGHTS), read_config(folder, CONFIG), problems)


def scaled(
    file: TensorFile, settings: Mapping[str, Any] | None, problems: list[str]
) -> dict[str, LoraModule]:
    """The modules of a file by PEFT's settings; without any the scale is 1."""
    pairs = pair_tensors(file, find_prefix(file.tensors), problems)
    wrong: list[str] = []
    if settings is not None:
        check_settings(settings, wrong)
    problems += wrong
    if settings is None or wrong:
        return {name: LoraModule(*pair, 1.0) for name, pair in pairs.items()}
    return with_scales(pairs, settings, problems)


def refuse_pickles(folder: epath.Path) -> None:
    """Raises CheckpointError if `folder` holds weights that only running code can read."""
    pickled = [p.name for p in sorted(folder.iterdir()) if is_pickle(p)]
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickled)}), which can run "
            "code when loaded; please convert them to safetensors"
        )


def is_pickle(path: epath.Path) -> bool:
    """Whether a file is PyTorch's older format, by its name."""
    return path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")

"""Adapters as PEFT folders, which PyTorch's PEFT and diffusers load."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save

from sl_jax.checkpoints.huggingface import CheckpointError, TensorFiles, read_config
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.models.lora import Adapter

_PREFIX = "base_model.model."


def save_peft(folder: epath.PathLike, adapter: Adapter, base_model: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are float32: `lora_A.weight` (r, in) and `lora_B.weight` (out, r); the update is
    alpha / r · B A. Modules whose rank or alpha differs from the commonest stand in `rank_pattern`
    and `alpha_pattern`.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    weights = traverse_util.flatten_dict(adapter.lora)
    scales = traverse_util.flatten_dict(adapter.lora_scale)
    for path in sorted({p[:-1] for p in weights}):
        a, b = (np.asarray(weights[(*path, leaf)]) for leaf in "ab")
        scale = np.asarray(scales[(*path, "scale")])
        template = MMDIT.module(path)
        rows = zip(a, b, scale, strict=True) if a.ndim == 3 else [(a, b, scale)]
        for layer, (down, up, factor) in enumerate(rows):
            name = template.format(layer)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(up.T)
            ranks[name] = down.shape[1]
            # In float32, where 100 / 48 · 48 is 100 again.
            alphas[name] = float(np.float32(factor) * np.float32(down.shape[1]))
    content = _config(ranks, alphas, base_model)
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base_model: str
) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    targets = {
        name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in alphas
    }
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
        "target_modules": sorted(targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def load_peft(folder: epath.PathLike, params: Mapping[str, Any]) -> Adapter:
    """Reads a PEFT folder as an adapter of the model that `params` belong to.

    The scale of a module is alpha / r, or alpha / √r with `use_rslora`, where `alpha_pattern` may
    name another alpha by a regular expression over module names, and r is the rank of its tensors.
    Where the layers of a stack differ, lower ranks are padded with zeros, and layers without an
    adapter are zero: both are exact.

    Args:
        folder: with `adapter_config.json` and safetensors.
        params: parameters of the base, or their shapes.

    Returns:
        float32 arrays on the host; `checkpoints.pipeline.shard_adapter` puts them in place.

    Raises:
        CheckpointError: the folder holds no LoRA, one of a kind that this model cannot express, or
            modules that it does not have.
    """
    folder = epath.Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} is no PEFT folder: it holds no adapter_config.json; please pass the folder "
            "that was saved, with its adapter_model.safetensors"
        )
    config = read_config(folder, "adapter_config.json")
    _check_plain(folder, config)
    with TensorFiles(folder) as files:
        modules = _modules(folder, {name: files.read(name) for name in files.names()})
    lora: dict[tuple[str, ...], np.ndarray] = {}
    scales: dict[tuple[str, ...], np.ndarray] = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[-1] != "kernel":
            continue
        template, (*stacked, inputs, outputs) = MMDIT.module(path[:-1]), kernel.shape
        rows = {layer: template.format(layer) for layer in range(*(stacked or [1]))}
        found = {layer: modules.pop(name) for layer, name in rows.items() if name in modules}
        if found:
            rank = max(len(down) for down, _ in found.values())
            a = np.zeros((len(rows), inputs, rank), np.float32)
            b = np.zeros((len(rows), rank, outputs), np.float32)
            scale = np.zeros(len(rows), np.float32)
            for layer, (down, up) in found.items():
                own = len(down)
                if down.shape != (own, inputs) or up.shape != (outputs, own):
                    raise CheckpointError(
                        f"{folder}: {rows[layer]} has lora_A {down.shape} and lora_B {up.shape}, "
                        f"but the model's layer maps {inputs} to {outputs}; please use the base "
                        "model that the adapter was trained for"
                    )
                a[layer, :, :own], b[layer, :own] = down.T, up.T
                scale[layer] = _alpha(config, rows[layer]) / (
                    own**0.5 if config.get("use_rslora") else own
                )
            here = slice(None) if stacked else 0
            lora[(*path[:-1], "a")], lora[(*path[:-1], "b")] = a[here], b[here]
            scales[(*path[:-1], "scale")] = np.asarray(scale[here])
    if modules:
        raise CheckpointError(
            f"{folder} adapts {len(modules)} modules that the model does not have, "
            f"{sorted(modules)[0]} for one; please use the base model that it was trained for"
        )
    return Adapter(traverse_util.unflatten_dict(lora), traverse_util.unflatten_dict(scales))


def _check_plain(folder: epath.Path, config: Mapping[str, Any]) -> None:
    plain = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": None,
        "layer_replication": None,
    }
    wrong = {k: config[k] for k, v in plain.items() if config.get(k, v) not in (v, None, [])}
    if wrong:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: {wrong} is not supported; please pass a LoRA with "
            f"{ {k: plain[k] for k in wrong} }"
        )


def _modules(
    folder: epath.Path, tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B of every module, by its dotted name."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, leaf = name.removeprefix(_PREFIX).rpartition(".lora_")
        if module and name.startswith(_PREFIX) and leaf in ("A.weight", "B.weight"):
            pairs.setdefault(module, {})[leaf[0]] = tensor.astype(np.float32)
        else:
            unknown.append(name)
    unknown += [module for module, pair in pairs.items() if len(pair) < 2]
    if unknown or not pairs:
        raise CheckpointError(
            f"{folder} holds {len(pairs)} modules with lora_A and lora_B, and beside them "
            f"{unknown[:3] or 'nothing'}; please pass a plain PEFT LoRA"
        )
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def _alpha(config: Mapping[str, Any], module: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config["lora_alpha"])

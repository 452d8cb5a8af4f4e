"""Adapters as PEFT folders, which PyTorch's PEFT and diffusers load."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save_file

from sl_jax.checkpoints.naming import MMDIT
from sl_jax.models.lora import Adapter

_PREFIX = "base_model.model."


def save_peft(folder: epath.PathLike, adapter: Adapter, base_model: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are float32: `lora_A.weight` (r, in) and `lora_B.weight` (out, r); the update is
    alpha / r · B A. Modules whose alpha differs from the commonest stand in `alpha_pattern`.
    """
    folder = FilePath(epath.Path(folder))
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
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
            alphas[name] = float(factor) * down.shape[1]
    rank = next(iter(tensors.values())).shape[0]
    content = _config(rank, alphas, base_model)
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _config(rank: int, alphas: Mapping[str, float], base_model: str) -> dict[str, Any]:
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
        "rank_pattern": {},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }

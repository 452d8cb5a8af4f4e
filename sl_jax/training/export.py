"""Writes what `sft` trained as a checkpoint folder in the diffusers layout."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sl_jax.checkpoints.byte_ranges import is_remote
from sl_jax.checkpoints.huggingface import named_tensors, save_params
from sl_jax.checkpoints.naming import MMDIT, VAE
from sl_jax.models.codec import encode_frames
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.models.vae import Vae, VaeConfig

_PIPELINE = {
    "_class_name": "QwenImageLayeredPipeline",
    "_diffusers_version": "0.42.0",
    "processor": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


@contextmanager
def in_place_of(target: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `target` when the block is done.

    Cut short at any moment, it leaves `target` as it was, or missing, but never in part.
    """
    partial, earlier = (target.with_name(f".{target.name}.{end}") for end in ("partial", "earlier"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def place_problems(export: str) -> Iterator[str]:
    """What is wrong with `config.export`, whose content a checkpoint is to replace."""
    target = Path(export)
    if not export:
        yield "config.export is ''; please name a folder for the trained checkpoint"
    elif is_remote(export):
        yield f"config.export is {export!r}; please name a folder on a local disk"
    elif target.exists() and not (target / "model_index.json").exists():
        yield (
            f"config.export is {export!r}, which exists and is no checkpoint; please name a folder "
            "that does not exist yet, or a checkpoint to replace"
        )


def unit_statistics(channels: int) -> dict[str, Any]:
    """Latent statistics of an autoencoder that is not trained yet: mean 0, deviation 1."""
    return {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}


def with_latent_statistics(vae: Vae, params: Any, frames: np.ndarray, batch: int = 64) -> VaeConfig:
    """The autoencoder's config with mean and deviation per latent channel, measured on `frames`."""
    encode = jax.jit(lambda x: encode_frames(vae, params, x))
    batch = min(batch, len(frames))
    whole = len(frames) - len(frames) % batch
    latents = np.concatenate([encode(frames[i : i + batch]) for i in range(0, whole, batch)])
    axes = (0, 1, 2)
    return dataclasses.replace(
        vae.config,
        latents_mean=tuple(float(x) for x in latents.mean(axes)),
        latents_std=tuple(float(x) for x in latents.std(axes)),
    )


def save_vae(folder: Path, config: VaeConfig, params: Any, dtype: Any) -> None:
    """Writes the `vae` component, its unused temporal tensors as zeros."""
    tensors = itertools.chain(named_tensors(VAE, params, dtype), _temporal(config, dtype))
    content = {"_class_name": "AutoencoderKLQwenImage", **dataclasses.asdict(config)}
    save_params(folder, tensors, content)


def _temporal(config: VaeConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The `time_conv` tensors of resamplers that also halve or double time."""
    widths = [config.base_dim * multiplier for multiplier in config.dim_mult]
    for level, temporal in enumerate(config.temperal_downsample):
        if temporal:
            index = level * (config.num_res_blocks + 1) + config.num_res_blocks
            name = f"encoder.down_blocks.{index}.time_conv"
            yield from _convolution(name, widths[level], widths[level], dtype)
    for level, temporal in enumerate(reversed(config.temperal_downsample)):
        if temporal:
            width = widths[::-1][level]
            name = f"decoder.up_blocks.{level}.upsamplers.0.time_conv"
            yield from _convolution(name, width, 2 * width, dtype)


def _convolution(
    name: str, inputs: int, outputs: int, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.zeros((outputs, inputs, 3, 1, 1), dtype)
    yield f"{name}.bias", np.zeros((outputs,), dtype)


def save_transformer(
    folder: Path,
    config: MMDiTConfig,
    params: Any,
    dtype: Any,
    whole: Callable[[Any], np.ndarray] = np.asarray,
) -> None:
    """Writes the `transformer` component, whose arrays `whole` fetches as for `named_tensors`."""
    save_params(folder, named_tensors(MMDIT, params, dtype, whole), config.to_dict())


def save_pipeline_files(folder: Path, shift: float) -> None:
    """Writes model_index.json and the scheduler: a fixed linear shift of `shift`.

    The pipeline's own rule, shift √(tokens / 256), would give small pictures a grid without high
    noise. Without dynamic shifting every scheduler applies the given one.
    """
    scheduler: Mapping[str, Any] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.42.0",
        "num_train_timesteps": 1000,
        "shift": shift,
        "time_shift_type": "linear",
        "use_dynamic_shifting": False,
    }
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for path, content in (
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", _PIPELINE),
    ):
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")

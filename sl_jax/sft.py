"""Supervised training on pictures with true layers: `python -m sl_jax.sft --config=…`.

Stages: `vae` trains the RGBA autoencoder, `flow` the MMDiT on its latents. Stopped and started
again, it goes on where it was; finished stages are not repeated.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, logging
from ml_collections import ConfigDict, config_flags

from sl_jax.checkpoints.orbax import RunCheckpoints
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.training import export, pools
from sl_jax.training.metrics import MetricsWriter
from sl_jax.training.optimizer import OptimizerConfig
from sl_jax.training.supervised import (
    Stage,
    StageConfig,
    fresh_params,
    reconstruction_loss,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_TRAIN_SEEDS = 1_000_000
_PACKED_PIXELS = 16


def main(argv: list[str]) -> None:
    """Runs the stages that are configured, in order, and writes the checkpoint."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    config = _CONFIG.value
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if "vae" in config.stages:
        train_vae(config, workdir / "vae")


def train_vae(config: ConfigDict, workdir: Path) -> None:
    """Stage `vae`: leaves config and parameters of the autoencoder in `workdir/export`."""
    if (workdir / "export").exists():
        logging.info("%s is finished.", workdir)
        return
    settings = config.vae
    shape = VaeConfig.from_dict(
        {
            "latents_mean": [0.0] * settings.z_dim,
            "latents_std": [1.0] * settings.z_dim,
            "input_channels": 4,
            **{
                name: settings[name]
                for name in (
                    "base_dim",
                    "z_dim",
                    "dim_mult",
                    "num_res_blocks",
                    "temperal_downsample",
                )
            },
        }
    )
    vae = Vae(shape)
    train, held_out = (
        np.concatenate([_frames(config, count, first, n) for n in config.data.layers])
        for first, count in ((_TRAIN_SEEDS, settings.designs), (0, 32))
    )
    stage = _stage(
        settings, {"frames": reconstruction_loss(vae, settings.kl_weight)}, workdir, config
    )
    size = config.data.size
    state = stage.start(
        fresh_params(vae, jax.random.key(config.seed), np.zeros((1, size, size, 4), np.float32))
    )
    state = stage.run(
        state,
        pools.FramePool(train, settings.batch, config.seed),
        lambda: iter([pools.FramePool(held_out, len(held_out), 0).held_out()]),
        "vae",
    )
    shape = export.with_latent_statistics(vae, state.ema, train[:8192])
    export.save_vae(workdir / "export", shape, state.ema, np.float32)


def _frames(config: ConfigDict, count: int, first: int, layers: int) -> np.ndarray:
    designs = pools.draw_designs(
        config.data.family, range(first, first + count), config.data.size, layers
    )
    return pools.with_picture(designs).reshape(-1, config.data.size, config.data.size, 4)


def _stage(settings: ConfigDict, losses: Any, workdir: Path, config: ConfigDict) -> Stage:
    optimizer = OptimizerConfig(
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.steps,
    )
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=2)
    resume = checkpoints.latest
    writer = MetricsWriter(workdir, None if resume is None else resume + 1)
    stage = StageConfig(settings.steps, optimizer, settings.ema)
    return Stage(stage, losses, checkpoints, writer, config.seed)


if __name__ == "__main__":
    app.run(main)

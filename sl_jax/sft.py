"""Supervised training on pictures with true layers: `python -m sl_jax.sft --config=…`.

Stages: `vae` trains the RGBA autoencoder, `flow` the MMDiT on its latents, from nothing, to a
checkpoint in the diffusers layout; `tune` fine-tunes a loaded checkpoint, to an adapter or another
checkpoint. Stopped and started again, it goes on where it was; finished stages are not repeated.
"""

import logging
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.pipeline import load_vae
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data import FolderError
from sl_jax.inference.prompts import DEFAULT_PROMPT, encode_prompts
from sl_jax.inference.tiny_text import make_tiny_text_encoder
from sl_jax.models.codec import encode_frames, to_unit_range
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import PACKED_PIXELS, LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.parallel.joining import DistributedConfig, joined
from sl_jax.parallel.processes import ProcessError
from sl_jax.training import export, finetune, pools
from sl_jax.training.console import set_up_logging
from sl_jax.training.flags import parse_config_flags
from sl_jax.training.supervised import (
    Frames,
    flow_loss,
    fresh_params,
    full_velocity,
    make_stage,
    reconstruction_loss,
)

_log = logging.getLogger("sl_jax")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_TRAIN_SEEDS = 1_000_000  # held-out designs count from 0, so the two never meet
_VAE_HELD_OUT = 32
_STATISTICS_FRAMES = 2048  # flat pictures, and as many layers


def main(argv: list[str]) -> None:
    """Runs the configured stages in order; the last one writes the result."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    config, stages = _CONFIG.value, {"vae": train_vae, "flow": train_flow, "tune": tune}
    for name in config.stages:
        if name not in stages:
            raise app.UsageError(f"config.stages names {name!r}; please use {', '.join(stages)}")
        try:
            stages[name](config, Path(config.workdir))
        except (CheckpointError, FolderError, ProcessError, finetune.TuneError) as error:
            sys.exit(f"{type(error).__name__}: {error}")


def train_vae(config: ConfigDict, workdir: Path) -> None:
    """Stage `vae`: leaves the autoencoder in `workdir/vae/export`."""
    folder, settings, size = workdir / "vae", config.vae, config.data.size
    if (folder / "export").exists():
        _log.info("%s is finished.", folder)
        return
    vae = Vae(
        VaeConfig.from_dict(settings.architecture.to_dict() | export.unit_statistics(settings))
    )
    pictures, layers = pools.pictures_and_layers(config.data, _TRAIN_SEEDS, settings.designs)
    held_out = pools.pictures_and_layers(config.data, 0, _VAE_HELD_OUT)
    losses = {"frames": reconstruction_loss(vae, settings.kl_weight)}
    stage = make_stage(settings, losses, folder, config.seed)
    pixels = np.zeros((1, size, size, 4), np.float32)
    state = stage.run(
        stage.start(fresh_params(vae, jax.random.key(config.seed), pixels)),
        pools.FramePool(pictures, layers, settings.batch, config.seed),
        [("frames", Frames(to_unit_range(np.concatenate(held_out))))],
        "vae",
    )
    frames = np.concatenate([pictures[:_STATISTICS_FRAMES], layers[:_STATISTICS_FRAMES]])
    shape = export.with_latent_statistics(vae, state.ema, frames)
    export.save_vae(folder / "export", shape, state.ema, np.float32)


def train_flow(config: ConfigDict, workdir: Path) -> None:
    """Stage `flow`, on the autoencoder of `workdir`; writes the checkpoint to `config.export`."""
    settings, target = config.flow, Path(config.export)
    make_tiny_text_encoder(target, config.seed)
    text = encode_prompts(target, [DEFAULT_PROMPT], dtype=np.float32).hidden[0]
    vae, vae_params = load_vae(workdir / "vae" / "export", np.float32)
    encode = jax.jit(partial(encode_frames, vae, vae_params))
    side = config.data.size // PACKED_PIXELS
    grids = [LatentGrid(layers, side, side) for layers in config.data.layers]
    train, held_out = (
        {
            grid: pools.cached_latents(
                workdir / "latents", encode, config.data, grid.layers, first, count, recolour
            )
            for grid in grids
        }
        for first, count, recolour in (
            (_TRAIN_SEEDS, settings.designs, True),
            (0, settings.held_out_designs, False),
        )
    )
    model = MMDiT(MMDiTConfig.from_dict(settings.architecture.to_dict()))
    losses = {
        grid: flow_loss(full_velocity(model, text, grid), settings.mu, settings.time_distribution)
        for grid in grids
    }
    stage = make_stage(settings, losses, workdir / "flow", config.seed)
    pool = pools.LatentPool(train, settings.batch, config.seed)
    grid, batch = pool(0)
    one = (batch.target[:1], batch.condition[:1], text[None], np.zeros(1, np.float32))
    params = fresh_params(model, jax.random.key(config.seed), *one, grid, method="initialise")
    examples = pools.LatentPool(held_out, settings.batch, 0).held_out()
    state = stage.run(stage.start(params), pool, examples, "flow")
    export.save_vae(target / "vae", vae.config, vae_params, config.export_dtype)
    export.save_transformer(target / "transformer", model.config, state.ema, config.export_dtype)
    export.save_pipeline_files(target, settings.mu)
    _log.info("The checkpoint is in %s.", target)


def tune(config: ConfigDict, workdir: Path) -> None:
    """Stage `tune`: fine-tunes `config.model` on `config.data`, on all processes of the run."""
    with joined(DistributedConfig(**config.distributed)) as processes:
        settings = finetune.from_mapping(config.to_dict())
        model = resolve_model(settings.model)
        encode = partial(
            encode_prompts,
            model,
            max_tokens=settings.data.max_text_tokens,
            cache_dir=workdir / "prompts",
            dtype=settings.compute.dtype,
        )
        print(f"The result is in {finetune.fine_tune(settings, model, encode, processes)}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_config_flags)

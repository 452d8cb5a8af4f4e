"""Supervised training on pictures with true layers: `python -m sl_jax.sft --config=…`.

Stage `tune` (`configs/sft.py`) fine-tunes a loaded checkpoint, to an adapter or another checkpoint.
Stages `vae` and `flow` (`configs/sft_tiny.py`) train the autoencoder, and the MMDiT on its latents,
from nothing. Stopped and started again with the same configuration, a run goes on where it was.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Array
from ml_collections import config_flags

from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.errors import CheckpointError
from sl_jax.checkpoints.source import resolve_model
from sl_jax.data import FolderError
from sl_jax.inference.prompts import DEFAULT_PROMPT, PromptBatches, PromptStore, encode_prompts
from sl_jax.inference.tiny_text import make_tiny_text_encoder
from sl_jax.parallel.joining import joined
from sl_jax.parallel.processes import ProcessError, Processes
from sl_jax.training import finetune, from_nothing
from sl_jax.training.configuration import ConfigError, distributed_part
from sl_jax.training.console import ending_in_a_line, set_up_logging
from sl_jax.training.flags import parse_config_flags
from sl_jax.training.health import NotFiniteError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_EXPECTED = (ConfigError, CheckpointError, FolderError, ProcessError, NotFiniteError)


def main(argv: list[str]) -> None:
    """Runs the configured stages to the end."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --config=FILE")
    config = _CONFIG.value.to_dict()
    run = make_base if {"vae", "flow"} <= set(config) else tune
    with (
        ending_in_a_line(_EXPECTED, "update", config["workdir"]) as code_of,
        joined(distributed_part(config), code_of) as processes,
    ):
        result = run(config, processes)
        if processes.is_main:
            print(f"The result is in {result}.")


def make_base(config: Mapping[str, Any], processes: Processes) -> Path:
    """Stages `vae` and `flow`: a base from nothing."""
    if processes.count > 1:
        raise ConfigError(
            f"the stages vae and flow run in one process, not in {processes.count}; please start "
            "one alone"
        )
    settings = from_nothing.from_mapping(config)
    return from_nothing.train(settings, partial(_make_text, settings.seed))


def _make_text(seed: int, folder: Path) -> Array:
    make_tiny_text_encoder(folder, seed)
    return encode_prompts(folder, [DEFAULT_PROMPT], dtype=np.float32).hidden[0]


def tune(config: Mapping[str, Any], processes: Processes) -> epath.Path:
    """Stage `tune`: fine-tunes `config.model` on `config.data`, on all processes of the run."""
    settings = finetune.from_mapping(config, jax.device_count())
    model = resolve_model(settings.model)
    for where in (settings.workdir, settings.data.path, settings.data.eval_data):
        reachable(where)
    max_tokens, dtype = settings.data.max_text_tokens, settings.compute.dtype

    def encoded(folder: epath.Path, prompts: Sequence[str]) -> PromptBatches:
        store = PromptStore(model, folder, max_tokens=max_tokens, dtype=dtype)
        return PromptBatches(store, prompts)

    return finetune.fine_tune(settings, model, encoded, processes)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_config_flags)

"""A base model for tests: a whole checkpoint folder, small, with random weights."""

import jax
import numpy as np

from sl_jax.inference.tiny_text import make_tiny_text_encoder
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae, VaeConfig
from sl_jax.training import export
from sl_jax.training.supervised import fresh_params


def write_random_base(folder):
    """Writes it in the diffusers layout, in float32; returns the folder."""
    vae = Vae(VaeConfig(4, 16, (1, 2, 2, 2), 1, (False, True, True), (0.1,) * 16, (0.9,) * 16, 4))
    pixels = np.zeros((1, 16, 16, 4), np.float32)
    export.save_vae(
        folder / "vae", vae.config, fresh_params(vae, jax.random.key(0), pixels), np.float32
    )
    model = MMDiT(MMDiTConfig(2, 16, 2, 64, axes_dims_rope=(4, 6, 6)))
    inputs = (
        np.zeros((1, 2, 64), np.float32),
        np.zeros((1, 1, 64), np.float32),
        np.zeros((1, 3, 64), np.float32),
        np.zeros(1, np.float32),
    )
    params = fresh_params(
        model, jax.random.key(1), *inputs, LatentGrid(1, 1, 1), method="initialise"
    )
    export.save_transformer(folder / "transformer", model.config, params, np.float32)
    export.save_pipeline_files(folder, 2.0)
    make_tiny_text_encoder(folder)
    return folder

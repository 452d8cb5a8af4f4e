"""Every test sees eight simulated CPU devices, on which the meshes are tested."""

import os
import signal

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """Tests, and the commands that they start, never write the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SL_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """A whole checkpoint folder in the diffusers layout: small, with random float32 weights."""
    import jax
    import numpy as np

    from sl_jax.inference.tiny_text import make_tiny_text_encoder
    from sl_jax.models.mmdit import MMDiT, MMDiTConfig
    from sl_jax.models.rope import LatentGrid
    from sl_jax.models.vae import Vae, VaeConfig
    from sl_jax.training import export
    from sl_jax.training.supervised import fresh_params

    folder = tmp_path_factory.mktemp("checkpoint")
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
